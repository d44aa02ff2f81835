"""A picture of what a benchmark measured. It needs matplotlib, which is an optional extra of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INCHES = (12.0, 4.8)
DOTS_PER_INCH = 150
MARKERS = "osD^vPX*"

_Row = Mapping[str, Any]


def plot_bench(record: Mapping[str, Any], path: str) -> None:
    """Draw the record of `skippy bench` into a PNG file.

    Raises:
        OSError: the file cannot be written.
    """
    # No pyplot: nothing here may look for a screen, or be left behind.
    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _plot_acceptance(left, record["rows"])
    _plot_speed(right, record["rows"])
    figure.suptitle(f"{record['model']}, {record['dtype']}, {record['device']}", fontsize="medium")
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH)


def _plot_acceptance(axes: Axes, rows: Sequence[_Row]) -> None:
    """One line per plan, at the first batch size: it decides what is drafted, but hardly what is accepted."""
    batch_size = rows[0]["batch_size"]
    deepest = 1
    for place, row in enumerate(rows):
        shares = row["acceptance_by_depth_where_drafted"]
        if row["batch_size"] == batch_size and shares:
            deepest = max(deepest, len(shares))
            depths = range(1, len(shares) + 1)
            axes.plot(depths, shares, marker=MARKERS[place % len(MARKERS)], label=row["plan"])
    axes.set(title=f"accepted by depth, batch {batch_size}", xlabel="depth in the draft, tokens", ylim=(0, 1.02))
    axes.set_ylabel("accepted share of the drafts that reach so deep")
    axes.set_xticks(range(1, deepest + 1))
    _finish(axes)


def _plot_speed(axes: Axes, rows: Sequence[_Row]) -> None:
    """One line per drafter and batch size; a plan that leaves the number to the engine has none, so it lies flat."""
    base = rows[0]["plan"]
    axes.axhline(1.0, color="grey", linewidth=1.0, label=base)
    rows = [row for row in rows if row["plan"] != base]
    pairs = list(dict.fromkeys((row["drafter"], row["batch_size"]) for row in rows))
    widths: set[int] = set()
    for place, (drafter, batch_size) in enumerate(pairs):
        own = [row for row in rows if (row["drafter"], row["batch_size"]) == (drafter, batch_size)]
        fixed = {row["num_speculative_tokens"]: row["ratio"] for row in own if row["num_speculative_tokens"]}
        color, marker, label = f"C{place % 10}", MARKERS[place % len(MARKERS)], f"{drafter}, batch {batch_size}"
        if fixed:
            numbers, ratios = zip(*sorted(fixed.items()), strict=True)
            axes.plot(numbers, ratios, color=color, marker=marker, label=label)
            widths |= fixed.keys()
        for row in own:
            if row["num_speculative_tokens"] is None:
                axes.axhline(row["ratio"], color=color, linestyle="--", label=f"{label}: number left to the engine")
    axes.set(title=f"speed against {base}", xlabel="num_speculative_tokens", ylabel=f"times the speed of {base}")
    axes.set_xticks(sorted(widths))
    axes.set_ylim(bottom=0)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
