"""Ray Train without the helpers that this project has no use for.

For every run Ray Train starts actors that serve Ray Data's shards, ask an autoscaler for room, watch placement groups
and watch preemptions. Each is a process that imports Ray Train: together half a minute of a core before the first step,
and again after every failure. Here data comes from webdataset, places are found by `placement`, which autoscalers see,
placement groups end with their job, and the driver watches for nodes that drain.
"""

from __future__ import annotations

from typing import Any

import ray.train.torch
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy


class LeanTorchTrainer(ray.train.torch.TorchTrainer):
    """A `TorchTrainer` of a fixed number of workers, without Ray Data and without requests to an autoscaler."""

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Any:
        policy = _FixedSize(self.scaling_config)
        return super()._initialize_and_run_controller(**{**controller_init_kwargs, "scaling_policy": policy})


class _FixedSize(FixedScalingPolicy):
    """Asks nobody for room: the workers' placement group does."""

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass
