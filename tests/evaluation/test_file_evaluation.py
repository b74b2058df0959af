"""Evaluation from files alone, and the file for COCO's server."""

from __future__ import annotations

import itertools
import json
import zipfile
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import validate
from refinedet.pipeline.cli.main import app
from refinedet.pipeline.evaluation.file_evaluation import choose_categories, merge_categories, read_files
from refinedet.pipeline.evaluation.metrics import evaluate, make_protocol
from refinedet.pipeline.evaluation.server_files import ROW_SCHEMA, write_submission
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError
from typer.testing import CliRunner

from .judges import judge_by_pycocotools
from .random_truth import random_truth


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    truth, rows = random_truth(3, images=6, categories=5, detections=30)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 0  # VOC has no rule for crowds
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "detections.json").write_text(json.dumps(rows))
    return str(tmp_path / "detections.json"), str(tmp_path / "truth.json")


def evaluate_files(detections, annotations, metric="coco"):
    protocol = make_protocol(metric)
    return evaluate(protocol, *read_files(detections, annotations))


def test_files_give_pycocotools_numbers(files):
    detections, annotations = files
    metrics = evaluate_files(detections, annotations)
    with open(annotations) as truth, open(detections) as rows:
        assert metrics.to_json()["coco"] == judge_by_pycocotools(json.load(truth), json.load(rows))
    assert json.loads(json.dumps(metrics.to_json()))["curves"]["recall"][:3] == [0, 0.01, 0.02]
    assert 0 <= evaluate_files(detections, annotations, "voc2012").to_json()["voc2012"]["mAP"] <= 1


def test_the_command_prints_the_numbers_and_writes_classes_sizes_and_curves(files, tmp_path):
    detections, annotations = files
    known = json.loads((tmp_path / "truth.json").read_text())
    judged = judge_by_pycocotools(known, json.loads((tmp_path / "detections.json").read_text()))
    arguments = ["evaluate", "--detections", detections, "--annotations", annotations, "--json"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "coco.json")], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.split() == [word for name, value in judged.items() for word in (name, f"{value:.6f}")]
    written = json.loads((tmp_path / "coco.json").read_text())
    assert written["coco"] == judged
    names = {category["name"] for category in known["categories"]}
    assert written["per_class"].keys() == written["curves"]["precision50"].keys() == names
    for name in names:
        assert written["per_class"][name].keys() >= {"AP", "AP50", "APs", "APm", "APl"}
        assert len(written["curves"]["precision75"][name]) == len(written["curves"]["recall"]) == 101

    for rule in ("voc2007", "voc2012"):
        out = str(tmp_path / f"{rule}.json")
        done = CliRunner().invoke(app, [*arguments, out, "--metric", rule], catch_exceptions=False)
        expected = evaluate(rule, known, json.loads((tmp_path / "detections.json").read_text()))
        assert done.output == f"mAP    {expected.values['mAP']:.6f}\n"
        with open(out) as file:
            assert json.load(file) == expected.to_json()
    for out, said in ((tmp_path / "none" / "a.json", "lies in no directory"), (tmp_path, "is a directory")):
        with pytest.raises(UserError, match=f"--json: .* {said}"):
            CliRunner().invoke(app, [*arguments[:-1], "--json", str(out)], catch_exceptions=False)
    for arguments in (["evaluate"], ["evaluate", "run", "--detections", detections], ["evaluate", "--detections", "a"]):
        with pytest.raises(UserError, match="takes either a run's directory, or --detections"):
            CliRunner().invoke(app, arguments, catch_exceptions=False)


def run_evaluate(*arguments: str) -> list[str]:
    done = CliRunner().invoke(app, ["evaluate", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output.split()


@pytest.mark.parametrize("seed", range(4))
def test_chosen_and_merged_categories_give_pycocotools_numbers(tmp_path, seed):
    truth, rows = random_truth(seed, images=12, categories=6, detections=60)
    files = {"--annotations": truth, "--detections": rows}
    arguments = []
    for option, content in files.items():
        (tmp_path / f"{option[2:]}.json").write_text(json.dumps(content))
        arguments += [option, str(tmp_path / f"{option[2:]}.json")]
    by_id = {category["id"]: category["name"] for category in truth["categories"]}
    ids = sorted(by_id)[1:6:2]
    chosen = [word for one in reversed(ids) for word in ("--category", by_id[one])]
    cases = (
        (chosen, {"catIds": ids}),
        (["--single-class"], {"useCats": 0}),
        ([*chosen, "--single-class"], {"catIds": ids, "useCats": 0}),
    )
    numbers = set()
    for options, params in cases:
        judged = judge_by_pycocotools(truth, rows, **params)
        shown = [(name, "-" if value < 0 else f"{value:.6f}") for name, value in judged.items()]
        assert run_evaluate(*arguments, *options) == [word for pair in shown for word in pair]
        numbers.add(judged["AP"])
    assert len(numbers) == 3  # else the options do nothing


def test_categories_that_cannot_be_chosen_are_refused(files):
    detections, annotations = files
    arguments = ["--detections", detections, "--annotations", annotations]
    with pytest.raises(UserError, match="no category 'unicorn'; they have"):
        run_evaluate(*arguments, "--category", "unicorn")
    with pytest.raises(UserError, match=r"measure files; give RUN/detections/single\.json"):
        run_evaluate("runs/quickstart", "--single-class")
    truth, table = read_files(detections, annotations)
    for change in (lambda *both: choose_categories(*both, truth.names[:1]), merge_categories):
        with pytest.raises(UserError, match="measure all of them"):
            change(replace(truth, federated=True), table)


def written_as(form: str, truth: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The rows in one of the four formats; a COCO dataset numbers its categories in its own way."""
    if form == "lines":
        return "\n".join(map(json.dumps, rows))
    if form == "dataset":
        annotations = [{**row, "id": n, "category_id": 900 - row["category_id"]} for n, row in enumerate(rows)]
        categories = [{"id": 900 - one["id"], "name": one["name"]} for one in truth["categories"]]
        return json.dumps({"images": truth["images"], "categories": categories, "annotations": annotations})
    if form == "own":
        names = {one["id"]: one["name"] for one in truth["categories"]}
        files = {one["id"]: f"photos/{one['file_name']}" for one in truth["images"]}
        found: dict[str, list[dict[str, Any]]] = {file: [] for file in files.values()}
        for row in rows:
            x, y, width, height = row["bbox"]
            one = {"label": names[row["category_id"]], "score": row["score"], "box": [x, y, x + width, y + height]}
            found[files[row["image_id"]]].append(one)
        return json.dumps(found)
    return json.dumps(rows)


@pytest.mark.parametrize("form", ["list", "lines", "dataset", "own"])
@pytest.mark.parametrize("text_ids", [False, True])
def test_every_format_of_predictions_gives_the_same_numbers(tmp_path, form, text_ids):
    truth, rows = random_truth(5, images=6, categories=4, detections=20)
    for row in rows:
        row["bbox"] = [round(side) for side in row["bbox"]]  # corners and sides are then the same numbers
    expected = judge_by_pycocotools(truth, rows)
    if text_ids:
        for one in (*truth["annotations"], *rows):
            one["image_id"] = f"photo {one['image_id']:04d}"
        for one in truth["images"]:
            one["id"] = f"photo {one['id']:04d}"
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(written_as(form, truth, rows))
    assert evaluate_files(str(tmp_path / "found.json"), str(tmp_path / "truth.json")).values == expected


def test_what_cannot_be_measured_is_a_dash_and_errors_are_explained(tmp_path):
    boxes = {"cat": [100, 100, 200, 200], "dog": [400, 100, 200, 200]}
    truth = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "categories": [{"id": n, "name": name} for n, name in enumerate(boxes, start=1)],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": n, "bbox": box, "area": 40000, "iscrowd": 0}
            for n, box in enumerate(boxes.values(), start=1)
        ],
    }
    rows = [
        {"image_id": 1, "category_id": 3 - n, "bbox": box, "score": 0.9}
        for n, box in enumerate(boxes.values(), start=1)
    ]
    paths = [tmp_path / name for name in ("rows.json", "truth.json", "out.json")]
    paths[0].write_text(json.dumps(rows))
    paths[1].write_text(json.dumps(truth))
    arguments = ["evaluate", "--detections", str(paths[0]), "--annotations", str(paths[1]), "--diagnose"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(paths[2])], catch_exceptions=False)
    lines = done.output.splitlines()
    assert lines[3:6] == ["APs    -", "APm    -", "APl    0.000000"]
    assert "-1" not in done.output
    assert "  classification 1.000000        2 errors" in lines
    assert lines[-1] == "Most confused, from score 0.90: cat as dog 1, dog as cat 1"
    assert json.loads(paths[2].read_text())["diagnosis"]["ap_all_fixed"] == 1
    truth["images"][0]["neg_category_ids"] = []
    paths[1].write_text(json.dumps(truth))
    with pytest.raises(UserError, match="which the diagnosis does not support; remove --diagnose"):
        CliRunner().invoke(app, [*arguments, "--metric", "lvis"], catch_exceptions=False)


def test_bad_input_in_files(files, tmp_path):
    """Possible contents of a file, read as the command reads them."""
    annotations = files[1]
    known = json.loads((tmp_path / "truth.json").read_text())
    rows = json.loads((tmp_path / "detections.json").read_text())

    def evaluate_content(content, truth=annotations, rule="coco"):
        (tmp_path / "other.json").write_text(json.dumps(content))
        return evaluate_files(str(tmp_path / "other.json"), truth, rule).values

    box = rows[1]["bbox"]
    for rule in ("coco", "voc2012"):
        for change, said in (
            ({"score": float("nan")}, "row 1 .*not finite"),
            ({"bbox": [*box[:3], float("-inf")]}, "row 1 .*not finite"),
            ({"bbox": [*box[:2], -1, 5]}, "row 1 .*negative side"),
            ({"image_id": 10**9}, "row 1: image_id 1000000000 is not among the 6"),
            ({"category_id": 10**9}, "row 1: category_id 1000000000 is not among the 5"),
        ):
            with pytest.raises(UserError, match=said):
                evaluate_content([rows[0], {**rows[1], **change}, *rows[2:]], rule=rule)
    values = evaluate_content([])
    assert {values[name] for name in ("AP", "AP50", "AR1", "AR100")} == {0}
    assert evaluate_content([], rule="voc2007") == {"mAP": 0}

    empty = str(tmp_path / "empty.json")
    for truth in ({**known, "annotations": []}, {"images": [], "annotations": [], "categories": []}):
        with open(empty, "w") as file:
            json.dump(truth, file)
        assert set(evaluate_content([], truth=empty).values()) == {-1}
        assert evaluate_content([], truth=empty, rule="voc2012") == {"mAP": -1}
    with pytest.raises(UserError, match="is not among the 0"):
        evaluate_content(rows, truth=empty)


def test_files_that_are_missing_cut_or_swapped_are_named(files, tmp_path):
    detections, annotations = files
    with pytest.raises(UserError, match=r"there is no file .*none\.json"):
        evaluate_files(str(tmp_path / "none.json"), annotations)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        evaluate_files(str(tmp_path), annotations)
    with pytest.raises(UserError, match=r"cannot be read \(Not a directory"):
        evaluate_files(detections, f"{annotations}/truth.json")
    with pytest.raises(UserError, match=r"is not a COCO instances file|is an annotation file"):
        evaluate_files(annotations, detections)
    with pytest.raises(UserError, match="is an annotation file: its annotations have no score"):
        evaluate_files(annotations, annotations)
    content = (tmp_path / "detections.json").read_bytes()
    (tmp_path / "detections.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"detections.json is not whole JSON"):
        evaluate_files(detections, annotations)
    with pytest.raises(UserError, match="received coco2"):
        evaluate_files(detections, annotations, "coco2")


ROW = {"image_id": 7, "category_id": 90, "bbox": [1.04, 2.06, 30.55, 4.0], "score": 0.123456789}


def test_the_servers_file(tmp_path):
    rows = [{**ROW, "score": k / 200} for k in range(150)]
    others = [{**ROW, "category_id": 1, "score": k / 200} for k in range(60)]
    rows = [row for pair in itertools.zip_longest(others, rows) for row in pair if row]
    path = write_submission(str(tmp_path), "refinedet-1024", rows, image_ids=[7, 8])
    assert path.endswith("detections_test-dev2017_refinedet-1024_results.zip")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["detections_test-dev2017_refinedet-1024_results.json"]
        written = json.loads(archive.read(archive.namelist()[0]))
    validate(written, ROW_SCHEMA)
    assert [row["score"] for row in written if row["category_id"] == 90] == [k / 200 for k in range(149, 49, -1)]
    assert [row["score"] for row in written if row["category_id"] == 1] == [k / 200 for k in range(59, -1, -1)]
    assert written[0]["bbox"] == [1.0, 2.1, 30.6, 4.0]
    with open(path, "rb") as file:
        first = file.read()
    write_submission(str(tmp_path), "refinedet-1024", rows, image_ids=[7, 8])
    with open(path, "rb") as file:
        assert file.read() == first


def test_a_box_that_rounding_left_without_width_is_sent_with_some(tmp_path):
    """A detection at the image's edge, clipped to it; the server refuses boxes without area."""
    path = write_submission(str(tmp_path), "a", [{**ROW, "bbox": [9.96, 1.0, 0.0, 4.0]}], image_ids=[7])
    with zipfile.ZipFile(path) as archive:
        (row,) = json.loads(archive.read(archive.namelist()[0]))
    assert row["bbox"] == [10.0, 1.0, 0.1, 4.0]
    table = DetectionTable.of([ROW])
    table.bbox[0, 2] = -0.5
    with pytest.raises(UserError, match="negative side"):
        write_submission(str(tmp_path), "a", table, image_ids=[7])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_id": 9}, "not in the test set"),
        ({"category_id": 91}, r"none of COCO's ids 1\.\.90"),
        ({"score": 1.5}, r"outside 0\.\.1"),
    ],
)
def test_what_the_server_would_refuse(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        write_submission(str(tmp_path), "a", [ROW, {**ROW, **change}], image_ids=[7])
    with pytest.raises(UserError, match="letters, digits"):
        write_submission(str(tmp_path), "a_b/c", [ROW], image_ids=[7])
