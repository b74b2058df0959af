from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from refinedet.pipeline.report.report import build_report, duration

from tests.report.synthetic import CLASSES, images, write_run

FILES = (
    "spec.yaml",
    "tracking.json",
    "metrics.jsonl",
    "metrics.json",
    "detections/single.json",
    "detections/multiscale.json",
    "ground_truth.json",
    "ledger.json",
    "environment.json",
)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    write_run(folder, num_images=8, size=64, num_steps=48)
    return folder


@pytest.fixture
def run(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "quickstart")


def _page(run, load_images=lambda image_ids: {}) -> str:
    build_report(str(run), load_images=load_images)
    return (run / "report.html").read_text()


class _Tags(HTMLParser):
    """Open elements, to see that the page is well formed."""

    VOID = frozenset({"meta", "img", "link", "br", "line", "circle", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_a_whole_run_is_told_on_one_page_that_needs_no_network(run):
    page = _page(run, images(run))
    headings = ("Accuracy", "Training", "Diagnosis", "Worst images", "Missed objects", "False alarms")
    headings += ("Likely mistakes of the truth", "Detections beside the truth", "Classes", "Data", "Time")
    for heading in (*headings, "Specification", "Environment"):
        assert f"<h2>{heading}</h2>" in page
    assert all(name in page for name in CLASSES)
    assert ">0.503<" in page
    assert ">0.524<" in page
    assert ">+0.021<" in page
    assert all(f">{name}" in page for name in ("Anchors that survive the filter", "stride 8", "ADM rows"))
    assert page.count("data:image/jpeg;base64,") == 6 * 3 + 3 + 6 + 6 + 4
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert all(reference.startswith("data:") or (run / reference).exists() for reference in tags.references), (
        "everything is on the page or in the run's directory"
    )
    assert not re.search(r"@import|url\(|\bfetch\(|<link|src=\"http", page)


def test_no_secret_of_the_spec_reaches_the_page(run):
    page = _page(run)
    assert "mlflow.example" in page
    assert "hunter2" not in page


def test_building_again_gives_the_same_page(run):
    first, second = (re.sub(r"Built [-0-9: ]+UTC", "", _page(run, images(run))) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_left_out_with_a_word(run, name):
    (run / name).unlink()
    page = _page(run)
    if not name.startswith(("detections", "ground_truth")):
        assert re.search(rf"Missing: [^<]*{re.escape(name)}", page)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["{", "[]", '{"single": 3, "images": 1, "coco": []}', "\xff"])
def test_a_broken_file_is_no_crash(run, name, content):
    (run / name).write_bytes(content.encode("latin-1"))
    assert "</html>" in _page(run)


def test_an_empty_folder_has_a_report(tmp_path):
    page = _page(tmp_path)
    assert "Not evaluated yet" in page
    assert "unknown" in page


def test_text_from_the_run_is_escaped(run):
    spec = (run / "spec.yaml").read_text().replace("resnet18", "<script>alert(1)</script>")
    (run / "spec.yaml").write_text(spec)
    truth = (run / "ground_truth.json").read_text().replace('"lens"', '"<b>lens"')
    (run / "ground_truth.json").write_text(truth)
    (run / "metrics.json").write_text((run / "metrics.json").read_text().replace('"lens"', '"<b>lens"'))
    page = _page(run)
    assert "<script>alert" not in page
    assert "<b>lens" not in page


def test_steps_taken_twice_count_once_and_a_cut_line_is_ignored(run):
    from refinedet.pipeline.report.run_data import read_run

    with open(run / "metrics.jsonl", "w") as file:
        for step in (1, 2, 3, 2, 3, 4):
            file.write(json.dumps({"step": step, "epoch": 0, "losses": {"total": 1.0}, "times": {"data": 0.1}}) + "\n")
        file.write('{"step": 5, "lo')
    rows = read_run(str(run)).steps
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] == 1.0
    assert rows[0]["data_wait_s"] == 0.1


def test_images_that_cannot_be_loaded_leave_the_page_without_pictures(run, caplog):
    def broken(image_ids):
        raise OSError("the shards are gone")

    build_report(str(run), load_images=broken)
    assert "<figure>" not in (run / "report.html").read_text()
    assert "the shards are gone" in caplog.text


def test_a_report_goes_to_any_storage():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe(
        "/bucket/run/metrics.json",
        json.dumps({"single": {"coco": {"AP": 0.25}, "protocol": {"metric": "coco"}}}).encode(),
    )
    assert build_report("memory://bucket/run") == "memory://bucket/run/report.html"
    assert b">0.250<" in memory.cat("/bucket/run/report.html")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(2.04, "2.0 s"), (42, "42 s"), (59.9, "60 s"), (200, "3 m 20 s"), (7500, "2 h 5 m"), (356_400, "4 d 3 h")],
)
def test_durations_are_written_as_people_do(seconds, words):
    assert duration(seconds) == words


def test_images_come_as_arrays(run):
    (picture,) = images(run)([3]).values()
    assert picture.dtype == np.uint8


def test_vocs_mean_average_precision_is_shown(run):
    from refinedet.pipeline.report.summary import summary_rows

    curve = [1.0, 0.5, 0.0]
    metrics = {
        mode: {
            "voc2007": {"mAP": value},
            "protocol": {"metric": "voc2007"},
            "per_class": {"lens": {"AP": value}},
            "curves": {"recall": [0, 0.5, 1], "precision50": {"lens": curve}},
        }
        for mode, value in (("single", 0.811), ("multiscale", 0.836))
    }
    rules = [{"rule": "box voting", "mAP": 0.836}, {"rule": "NMS 0.45", "mAP": 0.822}]
    (run / "metrics.json").write_text(json.dumps({**metrics, "merge_rules": rules}))
    page = _page(run)
    assert '<div class="figure">0.811</div><div><b>mAP</b>' in page
    assert ">+0.025<" in page
    assert "Precision over recall" in page
    assert ">0.822<" in page
    assert "AP50" not in page.split("<h2>Training</h2>")[0]
    assert summary_rows(str(run)) == [{"": "Single scale", "mAP": "0.811"}, {"": "Multi-scale", "mAP": "0.836"}]


def test_a_data_set_without_annotations_is_not_called_unmeasured_yet(run):
    (run / "metrics.json").unlink()
    (run / "submission" / "single").mkdir(parents=True)
    (run / "submission" / "single" / "detections_test-dev2017_a_results.zip").write_bytes(b"zip")
    truth = json.loads((run / "ground_truth.json").read_text())
    (run / "ground_truth.json").write_text(json.dumps({**truth, "annotations": []}))
    page = _page(run)
    assert "no annotations to measure by" in page
    assert "detections_test-dev2017_a_results.zip" in page


def test_the_verdict_comes_first_and_names_what_costs_most(run):
    page = _page(run)
    said = page[page.index('class="verdict"') : page.index("<h2>Accuracy</h2>")]
    assert "Finished after 48 steps in 3 m 40 s of training, 1 restart, 6.0 s of work done again." in said
    assert "AP 0.503 at a single scale, AP 0.524 (+0.021) with multi-scale testing on 8 validation images." in said
    assert "wrong box (0.094), then missed (0.058)" in said
    assert "1 image could not be read" in said


def test_a_run_that_never_restarted_is_not_charged_with_one(run):
    ledger = json.loads((run / "ledger.json").read_text())
    (run / "ledger.json").write_text(json.dumps({**ledger, "attempts": 1, "restart_s": 13.0}))
    page = _page(run)
    assert "<b>start</b>" in page
    assert "<b>restarts</b>" not in page
    assert "1 restart" not in page


def test_the_whole_job_is_from_submission_to_the_last_sign_of_life(run):
    page = _page(run)
    assert "The whole job: 5 m 3 s from submission to the end" in page
    keys = page[page.index("The whole job") :]
    shares = [float(share) for share in re.findall(r"([0-9.]+) %</span>", keys[: keys.index('class="timeline"')])]
    assert abs(sum(shares) - 100) < 0.5
    (run / "timeline.jsonl").unlink()
    assert "The whole job" not in _page(run)


def test_a_stage_whose_process_was_killed_ends_where_the_next_one_begins(tmp_path):
    from refinedet.pipeline.runs.timeline import Timeline, read_timeline

    timeline = Timeline(str(tmp_path))
    timeline.mark("submitted", 10.0)
    with pytest.raises(ValueError), timeline.stage("train"):
        raise ValueError
    with timeline.stage("train"):
        pass
    with open(tmp_path / "timeline.jsonl", "a") as file:
        file.write('{"time": 1, "edge": "begin", "name": "report", "status": ""}\n{"time": 2')
    spans, marks = read_timeline(str(tmp_path))
    assert [(span.name, span.status) for span in spans] == [("train", "failed"), ("train", "done"), ("report", "")]
    assert marks == [("submitted", 10.0)]


@pytest.mark.parametrize("field", ["errors", "confusion", "classes", "slices", "levels", "calibration", "false_alarms"])
@pytest.mark.parametrize("value", [None, 3, [3], {"a": 1}, [{"count": "x"}]], ids=str)
def test_a_diagnosis_of_another_layout_leaves_its_part_out(run, field, value):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["single"]["diagnosis"][field] = value
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = _page(run, images(run))
    assert "<h2>Diagnosis</h2>" in page
    assert "<h2>Classes</h2>" in page


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a" onload="x', "{{ 7*7 }}", "../../etc", "ünïcödé 猫"])
def test_hostile_class_names_are_text_everywhere(tmp_path, name):
    write_run(tmp_path / "run", num_images=4, size=32, num_steps=12, classes=(name, "b", "c"))
    page = _page(tmp_path / "run", images(tmp_path / "run"))
    assert "<script>alert" not in page
    assert '" onload="x' not in page
    assert ">49<" not in page
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []


def test_the_commands_to_repeat_a_run_are_quoted(run):
    spec = (run / "spec.yaml").read_text().replace("name: quickstart", "name: 'a; rm -rf b'")
    (run / "spec.yaml").write_text(spec)
    assert "&#39;name=a; rm -rf b-again&#39;" in _page(run)


def test_the_summary_has_a_row_an_evaluation(run, tmp_path):
    from refinedet.pipeline.report.summary import merge_rule_rows, summary_rows

    rows = summary_rows(str(run))
    assert [row[""] for row in rows] == ["Single scale", "Multi-scale"]
    assert rows[1]["AP"] == "0.524"
    assert rows[1]["APl"] == "–"
    assert summary_rows(str(tmp_path / "nowhere")) == []
    assert [row[""] for row in merge_rule_rows(str(run))] == ["nms", "soft_vote", "wbf"]
    assert merge_rule_rows(str(run))[0]["AP"] == "0.512"
    assert merge_rule_rows(str(tmp_path / "nowhere")) == []
