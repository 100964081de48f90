"""Training in the order of a curriculum, by the real recipe: what is easy comes first, and a killed run goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training_runs import Left, launch
from torchtune_agent.selection.scores import read_pool

pytestmark = pytest.mark.distributed

PACED = (
    "curriculum.by=loss",
    "curriculum.score_on=tool_call",
    "curriculum.start_share=0.5",
    "curriculum.rescore_every_n_steps=4",
    "resume_from_checkpoint=auto",
)


def run(folder: Path, *overrides: str, size: int = 2, kill: str | None = None) -> Left:
    return launch(folder, *PACED, *overrides, size=size, kill=kill, recipe="agent_coreset_distributed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Left:
    left = run(tmp_path_factory.mktemp("whole"))
    assert left.codes == [0, 0], left.output
    return left


def test_the_easiest_by_the_model_s_own_loss_come_first(whole: Left) -> None:
    assert sorted(path.name for path in (whole.out / "curriculum").iterdir()) == ["step_0", "step_4", "step_8"]
    pool = read_pool(whole.out / "curriculum" / "step_0" / "scores.parquet")
    loss = np.nan_to_num(pool.loss("tool_call"), nan=-1.0)
    easiest = [pool.ids[row] for row in np.argsort(loss, kind="stable")]
    first = [name for (epoch, row), names in whole.samples.items() if epoch == 0 and row < 32 for name in names]
    assert len(first) == 32 and set(first) == set(easiest[:32])
    assert not (whole.out / "coreset").exists()


def test_a_killed_run_ends_as_if_it_had_not_been(whole: Left, tmp_path: Path) -> None:
    killed = run(tmp_path, kill="step:8:1")
    assert -9 in killed.codes and killed.saved[0] == 6, killed.output
    left = run(tmp_path)
    assert left.codes == [0, 0], left.output
    assert left.digests == whole.digests and left.samples == whole.samples and left.rows == whole.rows


def test_another_recipe_does_not_train_as_if_the_section_were_not_there(tmp_path: Path) -> None:
    left = launch(tmp_path, "curriculum.by=length", size=1)
    assert left.codes == [1]
    assert "curriculum: agent_sft_distributed does not read this section; agent_coreset_distributed does" in left.output


def means_of_calls(ledger: list[dict[str, Any]]) -> dict[str, float]:
    """The loss of every sample on its calls when it was last trained; -1 where it has none."""
    lines: dict[str, dict[str, tuple[int, float]]] = {}
    for line in ledger:  # by step: what is newest stays
        lines.setdefault(line["sample"], {})[line["token_class"]] = (line["tokens"], line["loss"])
    means = {}
    for sample, classes in lines.items():
        own = [classes[name] for name in ("call_syntax", "call_name", "arg_name", "arg_value") if name in classes]
        means[sample] = sum(n * loss for n, loss in own) / sum(n for n, _ in own) if own else -1.0
    return means


def test_a_ledger_of_a_run_gives_the_first_order(whole: Left, tmp_path: Path) -> None:
    source = f"curriculum.scores_from={whole.out / 'logs' / 'sample_losses'}"
    left = run(tmp_path, source, "curriculum.rescore_every_n_steps=null", "epochs=1", size=1)
    assert left.codes == [0] and not (left.out / "curriculum").exists(), left.output
    means = means_of_calls(whole.ledger)
    trained = [name for names in left.samples.values() for name in names]
    values = [means[name] for name in trained]
    assert len(set(trained)) == 45 and values == sorted(values)


def test_a_ledger_of_a_run_gives_a_coreset(whole: Left, tmp_path: Path) -> None:
    options = ("strategy=loss_topk", "score_on=tool_call", "target_size=9", "only_select=True")
    source = f"coreset.scores_from={whole.out / 'logs' / 'sample_losses'}"
    left = launch(tmp_path, source, *(f"coreset.{one}" for one in options), size=1, recipe="agent_coreset_distributed")
    assert left.codes == [0], left.output
    chosen = json.loads((left.out / "coreset" / "selection.json").read_text())["selected"]
    means = means_of_calls(whole.ledger)
    assert {one["id"] for one in chosen} == set(sorted(means, key=lambda name: -means[name])[:9])
    assert not (left.out / "coreset" / "scores").exists()
