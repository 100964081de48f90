"""A WandB workspace in which every chart overlays the token classes: a view to open a project with.

    pip install 'torchtune-agent[wandb-workspace]'
    python -m torchtune_agent wandb-workspace --project my-project

WandB makes a panel for each metric by itself, which with eight classes and a dozen metrics is a hundred panels. The
view is saved in the project, beside those that are there, and shows whichever of its runs are selected.
"""

import argparse
from typing import Any

from torchtune_agent.errors import UserError
from torchtune_agent.metrics.charts import CLASS_METRICS, RUN_METRICS, Kind
from torchtune_agent.metrics.colours import CLASSES
from torchtune_agent.metrics.names import NameStyle, metric_name

_STEP = "global_step"
_SECTIONS = {"val": "Token classes, validation", "train": "Token classes, training"}


def workspace(project: str, entity: str, style: NameStyle = "flat") -> Any:
    """The view, not yet saved: a section for each split with a panel for each metric, and one for the run."""
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError(
            "wandb-workspace: needs the package wandb-workspaces. pip install 'torchtune-agent[wandb-workspace]'"
        ) from error
    sections = [
        ws.Section(
            name=title,
            is_open=split == "val",
            panels=[
                _panel(kind, [metric_name(split, group, metric, style) for group in CLASSES])
                for metric, kind in CLASS_METRICS.items()
            ],
        )
        for split, title in _SECTIONS.items()
    ]
    losses = {"loss": ["loss", metric_name("val", "overall", "loss", style)]}
    run = [_panel(kind, losses.get(metric, [metric])) for metric, kind in RUN_METRICS.items()]
    sections.append(ws.Section(name="Run", is_open=True, panels=run))
    return ws.Workspace(name="Token classes", entity=entity, project=project, sections=sections)


def _panel(kind: Kind, names: list[str]) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=kind.title, x=_STEP, y=list(names), title_y=kind.unit or None, log_y=kind.log)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m torchtune_agent wandb-workspace", description="Save a view of the token classes in a project."
    )
    parser.add_argument("--project", required=True, help="metric_logger.project of your runs")
    parser.add_argument("--entity", help="user or team; yours where it is left out")
    parser.add_argument("--metric-names", choices=("flat", "slash"), default="flat", help="as in the runs' config")
    options = parser.parse_args(arguments)
    from wandb import Api
    from wandb.errors import Error

    try:
        view = workspace(options.project, options.entity or str(Api().default_entity), options.metric_names)
        view.save()
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    except Error as error:
        parser.exit(1, f"error: WandB says: {error} A view needs a login (`wandb login`) and a project that exists.\n")
    print(view.url)
    return 0
