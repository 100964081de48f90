"""The stop-token audit: is the end of every trained turn trained? A model that never learns to end never stops.

A turn is a stretch of trained tokens through its end-of-turn. Where only a part of a turn is trained (its calls, its
reasoning), the stretches up to the next end-of-turn token are one turn.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from torchtune_agent.data.inspection.tokens import TaggedTokens
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.data.token_text import Vocabulary

_NUM_EXAMPLES = 20


@dataclass
class TurnEnds:
    """How trained turns end. `examples` are samples with a turn whose end is there and not trained."""

    trained: Counter[tuple[int, ...]] = field(default_factory=Counter)  # by the tokens of the end
    untrained: Counter[int] = field(default_factory=Counter)  # by the token that ends the turn
    num_open: int = 0  # turns with no end-of-turn token after them: cut, or the template writes none
    examples: list[int] = field(default_factory=list)

    @property
    def num_turns(self) -> int:
        return self.trained.total() + self.untrained.total() + self.num_open

    def add(self, other: "TurnEnds", sample: int) -> None:
        """Add the ends of one more sample."""
        self.trained += other.trained
        self.untrained += other.untrained
        self.num_open += other.num_open
        if other.untrained and len(self.examples) < _NUM_EXAMPLES:
            self.examples.append(sample)


def turn_ends(sample: TaggedTokens, vocabulary: Vocabulary, stop_ids: Collection[int]) -> TurnEnds:
    """The ends of one sample's trained turns. `stop_ids` are the tokens that the tokenizer says end a turn."""
    result = TurnEnds()
    ends = (sample.classes == TokenClass.SPECIAL) | np.isin(sample.ids, list(stop_ids))
    edges = np.flatnonzero(np.diff(sample.is_target * 2 + ends)) + 1
    is_open = False
    for start, stop in pairwise([0, *edges.tolist(), len(sample.ids)]):
        stretch = sample.ids[start:stop].tolist()
        if not ends[start]:
            # White space alone belongs to the end before it.
            is_open |= bool(sample.is_target[start]) and any(vocabulary.text_of(i).strip() for i in stretch)
        elif is_open:
            is_open = False
            if sample.is_target[start]:
                result.trained[tuple(stretch)] += 1
            else:
                result.untrained[stretch[0]] += 1
    result.num_open = int(is_open)
    return result
