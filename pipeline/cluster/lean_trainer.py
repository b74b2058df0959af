"""Ray Train without the helpers that this project has no use for.

For every run Ray Train starts actors that control the run, serve Ray Data's shards, ask an autoscaler for room, watch
placement groups, watch preemptions and hold a barrier. Each is a process that imports Ray Train: together half a minute
of a core before the first step, and again after every failure. Here the controller runs in a thread of the driver, data
comes from webdataset, places are found by `placement`, which autoscalers see, placement groups end with their job, the
driver watches for nodes that drain, and workers meet in torch's collectives.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class LeanTrainer(DataParallelTrainer):
    """A trainer of a fixed number of workers, without Ray Data and without requests to an autoscaler.

    Its workers find torchrun's environment; `open_world` makes the process group from it. Thus the controller
    never imports torch.
    """

    def __init__(
        self,
        train_loop_per_worker: Callable[[dict[str, Any]], Any],
        *,
        train_loop_config: dict[str, Any],
        scaling_config: ray.train.ScalingConfig,
        run_config: ray.train.RunConfig,
    ) -> None:
        super().__init__(
            train_loop_per_worker,
            train_loop_config=train_loop_config,
            backend_config=_MeetingPlace(),
            scaling_config=scaling_config,
            run_config=run_config,
        )

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> ray.train.Result:
        policy = _FixedSize(self.scaling_config)
        controller = _Controller(**{**controller_init_kwargs, "scaling_policy": policy})
        asyncio.run(controller.run())
        return controller.get_result()


class _FixedSize(FixedScalingPolicy):
    """Asks nobody for room: the workers' placement group does."""

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class _NoBarrier:
    """Stands where the actor class of Ray Train's barrier does, and for its only actor."""

    @classmethod
    def options(cls, **_: Any) -> type[_NoBarrier]:
        return cls

    @classmethod
    def remote(cls, **_: Any) -> type[_NoBarrier]:
        return cls


worker_group.SynchronizationActor = _NoBarrier  # type: ignore[misc, assignment]
state._shutdown_sync_actor = lambda sync_actor: None


class _WorkerGroup(WorkerGroup):
    """Workers that report to nobody through Ray Train: neither a barrier nor the controller is an actor."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        """That of the job alone: what Ray Train adds is for its controller, and costs every worker's start 2 s."""
        return custom_runtime_env

    def _start(self) -> None:
        try:
            super()._start()
        except BaseException:
            if self._worker_group_state is not None:  # Ray Train leaves these workers and places to its own cleaner
                self._worker_group_state.shutdown()
                self._clear_state()
            raise

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=None,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[index] for name, values in train_context_args.items()},
                )
                for index, worker in enumerate(workers)
            ]
        )


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup


class _MeetingPlace(BackendConfig):
    """Tells every worker who it is, and where rank 0 waits for the others."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Meeting


class _Meeting(Backend):
    share_cuda_visible_devices = True  # a worker's device is the one of its local rank

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _free_address)
        worker_group.execute(_set_environment, address, port)


def _free_address() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def _set_environment(address: str, port: int) -> None:
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
