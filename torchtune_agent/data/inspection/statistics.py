"""Counts over tokenized samples: how long they are, which classes are trained, which tools are called."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from torchtune_agent.data.inspection.ends import TurnEnds, turn_ends
from torchtune_agent.data.inspection.tokens import TaggedTokens
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.data.token_text import Vocabulary

# What may share a token with the first or last letter of a call's name, in any call style.
_AROUND_NAMES = " \t\r\n=\"'`<>(){}[]:,|"
_NUM_BINS = 12


@dataclass(frozen=True)
class Statistics:
    """What a data set holds. Arrays have one entry per sample, or per TokenClass."""

    lengths: np.ndarray
    num_targets: np.ndarray
    num_calls: np.ndarray
    classes: np.ndarray  # tokens of every class; IGNORED counts those that are not targets
    weights: np.ndarray  # the sum of their weights in the loss
    tools: Counter[str]  # calls of every tool
    ends: TurnEnds

    @property
    def num_samples(self) -> int:
        return len(self.lengths)


def statistics(samples: Iterable[TaggedTokens], vocabulary: Vocabulary, stop_ids: Collection[int]) -> Statistics:
    """Count everything in one pass over the samples."""
    lengths, num_targets, num_calls = [], [], []
    classes = np.zeros(len(TokenClass), np.int64)
    weights = np.zeros(len(TokenClass), np.float64)
    tools: Counter[str] = Counter()
    ends = TurnEnds()
    for number, sample in enumerate(samples):
        names = call_names(sample, vocabulary)
        lengths.append(len(sample.ids))
        num_targets.append(int(sample.is_target.sum()))
        num_calls.append(len(names))
        classes += np.bincount(sample.classes, minlength=len(TokenClass))
        weights += np.bincount(sample.classes, sample.weights, minlength=len(TokenClass))
        tools.update(names.values())
        ends.add(turn_ends(sample, vocabulary, stop_ids), number)
    arrays = np.array([lengths, num_targets, num_calls], np.int64)
    return Statistics(arrays[0], arrays[1], arrays[2], classes, weights, tools, ends)


def call_names(sample: TaggedTokens, vocabulary: Vocabulary) -> dict[int, str]:
    """The tool that every call of a sample names, by the call's number; "" where no token of its name is trained."""
    names = dict.fromkeys(np.unique(sample.calls[sample.calls >= 0]).tolist(), b"")
    for i in np.flatnonzero(sample.classes == TokenClass.CALL_NAME):
        names[int(sample.calls[i])] += vocabulary.text_of(int(sample.ids[i]))
    return {call: name.decode("utf-8", "replace").strip(_AROUND_NAMES) for call, name in names.items()}


def tool_summary(counts: Statistics) -> str:
    return f"calls of {len(counts.tools):,} different tools: {counts.tools.total():,}"


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """The lengths people ask for, each that of a real sample."""
    shares = {"shortest": 0, "median": 50, "90 %": 90, "99 %": 99, "longest": 100}
    return {name: int(np.percentile(lengths, share, method="higher")) for name, share in shares.items()}


def length_histogram(lengths: np.ndarray) -> list[tuple[str, int]]:
    """About a dozen rows of (range of tokens, samples). A few very long samples share the last row."""
    low, high = int(lengths.min()), int(np.percentile(lengths, 99, method="higher"))
    step = _round_step((high - low + 1) / _NUM_BINS)
    edges = list(range(low // step * step, high + step + 1, step))
    counts = [int(((lengths >= a) & (lengths < b)).sum()) for a, b in pairwise(edges)]
    labels = [f"{a:,}" if step == 1 else f"{a:,} to {b - 1:,}" for a, b in pairwise(edges)]
    rows = list(zip(labels, counts, strict=True))
    beyond = int((lengths >= edges[-1]).sum())
    return [*rows, (f"{edges[-1]:,} and more", beyond)] if beyond else rows


def _round_step(step: float) -> int:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10 ** max(0, len(str(int(step))) - 1)
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)


def informative(counts: Statistics, num_samples: int, first: Sequence[int]) -> dict[int, str]:
    """Up to `num_samples` samples to look at, with why: the `first` ones, then extremes, then some of all."""
    total = counts.num_samples
    longest = np.argsort(-counts.lengths, kind="stable")
    most_calls = np.argsort(-counts.num_calls, kind="stable")
    share = max(1, num_samples // 8)
    spread = np.linspace(0, total - 1, num=min(total, num_samples)).astype(int)
    groups: list[tuple[str, Sequence[int]]] = [
        ("first" if 0 in first else "chosen", first),
        ("end of a turn not trained", counts.ends.examples[:share]),
        ("first", range(min(total, share))),
        ("most calls", [i for i in most_calls[:share].tolist() if counts.num_calls[i]]),
        ("longest", longest[:share].tolist()),
        ("shortest", longest[-1:].tolist()),
        ("in between", spread.tolist()),
    ]
    why: dict[int, str] = {}
    for reason, indices in groups:
        for i in indices:
            if len(why) < num_samples:
                why.setdefault(int(i), reason)
    return why
