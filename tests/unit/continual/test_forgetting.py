"""The forgetting matrix: numbers by hand, table, files."""

import json
from pathlib import Path

import pytest

from torchtune_agent.continual.forgetting import ForgettingMatrix, summary, table, write
from torchtune_agent.errors import UserError

MATRIX = ForgettingMatrix(
    ["old", "newer", "new"],
    [[0.8, 0.2, 0.1], [0.9, 0.7, 0.3], [0.5, 0.6, 0.4]],
    before=[0.0, 0.1, 0.1],
)


def test_numbers_are_those_worked_out_by_hand() -> None:
    assert summary(MATRIX) == pytest.approx(
        {
            "average_score": (0.5 + 0.6 + 0.4) / 3,
            "backward_transfer": ((0.5 - 0.8) + (0.6 - 0.7)) / 2,
            "forward_transfer": ((0.2 - 0.1) + (0.3 - 0.1)) / 2,
            "forgetting": ((0.9 - 0.5) + (0.7 - 0.6)) / 2,
        }
    )


def test_a_run_under_way_has_the_numbers_of_its_trained_phases() -> None:
    first = summary(ForgettingMatrix(MATRIX.phases, MATRIX.scores[:1]))
    assert first == {"average_score": 0.8, "backward_transfer": None, "forward_transfer": None, "forgetting": None}
    second = summary(ForgettingMatrix(MATRIX.phases, MATRIX.scores[:2], MATRIX.before))
    assert second["average_score"] == pytest.approx(0.8)
    assert second["forgetting"] == pytest.approx(-0.1)  # the old phase was learned better


def test_files_and_table(tmp_path: Path) -> None:
    write(MATRIX, tmp_path / "run")
    content = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    assert ForgettingMatrix.from_json(content) == MATRIX
    assert content["summary"]["forgetting"] == pytest.approx(0.25)
    assert (tmp_path / "run" / "forgetting.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = table(MATRIX).splitlines()
    assert lines[0].split() == ["trained", "up", "to", "old", "newer", "new"]
    assert lines[4].split() == ["new", "0.500", "0.600", "0.400"]
    assert "backward transfer -0.200" in lines
    assert len({len(line) for line in lines[:5]}) == 1


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="2 phases need from 1 to 2 rows of 2 scores"):
        ForgettingMatrix(["a", "b"], [[0.1]])
