"""Cost of multi-scale testing beside its forward passes alone, in one run.

    python -m tests.bench.bench_multiscale [--run runs/quickstart] [--images 64] [--repeats 5] [--json OUT]

The forward passes are the model's calls, timed inside the test; the whole adds reading, decoding, warping, selection,
turning boxes back, merging and the rows. CPU time of all threads, so that a busy machine counts less. Without the
directory of a run the images are drawn and the model is untrained: every anchor is looked into.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from refinedet.model import RefineDet, RefineDetConfig, load_weights  # noqa: E402
from refinedet.model.ops import library  # noqa: E402
from refinedet.pipeline.config.recipes import describe_cost, resolve_merge  # noqa: E402
from refinedet.pipeline.config.spec import Data, Multiscale, Pass, Split  # noqa: E402
from refinedet.pipeline.data.index import open_shards  # noqa: E402
from refinedet.pipeline.data.reading import EvaluationSamples  # noqa: E402
from refinedet.pipeline.data.shards import prepare_shards  # noqa: E402
from refinedet.pipeline.inference.multiscale import detect_samples_by_rules  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--run", help="a run's directory: its weights, model and validation shards")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few images, to try the command; times mean nothing")
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    if args.quick:
        args.images, args.repeats = 2, 1
    torch.manual_seed(0)
    if args.run:
        spec = yaml.safe_load((Path(args.run) / "spec.yaml").read_text())
        config = TypeAdapter(RefineDetConfig).validate_python(spec["model"])
        shards = open_shards(str(Path(args.run) / "shards" / "val"))
        model = RefineDet(config)
        load_weights(model, load_file(Path(args.run) / "weights.safetensors"))
    else:
        data = Data(format="shapes", image_size=320, val=(Split(count=args.images),))
        shards = prepare_shards(data, "val", tempfile.mkdtemp())
        config = RefineDetConfig(num_classes=10, input_size=128, backbone="resnet18", tcb_channels=128)
        model = RefineDet(config)
    model = model.to(memory_format=torch.channels_last)
    side = config.input_size
    passes = (Pass(size=side), Pass(size=side * 3 // 2), Pass(size=side * 2))
    multiscale = Multiscale(passes=passes)
    rules = {"own": resolve_merge(multiscale)}
    sys.stdout.write(describe_cost(passes, input_size=side, num_images=args.images) + "\n")

    forward_s: list[float] = []
    original = RefineDet.forward

    def timed(self: RefineDet, *arguments: Any, **named: Any) -> Any:
        start = time.process_time()
        result = original(self, *arguments, **named)
        forward_s.append(time.process_time() - start)
        return result

    shares, boxes = [], 0
    RefineDet.forward = timed  # type: ignore[method-assign]
    try:
        for _ in range(args.repeats + 1):
            forward_s.clear()
            start = time.process_time()
            samples = EvaluationSamples(shards, range(args.images))
            tables = detect_samples_by_rules(model, samples, shards.categories, multiscale, rules)
            boxes = len(tables["own"])
            shares.append(((time.process_time() - start), sum(forward_s)))
    finally:
        RefineDet.forward = original  # type: ignore[method-assign]
    whole, forward = (statistics.median(column) for column in zip(*shares[1:], strict=True))
    ratios = [all_s / forward_part for all_s, forward_part in shares[1:]]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    hardware = {
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "opencv-python-headless")},
        "library": library.describe_library().loaded,
        "commit": commit.stdout.strip(),
    }
    sys.stdout.write(f"{args.images} images, {boxes} detections, {config.backbone} at {side} pixels\n")
    sys.stdout.write(f"forward passes {forward:8.2f} s\nwhole          {whole:8.2f} s\n")
    sys.stdout.write(f"whole / forward passes: median {statistics.median(ratios):.3f}, ")
    sys.stdout.write(f"from {min(ratios):.3f} to {max(ratios):.3f}\n{hardware}\n")
    if args.json:
        report = {"hardware": hardware, "settings": vars(args), "ratios": ratios, "seconds": shares[1:]}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
