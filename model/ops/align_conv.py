"""AlignConv: a convolution whose taps follow each refined anchor (section III-D of the paper).

Legend: B images, F channels, H W cells of a level, A anchors of an image, N rows (anchors that are computed),
K kernel side, O outputs.
"""

# torch's registration of operators is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from . import align_conv_products, library
from .align_conv_reference import align_conv_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNELS = (3, 5, 7)

# Registering twice is an error, and the first calls may come from several threads.
_REGISTERING = threading.Lock()


def align_conv(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    rows: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> Tensor:
    """Predict from features sampled inside each anchor's refined box, for the chosen anchors of all levels at once.

    A row's samples are the centres of the K x K equal parts of its box, bilinear, at feature coordinate
    pixel / stride - 0.5. A corner of a sample that lies off the map counts zero, as in `deform_conv2d`; so does a
    sample of a box that is not finite. Every aspect of every level has its own filters. The equivalent in plain
    PyTorch is `align_conv_reference`, which runs where the operators are not built.

    features  a level each: [B, F, H, W]; fp32, bf16, fp16 or fp64. Channels-last is read in place, else copied
    strides   a level each: pixels a cell
    boxes     [N, 4]  xyxy, pixels of the image, fp32 or fp64; no gradient reaches them
    rows      [N] int64, ascending: numbers of the anchors of all images in the order (level, aspect, image, y, x), see
              `anchors.order_rows`; the number of all anchors marks an empty row: zero output, no gradient. Rows that
              are not ascending are an error on a CPU, and NaN on a GPU, where the host does not wait to read them
    weight    a level each: [aspects, O, F, K, K]; read in place where channels are innermost in memory, else copied
    bias      a level each: [aspects, O]
    returns   [N, O]  accumulated in fp32 (fp64 for fp64), in the features' dtype

    Under autocast features, weight and bias are cast as for a convolution. Rows whose gradient is zero are skipped in
    the backward; every filter gets a gradient, of zeros where no row asked for one. The backward is deterministic on a
    CPU, and on a GPU under `torch.use_deterministic_algorithms`. Second derivatives are refused with an error, and so
    is training on a GPU without kernels for it.
    """
    features, weight, bias = (_autocast(tensors, features) for tensors in (features, weight, bias))
    _check(features, strides, boxes, rows, weight, bias)
    device = features[0].device
    if not _is_ready(device.type, device.index, features[0].dtype):
        if device.type == "cuda" and features[0].dtype != torch.float64 and torch.is_grad_enabled():
            # Training for days at a fraction of the speed is a fault; a single detection is not.
            raise RuntimeError(library.describe_fault_on_gpu(device.index or 0))
        return align_conv_reference(features, strides, boxes, rows, weight, bias)
    if features[0].is_cuda:
        features, weight = _pad_channels(features), _pad_channels(weight)
    weight = [filters.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for filters in weight]
    return torch.ops.refinedet.align_conv(list(features), list(strides), boxes.detach(), rows, weight, list(bias))


def top_rows(scores: Tensor, capacity: int, threshold: float) -> Tensor:
    """The rows to compute, of a fixed number, for CUDA graphs and torch.compile: the host never waits.

    scores    [B * A]  such as 1 - negative confidence, in the order of the row numbers
    capacity  of the result, at most B * A; where more anchors pass, those with the highest scores stay
    returns   [capacity] int64  numbers of the rows with `threshold` or more, ascending, then B * A for empty rows
    """
    if not 0 < capacity <= scores.numel():
        raise ValueError(f"capacity must lie in [1, {scores.numel()}] (all anchors), received {capacity}.")
    values, rows = scores.topk(capacity, sorted=False)
    return torch.where(values >= threshold, rows, scores.numel()).sort().values


def _autocast(tensors: Sequence[Tensor], features: Sequence[Tensor]) -> Sequence[Tensor]:
    device = features[0].device.type if features else "cpu"
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def _check(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    rows: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> None:
    if not (0 < len(features) == len(strides) == len(weight) == len(bias)):
        raise ValueError(
            "Every level needs features, a stride, a weight and a bias, received "
            f"{len(features)}, {len(strides)}, {len(weight)} and {len(bias)} of them."
        )
    first, filters = features[0], weight[0]
    if first.dtype not in DTYPES:
        raise ValueError(f"features must be one of {', '.join(map(str, DTYPES))}, received {first.dtype}.")
    if filters.dim() != 5 or filters.shape[3] not in KERNELS or filters.shape[4] != filters.shape[3]:
        raise ValueError(f"weight must be [aspects, O, F, K, K] with K in {KERNELS}, received {list(filters.shape)}.")
    for level, (feature, filters_here, offset) in enumerate(zip(features, weight, bias, strict=True)):
        if feature.dim() != 4 or feature.shape[0] != first.shape[0] or feature.shape[1] != filters.shape[2]:
            raise ValueError(
                f"The features of level {level} must be [{first.shape[0]}, {filters.shape[2]}, H, W], "
                f"received {list(feature.shape)}."
            )
        if filters_here.shape != filters.shape or offset.shape != filters.shape[:2]:
            raise ValueError(
                f"The weight and bias of level {level} must be {list(filters.shape)} and {list(filters.shape[:2])}, "
                f"received {list(filters_here.shape)} and {list(offset.shape)}."
            )
        for name, tensor in (("features", feature), ("weight", filters_here), ("bias", offset)):
            if tensor.dtype != first.dtype or tensor.device != first.device:
                raise ValueError(
                    f"The {name} of level {level} must be {first.dtype} on {first.device} as the first features are, "
                    f"received {tensor.dtype} on {tensor.device}."
                )
    if rows.dim() != 1 or rows.dtype != torch.int64 or rows.device != first.device:
        raise ValueError(
            f"rows must be [N] int64 on {first.device}, received {list(rows.shape)} {rows.dtype} on {rows.device}."
        )
    if boxes.shape != (*rows.shape, 4) or boxes.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"boxes must be [{rows.shape[0]}, 4] float32 or float64, received {list(boxes.shape)} {boxes.dtype}."
        )
    if boxes.device != first.device:
        raise ValueError(f"boxes must be on {first.device} as the features are, received {boxes.device}.")


def _pad_channels(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Zero channels up to 16 bytes: the GPU reads that many at a time. Of [B, F, H, W] or [aspects, O, F, K, K]."""
    missing = -tensors[0].shape[-3] % (16 // tensors[0].element_size())
    return [functional.pad(tensor, (0, 0, 0, 0, 0, missing)) for tensor in tensors] if missing else tensors


@torch.compiler.assume_constant_result
def _is_ready(device: str, index: int | None, dtype: torch.dtype) -> bool:
    with _REGISTERING:
        if not _register():
            return False
    # fp64 is for checking, which the reference does as well.
    return device == "cpu" or (device == "cuda" and dtype != torch.float64 and library.runs_on_gpu(index or 0))


@functools.cache
def _register() -> bool:
    """Load the operator and give it its shapes and its gradient; False where it is not built."""
    if not library.is_loaded():
        return False
    torch.library.register_fake("refinedet::align_conv", _fake)
    torch.library.register_fake("refinedet::align_conv_backward", _fake_backward)
    torch.library.register_autograd("refinedet::align_conv", _backward, setup_context=_setup_context)
    torch.library.register_autograd("refinedet::align_conv_backward", _refuse_second_derivative)
    torch.library.impl("refinedet::align_conv", "CPU", align_conv_products.align_conv_forward)
    for device in ("CPU", "CUDA") if library.describe_library().cuda else ("CPU",):
        torch.library.impl("refinedet::align_conv_backward", device, align_conv_products.align_conv_backward)
    return True


def _fake(
    features: list[Tensor], strides: list[int], boxes: Tensor, rows: Tensor, weight: list[Tensor], bias: list[Tensor]
) -> Tensor:
    return features[0].new_empty(rows.shape[0], weight[0].shape[1])


def _fake_backward(
    grad: Tensor,
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    rows: Tensor,
    weight: list[Tensor],
    features_grad: bool,
    filters_grad: bool,
    deterministic: bool,
) -> list[Tensor]:
    gradients: list[Tensor] = []
    if features_grad:
        for feature in features:
            batch, channels, height, width = feature.shape
            gradients.append(feature.new_empty(batch, height, width, channels).permute(0, 3, 1, 2))
    if filters_grad:
        for filters in weight:
            aspects, outputs, channels, kernel, _ = filters.shape
            innermost = filters.new_empty(aspects, outputs, kernel, kernel, channels)
            gradients.append(innermost.permute(0, 1, 4, 2, 3))
        gradients += [filters.new_empty(filters.shape[:2]) for filters in weight]
    return gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, strides, boxes, rows, weight, _ = inputs
    ctx.save_for_backward(*features, boxes, rows, *weight)
    ctx.strides = strides


def _backward(ctx: Any, grad: Tensor) -> tuple[Sequence[Tensor | None] | None, ...]:
    num_levels: int = len(ctx.strides)
    features, (boxes, rows), weight = (
        ctx.saved_tensors[:num_levels],
        ctx.saved_tensors[num_levels : num_levels + 2],
        ctx.saved_tensors[num_levels + 2 :],
    )
    to_features = any(ctx.needs_input_grad[0])
    to_filters = any(ctx.needs_input_grad[4]) or any(ctx.needs_input_grad[5])
    gradients: list[Tensor] = torch.ops.refinedet.align_conv_backward(
        grad,
        features,
        ctx.strides,
        boxes,
        rows,
        weight,
        to_features,
        to_filters,
        torch.are_deterministic_algorithms_enabled(),
    )
    absent: list[Tensor | None] = [None] * num_levels
    of_features = gradients[:num_levels] if to_features else absent
    of_filters = gradients[-2 * num_levels :] if to_filters else absent * 2
    return of_features, None, None, None, of_filters[:num_levels], of_filters[num_levels:]


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> NoReturn:
    raise NotImplementedError(
        "align_conv has no second derivative, received a backward through its gradient; compute it without "
        "create_graph, or with align_conv_reference."
    )
