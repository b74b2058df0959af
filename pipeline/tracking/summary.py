"""What a run came to, in a few rows for the terminal."""

from __future__ import annotations

from pipeline.tracking.report import MODE_TITLES
from pipeline.tracking.run_folder import read_run

_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
_VOC_COLUMNS = ("mAP",)


def summary_rows(run_dir: str) -> list[dict[str, str]]:
    """One row an evaluation, {"": "Single scale", "AP": "0.503", ...}; empty before the first one."""
    rows = []
    for mode, result in read_run(run_dir).evaluations.items():
        names = _COLUMNS if "AP" in result.values else _VOC_COLUMNS
        cells = {name: result.values.get(name) for name in names}
        rows.append({"": MODE_TITLES[mode]} | {n: "–" if v is None else f"{v:.3f}" for n, v in cells.items()})
    return rows
