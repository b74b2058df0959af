"""Evaluation stages on a real local Ray: workers killed in the middle, files cut, VOC, sets without truth."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch
from jsonschema import validate
from refinedet.model import RefineDet
from refinedet.model.hub import detector_metadata
from refinedet.pipeline.cli.main import app
from refinedet.pipeline.cluster.detection_stage import DetectionPool, run_detection
from refinedet.pipeline.cluster.evaluate import evaluate_run
from refinedet.pipeline.config.recipes import MERGE_RULES
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_files import dump_spec, load_spec, parse_spec
from refinedet.pipeline.data.index import open_shards
from refinedet.pipeline.data.reading import write_coco_annotations
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.drills.bench import SPEC
from refinedet.pipeline.evaluation.chosen_run import choose_run
from refinedet.pipeline.evaluation.chunks import Chunk, ChunkResult, write_chunk
from refinedet.pipeline.evaluation.detection_job import DetectionJob, make_detection_job
from refinedet.pipeline.evaluation.detection_results import conclude
from refinedet.pipeline.evaluation.detection_worker import ChunkAnswer
from refinedet.pipeline.evaluation.diagnose import diagnose
from refinedet.pipeline.evaluation.metrics import evaluate
from refinedet.pipeline.evaluation.server_files import ROW_SCHEMA
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.data.shape_files import write_shapes

VOC_CLASSES = load_spec(str(Path(__file__).parents[2] / "jobs" / "voc07_refinedet320_vgg16.yaml")).data.classes

pytestmark = pytest.mark.dist

NUM_IMAGES, IMAGES_PER_CHUNK = 24, 4


def make_run(folder: Path, **changes: Any) -> Run:
    """A run that looks trained: shards, ground truth and weights (random ones) exist."""
    values = {
        "name": "r",
        "runs": str(folder),
        "data": {**SPEC["data"], "train": [{"count": 4}], "val": [{"count": NUM_IMAGES}]},
        "model": {**SPEC["model"], "theta": 1.0, "score_threshold": 0.0, "max_detections": 30},
        # A convolution's last bit may differ with the size of the batch, which differs at a cut.
        "evaluation": {"images_per_chunk": IMAGES_PER_CHUNK, "batch_size": 1},
        "cluster": {"workers": 1},
    }
    run = Run(JobSpec.model_validate({**values, **changes}))
    shards = prepare_shards(run.spec.data, "val", f"{run.shards}/val")
    write_coco_annotations(shards, run.ground_truth("val"))
    torch.manual_seed(0)
    detector = RefineDet(run.spec.model, [category.name for category in shards.categories])
    save_file(detector.state_dict(), run.weights, detector_metadata(detector))
    Path(run.file("spec.yaml")).write_text(dump_spec(run.spec))
    return run


def with_workers(run: Run, workers: int) -> Run:
    cluster = run.spec.cluster.model_copy(update={"evaluation_workers": workers})
    return Run(run.spec.model_copy(update={"cluster": cluster}))


def detect(run: Run, job: DetectionJob, told: list[str] | None = None):
    seen: list[int] = []
    with DetectionPool() as pool:
        found = run_detection(
            run,
            job,
            pool,
            on_progress=lambda done, total: seen.append(done),
            report=(told if told is not None else []).append,
            stop=threading.Event(),
        )
    assert seen[-1] == len(job.image_ids)
    return found


def chunks_begun(run: Run) -> list[str]:
    """Names of the chunks that workers detected on, in the words of their logs."""
    lines = [line for path in Path(run.path, "logs").glob("single-*.log") for line in path.read_text().splitlines()]
    return sorted(line.split("detection_worker: ")[1].split(":")[0] for line in lines if "detecting on" in line)


class Killer(threading.Thread):
    """Kills one worker, hard, once it has a second chunk of the run in hand."""

    def __init__(self, run: Run) -> None:
        super().__init__(daemon=True)
        self.run_to_watch = run
        self.before = len(chunks_begun(run))
        self.killed: int | None = None

    def run(self) -> None:
        for _ in range(20_000):
            if len(chunks_begun(self.run_to_watch)) > self.before + 1:
                for process in psutil.Process().children(recursive=True):
                    try:
                        if "DetectionWorker.work" in " ".join(process.cmdline()):
                            process.send_signal(signal.SIGKILL)
                            self.killed = process.pid
                            return
                    except psutil.Error:
                        continue
            time.sleep(0.002)


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("shapes"))


def test_a_killed_worker_and_a_cut_file_cost_a_chunk_each_and_no_digit(
    connected: None, shapes_run: Run, caplog
) -> None:
    alone = with_workers(shapes_run, 1)
    job, inputs = make_detection_job(alone, "single")
    undisturbed = detect(alone, job)
    names = [f"chunk-{index:05d}.json" for index in range(NUM_IMAGES // IMAGES_PER_CHUNK)]
    assert chunks_begun(shapes_run) == names
    results, measured = Path(job.detections), Path(shapes_run.file("metrics.json"))
    whole, numbers = results.read_bytes(), measured.read_bytes()
    truth, rows = json.loads(Path(job.truth).read_text()), json.loads(whole)
    assert undisturbed.metrics is not None
    assert undisturbed.metrics.values == evaluate("coco", truth, rows).values
    assert undisturbed.metrics.values["AR100"] > 0
    diagnosis = json.loads(numbers)["single"]["diagnosis"]
    expected = diagnose(GroundTruth.of(truth), DetectionTable.of(rows)).to_json()
    expected |= {"levels": diagnosis["levels"], "num_traced": expected["num_objects"]}
    assert diagnosis == json.loads(json.dumps(expected)), "each chunk is examined once, each image traced once"
    shapes_run.commit_stage("evaluate", inputs, list(undisturbed.files))
    assert shapes_run.stage_is_done("evaluate", inputs)

    kept, cut, *lost = [Path(job.folder, name) for name in names]
    for path in (results, cut):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for path in lost:
        path.unlink()
    measured.unlink()
    written = kept.stat().st_mtime_ns
    assert not shapes_run.stage_is_done("evaluate", inputs)
    assert "stage evaluate runs again: detections/single.json has" in caplog.text

    many = with_workers(shapes_run, (os.cpu_count() or 1) + 1)  # one more than can be placed: the others do the work
    same_job, same_inputs = make_detection_job(many, "single")
    assert (same_job.fingerprint, same_inputs) == (job.fingerprint, inputs)
    killer = Killer(shapes_run)
    killer.start()
    told: list[str] = []
    disturbed = detect(many, same_job, told)
    killer.join()
    assert killer.killed, "no worker was killed, so that this shows nothing"
    assert len(told) == 1, told
    assert "died (" in told[0]
    assert disturbed.damaged == [str(cut)]
    assert len(names) - 1 <= len(chunks_begun(shapes_run)) - len(names) <= len(names), "at most one chunk twice"
    assert kept.stat().st_mtime_ns == written
    assert results.read_bytes() == whole
    assert measured.read_bytes() == numbers
    assert disturbed.metrics is not None
    assert disturbed.metrics.to_json() == undisturbed.metrics.to_json()


def conclude_with(run: Run, job: DetectionJob, rows: list[dict[str, Any]]) -> Sequence[str]:
    """The files of a stage whose only chunk found `rows`."""
    chunk = Chunk(0, 0, len(job.image_ids))
    write_chunk(job.folder, chunk, ChunkResult(DetectionTable.of(rows)), fingerprint=job.fingerprint)
    found = conclude(job, run.spec.model, None, {chunk: ChunkAnswer()}, ())
    assert found.num_detections == len(rows)
    assert storage.read_json(job.detections) == rows
    return found.files


def write_voc(root: Path, year: str = "VOC2007", *, annotated: bool = True) -> None:
    """Six images in VOC's layout with bright rectangles, one of them difficult."""
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations")[: 2 + annotated]:
        (root / year / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{number:06d}" for number in range(1, 7)]
    (root / year / "ImageSets" / "Main" / "test.txt").write_text("\n".join(names) + "\n")
    for name in names:
        image, objects = rng.integers(0, 40, (80, 100, 3), dtype=np.uint8), ""
        for number, kind in enumerate(("dog", "person", "dog")):
            x, y = int(rng.integers(1, 50)), int(rng.integers(1, 40))
            image[y : y + 35, x : x + 45] = 255 - 80 * number
            box = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 45}</xmax><ymax>{y + 35}</ymax>"
            hard = int(number == 2 and name == names[0])
            objects += f"<object><name>{kind}</name><difficult>{hard}</difficult><bndbox>{box}</bndbox></object>"
        cv2.imwrite(str(root / year / "JPEGImages" / f"{name}.jpg"), image)
        size = "<size><width>100</width><height>80</height></size>"
        if annotated:
            (root / year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")


def test_a_voc_job_is_measured_by_its_years_rule_and_by_every_merge_rule(connected: None, tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit")
    run = make_run(
        tmp_path,
        data={
            "format": "voc",
            "root": str(tmp_path / "VOCdevkit"),
            "val": [{"set": "VOC2007/test"}],
            "classes": VOC_CLASSES,
        },
        model={**SPEC["model"], "num_classes": 20, "theta": 1.0, "score_threshold": 0.0, "max_detections": 30},
        multiscale={"passes": [{"size": 64}, {"size": 128}], "merge": {"method": "vote"}, "compare_rules": True},
    )
    job, _ = make_detection_job(run, "multiscale")
    assert (job.protocol.metric, job.image_set) == ("voc2007", "VOC2007/test")
    found = detect(run, job)
    truth, rows = json.loads(Path(job.truth).read_text()), json.loads(Path(job.detections).read_text())
    assert sum(one["difficult"] for one in truth["annotations"]) == 1
    expected = evaluate("voc2007", truth, rows)
    metrics = json.loads(Path(run.file("metrics.json")).read_text())
    diagnosis = metrics["multiscale"].pop("diagnosis")
    assert diagnosis["num_images"] == 6
    assert not diagnosis["levels"], "the views of a multi-scale test are not traced"
    assert metrics["multiscale"] == {**expected.to_json(), "unreadable": {"count": 0, "images": []}}
    assert metrics["multiscale"]["voc2007"]["mAP"] > 0
    assert expected.values["mAP"] != evaluate("voc2012", truth, rows).values["mAP"]

    table = metrics["merge_rules"]
    assert {row["rule"] for row in table} == set(MERGE_RULES)
    assert [row["mAP"] for row in table] == sorted((row["mAP"] for row in table), reverse=True)
    assert next(row["mAP"] for row in table if row["rule"] == "box voting") == expected.values["mAP"]
    files = [*Path(job.folder).glob("chunk-*.json"), *Path(job.folder).glob("*/chunk-*.json")]
    assert len(files) == 2 * (1 + len(MERGE_RULES))
    assert len({len(path.read_bytes()) for path in files if path.name == "chunk-00000.json"}) >= len(MERGE_RULES) - 1

    folder = Path(run.path, "submission", "multiscale", "results", "VOC2007", "Main")
    written = sorted(path.name for path in folder.iterdir())
    assert len(written) == 20
    assert written[0] == "comp4_det_test_aeroplane.txt"
    assert sum(len(path.read_text().splitlines()) for path in folder.iterdir()) == len(rows)
    assert set(found.files) == {"detections/multiscale.json"} | {
        str((folder / name).relative_to(run.path)) for name in written
    }


def test_other_voc_shards_are_measured_and_sent_as_their_own_year(tmp_path: Path) -> None:
    """The spec trains and validates on one year; the shards that are named are of another, one without annotations."""
    write_voc(tmp_path / "VOCdevkit")
    write_voc(tmp_path / "VOCdevkit", "VOC2012", annotated=False)
    data = {
        "format": "voc",
        "root": str(tmp_path / "VOCdevkit"),
        "val": [{"set": "VOC2007/test"}],
        "classes": VOC_CLASSES,
    }
    run = make_run(tmp_path, data=data, model={**SPEC["model"], "num_classes": 20})
    own, _ = make_detection_job(run, "single")
    named, _ = make_detection_job(run, "single", shards=f"{run.shards}/val", output=str(tmp_path / "again"))
    assert (
        (own.protocol.metric, own.image_set) == (named.protocol.metric, named.image_set) == ("voc2007", "VOC2007/test")
    )

    path = Path(run.file("spec.yaml"))
    overrides = ["data.train=[]", f"data.shards={tmp_path}/voc12-test", "data.val=[{set: VOC2012/test}]"]
    done = CliRunner().invoke(app, ["shard", str(path), *overrides], catch_exceptions=False)
    assert "6 images, shards: 1" in done.output
    job, _ = make_detection_job(run, "single", shards=f"{tmp_path}/voc12-test/val", output=str(tmp_path / "out"))
    assert (job.protocol.metric, job.image_set) == ("voc2012", "VOC2012/test")
    truth = json.loads(Path(job.truth).read_text())
    assert (len(truth["images"]), truth["annotations"]) == (6, [])
    rows = [{"image_id": image, "category_id": 12, "bbox": [1, 2, 30, 40], "score": 0.5} for image in job.image_ids]
    files = list(conclude_with(run, job, rows))
    folder = "submission/single/results/VOC2012/Main"
    assert {f"{folder}/comp4_det_test_dog.txt", f"{folder}/comp4_det_test_cat.txt"} < set(files)
    lines = (tmp_path / "out" / folder / "comp4_det_test_dog.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [f"{number:06d}" for number in range(1, 7)]

    before = Path(run.ground_truth("val")).read_bytes()
    again = parse_spec({**run.spec.model_dump(mode="json"), "data": {**data, "shards": f"{tmp_path}/voc12-test"}}, "it")
    job, _ = make_detection_job(Run(again), "single", output=str(tmp_path / "third"))
    assert json.loads(Path(job.truth).read_text()) == truth
    assert Path(run.ground_truth("val")).read_bytes() == before, "results that go elsewhere leave the run alone"

    index = Path(f"{tmp_path}/voc12-test/val/index.json")
    content = json.loads(index.read_text())
    del content["sets"]  # as an earlier release wrote it
    index.write_text(json.dumps(content))
    assert open_shards(str(index.parent)).sets == ()


def test_a_set_without_annotations_gives_what_its_server_takes(tmp_path: Path) -> None:
    write_shapes(str(tmp_path / "coco"), 3, part="val", image_size=96)
    listed = next((tmp_path / "coco").rglob("*.json"))
    content = json.loads(listed.read_text())
    listed.write_text(json.dumps({name: content[name] for name in ("images", "categories")}))
    images = next((tmp_path / "coco").rglob("*.jpg")).parent
    split = {"images": images.relative_to(tmp_path).as_posix(), "image_info": str(listed.relative_to(tmp_path))}
    run = make_run(tmp_path, name="test_dev", data={"format": "coco", "root": str(tmp_path), "val": [split]})
    job, _ = make_detection_job(run, "single")
    truth = json.loads(Path(job.truth).read_text())
    assert truth["annotations"] == []
    rows = [{"image_id": image, "category_id": 90, "bbox": [1, 2, 3, 4.04], "score": 0.5} for image in job.image_ids]
    files = conclude_with(run, job, rows)
    assert not Path(run.file("metrics.json")).exists()
    name = "detections_test-dev2017_test-dev_results"
    assert files == ["detections/single.json", f"submission/single/{name}.zip"]
    with zipfile.ZipFile(run.file(files[1])) as archive:
        sent = json.loads(archive.read(f"{name}.json"))
    validate(sent, ROW_SCHEMA)
    assert [row["image_id"] for row in sent] == sorted(job.image_ids)
    assert sent[0]["bbox"] == [1, 2, 3, 4.0]


def test_mistakes_are_met_before_a_worker_starts(shapes_run: Run, tmp_path: Path) -> None:
    """No fixture starts Ray here."""
    folder = shapes_run.path
    with pytest.raises(UserError, match="no run's directory"):
        choose_run(str(tmp_path))
    with pytest.raises(UserError, match=r"memory://nowhere/run. is no run.s directory"):
        choose_run("memory://nowhere/run")
    elsewhere = shapes_run.spec.model_copy(update={"name": "run", "runs": "memory://somewhere"})
    storage.write_bytes("memory://somewhere/run/spec.yaml", dump_spec(elsewhere).encode())
    with pytest.raises(UserError, match="has no `multiscale`"):
        choose_run("memory://somewhere/run/", multiscale=True)
    with pytest.raises(UserError, match="need --output DIRECTORY"):
        choose_run(folder, weights=shapes_run.weights)
    with pytest.raises(UserError, match="has no `multiscale`"):
        choose_run(folder, multiscale=True)
    output = str(tmp_path / "out")
    with pytest.raises(UserError, match="a pass's size must be a multiple of the model's coarsest stride"):
        choose_run(folder, ["multiscale.passes=[{size: 100}]"], multiscale=True, output=output)
    with pytest.raises(UserError, match=r"multiscale\.recipe must be one of"):
        choose_run(folder, ["multiscale.recipe=coco300"], multiscale=True, output=output)
    with pytest.raises(UserError, match=r"--weights: .*nowhere\.pth' does not exist"):
        choose_run(folder, weights=str(tmp_path / "nowhere.pth"), output=output)
    other = Run(shapes_run.spec.model_copy(update={"name": "swapped"}))
    for part in ("train", "val"):
        shutil.copytree(f"{shapes_run.shards}/val", f"{other.shards}/{part}")
    index = Path(other.shards, "train", "index.json")
    content = json.loads(index.read_text())
    first, second, *_ = content["categories"]
    first["name"], second["name"] = second["name"], first["name"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"label 1 .* is 'square' in the first and 'disc' in the second"):
        make_detection_job(other, "single", weights=shapes_run.weights)
    other = RefineDet(shapes_run.spec.model).state_dict()
    name = next(name for name in other if name.startswith("tcb"))
    torch.save({key: value for key, value in other.items() if key != name}, tmp_path / "part.pth")
    with pytest.raises(UserError, match=rf"1 of its tensors do not exist in that shape, such as {name}"):
        evaluate_run(shapes_run, "single", weights=str(tmp_path / "part.pth"), output=output)
    with pytest.raises(UserError, match="have 10 categories, the model has 3"):
        evaluate_run(choose_run(folder, ["model.num_classes=3"], output=output), "single", output=output)
    with pytest.raises(UserError, match="holds no shards"):
        choose_run(folder, shards=str(tmp_path), output=output)
    assert not Path(output).exists()
    assert open_shards(f"{shapes_run.shards}/val").num_samples == NUM_IMAGES
