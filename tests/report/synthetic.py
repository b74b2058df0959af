"""A run directory as a job leaves it, without a job: numbers and pictures made up from a seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

CLASSES = ("disc", "ring", "square", "bar", "triangle", "cross", "star", "lens")


def write_run(
    folder: Path,
    *,
    num_images: int = 40,
    size: int = 160,
    num_steps: int = 480,
    seed: int = 0,
    classes: tuple[str, ...] = CLASSES,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "detections").mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    _write_spec(folder, classes)
    truth = _write_truth(folder, rng, num_images, size, classes)
    _write_metrics(folder, rng, num_steps, classes, synthetic_diagnosis(truth, rng))
    for mode, noise, missed in (("single", 5.0, 0.2), ("multiscale", 3.0, 0.12)):
        rows = _detections(truth, rng, noise, missed, size)
        (folder / "detections" / f"{mode}.json").write_text(json.dumps(rows))
    _write_rest(folder)


def images(folder: Path):
    """A loader of the made-up pictures of the run in `folder`, for `build_report`."""
    truth = json.loads((folder / "ground_truth.json").read_text())
    by_id = {image["id"]: image for image in truth["images"]}

    def load(image_ids):
        return {image_id: _paint(by_id[image_id], truth["annotations"]) for image_id in image_ids if image_id in by_id}

    return load


def _write_spec(folder: Path, classes: tuple[str, ...]) -> None:
    spec = {
        "name": folder.name,
        "data": {"format": "shapes", "augmentation": {"expand": True, "crop": True, "mirror": True, "distort": False}},
        "model": {"backbone": "resnet18", "input_size": 128, "num_classes": len(classes), "head": "align", "theta": 1},
        "training": {"global_batch": 16, "epochs": 12, "learning_rate": 0.004, "decay_epochs": [8, 10]},
        "multiscale": {"passes": [{"size": 96}, {"size": 128}, {"size": 192}], "merge": {"method": "soft_vote"}},
        "tracking": {"report_images": 6, "uri": "http://someone:hunter2@mlflow.example:5000"},
        "cluster": {"workers": 2, "cpus_per_worker": 1, "placement": "PACK"},
    }  # fmt: skip
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))


def _write_metrics(
    folder: Path, rng: np.random.Generator, num_steps: int, classes: tuple[str, ...], diagnosis: dict
) -> None:
    lines = []
    for step in range(1, num_steps + 1):
        epoch = (step - 1) * 12 // num_steps
        decay = float(np.exp(-3.2 * step / num_steps))
        parts = {
            "arm_class": 0.9 * decay + 0.25,
            "arm_box": 1.3 * decay + 0.35,
            "adm_class": 2.2 * decay + 0.55,
            "adm_box": 0.9 * decay + 0.3,
        }
        parts = {name: value * rng.lognormal(0, 0.12) for name, value in parts.items()}
        rate = 0.004 * min(1, step / 40) * (0.1 if epoch >= 8 else 1) * (0.1 if epoch >= 10 else 1)
        times = {
            "data": 0.011,
            "forward": 0.14,
            "backward": 0.21,
            "reduce": 0.02,
            "optimizer": 0.03,
            "checkpoint": 0.002,
        }
        record = {
            "step": step,
            "epoch": epoch,
            "time": 1.8e9 + 0.42 * step,
            "loss": sum(parts.values()),
            **parts,
            "shares": {**{f"survivors_{level}": decay / level for level in range(1, 5)}, "rows": 0.6 * decay},
            "learning_rate": rate,
            "images_per_s": 38 * rng.lognormal(0, 0.05),
            "times": {name: value * rng.lognormal(0, 0.1) for name, value in times.items()},
        }
        lines.append(json.dumps(record))
        if step % (num_steps // 12) == 0:
            ap = 0.52 * (1 - decay)
            validation = {"AP": ap, "AP50": min(1.0, ap * 1.5), "AP75": ap * 1.08}
            lines.append(json.dumps({"step": step, "epoch": epoch, "validation": validation}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99')  # cut short by a crash
    numbers = [0.503, 0.771, 0.543, 0.291, 0.547, 0.702, 0.401, 0.588, 0.611, 0.402, 0.646, 0.781]
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    metrics = {}
    for mode, gain in (("single", 0.0), ("multiscale", 0.021)):
        aps = np.clip(0.503 + gain + rng.normal(0, 0.1, len(classes)), 0, 1)
        curve = np.linspace(1, 0, 101)
        metrics[mode] = {
            "coco": {name: number + gain for name, number in zip(names, numbers, strict=True)},
            "per_class": {
                name: {"AP": float(ap), "AP50": min(1.0, float(ap) * 1.5)}
                for name, ap in zip(classes, aps, strict=True)
            },
            "curves": {
                "precision50": {name: (curve**0.15).tolist() for name in classes},
                "precision75": {name: (curve**0.6).tolist() for name in classes},
            },
            "protocol": {"metric": "coco"},
        }
    metrics["single"]["diagnosis"] = diagnosis
    metrics["single"]["unreadable"] = {
        "count": 1,
        "images": [{"image_id": 3, "file_name": "3.jpg", "reason": "the file is cut short"}],
    }
    metrics["multiscale"]["coco"]["APl"] = -1
    metrics["merge_rules"] = [
        {"rule": "nms", "AP": 0.512, "AP50": 0.779, "AP75": 0.551},
        {"rule": "soft_vote", "AP": 0.524, "AP50": 0.781, "AP75": 0.569},
        {"rule": "wbf", "AP": 0.519, "AP50": 0.784, "AP75": 0.560},
    ]
    (folder / "metrics.json").write_text(json.dumps(metrics))


def _write_truth(folder: Path, rng: np.random.Generator, num_images: int, size: int, classes: tuple[str, ...]) -> dict:
    annotations = []
    for image_id in range(num_images):
        for _ in range(int(rng.integers(1, 7))):
            wide, high = rng.uniform(0.1, 0.5, 2) * size
            x, y = rng.uniform(0, size - wide), rng.uniform(0, size - high)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.integers(0, len(classes))) * 3 + 1,  # sparse, as COCO's are
                    "bbox": [float(x), float(y), float(wide), float(high)],
                    "area": float(wide * high),
                    "iscrowd": int(rng.random() < 0.03),
                }
            )
    truth = {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "width": size, "height": size} for number in range(num_images)
        ],
        "annotations": annotations,
        "categories": [{"id": 3 * index + 1, "name": name} for index, name in enumerate(classes)],
    }  # fmt: skip
    (folder / "ground_truth.json").write_text(json.dumps(truth))
    return truth


def _detections(truth: dict, rng: np.random.Generator, noise: float, missed: float, size: int) -> list[dict]:
    rows = []
    for annotation in truth["annotations"]:
        if rng.random() > missed:
            box = (np.array(annotation["bbox"]) + rng.normal(0, noise, 4)).clip(1).tolist()
            score = float(rng.beta(6, 2))
            rows.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"],
                    "bbox": box,
                    "score": score,
                }
            )
    for image in truth["images"]:
        for _ in range(3):
            box = [*rng.uniform(0, 0.6 * size, 2), *rng.uniform(0.1 * size, 0.4 * size, 2)]
            rows.append(
                {
                    "image_id": image["id"],
                    "category_id": int(rng.integers(0, len(truth["categories"]))) * 3 + 1,
                    "bbox": [float(value) for value in box],
                    "score": float(rng.beta(2, 6)),
                }
            )
    return rows


def synthetic_diagnosis(truth: dict, rng: np.random.Generator) -> dict:
    """A diagnosis in the layout of `metrics.json`, its numbers made up."""
    names = [category["name"] for category in truth["categories"]]
    by_id = {category["id"]: category["name"] for category in truth["categories"]}
    objects = [row for row in truth["annotations"] if not row["iscrowd"]]
    scores = np.linspace(0, 1, 101)
    kinds = ("classification", "localization", "both", "duplicate", "background", "missed")
    stages = ("found", "uncovered", "first_regression", "filter", "second_regression", "classification", "suppression")

    def curves(name: str) -> dict:
        precision, recall = 0.4 + 0.6 * scores, 1 - scores**2
        f1 = 2 * precision * recall / (precision + recall)
        best = int(f1.argmax())
        return {
            "name": name, "num_objects": sum(by_id[row["category_id"]] == name for row in objects), "ap": 0.5,
            "best_score": float(scores[best]), "best_f1": float(f1[best]), "best_precision": float(precision[best]),
            "best_recall": float(recall[best]), "precision": [None, *precision[1:].tolist()],
            "recall": recall.tolist(), "f1": [None, *f1[1:].tolist()],
        }  # fmt: skip

    def finding(row: dict, kind: str, score: float | None) -> dict:
        return {
            "kind": kind, "image_id": row["image_id"], "label": by_id[row["category_id"]], "bbox": row["bbox"],
            "score": score, "cost": 0.01, "other_label": names[0] if score else None,
            "other_bbox": [row["bbox"][0] + 5, *row["bbox"][1:]] if score else None,
        }  # fmt: skip

    cells = [
        [true, found, int(rng.integers(20, 90) if true == found else rng.integers(0, 9))]
        for true in range(len(names) + 1)
        for found in range(len(names) + 1)
        if (true, found) != (len(names), len(names))
    ]
    return {
        "iou": 0.5, "max_detections": 100, "ap": 0.77, "ap_all_fixed": 1.0, "num_images": len(truth["images"]),
        "num_objects": len(objects), "num_detections": 3 * len(objects),
        "errors": [
            {"kind": kind, "count": int(rng.integers(5, 99)), "ap_cost": float(cost)}
            for kind, cost in zip(kinds, (0.031, 0.094, 0.004, 0.0, 0.022, 0.058), strict=True)
        ],
        "confusion": {"score": 0.5, "labels": names, "cells": [cell for cell in cells if cell[2]]},
        "scores": scores.tolist(), "classes": [curves(name) for name in names],
        "slices": {
            name: [{"name": part, "num_objects": 30, "ap": 0.4, "recall": 0.6} for part in parts]
            for name, parts in (
                ("size", ("small", "medium", "large")),
                ("aspect", ("tall", "square", "wide")),
                ("crowding", ("alone", "crowded")),
            )
        },
        "levels": [
            {"stride": stride, "counts": {stage: int(rng.integers(1, 40)) for stage in stages}}
            for stride in (8, 16, 32, 64)
        ],
        "num_traced": len(objects),
        "calibration": [
            {"low": low / 10, "high": (low + 1) / 10, "count": 10, "score": low / 10 + 0.05, "correct": low / 11}
            for low in range(10)
        ],
        "calibration_error": 0.041,
        "worst_images": [
            {
                "image_id": row["image_id"],
                "cost": 0.1,
                "num_false": 2,
                "num_missed": 1,
                "num_objects": 4,
                "missed": [{"label": by_id[row["category_id"]], "bbox": row["bbox"]}],
            }
            for row in objects[:3]
        ],
        "costly_misses": [finding(row, "missed", None) for row in objects[:6]],
        "false_alarms": [finding(row, "classification", 0.83) for row in objects[6:12]],
        "truth_suspects": [finding(row, "wrong class", 0.97) for row in objects[12:16]],
    }  # fmt: skip


def _write_rest(folder: Path) -> None:
    (folder / "tracking.json").write_text(
        json.dumps(
            {
                "status": "FINISHED",
                "run_id": "0f3a9c",
                "location": "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db",
            }
        )
    )
    (folder / "goodput").mkdir(exist_ok=True)
    for number, (started, stepped) in enumerate(((1.8e9, 1.8e9 + 4), (1.8e9 + 44, 1.8e9 + 49.5))):
        page = {"started_at": started, "first_step_at": stepped}
        (folder / "goodput" / f"attempt-{number:04d}.json").write_text(json.dumps(page))
    lines = [{"time": 1.8e9 - 60, "edge": "mark", "name": "submitted", "status": ""}]
    lines.append({"time": 1.8e9 - 30, "edge": "mark", "name": "launched", "status": ""})
    for name, begin, end in (("prepare", -20, -5), ("train", 0, 219.5), ("evaluate", 221, 240), ("report", 240, 243)):
        for edge, at, status in (("begin", begin, ""), ("end", end, "done")):
            lines.append({"time": 1.8e9 + at, "edge": edge, "name": name, "status": status})
    (folder / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"time": 3')
    ledger = {"attempts": 2, "useful_s": 201.0, "lost_s": 6.0, "restart_s": 9.5, "waiting_s": 3.0, "events": [
        {"time": 1.8e9 + 40, "kind": "worker lost", "message": "rank 1 on node b: SIGKILL"},
        {"time": 1.8e9 + 49, "kind": "resumed", "message": "from step 120, 14 steps again"},
    ]}  # fmt: skip
    (folder / "ledger.json").write_text(json.dumps(ledger))
    environment = {
        "commit": "3f0c2a9",
        "versions": {"python": "3.11.7", "torch": "2.15.0", "ray": "2.60.0", "deepspeed": "0.19.8", "mlflow": "3.17.2"},
        "processor": "AMD EPYC 7763",
        "cores": 2,
        "memory_bytes": 25_000_000_000,
        "devices": [],
    }
    (folder / "environment.json").write_text(json.dumps(environment))


def _paint(image: dict, annotations: list[dict]) -> np.ndarray:
    height, width = image["height"], image["width"]
    rng = np.random.default_rng(image["id"])
    y, x = np.mgrid[:height, :width]
    base = 120 + 40 * np.sin(x / 17 + image["id"]) * np.cos(y / 23)
    picture = base[..., None] + rng.normal(0, 10, (height, width, 3))
    for annotation in annotations:
        if annotation["image_id"] == image["id"]:
            left, top, wide, high = annotation["bbox"]
            inside = ((x - left - wide / 2) / (wide / 2)) ** 2 + ((y - top - high / 2) / (high / 2)) ** 2 <= 1
            picture[inside] = rng.uniform(30, 230, 3)
    return picture.clip(0, 255).astype(np.uint8)
