"""How fast a run is: tokens per second, and what share of the devices' arithmetic it uses."""

import time

import torch
from torchtune.modules import TransformerDecoder

from torchtune_agent.distributed import World

# Dense bf16 operations per second, from the makers' data sheets. The first name that is part of the device's counts.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second the device can do at best; None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


class Throughput:
    """Counts tokens between two logged steps. Time that is not training is taken out with `pause`."""

    def __init__(self, model: TransformerDecoder, world: World, dtype: torch.dtype) -> None:
        self._world = world
        self._peak = peak_flops(world.device, dtype)
        # Six operations per token for every weight that is multiplied; looking up an embedding is none, but tied ones
        # are multiplied at the output. Then attention: two products of queries, keys and values with the text before.
        looked_up = (
            0 if model.output is None or not hasattr(model.output, "weight") else model.tok_embeddings.weight.numel()
        )
        self._per_token = 6 * (sum(parameter.numel() for parameter in model.parameters()) - looked_up)
        self._per_pair = 12 * len(model.layers) * model.tok_embeddings.embedding_dim / 2  # causal: half of the pairs
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
