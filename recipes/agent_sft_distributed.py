"""Supervised fine-tuning of an agent: reasoning and tool calls learned together, measured apart.

tune run --nproc_per_node 2 agent_sft_distributed --config tiny/agent_sft
tune run --nproc_per_node 8 agent_sft_distributed --config qwen2_5/7B_agent_sft dataset.data_files=my.jsonl
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_agent.config import instantiate
from torchtune_agent.training import Parts, Run, check_model, parameter_setup, run_recipe, sft_data, sft_objective


def build(run: Run) -> Parts:
    """The three seams: conversations, cross entropy, all weights or adapters."""
    parameters = parameter_setup(run.cfg)
    model = parameters.build(run.cfg, run.settings)
    tokenizer = instantiate(run.cfg.tokenizer, "tokenizer")
    check_model(run, tokenizer, model)
    data = sft_data(run, tokenizer, model)
    return Parts(data.train, data.validation, sft_objective(run), parameters, model, data.has_token_classes)


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Train with the config given by `--config` and any `key=value` overrides."""
    return run_recipe("agent_sft_distributed", cfg, build)


if __name__ == "__main__":
    sys.exit(recipe_main())
