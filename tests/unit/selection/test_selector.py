"""CoresetSelector with and without a model, and pools made of a training run's ledger."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from tests import selection_reference as naive
from torchtune_agent import CoresetSelector
from torchtune_agent.data import toolworld_tokenizer
from torchtune_agent.data.collate import Collator
from torchtune_agent.data.joined import SampleInfo
from torchtune_agent.data.token_class import GROUPS, TokenClass
from torchtune_agent.errors import UserError
from torchtune_agent.metrics.detail import Detail
from torchtune_agent.metrics.table import COLUMNS
from torchtune_agent.selection.embedding import sentence_embeddings
from torchtune_agent.selection.scores import pool_from_ledger, unique_ids
from torchtune_agent.toolworld import TOKENIZER_DIR, ToolWorld

NUM = 37


@pytest.fixture(scope="module")
def model() -> TransformerDecoder:
    torch.manual_seed(0)
    made = qwen2(
        vocab_size=67, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=16, intermediate_dim=24, max_seq_len=64
    )
    for name, parameter in made.named_parameters():
        if name.startswith("output"):
            parameter.data *= 5  # losses that differ
    return made.train()


def samples() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(NUM):
        size = int(rng.integers(4, 50))
        tokens, classes = rng.integers(0, 67, size), rng.integers(1, 8, size)
        made.append({"tokens": tokens, "labels": tokens, "token_class": classes})
    return made


def plain_losses(model: TransformerDecoder, own: list[dict[str, Any]]) -> np.ndarray:
    losses = []
    for sample in own:
        tokens = torch.from_numpy(sample["tokens"])
        with torch.no_grad():
            nll = functional.cross_entropy(model(tokens[None])[0, :-1], tokens[1:], reduction="none")
        losses.append(float(nll[torch.from_numpy(np.isin(sample["token_class"][1:], GROUPS["overall"]))].mean()))
    return np.array(losses)


def test_losses_are_the_models_and_the_highest_are_picked(model: TransformerDecoder) -> None:
    own = samples()
    selector = CoresetSelector(strategy="loss_topk", target_size=10, batch_size=4)
    losses = selector.compute_losses(own, model)
    expected = plain_losses(model, own)
    assert losses == pytest.approx(expected, rel=1e-5) and model.training
    picked = selector.select(own, model=model)
    assert [id(one) for one in picked] == [id(own[row]) for row in sorted(naive.top(expected, 10))]


@pytest.mark.parametrize("strategy", ["hybrid", "uncertainty", "facility_location", "ssis", "diversity", "random"])
def test_every_strategy_works_with_a_model(model: TransformerDecoder, strategy: Any) -> None:
    own = samples()
    found = CoresetSelector(strategy, "25%").selection(own, model)
    again = CoresetSelector(strategy, "25%").selection(own, model)
    assert len(set(found.rows.tolist())) == 9 and found.rows.tolist() == again.rows.tolist()


def test_diversity_needs_no_model_and_tells_subjects_apart() -> None:
    """Three subjects of ten samples behind one long prompt, of any length: three picks are one of each."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 900, 200)
    own = [
        {
            "tokens": (t := np.concatenate([prompt, rng.integers(1000 * s, 1000 * s + 20, rng.integers(20, 200))])),
            "labels": t,
        }
        for s in (1, 2, 3)
        for _ in range(10)
    ]
    selector = CoresetSelector("diversity", 3)
    assert {row // 10 for row in selector.selection(own).rows.tolist()} == {0, 1, 2}
    apart = selector.compute_diversity(own)
    assert apart.shape == (30, 30) and apart == pytest.approx(apart.T) and np.diag(apart).max() < 1e-3
    same = np.kron(np.eye(3), np.ones((10, 10))).astype(bool)
    assert apart[same].mean() < apart[~same].mean() - 0.15


def test_records_are_tokenized_and_copies_of_them_dropped() -> None:
    rows = ToolWorld(num_tools=20).conversations("train", 20)
    selector = CoresetSelector("random", "100%", tokenizer=toolworld_tokenizer(640), dedup_similarity=0.95)
    assert selector.select([*rows, *rows]) == rows
    with pytest.raises(UserError, match="tokenizer="):
        CoresetSelector("random", 1).select(rows)


def test_what_needs_a_model_says_so() -> None:
    with pytest.raises(UserError, match="needs a model for the loss"):
        CoresetSelector().select(samples())
    with pytest.raises(UserError, match="there are none"):
        CoresetSelector("random").select([])


def test_a_ledger_is_a_pool_of_the_newest_losses(tmp_path: Path) -> None:
    own = samples()
    infos = [SampleInfo(f"d.jsonl:{i // 2}", "web", ()) for i in range(NUM)]  # two samples of every record
    ids = unique_ids([info.where for info in infos])
    assert ids[:3] == ["d.jsonl:0", "d.jsonl:0#2", "d.jsonl:1"] and len(set(ids)) == NUM
    detail = Detail(ledger=tmp_path)
    for step in (3, 7):
        batch = Collator(0)([[sample] for sample in own])
        batch.info = lambda: infos
        tokens = torch.rand(batch.num_supervised, len(COLUMNS), generator=torch.Generator().manual_seed(step))
        detail.add(tokens, batch, step)
        detail.fetch()
        detail.write()
    nll = iter(tokens[:, COLUMNS.index("nll")].tolist())  # pyright: ignore[reportPossiblyUnbound]
    of_record: dict[str, list[tuple[int, float]]] = {}
    for sample, info in zip(own, infos, strict=True):
        for kind in sample["token_class"][1:]:
            of_record.setdefault(info.where, []).append((int(kind), next(nll)))
    found = pool_from_ledger(tmp_path, ids, np.arange(NUM))
    for row, info in enumerate(infos):
        for group, kinds in GROUPS.items():
            values = [value for kind, value in of_record[info.where] if kind in kinds]
            assert found.losses[group][row] == pytest.approx(np.mean(values) if values else np.nan, nan_ok=True)
    with pytest.raises(UserError, match="no loss of 'd.jsonl:99'"):
        pool_from_ledger(tmp_path, [*ids, "d.jsonl:99"], np.arange(NUM + 1))
    with pytest.raises(UserError, match="log_sample_losses=True"):
        pool_from_ledger(tmp_path / "none", ids, np.arange(NUM))
    assert TokenClass.IGNORED not in {kind for rows in of_record.values() for kind, _ in rows}


def test_a_sentence_encoder_says_what_is_alike(tmp_path: Path) -> None:
    """Where the extra is installed; of random weights, which see copies as copies all the same."""
    if find_spec("sentence_transformers") is None:
        with pytest.raises(UserError, match="pip install 'torchtune-agent\\[embeddings\\]'"):
            sentence_embeddings(["a"], str(tmp_path), "cpu")
        return
    with pytest.raises(UserError, match="cannot be loaded"):
        sentence_embeddings(["a"], str(tmp_path / "nothing"), "cpu")
    import transformers

    shutil.copytree(TOKENIZER_DIR, tmp_path / "model")
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    transformers.BertModel(transformers.BertConfig(vocab_size=2048, **sizes)).save_pretrained(tmp_path / "model")
    found = sentence_embeddings(["Add 2 and 3.", "What time is it?", "Add 2 and 3."], str(tmp_path / "model"), "cpu")
    assert found.shape == (3, 16) and found.dtype == np.float32 and np.allclose(np.linalg.norm(found, axis=1), 1)
    assert np.allclose(found[0], found[2], atol=1e-6) and not np.allclose(found[0], found[1], atol=1e-3)
