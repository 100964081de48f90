"""Nothing silent: every record read is trained on, or listed here with where it stood and why it was left out."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchtune_agent.data.reasons import BadRecord, ReasonCode
from torchtune_agent.errors import UserError
from torchtune_agent.screen import printable

_NUM_LISTED = 5  # records named on screen; all are counted, and all are in the file
_EXCERPT = 200
# Left out because the config asks for it, which says nothing about the quality of the data.
_NOT_BAD: tuple[ReasonCode, ...] = ("too_long", "nothing_to_train")


@dataclass(frozen=True)
class LeftOut:
    """A record that is not trained on."""

    where: str  # file:line
    reason: ReasonCode
    detail: str
    excerpt: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}: {self.detail}"


@dataclass
class DataReport:
    """What became of the records read."""

    num_read: int = 0
    num_trained: int = 0  # records with at least one sample
    num_samples: int = 0
    num_cut: int = 0  # samples cut to the length limit
    num_tokens: int = 0
    num_supervised: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    left_out: list[LeftOut] = field(default_factory=list)

    def leave_out(self, where: str, error: BadRecord, excerpt: str) -> None:
        self.left_out.append(
            LeftOut(where, error.code, printable(error.detail.rstrip(".")), printable(excerpt[:_EXCERPT]))
        )

    def __add__(self, other: "DataReport") -> "DataReport":
        total = DataReport()
        total.add(self)
        total.add(other)
        return total

    def add(self, other: "DataReport") -> None:
        """Count what `other` counts as well."""
        for name in self.__dataclass_fields__:
            total = getattr(self, name)
            total += getattr(other, name)
            setattr(self, name, total)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "formats": dict(self.formats), "left_out": [asdict(item) for item in self.left_out]}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "DataReport":
        left_out = [LeftOut(**item) for item in written["left_out"]]
        return cls(**{**written, "formats": Counter(written["formats"]), "left_out": left_out})

    def check(self, max_bad_fraction: float) -> None:
        """Stop where more than this share of the records is bad, with the first of them."""
        bad = [item for item in self.left_out if item.reason not in _NOT_BAD]
        if len(bad) <= max_bad_fraction * self.num_read:
            return
        raise UserError(
            f"{bad[0]}. {len(bad):,} of {self.num_read:,} records cannot be trained on, more than "
            f"max_bad_fraction={max_bad_fraction:g} allows"
            + "".join(f"\n  {item}" for item in bad[1:_NUM_LISTED])
            + ("\nMend them, or raise dataset.max_bad_fraction to train without them.")
        )

    def lines(self) -> list[str]:
        """For the screen."""
        share = self.num_supervised / max(1, self.num_tokens)
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.most_common())
        more = f" in {self.num_samples:,} samples" if self.num_samples != self.num_trained else ""
        lines = [
            f"{self.num_trained:,} conversations{more} ({formats}), {self.num_tokens:,} tokens, "
            f"{self.num_supervised:,} of them trained ({share:.0%})"
        ]
        if self.num_cut:
            lines.append(f"{self.num_cut:,} samples cut to max_seq_len")
        reasons = Counter(item.reason for item in self.left_out)
        lines += [f"{count:,} of {self.num_read:,} records left out: {why}" for why, count in reasons.most_common()]
        return lines + [f"  {item}" for item in self.left_out[:_NUM_LISTED]]


def write_quarantine(left_out: Iterable[LeftOut], path: Path) -> None:
    """One JSON object per record that was left out."""
    rows = [json.dumps(asdict(item), ensure_ascii=False) for item in left_out]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
