"""Objectives: what a step minimizes and measures."""

from torchtune_agent.losses.cross_entropy import CrossEntropy, LossOutput, Objective

__all__ = ["CrossEntropy", "LossOutput", "Objective"]
