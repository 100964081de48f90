"""One training loop for every recipe, and the three seams a recipe plugs into."""

from torchtune_agent.training.adapters import parameter_setup
from torchtune_agent.training.parameters import FullParameters, ParameterSetup
from torchtune_agent.training.run import Run, run_recipe
from torchtune_agent.training.scratch import ScratchCheckpointer
from torchtune_agent.training.settings import Settings
from torchtune_agent.training.sft import check_model, sft_data, sft_objective
from torchtune_agent.training.trainer import Parts, Trainer

__all__ = [
    "FullParameters",
    "ParameterSetup",
    "Parts",
    "Run",
    "ScratchCheckpointer",
    "Settings",
    "Trainer",
    "check_model",
    "parameter_setup",
    "run_recipe",
    "sft_data",
    "sft_objective",
]
