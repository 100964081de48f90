"""The picture of a run: how every token class learned, from its `metrics.jsonl`.

python -m torchtune_agent.metrics.plots OUTPUT_DIR/logs/metrics.jsonl metrics.png
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtune_agent.metrics.log import read_rows
from torchtune_agent.metrics.tracker import NameStyle, metric_name

_PANELS = (("nll", "Loss"), ("exact_entropy", "Entropy (nats)"), ("accuracy", "Accuracy"))
_CURVES = {
    "reasoning": "#1f77b4",
    "call_syntax": "#9aa0a6",
    "call_name": "#9467bd",
    "arg_name": "#2ca02c",
    "arg_value": "#d62728",
}


def plot_classes(rows: Sequence[Mapping[str, Any]], path: Path, style: NameStyle = "flat") -> None:
    """Draw loss, entropy and accuracy of every class over the steps: training as lines, validation as dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (metric, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for group, colour in _CURVES.items():
            for split, look in (
                ("train", {"linestyle": "-"}),
                ("val", {"linestyle": "", "marker": "o", "markersize": 4}),
            ):
                name = metric_name(split, group, metric, style)
                points = [(row["step"], row[name]) for row in rows if name in row]
                label = group.replace("_", " ") if split == "train" else None
                axes.plot([p[0] for p in points], [p[1] for p in points], color=colour, label=label, **look)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    title = "lines: training   dots: validation"
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, title=title)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    plot_classes(read_rows(Path(sys.argv[1])), Path(sys.argv[2]))
