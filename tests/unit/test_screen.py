"""What is printed cannot drive a terminal, wherever the text came from."""

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig

from torchtune_agent.data.quarantine import DataReport
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.errors import UserError
from torchtune_agent.metrics import breakdown
from torchtune_agent.metrics.log import RunLog
from torchtune_agent.screen import printable, shown
from torchtune_agent.training.run import say_mistake

HOSTILE = {
    "ESC": "\x1bc",
    "CSI": "\x1b[2J\x1b[1;1H",
    "CSI in one byte": "\x9b31m",
    "OSC": "\x1b]0;owned\x07",
    "hyperlink": "\x1b]8;;http://evil\x1b\\x",
    "BEL": "\x07",
    "BS": "safe\b\b\b\bevil",
    "CR": "safe\revil",
    "bidi override": "\u202egnp.exe",
    "bidi isolate": "\u2066x\u2069",
    "zero width": "a\u200bb",
    "line separator": "a\u2028b",
    "lone surrogate": "\ud800",
    "DEL": "\x7f",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_drives_a_terminal_is_left(name: str) -> None:
    assert printable(HOSTILE[name]).isprintable()
    assert shown(f"one {HOSTILE[name]}\n\ttwo").replace("\n", "").isprintable()


def test_text_that_only_looks_foreign_stays_as_it_is() -> None:
    text = "naïve 東京 русский ½ 👩 \\x1b\nnext line"
    assert shown(text) == text


@pytest.mark.parametrize("name", HOSTILE)
def test_messages_about_data_are_safe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = HOSTILE[name]
    report = DataReport(num_read=1)
    report.leave_out(f"data{hostile}.jsonl:1", BadRecord("wrong_type", f"found {hostile}"), hostile)
    with pytest.raises(UserError) as refused:
        report.check(0.0)
    say_mistake(refused.value)
    printed = capsys.readouterr().err
    assert "wrong_type" in printed and printed.replace("\n", "").isprintable()


def test_files_of_names_from_data_stay_in_the_folder(tmp_path: Path) -> None:
    names = ["../../outside", "/etc/outside", "a/b", "..", "nul\0"]
    logs = tmp_path / "out" / "logs"
    log = RunLog(logs, DictConfig({}))
    for by in breakdown.KINDS:
        log.log_table(by, "val", {name: {"tokens": 1.0, "loss": 1.0, "calls": 1.0} for name in names}, 1)
    log.close()
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        f"out/logs/{name}" for name in ("by_source.jsonl", "by_tool.jsonl", "config.yaml", "metrics.jsonl")
    ]
    rows = [json.loads(line) for line in (logs / "by_tool.jsonl").read_text().splitlines()]
    assert [row["tool"] for row in rows] == names
