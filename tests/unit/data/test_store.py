"""What goes into a token store comes out of it, from memory and from files."""

import numpy as np
import pytest

from torchtune_agent.data.encode import Encoded
from torchtune_agent.data.store import Part, TokenStore


def sample(rng: np.random.Generator, size: int) -> Encoded:
    """Runs of random lengths, as turns and calls make them, and single tokens."""

    def column(values, dtype):
        return rng.choice(values, size).repeat(rng.integers(1, 6, size))[:size].astype(dtype)

    return Encoded(
        rng.integers(0, 2**31 - 1, size, dtype=np.int32),
        column(range(8), np.uint8),
        column([-1, 0, 1, 70_000], np.int32),
        column([0.0, 1.0, 0.1, 2.5], np.float32),
        tools=rng.choice(["add", "é", "", "long_name"], rng.integers(0, 4)).tolist(),
        origin=rng.choice(["", "web"]).item(),
    )


NAMES: dict[str, int] = {}


@pytest.fixture
def samples() -> list[Encoded]:
    rng = np.random.default_rng(0)
    return [sample(rng, size) for size in [1, 2, 500, *rng.integers(1, 60, 40)]]


def parts_of(samples: list[Encoded]) -> list[Part]:
    numbers = list(range(100, 100 + len(samples)))
    return [
        Part.of(samples[:5], numbers[:5]).renamed(0, NAMES),
        Part.of([], []).renamed(0, NAMES),
        Part.of(samples[5:], numbers[5:]).renamed(3, NAMES),
    ]


@pytest.mark.parametrize("on_disk", [False, True])
def test_samples_come_back_as_they_were(tmp_path, samples, on_disk):
    if on_disk:
        TokenStore.write(tmp_path / "store", parts_of(samples), {"note": "é"})
        store = TokenStore.open(tmp_path / "store")
    else:
        store = TokenStore.in_memory(parts_of(samples), {"note": "é"})
    assert store is not None and len(store) == len(samples)
    assert store.summary == {"note": "é"}
    assert store.lengths.tolist() == [len(one.tokens) for one in samples]
    for i in np.random.default_rng(1).permutation(len(samples)).tolist():
        for name in ("tokens", "token_class", "call_index", "weights"):
            got, put = getattr(store[i], name), getattr(samples[i], name)
            assert got.dtype == put.dtype and np.array_equal(got, put), name
        names = list(NAMES)
        assert [names[call] for call in store.calls(i)] == samples[i].tools
        assert names[store.origin(i)] == samples[i].origin
        assert store.record_of(i) == (0 if i < 5 else 3, 100 + i)
    assert np.array_equal(store[-1].tokens, samples[-1].tokens)
    with pytest.raises(IndexError):
        store[len(samples)]


def test_a_sample_can_be_changed_without_changing_the_store(tmp_path, samples):
    TokenStore.write(tmp_path / "store", parts_of(samples), {})
    store = TokenStore.open(tmp_path / "store")
    assert store is not None
    before = store[7].tokens.copy()
    store[7].tokens[:] = 0
    assert np.array_equal(store[7].tokens, before)


def test_a_store_without_samples_can_be_opened(tmp_path):
    TokenStore.write(tmp_path / "store", [], {})
    store = TokenStore.open(tmp_path / "store")
    assert store is not None and len(store) == 0 and store.lengths.tolist() == []


@pytest.mark.parametrize("harm", ["cut", "longer", "missing", "no summary", "half a summary", "nothing"])
def test_a_damaged_store_is_none(tmp_path, samples, harm):
    folder = tmp_path / "store"
    TokenStore.write(folder, parts_of(samples), {})
    runs, summary = folder / "runs.bin", folder / "summary.json"
    match harm:
        case "cut":
            runs.write_bytes(runs.read_bytes()[:-1])
        case "longer":
            runs.write_bytes(runs.read_bytes() + b"x")
        case "missing":
            runs.unlink()
        case "no summary":
            summary.unlink()
        case "half a summary":
            summary.write_text(summary.read_text()[:10])
    assert (TokenStore.open(folder) is None) == (harm != "nothing")
