"""The one training loop. It knows no algorithm: data, objective and parameters are plugged in.

A step's gradient is that of sum(loss) / sum(tokens) over all its micro-batches on all ranks. The number of
tokens is agreed on before the first backward pass, so every gradient arrives with its final scale, with
accumulation and with the optimizer stepping inside the backward pass alike.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import training
from torchtune.modules import TransformerDecoder

from torchtune_agent.data.collate import Batch
from torchtune_agent.data.loader import BatchSource
from torchtune_agent.distributed import World
from torchtune_agent.losses import Objective
from torchtune_agent.metrics.table import empty_table
from torchtune_agent.metrics.tracker import DetailedMetricsTracker, metric_name
from torchtune_agent.training.optimizer import Stepper
from torchtune_agent.training.parallel import prepare
from torchtune_agent.training.parameters import ParameterSetup
from torchtune_agent.training.progress import Progress
from torchtune_agent.training.saving import Saver
from torchtune_agent.training.settings import Settings


@dataclass
class Parts:
    """What a recipe plugs in: the three seams, and the model that the parameter setup built (on meta)."""

    train: BatchSource
    validation: BatchSource | None
    objective: Objective
    parameters: ParameterSetup
    model: TransformerDecoder
    has_token_classes: bool = True


@dataclass
class StepResult:
    """What one step (or one validation) did, summed over ranks and micro-batches."""

    loss: float
    table: torch.Tensor | None  # on the host


class Trainer:
    """Trains `parts` as `settings` say; everything a user watches goes through `progress`."""

    def __init__(self, cfg: DictConfig, settings: Settings, world: World, parts: Parts, progress: Progress) -> None:
        self.settings = settings
        self.world = world
        self.parts = parts
        self.progress = progress
        self.model = parts.model
        self.saver = Saver(cfg, settings, world)
        prepare(self.model, cfg, settings, world, self.saver.load_weights(self.model))
        self.stepper = Stepper(self.model, parts.parameters, cfg, settings)
        self.epochs_done = self.saver.restore(self.model, self.stepper)
        limit = settings.max_steps_per_epoch
        available = parts.train.steps_per_epoch
        self.steps_per_epoch = available if limit is None else min(limit, available)
        self.global_step = self.epochs_done * self.steps_per_epoch
        num_steps = settings.epochs * self.steps_per_epoch
        self.stepper.schedule(cfg.get("lr_scheduler"), num_steps=num_steps, steps_done=self.global_step)
        self.activations = training.get_act_offloading_ctx_manager(self.model, settings.enable_activation_offloading)
        self.tracker = DetailedMetricsTracker(
            entropy_k=settings.entropy_k,
            enable_token_classification=settings.enable_token_classification and parts.has_token_classes,
            metric_names=settings.metric_names,
        )
        self._tokens_since_log = 0
        self._time_of_log = time.perf_counter()

    def train(self) -> None:
        """Run the epochs that are left, validating and saving at the end of each."""
        self.progress.start(self.steps_per_epoch, self.epochs_done)
        self._time_of_log = time.perf_counter()
        for epoch in range(self.epochs_done, self.settings.epochs):
            self.model.train()
            for number, micro_batches in enumerate(self.parts.train.epoch(epoch), start=1):
                self._train_step(micro_batches)
                self.progress.profile()
                last = number == self.steps_per_epoch
                every = self.settings.run_val_every_n_steps
                if last or (every and self.global_step % every == 0):
                    self._validate()
                if last:
                    break
            self.progress.saving(self.global_step)
            self.saver.save(self.model, self.stepper, epoch)
        self.progress.finish(self.saver.folder)

    def _train_step(self, micro_batches: list[Batch]) -> None:
        log_now = (self.global_step + 1) % self.settings.log_every_n_steps == 0
        measure = self.settings.enable_detailed_metrics and self._is_measured(self.global_step + 1)
        num_targets, num_tokens = self._count(micro_batches)
        scale = self.world.dp_size / (num_targets or 1.0)  # FSDP averages over ranks; this makes it a sum
        loss_sum, table = self._new_sums()
        for micro_batch in micro_batches:
            batch = micro_batch.to(self.world.device)
            with self.activations:
                output = self.parts.objective(self.model, batch, with_statistics=measure)
            (output.loss_sum * scale).backward()
            loss_sum += output.loss_sum.detach()
            if output.table is not None:
                table += output.table
        norm = self.stepper.step()
        self.global_step += 1
        self._tokens_since_log += num_tokens
        if log_now or measure:
            result = self._reduce(loss_sum, table if measure else None, num_targets)
            self._log_step(result, norm)

    def _is_measured(self, step: int) -> bool:
        """Detailed metrics come every so many steps, and with the first, so that every curve has its start."""
        return step == 1 or step % self.settings.log_detailed_metrics_every_n_steps == 0

    def _count(self, micro_batches: Iterable[Batch]) -> tuple[float, int]:
        """Targets of the loss and tokens of the step, over all ranks. Stays on the host."""
        objective = self.parts.objective
        counts = [[objective.num_targets(batch), batch.num_tokens] for batch in micro_batches]
        num_targets, num_tokens = self.world.sum(torch.tensor(counts, dtype=torch.float64).sum(0)).tolist()
        return num_targets, int(num_tokens)

    def _new_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.world.device
        return torch.zeros((), dtype=torch.float64, device=device), empty_table(device)

    def _reduce(self, loss_sum: torch.Tensor, table: torch.Tensor | None, num_targets: float) -> StepResult:
        """Sum over ranks with one collective and bring the result to the host with one copy."""
        sums = [loss_sum.reshape(1)] + ([] if table is None else [table.flatten()])
        reduced = self.world.sum(torch.cat(sums)).cpu()
        loss = float(reduced[0]) / (num_targets or 1.0)
        return StepResult(loss, None if table is None else reduced[1:].view_as(table))

    def _log_step(self, result: StepResult, norm: torch.Tensor | None) -> None:
        now = time.perf_counter()
        speed = self._tokens_since_log / (now - self._time_of_log) / self.world.size
        self._tokens_since_log, self._time_of_log = 0, now
        row: dict[str, Any] = {
            "loss": result.loss,
            "lr": self.stepper.learning_rate,
            "tokens_per_second_per_gpu": speed,
        }
        if norm is not None:
            row["grad_norm"] = float(norm)
        if result.table is not None:
            row |= self.tracker.compute("train", result.table)
        self.progress.step(row, self.global_step)

    @torch.no_grad()
    def _validate(self) -> None:
        """Loss and metrics over the whole validation set."""
        if self.parts.validation is None:
            return
        started = time.perf_counter()
        self.model.eval()
        loss_sum, table = self._new_sums()
        num_targets = 0.0
        detailed = self.settings.enable_detailed_metrics
        for micro_batches in self.progress.validating(self.parts.validation, self.global_step):
            num_targets += self._count(micro_batches)[0]
            for micro_batch in micro_batches:
                batch = micro_batch.to(self.world.device)
                output = self.parts.objective(self.model, batch, with_statistics=detailed)
                loss_sum += output.loss_sum
                if output.table is not None:
                    table += output.table
        result = self._reduce(loss_sum, table if detailed else None, num_targets)
        row = {metric_name("val", "overall", "loss", self.settings.metric_names): result.loss}
        if result.table is not None:
            row |= self.tracker.compute("val", result.table)
        self.progress.validated(row, self.global_step)
        self.model.train()
        self._time_of_log += time.perf_counter() - started  # validation does not count against throughput
