"""Verdict on a run in a few sentences: the first thing that a reader sees."""

from __future__ import annotations

from typing import Any

from refinedet.pipeline.report.diagnosis_section import error_rows, lost_stages, stage_words
from refinedet.pipeline.report.run_data import RunFolder
from refinedet.pipeline.report.timeline_chart import num_restarts
from refinedet.pipeline.report.training_charts import duration, ledger_total


def verdict(run: RunFolder, num_images: int | None) -> list[str]:
    """Sentences: how the run ended, its result, what costs most, and its reservations.

    num_images  validated; None where it is not known
    """
    sentences = [_ending(run), _result(run, num_images), *_losses(run), _extremes(run), _trust(run)]
    return [sentence for sentence in sentences if sentence]


def signed(value: float) -> str:
    """A difference with a proper sign: +0.021, −0.004, 0.000."""
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "−")


def headline(values: dict[str, float | None]) -> str:
    """Name of the metric that stands for an evaluation."""
    return "AP" if "AP" in values or "mAP" not in values else "mAP"


def _ending(run: RunFolder) -> str:
    last = run.steps[-1] if run.steps else {}
    words = {"FINISHED": "Finished", "FAILED": "Failed", "KILLED": "Stopped", "RUNNING": "Still running"}
    text = words.get(run.status, "")
    if not last:
        return f"{text}." if text else ""
    text = f"{text or 'Trained'} after {int(last['step'])} steps"
    if ledger_total(run):
        text += f" in {duration(ledger_total(run))} of training"
    restarts = num_restarts(run)
    if restarts:
        lost = float(run.ledger.get("lost_s") or 0)
        again = f"{duration(lost)} of work" if lost else "no work"
        text += f", {restarts} restart{'s' * (restarts > 1)}, {again} done again"
    return f"{text}."


def _result(run: RunFolder, num_images: int | None) -> str:
    single, multi = run.evaluations.get("single"), run.evaluations.get("multiscale")
    shown = []
    if single and (value := single.values.get(headline(single.values))) is not None:
        shown.append(f"{headline(single.values)} {value:.3f} at a single scale")
    if multi and (value := multi.values.get(headline(multi.values))) is not None:
        before = single.values.get(headline(multi.values)) if single else None
        gain = f" ({signed(value - before)})" if before is not None else ""
        shown.append(f"{headline(multi.values)} {value:.3f}{gain} with multi-scale testing")
    if not shown:
        return "Not evaluated yet."
    where = f" on {num_images:,} validation image{'s' * (num_images != 1)}" if num_images else ""
    return f"{', '.join(shown)}{where}."


def _losses(run: RunFolder) -> list[str]:
    """From the diagnosis of the first evaluation that has one."""
    diagnosis: dict[str, Any] = next((one.diagnosis for one in run.evaluations.values() if one.diagnosis), {})
    sentences = []
    try:
        costs = [row for row in error_rows(diagnosis) if row["cost"] > 0.0005][:2]
        if costs:
            named = ", then ".join(f"{row['name']} ({row['cost']:.3f})" for row in costs)
            sentences.append(f"Fixing one kind of error would give most AP for: {named}.")
        counts = lost_stages(diagnosis)
        total, lost = sum(counts.values()), {name: count for name, count in counts.items() if name != "found"}
        if total:
            worst = max(lost, key=lambda name: lost[name])
            text = f"The detector finds {counts['found']} of {total} objects"
            sentences.append(
                f"{text}; the most frequent loss: {stage_words(worst)} ({lost[worst]})." if lost[worst] else f"{text}."
            )
    except (KeyError, TypeError, ValueError, AttributeError):  # no diagnosis, or one of another layout
        pass
    return sentences


def _extremes(run: RunFolder) -> str:
    result = next(iter(run.evaluations.values()), None)
    aps = {
        name: value
        for name, row in (result.per_class if result else {}).items()
        if (value := row.get("AP")) is not None
    }
    if len(aps) < 3:
        return ""
    best, worst = max(aps, key=lambda name: aps[name]), min(aps, key=lambda name: aps[name])
    return f"Best class: {best} ({aps[best]:.3f}); weakest: {worst} ({aps[worst]:.3f})."


def _trust(run: RunFolder) -> str:
    count = max((len(one.unreadable) for one in run.evaluations.values()), default=0)
    return f"{count} image{'s' * (count != 1)} could not be read and count without detections." if count else ""
