"""Models from Hugging Face folders: the decoder, its weights in and out, how it is split over devices."""

from torchtune_agent.models.architecture import FAMILIES, Architecture
from torchtune_agent.models.checkpointer import HFCheckpointer, save_hf_folder
from torchtune_agent.models.conversion import Conversion
from torchtune_agent.models.decoder import build_decoder, hf_model
from torchtune_agent.models.loading import load_weights
from torchtune_agent.models.parallel import tp_plan
from torchtune_agent.models.weights import HeldWeights, HFWeights, Weights

__all__ = [
    "FAMILIES",
    "Architecture",
    "Conversion",
    "HFCheckpointer",
    "HFWeights",
    "HeldWeights",
    "Weights",
    "build_decoder",
    "hf_model",
    "load_weights",
    "save_hf_folder",
    "tp_plan",
]
