"""The picture of a run for a README: how every token class learned, from its `metrics.jsonl`.

python -m torchtune_agent.metrics.plots OUTPUT_DIR/logs/metrics.jsonl metrics.png
"""

import sys
from pathlib import Path

from torchtune_agent.metrics.charts import PICTURE_GROUPS, PICTURE_METRICS, class_charts
from torchtune_agent.metrics.colours import CLASSES, PAGE_LIGHT
from torchtune_agent.metrics.history import History


def plot_classes(history: History, path: Path) -> None:
    """Draw the first charts of the report: training as lines, validation as dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained", facecolor=PAGE_LIGHT)
    FigureCanvasAgg(figure)
    charts = {chart.metric: chart for chart in class_charts(history.curves)}
    looks = {
        "train": {"linestyle": "-", "linewidth": 1.6},
        "val": {"linestyle": "", "marker": "o", "markersize": 4.5},
    }
    for axes, metric in zip(figure.subplots(1, len(PICTURE_METRICS)), PICTURE_METRICS, strict=True):
        chart = charts.get(metric)
        for group in PICTURE_GROUPS:
            for split, look in looks.items():
                name = chart.names.get((split, group)) if chart else None
                if name is not None:
                    curve, (title, colour, _) = history.curves[name], CLASSES[group]
                    label = title if split == "train" else None
                    axes.plot(curve.steps, curve.values, color=colour, label=label, **look)
        axes.set_title(chart.kind.title if chart else metric)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    title = "lines: training   dots: validation"
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, len(labels)), frameon=False, title=title)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    plot_classes(History.read(Path(sys.argv[1])), Path(sys.argv[2]))
