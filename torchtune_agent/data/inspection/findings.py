"""What a check of the data comes to, in sentences, each with whether it is good news."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torchtune_agent.data.inspection.ends import TurnEnds
from torchtune_agent.data.inspection.parity import Parity
from torchtune_agent.data.inspection.statistics import Statistics
from torchtune_agent.data.inspection.tokens import TaggedTokens
from torchtune_agent.data.quarantine import DataReport
from torchtune_agent.data.token_text import Vocabulary
from torchtune_agent.screen import printable

Level = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Chosen:
    """A sample to look at, and why this one."""

    index: int
    why: str
    where: str  # of the record it was made of
    tokens: TaggedTokens


@dataclass(frozen=True)
class CheckedData:
    """Everything found out about the data under one key of a config."""

    key: str
    report: DataReport | None  # None where no dataset is ours
    has_token_classes: bool
    limits: tuple[int, ...]  # every max_seq_len in use
    stop_ids: frozenset[int]  # what the tokenizer says ends a turn
    statistics: Statistics
    parity: Parity
    datasets: dict[str, int]  # samples of each
    sources: Counter[str]  # samples of each
    samples: Sequence[Chosen]
    refusal: str | None  # why training would not start


@dataclass(frozen=True)
class Finding:
    level: Level
    text: str


def findings(data: CheckedData, vocabulary: Vocabulary) -> list[Finding]:
    """The good news and the bad, most important first."""
    found = [_records(data)] if data.report else []
    if not data.has_token_classes:
        found.append(Finding("note", "not every dataset tells its tokens' classes, so calls and reasoning are one"))
    if data.statistics.num_samples:
        found += [_lengths(data), *_ends(data, vocabulary)]
    return [*found, *_parity(data.parity)]


def _records(data: CheckedData) -> Finding:
    report = data.report
    assert report is not None
    if not report.left_out:
        return Finding("good", f"all {report.num_read:,} records are trained on")
    reasons = Counter(item.reason for item in report.left_out).most_common()
    text = f"{len(report.left_out):,} of {report.num_read:,} records are left out: "
    text += ", ".join(f"{count:,} {reason}" for reason, count in reasons)
    return Finding("bad" if data.refusal else "note", text + ("; training stops" if data.refusal else ""))


def _lengths(data: CheckedData) -> Finding:
    limit = " or ".join(f"{limit:,}" for limit in data.limits) or "unlimited"
    longest, total = int(data.statistics.lengths.max()), data.statistics.num_samples
    num_cut = data.report.num_cut if data.report else 0
    if num_cut:
        return Finding("note", f"cut at max_seq_len={limit}: {num_cut:,} of {total:,} samples ({num_cut / total:.1%})")
    return Finding("good", f"no sample is cut: the longest has {longest:,} tokens, max_seq_len is {limit}")


def _ends(data: CheckedData, vocabulary: Vocabulary) -> list[Finding]:
    ends, found = data.statistics.ends, []
    num_cut = data.report.num_cut if data.report else 0
    by_token, by_text = _trained_ends(ends, vocabulary)
    level = "good" if ends.trained.total() + min(ends.num_open, num_cut) == ends.num_turns and not by_text else "note"
    if ends.trained:
        said = ", ".join([*_named(by_token, vocabulary), *by_text])
        found.append(
            Finding(level, f"end of turn trained in {ends.trained.total():,} of {ends.num_turns:,} turns: {said}")
        )
    if ends.untrained:
        missed = ", ".join(_named(ends.untrained, vocabulary))
        text = f"end of turn not trained in {ends.untrained.total():,} of {ends.num_turns:,} turns: {missed}. "
        text += "The model does not learn to stop there. Look at class_weights.special and at what the dataset masks"
        found.append(Finding("bad", text))
    if ends.num_open > num_cut:
        text = f"no end of turn after {ends.num_open:,} of {ends.num_turns:,} trained turns. "
        found.append(Finding("bad", text + "The model does not learn to stop there. Look at the chat template"))
    elif ends.num_open:
        found.append(
            Finding("note", f"end of turn lost to max_seq_len in {ends.num_open:,} of {ends.num_turns:,} turns")
        )
    if by_text:
        text = f"turns end in plain text, not in a control token: {', '.join(by_text)}. "
        text += "Either the chat template is not this tokenizer's, or the server needs it as a stop string"
        found.append(Finding("bad", text))
    unknown = Counter({token: count for token, count in by_token.items() if token not in data.stop_ids})
    if unknown:
        stops = ", ".join(_named(Counter(dict.fromkeys(sorted(data.stop_ids), 1)), vocabulary))
        text = f"{', '.join(_named(unknown, vocabulary))} ends turns, but the tokenizer stops at {stops} only. "
        found.append(Finding("note", text + "Make sure that the server stops there too (generation_config.json)"))
    return found


def _trained_ends(ends: TurnEnds, vocabulary: Vocabulary) -> tuple[Counter[int], list[str]]:
    """The control tokens that end trained turns, and the most frequent texts where none does."""
    by_token: Counter[int] = Counter()
    by_text: Counter[str] = Counter()
    for tokens, count in ends.trained.items():
        control = next((token for token in tokens if token in vocabulary.special_ids), None)
        if control is not None:
            by_token[control] += count
        else:
            by_text[f"'{printable(vocabulary.spell(tokens)[0].decode('utf-8', 'replace'))}'"] += count
    return by_token, [text for text, _ in by_text.most_common(3)]


def _named(tokens: Counter[int], vocabulary: Vocabulary) -> list[str]:
    """Tokens as text with their ids, the most frequent first."""
    texts = ((vocabulary.text_of(token).decode("utf-8", "replace"), token) for token, _ in tokens.most_common())
    return [f"{printable(text)} (id {token})" for text, token in texts]


def _parity(parity: Parity) -> list[Finding]:
    if parity.not_checked:
        return [Finding("note", f"template not compared with transformers: {parity.not_checked}")]
    name = f"template parity with transformers {parity.version}"
    found = [Finding("good", f"{name}: {parity.num_equal:,} of {parity.num_compared:,} conversations, token for token")]
    if parity.num_on_purpose:
        text = f"{name}: {parity.num_on_purpose:,} conversations differ on purpose. They spell a control token, "
        found = [*found, Finding("note", text + "which is plain text here, and would be the real token there")]
    if parity.divergences:
        text = f"{name}: {len(parity.divergences):,} of {parity.num_compared:,} conversations differ. "
        found = [Finding("bad", text + "A server would show the model other tokens"), *found[1:]]
    return found
