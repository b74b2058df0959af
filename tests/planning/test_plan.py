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
from refinedet.pipeline.config.recipes import RECIPES, estimate_cost
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.config.spec_files import load_spec, parse_spec
from refinedet.pipeline.planning.calibration import Calibration, fingerprint, measured_speed, save_calibration
from refinedet.pipeline.planning.device_speeds import DEVICES, Device, assumed_speed
from refinedet.pipeline.planning.estimates import (
    Workload,
    estimate_duration,
    estimate_memory,
    estimate_step,
    training_gflops,
)
from refinedet.pipeline.planning.plan import Assumptions, make_plan, print_plan
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
DEVICE = Device("D", 1e9, tflops=1.0, utilization=(0.5, 0.5), network_gb_s=1e-6, note="")
MODEL = RefineDetConfig()


def memory(workers: int = 1, **training):
    spec = Training(global_batch=8, **training)
    return estimate_memory(COST, spec, plan_batches(spec, workers), DEVICE)


def step(workers: int = 1, model: RefineDetConfig = MODEL, device: Device = DEVICE, nodes: int = 1, **training):
    spec = Training(global_batch=8, **training)
    rate = assumed_speed(device, spec.precision, "auto").training[0]
    gflops = training_gflops(model, COST, spec)
    return estimate_step(gflops, rate, COST, plan_batches(spec, workers), device, nodes)


def test_state_is_weights_gradients_and_momentum() -> None:
    assert memory(precision="fp32").state_bytes == 100 * 4 * 3
    assert memory(precision="fp32", ema_decay=0.9).state_bytes == 100 * 4 * 4
    assert memory(4, precision="fp32", zero_stage=1).state_bytes == 100 * 4 * 2.25
    assert memory(4, precision="fp32", zero_stage=2).state_bytes == 100 * 4 * 1.5


def test_activations_go_by_the_micro_batch() -> None:
    assert memory(precision="fp32").activation_bytes == 8 * 1000
    assert memory(precision="fp32", micro_batch=2).activation_bytes == 2 * 1000
    assert memory(precision="bf16", micro_batch=2).activation_bytes == pytest.approx(2 * 550)


def test_pretrained_layers_that_stay_as_they_are_have_no_backward() -> None:
    assert step(backbone_lr_multiplier=0).compute_s == pytest.approx(8 * (6 + 3 * 4) / 500)
    assert step(backbone_lr_multiplier=0.1).compute_s == pytest.approx(8 * 30 / 500)


def test_compute_is_three_forwards_and_a_fourth_of_the_backbone_when_it_is_recomputed() -> None:
    assert step().compute_s == pytest.approx(8 * 30 / 500)
    recomputed = RefineDetConfig(activation_checkpointing=True)
    assert step(model=recomputed).compute_s == pytest.approx(8 * 36 / 500)
    assert step(4).compute_s == pytest.approx(2 * 30 / 500)


def test_time_goes_by_the_precision() -> None:
    assert step(precision="fp32").compute_s == pytest.approx(2 * step(precision="bf16").compute_s)
    assert step(precision="auto") == step(precision="bf16"), "the GPUs of the model have it"
    cpu = DEVICES["CPU"]
    assert assumed_speed(cpu, "auto", "auto") == assumed_speed(cpu, "fp32", "fp32")
    one, four = (assumed_speed(cpu, "auto", "auto", cores).training for cores in (1, 4))
    assert four == (4 * one[0], 4 * one[1])


def test_without_a_calibration_a_gpu_reaches_between_a_published_and_a_hopeful_share_of_its_peak() -> None:
    """6,888 images/s on 8 A100 are 13 % of 312 TFLOP/s: 861 x 3 x 2 x 8.03 GFLOP, by hand."""
    published = 6888 / 8 * 3 * 2 * 8.03e9 / 312e12
    low, high = assumed_speed(DEVICES["A100"], "auto", "auto").training
    assert low == pytest.approx(published * 312e3, rel=0.03)
    assert high == pytest.approx(0.40 * 312e3)


def test_a_whole_job_is_the_sum_of_its_parts_and_of_the_failures_on_the_way() -> None:
    work = Workload(steps=1000, forward_gflops=5, validated=200, evaluated=100, multiscale_cost=3, save_every=100)
    found = estimate_duration(work, step_s=2.0, detection_rate=10.0, nodes=4, node_mtbf_hours=1.0)
    assert (found.training_s, found.validation_s, found.evaluation_s, found.multiscale_s) == (2000, 100, 50, 150)
    losses = 4 * 2100 / 3600
    assert found.failures == pytest.approx(losses)
    assert found.failures_s == pytest.approx(losses * (100 + 180))
    assert found.total_s == pytest.approx(2300 + losses * 280)


def test_dollars_are_the_workers_hours_at_the_price_given() -> None:
    spec = load_spec(f"{JOBS}/coco_refinedet512_resnet101.yaml")
    assumed = Assumptions(device="A100", nodes=1, gpus_per_node=8, price_per_gpu_hour=2.5)
    slow, fast = (each.total_s / 3600 * 8 for each in make_plan(spec, assumed).durations)
    console = Console(file=io.StringIO(), width=200)
    print_plan(spec, assumed, console)
    said = f"{fast:,.1f} to {slow:,.1f} GPU hours, {fast * 2.5:,.0f} to {slow * 2.5:,.0f} $ at 2.5 $ a GPU hour"
    assert said in console.file.getvalue()


def calibration_of(spec, **changes) -> Calibration:
    values = {"device": "CPU", "hardware": "Abacus", "model": "this", "fingerprint": fingerprint(spec), "workers": 2}
    rates = {"training": (40.0, 50.0), "detection": (20.0, 25.0), "measured_at": "2026-01-01"}
    return Calibration(**{**values, **rates, **changes})


def test_a_calibrated_job_takes_what_was_measured(tmp_path: Path) -> None:
    spec = load_spec(f"{JOBS}/quickstart.yaml")
    file = str(tmp_path / "cache" / "rates.json")
    for rates in ((1.0, 2.0), (40.0, 50.0)):
        save_calibration(file, calibration_of(spec, training=rates))  # the second replaces the first
    found = make_plan(spec, Assumptions(calibrations=file, elsewhere=True))
    gflops = count_cost(spec.model).total_gflops * 3
    assert found.steps_s == pytest.approx((8 * gflops / 40, 8 * gflops / 50))
    console = Console(file=io.StringIO(), width=200)
    print_plan(spec, Assumptions(calibrations=file, elsewhere=True), console)
    assert "measured on Abacus, 2 workers at once, 2026-01-01" in console.file.getvalue()
    here = make_plan(spec, Assumptions(calibrations=file))
    assert not here.speed.measured, "the CPU of this machine is no abacus"


def test_a_calibration_of_another_model_is_a_range_and_of_another_device_nothing() -> None:
    spec = load_spec(f"{JOBS}/quickstart.yaml")
    other = calibration_of(spec, fingerprint="0" * 16, model="that")
    found = measured_speed(spec, "CPU", "Abacus", [other])
    assert found is not None
    assert not found.measured
    assert (found.training, found.detection) == ((20.0, 100.0), (10.0, 50.0))
    assert measured_speed(spec, "A100", None, [other]) is None
    assert measured_speed(spec, "CPU", "Slide rule", [other]) is None
    more_classes = spec.model_copy(update={"model": replace(spec.model, num_classes=80)})
    larger = spec.model_copy(update={"model": replace(spec.model, input_size=256)})
    assert fingerprint(more_classes) == fingerprint(spec) != fingerprint(larger)


def test_a_broken_file_of_calibrations_is_said(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    for text in ("{", "[1]", '[{"device": "CPU"}]'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"cannot be read .*remove the file and calibrate again"):
            make_plan(load_spec(f"{JOBS}/quickstart.yaml"), Assumptions(calibrations=str(file)))


def test_calibrating_a_gpu_job_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from refinedet.pipeline.planning import measured_run

    monkeypatch.setattr(measured_run, "device_here", lambda: ("CPU", "Abacus"))
    with pytest.raises(UserError, match="trains on GPUs, and this machine has none"):
        measured_run.calibrate(load_spec(f"{JOBS}/coco_refinedet512_resnet101.yaml"))


@pytest.mark.slow
def test_a_machine_is_calibrated_by_training_on_it(tmp_path: Path) -> None:
    """The rates are those of the lines that the run itself wrote; here only that they are rates, and are used."""
    from refinedet.pipeline.planning.measured_run import calibrate

    spec = load_spec(f"{JOBS}/quickstart.yaml", ["model.input_size=64", "training.global_batch=4"])
    found = calibrate(spec)
    assert 0 < found.training[0] <= found.training[1] < 1e6
    assert 0 < found.detection[0] <= found.detection[1] < 1e6
    file = str(tmp_path / "rates.json")
    save_calibration(file, found)
    assert make_plan(spec, Assumptions(calibrations=file, device=found.device)).speed.measured


def test_nodes_alone_are_full_ones() -> None:
    job = load_spec(f"{JOBS}/coco_refinedet1024_resnext152.yaml")
    for given, workers in (({"nodes": 2}, 16), ({"nodes": 2, "gpus_per_node": 4}, 8), ({"gpus_per_node": 8}, 8)):
        console = Console(file=io.StringIO(), width=200)
        print_plan(job, Assumptions(**given), console)
        assert f" x {workers} workers, on A100" in console.file.getvalue()
    console = Console(file=io.StringIO(), width=200)
    print_plan(load_spec(f"{JOBS}/quickstart.yaml"), assumed=Assumptions(nodes=2), console=console)
    assert " x 2 workers, on CPU core, 2 nodes" in console.file.getvalue()


def test_only_communication_that_outlasts_the_backward_pass_counts() -> None:
    alone, four = step(), step(4)
    assert alone.seconds == alone.compute_s
    assert four.communication_s == pytest.approx(2 * 400 * 3 / 4 / 1e3)
    assert four.seconds == pytest.approx(four.compute_s / 3 + four.communication_s)


def test_the_largest_job_of_the_paper_is_resolved() -> None:
    console = Console(file=io.StringIO(), width=200)
    print_plan(
        load_spec(f"{JOBS}/coco_refinedet1024_resnext152.yaml"), assumed=Assumptions(device="H200"), console=console
    )
    text = console.file.getvalue()
    for word in ("65,472", "32 = 2 images x 1 accumulated x 16 workers", "406,670 steps", "stride 128: 192", "Memory"):
        assert word in text


def test_a_device_that_is_not_known_is_said() -> None:
    with pytest.raises(UserError, match="choose one of CPU"):
        print_plan(load_spec(f"{JOBS}/quickstart.yaml"), Assumptions(device="abacus"))


def test_splits_that_are_trained_and_validated_on_are_said(tmp_path: Path) -> None:
    split = {"images": "photos", "annotations": "all.json"}
    spec = parse_spec({"name": "job", "runs": str(tmp_path), "data": {"root": str(tmp_path), "train": [split],
                      "val": [split]}}, source="test")  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    print_plan(spec, console=console)
    assert "data.val and data.train both name all.json: its metrics are of images that were" in console.file.getvalue()


def header_of(path: Path) -> dict[str, str]:
    """The parts of the comment a spec opens with, by "Command", "Hardware", "Expected", "Time"."""
    fields = {}
    for line in re.sub(r" \\\n# +", " ", path.read_text()).splitlines():  # a command may continue in the next line
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
    for word in ("Batch", "Time", "Together", "Loader", "Memory", "Traffic", "Rests on"):
        assert f"\n{word}" in text
    assert "more than the" not in text, "it does not fit into the device's memory"
    assert set(header) == {"Command", "Hardware", "Expected", "Time"}
    assert str(path.relative_to(JOBS.parent)) in header["Command"] or path.stem == "quickstart"
    stated = re.match(r"([\d.]+) to ([\d.]+) h of training on (\d+) A100", header["Time"])
    if stated:
        line = re.search(r"images/s, (.+) to (.+) of training", text)
        for end in (1, 2):
            hours, minutes = re.match(r"(?:(\d+) h )?(?:(\d+) min)?", line.group(end)).groups()
            assert float(stated.group(end)) == pytest.approx(int(hours or 0) + int(minutes or 0) / 60, abs=0.06)
        assert f" x {stated.group(3)} workers, on A100" in text
        assert header["Hardware"].startswith(f"{stated.group(3)} GPUs")


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
    one, four = step(8), step(8, device=replace(DEVICE, node_gb_s=2e-6), nodes=4)
    weights = 400
    assert one.communication_s == pytest.approx(2 * weights * 7 / 8 / 1e3)
    assert four.communication_s == pytest.approx(2 * weights * 1 / 2 / 1e3 + 2 * weights * 3 / 4 / 2e3)


def test_the_time_of_evaluation_and_multiscale_is_printed() -> None:
    spec = load_spec(str(JOBS / "coco_refinedet512_resnet101.yaml"))
    console = Console(file=io.StringIO(), width=200)
    print_plan(spec, Assumptions(device="A100", nodes=1, gpus_per_node=1), console)
    text = console.file.getvalue()
    slow, fast = (5000 * count_cost(spec.model).total_gflops / (312e3 * share) for share in (0.13, 0.40))

    def ends(relative: float = 1.0) -> str:
        return f"{describe_duration(fast * relative)} to {describe_duration(slow * relative)}"

    assert f"Evaluation   {ends()} for 5,000 images on 1 workers" in text
    relative = estimate_cost(RECIPES["coco512"].passes, input_size=512, num_images=1)["relative"]
    assert f"Multi-scale  {ends(relative)}, 18 views of each image; coco512: sizes" in text
