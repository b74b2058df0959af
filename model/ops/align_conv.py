"""AlignConv: a convolution whose taps follow each refined anchor (section III-D of the paper).

Legend: B images, F channels, H W cells of a level, A anchors of an image, N rows (anchors that are computed),
K kernel side, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from model.ops.align_conv_reference import align_conv_reference


def align_conv(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    index: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> Tensor:
    """Predict from features sampled inside each anchor's refined box, for the chosen anchors of all levels at once.

    A row's samples are the centres of the K x K equal parts of its box, bilinear, at feature coordinate
    pixel / stride - 0.5. A corner of a sample that lies off the map counts zero, as in `deform_conv2d`; so does a
    sample of a box that is not finite. Every aspect of every level has its own filters.

    features  a level each: [B, F, H, W], any memory format; fp32, bf16, fp16 or fp64
    strides   a level each: pixels a cell
    boxes     [N, 4]  xyxy, pixels of the image; no gradient reaches them
    index     [N] int64, ascending: image * A + anchor, anchors in the order level, y, x, aspect;
              a negative index marks an empty row: zero output, no gradient
    weight    a level each: [aspects, O, F, K, K]
    bias      a level each: [aspects, O]
    returns   [N, O]  accumulated in fp32 (fp64 for fp64), in the features' dtype
    """
    return align_conv_reference(features, strides, boxes, index, weight, bias)
