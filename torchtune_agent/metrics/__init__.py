"""From sums per token class to names, files, tables and pictures."""

from torchtune_agent.metrics.log import RunLog, read_rows
from torchtune_agent.metrics.table import COLUMNS, add_tokens, empty_table, token_statistics
from torchtune_agent.metrics.tracker import DetailedMetricsTracker, metric_name

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
