"""What `ssis` measures of arriving samples with the model as it is, and what it remembers of those before."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchtune_agent.continual.fisher import DiagonalFisher, own_shard, trained_parameters, whole
from torchtune_agent.continual.ssis import ImportanceScorer, measure
from torchtune_agent.data.collate import Batch
from torchtune_agent.distributed import World
from torchtune_agent.losses import Objective

_RECENT = 0.99  # of the Fisher information of the stream, what is left after another sample


class Scored:
    """Scores samples of a stream, each against those before. Every rank measures all of them."""

    def __init__(self, model: nn.Module, objective: Objective, world: World) -> None:
        self._model, self._objective, self._world = model, objective, world
        self._fisher, self._scorer = DiagonalFisher(_RECENT), ImportanceScorer()

    def importance(self, samples: Sequence[Batch]) -> list[float]:
        """Of samples that arrive, given as batches of one."""
        signals = measure(self._model, self._objective, samples, self._fisher, self._world, learn=True)
        scores = self._scorer.score(signals)
        self._scorer.update(signals)
        return scores.importance.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Equal on every rank, which all take part."""
        parameters = trained_parameters(self._model)
        values = {name: whole(shard, parameters[name]) for name, shard in self._fisher.values.items()}
        return {"fisher": values, "count": self._fisher.count, "scorer": self._scorer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parameters = trained_parameters(self._model)
        self._fisher.count = state["count"]
        self._fisher.values = {name: own_shard(value, parameters[name]) for name, value in state["fisher"].items()}
        self._scorer.load_state_dict(state["scorer"])
