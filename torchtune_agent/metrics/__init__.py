"""From sums per token class to names, files, tables and pictures.

The names below load on first use: the report of a run can be made without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtune_agent.metrics.log import RunLog, read_rows
    from torchtune_agent.metrics.names import metric_name
    from torchtune_agent.metrics.table import COLUMNS, add_tokens, empty_table, token_statistics
    from torchtune_agent.metrics.tracker import DetailedMetricsTracker

_HOME = {
    "COLUMNS": "table",
    "DetailedMetricsTracker": "tracker",
    "RunLog": "log",
    "add_tokens": "table",
    "empty_table": "table",
    "metric_name": "names",
    "read_rows": "log",
    "token_statistics": "table",
}

__all__ = [
    "COLUMNS",
    "DetailedMetricsTracker",
    "RunLog",
    "add_tokens",
    "empty_table",
    "metric_name",
    "read_rows",
    "token_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'torchtune_agent.metrics' has no attribute {name!r}")
    return getattr(import_module(f"torchtune_agent.metrics.{_HOME[name]}"), name)
