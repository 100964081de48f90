"""torchtune_agent: fine-tune open language models into agents with `tune run`.

The names below are the public API. They load on first use, so that importing the package
(which torch's backend autoload does in every process) costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtune_agent.api.config import AgentSFTConfig, RLTrainingConfig
    from torchtune_agent.api.references import register_data
    from torchtune_agent.api.results import EvalResult, TrainingResult
    from torchtune_agent.api.running import TrainingStopped
    from torchtune_agent.api.trainer import AgentSFTTrainer
    from torchtune_agent.continual import OnlineContinualLearner
    from torchtune_agent.data import AgentSFTDataset, AgentSFTTransform, TokenClass
    from torchtune_agent.errors import UserError
    from torchtune_agent.metrics import DetailedMetricsTracker
    from torchtune_agent.selection import CoresetSelector
    from torchtune_agent.toolworld import ToolWorld
    from torchtune_agent.training import Trainer

__version__ = "0.1.0"

_HOME = {
    "AgentSFTConfig": "torchtune_agent.api.config",
    "AgentSFTTrainer": "torchtune_agent.api.trainer",
    "EvalResult": "torchtune_agent.api.results",
    "RLTrainingConfig": "torchtune_agent.api.config",
    "TrainingResult": "torchtune_agent.api.results",
    "TrainingStopped": "torchtune_agent.api.running",
    "UserError": "torchtune_agent.errors",
    "register_data": "torchtune_agent.api.references",
    "AgentSFTDataset": "torchtune_agent.data",
    "AgentSFTTransform": "torchtune_agent.data",
    "TokenClass": "torchtune_agent.data",
    "CoresetSelector": "torchtune_agent.selection",
    "DetailedMetricsTracker": "torchtune_agent.metrics",
    "OnlineContinualLearner": "torchtune_agent.continual",
    "ToolWorld": "torchtune_agent.toolworld",
    "Trainer": "torchtune_agent.training",
}

__all__ = [
    "AgentSFTConfig",
    "AgentSFTDataset",
    "AgentSFTTrainer",
    "AgentSFTTransform",
    "CoresetSelector",
    "DetailedMetricsTracker",
    "EvalResult",
    "OnlineContinualLearner",
    "RLTrainingConfig",
    "TokenClass",
    "ToolWorld",
    "Trainer",
    "TrainingResult",
    "TrainingStopped",
    "UserError",
    "__version__",
    "register_data",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'torchtune_agent' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
