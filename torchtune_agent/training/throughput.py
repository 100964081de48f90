"""How fast a run is: tokens per second, and what share of the devices' arithmetic it uses."""

import time

import torch
from torchtune.modules import TransformerDecoder

from torchtune_agent.distributed import World
from torchtune_agent.models.experts import idle_weights
from torchtune_agent.training.gpus import GPUS


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second the device can do at best; None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.flops for part, gpu in GPUS.items() if part in name), None)


def operations(model: TransformerDecoder, length: float) -> float:
    """Floating-point operations that training takes for each token of sequences of `length` tokens.

    Six for every weight that is multiplied, four where it is frozen; looking up an embedding is none, but tied ones are
    multiplied at the output, and of experts those that a token is sent to. Then attention: two products of queries,
    keys and values with the text before, half of the pairs.
    """
    untied = model.output is not None and hasattr(model.output, "weight")
    looked_up = model.tok_embeddings.weight if untied else None
    used = [(p, p.numel()) for p in model.parameters() if p is not looked_up]
    used += [(stack, -number) for stack, number in idle_weights(model)]
    of_weights = sum((6 if p.requires_grad else 4) * number for p, number in used)
    return of_weights + 12 * len(model.layers) * model.tok_embeddings.embedding_dim * length / 2


class Throughput:
    """Counts tokens between two logged steps. Time that is not training is taken out with `pause`."""

    def __init__(self, model: TransformerDecoder, world: World, dtype: torch.dtype) -> None:
        self._world = world
        self._peak = peak_flops(world.device, dtype)
        self._per_token = operations(model, 0)  # linear in the length
        self._per_pair = operations(model, 1) - self._per_token
        self.restart()

    def restart(self) -> None:
        self._tokens = self._supervised = 0
        self._operations = 0.0
        self._since = time.perf_counter()

    def add(self, num_tokens: float, num_supervised: float, num_samples: float) -> None:
        """Count a step's tokens, of all ranks."""
        self._tokens += num_tokens
        self._supervised += num_supervised
        length = num_tokens / max(1, num_samples)
        self._operations += num_tokens * (self._per_token + self._per_pair * length)

    def pause(self, seconds: float) -> None:
        self._since += seconds

    def take(self) -> dict[str, float]:
        """What to log; begins anew."""
        seconds = (time.perf_counter() - self._since) * self._world.size
        row = {
            "tokens_per_second_per_gpu": self._tokens / seconds,
            "supervised_tokens_per_second_per_gpu": self._supervised / seconds,
        }
        if self._peak is not None:
            row["mfu"] = self._operations / seconds / self._peak
        self.restart()
        return row
