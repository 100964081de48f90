"""Samples to batches: one shift for labels, classes and calls alike, padded or packed."""

import numpy as np
import pytest
import torch

from tests.reference import IGNORE_INDEX
from torchtune_agent.data import Collator, TokenClass

PAD = 99


def sample(seed: int, length: int, num_calls: int = 2) -> dict:
    """Random tokens below 90; about half of them trained."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 90, length)
    classes = rng.integers(0, 8, length).astype(np.uint8)
    classes[rng.random(length) < 0.4] = TokenClass.IGNORED
    calls = np.where(classes >= TokenClass.CALL_SYNTAX, rng.integers(0, num_calls, length), -1)
    return {
        "tokens": tokens,
        "labels": np.where(classes == TokenClass.IGNORED, IGNORE_INDEX, tokens),
        "token_class": classes,
        "call_index": calls,
    }


def expected_row(row: list[dict], width: int) -> list[tuple[int, int, int, int, int, int]]:
    """Per position: token, label, class, number of the sample in the row, call in that sample, position."""
    cells = []
    for number, one in enumerate(row):
        size = len(one["tokens"])
        for t in range(size):
            following = t + 1 < size
            cells.append(
                (
                    int(one["tokens"][t]),
                    int(one["labels"][t + 1]) if following else IGNORE_INDEX,
                    int(one["token_class"][t + 1]) if following else 0,
                    number,
                    int(one["call_index"][t + 1]) if following else -1,
                    t,
                )
            )
    return cells + [(PAD, IGNORE_INDEX, 0, -1, -1, 0)] * (width - len(cells))


ROWS = [[sample(0, 7)], [sample(1, 12)], [sample(2, 1)]]
PACKS = [[sample(3, 7), sample(4, 5, num_calls=3), sample(5, 4)], [sample(6, 16)], [sample(7, 2)]]


@pytest.mark.parametrize(("rows", "pack_to"), [(ROWS, None), (PACKS, 16), (PACKS, 20)])
def test_every_position_says_what_it_predicts(rows, pack_to):
    batch = Collator(PAD, pack_to)(rows)
    width = pack_to or 12
    assert batch.tokens.shape == batch.labels.shape == batch.token_class.shape == (3, width)
    seen: dict[int, tuple[int, int, int]] = {}
    for r, row in enumerate(rows):
        for t, (token, label, kind, number, call, _) in enumerate(expected_row(row, width)):
            assert (int(batch.tokens[r, t]), int(batch.labels[r, t])) == (token, label)
            assert int(batch.token_class[r, t]) == kind
            got = int(batch.call_index[r, t])
            assert (got < 0) == (call < 0)
            if call >= 0:  # calls of different samples never share a number
                assert seen.setdefault(got, (r, number, call)) == (r, number, call)


@pytest.mark.parametrize(("rows", "pack_to"), [(ROWS, None), (PACKS, 16), ([], None), ([], 16)])
def test_counts_and_indices_are_those_of_the_labels(rows, pack_to):
    batch = Collator(PAD, pack_to)(rows)
    flat = batch.labels.flatten()
    assert batch.supervised.tolist() == [i for i, label in enumerate(flat.tolist()) if label != IGNORE_INDEX]
    assert batch.num_supervised == len(batch.supervised)
    assert batch.num_tokens == sum(len(one["tokens"]) for row in rows for one in row)
    assert batch.num_samples == sum(len(row) for row in rows)


def test_the_last_token_of_a_packed_conversation_predicts_nothing():
    batch = Collator(PAD, 16)(PACKS)
    for r, row in enumerate(PACKS):
        for end in np.cumsum([len(one["tokens"]) for one in row]):
            assert int(batch.labels[r, end - 1]) == IGNORE_INDEX


@pytest.mark.parametrize("pack_to", [16, 20])
def test_packed_positions_and_lengths_tell_conversations_apart(pack_to):
    batch = Collator(PAD, pack_to)(PACKS)
    assert batch.input_pos is not None and batch.seq_lens is not None
    for r, row in enumerate(PACKS):
        lengths = [len(one["tokens"]) for one in row]
        assert batch.seq_lens[r].tolist()[: len(row)] == lengths
        assert int(batch.seq_lens[r].sum()) == pack_to
        assert batch.input_pos[r].tolist() == [cell[5] for cell in expected_row(row, pack_to)]


def test_padded_batches_have_no_positions():
    batch = Collator(PAD)(ROWS)
    assert batch.input_pos is None and batch.seq_lens is None


@pytest.mark.parametrize("pack_to", [None, 16])
def test_no_rows_make_a_batch_that_trains_nothing(pack_to):
    batch = Collator(PAD, pack_to)([])
    assert batch.num_supervised == batch.num_tokens == batch.num_samples == 0
    assert set(batch.tokens.flatten().tolist()) == {PAD}
    assert set(batch.labels.flatten().tolist()) == {IGNORE_INDEX}
    assert batch.tokens.shape == (1, pack_to or 1)


def test_samples_without_classes_are_reasoning_but_for_special_tokens():
    plain = {
        "tokens": [5, 6, 7, 8, 2],
        "labels": [IGNORE_INDEX, IGNORE_INDEX, 7, 8, 2],
        "mask": [True] * 2 + [False] * 3,
    }
    batch = Collator(PAD, special_ids=frozenset({2}))([[plain]])
    assert batch.labels[0].tolist() == [IGNORE_INDEX, 7, 8, 2, IGNORE_INDEX]
    assert batch.token_class[0].tolist() == [0, TokenClass.REASONING, TokenClass.REASONING, TokenClass.SPECIAL, 0]
    assert set(batch.call_index.flatten().tolist()) == {-1}


def test_moving_a_batch_keeps_everything():
    batch = Collator(PAD, 16)(PACKS)
    moved = batch.to(torch.device("cpu"))
    for name, value in vars(batch).items():
        same = getattr(moved, name)
        assert torch.equal(same, value) if isinstance(value, torch.Tensor) else same is value
