"""Steps whose loss or gradient is not a finite number: no update is made of them, their samples are listed, they are
counted, and too many in a row end the run.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchtune_agent.data.collate import Batch
from torchtune_agent.distributed import World
from torchtune_agent.errors import UserError


class FiniteGuard:
    """Decides, on all ranks alike, whether a step may update the model.

    Args:
        world: all ranks.
        path: where the samples of bad steps are listed, a JSON object for each such step and rank.
        most_in_a_row: so many bad steps in a row end the run.
    """

    def __init__(self, world: World, path: Path, most_in_a_row: int) -> None:
        self.path = path
        self.total = 0
        self._world = world
        self._most = most_in_a_row
        self._in_a_row = 0

    def passes(
        self, step: int, batches: Sequence[Batch], losses: Sequence[torch.Tensor], norm: torch.Tensor | None
    ) -> bool:
        """Whether every loss of every rank, and the norm of the gradient of all, is finite. Brings them to the host."""
        scalars = losses if norm is None else [*losses, norm]
        values = torch.stack([scalar.detach().to(losses[0].device, torch.float64) for scalar in scalars]).tolist()
        of_losses, of_norm = values[: len(losses)], values[len(losses) :]
        if not self._world.any(not all(map(math.isfinite, values))):
            self._in_a_row = 0
            return True
        self.total += 1
        self._in_a_row += 1
        bad = [i for i, loss in enumerate(of_losses) if not math.isfinite(loss)]
        lines = [self._line(step, "loss", batches, bad, of_losses)] if bad else []
        of_ranks = self._world.gather(lines)
        if not any(of_ranks):  # every loss is finite, and the gradient is everyone's
            lines = [self._line(step, "gradient", batches, range(len(batches)), [*of_losses, *of_norm])]
            of_ranks = self._world.gather(lines)
        if self._world.is_main:
            self._list([line for lines in of_ranks for line in lines])
        return False

    def _line(
        self, step: int, what: str, batches: Sequence[Batch], chosen: Sequence[int], values: Sequence[float]
    ) -> dict[str, Any]:
        infos = [batches[i].info for i in chosen]
        samples = [sample.where for info in infos if info is not None for sample in info()]
        return {
            "step": step,
            "rank": self._world.rank,
            "what": what,
            "values": [value if math.isfinite(value) else str(value) for value in values],
            "samples": samples,
        }

    def _list(self, lines: Sequence[dict[str, Any]]) -> None:
        what, step = lines[0]["what"], lines[0]["step"]
        print(
            f"\nwarning: step {step}: the {what} is not finite; the model was not updated. Its samples: {self.path}",
            file=sys.stderr,
        )
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            print(f"warning: {self.path} cannot be written: {error.strerror}", file=sys.stderr)

    def check_patience(self, step: int) -> None:
        """Stop where too many steps in a row were bad."""
        if self._in_a_row >= self._most:
            raise UserError(
                f"step {step}: {self._in_a_row} steps in a row had a loss or gradient that is not finite "
                f"(max_nonfinite_steps={self._most}). Their samples are listed in {self.path}. Most often the learning "
                "rate is too high: lower optimizer.lr, set clip_grad_norm, or take the samples out if they are always "
                "the same."
            )

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self._in_a_row = state["total"], state["in_a_row"]
