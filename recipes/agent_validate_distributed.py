"""Loss and metrics of every token class of a model on held-out data, as in a training run's validation; trains nothing.

It takes a training config, with `dataset_val`, and writes to OUTPUT_DIR/validation:

tune run agent_validate_distributed --config hf/agent_sft model_dir=outputs/hf_agent_sft/model/epoch_0 \\
  dataset_val._component_=torchtune_agent.data.AgentSFTDataset dataset_val.data_files=held_out.jsonl
"""

import sys

from omegaconf import DictConfig
from torchtune import config

from torchtune_agent.config import instantiate
from torchtune_agent.training import (
    Parts,
    Run,
    check_model,
    parameter_setup,
    run_recipe,
    sft_objective,
    validation_data,
)


def build(run: Run) -> Parts:
    """The three seams, with nothing but the validation's conversations."""
    parameters = parameter_setup(run.cfg)
    model = parameters.build(run.cfg, run.settings)
    tokenizer = instantiate(run.cfg.tokenizer, "tokenizer")
    check_model(run, tokenizer, model)
    data, classified = validation_data(run, tokenizer, model)
    return Parts(data, data, sft_objective(run), parameters, model, classified, only_validates=True)


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Measure with the config given by `--config` and any `key=value` overrides."""
    if cfg.get("output_dir") is not None:
        cfg.output_dir = f"{cfg.output_dir}/validation"  # beside the logs of a training run, not over them
    cfg.resume_from_checkpoint = False
    return run_recipe("agent_validate_distributed", cfg, build)


if __name__ == "__main__":
    sys.exit(recipe_main())
