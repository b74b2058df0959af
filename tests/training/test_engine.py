from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from refinedet.model import RefineDet, RefineDetConfig, sum_losses
from refinedet.pipeline.config.batches import BatchPlan, divide_batch
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.data.samples import Cursor
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training import engine as engine_module
from refinedet.pipeline.training.engine import Engine, LossScale, deepspeed_config, resolve_precision
from refinedet.pipeline.training.optimizers import group_parameters, import_apex_sgd
from refinedet.pipeline.training.world import World
from torch import nn

from tests.training.fakes import SMALL_REFINEDET, SquareStream, TinyDetector, TinyStream, tiny_loss
from tests.training.workers import run_together

CPU = torch.device("cpu")
SPEC = Training(global_batch=4, micro_batch=2, precision="fp32")
BIASES = ("body.0.bias", "body.3.bias", "rare.bias")  # not the norm's shift


def run_steps(
    engine: Engine,
    plan: BatchPlan,
    steps: int,
    rate: float = 0.05,
    stream: type[TinyStream] = TinyStream,
    rank: int = 0,
) -> list[list[float]]:
    """-> losses of every micro-batch, this rank's share"""
    batches = iter(stream(Cursor(), plan, rank))
    seen = []
    for _ in range(steps):
        for _ in range(plan.accumulation):
            batch = next(batches)
            total, losses = engine.forward(batch.images, batch.targets)
            engine.backward(total)
            seen.append(losses.tolist())
        engine.step(rate)
    return seen


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("biases", [(1.0, 1.0), (2.0, 0.0)])
def test_an_engine_takes_the_steps_of_plain_sgd(
    world: World, stage: int, clip: float | None, biases: tuple[float, float]
) -> None:
    spec = SPEC.model_copy(
        update={
            "zero_stage": stage,
            "gradient_clip": clip,
            "bias_lr_multiplier": biases[0],
            "bias_decay_multiplier": biases[1],
        }
    )
    plan = divide_batch(spec.global_batch, spec.micro_batch, 1)
    engine = Engine(TinyDetector(), tiny_loss, spec, plan, world)
    run_steps(engine, plan, 4)

    plain = TinyDetector()
    groups = [
        {"params": [p for n, p in plain.named_parameters() if n not in BIASES], "weight_decay": 5e-4},
        {"params": [p for n, p in plain.named_parameters() if n in BIASES], "weight_decay": 5e-4 * biases[1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    optimizer.param_groups[1]["lr"] = 0.05 * biases[0]
    batches = iter(TinyStream(Cursor(), plan, 0))
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        for _ in range(plan.accumulation):
            batch = next(batches)
            sums = tiny_loss(plain(batch.images), batch.targets)  # type: ignore[arg-type]
            (sums.divide(sums.positives).total / plan.accumulation).backward()
        for parameter in plain.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(engine.parameters[name], parameter, atol=1e-6, rtol=1e-5)
    engine.close()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_leaves_no_trace(world: World, stage: int, bad: float) -> None:
    spec = SPEC.model_copy(update={"zero_stage": stage})
    plan = divide_batch(spec.global_batch, spec.micro_batch, 1)
    engine = Engine(TinyDetector(), tiny_loss, spec, plan, world)
    run_steps(engine, plan, 2)
    before = {name: parameter.detach().clone() for name, parameter in engine.parameters.items()}
    momentum = {name: value.clone() for name, value in engine.momentum()}
    assert all(value.abs().sum() > 0 for value in momentum.values())
    images = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    for targets in ([bad, 1.0], [1.0, 1.0]):
        total, _ = engine.forward(images, TinyStream.targets_of(targets))
        engine.backward(total)
    assert not engine.step(0.05)
    assert engine.gradient_norm == torch.inf
    assert "body.0.weight" in engine.non_finite_gradients([(images, TinyStream.targets_of([bad, 1.0]))])
    assert all(torch.equal(engine.parameters[name], value) for name, value in before.items())
    assert all(torch.equal(value, momentum[name]) for name, value in engine.momentum())
    run_steps(engine, plan, 1)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in engine.parameters.values())
    engine.close()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_refused_gradient_leaves_no_trace_whatever_deepspeed_makes_of_it(
    world: World, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPEC.model_copy(update={"zero_stage": stage, "bias_lr_multiplier": 2.0})
    plan = divide_batch(spec.global_batch, spec.micro_batch, 1)
    monkeypatch.setattr(engine_module, "DEEPSPEED_REFUSES", False)
    engine = Engine(TinyDetector(), tiny_loss, spec, plan, world)
    run_steps(engine, plan, 1)
    before = [tensor.clone() for tensor in (*engine.parameters.values(), *dict(engine.momentum()).values())]
    with monkeypatch.context() as refusing:
        refusing.setattr(engine.gradients, "finite", lambda world: False)
        run_steps(engine, plan, 1)
    after = [*engine.parameters.values(), *dict(engine.momentum()).values()]
    assert all(map(torch.equal, before, after))
    assert engine.gradient_norm == torch.inf
    run_steps(engine, plan, 1)
    assert not any(map(torch.equal, before, engine.parameters.values()))
    engine.close()


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("refuses", [True, False], ids=["deepspeed refuses", "ours refuses"])
def test_a_gradient_that_is_not_finite_in_one_group_of_one_rank_is_applied_on_none(
    tmp_path: Path, stage: int, refuses: bool
) -> None:
    if refuses and not engine_module.DEEPSPEED_REFUSES:
        pytest.skip("this release of DeepSpeed applies such a gradient")
    for rank in (0, 1):
        assert run_together(_steps_with_a_bad_gradient, tmp_path, stage, rank, refuses) == [[False, True, True]] * 2


def _steps_with_a_bad_gradient(world: World, stage: int, bad_rank: int, refuses: bool) -> list[bool]:
    """-> whether the bad step was applied, whether it left no trace, whether the next one is finite and applied"""
    engine_module.DEEPSPEED_REFUSES = refuses  # in a process of its own
    spec = SPEC.model_copy(update={"zero_stage": stage, "bias_lr_multiplier": 2.0})
    plan = divide_batch(spec.global_batch, spec.micro_batch, world.size)
    engine = Engine(TinyDetector(), tiny_loss, spec, plan, world)
    run_steps(engine, plan, 1, rank=world.rank)
    before = [tensor.clone() for tensor in (*engine.parameters.values(), *dict(engine.momentum()).values())]
    last_bias = engine.parameters["rare.bias"]  # of the second group, while the first one's gradient is finite
    hook = last_bias.register_hook(lambda gradient: gradient * (torch.inf if world.rank == bad_rank else 1.0))
    images = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    total, losses = engine.forward(images, TinyStream.targets_of([1.0, 1.0]))
    assert losses.isfinite().all()
    engine.backward(total)
    applied = engine.step(0.05)
    assert engine.gradient_norm == torch.inf
    hook.remove()
    after = [*engine.parameters.values(), *dict(engine.momentum()).values()]
    untouched = all(map(torch.equal, before, after))
    total, _ = engine.forward(images, TinyStream.targets_of([1.0, 1.0]))
    engine.backward(total)
    good = engine.step(0.05) and all(bool(parameter.isfinite().all()) for parameter in engine.parameters.values())
    return [applied, untouched, good]


def test_the_config_of_deepspeed_is_that_of_the_spec() -> None:
    spec = Training(global_batch=32, micro_batch=4, zero_stage=2, gradient_clip=3.0)
    config = deepspeed_config(spec, divide_batch(32, 4, 2), "bf16", 1001)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 3.0
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["overlap_comm"]
    assert config["zero_optimization"]["reduce_bucket_size"] == 1002
    assert deepspeed_config(Training(), divide_batch(32, None, 1), "fp32", 10)["gradient_clipping"] == 0.0


def test_auto_is_bf16_only_where_the_processor_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda given=capabilities: given, raising=False)
        assert resolve_precision(Training(), CPU) == expected
    assert resolve_precision(Training(precision="fp32"), CPU) == "fp32"


def test_biases_have_their_own_group_where_the_spec_says_so() -> None:
    detector = TinyDetector()
    (together,) = group_parameters(detector, Training())
    assert len(together["params"]) == len(list(detector.parameters()))
    weights, biases = group_parameters(detector, Training(bias_lr_multiplier=2, bias_decay_multiplier=0))
    assert (biases["lr_multiplier"], biases["weight_decay"]) == (2, 0)
    assert len(weights["params"]) + len(biases["params"]) == len(together["params"])


@pytest.mark.parametrize("backbone", ["resnet18", "vgg16_reduced", "tf_efficientnet_lite0"])
def test_pretrained_layers_have_a_rate_of_their_own(backbone: str) -> None:
    with torch.device("meta"):
        detector = RefineDet(RefineDetConfig(backbone=backbone, input_size=64))
    groups = group_parameters(detector, Training(backbone_lr_multiplier=0.1, bias_lr_multiplier=2))
    rates = {id(parameter): group["lr_multiplier"] for group in groups for parameter in group["params"]}
    assert {0.1, 1, 2} <= {*rates.values()} <= {0.1, 0.2, 1, 2}
    assert len(rates) == len(list(detector.parameters()))
    slow = {name for name, parameter in detector.named_parameters() if rates[id(parameter)] in (0.1, 0.2)}
    assert all(name.startswith(("backbone.body.", "backbone.stages.")) for name in slow)
    assert not any(name.startswith("backbone.stages.6") for name in slow), "VGG's extra stages are new"
    assert any(name.startswith("backbone.norms") or ".extra" in name for name in rates_of(detector, rates, 1.0))


def rates_of(detector: nn.Module, rates: dict[int, float], rate: float) -> set[str]:
    return {name for name, parameter in detector.named_parameters() if rates[id(parameter)] == rate}


@pytest.mark.parametrize("options", [{}, {"backbone": "vgg16_reduced"}, {"backbone": "convnext_atto"}])
def test_the_biases_are_those_of_convolutions_not_of_norms(options: dict[str, Any]) -> None:
    """In the Caffe release gain and shift of a norm have the multipliers of weights."""
    with torch.device("meta"):
        detector = RefineDet(RefineDetConfig(**{"backbone": "resnet18", "input_size": 64, **options}))
    groups = group_parameters(detector, Training(bias_lr_multiplier=2, bias_decay_multiplier=0))
    found = {id(parameter) for parameter in groups[1]["params"]}
    biases, norms = set(), set()
    for module in detector.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d) and module.bias is not None:
            biases.add(id(module.bias))
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            norms |= {id(parameter) for parameter in module.parameters()}
    assert found == biases
    assert len(biases) >= 8
    assert not found & norms


def test_another_package_named_apex_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match="needs CUDA, and this worker is on cpu"):
        import_apex_sgd(CPU)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="which is not installed"):
        import_apex_sgd(cuda)
    stranger = ModuleType("apex")
    stranger.__file__ = str(tmp_path / "apex.py")
    monkeypatch.setitem(sys.modules, "apex", stranger)
    with pytest.raises(UserError, match="is another project of that name"):
        import_apex_sgd(cuda)


def test_the_loss_scale_halves_on_overflow_and_grows_again() -> None:
    scale = LossScale(enabled=True, patience=3)
    start = scale.value
    scale.update(overflow=True)
    assert scale.value == start / 2
    for _ in range(3):
        scale.update(overflow=False)
    assert scale.value == start
    scale.value = 2.0**-10
    assert not scale.exhausted
    scale.update(overflow=True)
    assert scale.exhausted


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_stays_near_fp32_and_keeps_fp32_weights(world: World, precision: str, stage: int) -> None:
    weights = {}
    for each in ("fp32", precision):
        spec = SPEC.model_copy(update={"zero_stage": stage, "precision": each})
        plan = divide_batch(spec.global_batch, spec.micro_batch, 1)
        engine = Engine(TinyDetector(), tiny_loss, spec, plan, world)
        outputs: list[torch.dtype] = []
        engine.detector.body[0].register_forward_hook(  # type: ignore[index]
            lambda module, inputs, output, outputs=outputs: outputs.append(output.dtype)
        )
        assert engine.scale.value == (2.0**16 if each == "fp16" else 1.0)
        engine.scale.value = min(engine.scale.value, 2.0**8)  # the gradients of this detector are large
        run_steps(engine, plan, 1)
        weights[each] = {name: parameter.detach().clone() for name, parameter in engine.parameters.items()}
        assert set(outputs) == {{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[each]}
        engine.close()
    assert all(parameter.dtype == torch.float32 for parameter in weights[precision].values())
    start, half, whole = (
        torch.cat([tensors[name].detach().flatten() for name in weights["fp32"]])
        for tensors in (dict(TinyDetector().named_parameters()), weights[precision], weights["fp32"])
    )
    assert 0 < (half - whole).norm() < 0.1 * (whole - start).norm()


@pytest.mark.dist
def test_synchronised_norms_have_the_same_statistics_on_all_ranks(tmp_path: Path) -> None:
    for norm, same in (("sync", True), ("batch", False)):
        first, second = run_together(_statistics_after_two_steps, tmp_path, norm)
        assert first["weights"] == second["weights"]
        assert (first["statistics"] == second["statistics"]) == same


def _statistics_after_two_steps(world: World, norm: str) -> dict[str, list[float]]:
    config = replace(SMALL_REFINEDET, norm=norm)
    spec = Training(global_batch=8, micro_batch=2, precision="fp32", zero_stage=1)
    plan = divide_batch(spec.global_batch, spec.micro_batch, world.size)
    torch.manual_seed(0)
    engine = Engine(RefineDet(config), functools.partial(sum_losses, config=config), spec, plan, world)
    run_steps(engine, plan, 2, rate=1e-3, stream=SquareStream, rank=world.rank)
    means = [buffer for name, buffer in engine.detector.named_buffers() if name.endswith("running_mean")]
    assert means
    return {
        "statistics": [float(mean.double().sum()) for mean in means],
        "weights": [float(parameter.detach().double().sum()) for parameter in engine.parameters.values()],
    }


@pytest.mark.parametrize("stage", [1, 2])
def test_recomputed_activations_give_the_same_step(world: World, stage: int) -> None:
    spec = Training(global_batch=2, precision="fp32", zero_stage=stage)
    plan = divide_batch(spec.global_batch, spec.micro_batch, 1)
    weights = []
    for recompute in (False, True):
        config = replace(SMALL_REFINEDET, activation_checkpointing=recompute)
        torch.manual_seed(0)
        engine = Engine(RefineDet(config), functools.partial(sum_losses, config=config), spec, plan, world)
        run_steps(engine, plan, 1, rate=1e-3, stream=SquareStream)
        weights.append({name: parameter.detach().clone() for name, parameter in engine.parameters.items()})
        engine.close()
    for name, parameter in weights[0].items():
        torch.testing.assert_close(weights[1][name], parameter, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_momentum_of_every_group_is_read_and_set_whole(world: World, stage: int) -> None:
    spec = SPEC.model_copy(update={"zero_stage": stage, "bias_lr_multiplier": 2.0})
    plan = divide_batch(spec.global_batch, spec.micro_batch, 1)
    engine = Engine(TinyDetector(), tiny_loss, spec, plan, world)
    assert {name for name, _ in engine.momentum()} == set(engine.parameters)
    run_steps(engine, plan, 2)
    momentum = {name: value.clone() for name, value in engine.momentum()}
    assert all(value.abs().sum() > 0 for value in momentum.values())
    engine.load_momentum({name: 2 * value for name, value in momentum.items()})
    assert all(torch.equal(value, 2 * momentum[name]) for name, value in engine.momentum())
    engine.close()
