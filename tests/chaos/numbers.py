"""Losses and gradients that are no numbers, batches with nothing to train: on one rank or all, in one step or all."""

import json
import math
from functools import partial

from tests.chaos.place import AUTO, LAST_STEP, TWENTY, Job, Place, check_said, resumed
from tests.training_runs import Left, launch

_STEP = 5
_IN_BACKWARD = ("optimizer_in_bwd=True", "clip_grad_norm=null", "gradient_accumulation_steps=1", "batch_size=2")
_UNTRAINED = ("dataset=tests.faulty.dataset", "trusted_components=[tests]", "dataset.fault=untrained")
_ALWAYS = ("dataset.at=1", "dataset.times=1000000")


def jobs(place: Place) -> list[Job]:
    found: list[Job] = []
    for what in ("loss", "gradient"):
        for value in ("nan", "inf", "-inf"):
            found += [partial(_one_step, place, what, value, rank) for rank in (0, 1)]
            found.append(partial(_every_step, place, what, value))
    found += [partial(_one_step, place, "loss", value, 1, *_IN_BACKWARD) for value in ("nan", "inf")]
    found += [partial(_killed_afterwards, place, what) for what in ("loss", "gradient")]
    found += [partial(_untrained_step, place, rank) for rank in (0, 1, -1)]
    found += [partial(_untrained_run, place, rank, options) for rank in (0, -1) for options in ((), _IN_BACKWARD)]
    return found


def _spoil(what: str, value: str, step: int, rank: int) -> dict[str, str]:
    return {"SPOIL": f"{what}:{value}:{step}:{rank}"}


def _name(value: str) -> str:
    return "NaN" if value == "nan" else "Inf"


def _listed(run: Left) -> list[dict]:
    return [json.loads(line) for line in (run.out / "logs" / "nonfinite.jsonl").read_text().splitlines()]


def _losses(run: Left) -> list[float]:
    return [row["loss"] for row in run.rows if "loss" in row]


def _one_step(place: Place, what: str, value: str, rank: int, *options: str) -> None:
    """No update is made, so the model is the same whichever number it was and wherever."""
    fault = f"{_name(value)} in the {what} of a step on rank 0 or 1{', optimizer in backward' if options else ''}"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        run = launch(folder, *TWENTY, *options, env=_spoil(what, value, _STEP, rank))
        assert run.codes == [0, 0], run.output[-3000:]
        check_said(run.output, f"step {_STEP}: the {what} is not finite; the model was not updated", "nonfinite.jsonl")
        reference = launch(folder / "reference", *TWENTY, *options, env=_spoil("loss", "nan", _STEP, 0))
        assert run.digests == reference.digests, "the model is not that of any other step without an update"
        assert run.digests != place.whole(*TWENTY, *options).digests, "nothing was spoiled"
        counts = {row["step"]: row["nonfinite_steps"] for row in run.rows if "loss" in row}
        assert counts == {step: int(step >= _STEP) for step in range(1, LAST_STEP + 1)}, counts
        lines, epoch_row = _listed(run), (_STEP - 1) * 4
        assert {line["step"] for line in lines} == {_STEP} and {line["what"] for line in lines} == {what}
        assert [line["rank"] for line in lines] == ([rank] if what == "loss" else [0, 1])
        if what == "gradient":
            listed = [one for line in lines for one in line["samples"]]
            assert sorted(listed) == sorted(run.samples[(0, epoch_row)]), "other samples than the step's"


def _every_step(place: Place, what: str, value: str) -> None:
    fault = f"{_name(value)} in the {what} of every step: stop after max_nonfinite_steps"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        run = launch(folder, *TWENTY, env=_spoil(what, value, 0, 1))
        assert run.codes == [1, 1], f"{run.codes} {run.output[-2000:]}"
        check_said(run.output, "error: step 3: 3 steps in a row had a loss or gradient that is not finite")
        assert run.rows[-1]["step"] == 3 and run.output.count("error: ") == 1


def _killed_afterwards(place: Place, what: str) -> None:
    """The count, and the model that missed an update, survive a kill."""
    fault = f"kill -9 after a step with NaN in the {what}"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        whole = launch(folder / "whole", *TWENTY, env=_spoil(what, "nan", _STEP, 0))
        run = launch(folder / "run", *TWENTY, AUTO, env=_spoil(what, "nan", _STEP, 0), kill="step:9:1")
        assert run.codes[1] == -9
        resumed(run, *TWENTY, whole=whole)


def _untrained_step(place: Place, rank: int) -> None:
    """One batch, of one rank or of all, in which every token is masked."""
    fault = f"all-masked batches of a step on {'all ranks' if rank == -1 else 'one rank'}"
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        times = ("dataset.at=9", "dataset.times=2")  # step 5, both micro-batches
        run = launch(folder, *TWENTY, *_UNTRAINED, *times, f"dataset.rank={rank}")
        assert run.codes == [0, 0], run.output[-3000:]
        check_said(run.output)
        empty = [row["step"] for row in run.rows if "loss" in row and not math.isfinite(row["loss"])]
        assert empty == ([_STEP] if rank == -1 else []), f"losses that are no numbers at {empty}"
        assert all(row["nonfinite_steps"] == 0 for row in run.rows if "loss" in row)


def _untrained_run(place: Place, rank: int, options: tuple[str, ...]) -> None:
    fault = f"all-masked batches of a run on {'all ranks' if rank == -1 else 'one rank'}"
    fault += ", optimizer in backward" if options else ""
    folder = place.new(fault)
    with place.table.trial(fault, folder):
        run = launch(folder / "run", *TWENTY, *_UNTRAINED, *_ALWAYS, *options, f"dataset.rank={rank}")
        assert run.codes == [0, 0], run.output[-3000:]
        check_said(run.output)
        finite = [math.isfinite(loss) for loss in _losses(run)]
        if rank != -1:
            # In the last step of an epoch, which is short, that rank may be the only one with rows
            assert sum(finite) >= len(finite) - 2, f"{finite}"
            return
        assert not any(finite)
        still = launch(folder / "still", *TWENTY, *options, "optimizer.lr=0.0")
        parameters = [[digests["parameters"] for digests in one.digests] for one in (run, still)]
        assert parameters[0] == parameters[1], "the model has moved"
