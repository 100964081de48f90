"""The experiment's numbers as a page and a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ORDER = ("joint", "finetune", "replay", "replay_half", "ewc", "replay+ewc", "ssis")
_BASELINE = "finetune"
_KEPT, _MORE = 0.9, 0.3
_TEXT = """# Old tools, then new ones: what is left

Made by `make experiment-continual` (commit {commit}, torch {torch}, one processor thread).

A two-layer model of half a million parameters learns from scratch to answer requests by one call each. The prompt
lists no tools, so which tool a request means and how its arguments are called must be in the weights. Accuracy is the
share of held-out calls of which every token would be written, given the tokens before it. Every run is
`agent_replay_distributed` (`joint`: `agent_sft_distributed` on all phases' records at once, each as often as in the
stream). Values are means over {seeds} seeds, ± the standard deviation between them. Extra steps are against `finetune`:
of the whole run, and of the phases after the first, where replay and elastic weights work.

Records have short arguments (at most three tokens), as copying long ones is what such a model learns last; so not every
tool of a phase has records. The learning rate is constant after a warm-up. All strategies but `ssis`, which looks at
samples as they come, go on from the same first phase of their seed. `ewc_strength` was chosen between powers of ten
with seed 0 of each stream, and `replay_half` was added when seed 0 had shown that `replay` is too little; nothing else
was tuned. Tool names are learned before values are copied, which phases share, so `exact names` shows forgetting apart
from that.

Why the five phases fall short of `joint` at 30 % more steps: not by forgetting. Backward transfer is how much an
earlier phase changed from its own end to the end of all, and with replay it is above 0. A phase of 400 records is over
before its tools are learned (with `replay` 0.01, 0.14, 0.28 and 0.43 of calls are exact as each of the first four
ends), and 0.23 of the rows are too few to go on learning them, where `joint` goes over all of them to the last. Half
of the rows are enough.

Elastic weights alone kept nothing there at any strength: 1,000 and more kept the model from learning new tools, 100 and
less let the old ones go. They hold what a first phase has taught, and here that is next to nothing.

Replaying logits instead of labels (dark experience replay) was tried in a loop of its own
(`tests/experiments/replay_targets.py`, two phases, 3 seeds) and left out of the recipe, as it is not worth its room:

| replay_ratio | replayed towards | old tools: exact calls | new tools: exact calls |
| --- | --- | --- | --- |
| 0.23 | labels | 0.572 ± 0.034 | 0.647 ± 0.047 |
| 0.23 | logits | 0.544 ± 0.015 | 0.645 ± 0.031 |
| 0.23 | half of each | 0.570 ± 0.028 | 0.662 ± 0.052 |
| 0.23 | both | 0.449 ± 0.007 | 0.612 ± 0.020 |
| 0.5 | labels | 0.637 ± 0.023 | 0.678 ± 0.014 |
| 0.5 | logits | 0.624 ± 0.028 | 0.687 ± 0.049 |
| 0.5 | half of each | 0.661 ± 0.016 | 0.682 ± 0.019 |
| 0.5 | both | 0.627 ± 0.029 | 0.665 ± 0.082 |
"""


def write_report(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = {name: stream for name, stream in found["streams"].items() if stream["runs"]}
    seeds = max(len({run["seed"] for run in stream["runs"]}) for stream in streams.values())
    parts = [_TEXT.format(seeds=seeds, **found["versions"])]
    for name, stream in streams.items():
        parts.append(_section(name, stream))
    picture = path.with_suffix(".png")
    plot(streams, picture)
    parts.append(f"![Accuracy on every phase's tools after the last phase]({picture.name})\n")
    path.write_text("\n".join(parts), encoding="utf-8")


def _section(name: str, stream: dict[str, Any]) -> str:
    phases = stream["phases"]
    made = "; ".join(
        f"`{p['name']}`: {p['num_train']} records to train on and {p['num_test']} to test on, of "
        f"{p['tools_in_records']} tools among the {p['num_tools']} from number {p['first_tool']} on"
        for p in phases
    )
    settings = (
        f"{stream['epochs']} epochs a phase, {stream['rows_per_step']} rows a step, a buffer of "
        f"{stream['buffer_size']} samples, replay_ratio {stream['replay_ratio']} (`replay_half`: 0.5), "
        f"ewc_strength {stream['ewc_strength']:g}."
    )
    head = ["strategy", *(f"{column}" for column in _columns(phases)), "extra steps, run", "extra steps, later phases"]
    rows = [_row(strategy, stream) for strategy in _ORDER if _runs(stream, strategy)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])
    return f"## {name[0].upper()}{name[1:]}\n\n{made}. {settings}\n\n{table}\n\n{_verdict(stream)}\n"


def _verdict(stream: dict[str, Any]) -> str:
    """Whether replay does what was hoped for."""
    lines = [
        "Hoped for: replay keeps at least 90 % of what `joint` knows of earlier tools, at 30 % more steps or less."
    ]
    for strategy in ("replay", "replay_half", "replay+ewc"):
        shares, extra = _kept(strategy, stream), _extra(strategy, stream)[0]
        if shares:
            comes_out = _mean(shares) >= _KEPT and _mean(extra) <= _MORE
            of_each = ", ".join(f"{share:.0%}" for share in shares)
            lines.append(
                f"- `{strategy}` keeps {_mean(shares):.0%} (by seed: {of_each}) at {_mean(extra):.0%} more steps of "
                f"the run: {'it comes out' if comes_out else 'it does not come out'}."
            )
    forgot = _kept(_BASELINE, stream)
    if forgot:
        lines.append(f"- Without replay, `{_BASELINE}` keeps {_mean(forgot):.0%}.")
    return "\n".join(lines)


def _kept(strategy: str, stream: dict[str, Any]) -> list[float]:
    """Of every seed, the share of joint training's accuracy on earlier phases that is left."""
    phases = stream["phases"]
    joint = {run["seed"]: earlier(run, "exact", phases) for run in _runs(stream, "joint")}
    return [
        earlier(run, "exact", phases) / joint[run["seed"]] for run in _runs(stream, strategy) if run["seed"] in joint
    ]


def _extra(strategy: str, stream: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Of every seed, steps beyond those of the baseline: as a share of the run, and of the phases after the first."""
    first = stream["epochs"] * math.ceil(stream["phases"][0]["num_train"] / stream["rows_per_step"])
    base = {run["seed"]: run["steps"] for run in _runs(stream, _BASELINE)}
    pairs = [(run["steps"], base[run["seed"]]) for run in _runs(stream, strategy) if run["seed"] in base]
    return [a / b - 1 for a, b in pairs], [(a - first) / (b - first) - 1 for a, b in pairs]


def _columns(phases: Sequence[dict[str, Any]]) -> list[str]:
    names = ["old tools", "new tools"] if len(phases) == 2 else ["earlier phases", "last phase"]
    measured = [f"{names[0]}: exact calls", "of joint", f"{names[0]}: exact names", f"{names[1]}: exact calls"]
    return [*measured, "backward transfer"]


def _runs(stream: dict[str, Any], strategy: str) -> list[dict[str, Any]]:
    return [run for run in stream["runs"] if run["strategy"] == strategy]


def earlier(run: dict[str, Any], metric: str, phases: Sequence[dict[str, Any]]) -> float:
    """The mean over all phases but the last."""
    values = [run[metric][phase["name"]] for phase in phases[:-1]]
    return sum(values) / len(values)


def _row(strategy: str, stream: dict[str, Any]) -> list[str]:
    runs, phases = _runs(stream, strategy), stream["phases"]
    last = phases[-1]["name"]
    old = [earlier(run, "exact", phases) for run in runs]
    shares = _kept(strategy, stream)
    names = [earlier(run, "name_exact", phases) for run in runs]
    new = [run["exact"][last] for run in runs]
    whole, later = _extra(strategy, stream)
    extra = ["", ""] if strategy == "joint" else [_share(_mean(whole)), _share(_mean(later))]
    transfer = [run["matrix"]["summary"]["backward_transfer"] for run in runs if "matrix" in run]
    back = f"{_mean(transfer):+.3f}" if transfer else ""
    return [f"`{strategy}`", _spread(old), _share(_mean(shares)), _spread(names), _spread(new), back, *extra]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _spread(values: Sequence[float]) -> str:
    mean = _mean(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    return f"{mean:.3f} ± {deviation:.3f}"


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0%}"


def plot(streams: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(streams), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(streams), squeeze=False)[0]
    for axes, (name, stream) in zip(all_axes, streams.items(), strict=True):
        strategies = [strategy for strategy in _ORDER if _runs(stream, strategy)]
        phases = [phase["name"] for phase in stream["phases"]]
        width = 0.8 / len(phases)
        for j, phase in enumerate(phases):
            values = [[run["exact"][phase] for run in _runs(stream, strategy)] for strategy in strategies]
            places = [i + (j - (len(phases) - 1) / 2) * width for i in range(len(strategies))]
            low = [_mean(v) - min(v) for v in values]
            high = [max(v) - _mean(v) for v in values]
            axes.bar(
                places, [_mean(v) for v in values], width * 0.9, yerr=[low, high], label=phase, error_kw={"lw": 0.7}
            )
        axes.set_xticks(range(len(strategies)), strategies)
        axes.set_title(name)
        axes.set_ylabel("calls exact, after the last phase")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="tested on", frameon=False, fontsize="small", loc=(1, 0.6))
    figure.savefig(path, dpi=110)
