"""What the runs of the coreset experiment come to: tables in Markdown, a picture, and whether a coreset saves time.

Losses of a seed depend much on what it drew: on the data and the starting weights. So strategies are compared with
random picks of the same number, of the same seed and pool.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torchtune_agent.selection.strategies import DEFAULT

MAIN = "val_loss"
_TITLES = {
    "clean": "Clean",
    "duplicated": "Duplicated: six tenths of the pool are copies of a tenth",
    "corrupted": "Corrupted: a fifth answers another request, or is garbled",
}

_INTRO = """# Which selection is worth what

`make experiment-coreset`: {runs} runs of `agent_coreset_distributed` on ToolWorld, {seeds} seeds, {minutes:.0f} minutes
of one CPU core ({hardware}).

A model of 0.4 million parameters, trained on {warm} other conversations, learns from a pool of {pool}, or from a part
of it that is selected by that model's scores. Validation: {validation} conversations of another split, which shares
neither tasks nor wordings with the pool. Numbers are the validation loss per token, mean ± standard deviation over
seeds; `against random` is the difference to random picks of the same seed, pool and number: below 0 is better.

All runs take one epoch: equal epochs, not equal steps, because a coreset is there to save the steps. Runs of one size
take equally many steps, so strategies are compared at equal cost in steps."""

Row = dict[str, Any]


def mean_and_spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


class Runs:
    """The runs, and what they are compared with."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.pools = list(dict.fromkeys(row["pool"] for row in rows))
        self.strategies = [s for s in dict.fromkeys(row["strategy"] for row in rows) if s != "full"]
        self.shares = sorted({row["share"] for row in rows} - {100})
        self.seeds = sorted({row["seed"] for row in rows})

    def of(self, **which: Any) -> list[Row]:
        return [row for row in self.rows if all(row[key] == value for key, value in which.items())]

    def values(self, measure: str = MAIN, **which: Any) -> list[float]:
        return [row[measure] for row in self.of(**which)]

    def against_random(self, guarded: bool = False, measure: str = MAIN, **which: Any) -> list[float]:
        """Of every run, how much more it has than unguarded random picks of the same seed, pool and share."""
        found = []
        for row in self.of(guarded=guarded, **which):
            if row["strategy"] != "full":
                same = {key: row[key] for key in ("seed", "pool", "share")}
                (other,) = self.values(measure, strategy="random", guarded=False, **same)
                found.append(row[measure] - other)
        return found

    def ranking(self, *, guarded: bool = False) -> list[tuple[str, float, int, int]]:
        """Strategies, the best first: mean difference to (unguarded) random picks, and how often it is less."""
        found = []
        for strategy in self.strategies:
            differences = self.against_random(guarded, strategy=strategy)
            below = sum(value < 0 for value in differences)
            found.append((strategy, statistics.mean(differences), below, len(differences)))
        return sorted(found, key=lambda item: item[1])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def pool_section(runs: Runs, pool: str) -> list[str]:
    full = runs.values(pool=pool, strategy="full")
    before = runs.values("before", pool=pool, strategy="full")
    guard_share = next((row["share"] for row in runs.of(pool=pool, guarded=True)), None)
    head = [
        "strategy",
        *(f"{share} %" for share in runs.shares),
        *(f"{share} %, against random" for share in runs.shares),
    ]
    head += [f"{guard_share} %, guarded", f"{guard_share} %, guarded, against random"] if guard_share else []
    rows = []
    for strategy in runs.strategies:
        cells, own = [f"`{strategy}`"], {"pool": pool, "strategy": strategy}
        cells += [mean_and_spread(runs.values(share=share, guarded=False, **own)) for share in runs.shares]
        cells += [_difference(runs.against_random(share=share, **own)) for share in runs.shares]
        if guard_share:
            cells += [mean_and_spread(runs.values(share=guard_share, guarded=True, **own))]
            cells += [_difference(runs.against_random(share=guard_share, guarded=True, **own))]
        rows.append(cells)
    lines = [f"## {_TITLES[pool]}", ""]
    lines += [f"Before: {mean_and_spread(before)}. All of the pool: {mean_and_spread(full)}.", ""]
    lines += [*table(head, rows), ""]
    if any(runs.values("spoiled", pool=pool)):
        lines += ["Spoiled samples among those picked, of all picked:", ""]
        lines += [*table(["strategy", *(f"{s} %" for s in runs.shares), "guarded"], _spoiled(runs, pool)), ""]
    return lines


def _difference(values: Sequence[float]) -> str:
    if not any(values):
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):+.3f} ± {spread:.3f}"


def _spoiled(runs: Runs, pool: str) -> Iterable[list[str]]:
    for strategy in runs.strategies:
        cells = [f"`{strategy}`"]
        groups = [runs.of(pool=pool, strategy=strategy, share=share, guarded=False) for share in runs.shares]
        for rows in (*groups, runs.of(pool=pool, strategy=strategy, guarded=True)):
            cells.append(f"{sum(row['spoiled'] for row in rows) / max(1, sum(row['samples'] for row in rows)):.0%}")
        yield cells


def overhead(runs: Runs, strategy: str, share: int) -> tuple[list[str], float]:
    """Lines, and the whole time of a coreset as a share of full training's."""
    pool = runs.pools[0]
    picked = {"pool": pool, "strategy": strategy, "share": share, "guarded": False}
    scoring = statistics.mean(runs.values("scoring_seconds", **picked))
    training = statistics.mean(runs.values("seconds", **picked))
    whole = statistics.mean(runs.values("seconds", pool=pool, strategy="full"))
    lines = [
        "## What it costs",
        "",
        f"CPU seconds of whole runs, loading, validation and saving included, clean pool, `{strategy}`, {share} %:",
        "",
        *table(
            ["score and select", f"train {share} %", "together", "train all"],
            [[f"{scoring:.1f}", f"{training:.1f}", f"{scoring + training:.1f}", f"{whole:.1f}"]],
        ),
        "",
    ]
    return lines, (scoring + training) / whole


def ranking_section(runs: Runs) -> list[str]:
    head = ["strategy", "validation loss against random", "less than random"]
    rows, guarded = (
        [[f"`{name}`", f"{mean:+.4f}", f"{below} of {number}"] for name, mean, below, number in found]
        for found in (runs.ranking(), runs.ranking(guarded=True))
    )
    best = []
    for pool in runs.pools:
        for share in runs.shares:
            means = {
                s: statistics.mean(runs.values(pool=pool, strategy=s, share=share, guarded=False))
                for s in runs.strategies
            }
            first, second = sorted(means, key=means.__getitem__)[:2]
            best.append([pool, f"{share} %", f"`{first}` {means[first]:.3f}", f"`{second}` {means[second]:.3f}"])
    return [
        "## Who wins",
        "",
        "Over all pools and sizes, without guard rails:",
        "",
        *table(head, rows),
        "",
        "With guard rails (duplicates removed, or the fifth with the highest loss left out), at one size, against",
        "random picks without:",
        "",
        *table(head, guarded),
        "",
        *table(["pool", "size", "best", "second"], best),
        "",
    ]


def picture(runs: Runs, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs.pools), figsize=(4.2 * len(runs.pools), 3.6), sharey=True, squeeze=False)
    for axis, pool in zip(axes[0], runs.pools, strict=True):
        for strategy in runs.strategies:
            means = [
                statistics.mean(runs.values(pool=pool, strategy=strategy, share=share, guarded=False))
                for share in runs.shares
            ]
            style = {"color": "black", "linestyle": "--"} if strategy == "random" else {}
            axis.plot(runs.shares, means, marker="o", markersize=4, linewidth=1.4, label=strategy, **style)
        axis.axhline(statistics.mean(runs.values(pool=pool, strategy="full")), color="grey", linewidth=1, label="all")
        axis.set(title=pool, xlabel="% of the pool", xticks=runs.shares)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation loss")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def write_report(found: dict[str, Any], folder: Path | None) -> int:
    """Print the report, and write it and its picture to `folder`. The exit status: 1 where a coreset saves no time."""
    runs = Runs(found["runs"])
    best = runs.ranking()[0][0]
    cost, ratio = overhead(runs, DEFAULT, 30)
    sizes = found["sizes"]
    intro = _INTRO.format(
        runs=len(runs.rows),
        minutes=found["cpu_seconds"] / 60,
        hardware=found["hardware"],
        **sizes,
    )
    lines = [
        *intro.splitlines(),
        "",
        "![Validation loss by size, pool and strategy](coreset.png)",
        "",
        *ranking_section(runs),
    ]
    for pool in runs.pools:
        lines += pool_section(runs, pool)
    lines += [*cost, f"A coreset takes {ratio:.2f} of the time of training on all.", ""]
    print("\n".join(lines))
    print(f"best over all: {best}, the default is {DEFAULT}; a coreset takes {ratio:.2f} of the time, target < 1")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "coreset.md").write_text("\n".join(lines), encoding="utf-8")
        picture(runs, folder / "coreset.png")
    return 0 if ratio < 1 else 1
