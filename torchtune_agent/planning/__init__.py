"""What a run will need, before anyone pays for it: memory, steps, time."""

from torchtune_agent.planning.plan import print_plan

__all__ = ["print_plan"]
