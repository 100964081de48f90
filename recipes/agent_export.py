"""A folder to load and serve, from any checkpoint of a run: whole weights, and adapters in peft's format.

tune run agent_export --config OUTPUT_DIR/logs/config.yaml
tune run agent_export --config OUTPUT_DIR/logs/config.yaml export.checkpoint=step_400 export.output_dir=/tmp/exported
tune run agent_export --config hf/agent_sft model_dir=FOLDER export.adapter=ADAPTER_FOLDER
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_agent.training.export import export
from torchtune_agent.training.run import run_alone


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Export from the run of the config given by `--config` and any `key=value` overrides."""
    return run_alone(cfg, export)


if __name__ == "__main__":
    sys.exit(recipe_main())
