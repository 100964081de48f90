"""What saving a checkpoint costs training, as a share of a step: written at once, and in the background.

    python tests/benchmarks/bench_checkpoint.py [--quick] [--json PATH]

Real runs of the recipe on two CPU processes, which log how long training waited (`checkpoint_stall_seconds`). A step
of so small a model is short, so the shares are far above those of a real run; the rates of the disk and of hashing are
what carries over: the size of a checkpoint stands beside them.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.training_runs import launch  # noqa: E402
from torchtune_agent.metrics import read_rows  # noqa: E402

EVERY = 4


def measure(folder: Path, *, width: int, layers: int, steps: int, background: bool) -> dict[str, float]:
    """Median seconds of a step without saving, of the wait for a checkpoint, and a checkpoint's size."""
    run = launch(
        folder,
        f"model.embed_dim={width}",
        f"model.intermediate_dim={3 * width}",
        f"model.num_layers={layers}",
        "dataset.num_tasks=200",
        "epochs=1",
        f"max_steps_per_epoch={steps}",
        f"save_every_n_steps={EVERY}",
        "run_val_every_n_steps=1000",
        "log_sample_losses=False",
        "log_by=[]",
        f"enable_async_checkpointing={background}",
        limit=600,
    )
    if run.codes != [0, 0]:
        raise SystemExit(run.output)
    rows = [row for row in read_rows(run.out / "logs" / "metrics.jsonl") if "loss" in row]
    waited = [row["checkpoint_stall_seconds"] for row in rows if "checkpoint_stall_seconds" in row]
    plain = [
        after["time"] - before["time"]
        for before, after in zip(rows, rows[1:], strict=False)
        if "checkpoint_stall_seconds" not in after
    ]
    size = sum(path.stat().st_size for path in (run.out / "checkpoints" / f"step_{steps}").rglob("*") if path.is_file())
    return {"step": statistics.median(plain), "wait": statistics.median(waited), "megabytes": size / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and few steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = {"width": 128, "layers": 2, "steps": 12} if options.quick else {"width": 512, "layers": 8, "steps": 24}
    results = {}
    for name, background in (("at once", False), ("in the background", True)):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), background=background, **shape)
        results[name] = found
        print(
            f"{name:18}  checkpoint {found['megabytes']:7.1f} MB  step {found['step'] * 1e3:7.1f} ms  "
            f"training waits {found['wait'] * 1e3:7.1f} ms = {found['wait'] / found['step']:.2f} steps",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
