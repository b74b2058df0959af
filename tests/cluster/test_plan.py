"""The plan's arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from model.config import RefineDetConfig
from model.cost import ModelCost
from pipeline.cluster.plan import Device, estimate, print_plan
from pipeline.errors import UserError
from pipeline.spec import Training
from pipeline.spec_files import load_spec
from pipeline.training import plan_batches

JOBS = Path(__file__).resolve().parents[2] / "jobs"
COST = ModelCost({"backbone": 60, "adm": 40}, {"backbone": 6.0, "adm": 4.0}, (3, 1), activation_bytes=1000)
DEVICE = Device("D", 1e9, tflops=1.0, utilization=0.5, network_gb_s=1e-6, note="")
MODEL = RefineDetConfig()


def figures(workers: int = 1, model: RefineDetConfig = MODEL, **training):
    spec = Training(global_batch=8, **training)
    return estimate(model, COST, spec, plan_batches(spec, workers), DEVICE)


def test_state_is_weights_gradients_and_momentum() -> None:
    assert figures(precision="fp32").state_bytes == 100 * 4 * 3
    assert figures(precision="fp32", ema_decay=0.9).state_bytes == 100 * 4 * 4
    assert figures(4, precision="fp32", zero_stage=1).state_bytes == 100 * 4 * 2.25
    assert figures(4, precision="fp32", zero_stage=2).state_bytes == 100 * 4 * 1.5


def test_activations_go_by_the_micro_batch() -> None:
    assert figures(precision="fp32").activation_bytes == 8 * 1000
    assert figures(precision="fp32", micro_batch=2).activation_bytes == 2 * 1000
    assert figures(precision="bf16", micro_batch=2).activation_bytes == pytest.approx(2 * 550)


def test_compute_is_three_forwards_and_a_fourth_of_the_backbone_when_it_is_recomputed() -> None:
    assert figures().compute_s == pytest.approx(8 * 30 / 500)
    recomputed = RefineDetConfig(activation_checkpointing=True)
    assert figures(model=recomputed).compute_s == pytest.approx(8 * 36 / 500)
    assert figures(4).compute_s == pytest.approx(2 * 30 / 500)


def test_only_communication_that_outlasts_the_backward_pass_counts() -> None:
    alone, four = figures(), figures(4)
    assert alone.step_s == alone.compute_s
    assert four.communication_s == pytest.approx(2 * 400 * 3 / 4 / 1e3)
    assert four.step_s == pytest.approx(four.compute_s / 3 + four.communication_s)


def test_the_largest_job_of_the_paper_is_resolved() -> None:
    console = Console(file=io.StringIO(), width=200)
    print_plan(load_spec(f"{JOBS}/coco_refinedet1024_resnext152.yaml"), console=console, device="H200")
    text = console.file.getvalue()
    for word in ("65,472", "32 = 2 images x 1 accumulated x 16 workers", "406,560 steps", "stride 128: 192", "Memory"):
        assert word in text


def test_a_device_that_is_not_known_is_said() -> None:
    with pytest.raises(UserError, match="choose one of CPU"):
        print_plan(load_spec(f"{JOBS}/quickstart.yaml"), device="abacus")
