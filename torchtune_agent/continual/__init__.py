"""Learning new things without forgetting the old: replay, elastic weights, and what was forgotten."""

from torchtune_agent.continual.buffer import STRATEGIES, ReplayBuffer
from torchtune_agent.continual.learner import OnlineContinualLearner

__all__ = ["STRATEGIES", "OnlineContinualLearner", "ReplayBuffer"]
