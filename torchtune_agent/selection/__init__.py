"""Learning more from less: which samples of a pool are worth training on."""

from torchtune_agent.selection.options import Options
from torchtune_agent.selection.pool import Pool
from torchtune_agent.selection.scoring import ScoringOptions, score
from torchtune_agent.selection.selecting import Selection, select
from torchtune_agent.selection.selector import CoresetSelector
from torchtune_agent.selection.strategies import STRATEGIES

__all__ = ["STRATEGIES", "CoresetSelector", "Options", "Pool", "ScoringOptions", "Selection", "score", "select"]
