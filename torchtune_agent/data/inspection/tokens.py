"""One sample as training sees it, whichever dataset it comes from."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtune_agent.data.collate import classes_of
from torchtune_agent.data.dataset import IGNORE_INDEX
from torchtune_agent.data.token_class import TokenClass


@dataclass(frozen=True)
class TaggedTokens:
    """One sample as training sees it; one entry per token, nothing shifted."""

    ids: np.ndarray
    is_target: np.ndarray  # bool: the token before this one is trained to predict it
    classes: np.ndarray
    calls: np.ndarray  # -1 outside calls
    weights: np.ndarray  # 0 where not a target

    @classmethod
    def of(cls, sample: Mapping[str, Any], special_ids: Collection[int]) -> "TaggedTokens":
        """A sample of any dataset, read as the collator reads it: `special_ids` end turns where it has no classes."""
        ids = np.asarray(sample["tokens"])
        is_target = np.asarray(sample["labels"]) != IGNORE_INDEX
        is_target[:1] = False  # nothing stands before the first token
        weights = np.asarray(sample["weights"]) if "weights" in sample else np.ones(len(ids), np.float32)
        return cls(
            ids=ids,
            is_target=is_target,
            classes=np.where(is_target, classes_of(sample, special_ids), TokenClass.IGNORED),
            calls=np.asarray(sample.get("call_index", np.full(len(ids), -1))),
            weights=np.where(is_target, weights, 0.0),
        )
