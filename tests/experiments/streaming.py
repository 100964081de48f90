"""A stream of records against a batch of them: what each knows at the end, at what cost, how soon it knows new tools.

python tests/experiments/streaming.py [--seeds 3] [--work DIR] [--json FILE] [--report FILE]

ToolWorld records of 1,000 tools come one after another, and then those of 200 new ones. A batch run waits for all of
them and trains six epochs; a stream trains on each when it comes and fills the same number of rows from a buffer of
1,000. Data, model, rates and the meaning of exact are those of continual.py. Runs that are done in DIR are not made
again.
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.experiments.continual import EPOCHS, ROWS, TWO, dataset_at, train, versions, write_data  # noqa: E402

OLD, NEW = (phase.name for phase in TWO.phases)
RECORDS = {phase.name: phase.num_train for phase in TWO.phases}
STEPS = EPOCHS * sum(RECORDS.values()) // ROWS
WAYS = (
    "batch 100 %",
    "batch 50 %",
    "stream, reservoir",
    "stream, recent",
    "stream, prioritized",
    "stream, ssis",
    "stream, no replay",
)
_MEASURED_EVERY = 25  # steps
_SHARES = (0.5, 0.9)  # of what batch 100 % knows of the new tools

Curve = list[dict[str, float]]  # step, and the exact calls of OLD and NEW


def ordered(folder: Path, seed: int) -> list[str]:
    """Lines as they arrive: old tools in an order of the seed's, then new ones."""
    draw, lines = random.Random(seed), []
    for phase in (OLD, NEW):
        of_phase = (folder / f"{phase}_train.jsonl").read_text().splitlines(keepends=True)
        draw.shuffle(of_phase)
        lines += of_phase
    return lines


def curve(out: Path) -> Curve:
    """Of a finished run: the held-out calls that were exact, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (out / "logs" / "by_source.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "val":
            found.setdefault(row["step"], {"step": row["step"]})[row["source"]] = row["exact"]
    return [found[step] for step in sorted(found)]


def run(way: str, seed: int, folder: Path, data: Path) -> dict[str, Any]:
    """Train one way, or read what an earlier call left."""
    out = folder / way.replace(" %", "").replace(", ", "_").replace(" ", "_")
    kept = out.with_suffix(".json")
    if not kept.exists():
        lines = ordered(data, seed)
        if way == "batch 50 %":
            lines = random.Random(seed).sample(lines, len(lines) // 2)
        arrived = folder / f"{out.name}.jsonl"
        arrived.write_text("".join(lines))
        common = [
            *dataset_at("dataset_val", *(data / f"{phase}_test.jsonl" for phase in (OLD, NEW))),
            f"run_val_every_n_steps={_MEASURED_EVERY}",
            "save_every_n_steps=null",
        ]
        if way.startswith("batch"):
            config, recipe = "tiny/agent_sft", "agent_sft_distributed"
            overrides = [*dataset_at("dataset", arrived), f"epochs={EPOCHS}"]
        else:
            config, recipe = "tiny/agent_stream", "agent_replay_distributed"
            strategy = {"stream, no replay": "finetune", "stream, ssis": "ssis"}.get(way, "replay")
            keeps = way.removeprefix("stream, ") if strategy == "replay" else "reservoir"
            overrides = [
                f"arrivals={{path: {arrived}, max_steps: {STEPS}, patience_seconds: 1, idle_seconds: 3}}",
                f"continual={{strategy: {strategy}, selection_strategy: {keeps}, buffer_size: 1000, "
                f"replay_ratio: {1 - 1 / EPOCHS:.6f}}}",
            ]
        seconds = train(recipe, config, out, [*overrides, *common], seed)
        found = {"way": way, "seed": seed, "cpu_seconds": round(seconds, 1), "curve": curve(out)}
        kept.write_text(json.dumps(found))
        print(f"seed {seed}, {way}: {found['curve'][-1]}, {seconds:.0f} s", flush=True)
    return json.loads(kept.read_text())


def adapted(run: dict[str, Any], wanted: float) -> float:
    """The rows that are trained, from the first that could be of a new tool, until new tools are known so well."""
    first = STEPS * RECORDS[OLD] // sum(RECORDS.values()) if run["way"].startswith("stream, ") else 0
    if run["way"] == "stream, no replay":
        first = RECORDS[OLD] // ROWS
    steps = [point["step"] for point in run["curve"] if point["step"] > first and point[NEW] >= wanted]
    return (steps[0] - first) * ROWS if steps else math.inf


_TEXT = """# A stream against a batch

Made by `make experiment-streaming` (commit {commit}, torch {torch}, one processor thread).

{old:,} records of old tools arrive, then {new} of new ones: those of [continual.md](continual.md), with its model, its
rate and its meaning of exact. `batch 100 %` waits until all are there and trains {epochs} epochs from scratch,
`batch 50 %` does so with a random half. A stream (`agent_replay_distributed`, `tiny/agent_stream`) sees every record
once, when it comes, and keeps 1,000: five of six rows are replayed, so that it trains as many rows as the whole batch.
`reservoir` keeps all equally likely, `recent` the last; `prioritized` draws what has a high loss; `ssis`, the stream
with a coreset, keeps what its scores say is worth it; `no replay` trains every record once and keeps none. Values are
means over {seeds} seeds, ± the standard deviation between them.

| | records held | rows trained | CPU seconds | old tools: exact | new tools: exact | rows to 50 % | rows to 90 % |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

Rows to 50 % and to 90 % of what `batch 100 %` knows of the new tools at its end count from the first new record for a
stream, and from scratch for a batch, which has to be trained again when tools come; measured every {every} steps of
{rows_per_step} rows; `not reached` where one seed does not come so far. CPU seconds include measuring.

What came out: with 1,000 records held instead of 3,600, and the same number of rows, a stream of uniform replay knows
nine tenths of what the batch knows, of old and of new tools; a batch of half the records knows two thirds. When new
tools come, the stream has half of them after a sixth of the rows that training again takes. With `recent`, 90 % of them
after less than a fifth, at a little of the old ones. Scores (`ssis`) and last losses (`prioritized`) did no
better than chance here, and scoring costs 30 % more time.

![Exact calls by rows trained]({picture})
"""


def write_report(found: dict[str, Any], path: Path) -> None:
    runs = found["runs"]
    seeds = sorted({run["seed"] for run in runs})
    best = {run["seed"]: run["curve"][-1][NEW] for run in runs if run["way"] == WAYS[0]}
    rows = []
    for way in WAYS:
        of_way = [run for run in runs if run["way"] == way]
        if not of_way:
            continue
        last = [run["curve"][-1] for run in of_way]
        held = {"batch 100 %": sum(RECORDS.values()), "batch 50 %": sum(RECORDS.values()) // 2, WAYS[-1]: 0}
        until = [[adapted(run, share * best[run["seed"]]) for run in of_way] for share in _SHARES]
        cells = [
            way,
            f"{held.get(way, 1000):,}",
            f"{_mean([point['step'] * ROWS for point in last]):,.0f}",
            f"{_mean([run['cpu_seconds'] for run in of_way]):.0f}",
            _spread([point[OLD] for point in last]),
            _spread([point[NEW] for point in last]),
            *("not reached" if math.isinf(max(values)) else f"{_mean(values):,.0f}" for values in until),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    picture = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(runs, picture)
    text = _TEXT.format(
        **found["versions"],
        old=RECORDS[OLD],
        new=RECORDS[NEW],
        epochs="six" if EPOCHS == 6 else EPOCHS,
        seeds=len(seeds),
        rows="\n".join(rows),
        every=_MEASURED_EVERY,
        rows_per_step=ROWS,
        picture=picture.name,
    )
    path.write_text(text, encoding="utf-8")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> str:
    mean = _mean(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    return f"{mean:.3f} ± {deviation:.3f}"


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """The mean over seeds of every way's accuracy, by rows trained."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, phase in zip(figure.subplots(1, 2, sharey=True), (OLD, NEW), strict=True):
        for way in WAYS:
            by_step: dict[float, list[float]] = {}
            for run in runs:
                for point in run["curve"] if run["way"] == way else ():
                    by_step.setdefault(point["step"] * ROWS, []).append(point[phase])
            axes.plot(list(by_step), [_mean(values) for values in by_step.values()], label=way, lw=1.3)
        axes.set_title(f"{phase} tools")
        axes.set_xlabel("rows trained")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out calls exact")
    figure.axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "experiment_streaming")
    parser.add_argument("--json", type=Path, default=ROOT / "tests/benchmarks/results/streaming.json")
    parser.add_argument("--report", type=Path, default=ROOT / "docs/experiments/streaming.md")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    data = options.work / "data"
    write_data(TWO, data)
    runs: list[dict[str, Any]] = []
    found = {"versions": versions(), "records": RECORDS, "epochs": EPOCHS, "rows_per_step": ROWS, "runs": runs}
    for seed in range(options.seeds):
        folder = options.work / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        runs += [run(way, seed, folder, data) for way in WAYS]
    options.json.write_text(json.dumps(found, indent=1))
    write_report(found, options.report)


if __name__ == "__main__":
    main()
