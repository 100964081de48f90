"""ReplayBuffer: some samples of a stream, chosen by a strategy, bounded in number and in bytes.

A strategy is a way to keep samples and a way to draw them (`STRATEGIES`). Every decision follows from the seed and the
stream's order, so every rank of a run that offers the samples of all ranks in the run's order has the same buffer.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtune_agent.continual.drawing import ByClassLoss, ByGroup, ByImportance, Drawing, Evenly
from torchtune_agent.continual.held import NUM_CLASSES, Arrival, Held, random_key
from torchtune_agent.continual.keeping import AboveMean, Keeping, Recent, Uniform
from torchtune_agent.continual.records import Records, decode, encode
from torchtune_agent.errors import UserError, did_you_mean

_FORMAT = 1
_LEAST_IMPORTANCE = 1e-6  # a sample that is held can be drawn
_DRAW = 1  # tells the generators of draws from others made of the same seed


@dataclass(frozen=True)
class Strategy:
    keeping: Callable[[Held, int, float], Keeping]  # of what is held, the seed and the threshold ratio
    drawing: Callable[[Held], Drawing]
    needs: str | None = None  # what must be offered with every sample


STRATEGIES: dict[str, Strategy] = {
    "reservoir": Strategy(lambda held, seed, _: Uniform(held, seed), Evenly),
    "recent": Strategy(lambda held, *_: Recent(held), Evenly),
    "prioritized": Strategy(lambda held, seed, _: Uniform(held, seed), ByImportance),
    "tool_balanced": Strategy(lambda held, seed, _: Uniform(held, seed, by_group=True), ByGroup, "tools"),
    "class_loss": Strategy(lambda held, seed, _: Uniform(held, seed), ByClassLoss, "class_shares"),
    "ssis": Strategy(lambda held, _, ratio: AboveMean(held, ratio), ByImportance, "importance"),
}


@dataclass(frozen=True)
class Replayed:
    """Samples that were drawn."""

    samples: list[Any]
    slots: np.ndarray  # int64 [n], for `set_importance`; true until something is offered
    weights: np.ndarray  # float64 [n]; all 1 but for drawing by importance
    ages: np.ndarray  # int64 [n]: samples of the stream since each was offered


class ReplayBuffer:
    """Holds samples: JSON values, or mappings of JSON values, numpy arrays and tensors.

    Args:
        num_samples: the most samples that are held.
        strategy: a name of `STRATEGIES`.
        max_bytes: the most bytes they take, None for no limit. Token data is compressed.
        spill_to: keep the samples in this file, mapped, instead of in memory. Each process needs its own. It may grow
            to a few times the bytes held.
        seed: of what is kept and drawn.
        threshold_ratio: of `ssis`, how a sample's importance must compare with the mean of the stream for it to enter.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        strategy: str = "reservoir",
        max_bytes: int | None = None,
        spill_to: str | Path | None = None,
        seed: int = 0,
        threshold_ratio: float = 1.0,
    ) -> None:
        if strategy not in STRATEGIES:
            raise UserError(
                f"selection_strategy={strategy}: no such strategy. {did_you_mean(str(strategy), STRATEGIES)}"
            )
        if num_samples < 1:
            raise UserError(f"buffer_size={num_samples}: must be at least 1.")
        if max_bytes is not None and max_bytes < 1:
            raise UserError(f"max_bytes={max_bytes}: must be at least 1, or null for no limit.")
        self.num_samples, self.max_bytes, self.strategy = num_samples, max_bytes, strategy
        self._spill_to = None if spill_to is None else Path(spill_to)
        self._seed, self._threshold_ratio = seed, threshold_ratio
        self.num_offered = 0
        self.clear()

    def clear(self) -> None:
        """Give up all samples. The stream goes on: numbers and what was seen of it stay."""
        self._strategy = STRATEGIES[self.strategy]
        self._held = Held()
        self._keeping = self._strategy.keeping(self._held, self._seed, self._threshold_ratio)
        self._drawing = self._strategy.drawing(self._held)
        self._records = Records(self._spill_to)
        self._seen: Counter[str] = Counter()
        self._largest_importance = 0.0

    def __len__(self) -> int:
        return self._held.count

    @property
    def needs(self) -> str | None:
        """What `offer` must be given with every sample."""
        return self._strategy.needs

    @property
    def num_bytes(self) -> int:
        return self._records.held

    def offer(
        self,
        sample: Any,
        *,
        importance: float | None = None,
        tools: Sequence[str] | None = None,
        class_shares: np.ndarray | None = None,
    ) -> bool:
        """Show the buffer the stream's next sample; whether it is held now.

        Args:
            sample: or a function without arguments that makes it, called only where the sample is wanted.
            importance: 0 or more; without it, the largest so far, as nothing is known of the sample yet.
            tools: those it calls, perhaps none; it counts for the one that was seen least so far.
            class_shares: [token classes], the share of its trained tokens that is of each.
        """
        given = {"importance": importance, "tools": tools, "class_shares": class_shares}
        if self.needs is not None and given[self.needs] is None:
            raise UserError(
                f"selection_strategy={self.strategy}: every sample must be offered with its '{self.needs}'."
            )
        number, self.num_offered = self.num_offered, self.num_offered + 1
        arrival = Arrival(
            number, random_key(self._seed, number), self._importance(importance), self._group(tools or ()), class_shares
        )
        if not self._keeping.wants(arrival):
            return False
        return self._keep(arrival, encode(sample() if callable(sample) else sample))

    def _importance(self, given: float | None) -> float:
        if given is None:
            return self._largest_importance or 1.0
        if not (math.isfinite(given) and given >= 0):
            raise UserError(f"importance={given}: must be a finite number of 0 or more.")
        importance = max(float(given), _LEAST_IMPORTANCE)
        self._largest_importance = max(self._largest_importance, importance)
        return importance

    def _group(self, tools: Sequence[str]) -> str:
        """The tool that was seen least before this sample, the first by name of equals."""
        group = min(tools, key=lambda tool: (self._seen[tool], tool), default="")
        self._seen.update(set(tools))
        return group

    def _keep(self, arrival: Arrival, record: bytes) -> bool:
        if self.max_bytes is not None and len(record) > self.max_bytes:
            raise UserError(
                f"max_bytes={self.max_bytes}: sample {arrival.number} alone takes {len(record)} bytes. Allow more."
            )
        slot = self._held.add(arrival)
        self._keeping.added(slot)
        added, removed = {slot}, []
        self._records.put(slot, record)
        while self._is_too_full():
            gone = self._keeping.evict()
            if gone in added:
                added.remove(gone)
            else:
                removed.append(gone)
            self._records.remove(gone)
            self._held.remove(gone)
        self._drawing.removed(np.array(removed, np.int64))
        self._drawing.added(np.array(sorted(added), np.int64))
        return bool(added)

    def _is_too_full(self) -> bool:
        return len(self) > self.num_samples or (self.max_bytes is not None and self.num_bytes > self.max_bytes)

    def draw(self, n: int, *, key: Sequence[int], progress: float = 0.0) -> Replayed:
        """`n` samples, fewer where fewer are held. The same `key` draws the same from the same buffer.

        `progress` is the share of the run that is done, from 0 to 1; the weights' exponent follows it.
        """
        n = min(n, len(self))
        if n == 0:
            return Replayed([], np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
        rng = np.random.default_rng([self._seed, _DRAW, *key])
        slots, weights = self._drawing.draw(rng, n, progress)
        samples = [decode(self._records.get(slot)) for slot in slots.tolist()]
        return Replayed(samples, slots, weights, self.num_offered - self._held.numbers[slots])

    def set_importance(
        self, slots: np.ndarray, importance: Sequence[float] | np.ndarray, numbers: np.ndarray | None = None
    ) -> None:
        """Give samples that were drawn the importance they have now.

        `numbers` [n], where samples came in between: of the samples that were drawn; those that are gone are left out.
        """
        importance = np.asarray(importance, float)
        if numbers is not None:
            still = self._held.numbers[slots] == numbers
            slots, importance = slots[still], importance[still]
        for slot, value in zip(slots.tolist(), importance.tolist(), strict=True):
            self._held.importance[slot] = self._importance(float(value))
            self._keeping.changed(slot)
        self._drawing.added(np.unique(slots))

    @property
    def class_losses(self) -> np.ndarray:
        """Those that `class_loss` draws by [token classes]."""
        assert isinstance(self._drawing, ByClassLoss)
        return self._drawing.losses

    def set_class_losses(self, losses: np.ndarray) -> None:
        """The live loss of every token class [token classes], for `class_loss`."""
        if not isinstance(self._drawing, ByClassLoss):
            raise UserError(f"selection_strategy={self.strategy}: does not draw by class losses. Use class_loss.")
        losses = np.asarray(losses, float)
        if losses.shape != (NUM_CLASSES,) or not np.isfinite(losses).all() or (losses < 0).any():
            raise UserError(f"class losses {losses.tolist()}: must be {NUM_CLASSES} finite numbers of 0 or more.")
        self._drawing.losses = losses

    def samples(self) -> list[Any]:
        """All that are held, in the order they were offered."""
        slots = self._held.slots
        return [decode(self._records.get(s)) for s in slots[np.argsort(self._held.numbers[slots])].tolist()]

    def replace_samples(self, make: Callable[[Any], Any]) -> None:
        """Put `make(sample)` in the place of every sample. Where all take more than `max_bytes`, some go."""
        for slot in self._held.slots.tolist():
            record = encode(make(decode(self._records.get(slot))))
            self._records.remove(slot)
            self._records.put(slot, record)
        self._shrink()

    def state_dict(self) -> dict[str, Any]:
        """Everything the buffer is, as one JSON text and tensors: `load_state_dict` goes on to the last bit."""
        facts = {
            "format": _FORMAT,
            "strategy": self.strategy,
            "seed": self._seed,
            "num_offered": self.num_offered,
            "groups": self._held.groups,
            "seen": dict(self._seen),
            "largest_importance": self._largest_importance,
            "keeping": self._keeping.state(),
        }
        parts = {
            "held": self._held.state(),
            "drawing": self._drawing.state(),
            "records": self._records.state(self._held.num_slots),
        }
        tensors = {
            f"{part}.{name}": torch.from_numpy(np.ascontiguousarray(array))
            for part, arrays in parts.items()
            for name, array in arrays.items()
        }
        return {"facts": json.dumps(facts), "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be as the buffer whose state it is was. It may have been larger than this one may be: then samples go by the
        strategy's own rule."""
        facts = json.loads(state["facts"])
        for name, own in (("format", _FORMAT), ("strategy", self.strategy), ("seed", self._seed)):
            if facts[name] != own:
                raise UserError(
                    f"replay: the buffer was saved with {name}={facts[name]}, and this one has {name}={own}. "
                    f"Set {name}={facts[name]} to go on with it."
                )
        arrays: dict[str, dict[str, np.ndarray]] = {"held": {}, "drawing": {}, "records": {}}
        for name, tensor in state["tensors"].items():
            part, _, column = name.partition(".")
            arrays[part][column] = tensor.numpy()
        self.clear()
        self.num_offered = int(facts["num_offered"])
        self._held.load(arrays["held"], facts["groups"])
        self._keeping.load(facts["keeping"])
        self._drawing.load(arrays["drawing"])
        self._records.load(arrays["records"])
        self._seen = Counter(facts["seen"])
        self._largest_importance = float(facts["largest_importance"])
        self._shrink()

    def _shrink(self) -> None:
        while self._is_too_full():
            gone = self._keeping.evict()
            self._drawing.removed(np.array([gone]))
            self._records.remove(gone)
            self._held.remove(gone)
