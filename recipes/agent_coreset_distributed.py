"""Train on a part of the data that is worth it: score the pool with the model, select, train on what was picked.

tune run --nproc_per_node 2 agent_coreset_distributed --config tiny/agent_coreset
tune run --nproc_per_node 2 agent_coreset_distributed --config tiny/agent_coreset coreset.strategy=hybrid coreset.target_size=30%
tune run --nproc_per_node 2 agent_coreset_distributed --config tiny/agent_coreset coreset.only_select=True
"""  # noqa: E501

import sys
from functools import partial

from omegaconf import DictConfig
from torchtune import config

from torchtune_agent.config import instantiate
from torchtune_agent.selection.coreset import CoresetSettings, SelectionDone, coreset_loader
from torchtune_agent.training import FullParameters, Parts, Run, check_model, run_recipe, sft_data, sft_objective


def build(section: DictConfig | None, run: Run) -> Parts:
    """The three seams: what was selected of the conversations, cross entropy, all parameters."""
    settings = CoresetSettings.from_config(section)
    settings.options(0)  # refuses what cannot be, before anything is loaded
    parameters = FullParameters()
    model = parameters.build(run.cfg, run.settings)
    tokenizer = instantiate(run.cfg.tokenizer, "tokenizer")
    check_model(run, tokenizer, model)
    data = sft_data(run, tokenizer, model)
    train = coreset_loader(run, settings, data.train, tokenizer if data.has_token_classes else None)
    return Parts(train, data.validation, sft_objective(run), parameters, model, data.has_token_classes)


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Select and train with the config given by `--config` and any `key=value` overrides."""
    section = cfg.pop("coreset", None)
    try:
        return run_recipe("agent_coreset_distributed", cfg, partial(build, section))
    except SelectionDone:
        return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
