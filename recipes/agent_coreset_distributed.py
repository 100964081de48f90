"""Train on a part of the data that is worth it: score the pool with the model, select, train on what was picked.

tune run --nproc_per_node 2 agent_coreset_distributed --config tiny/agent_coreset
tune run --nproc_per_node 2 agent_coreset_distributed --config tiny/agent_coreset coreset.strategy=hybrid coreset.target_size=30%
tune run --nproc_per_node 2 agent_coreset_distributed --config tiny/agent_coreset coreset.only_select=True
tune run --nproc_per_node 2 agent_coreset_distributed --config tiny/agent_coreset ~coreset curriculum.by=loss
"""  # noqa: E501

import sys
from typing import Any

from omegaconf import DictConfig
from torchtune import config

from torchtune_agent.config import instantiate
from torchtune_agent.distributed import together
from torchtune_agent.selection.coreset import CoresetSettings, coreset_loader
from torchtune_agent.selection.curriculum import Curriculum
from torchtune_agent.selection.paced import paced
from torchtune_agent.training import Parts, Run, check_model, parameter_setup, run_recipe, sft_data, sft_objective
from torchtune_agent.training.sft import SFTData


def build(run: Run) -> Parts:
    """The three seams: what was selected of the conversations, in its order; cross entropy; all weights or adapters."""
    parameters = parameter_setup(run.cfg)
    model = parameters.build(run.cfg, run.settings)

    def prepared() -> tuple[CoresetSettings | None, Curriculum | None, Any, SFTData]:
        choice, order = settings_of(run.cfg)
        tokenizer = instantiate(run.cfg.tokenizer, "tokenizer")
        check_model(run, tokenizer, model)
        return choice, order, tokenizer, sft_data(run, tokenizer, model)

    choice, order, tokenizer, data = together(prepared)
    train: Any = data.train
    if choice is not None:
        train = coreset_loader(run, choice, train, tokenizer)
    if order is not None:
        train = paced(run, order, train, model)
    return Parts(train, data.validation, sft_objective(run), parameters, model, data.has_token_classes)


def settings_of(cfg: DictConfig) -> tuple[CoresetSettings | None, Curriculum | None]:
    """What is to be selected, and in which order it is to be trained. With an order alone, all is trained."""
    order = None if cfg.get("curriculum") is None else Curriculum.from_config(cfg.curriculum)
    if cfg.get("coreset") is None and order is not None:
        return None, order
    choice = CoresetSettings.from_config(cfg.get("coreset"))
    choice.options(0)  # refuses what cannot be, before anything is loaded
    return choice, order


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Select and train with the config given by `--config` and any `key=value` overrides."""
    return run_recipe("agent_coreset_distributed", cfg, build, sections=("coreset", "curriculum"))


if __name__ == "__main__":
    sys.exit(recipe_main())
