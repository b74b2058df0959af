from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import refinedet.model
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.model.ops import library
from refinedet.pipeline.config.spec import Tracking
from refinedet.pipeline.inference.predictor import Predictor
from refinedet.pipeline.tracking.packaging import package_model
from refinedet.pipeline.tracking.runs import RunTracker
from safetensors.torch import save_file

CATEGORIES = [{"id": 1, "name": "disc"}, {"id": 18, "name": "ring"}, {"id": 90, "name": "bar"}]


HALVED = """

_select = select_batch


def select_batch(predictions, config):
    found = _select(predictions, config)
    return DetectionBatch(found.boxes, found.scores / 2, found.labels, found.counts)
"""
CONFIG = RefineDetConfig(
    num_classes=3, input_size=64, backbone="resnet18", tcb_channels=16, score_threshold=0.0, adm_iou=(0.4, 0.5)
)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory, image):
    folder = tmp_path_factory.mktemp("packaged")
    torch.manual_seed(0)
    detector = RefineDet(CONFIG).eval()
    save_file({name: value.contiguous() for name, value in detector.state_dict().items()}, folder / "w.safetensors")
    _package(folder / "packaged_model", folder / "w.safetensors", facts={"AP": 0.4}, input_example=image)
    return folder / "packaged_model", detector


def _package(folder, weights, **more) -> None:
    package_model(str(folder), config=CONFIG, weights=str(weights), categories=CATEGORIES, **more)


def _run(code: str, folder) -> str:
    """Output of a process that has the requirements, and of this repository at most what is installed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (48, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def loaded(packaged):
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(packaged[0]))


def test_it_holds_no_pickle_and_no_compiled_library(packaged):
    names = {path.name for path in packaged[0].rglob("*") if path.is_file()}
    assert "weights.safetensors" in names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".so", ".pyc"))]


def test_it_finds_what_predict_finds_in_pixels_of_the_image(packaged, loaded, image):
    (row,) = loaded.predict([{"image": image}], params={"score_threshold": 0.0})
    (found,) = Predictor(packaged[1], ("disc", "ring", "bar")).predict([image])
    torch.testing.assert_close(torch.tensor(row["boxes"]), found.boxes)
    torch.testing.assert_close(torch.tensor(row["scores"]), found.scores)
    assert row["labels"] == [CATEGORIES[label - 1]["id"] for label in found.labels.tolist()]
    assert set(row["names"]) <= {"disc", "ring", "bar"}


def test_arrays_bytes_and_base64_are_one_image(loaded, image):
    encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
    rows = [
        loaded.predict([{"image": form}], params={"score_threshold": 0.2})[0]
        for form in (image, encoded, base64.b64encode(encoded).decode())
    ]
    assert rows[0] == rows[1] == rows[2]


def test_a_batch_gives_each_image_its_own_boxes(loaded, image):
    other = image[::-1, ::2].copy()
    params = {"score_threshold": 0.2, "batch_size": 2}
    together = loaded.predict([{"image": image}, {"image": other}, {"image": image}], params=params)
    assert len(together) == 3
    for row, single in zip(together, (image, other, image), strict=True):
        (alone,) = loaded.predict([{"image": single}], params=params)
        assert row["labels"] == alone["labels"]
        np.testing.assert_allclose(row["scores"], alone["scores"], atol=1e-5)


def _png(width: int, height: int) -> bytes:
    """A PNG of that many pixels, in few bytes: what a decompression bomb is."""
    rows = zlib.compress(b"\0" * ((width * 3 + 1) * height), 9)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (b"hello", "5 bytes are no image"),
        (b"", "0 bytes are no image"),
        (np.zeros((4, 4)), r"uint8 \[H, W, 3\], received float64 \[4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0 pixels"),
        ("no base64!", "is no base64 text"),
        (None, "received object"),
        (float("nan"), "received float64"),
        ({"image": 3}, "received object"),
        (_png(8000, 8000), "8000 x 8000 pixels"),
        (_png(64, 64)[:60], "are no image"),
        (b"\xff" * (20 * 2**20 + 1), "20971521 bytes; at most 20971520"),
        ("A" * (28 * 2**20), "characters; at most"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 else "",
)
def test_what_is_no_image_is_refused_before_it_is_decoded(loaded, sent, sentence):
    with pytest.raises(MlflowException, match=sentence) as refused:
        loaded.predict([{"image": sent}])
    assert refused.value.get_http_status_code() == 400


def test_a_photo_that_is_cut_short_is_refused(loaded):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    content = cv2.imencode(".jpg", noise)[1].tobytes()
    assert loaded.predict([{"image": content}])
    with pytest.raises(MlflowException, match="send a whole JPEG"):
        loaded.predict([{"image": content[: len(content) // 2]}])


@pytest.mark.parametrize(
    "params",
    [
        {"batch_size": -1},
        {"batch_size": 0},
        {"batch_size": 10**6},
        {"score_threshold": float("nan")},
        {"score_threshold": float("inf")},
        {"score_threshold": -0.1},
        {"score_threshold": 1.5},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(loaded, image, params):
    with pytest.raises(MlflowException, match=f"{next(iter(params))} must be") as refused:
        loaded.predict([{"image": image}], params=params)
    assert refused.value.get_http_status_code() == 400


def test_too_many_images_are_refused(loaded, image):
    with pytest.raises(MlflowException, match="Between 1 and 64 images a request, received 65"):
        loaded.predict([{"image": image}] * 65)


def test_the_signature_and_the_requirements_are_those_of_a_detector(packaged, loaded):
    signature = loaded.metadata.signature
    assert signature.inputs.input_names() == ["image"]
    assert signature.outputs.input_names() == ["boxes", "scores", "labels", "names"]
    assert [spec.name for spec in signature.params.params] == ["score_threshold", "batch_size"]
    example = loaded.metadata.load_input_example(str(packaged[0]))
    assert loaded.predict(example, params={"score_threshold": 0.0})[0]["boxes"]
    requirements = (packaged[0] / "requirements.txt").read_text()
    assert "torch==" in requirements
    assert "+" not in requirements
    assert loaded.metadata.metadata["AP"] == 0.4


def test_it_loads_from_its_run_in_a_process_without_this_repository(packaged, runs, image, tmp_path):
    with RunTracker(Tracking(), name="job", run_dir=str(runs / "job"), runs=str(runs)) as tracker:
        for _ in range(2):
            tracker.log_model(str(packaged[0]), name="detector", digest="a" * 64)
    models = tracker.client.search_logged_models([tracker.experiment_id])
    assert [str(model.status) for model in models] == ["READY"], "the same weights are one model"
    np.save(tmp_path / "image.npy", image)
    printed = _run(
        f"""
        import sys
        sys.path.insert(0, "elsewhere")
        import json, mlflow, numpy as np
        mlflow.set_tracking_uri({tracker.uri!r})
        detector = mlflow.pyfunc.load_model("models:/{models[0].model_id}")
        image = np.load({str(tmp_path / "image.npy")!r})
        rows = detector.predict([{{"image": image}}], params={{"score_threshold": 0.2}})
        (package,) = [name for name in sys.modules if name.startswith("refinedet_model_") and "." not in name]
        assert not [name for name in sys.modules if name.split(".")[0] == "refinedet"]
        print(json.dumps([sys.modules[package].__file__, rows[0]]))
        """,
        tmp_path,
    )
    file, row = json.loads(next(line for line in printed.splitlines() if line.startswith("[")))
    assert "/code/refinedet_model_" in file
    assert len(row["boxes"]) > 0


def test_models_of_different_code_run_in_one_process_beside_a_model_of_its_own(packaged, tmp_path):
    """The second version finds its scores halved, so that whose code ran is seen in the result."""
    changed = tmp_path / "changed"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(Path(refinedet.model.__file__).parent, changed, ignore=ignored)
    selection = changed / "inference.py"
    selection.write_text(selection.read_text() + HALVED)
    _package(tmp_path / "second", packaged[0].parent / "w.safetensors", sources=changed)
    (tmp_path / "model.py").write_text("OWN = True\n")
    printed = _run(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import mlflow.pyfunc, numpy as np, model
        image = np.random.default_rng(0).integers(0, 255, (48, 96, 3), np.uint8)
        loaded = [mlflow.pyfunc.load_model(folder) for folder in ({str(packaged[0])!r}, {str(tmp_path / "second")!r})]
        best = [one.predict([{{"image": image}}], params={{"score_threshold": 0.0}})[0]["scores"][0] for one in loaded]
        assert best[0] > 0
        assert abs(best[1] - best[0] / 2) < 1e-6, best
        assert model.OWN
        assert "refinedet" not in sys.modules
        print("both ran")
        """,
        tmp_path,
    )
    assert "both ran" in printed


def test_a_packaged_model_beside_the_installed_detector_says_that_it_runs_the_reference(packaged, tmp_path):
    """The operators can be registered once a process: the second copy of the code runs without them, with a warning."""
    if library.find() is None:
        pytest.skip("the operators are not built")
    printed = _run(
        f"""
        import logging
        logging.basicConfig(level=logging.WARNING)
        import mlflow.pyfunc, numpy as np, torch
        from refinedet.model.ops import library
        assert library.is_loaded()
        image = np.random.default_rng(0).integers(0, 255, (48, 96, 3), np.uint8)
        (row,) = mlflow.pyfunc.load_model({str(packaged[0])!r}).predict([{{"image": image}}])
        print("boxes", len(row["boxes"]))
        """,
        tmp_path,
    )
    assert "belong to another copy of this package" in printed
    assert "boxes " in printed


def test_a_turned_photo_is_seen_as_the_detector_was_trained(tmp_path, image):
    import mlflow.pyfunc

    detector = RefineDet(CONFIG, exif="displayed").eval()
    weights = detector.save_pretrained(tmp_path / "detector")
    _package(tmp_path / "packaged_model", weights)
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = 8
    Image.fromarray(image).save(content, "JPEG", exif=exif)
    upright = cv2.imdecode(np.frombuffer(content.getvalue(), np.uint8), cv2.IMREAD_COLOR_RGB)  # turns it
    assert upright.shape[:2] == image.shape[1::-1]
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "packaged_model"))
    rows = [
        loaded.predict([{"image": form}], params={"score_threshold": 0.0})[0] for form in (content.getvalue(), upright)
    ]
    assert rows[0] == rows[1]
    assert Predictor.load(str(tmp_path / "detector")).exif == "displayed"
