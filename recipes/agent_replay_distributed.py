"""Learns phase after phase, or records as they arrive, without forgetting: replay, elastic weights, what was forgotten.

tune run --nproc_per_node 2 agent_replay_distributed --config tiny/agent_replay
tune run --nproc_per_node 2 agent_replay_distributed --config tiny/agent_replay continual.strategy=finetune
tune run agent_replay_distributed --config tiny/agent_stream arrivals.path=inbox/
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_agent.config import instantiate
from torchtune_agent.continual.config import SECTIONS, take_arrivals, take_stream
from torchtune_agent.continual.live_run import Live
from torchtune_agent.continual.run import Phases
from torchtune_agent.training import Parts, Run, check_model, parameter_setup, run_recipe, sft_data, sft_objective
from torchtune_agent.training.sft import validation_data


def prepare(cfg: DictConfig) -> None:
    """Check what only this recipe reads."""
    (take_arrivals if "arrivals" in cfg else take_stream)(cfg)


def build(run: Run) -> Parts:
    """The three seams: samples and replayed ones, a loss that may hold on to weights, all weights or adapters."""
    parameters = parameter_setup(run.cfg)
    model = parameters.build(run.cfg, run.settings)
    tokenizer = instantiate(run.cfg.tokenizer, "tokenizer")
    check_model(run, tokenizer, model)
    if "arrivals" in run.cfg:
        live = Live(run, *take_arrivals(run.cfg), tokenizer, model, sft_objective(run))
        measured = run.cfg.get("dataset_val") is not None
        validation = validation_data(run, tokenizer, model)[0] if measured else None
        return Parts(live.source, validation, live.objective, parameters, model)
    data = sft_data(run, tokenizer, model)
    phases = Phases(run, take_stream(run.cfg), data, model, sft_objective(run))
    return Parts(phases.source, phases.validation, phases.objective, parameters, model, data.has_token_classes)


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Train with the config given by `--config` and any `key=value` overrides."""
    return run_recipe("agent_replay_distributed", cfg, build, SECTIONS, prepare)


if __name__ == "__main__":
    sys.exit(recipe_main())
