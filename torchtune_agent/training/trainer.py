"""The one training loop. It knows no algorithm: data, objective and parameters are plugged in.

A step's gradient is that of sum(loss) / sum(tokens) over all its micro-batches on all ranks. The number of
tokens is agreed on before the first backward pass, so every gradient arrives with its final scale, with
accumulation and with the optimizer stepping inside the backward pass alike.
"""

import math
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
from torchtune_agent.metrics.detail import Detail, merged
from torchtune_agent.metrics.names import metric_name
from torchtune_agent.metrics.sums import Sums
from torchtune_agent.metrics.tracker import DetailedMetricsTracker
from torchtune_agent.training.faults import FiniteGuard
from torchtune_agent.training.optimizer import Stepper
from torchtune_agent.training.parallel import prepare
from torchtune_agent.training.parameters import ParameterSetup
from torchtune_agent.training.progress import Progress
from torchtune_agent.training.saving import Saver
from torchtune_agent.training.settings import Settings
from torchtune_agent.training.signals import Stopped, StopRequest
from torchtune_agent.training.throughput import Throughput
from torchtune_agent.training.watch import Watch


@dataclass
class Parts:
    """What a recipe plugs in: the three seams, and the model that the parameter setup built (on meta)."""

    train: BatchSource
    validation: BatchSource | None
    objective: Objective
    parameters: ParameterSetup
    model: TransformerDecoder
    has_token_classes: bool = True


class Trainer:
    """Trains `parts` as `settings` say; everything a user watches goes through `progress`."""

    def __init__(
        self,
        cfg: DictConfig,
        settings: Settings,
        world: World,
        parts: Parts,
        progress: Progress,
        request: StopRequest,
        watch: Watch,
    ) -> None:
        self.settings = settings
        self.world = world
        self.parts = parts
        self.progress = progress
        self.model = parts.model
        self.saver = Saver(cfg, settings, world)
        self.watch = watch
        self.request = request
        self.asked_to_stop = False  # by any rank, and known to all
        self.guard = FiniteGuard(world, settings.output_dir / "logs" / "nonfinite.jsonl", settings.max_nonfinite_steps)
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
        self.throughput = Throughput(self.model, world, settings.torch_dtype)
        ledger = settings.output_dir / "logs" / "sample_losses" if settings.log_sample_losses else None
        self.detail = Detail(settings.log_by, ledger, world.rank)
        self.detail_val = Detail(settings.log_by)

    def train(self) -> None:
        """Run the epochs that are left, validating and saving at the end of each."""
        self.progress.start(self.steps_per_epoch, self.epochs_done)
        self.throughput.restart()
        self.request.start()
        self.watch.at(self.global_step + 1)
        for epoch in range(self.epochs_done, self.settings.epochs):
            self.model.train()
            for number, micro_batches in enumerate(self.parts.train.epoch(epoch), start=1):
                self._train_step(micro_batches)
                self.progress.profile()
                if self.asked_to_stop:
                    self._stop(epoch)
                last = number == self.steps_per_epoch
                every = self.settings.run_val_every_n_steps
                if last or (every and self.global_step % every == 0):
                    self._validate()
                    self._log_detail()
                    if self.asked_to_stop:
                        self._stop(epoch)
                if last:
                    break
            self._save(epoch)
        self.progress.finish(self.saver.folder)

    def _save(self, epoch: int) -> None:
        self.watch.at(self.global_step)
        self.progress.saving(self.global_step)
        self.saver.save(self.model, self.stepper, epoch)

    def _stop(self, epoch: int) -> None:
        """End here, on every rank, with all that was done so far saved."""
        self._save(epoch)
        self.progress.stopped(self.request.by or "another rank", self.global_step)
        raise Stopped(together=True)

    def _train_step(self, micro_batches: list[Batch]) -> None:
        step = self.global_step + 1
        measured = self.settings.enable_detailed_metrics and self._is_measured(step)
        num_targets = self._count(micro_batches)
        scale = self.world.dp_size / (num_targets or 1.0)  # FSDP averages over ranks; this makes it a sum
        sums = Sums.empty(self.world.device)
        losses: list[torch.Tensor] = []
        update = num_targets > 0  # a step of nothing must not move the model, as momentum would
        for micro_batch in micro_batches:
            batch = micro_batch.to(self.world.device)
            with self.activations:
                output = self.parts.objective(
                    self.model, batch, with_statistics=measured or self.settings.log_sample_losses
                )
            losses.append(output.loss_sum.detach())
            if self.stepper.updates_in_backward:  # and there is but one micro-batch
                update = self.guard.passes(step, micro_batches, losses, None) and update
            if update or not self.stepper.updates_in_backward:
                (output.loss_sum * scale).backward()
            sums.add(output.loss_sum.detach(), output.tokens if measured else None, batch)
            if self.detail and output.tokens is not None:
                self.detail.add(output.tokens, batch, step)
        norm = self.stepper.gradient_norm()
        if norm is not None:
            update = self.guard.passes(step, micro_batches, losses, norm) and update
        self.stepper.step(norm, update=update)
        self.global_step = step
        if measured or not update or step % self.settings.log_every_n_steps == 0:
            self._log_step(sums.reduced(self.world), num_targets, measured, norm)
        self.guard.check_patience(step)
        self.watch.at(step + 1)  # its data come next

    def _is_measured(self, step: int) -> bool:
        """Detailed metrics come every so many steps, and with the first, so that every curve has its start."""
        return step == 1 or step % self.settings.log_detailed_metrics_every_n_steps == 0

    def _count(self, micro_batches: Iterable[Batch], *, training: bool = True) -> float:
        """Targets of the loss of the step, over all ranks; its tokens are counted too, and whether a rank was asked to
        stop is learned by all. Stays on the host."""
        targets = self.parts.objective.num_targets
        counts = [[targets(b), b.num_tokens, b.num_supervised, b.num_samples] for b in micro_batches]
        totals = torch.tensor(counts, dtype=torch.float64).sum(0)
        (num_targets, *tokens), self.asked_to_stop = self.world.tally(totals, self.request.by is not None)
        if training:
            self.throughput.add(*tokens)
        return num_targets

    def _log_step(self, sums: Sums, num_targets: float, measured: bool, norm: torch.Tensor | None) -> None:
        row: dict[str, Any] = {
            "loss": float(sums.loss) / num_targets if num_targets else math.nan,
            "lr": self.stepper.learning_rate,
            **self.throughput.take(),
        }
        if norm is not None:
            row["grad_norm"] = float(norm)
        row["nonfinite_steps"] = self.guard.total
        self.detail.fetch()
        if not measured:
            self.progress.step(row, self.global_step)
            return
        row |= self.tracker.name("train", sums)
        self.progress.step(row, self.global_step, self.tracker.loss_histograms("train", sums.histogram))

    @torch.no_grad()
    def _validate(self) -> None:
        """Loss and metrics over the whole validation set."""
        if self.parts.validation is None:
            return
        started = time.perf_counter()
        self.model.eval()
        sums = Sums.empty(self.world.device)
        num_targets = 0.0
        measured = self.settings.enable_detailed_metrics
        for micro_batches in self.progress.validating(self.parts.validation, self.global_step):
            self.watch.at(self.global_step)
            num_targets += self._count(micro_batches, training=False)
            if self.asked_to_stop:  # a part of a validation is none
                self.model.train()
                return
            for micro_batch in micro_batches:
                batch = micro_batch.to(self.world.device)
                output = self.parts.objective(self.model, batch, with_statistics=measured)
                sums.add(output.loss_sum, output.tokens, batch)
                if self.detail_val and output.tokens is not None:
                    self.detail_val.add(output.tokens, batch, self.global_step)
        sums = sums.reduced(self.world)
        row = {
            metric_name("val", "overall", "loss", self.settings.metric_names): float(sums.loss) / num_targets
            if num_targets
            else math.nan
        }
        if measured:
            row |= self.tracker.name("val", sums)
        self.progress.validated(row, self.global_step, self.tracker.loss_histograms("val", sums.histogram))
        self.watch.at(self.global_step + 1)
        self.model.train()
        self.throughput.pause(time.perf_counter() - started)

    def _log_detail(self) -> None:
        """Tables per tool and source of what was trained since the last time, and of the validation just made."""
        for split, detail in (("train", self.detail), ("val", self.detail_val)):
            detail.fetch()
            detail.write()
            if self.settings.log_by:
                self.progress.detailed(split, merged(self.world.gather(detail.take())), self.global_step)
