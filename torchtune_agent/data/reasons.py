"""Why a record is not trained on: a fixed set of codes, so that counts can be compared between files and runs."""

from typing import Literal, get_args

ReasonCode = Literal[
    "broken_json",
    "truncated_last_line",
    "invalid_utf8",
    "bom",
    "nul",
    "lone_surrogate",
    "too_deep",
    "too_long_line",
    "duplicate_key",
    "wrong_type",
    "unknown_format",
    "unsupported_content",
    "unknown_role",
    "bad_tool_call",
    "empty_turn",
    "orphan_tool_result",
    "missing_tool_result",
    "nothing_to_train",
    "too_long",
]

REASON_CODES: tuple[ReasonCode, ...] = get_args(ReasonCode)


class BadRecord(ValueError):
    """A record that cannot be trained on. `code` is what is counted; `detail` says where in the record and what."""

    def __init__(self, code: ReasonCode, detail: str) -> None:
        super().__init__(code, detail)
        self.code: ReasonCode = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"
