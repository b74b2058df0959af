"""The plots of docs/pictures that show results of tests/bench/results. The tables' command draws them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.tables import REPOSITORY, RESULTS, read_result

PICTURES = REPOSITORY / "docs" / "pictures"
OURS, SECOND, PAPER, QUIET = "#0b62a4", "#7a8fa3", "#c2571a", "#57606a"
STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "refinedet",  # the same bytes from the same numbers
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": "#1f2328",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": "#1f2328",
    "ytick.labelcolor": "#1f2328",
    "legend.frameon": False,
}


TERMS = {
    "full > vanilla": "AlignConv over\nvanilla convolution",
    "full > deformable": "AlignConv over\ndeformable convolution",
    "vanilla > no_filtering": "negative anchor filtering",
    "no_filtering > no_cascade": "two-step cascaded\nregression",
    "full > no_cascade": "AlignConv, filtering and\ncascade together",
    "no_cascade > no_tcb": "transfer connection\nblocks",
}


def draw_all(folder: Path = RESULTS) -> dict[Path, str]:
    """SVG of every plot whose result exists."""
    found: dict[Path, str] = {}
    for name, draw in PLOTS.items():
        if (folder / f"{name}.json").exists():
            found[PICTURES / f"{name}.svg"] = as_svg(draw, read_result(folder / f"{name}.json"))
    return found


def as_svg(draw: Callable[[Axes, dict[str, Any]], None], result: dict[str, Any]) -> str:
    """A plot on an opaque white ground, which is readable on a dark page too."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained", facecolor="white")
        draw(figure.subplots(), result)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def draw_curve(axes: Axes, result: dict[str, Any]) -> None:
    """AP and AP50 over the epochs of a training."""
    epochs, ap, ap50 = ([float(row[column]) for row in result["rows"]] for column in range(3))
    for values, name, color in ((ap50, "AP50", OURS), (ap, "AP", SECOND)):
        axes.plot(epochs, values, "o-", color=color, markersize=4, linewidth=1.8)
        axes.annotate(
            f"{name} {values[-1]:.3f}", (epochs[-1], values[-1]), (8, 0), textcoords="offset points",
            va="center", color=color, fontweight="bold",
        )  # fmt: skip
    for epoch in result["decay_epochs"]:
        axes.axvline(float(epoch), color=QUIET, linewidth=1, linestyle=":")
    axes.annotate("learning rate / 10", (float(result["decay_epochs"][0]), 0.004), (-4, 0), textcoords="offset points",
                  ha="right", color=QUIET, fontsize=9)  # fmt: skip
    axes.set(xlabel="epoch (2,041 training photos each)", ylabel="AP on 400 validation photos", ylim=(0, None))
    axes.set_xlim(0, epochs[-1] * 1.18)
    axes.set_xticks(range(0, int(epochs[-1]) + 1, 10))


def draw_claims(axes: Axes, result: dict[str, Any]) -> None:
    """Differences between variants beside the paper's, in the paper's measure."""
    claims = [one for one in result["sweep"]["claims"] if one["difference"] and one["metric"].startswith("AP50")]
    for row, claim in enumerate(claims):
        found = claim["difference"]
        seeds = [float(value) for value in found["values"]]
        spread = float(found["spread"] or 0)
        first = row == 0
        axes.errorbar(
            float(found["mean"]), row - 0.12, xerr=spread, fmt="o", color=OURS, markersize=7, capsize=4, linewidth=1.8,
            label="here: mean ± standard deviation" if first else None,
        )  # fmt: skip
        axes.plot(seeds, [row - 0.12] * len(seeds), "|", color=OURS, markersize=11, alpha=0.55,
                  label="here: each seed" if first else None)  # fmt: skip
        if claim["paper"] is not None:
            axes.plot(float(claim["paper"]), row + 0.18, "D", color=PAPER, markersize=6,
                      label="paper: VOC 2007, one run" if first else None)  # fmt: skip
    axes.axvline(0, color="#1f2328", linewidth=1)
    names = [TERMS.get(claim["claim"], claim["claim"].replace("_", " ")) for claim in claims]
    axes.set_yticks(range(len(claims)), names)
    axes.set_ylim(len(claims) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("gain in points: AP50 here, VOC's mAP (IoU 0.5) in the paper")
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(loc="outside upper center", ncols=3, fontsize=9, columnspacing=1.2, handletextpad=0.4)


PLOTS: dict[str, Callable[[Axes, dict[str, Any]], None]] = {
    "coco_photos_curve": draw_curve,
    "table2_drawn": draw_claims,
}
