"""A coreset run that is killed and goes on: with the selection it began with, to the last bit."""

from pathlib import Path

import pytest

from tests.training_runs import LAST_STEP, Left, launch

pytestmark = pytest.mark.distributed

CORESET = (
    "dataset.num_tasks=90",
    "coreset.strategy=hybrid",
    "coreset.target_size=50%",
    "resume_from_checkpoint=auto",
)


def run(folder: Path, *overrides: str, size: int = 2, kill: str | None = None) -> Left:
    return launch(folder, *CORESET, *overrides, size=size, kill=kill, recipe="agent_coreset_distributed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Left:
    left = run(tmp_path_factory.mktemp("whole"))
    assert left.codes == [0, 0] and "45 of 90 samples by hybrid" in left.output, left.output
    return left


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("resumed")
    killed = run(folder, kill="step:7:0")
    assert -9 in killed.codes and killed.saved[0] == 6, killed.output
    written = (killed.out / "coreset" / "selection.json").stat().st_mtime_ns
    (killed.out / "coreset" / "scores.parquet").unlink()  # nothing is scored again, so nobody misses it
    left = run(folder)
    assert left.codes == [0, 0], left.output
    assert "the one that this run began with" in left.output.split("resuming")[0].rsplit("torchtune_agent", 1)[-1]
    assert (left.out / "coreset" / "selection.json").stat().st_mtime_ns == written
    assert not (left.out / "coreset" / "scores.parquet").exists()
    return left


def test_a_killed_run_ends_as_if_it_had_not_been(whole: Left, resumed: Left) -> None:
    assert resumed.digests == whole.digests and len(whole.digests) == 2
    assert resumed.samples == whole.samples and resumed.rows == whole.rows
    assert whole.rows[-1]["step"] == LAST_STEP


def test_selections_of_one_and_two_ranks_are_the_same_bytes(whole: Left, tmp_path: Path) -> None:
    alone = run(tmp_path, "coreset.only_select=True", size=1)
    assert alone.codes == [0], alone.output
    for name in ("selection.json", "selection.html", "scores.parquet"):
        assert (alone.out / "coreset" / name).read_bytes() == (whole.out / "coreset" / name).read_bytes(), name


def test_another_selection_is_another_run(resumed: Left) -> None:
    selection = resumed.out / "coreset" / "selection.json"
    before = selection.read_bytes()
    refused = run(resumed.folder, "coreset.strategy=random", size=1)
    assert refused.codes == [1] and "(strategy: hybrid → random)" in refused.output
    assert selection.read_bytes() == before
    refused = run(resumed.folder, "coreset.strategy=random", "resume_override=[coreset]", size=1)
    assert refused.codes == [1] and "dataset: 45 samples" in refused.output.split("run with other settings")[-1]
