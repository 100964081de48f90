"""torchtune_agent: fine-tune open language models into agents with `tune run`.

The names below are the public API. They load on first use, so that importing the package
(which torch's backend autoload does in every process) costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtune_agent.continual import OnlineContinualLearner
    from torchtune_agent.data import AgentSFTDataset, AgentSFTTransform, TokenClass
    from torchtune_agent.metrics import DetailedMetricsTracker
    from torchtune_agent.toolworld import ToolWorld
    from torchtune_agent.training import Trainer

__version__ = "0.1.0"

_HOME = {
    "AgentSFTDataset": "torchtune_agent.data",
    "AgentSFTTransform": "torchtune_agent.data",
    "TokenClass": "torchtune_agent.data",
    "DetailedMetricsTracker": "torchtune_agent.metrics",
    "OnlineContinualLearner": "torchtune_agent.continual",
    "ToolWorld": "torchtune_agent.toolworld",
    "Trainer": "torchtune_agent.training",
}

__all__ = [
    "AgentSFTDataset",
    "AgentSFTTransform",
    "DetailedMetricsTracker",
    "OnlineContinualLearner",
    "TokenClass",
    "ToolWorld",
    "Trainer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'torchtune_agent' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
