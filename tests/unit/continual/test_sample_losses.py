"""Losses of a step's samples, put together from micro-batches, against sums over each sample alone."""

from typing import Any

import torch
from torch import nn

from tests.unit.continual.test_replay_source import old_buffer, source
from torchtune_agent.continual.sample_losses import SampleLosses
from torchtune_agent.data.collate import Batch
from torchtune_agent.distributed import World, make_mesh, process_group
from torchtune_agent.losses import LossOutput
from torchtune_agent.metrics.table import COLUMNS


class ByToken:
    """Every token costs a hundredth of its number, and half as much again by its place."""

    def num_targets(self, batch: Batch) -> float:
        return batch.total_weight

    def __call__(self, model: Any, batch: Batch, *, with_statistics: bool) -> LossOutput:
        rows = torch.zeros(batch.num_supervised, len(COLUMNS))
        places = torch.arange(batch.labels.shape[1]).expand_as(batch.labels).flatten()[batch.supervised]
        rows[:, COLUMNS.index("nll")] = batch.labels.flatten()[batch.supervised] / 100 + places / 2
        return LossOutput(rows.sum(), rows if with_statistics else None)


def test_losses_of_samples_and_classes_are_those_of_every_sample_alone() -> None:
    made = source(old_buffer(), pack_to=24)
    with process_group("cpu") as (rank, size):
        world = World(rank, size, torch.device("cpu"), make_mesh("cpu", size, 1))
        losses = SampleLosses(ByToken(), world, always=True)
        for step in made.epoch(0):
            losses.begin(len(made.picks))
            for batch in step:
                assert losses(nn.Linear(1, 1), batch, with_statistics=False).tokens is None
            with torch.no_grad():
                losses(nn.Linear(1, 1), step[0], with_statistics=True)  # a validation is no part of the step
            measured = losses.take()
            assert measured is not None and losses.take() is measured
            for (tokens, nll), pick in zip(measured.of_samples.tolist(), made.picks, strict=True):
                sample = made._resolved(pick.sample)
                trained = [int(label) for label in sample["labels"][1:]]
                assert tokens == len(trained)
                # Where a sample lies in its row changes its loss by a number for each of its tokens
                rest = nll - sum(trained) / 100 - sum(i / 2 for i in range(len(trained)))
                assert abs(rest / len(trained) * 2 - round(rest / len(trained) * 2)) < 1e-4
            assert torch.allclose(measured.of_classes.sum(0), measured.of_samples.sum(0))
        unmeasured = SampleLosses(ByToken(), world, always=False)
        unmeasured.begin(3)
        unmeasured(nn.Linear(1, 1), next(made.epoch(1))[0], with_statistics=False)
        assert unmeasured.take() is None
