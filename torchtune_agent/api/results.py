"""What a run has measured, read from the log that every run writes, whichever process wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torchtune_agent.errors import UserError
from torchtune_agent.metrics.history import History
from torchtune_agent.metrics.names import read_name

LOG = Path("logs") / "metrics.jsonl"


@dataclass(frozen=True)
class EvalResult:
    """A model on held-out data, without sampling: every trained token is predicted from the true ones before it.

    `accuracy` is the share of tokens (of reasoning and of tool calls) that the model finds most likely; `loss` is the
    mean over all trained tokens. `classes` has the metrics of docs/metrics.md for every token class that occurs
    ("reasoning", "tool_call", "call_name", ...); `metrics` has all of them under their logged names.
    """

    accuracy: float
    loss: float
    perplexity: float
    num_tokens: int
    classes: Mapping[str, Mapping[str, float]] = field(repr=False)
    metrics: Mapping[str, float] = field(repr=False)

    @classmethod
    def read(cls, output_dir: Path) -> "EvalResult":
        """The last validation that the run in `output_dir` has logged."""
        found = cls.of(History.read(output_dir / LOG))
        if found is None:
            raise UserError(
                f"{output_dir / LOG}: has no validation with metrics. Leave enable_detailed_metrics as it is (True)."
            )
        return found

    @classmethod
    def of(cls, history: History) -> "EvalResult | None":
        """The last validation of `history`; None where none was made, or nothing of it measured but the loss."""
        metrics = _last(history, "val_")
        if "val_accuracy" not in metrics:
            return None
        classes: dict[str, dict[str, float]] = {}
        for name, value in metrics.items():
            part = read_name(name)
            if part is not None:
                classes.setdefault(part.group, {})[part.metric] = value
        overall = classes["overall"]
        num_tokens = int(overall["num_tokens"])
        return cls(overall["accuracy"], overall["loss"], overall["perplexity"], num_tokens, classes, metrics)


@dataclass(frozen=True)
class TrainingResult:
    """A finished run: its last numbers, and where everything is.

    `final_loss` is the mean training loss of the last step that was logged; `metrics` has the last value of everything
    that was logged of training. `eval` is the last validation, where the run had `eval_data`.
    """

    final_loss: float
    num_steps: int
    metrics: Mapping[str, float] = field(repr=False)
    eval: EvalResult | None
    output_dir: Path
    model_dir: Path  # trained weights, merged: a folder for `transformers`
    adapter_dir: Path | None  # the adapter alone, in peft's format

    @classmethod
    def read(cls, output_dir: Path, model_dir: Path) -> "TrainingResult":
        """Of the run in `output_dir`, whose last weights are in `model_dir`."""
        history = History.read(output_dir / LOG)
        losses = history.curves.get("loss")
        if not losses or not model_dir.is_dir():
            raise UserError(f"output_dir={output_dir}: the run trained nothing: there is no {model_dir} of it.")
        adapter = output_dir / "lora_weights" / model_dir.name
        metrics = {name: curve.values[-1] for name, curve in history.curves.items() if not name.startswith("val_")}
        return cls(
            final_loss=losses.values[-1],
            num_steps=history.last_step,
            metrics=metrics,
            eval=EvalResult.of(history),
            output_dir=output_dir,
            model_dir=model_dir,
            adapter_dir=adapter if adapter.is_dir() else None,
        )


def _last(history: History, prefix: str) -> dict[str, float]:
    """The values of the last row that has such names."""
    curves = {name: curve for name, curve in history.curves.items() if name.startswith(prefix) and curve}
    last = max((curve.steps[-1] for curve in curves.values()), default=0)
    return {name: curve.values[-1] for name, curve in curves.items() if curve.steps[-1] == last}
