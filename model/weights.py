"""Start from trained weights: a backbone's, another project's detector, or an earlier run's.

State dicts in, tensors copied; reading files is left to the caller. `weight_names` holds the names of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .detector import RefineDet
from .heads import NUM_ASPECTS
from .weight_names import find_foreign_names

_CLASS_OUTPUTS = "adm.cls"


@dataclass(frozen=True)
class LoadReport:
    """Outcome of a load, tensor by tensor.

    matched   names in the model that were copied as they are
    reshaped  names in the model that were copied in part (other classes, fc6 and fc7 of VGG)
    left      names in the file that found no place
    missing   names in the model that keep their initial values
    classes   categories whose outputs were copied by name, where the file has other categories
    """

    matched: tuple[str, ...]
    reshaped: tuple[str, ...]
    left: tuple[str, ...]
    missing: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def __str__(self) -> str:
        classes = f", {len(self.classes)} classes matched by name" if self.classes else ""
        return (
            f"{len(self.matched)} tensors matched, {len(self.reshaped)} reshaped, {len(self.left)} of the file left, "
            f"{len(self.missing)} of the model missing{classes}"
        )


@torch.no_grad()
def load_weights(model: RefineDet, state: Mapping[str, Tensor], categories: Sequence[str] = ()) -> LoadReport:
    """Copy what fits from `state` into `model`, and report what did and what did not.

    state       of a RefineDet with any classes, or of a classifier or detector of another project; see `weight_names`
    categories  names of the classes of `state`; where they differ from the model's own, class outputs are copied for
                the names that both have
    Raises ValueError for a tensor that holds NaN or infinity.
    """
    for source, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"weights must be finite, received NaN or infinity in {source!r}.")
    own, foreign = model.state_dict(), find_foreign_names(model)
    classes = _match_classes(model.categories, categories)
    matched: set[str] = set()
    reshaped: set[str] = set()
    left: list[str] = []
    shifts: list[tuple[Tensor, Tensor]] = []
    for source, value in state.items():
        theirs = source.removeprefix("module.")
        name = theirs if theirs in own else foreign.places.get(theirs)
        mean = own.get(foreign.shifts.get(theirs, ""))
        if mean is not None and mean.shape == value.shape:
            shifts.append((mean, value))
        elif name is None or name in matched | reshaped:
            left.append(source)
        elif value.shape == own[name].shape and (classes is None or not name.startswith(_CLASS_OUTPUTS)):
            own[name].copy_(value)
            matched.add(name)
        elif _copy_partly_(own[name], value, name, classes):
            reshaped.add(name)
        else:
            left.append(source)
    for mean, bias in shifts:  # after the norms' own statistics
        mean.sub_(bias)
    missing = [name for name in own if name not in matched | reshaped and not name.endswith("num_batches_tracked")]
    copied = any(name.startswith(_CLASS_OUTPUTS) for name in reshaped)
    named = tuple(model.categories[row - 1] for row in classes or ()) if copied else ()
    return LoadReport(tuple(sorted(matched)), tuple(sorted(reshaped)), tuple(left), tuple(missing), named)


def _match_classes(ours: Sequence[str], theirs: Sequence[str]) -> dict[int, int] | None:
    """Class here -> class there of the same name, from 1; None where the categories are the same or unknown."""
    here, there = ([" ".join(name.split()).casefold() for name in names] for names in (ours, theirs))
    if here == there or not here or not there:
        return None
    return {row: there.index(name) + 1 for row, name in enumerate(here, start=1) if name in there}


def _copy_partly_(own: Tensor, value: Tensor, name: str, classes: Mapping[int, int] | None) -> bool:
    """Copy into `own` what a tensor of another shape or other classes has for it; whether there was anything."""
    if name.startswith(_CLASS_OUTPUTS):
        if value.shape[0] % NUM_ASPECTS or value.shape[1:] != own.shape[1:]:
            return False
        mine, theirs = (torch.unflatten(tensor, 0, (NUM_ASPECTS, -1)) for tensor in (own, value))
        for here, there in {0: 0, **(classes or {})}.items():  # background, and what means the same
            if there < theirs.shape[1]:
                mine[:, here].copy_(theirs[:, there])
        return True
    if name.startswith("backbone.stages.5"):  # fc6, fc7: every 4th row, and for fc6 every 3rd of 7x7 positions
        side = {25088: 7, 4096: 1}.get(value.shape[-1] if value.dim() == 2 else 0)
        if value.dim() == 1 and len(value) == 4 * len(own):
            own.copy_(value[::4])
            return True
        if side:
            kernel = value.view(4096, -1, side, side)[::4, :: 1 if side == 7 else 4, ::3, ::3]
            own.copy_(kernel)
            return True
    return False
