"""Tokenized samples, flat: a few arrays with everything end to end, which cost no more than their bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchtune_agent.data.encode import Encoded

_COLUMNS = {"tokens": np.int32, "token_class": np.uint8, "call_index": np.int32, "weights": np.float32}


@dataclass(frozen=True)
class TokenStore:
    """Random access to tokenized samples."""

    columns: dict[str, np.ndarray]
    offsets: np.ndarray  # int64 [samples + 1]

    @classmethod
    def in_memory(cls, samples: Sequence[Encoded]) -> "TokenStore":
        columns = {
            name: np.concatenate([np.zeros(0, dtype), *(getattr(s, name) for s in samples)]).astype(dtype, copy=False)
            for name, dtype in _COLUMNS.items()
        }
        return cls(columns, np.cumsum([0, *(len(s.tokens) for s in samples)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Encoded:
        index = range(len(self))[index]
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        tokens, token_class, call_index, weights = (column[part] for column in self.columns.values())
        return Encoded(tokens, token_class, call_index, weights)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def largest_token(self) -> int:
        return int(self.columns["tokens"].max(initial=0))
