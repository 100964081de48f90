"""What a person sees of a run: the bar, the rows in the log, the table at the end.

Rank 0 shows and writes; on the other ranks the same calls do nothing.
"""

import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import training
from tqdm import tqdm

from torchtune_agent.config import instantiate
from torchtune_agent.data.collate import Batch
from torchtune_agent.data.loader import BatchSource, num_steps
from torchtune_agent.distributed import World
from torchtune_agent.errors import UserError
from torchtune_agent.metrics import breakdown
from torchtune_agent.metrics.colours import CLASSES
from torchtune_agent.metrics.detail import Groups, most_frequent
from torchtune_agent.metrics.history import History
from torchtune_agent.metrics.log import RunLog
from torchtune_agent.metrics.names import metric_name
from torchtune_agent.metrics.plots import plot_classes
from torchtune_agent.metrics.report import write_report
from torchtune_agent.metrics.summary import aligned, class_table
from torchtune_agent.screen import printable, shown
from torchtune_agent.training.settings import Settings
from torchtune_agent.training.signals import EXIT_STOPPED

# Time left comes before what may not fit on a narrow screen.
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Shows a run on the screen and writes it to the logs."""

    def __init__(
        self, cfg: DictConfig, settings: Settings, world: World, say: Callable[[str], None], *, continues: bool = False
    ) -> None:
        """`continues`: the logs there are belong to this run."""
        self.say = say
        self._settings = settings
        self._world = world
        self._bar: tqdm | None = None
        self._live: dict[str, str] = {}
        self._log: RunLog | None = None
        self._is_closed = False
        if world.is_main:
            make_logger = partial(instantiate, cfg.metric_logger, "metric_logger") if cfg.get("metric_logger") else None
            folder = settings.output_dir / "logs"
            self._log = RunLog(folder, cfg, make_logger, continues=continues)
        self._profiler = _make_profiler(cfg)

    def start(self, num_steps: int, steps_done: int) -> None:
        self._profiler.start()
        if self._world.is_main:
            self._bar = tqdm(total=num_steps, initial=steps_done, unit="step", dynamic_ncols=True, bar_format=_BAR)

    def step(self, row: Mapping[str, Any], step: int, histograms: Mapping[str, Sequence[float]] | None = None) -> None:
        """One logged step, and how its losses are spread (see DetailedMetricsTracker.loss_histograms)."""
        if self._log is None:
            return
        self._log.log({**row, **self._memory()}, step, histograms)
        self._live["loss"] = f"{row['loss']:.3f}"
        for group in ("reasoning", "tool_call"):
            perplexity = row.get(metric_name("train", group, "perplexity", self._settings.metric_names))
            if perplexity is not None:
                self._live[f"{CLASSES[group].title} ppl"] = f"{perplexity:.4g}"
        self._live["tokens/s"] = tqdm.format_sizeof(row["tokens_per_second_per_gpu"] * self._world.size)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in self._live.items()), refresh=False)
            self._bar.update(step - self._bar.n)

    def validating(self, source: BatchSource, step: int) -> Iterable[list[Batch]]:
        """The validation batches, with a bar of their own."""
        batches: Iterator[list[Batch]] = source.epoch(0)
        if not self._world.is_main:
            return batches
        return tqdm(batches, desc=f"Validating at step {step}", total=num_steps(source), leave=False, delay=1)

    def validated(
        self, row: Mapping[str, Any], step: int, histograms: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        if self._log is None:
            return
        self._log.log(row, step, histograms)
        style = self._settings.metric_names
        parts = [f"loss {row[metric_name('val', 'overall', 'loss', style)]:.3f}"]
        for group in ("reasoning", "tool_call"):
            name = metric_name("val", group, "perplexity", style)
            if name in row:
                parts.append(f"{group.replace('_', ' ')} perplexity {row[name]:.2f}")
        self.say(f"step {step}: validation {', '.join(parts)}")

    def detailed(self, split: str, groups: Groups, step: int) -> None:
        """Numbers per tool and per data source."""
        if self._log is None:
            return
        for by in self._settings.log_by:
            rows = most_frequent(groups, by, self._settings.log_by_top_n)
            if rows:
                self._log.log_table(by, split, rows, step)

    def profile(self) -> None:
        """One training step is over, for the profiler."""
        self._profiler.step()

    def stopped(self, by: str, step: int) -> None:
        """The run was asked to stop, and has saved."""
        self._close()
        self.say(
            f"step {step}: stopped by {by}, with a checkpoint saved. resume_from_checkpoint=auto goes on from there; "
            f"the exit code is {EXIT_STOPPED}."
        )

    def abandon(self) -> None:
        """Something ended the run: keep what was logged."""
        self._close(seconds=5.0)

    def _close(self, seconds: float | None = None) -> None:
        if self._log is None or self._is_closed:
            return
        self._is_closed = True
        if self._bar is not None:
            self._bar.close()
        self._log.close(seconds)

    def finish(self, weights: Path, checkpoints: Path, stalled: float) -> None:
        """Close the logs; show the table of classes and where everything is."""
        self._profiler.stop()
        if self._log is None:
            return
        self._close()
        picture, report = self._log.path.with_name("metrics.png"), self._log.path.with_name("report.html")
        history = History()
        try:
            history = History.read(self._log.path)  # all of it, also what a run that this one continues has logged
            plot_classes(history, picture)
            write_report(self._log.path.parent, history)
        except (OSError, UserError) as error:  # most likely the disk is full; the run itself has succeeded
            print(shown(f"warning: the report is not complete: {error}"), file=sys.stderr)
        for split, title in (("val", "Validation"), ("train", "Training")):
            if history.get(split, "overall", "nll"):
                print(shown(f"\n{title}, first → last\n{class_table(history, split)}"))
                break
        for by in self._settings.log_by:
            if (found := breakdown.latest(self._log.path.parent, by)) is not None:
                split, step, rows = found
                lines = [[printable(cell) for cell in line] for line in breakdown.as_lines(by, rows)]
                print(shown(f"\n{breakdown.title(by, split, step)}\n{aligned(lines)}"))
        print(
            f"\nLogs        {self._log.path}\n"
            f"Config      {self._log.config_path}\n"
            f"Report      {report}\n"
            f"Plot        {picture}\n"
            f"Model       {weights}\n"
            f"Checkpoints {checkpoints}  (training waited {stalled:.1f} s for them)\n"
            f"Next        tensorboard --logdir {self._log.path.parent}  # where that is the metric_logger\n"
            "            tune cp qwen2_5/0.5B_agent_sft my.yaml  # a config to start from with your own data",
            flush=True,
        )

    def _memory(self) -> dict[str, float]:
        if not self._settings.log_peak_memory_stats:
            return {}
        if self._world.device.type == "cuda":
            return training.get_memory_stats(self._world.device)
        return {"peak_memory_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2}  # GiB, on Linux


def _make_profiler(cfg: DictConfig) -> Any:
    """torchtune's profiler as configured; without a `profiler` section, one that does nothing."""
    section = cfg.get("profiler")
    if section is None or not section.get("enabled", True):
        return training.DummyProfiler()
    options = {"_component_": "torchtune.training.setup_torch_profiler", **section}
    if options.get("cuda") and not torch.cuda.is_available():
        options["cuda"] = False
    profiler, _ = instantiate(options, "profiler")
    return profiler
