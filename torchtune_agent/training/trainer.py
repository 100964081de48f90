"""The one training loop. It knows no algorithm: data, objective and parameters are plugged in.

A step's gradient is that of sum(loss) / sum(tokens) over all its micro-batches on all ranks. The number of
tokens is agreed on before the first backward pass, so every gradient arrives with its final scale, with
accumulation and with the optimizer stepping inside the backward pass alike.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import training
from torchtune.modules import TransformerDecoder

from torchtune_agent.data.collate import Batch
from torchtune_agent.data.loader import BatchSource, Telling
from torchtune_agent.distributed import World, together
from torchtune_agent.losses import Objective
from torchtune_agent.metrics.detail import LEDGER, Detail, merged
from torchtune_agent.metrics.names import metric_name
from torchtune_agent.metrics.sums import Sums
from torchtune_agent.metrics.tracker import DetailedMetricsTracker
from torchtune_agent.training.card import Trained
from torchtune_agent.training.checkpoints import Checkpoint, Manifest
from torchtune_agent.training.faults import FiniteGuard
from torchtune_agent.training.optimizer import Stepper
from torchtune_agent.training.parallel import prepare
from torchtune_agent.training.parameters import ParameterSetup
from torchtune_agent.training.progress import Progress
from torchtune_agent.training.saving import Saver
from torchtune_agent.training.settings import Settings
from torchtune_agent.training.signals import Stopped, StopRequest
from torchtune_agent.training.state import (
    RUN,
    Position,
    Snapshot,
    has_frozen,
    random_state,
    rank_file,
    read_plain,
    restore_declared,
    restore_random,
    restore_schedule,
    restore_tensors,
    run_values,
    sound,
    steps_left,
    steps_left_in_epoch,
    tensors_of,
    to_bytes,
)
from torchtune_agent.training.throughput import Throughput
from torchtune_agent.training.watch import Watch
from torchtune_agent.training.weights import UserWeights


@dataclass
class Parts:
    """What a recipe plugs in: the three seams, and the model that the parameter setup built (on meta)."""

    train: BatchSource
    validation: BatchSource | None
    objective: Objective
    parameters: ParameterSetup
    model: TransformerDecoder
    has_token_classes: bool = True
    only_validates: bool = False  # the run measures the model on `validation`, and neither trains nor saves


class Trainer:
    """Trains `parts` as `settings` say; everything a user watches goes through `progress`.

    A run that goes on from `checkpoint` takes up everything from there.
    """

    def __init__(
        self,
        cfg: DictConfig,
        settings: Settings,
        world: World,
        parts: Parts,
        progress: Progress,
        request: StopRequest,
        watch: Watch,
        manifest: Manifest,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """`manifest`: what every checkpoint of this run says of it."""
        self.settings = settings
        self.world = world
        self.parts = parts
        self.progress = progress
        self.model = parts.model
        self.request = request
        self.asked_to_stop = False  # by any rank, and known to all
        self.watch = watch
        self.guard = FiniteGuard(world, settings.output_dir / "logs" / "nonfinite.jsonl", settings.max_nonfinite_steps)
        self.saver = Saver(settings, world, None if checkpoint is None else checkpoint.manifest)
        self.weights = UserWeights(cfg, world, parts.parameters)
        starts_empty = checkpoint is not None and not has_frozen(self.model)
        prepare(self.model, cfg, settings, world, None if starts_empty else self.weights.load(self.model))
        self.stepper = Stepper(self.model, parts.parameters, cfg, settings)
        self.position = Position()
        ledger = settings.output_dir / "logs" / LEDGER if settings.log_sample_losses else None
        self.detail = Detail(settings.log_by, ledger, world.rank)
        self.detail_val = Detail(settings.log_by)
        self._manifest = manifest
        if checkpoint is None:
            self.num_steps = steps_left(self.position, parts.train, settings)
            self.stepper.schedule(cfg.get("lr_scheduler"), num_steps=self.num_steps)
        else:
            self._restore(checkpoint, cfg)
        self.activations = training.get_act_offloading_ctx_manager(self.model, settings.enable_activation_offloading)
        self.tracker = DetailedMetricsTracker(
            entropy_k=settings.entropy_k,
            enable_token_classification=settings.enable_token_classification and parts.has_token_classes,
            metric_names=settings.metric_names,
        )
        self.throughput = Throughput(self.model, world, settings.torch_dtype)

    @property
    def global_step(self) -> int:
        return self.position.step

    @global_step.setter
    def global_step(self, step: int) -> None:
        self.position.step = step

    def run(self) -> None:
        """All that the parts are for."""
        if self.parts.only_validates:
            self._evaluate()
            self.progress.finish_validation()
        else:
            self.train()

    def train(self) -> None:
        """Run what is left of the epochs: step, validate where that is due, save where that is due."""
        self.progress.start(self.num_steps, self.position.step)
        self.throughput.restart()
        self.request.start()
        self.watch.at(self.global_step + 1)
        for epoch in range(self.position.epoch, self.settings.epochs):
            self.model.train()
            left = steps_left_in_epoch(self.position, self.parts.train, self.settings)
            if left and (self.position.owes_validation or self._owes_export()):
                self._settle()
            batches = self.parts.train.epoch(epoch, self.position.rows)
            for number, micro_batches in enumerate(islice(batches, left), start=1):
                self._train_step(micro_batches)
                self.position.advance(self.parts.train)
                self.progress.profile()
                every = self.settings.run_val_every_n_steps
                self.position.owes_validation = number == left or (every is not None and self.global_step % every == 0)
                if number < left:
                    self._settle()
            self._end_epoch(epoch)
        self.saver.finish()
        self.progress.finish(self.weights.folder, self.saver.folder.path, self.saver.stalled)

    def _settle(self) -> None:
        """In the midst of an epoch: validate where that is due, stop where that was asked, export and save where that
        is due."""
        validated = None
        if self.position.owes_validation and not self.asked_to_stop:
            validated = self._evaluate()
        if self.asked_to_stop:
            self._stop()
        if self.weights.export_is_due(self.global_step):
            self._write_weights(f"of step {self.global_step}", None)
        if self.saver.is_due(self.global_step, validated):
            self._save()

    def _owes_export(self) -> bool:
        """Whether the run was stopped in the midst of an epoch, before an export that was due."""
        return self.position.steps_in_epoch > 0 and self.weights.lack_export(self.global_step)

    def _write_weights(self, which: str, epoch: int | None) -> None:
        """Write the model as it is now, after `epoch`, or between two steps."""
        self.progress.say(f"step {self.global_step}: writing the weights {which}")
        started = time.perf_counter()
        at = self.position
        now = replace(self._manifest, step=at.step, epoch=at.epoch if epoch is None else epoch + 1)
        trained = Trained(now, at.tokens, at.supervised, self.settings.output_dir / "logs")
        self.weights.write(self.model, trained, epoch)
        self.throughput.pause(time.perf_counter() - started)

    def _end_epoch(self, epoch: int) -> None:
        """A run that is stopped here has its epoch's end before it. A source that waits for data ends when it is."""
        self.asked_to_stop = self.asked_to_stop or self.world.any(self.request.by is not None)
        validated = None if self.asked_to_stop else self._evaluate()
        if self.asked_to_stop:
            self._stop()
        self._write_weights(f"of epoch {epoch}", epoch)
        self.position.end_epoch()
        self.saver.is_due(self.global_step, validated)  # it is; this remembers the best
        self._save()

    def _save(self) -> None:
        """Save everything, between two steps; nothing where this step is saved already."""
        self.watch.at(self.global_step)
        self.detail.fetch()
        self.detail.write()
        at = self.position
        of_now = replace(self._manifest, step=at.step, epoch=at.epoch, owes_validation=at.owes_validation)
        self.throughput.pause(self.saver.save(self._snapshot, of_now))

    def _snapshot(self) -> Snapshot:
        own = {"random": random_state(self.world.device), "detail": self.detail.state_dict()}
        files = {rank_file(self.world.rank): to_bytes(own)}
        values = run_values(self.position, self.num_steps, self.stepper, self._stateful)  # may gather shards
        if self.world.is_main:
            files[RUN] = to_bytes(values)
        return Snapshot(tensors_of(self.model, self.stepper), files)

    def _restore(self, checkpoint: Checkpoint, cfg: DictConfig) -> None:
        """Take up everything from a checkpoint of any number of ranks."""
        path = checkpoint.path
        run = together(sound(checkpoint, lambda: read_plain(path / RUN)))
        self.position = Position(**run["position"])
        self.num_steps = self.position.step + steps_left(self.position, self.parts.train, self.settings)
        sound(checkpoint, lambda: restore_tensors(path, self.model, self.stepper, run, self.saver.group))()
        restore_schedule(self.stepper, run, cfg, self.settings, num_steps=self.num_steps)
        restore_declared(self._stateful, run["parts"])
        # Each rank's own. Of several ranks' sums one rank goes on with; a rank that is new has none.
        rank = self.world.rank
        others = range(rank, checkpoint.manifest.world_size, self.world.size)
        own = together(sound(checkpoint, lambda: {other: read_plain(path / rank_file(other)) for other in others}))
        for other in others:
            self.detail.load_state_dict(own[other]["detail"])
        if rank in own:
            restore_random(own[rank]["random"], self.world.device)

    @property
    def _stateful(self) -> dict[str, Any]:
        return {"data": self.parts.train, "objective": self.parts.objective, "guard": self.guard}

    def _stop(self) -> None:
        """End here, on every rank, with all that was done so far saved."""
        self._save()
        self.saver.finish()
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
            self.position.tokens += int(tokens[0])
            self.position.supervised += int(tokens[1])
        return num_targets

    def _log_step(self, sums: Sums, num_targets: float, measured: bool, norm: torch.Tensor | None) -> None:
        row: dict[str, Any] = {
            "loss": float(sums.loss) / num_targets if num_targets else math.nan,
            "lr": self.stepper.learning_rate,
            **self.throughput.take(),
            **self.saver.take_stall(),
        }
        if norm is not None:
            row["grad_norm"] = float(norm)
        row["nonfinite_steps"] = self.guard.total
        if isinstance(self.parts.train, Telling):
            row |= self.parts.train.facts()
        self.detail.fetch()
        if not measured:
            self.progress.step(row, self.global_step)
            return
        row |= self.tracker.name("train", sums)
        self.progress.step(row, self.global_step, self.tracker.loss_histograms("train", sums.histogram))

    def _evaluate(self) -> dict[str, float] | None:
        """Everything that is due at a validation; the row of it, where there is something to validate on."""
        row = self._validate()
        if not self.asked_to_stop:
            self._log_detail()
            self.position.owes_validation = False
        return row

    @torch.no_grad()
    def _validate(self) -> dict[str, float] | None:
        """Loss and metrics over the whole validation set; None where there is none, or the run is to stop."""
        if self.parts.validation is None:
            return None
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
                return None
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
        return row

    def _log_detail(self) -> None:
        """Tables per tool and source of what was trained since the last time, and of the validation just made."""
        for split, detail in (("train", self.detail), ("val", self.detail_val)):
            detail.fetch()
            detail.write()
            if self.settings.log_by:
                self.progress.detailed(split, merged(self.world.gather(detail.take())), self.global_step)
