"""The start of a run, checked before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.start import check_start
from refinedet.pipeline.runs.errors import UserError


def make_spec(fork_from: Path | str, **model: Any) -> JobSpec:
    values = {
        "name": "r",
        "data": {"format": "shapes", "train": [{"count": 4}]},
        "model": model,
        "training": {"fork_from": str(fork_from)},
    }
    return JobSpec.model_validate(values)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000004" / "manifest.json").write_text("{}")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"model": {"backbone": "resnet18", "theta": 0.9}}))
    return tmp_path


def test_a_run_of_the_same_tensors_is_accepted(run: Path) -> None:
    check_start(make_spec(run, backbone="resnet18", theta=0.99))


def test_a_run_of_another_model_is_refused_with_the_key(run: Path) -> None:
    with pytest.raises(UserError, match=r"another model \(model\.backbone is 'resnet18' there and 'resnet50' here\)"):
        check_start(make_spec(run, backbone="resnet50"))


def test_a_run_without_a_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no checkpoint"):
        check_start(make_spec(run))
    with pytest.raises(UserError, match="holds no checkpoint"):
        check_start(make_spec(tmp_path / "absent"))


def test_two_starts_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        JobSpec.model_validate(
            {
                "name": "r",
                "data": {"format": "shapes", "train": [{"count": 4}]},
                "training": {"fork_from": "runs/a", "init_weights": "w.safetensors"},
            }
        )
