"""Learns phase after phase without forgetting: replay, elastic weights, and the forgetting matrix at the end.

tune run --nproc_per_node 2 agent_replay_distributed --config tiny/agent_replay
tune run --nproc_per_node 2 agent_replay_distributed --config tiny/agent_replay continual.strategy=finetune
"""

import sys
from functools import partial

from omegaconf import DictConfig
from torchtune import config

from torchtune_agent.config import instantiate
from torchtune_agent.continual.run import Phases, Stream, take_stream
from torchtune_agent.distributed import process_group
from torchtune_agent.errors import UserError
from torchtune_agent.training import FullParameters, Parts, Run, check_model, run_recipe, sft_data, sft_objective
from torchtune_agent.training.run import say_mistake


def build(run: Run, stream: Stream) -> Parts:
    """The three seams: phases mixed with replayed samples, a loss that may hold on to weights, all parameters."""
    parameters = FullParameters()
    model = parameters.build(run.cfg, run.settings)
    tokenizer = instantiate(run.cfg.tokenizer, "tokenizer")
    check_model(run, tokenizer, model)
    data = sft_data(run, tokenizer, model)
    phases = Phases(run, stream, data, model, sft_objective(run))
    return Parts(phases.source, phases.validation, phases.objective, parameters, model, data.has_token_classes)


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Train with the config given by `--config` and any `key=value` overrides."""
    try:
        stream = take_stream(cfg)
    except UserError as error:
        with process_group(str(cfg.get("device", "cuda"))) as (rank, _):
            if rank == 0:
                say_mistake(error)
        return 1
    return run_recipe("agent_replay_distributed", cfg, partial(build, stream=stream))


if __name__ == "__main__":
    sys.exit(recipe_main())
