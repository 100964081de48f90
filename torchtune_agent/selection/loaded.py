"""The model of a config with its weights, made ready for forward passes: what scores and answers are computed with."""

from torchtune.modules import TransformerDecoder

from torchtune_agent.losses.output import check_output
from torchtune_agent.training import FullParameters, Run
from torchtune_agent.training.parallel import prepare
from torchtune_agent.training.weights import UserWeights


def loaded_model(run: Run) -> TransformerDecoder:
    """Every rank calls it."""
    model = FullParameters().build(run.cfg, run.settings)
    check_output(model)
    prepare(model, run.cfg, run.settings, run.world, UserWeights(run.cfg, run.world).load(model))
    return model
