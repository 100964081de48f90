"""What a run will need, before anyone pays for it: memory, steps, time."""

from torchtune_agent.planning.plan import plan_run

__all__ = ["plan_run"]
