"""How to select: every option, what it may be, and what a target size means."""

from dataclasses import dataclass

from torchtune_agent.errors import UserError, did_you_mean
from torchtune_agent.selection.pool import SCORE_ON
from torchtune_agent.selection.strategies import DEFAULT, STRATEGIES


@dataclass(frozen=True)
class Options:
    """How to select.

    Args:
        strategy: a name of `STRATEGIES`.
        target_size: how many samples, or a share of the pool as "30%".
        loss_ratio: the share of `hybrid` that is picked by loss.
        score_on: the tokens whose loss counts: "overall", "tool_call", "arg_value", ...
        dedup_similarity: samples whose MinHash similarity reaches this are duplicates; None: not looked for.
        dedup_distance: samples whose embeddings (of length 1) are at most this far apart are; None: not looked for.
        loss_cap_quantile: samples whose loss is above this quantile of the pool are taken for label errors; None: none.
        min_per_tool, min_per_source: samples of every tool or source that are picked, or all where it has fewer.
        max_share_per_tool, max_share_per_source: of the target, that may be picked of any one.
        seed: of what is drawn.
    """

    strategy: str = DEFAULT
    target_size: int | str = 1000
    loss_ratio: float = 0.6
    score_on: str = "overall"
    dedup_similarity: float | None = None
    dedup_distance: float | None = None
    loss_cap_quantile: float | None = None
    min_per_tool: int = 0
    min_per_source: int = 0
    max_share_per_tool: float | None = None
    max_share_per_source: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UserError(f"strategy={self.strategy}: no such strategy. {did_you_mean(self.strategy, STRATEGIES)}")
        if self.score_on not in SCORE_ON:
            raise UserError(f"score_on={self.score_on}: no such tokens. {did_you_mean(self.score_on, SCORE_ON)}")
        shares = ("loss_ratio", "dedup_similarity", "loss_cap_quantile", "max_share_per_tool", "max_share_per_source")
        for name in shares:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name}={value}: must be between 0 and 1.")
        for name in ("min_per_tool", "min_per_source", "dedup_distance"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"{name}={value}: must be 0 or more.")
        target_number(self.target_size, None)


def target_number(target: int | str, pool_size: int | None) -> int:
    """`target` as a number of samples; without a pool's size it is only checked."""
    text = str(target).strip()
    share = text.endswith("%")
    try:
        value = float(text[:-1]) / 100 if share else int(text)
    except ValueError:
        raise UserError(f"target_size={target}: must be a number of samples or a share such as '30%'.") from None
    if share and not 0 < value <= 1:
        raise UserError(f"target_size={target}: must be above 0% and at most 100%.")
    if not share and value < 1:
        raise UserError(f"target_size={target}: must be at least 1.")
    if pool_size is None:
        return 0
    number = max(1, round(value * pool_size)) if share else int(value)
    if number > pool_size:
        raise UserError(
            f"target_size={target}: the pool has {pool_size:,} samples. Set target_size to at most that, or to a "
            "share such as '30%', or add data."
        )
    return number
