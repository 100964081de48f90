"""The sentences on where learning stands say what the rows say."""

import math
from typing import Any

import pytest

from tests import logged_run
from torchtune_agent.metrics.findings import findings
from torchtune_agent.metrics.history import History


def validated(**last: tuple[float, int]) -> dict[str, Any]:
    """A validation row with these losses and numbers of tokens."""
    groups = {group: (nll, nll, count) for group, (nll, count) in last.items()}
    return {"step": 10} | logged_run.class_metrics("val", 1.0, groups)


OVERALL = {"overall": (1.0, 100), "reasoning": (1.0, 50)}


def test_a_whole_run() -> None:
    assert findings(History(logged_run.rows(100))) == [
        "In tool calls, argument values are the bottleneck: 61% of the loss in 18% of the tokens "
        "(validation loss 4.42 a token, accuracy 1%).",
        "Learned most since the first measurement: call syntax (loss −98%); least: argument values (−28%).",
        "Validation loss is at its lowest: 2.134, from 5.133 at step 10.",
        "Training loss is falling: 2.228 on average in the third quarter of the run, 2.065 in the last.",
    ]


def test_the_bottleneck_is_where_most_of_the_loss_is_and_the_hardest_is_named_beside_it() -> None:
    row = validated(**OVERALL, call_syntax=(0.5, 60), call_name=(0.03, 10), arg_value=(2.0, 5))
    first, second, *_ = findings(History([row]))
    assert first.startswith("In tool calls, call syntax is the bottleneck: 74% of the loss in 80% of the tokens")
    assert first.endswith("Hardest token for token are argument values: 2.00.")
    assert second == "Right at least 95% of the time: tool names (97.0%)."


def test_a_class_that_the_last_row_lacks_is_not_spoken_of() -> None:
    early = validated(**OVERALL, call_syntax=(0.5, 60), arg_name=(9.0, 50), arg_value=(2.0, 5)) | {"step": 5}
    late = validated(**OVERALL, call_syntax=(0.5, 60), arg_value=(2.0, 5))
    assert "argument names" not in " ".join(findings(History([early, late])))


@pytest.mark.parametrize("names", [("call_syntax",), ()])
def test_without_parts_to_compare_there_is_no_bottleneck(names: tuple[str, ...]) -> None:
    row = validated(**OVERALL, **dict.fromkeys(names, (0.5, 60)))
    assert not [sentence for sentence in findings(History([row])) if "bottleneck" in sentence]


def test_training_speaks_where_nothing_was_validated() -> None:
    sentences = findings(History(logged_run.rows(20, val_every=1000)))
    assert "(training loss 4.42 a token" in sentences[0]


def test_a_validation_loss_that_rises_again_is_told() -> None:
    history = History({"step": step, "val_loss": loss} for step, loss in ((10, 2.0), (20, 1.5), (30, 1.75)))
    assert findings(history) == ["Validation loss was lowest at step 20 (1.500); it is 1.750 at step 30."]


@pytest.mark.parametrize(
    ("slope", "verdict"), [(-0.05, "is falling"), (0.05, "is rising"), (0.001, "has not clearly changed")]
)
def test_the_trend_is_told_from_the_noise(slope: float, verdict: str) -> None:
    history = History({"step": i, "loss": 5 + slope * i + (i * 7919 % 13) / 13} for i in range(1, 65))
    (sentence,) = findings(history)
    assert sentence.startswith(f"Training loss {verdict}: ")


def test_what_is_not_finite_comes_first() -> None:
    rows = [{"step": step, "loss": math.nan if step > 2 else 1.0, "grad_norm": math.inf} for step in range(1, 5)]
    assert findings(History(rows)) == [
        "grad_norm is not finite, first at step 1. 1 more has such values. They are gaps in the charts, marked ×."
    ]


def test_nothing_logged_says_nothing() -> None:
    assert findings(History()) == [] and findings(History([{"step": 1, "loss": 1.0}])) == []
