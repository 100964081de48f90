"""What the config says of a stream: phases by name, and mistakes in them."""

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from torchtune_agent.continual.run import take_stream
from torchtune_agent.errors import UserError


def config(**changes: Any) -> DictConfig:
    phases = {
        name: {"dataset": {"num": i}, "dataset_val": {"num": -i}} for i, name in enumerate(["one", "two", "three"])
    }
    made = OmegaConf.create({"stream": ["three", "one"], "phases": phases, "epochs": 1, **changes})
    assert isinstance(made, DictConfig)
    return made


def test_phases_become_data_sets_in_the_streams_order() -> None:
    cfg = config(continual={"strategy": "ewc", "ewc_strength": 3})
    stream = take_stream(cfg)
    assert stream.names == ["three", "one"] and stream.settings.ewc_strength == 3.0
    assert OmegaConf.to_container(cfg) == {
        "epochs": 1,
        "dataset": [{"num": 2}, {"num": 0}],
        "dataset_val": [{"num": -2}, {"num": 0}],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": ["one"]}, "must be a list of two names or more"),
        ({"stream": ["one", "two", "one"]}, "names a phase twice"),
        ({"stream": ["one", "tow"]}, "there is no 'tow' under 'phases'. Did you mean 'two'"),
        ({"phases": {"three": {"dataset": {}}, "one": {}}}, "phases.three: must have dataset and dataset_val"),
        ({"continual": {"strategy": "reply"}}, "continual.strategy='reply': input should be 'finetune', 'replay'"),
        ({"continual": {"bufer": 1}}, "continual.bufer=1: extra inputs are not permitted"),
        ({"epochs": 2}, "Set continual.epochs_per_phase"),
        ({"max_steps_per_epoch": 5}, "Set continual.epochs_per_phase"),
        ({"optimizer_in_bwd": True, "continual": {"strategy": "replay+ewc"}}, "does not go with elastic weights"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        take_stream(config(**changes))
