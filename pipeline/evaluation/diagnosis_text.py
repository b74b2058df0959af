"""The diagnosis of an evaluation in a few lines of plain text, for the terminal."""

from __future__ import annotations

from refinedet.pipeline.evaluation.diagnosis import Diagnosis

_CONFUSED = 5  # pairs of classes that are named


def describe_diagnosis(diagnosis: Diagnosis) -> str:
    """Yield the gain of fixing each kind of error, and the classes confused most; - where nothing is measured."""
    ap = "-" if diagnosis.ap is None else f"{diagnosis.ap:.6f}"
    lines = [f"AP at IoU {diagnosis.iou:g} is {ap}. Fixing all errors of one kind would add:"]
    lines += [f"  {error.kind:<14} {error.ap_cost:.6f}  {error.count:>7} errors" for error in diagnosis.errors]
    labels = (*diagnosis.confusion.labels, "background")
    background = len(diagnosis.confusion.labels)
    confused = [cell for cell in diagnosis.confusion.cells if cell[0] != cell[1] and background not in cell[:2]]
    named = [
        f"{labels[true]} as {labels[found]} {count}"
        for true, found, count in sorted(confused, key=lambda cell: -cell[2])[:_CONFUSED]
    ]
    if named:
        lines.append(f"Most confused, from score {diagnosis.confusion.score:.2f}: {', '.join(named)}")
    return "\n".join(lines)
