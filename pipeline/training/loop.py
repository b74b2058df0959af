"""The training loop, once, from top to bottom. It runs under Ray Train, under torchrun, and alone."""

from __future__ import annotations

from contextlib import ExitStack, closing

import torch
from refinedet.pipeline.config.batches import plan_batches
from refinedet.pipeline.config.schedule import make_schedule
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.data.samples import Cursor
from refinedet.pipeline.runs import settings
from refinedet.pipeline.training.checkpoint import Checkpoint, load_checkpoint, load_fork
from refinedet.pipeline.training.ema import AveragedWeights
from refinedet.pipeline.training.engine import Engine
from refinedet.pipeline.training.feed import Feed
from refinedet.pipeline.training.profile import check_profile_steps
from refinedet.pipeline.training.records import TrainResult
from refinedet.pipeline.training.resume import check_same_data, check_steps_left
from refinedet.pipeline.training.state import broadcast_state, restore_detector, seed_everything, select
from refinedet.pipeline.training.step import TrainState, train_step
from refinedet.pipeline.training.task import Callbacks, Task
from refinedet.pipeline.training.upkeep import Upkeep
from refinedet.pipeline.training.world import World


def train(spec: Training, world: World, task: Task, callbacks: Callbacks) -> TrainResult:
    """Train from the newest good checkpoint in the run, or from the initial weights, to the end. Collective.

    Raises, on all ranks alike: NonFiniteError; UserError or RuntimeError for a stream that failed on one of them;
    SaveError where the last checkpoint could not be written, with the place of the weights.
    """
    with ExitStack() as stack:
        _configure_torch(stack, spec.deterministic)
        state, checkpoint = build_state(stack, spec, world, task, callbacks)
        upkeep = stack.enter_context(closing(Upkeep(state, world, task, callbacks, checkpoint)))
        stopped = False
        while state.step < state.schedule.total_steps and not stopped:
            outcome = train_step(state, upkeep.clock)
            agreed = upkeep.agree(outcome)  # one all-gather: losses, faults and requests to stop of every rank
            upkeep.check(outcome, agreed)  # raises on all ranks together, or counts a skipped step
            state.step += 1
            stopped = agreed.stop
            upkeep.validate_if_due()
            upkeep.save_if_due(agreed)  # also where a rank was asked to stop
            upkeep.record(outcome, agreed)
        return upkeep.finish(stopped)


def build_state(
    stack: ExitStack, spec: Training, world: World, task: Task, callbacks: Callbacks
) -> tuple[TrainState, Checkpoint | None]:
    """State to train from: the newest checkpoint's, a fork's, or the initial one. Collective.

    stack  closes engine and stream
    """
    seed_everything(task.seed, world.rank)

    # Weights first: the engine and the average copy them when they are built.
    checkpoint = fill_detector(world, task, callbacks)

    plan = plan_batches(spec, world.size)
    engine = Engine(task.detector, task.loss, spec, plan, world)
    stack.callback(engine.close)
    average = AveragedWeights(task.detector, spec.ema_decay, world)

    epoch, batch = (checkpoint.manifest["epoch"], checkpoint.manifest["batch"]) if checkpoint else (0, 0)
    stream = stack.enter_context(closing(task.make_stream(Cursor(epoch, batch), plan)))
    schedule = make_schedule(spec, stream.batches_per_epoch)
    check_profile_steps(spec.profile_steps, schedule.total_steps)
    feed = Feed(iter(stream), world.device, spec.channels_last)

    state = TrainState(engine, average, feed, schedule, task.seed)
    if checkpoint:
        check_same_data(checkpoint, schedule, plan.global_batch, task.facts.get("shards"))
        check_steps_left(checkpoint, schedule, task.run_dir)
        restore_progress(state, checkpoint)
    return state, checkpoint


def fill_detector(world: World, task: Task, callbacks: Callbacks) -> Checkpoint | None:
    """Fill the detector by the newest good checkpoint, else by the fork's, else by the initial weights. Collective.

    returns  the checkpoint, if one was taken
    """
    checkpoint = load_checkpoint(task.run_dir, world, callbacks.on_event)
    if checkpoint is None and task.fork_from:
        checkpoint = load_fork(task.fork_from, world)
    if checkpoint:
        restore_detector(task.detector, checkpoint.tensors, checkpoint.path)
    else:
        world.from_main(task.load_initial)  # read once for the job
        broadcast_state(task.detector, world)
    return checkpoint


def restore_progress(state: TrainState, checkpoint: Checkpoint) -> None:
    """Take momentum, average and counters from a checkpoint; the weights are in the detector. Collective."""
    state.engine.load_momentum(select(checkpoint.tensors, "momentum"))
    state.average.load(select(checkpoint.tensors, "ema"))
    known = checkpoint.manifest
    state.engine.scale.value, state.engine.scale.good_steps = known["loss_scale"]
    state.step, state.skipped, state.metrics = known["step"], known["skipped_steps"], known["metrics"]
    checkpoint.tensors.clear()


def _configure_torch(stack: ExitStack, deterministic: bool) -> None:
    if deterministic:
        settings.suggest("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # Images are all of one size, so that trying algorithms pays.
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=not deterministic, deterministic=deterministic)
    stack.enter_context(flags)
