"""The plan's arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from refinedet.model.config import RefineDetConfig
from refinedet.model.cost import ModelCost, count_cost
from refinedet.pipeline.config.batches import plan_batches
from refinedet.pipeline.config.checks import check_spec
from refinedet.pipeline.config.recipes import RECIPES, estimate_cost
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.config.spec_files import load_spec, parse_spec
from refinedet.pipeline.planning.plan import DEVICES, Device, estimate, print_plan
from refinedet.pipeline.runs.durations import describe_duration
from refinedet.pipeline.runs.errors import UserError
from rich.console import Console

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SPECS = sorted(path for path in JOBS.rglob("*.yaml") if path.parent.name not in ("base", "sweeps"))
# Tables I and V: input size, backbone, AP or mAP at one scale; the last, where the paper has one, at several.
ROWS = {
    "voc07_refinedet320_vgg16": (320, "vgg16_reduced", "81.1", "83.6"),
    "voc07_refinedet512_vgg16": (512, "vgg16_reduced", "82.5", "84.2"),
    "voc12_refinedet320_vgg16": (320, "vgg16_reduced", "79.0", "83.0"),
    "voc12_refinedet512_vgg16": (512, "vgg16_reduced", "80.9", "83.8"),
    "coco_refinedet320_resnet101": (320, "resnet101", "33.2"),
    "coco_refinedet512_resnet101": (512, "resnet101", "37.7"),
    "coco_refinedet1024_resnet101": (1024, "resnet101", "42.1"),
    "coco_refinedet1024_resnet152": (1024, "resnet152", "43.2"),
    "coco_refinedet1024_resnext152": (1024, "resnext152_32x4d", "43.8", "47.2"),
}
# Tables II to IV: expected mAP on VOC 2007 test by spec.
ABLATIONS = {
    "table2_1_full": "81.1",
    "table2_2_no_alignconv": "80.0",
    "table2_3_no_filtering": "79.5",
    "table2_4_no_cascade": "77.3",
    "table2_5_no_tcb": "76.2",
    "table2_deformable": "80.5",
    "table3_kernel3": "81.1",
    "table3_kernel5": "81.3",
    "table3_kernel7": "81.2",
    "table4_theta_1": "79.5",
    "table4_theta_099": "80.0",
    "table4_theta_098": "80.0",
    "table4_theta_095": "79.6",
    "table4_theta_090": "78.1",
    "table4_theta_080": "75.2",
    "table4_training_only": "80.8",
}
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


def test_pretrained_layers_that_stay_as_they_are_have_no_backward() -> None:
    assert figures(backbone_lr_multiplier=0).compute_s == pytest.approx(8 * (6 + 3 * 4) / 500)
    assert figures(backbone_lr_multiplier=0.1).compute_s == pytest.approx(8 * 30 / 500)


def test_compute_is_three_forwards_and_a_fourth_of_the_backbone_when_it_is_recomputed() -> None:
    assert figures().compute_s == pytest.approx(8 * 30 / 500)
    recomputed = RefineDetConfig(activation_checkpointing=True)
    assert figures(model=recomputed).compute_s == pytest.approx(8 * 36 / 500)
    assert figures(4).compute_s == pytest.approx(2 * 30 / 500)


def test_time_goes_by_the_precision() -> None:
    assert figures(precision="fp32").compute_s == pytest.approx(2 * figures(precision="bf16").compute_s)
    assert figures(precision="auto") == figures(precision="bf16"), "the GPUs of the model have it"
    cpu = DEVICES["CPU"]
    spec = Training(global_batch=8, precision="auto")
    slow = estimate(MODEL, COST, spec, plan_batches(spec, 1), cpu)
    assert slow == estimate(MODEL, COST, spec.model_copy(update={"precision": "fp32"}), plan_batches(spec, 1), cpu)


def test_nodes_alone_are_full_ones() -> None:
    job = load_spec(f"{JOBS}/coco_refinedet1024_resnext152.yaml")
    for given, workers in (({"nodes": 2}, 16), ({"nodes": 2, "gpus_per_node": 4}, 8), ({"gpus_per_node": 8}, 8)):
        console = Console(file=io.StringIO(), width=200)
        print_plan(job, console=console, **given)
        assert f" x {workers} workers, on A100" in console.file.getvalue()
    console = Console(file=io.StringIO(), width=200)
    print_plan(load_spec(f"{JOBS}/quickstart.yaml"), console=console, nodes=2)
    assert " x 2 workers, on CPU core, 2 nodes" in console.file.getvalue()


def test_only_communication_that_outlasts_the_backward_pass_counts() -> None:
    alone, four = figures(), figures(4)
    assert alone.step_s == alone.compute_s
    assert four.communication_s == pytest.approx(2 * 400 * 3 / 4 / 1e3)
    assert four.step_s == pytest.approx(four.compute_s / 3 + four.communication_s)


def test_the_largest_job_of_the_paper_is_resolved() -> None:
    console = Console(file=io.StringIO(), width=200)
    print_plan(load_spec(f"{JOBS}/coco_refinedet1024_resnext152.yaml"), console=console, device="H200")
    text = console.file.getvalue()
    for word in ("65,472", "32 = 2 images x 1 accumulated x 16 workers", "406,670 steps", "stride 128: 192", "Memory"):
        assert word in text


def test_a_device_that_is_not_known_is_said() -> None:
    with pytest.raises(UserError, match="choose one of CPU"):
        print_plan(load_spec(f"{JOBS}/quickstart.yaml"), device="abacus")


def test_splits_that_are_trained_and_validated_on_are_said(tmp_path: Path) -> None:
    split = {"images": "photos", "annotations": "all.json"}
    spec = parse_spec({"name": "job", "runs": str(tmp_path), "data": {"root": str(tmp_path), "train": [split],
                      "val": [split]}}, source="test")  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    print_plan(spec, console=console)
    assert "data.val and data.train both name all.json: its metrics are of images that were" in console.file.getvalue()


def header_of(path: Path) -> dict[str, str]:
    """What the comment a spec opens with says, by "Command", "Hardware", "Expected", "Time"."""
    fields = {}
    for line in re.sub(r" \\\n# +", " ", path.read_text()).splitlines():  # a command may go on in the next line
        if not line.startswith("#"):
            break
        if found := re.match(r"# (Command|Hardware|Expected|Time): +(.+)", line):
            fields[found.group(1)] = found.group(2)
    return fields


def printed_plan(path: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_plan(load_spec(str(path)), console=console)
    return console.file.getvalue()


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_command_a_job_opens_with_is_taken(path: Path) -> None:
    command = header_of(path)["Command"]
    spec = load_spec(str(path), re.findall(r"\S+=\S+", command))
    if "refinedet submit" in command:
        check_spec(spec, "cluster")


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_job_has_a_plan_and_says_what_it_takes(path: Path) -> None:
    text, header = printed_plan(path), header_of(path)
    for word in ("Batch", "Time", "Memory", "Traffic", "Assumed"):
        assert f"\n{word}" in text
    assert "more than the" not in text, "it does not fit into the device's memory"
    assert set(header) == {"Command", "Hardware", "Expected", "Time"}
    assert str(path.relative_to(JOBS.parent)) in header["Command"] or path.stem == "quickstart"
    stated = re.match(r"([\d.]+) h of training on (\d+) A100", header["Time"])
    if stated:
        hours, minutes = re.search(r"images/s, (?:(\d+) h )?(?:(\d+) min)?", text).groups()
        planned = int(hours or 0) + int(minutes or 0) / 60
        assert float(stated.group(1)) == pytest.approx(planned, abs=0.06)
        assert f" x {stated.group(2)} workers, on A100" in text
        assert header["Hardware"].startswith(f"{stated.group(2)} GPUs")


def test_every_row_of_the_paper_has_its_job() -> None:
    for name, (size, backbone, *expected) in ROWS.items():
        spec, header = load_spec(str(JOBS / f"{name}.yaml")), header_of(JOBS / f"{name}.yaml")
        assert (spec.name, spec.model.input_size, spec.model.backbone) == (name, size, backbone)
        assert spec.training.global_batch == 32
        assert spec.multiscale is not None
        assert re.findall(r"\b\d\d\.\d\b", header["Expected"]) == expected
        if "voc" in name:
            assert [spec.training.epochs, *spec.training.decay_epochs] == [241, 161, 201]
        else:
            assert [spec.training.epochs, *spec.training.decay_epochs] == [110, 80, 100]
    for name, expected in ABLATIONS.items():
        path = JOBS / "ablation" / f"{name}.yaml"
        assert load_spec(str(path)).data.format == "voc"
        assert header_of(path)["Expected"].startswith(f"{expected} mAP on VOC 2007 test")
    assert {path.stem for path in SPECS} >= {*ROWS, *ABLATIONS}


def test_between_nodes_a_gradient_goes_through_the_network_of_a_node() -> None:
    spec = Training(global_batch=8)
    batch = plan_batches(spec, 8)
    one = estimate(MODEL, COST, spec, batch, DEVICE)
    four = estimate(MODEL, COST, spec, batch, replace(DEVICE, node_gb_s=2e-6), nodes=4)
    weights = 400
    assert one.communication_s == pytest.approx(2 * weights * 7 / 8 / 1e3)
    assert four.communication_s == pytest.approx(2 * weights * 1 / 2 / 1e3 + 2 * weights * 3 / 4 / 2e3)


def test_the_time_of_evaluation_and_multiscale_is_printed() -> None:
    spec = load_spec(str(JOBS / "coco_refinedet512_resnet101.yaml"))
    console = Console(file=io.StringIO(), width=200)
    print_plan(spec, device="A100", nodes=1, gpus_per_node=1, console=console)
    text = console.file.getvalue()
    seconds = 5000 * count_cost(spec.model).total_gflops / (312e3 * 0.25)
    assert f"Evaluation   {describe_duration(seconds)} of forward passes for 5,000 images on 1 workers" in text
    relative = estimate_cost(RECIPES["coco512"].passes, input_size=512, num_images=1)["relative"]
    duration = describe_duration(seconds * relative)
    assert f"Multi-scale  {duration} of forward passes, 18 views of each image; coco512: sizes" in text
