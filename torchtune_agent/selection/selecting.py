"""A selection from beginning to end: guard rails, strategy, floors and quotas, and a word on every sample.

Duplicates and suspected label errors leave the pool first. Then every tool and source that has a floor gets it, by the
strategy's own choice within it, the rarest first; then the strategy fills the rest, and where it takes more of a group
than its quota allows, its first picks stay and it chooses again without the group.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from torchtune_agent.errors import UserError
from torchtune_agent.selection.duplicates import near_duplicates
from torchtune_agent.selection.filling import Filling
from torchtune_agent.selection.options import Options, target_number
from torchtune_agent.selection.pool import Pool
from torchtune_agent.selection.strategies import Features, Picks


@dataclass
class Selection:
    """What was picked, and what became of the rest. Rows are those of the pool."""

    pool: Pool
    options: Options
    picks: Picks
    duplicates: dict[int, int] = field(default_factory=dict)  # row: the row that is kept for it
    capped: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> np.ndarray:
        """What was picked, in the order of the pool."""
        return np.sort(self.picks.rows)

    @property
    def chosen(self) -> np.ndarray:
        mask = np.zeros(len(self.pool), bool)
        mask[self.picks.rows] = True
        return mask

    def reason(self, place: int) -> str:
        """Why the pick at `place` was picked, in words."""
        score, why = self.picks.scores[place], self.picks.reasons[place]
        return f"{why} {score:.4g}" if math.isfinite(score) else why

    def length_correlation(self) -> float:
        """Spearman's: of being picked with the number of tokens. 0: length did not matter."""
        lengths, chosen = ranks(self.pool.num_tokens), self.chosen.astype(np.float64)
        if lengths.std() == 0 or chosen.std() == 0:
            return 0.0
        return float(np.corrcoef(lengths, chosen)[0, 1])

    def to_json(self) -> dict[str, Any]:
        ids, lengths = self.pool.ids, self.pool.num_tokens
        scores = [float(s) if math.isfinite(s) else None for s in self.picks.scores]
        return {
            "options": asdict(self.options),
            "pool": len(self.pool),
            "selected": [
                {"id": ids[row], "score": score, "reason": self.reason(i)}
                for i, (row, score) in enumerate(zip(self.picks.rows.tolist(), scores, strict=True))
            ],
            "duplicates": [{"id": ids[row], "of": ids[kept]} for row, kept in sorted(self.duplicates.items())],
            "capped": [ids[row] for row in self.capped.tolist()],
            "notes": self.notes,
            "length": {
                "correlation": self.length_correlation(),
                "mean_of_pool": float(lengths.mean()),
                "mean_of_selected": float(lengths[self.picks.rows].mean()),
            },
        }


def select(
    pool: Pool,
    options: Options,
    *,
    signatures: np.ndarray | None = None,
    device: str = "cpu",
) -> Selection:
    """Select from `pool`. `signatures` are those of `duplicates.signatures`, for `dedup_similarity`."""
    number = target_number(options.target_size, len(pool))
    features = Features(pool, options.score_on, options.loss_ratio, options.seed, device)
    result = Selection(pool, options, Picks.none())
    candidates = _guarded(features, options, signatures, result)
    if len(candidates) < number:
        if not str(options.target_size).strip().endswith("%"):
            raise UserError(
                f"target_size={options.target_size}: {len(candidates):,} samples are left of {len(pool):,} after "
                f"{len(result.duplicates):,} duplicates and {len(result.capped):,} suspected label errors. Lower "
                "target_size, or loosen dedup_similarity, dedup_distance or loss_cap_quantile."
            )
        result.notes.append(
            f"all {len(candidates):,} samples that duplicates and label errors left are fewer than "
            f"{options.target_size} of the pool ({number:,})"
        )
        number = len(candidates)
    result.picks = Filling(features, options, candidates, number).run()
    if len(result.picks.rows) < number:
        result.notes.append(f"quotas allow only {len(result.picks.rows):,} of {number:,} samples")
    return result


def _guarded(features: Features, options: Options, signatures: np.ndarray | None, result: Selection) -> np.ndarray:
    """The rows that are neither duplicates nor taken for label errors, ascending."""
    pool = features.pool
    if options.dedup_similarity is not None:
        if signatures is None:
            raise UserError(
                f"dedup_similarity={options.dedup_similarity}: needs the tokens of the samples, and there are only "
                "scores. Use dedup_distance, which compares embeddings, or select from the data itself."
            )
        result.duplicates |= near_duplicates(signatures, options.dedup_similarity, seed=options.seed)
    if options.dedup_distance is not None:
        rest = np.array([row for row in range(len(pool)) if row not in result.duplicates], np.int64)
        found = near_duplicates(features.tensor(rest).cpu().numpy(), options.dedup_distance, seed=options.seed)
        result.duplicates |= {int(rest[row]): int(rest[kept]) for row, kept in found.items()}
    out = np.zeros(len(pool), bool)
    out[list(result.duplicates)] = True
    if options.loss_cap_quantile is not None:
        loss = pool.loss(options.score_on)
        above = ~out & (np.nan_to_num(loss, nan=-np.inf) > np.nanquantile(loss[~out], options.loss_cap_quantile))
        result.capped = np.flatnonzero(above)
        out |= above
    return np.flatnonzero(~out)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equals sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]
