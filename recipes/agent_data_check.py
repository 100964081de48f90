"""Shows what a config would train on, without a model: counts, findings, and every token of some samples.

tune run agent_data_check --config tiny/agent_sft
tune run agent_data_check --config qwen2_5/7B_agent_sft dataset.data_files=my.jsonl check.sample=17 check.num_samples=3

It ends with a page to open in a browser, OUTPUT_DIR/data_check.html.
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_agent.training.data_check import check_data
from torchtune_agent.training.run import run_alone


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Check the data of the config given by `--config` and any `key=value` overrides."""
    return run_alone(cfg, check_data)


if __name__ == "__main__":
    sys.exit(recipe_main())
