"""The buffer that one run leaves for the next, so that learning goes on for months."""

import json
from pathlib import Path
from typing import Any

import torch

from torchtune_agent.continual.buffer import ReplayBuffer
from torchtune_agent.continual.config import ContinualSettings
from torchtune_agent.errors import UserError
from torchtune_agent.training.checkpoints import Checkpoint, CheckpointFolder, Damaged
from torchtune_agent.training.state import RUN, read_plain

BUFFER_FILE = "replay_buffer.pt"
FOLDER = "continual"


def make_buffer(settings: ContinualSettings, seed: int, rank: int) -> ReplayBuffer:
    """The run's buffer: empty, or as an earlier run left it."""
    left = None if settings.replay_from is None else read_buffer(settings.replay_from)
    spill_to = None if settings.spill_to is None else settings.spill_to.with_name(f"{settings.spill_to.name}.{rank}")
    buffer = ReplayBuffer(
        settings.buffer_size,
        strategy=settings.buffer_strategy,
        max_bytes=settings.buffer_max_bytes,
        spill_to=spill_to,
        # Which samples stay follows from the seed that the first of the stream came with.
        seed=seed if left is None else json.loads(left["facts"])["seed"],
        threshold_ratio=settings.threshold_ratio,
    )
    if left is not None:
        buffer.load_state_dict(left)
        if len(buffer) == 0:
            raise UserError(f"continual.replay_from={settings.replay_from}: its buffer is empty. Name another run.")
    return buffer


def read_buffer(path: Path) -> dict[str, Any]:
    """The state of the buffer that an earlier run ended with, by its folder, its last checkpoint or the file itself."""
    if (path / RUN).is_file():
        return _of_checkpoint(path)
    saved = CheckpointFolder(path / "checkpoints")
    if steps := saved.steps():
        return _of_checkpoint(saved.of_step(steps[0]))
    for file in (path, path / FOLDER / BUFFER_FILE):
        if file.is_file():
            try:
                return read_plain(file)
            except Damaged as error:
                raise UserError(f"continual.replay_from={path}: {error}. Name another run.") from error
    raise UserError(
        f"continual.replay_from={path}: is no run with a replay buffer. Name its output_dir, its last checkpoint "
        f"(checkpoints/step_N), or its {FOLDER}/{BUFFER_FILE}, which is written when a stream ends."
    )


def _of_checkpoint(path: Path) -> dict[str, Any]:
    try:
        problem = Checkpoint.open(path).problem_of(RUN)
        if problem is not None:
            raise Damaged(problem)
        data = read_plain(path / RUN)["parts"].get("data")
    except Damaged as error:
        raise UserError(f"continual.replay_from={path}: {error}. Name another checkpoint.") from error
    if data is not None and "live" in data:
        return data["buffer"]
    if data is None or "stream" not in data:
        raise UserError(f"continual.replay_from={path}: is not of a run over a stream, so it has no buffer.")
    counts = json.loads(data["stream"])
    if counts["num_ended"] < len(counts["walked"]):
        raise UserError(
            f"continual.replay_from={path}: is from the middle of a stream, where the buffer holds no samples yet, "
            "only their numbers in that run's data. Name the run's last checkpoint."
        )
    return data["buffer"]


def write_buffer(buffer: ReplayBuffer, output_dir: Path) -> None:
    (output_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    torch.save(buffer.state_dict(), output_dir / FOLDER / BUFFER_FILE)
