"""What would be trained, to be looked at: counts, findings, and tokens one by one."""

from torchtune_agent.data.inspection.findings import CheckedData, Chosen, Finding, findings
from torchtune_agent.data.inspection.page import write_page
from torchtune_agent.data.inspection.parity import Parity, check_parity
from torchtune_agent.data.inspection.statistics import informative, statistics
from torchtune_agent.data.inspection.terminal import finding_line, has_colours, sample_lines, tables
from torchtune_agent.data.inspection.tokens import TaggedTokens

__all__ = [
    "CheckedData",
    "Chosen",
    "Finding",
    "Parity",
    "TaggedTokens",
    "check_parity",
    "finding_line",
    "findings",
    "has_colours",
    "informative",
    "sample_lines",
    "statistics",
    "tables",
    "write_page",
]
