"""The model of a config with its weights, made ready for forward passes: what scores and answers are computed with."""

from torchtune.modules import TransformerDecoder

from torchtune_agent.losses.output import check_output
from torchtune_agent.training import Run, parameter_setup
from torchtune_agent.training.parallel import prepare
from torchtune_agent.training.weights import UserWeights


def loaded_model(run: Run) -> TransformerDecoder:
    """Every rank calls it."""
    parameters = parameter_setup(run.cfg)
    model = parameters.build(run.cfg, run.settings)
    check_output(model)
    prepare(model, run.cfg, run.settings, run.world, UserWeights(run.cfg, run.world, parameters).load(model))
    return model
