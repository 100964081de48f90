"""Active learning: pick the records that are most worth an answer, write them out, read the answers back.

tune run --nproc_per_node 2 agent_active_distributed --config my.yaml active.pool=prompts.jsonl active.num_records=50
tune run agent_active_distributed --config my.yaml active.pool=prompts.jsonl active.answers=answered.jsonl

Any training config does; its checkpointer names the model that is unsure. What was picked is in
OUTPUT_DIR/active/round_N.jsonl, what was answered in OUTPUT_DIR/active/labelled.jsonl, to train on.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_agent.selection.active import active_round
from torchtune_agent.training import Parts, Run, run_recipe
from torchtune_agent.training.run import NothingToTrain


def build(run: Run) -> Parts:
    """Nothing is trained here."""
    active_round(run)
    raise NothingToTrain


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Pick and read with the config given by `--config` and any `key=value` overrides."""
    return run_recipe("agent_active_distributed", cfg, build, sections=("active", "coreset", "curriculum"))


if __name__ == "__main__":
    sys.exit(recipe_main())
