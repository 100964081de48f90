"""What a training config will need, before anyone pays for it: memory of each GPU, steps, time, price. Loads no model.

tune run agent_plan --config qwen2_5/7B_agent_sft plan.gpu=H100 plan.num_gpus=8 dataset.data_files=my.jsonl
tune run agent_plan --config qwen2_5/7B_agent_sft plan.gpu=A10G plan.sequence=4096
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_agent.planning import print_plan
from torchtune_agent.training.run import run_alone


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Plan the config given by `--config` and any `key=value` overrides."""
    return run_alone(cfg, print_plan)


if __name__ == "__main__":
    sys.exit(recipe_main())
