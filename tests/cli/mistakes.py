"""Mistakes of typing, and words that the answer must have. The files are those of `write_files`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

JOBS = Path(__file__).parents[2] / "jobs"
COCO = ["data.format=coco", "data.root=."]
LAUNCH = ["launch", "quickstart"]
PLAN = ["plan", "quickstart"]
FILES = ["evaluate", "--detections", "found.json", "--annotations"]

MISTAKES: list[tuple[list[str], str]] = [
    # The command line.
    (["trian", "quickstart"], "trian"),
    (["plan"], "JOB"),
    ([*PLAN, "--nods", "2"], "--nods"),
    ([*PLAN, "--nodes", "0"], "--nodes"),
    ([*PLAN, "--nodes", "two"], "two"),
    ([*PLAN, "--nodes", "-1"], "-1"),
    (["schema", "--format", "xml"], "xml"),
    (["serve", "whole", "--port", "0"], "--port"),
    (["serve", "whole", "--batch-size", "65"], "--batch-size"),
    (["predict", "whole"], "SOURCE"),
    (["predict", "whole", "photo.png", "--threshold", "1.5"], "--threshold"),
    (["predict", "whole", "photo.png", "--threshold", "nan"], "--threshold"),
    (["predict", "whole", "photo.png", "--batch-size", "0"], "--batch-size"),
    (["predict", "whole", "photo.png", "--size", "64", "--nms-iou", "0.5"], "--size"),
    (["predict", "whole", "photo.png", "--size", "64", "--class-agnostic"], "--class-agnostic"),
    (["predict", "whole", "photo.png", "--line-width", "0"], "--line-width"),
    (["evaluate", "whole", "--single-class"], "--single-class"),
    (["data", "show", "quickstart", "--count", "0"], "--count"),
    (["render", "kuberay"], "JOB"),
    # The job spec.
    (["plan", "nowhere.yaml"], "nowhere.yaml"),
    (["plan", "quickstrat"], "quickstrat"),
    (["plan", "."], "cannot be read"),
    (["plan", "broken.yaml"], "broken.yaml"),
    (["plan", "list.yaml"], "list.yaml"),
    (["plan", "empty.yaml"], "empty.yaml"),
    (["plan", "photo.png"], "photo.png"),
    ([*PLAN, "trainin.epochs=3"], "did you mean `training`?"),
    ([*PLAN, "training.epoch=3"], "training.epoch"),
    ([*PLAN, "training.epochs"], "training.epochs"),
    ([*PLAN, "training.epochs=-1"], "training.epochs"),
    ([*PLAN, "training.epochs=many"], "training.epochs"),
    ([*PLAN, "training.warmup_epochs=50"], "training.warmup_epochs"),
    ([*PLAN, "training.learning_rate=-0.1"], "training.learning_rate"),
    ([*PLAN, "training.learning_rate=.nan"], "training.learning_rate"),
    ([*PLAN, "training.global_batch=0"], "training.global_batch"),
    ([*PLAN, "training.global_batch=1"], "fewer images than the 2 workers"),
    ([*PLAN, "model.backbone=resnet51"], "resnet51"),
    ([*PLAN, "model.backbone=resnext152_32x4d", "training.init_weights=timm"], "no trained weights"),
    ([*PLAN, "model.backbone=vit_base_patch16_224"], "maps at strides [16, 16, 16]"),
    ([*PLAN, "--calibration", "nowhere.json"], "nowhere.json"),
    ([*PLAN, "model.num_classes=0"], "num_classes"),
    ([*PLAN, "data.train=[]"], "data.train"),
    ([*PLAN, "data.train=[{count: -3}]"], "count"),
    ([*PLAN, "data.format=cocoo"], "format"),
    ([*PLAN, "name=a/b"], "name"),
    ([*PLAN, "training.precision=fp8"], "precision"),
    ([*PLAN, "--device", "H9000"], "H9000"),
    (["plan", "coco_mini"], "datasets/coco-mini does not exist"),
    (["plan", "coco_mini", "data.root=photo.png"], "photo.png"),
    # Jobs.
    ([*LAUNCH, "--stages", "train,evalute"], "evalute"),
    ([*LAUNCH, "--stages", ""], "--stages"),
    ([*LAUNCH, "--address", "http://127.0.0.1:8265"], "dashboard"),
    ([*LAUNCH, "--address", "127.0.0.1"], "HOST:PORT"),
    ([*LAUNCH, "--address", "127.0.0.1:1"], "127.0.0.1:1"),
    ([*LAUNCH, "runs=/proc/none"], "/proc/none"),
    ([*LAUNCH, "runs=photo.png"], "photo.png"),
    ([*LAUNCH, "runs=nonsense://bucket/runs"], "nonsense"),
    ([*LAUNCH, "runs=out", "tracking.uri=http://127.0.0.1:1"], "127.0.0.1:1"),
    ([*LAUNCH, "runs=out", "tracking.uri=nonsense://x"], "nonsense"),
    ([*LAUNCH, "runs=out", "training.init_weights=nowhere.pth"], "nowhere.pth"),
    ([*LAUNCH, *COCO, "data.train=[{images: ., annotations: nowhere.json}]", "data.val=[]"], "nowhere.json"),
    (["submit", "quickstart", "--address", "http://127.0.0.1:1"], "127.0.0.1:1"),
    (["submit", "quickstart", "--address", "ray://head:10001"], "ray://head:10001"),
    (["status", "quickstart", "--address", "127.0.0.1:1"], "127.0.0.1:1"),
    (["render", "docker", "quickstart"], "docker"),
    (["drill", "earthquake"], "earthquake"),
    # Weights and images.
    (["predict", "nowhere", "photo.png"], "nowhere"),
    (["predict", "cut.safetensors", "photo.png"], "cut.safetensors"),
    (["predict", "broken.yaml", "photo.png"], "broken.yaml"),
    (["predict", "empty", "photo.png"], "empty"),
    (["predict", "nonsense://x/y.safetensors", "photo.png"], "nonsense"),
    (["predict", "whole", "nowhere.jpg"], "nowhere.jpg"),
    (["predict", "whole", "*.tiff"], "*.tiff"),
    (["predict", "whole", "empty"], "empty"),
    (["predict", "whole", "photo.png", "--output", "photo.png"], "photo.png"),
    (["predict", "whole", "photo.png", "--format", "xml"], "xml"),
    (["predict", "whole", "photo.png", "--format", "frames"], "no source is one"),
    (["predict", "whole", "photo.png", "--format", "window"], "display"),
    (["predict", "whole", "photo.png", "--precision", "int8"], "int8"),
    (["predict", "whole", "photo.png", "--device", "gpu"], "gpu"),
    (["predict", "whole", "photo.png", "--output", "photo.png/out"], "photo.png"),
    (["predict", "whole", "photo.png", "--category", "zebra"], "zebra"),
    (["predict", "whole", "photo.png", "--size", "100"], "a multiple of the model's coarsest stride"),
    (["predict", "runs/quikstart", "photo.png"], "not in the directory runs"),
    (["serve", "nowhere"], "nowhere"),
    (["serve", "whole", "--device", "tpu"], "tpu"),
    (["serve", "whole", "--host", "300.1.1.1"], "300.1.1.1"),
    (["export", "nowhere", "--output", "a.onnx"], "nowhere"),
    (["export", "whole", "--output", "no/where/a.onnx"], "no/where"),
    (["export", "whole", "--output", "a.txt"], "must end in .onnx"),
    (["export", "whole", "--output", "a.onnx", "--height", "10"], "multiples of 64"),
    # Runs and results.
    (["runs", "nowhere"], "nowhere"),
    (["runs", "photo.png"], "photo.png"),
    (["runs", "nonsense://x"], "nonsense"),
    (["report", "nonsense://x/run"], "nonsense"),
    (["evaluate", "run", "trainin.epochs=3"], "did you mean `training`?"),
    (["evaluate", "run", "--metric", "pascal"], "pascal"),
    (["evaluate", "run", "--iou", "0.6"], "--output DIRECTORY"),
    (["evaluate", "run"], "no weights at"),
    (["evaluate", "run", "--weights", "nowhere.pth", "--output", "out"], "nowhere.pth"),
    (["multiscale", "run", "multiscale.passes=[{size: 100}]", "--output", "out"], "coarsest stride"),
    (["report", "nowhere"], "nowhere"),
    (["report", "photo.png"], "photo.png"),
    (["compare", "nowhere", "empty"], "nowhere"),
    (["compare", "empty"], "2 to 6 runs"),
    (["evaluate"], "evaluate takes either"),
    (["evaluate", "nowhere"], "nowhere"),
    (["evaluate", "--detections", "found.json"], "evaluate takes either"),
    ([*FILES, "nowhere.json"], "nowhere.json"),
    ([*FILES, "broken.yaml"], "broken.yaml"),
    ([*FILES, "truth.json", "--metric", "pascal"], "pascal"),
    ([*FILES, "truth.json", "--iou", "1.5"], "1.5"),
    ([*FILES, "truth.json", "--json", "no/where.json"], "no/where.json"),
    (["evaluate", "--detections", "truth.json", "--annotations", "found.json"], "found.json"),
    (["multiscale", "empty"], "empty"),
    # Data.
    (["data", "check", "nowhere"], "nowhere"),
    (["data", "check", "photo.png"], "photo.png"),
    (["data", "show", "quickstart"], "shards"),
    (["data", "stats", "quickstart"], "shards"),
    (["shard", "quickstart", "data.shards=photo.png"], "photo.png"),
    (["shard", "coco_mini", "data.root=empty"], "empty"),
    (["init", "nowhere"], "nowhere"),
    (["init", "empty"], "empty"),
    (["init", "photo.png"], "photo.png"),
]


def write_files(directory: Path) -> None:
    """Files that are each not what a command wants, and a run without weights; no whole detector is among them."""
    (directory / "empty").mkdir()
    (directory / "run").mkdir()
    (directory / "run" / "spec.yaml").write_text((JOBS / "quickstart.yaml").read_text(encoding="utf-8"))
    (directory / "runs").mkdir()
    (directory / "broken.yaml").write_text("name: [a\ndata: }\n")
    (directory / "list.yaml").write_text("- 1\n- 2\n")
    (directory / "empty.yaml").write_text("")
    (directory / "cut.safetensors").write_bytes((500).to_bytes(8, "little") + b'{"a": {"dtype": "F32"')
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(directory / "photo.png")
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4]}
    truth = {
        "images": [{"id": 1, "width": 9, "height": 9}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [box | {"id": 1, "area": 16, "iscrowd": 0}],
    }
    (directory / "truth.json").write_text(json.dumps(truth))
    (directory / "found.json").write_text(json.dumps([box | {"score": 0.5}]))
