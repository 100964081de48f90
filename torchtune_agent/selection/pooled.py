"""A data set as a pool, and a part of it as a data set: what stands between training data and a selection."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_agent.data.dataset import IGNORE_INDEX
from torchtune_agent.data.fingerprint import combine
from torchtune_agent.data.joined import JoinedDataset, SampleInfo
from torchtune_agent.data.token_text import vocabulary
from torchtune_agent.errors import UserError
from torchtune_agent.selection.embedding import token_embeddings
from torchtune_agent.selection.pool import Pool
from torchtune_agent.selection.scores import pool_from_ledger, read_pool, unique_ids


class Subset:
    """Some samples of a data set, in its order."""

    def __init__(self, dataset: JoinedDataset, rows: np.ndarray) -> None:
        self._dataset, self._rows = dataset, rows.tolist()
        self.lengths = None if dataset.lengths is None else dataset.lengths[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self._rows[index]]

    def info(self, index: int) -> SampleInfo:
        return self._dataset.info(self._rows[index])

    def fingerprint(self) -> str:
        return combine([self._dataset.fingerprint(), self._rows])


class TokenRows(Sequence[np.ndarray]):
    """The tokens of a data set's samples."""

    def __init__(self, dataset: JoinedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: Any) -> Any:
        if row >= len(self._dataset):
            raise IndexError(row)
        return np.asarray(self._dataset[row]["tokens"])


class Reader:
    """What a sample reads like, from a little before what is trained: what comes first is alike in most."""

    def __init__(self, dataset: JoinedDataset, tokenizer: Any) -> None:
        self._dataset, self._vocabulary = dataset, vocabulary(tokenizer)

    def __call__(self, row: int) -> str:
        sample = self._dataset[row]
        trained = np.flatnonzero(np.asarray(sample["labels"]) != IGNORE_INDEX)
        start = max(0, int(trained[0]) - 60) if len(trained) else 0
        tokens = np.asarray(sample["tokens"])[start : start + 400].tolist()
        return b"".join(map(self._vocabulary.text_of, tokens)).decode(errors="replace")


def whole_texts(dataset: JoinedDataset, tokenizer: Any) -> list[str]:
    text_of = vocabulary(tokenizer).text_of
    return [b"".join(map(text_of, tokens.tolist())).decode(errors="replace") for tokens in TokenRows(dataset)]


def ids_of(dataset: JoinedDataset) -> list[str]:
    return unique_ids([dataset.info(row).where for row in range(len(dataset))])


def lengths_of(dataset: JoinedDataset) -> np.ndarray:
    if dataset.lengths is not None:
        return dataset.lengths
    return np.array([len(dataset[row]["tokens"]) for row in range(len(dataset))])


def pool_of_data(dataset: JoinedDataset, scores: Path | None, key: str, *, embed: bool = False) -> Pool:
    """The pool of a data set with what `scores` (a file, or a ledger's folder) know of it; None: nothing.

    `key` is where the config names them; `embed`: where the scores have no embeddings, make them of tokens.
    """
    ids = ids_of(dataset)
    if scores is not None and not scores.is_dir():
        known = read_pool(scores, key)
        if list(known.ids) != ids:
            raise UserError(
                f"{key}={scores}: its samples are not those of dataset ({len(known):,} scored, {len(ids):,} in the "
                "data, or in another order). Use the data that was scored, or score it anew."
            )
        return known
    infos = [dataset.info(row) for row in range(len(dataset))]
    tools, sources = [info.tools for info in infos], [info.source for info in infos]
    if scores is not None:
        pool = pool_from_ledger(scores, ids, lengths_of(dataset), tools, sources, key=key)
    else:
        pool = Pool(ids, lengths_of(dataset), tools=tools, sources=sources)
    return pool.with_embeddings(token_embeddings(TokenRows(dataset))) if embed else pool
