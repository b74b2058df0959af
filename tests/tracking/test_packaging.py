from __future__ import annotations

import base64
import json
import subprocess
import sys
import textwrap

import cv2
import numpy as np
import pytest
import torch
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.pipeline.config.spec import Tracking
from refinedet.pipeline.tracking.packaging import package_model
from refinedet.pipeline.tracking.runs import RunTracker
from safetensors.torch import save_file

CATEGORIES = [{"id": 1, "name": "disc"}, {"id": 18, "name": "ring"}, {"id": 90, "name": "bar"}]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packaged")
    config = RefineDetConfig(
        num_classes=3, input_size=64, backbone="resnet18", tcb_channels=16, score_threshold=0.0, adm_iou=(0.4, 0.5)
    )
    torch.manual_seed(0)
    detector = RefineDet(config).eval()
    save_file({name: value.contiguous() for name, value in detector.state_dict().items()}, folder / "w.safetensors")
    package_model(
        str(folder / "packaged_model"),
        config=config,
        weights=str(folder / "w.safetensors"),
        categories=CATEGORIES,
        facts={"AP": 0.4},
    )
    return folder / "packaged_model", detector


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


def test_it_finds_what_the_detector_finds_in_pixels_of_the_image(packaged, loaded, image):
    (row,) = loaded.predict([{"image": image}], params={"score_threshold": 0.0})
    resized = torch.from_numpy(cv2.resize(image, (64, 64))).permute(2, 0, 1)[None]
    (found,) = packaged[1].detect(resized)
    expected = (found.boxes * torch.tensor([96, 48, 96, 48]) / 64).clamp(min=0).minimum(torch.tensor([96, 48, 96, 48]))
    torch.testing.assert_close(torch.tensor(row["boxes"]), expected)
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


def test_what_is_no_image_is_said(loaded):
    with pytest.raises(ValueError, match="5 bytes are no image"):
        loaded.predict([{"image": b"hello"}])
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], received float64 \[4, 4\]"):
        loaded.predict([{"image": np.zeros((4, 4))}])


def test_the_signature_and_the_requirements_are_those_of_a_detector(packaged, loaded):
    signature = loaded.metadata.signature
    assert signature.inputs.input_names() == ["image"]
    assert signature.outputs.input_names() == ["boxes", "scores", "labels", "names"]
    assert [spec.name for spec in signature.params.params] == ["score_threshold", "batch_size"]
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
    code = f"""
        import json, sys
        sys.meta_path = [finder for finder in sys.meta_path if "skbc" not in type(finder).__module__]  # an editable one
        import mlflow, numpy as np
        mlflow.set_tracking_uri({tracker.uri!r})
        detector = mlflow.pyfunc.load_model("models:/{models[0].model_id}")
        image = np.load({str(tmp_path / "image.npy")!r})
        rows = detector.predict([{{"image": image}}], params={{"score_threshold": 0.2}})
        import refinedet.model
        assert "refinedet.pipeline" not in sys.modules
        print(json.dumps([refinedet.model.__file__, rows[0]]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    file, row = json.loads(done.stdout.splitlines()[-1])
    assert "/artifacts/code/refinedet/model/" in file or "/code/refinedet/model/" in file
    assert len(row["boxes"]) > 0
