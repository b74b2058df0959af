"""Whole detectors beside torchvision's, in one run: images in, detections out.

    python -m tests.bench.bench_detector [--sizes 320 512 1024] [--batches 1 8] [--device cuda] [--json OUT]

Weights are random, so the ARM's confidence is set by a shift of its logits until the wanted share of anchors survives;
the peers keep their own settings. All take square images of one size, ready scaled. Every repetition runs every case
once; the ratios are of medians. On a GPU everything runs under autocast in bf16, on a CPU in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from refinedet.model import RefineDet, RefineDetConfig
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from tests.bench.record import describe_where, save_result

BACKBONES = {"VGG-16": "vgg16_reduced", "ResNet-101": "resnet101"}
PEERS = ("ssd300_vgg16", "retinanet_resnet50_fpn", "fcos_resnet50_fpn")
PAPER_FPS = {320: "27.8 with AlignConv, 40 without", 512: "16.1 with AlignConv"}


def make_detector(backbone: str, head: str, images: Tensor, percent: int) -> RefineDet:
    """A detector whose ARM lets about `percent` of the anchors of `images` survive."""
    torch.manual_seed(0)
    theta = 0.99 if percent < 100 else 1.0
    detector = RefineDet(RefineDetConfig(backbone=backbone, head=head, input_size=images.shape[-1], theta=theta))
    detector = detector.to(images.device, memory_format=torch.channels_last).eval()
    if percent < 100:
        with torch.no_grad():
            logits = detector(images[:1], capacity=64).arm_class.float()
            margin = (logits[..., 1] - logits[..., 0]).flatten().quantile(1 - percent / 100)
            wanted = torch.logit(torch.tensor(1 - theta)).to(margin.device)
            for cls in detector.arm.cls:
                cls.bias.unflatten(0, (-1, 2))[:, 1] += wanted - margin
    return detector


def make_cases(size: int, batch: int, device: torch.device, percents: list[int]) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator).to(device)
    cases: dict[str, Callable[[], object]] = {}
    for name, backbone in BACKBONES.items():
        for head, shares in (("align", percents), ("vanilla", percents[:1]), ("deform", percents[:1])):
            for percent in shares:
                detector = make_detector(backbone, head, images, percent)
                cases[f"ours, {name}, {head}, {percent} %"] = lambda detector=detector: detector.detect(images)
    scaled = list(images.float() / 255)
    for name in PEERS:
        peer = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=81)
        mean, std = peer.transform.image_mean, peer.transform.image_std
        peer.transform = GeneralizedRCNNTransform(size, size, mean, std, fixed_size=(size, size))
        peer = peer.to(device).eval()
        cases[f"torchvision, {name}"] = lambda peer=peer: peer(scaled)
    return cases


def measure(cases: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repetition but the first."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                case()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[320, 512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--survivors", type=int, nargs="+", default=[10, 2, 98], help="percent of the anchors")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the command; times mean nothing")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.batches, arguments.survivors, arguments.repeats = [320], [1], [10], 1
        arguments.only = ["VGG", "torchvision"]
    device = torch.device(arguments.device)
    where = describe_where(["torchvision"], device.type)
    figures: dict[str, object] = {}
    rows: list[list[str]] = []
    sys.stdout.write("\n".join(f"{key:13} {value}" for key, value in where.items()) + "\n")
    for size in arguments.sizes:
        for batch in arguments.batches:
            cases = make_cases(size, batch, device, arguments.survivors)
            cases = {n: c for n, c in cases.items() if not arguments.only or any(part in n for part in arguments.only)}
            times = measure(cases, device, arguments.repeats)
            figures[f"{size}, batch {batch}"] = times
            paper = f"; paper, Titan X, images/s: {PAPER_FPS[size]}" if size in PAPER_FPS and batch == 1 else ""
            sys.stdout.write(
                f"\n{size} pixels, batch {batch}{paper}\n{'case':40}{'median ms':>10}{'spread':>9}{'FPS':>8}\n"
            )
            for name, values in times.items():
                median = statistics.median(values)
                spread = max(values) - min(values)
                rate = 1e3 * batch / median
                rows.append([str(size), str(batch), name, f"{median:.4g}", f"{spread:.3g}", f"{rate:.3g}"])
                sys.stdout.write(f"{name:40}{median:10.1f}{spread:9.1f}{rate:8.1f}\n")
            sys.stdout.flush()
    if arguments.json:
        columns = ["pixels", "batch", "case", "median ms", "spread ms", "images/s"]
        workload = "Images in, detections out; the percentage is that of the anchors that survive."
        spread = f"most minus least of {arguments.repeats} repetitions"
        save_result(arguments.json, columns, rows, where, workload=workload, spread=spread, figures=figures)


if __name__ == "__main__":
    main()
