"""timm's own trained weights of a backbone, which timm downloads and keeps in the hub's cache."""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor

from .backbone_names import check_pretrained


def download_pretrained(backbone: str) -> dict[str, Tensor]:
    """State dict of timm's trained classifier, from the hub or its cache.

    Raises ValueError where timm has none for this name, or where it cannot be downloaded.
    """
    check_pretrained(backbone)
    try:
        classifier: Any = timm.create_model(backbone, pretrained=True)
    except Exception as error:  # the hub's client and urllib raise many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"timm's weights of {backbone!r} cannot be downloaded here ({reason}); give a file or URI of weights, or "
            "fill the hub's cache (HF_HOME) where there is a network."
        ) from None
    return classifier.state_dict()
