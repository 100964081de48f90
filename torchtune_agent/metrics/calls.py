"""Whole calls: how many the model would have written exactly, given everything before each of their tokens."""

import torch

from torchtune_agent.data.collate import Batch
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.metrics.table import COLUMNS

# Of one call: its trained tokens, the sum of their losses, those that are not the most likely one; and of its name.
CALL_COLUMNS = ("tokens", "nll", "wrong", "name_tokens", "name_wrong")
CALL_SUMS = ("calls", "exact_calls", "names", "exact_names")
_NLL, _CORRECT = COLUMNS.index("nll"), COLUMNS.index("correct")


def call_table(tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
    """One row of CALL_COLUMNS for every call of the batch.

    Args:
        tokens: [supervised tokens, metrics.table.COLUMNS]
    """
    num_calls = batch.first_calls[-1]
    calls = batch.call_index.flatten()[batch.supervised].long()
    is_name = (batch.token_class.flatten()[batch.supervised] == TokenClass.CALL_NAME).double()
    one = torch.ones_like(is_name)
    wrong = (tokens[:, _CORRECT] != 1).double()  # NaN is no exact token
    rows = torch.stack([one, tokens[:, _NLL].double(), wrong, is_name, is_name * wrong], 1)
    table = rows.new_zeros(num_calls + 1, len(CALL_COLUMNS))  # the last row is for tokens outside of calls
    return table.index_add_(0, torch.where(calls < 0, num_calls, calls), rows)[:num_calls]


def call_sums(table: torch.Tensor) -> torch.Tensor:
    """CALL_SUMS of a call table. A call without trained tokens is none."""
    tokens, _, wrong, name_tokens, name_wrong = table.unbind(1)
    called, named = tokens > 0, name_tokens > 0
    return torch.stack([called, called & (wrong == 0), named, named & (name_wrong == 0)]).sum(1).double()
