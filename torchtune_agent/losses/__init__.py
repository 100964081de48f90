"""Objectives: what a step minimizes and measures."""

from torchtune_agent.losses.cross_entropy import CrossEntropy, LossOutput, Objective, token_logprobs

__all__ = ["CrossEntropy", "LossOutput", "Objective", "token_logprobs"]
