"""What the config says of a stream, mistakes in it, and the buffer that an earlier run left."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from torchtune_agent.continual import ReplayBuffer
from torchtune_agent.continual.carried import make_buffer, write_buffer
from torchtune_agent.continual.config import ContinualSettings, take_stream
from torchtune_agent.continual.cutting import Cut
from torchtune_agent.continual.run import check_disjoint
from torchtune_agent.data.joined import JoinedDataset, SampleInfo
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
    assert OmegaConf.to_container(cfg.dataset) == [{"num": 2}, {"num": 0}]
    assert OmegaConf.to_container(cfg.dataset_val) == [{"num": -2}, {"num": 0}]
    assert take_stream(cfg) == stream  # a config that was completed, as the logs keep it, is the same config
    carried_on = config(stream=["two"], continual={"replay_from": "somewhere"})
    assert take_stream(carried_on).names == ["two"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": ["one"]}, "must be a list of two names or more"),
        ({"stream": ["one", "two", "one"]}, "names a phase twice"),
        ({"stream": ["one", "tow"]}, "there is no 'tow' under 'phases'. Did you mean 'two'"),
        ({"phases": {"three": {"dataset": {}}, "one": {}}}, "phases.three: must have dataset and dataset_val"),
        ({"continual": {"strategy": "reply"}}, "continual.strategy='reply': input should be 'finetune', 'replay'"),
        ({"continual": {"bufer": 1}}, "continual.bufer=1: extra inputs are not permitted"),
        ({"continual": {"replay_ratio": 1.0}}, "replay_ratio=1.0: must be 0 or more and less than 1"),
        ({"continual": {"replay_ratio": -0.1}}, "replay_ratio=-0.1: must be 0 or more"),
        ({"continual": {"selection_strategy": "resevoir"}}, "no such strategy. Did you mean 'reservoir'"),
        ({"continual": {"selection_strategy": "ssis"}}, "set continual.strategy=ssis"),
        ({"continual": {"buffer_size": 0}}, "continual.buffer_size=0: must be at least 1"),
        ({"epochs": 2}, "Set continual.epochs_per_phase"),
        ({"max_steps_per_epoch": 5}, "Set continual.epochs_per_phase"),
        ({"continual": {"highest_replay_ratio": 0.5}}, "only arrivals have a ratio that follows"),
        ({"stream": {"cut_by": "tool"}}, "or have cut_by .time or tool. and num_phases"),
        ({"stream": {"cut_by": "colour", "num_phases": 3}}, "stream.cut_by='colour': input should be 'time' or 'tool'"),
        ({"stream": {"cut_by": "time", "num_phases": 1}}, "stream.num_phases=1: must be at least 2"),
        ({"stream": {"cut_by": "time", "num_phases": 3}}, "phases: not read where stream cuts one dataset"),
        ({"stream": {"cut_by": "time", "num_phases": 3}, "phases": {}}, "dataset: not given"),
        ({"optimizer_in_bwd": True, "continual": {"strategy": "replay+ewc"}}, "does not go with elastic weights"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        take_stream(config(**changes))


class Tokens:
    """Samples with these numbers as tokens."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": [self.numbers[index], 1], "labels": [-100, 1]}


def test_phases_that_share_samples_are_refused() -> None:
    apart = JoinedDataset({"old": Tokens(1, 2, 2), "new": Tokens(3)})
    check_disjoint(apart, dict(zip(["old", "new"], apart.parts, strict=True)))
    meeting = JoinedDataset({"old": Tokens(1, 2), "new": Tokens(3, 2)})
    with pytest.raises(UserError, match=r"'old' and 'new' share samples: old\[1\] and new\[1\] are the same"):
        check_disjoint(meeting, dict(zip(["old", "new"], meeting.parts, strict=True)))


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_buffer_is_found_where_a_run_left_it(tmp_path: Path, given: str) -> None:
    left = ReplayBuffer(4, seed=11)
    for number in range(9):
        left.offer({"tokens": [number]})
    write_buffer(left, tmp_path)
    path = tmp_path if given == "folder" else tmp_path / "continual" / "replay_buffer.pt"
    found = make_buffer(ContinualSettings(buffer_size=4, replay_from=path), seed=5, rank=0)
    assert found.samples() == left.samples() and found.num_offered == 9
    for buffer in (left, found):  # the stream goes on with the seed it began with
        for number in range(9, 40):
            buffer.offer({"tokens": [number]})
    assert found.samples() == left.samples()
    smaller = make_buffer(ContinualSettings(buffer_size=3, replay_from=path), seed=5, rank=0)
    assert len(smaller) == 3


def test_a_buffer_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no buffer")
    for path, message in ((tmp_path, "is no run with a replay buffer"), (tmp_path / "text", "cannot be loaded")):
        with pytest.raises(UserError, match=message):
            make_buffer(ContinualSettings(replay_from=path), seed=0, rank=0)
    write_buffer(ReplayBuffer(4), tmp_path)
    with pytest.raises(UserError, match="its buffer is empty"):
        make_buffer(ContinualSettings(replay_from=tmp_path), seed=0, rank=0)
    with pytest.raises(UserError, match="saved with strategy=reservoir, and this one has strategy=tool_balanced"):
        make_buffer(ContinualSettings(replay_from=tmp_path, selection_strategy="tool_balanced"), seed=0, rank=0)


class Calls(Tokens):
    """Samples that call the tool of their number's last digit."""

    def info(self, index: int) -> SampleInfo:
        return SampleInfo(f"line {index}", "calls", (f"tool_{self.numbers[index] % 10}",))


def test_one_data_set_is_cut_by_time_or_by_tool() -> None:
    train = JoinedDataset({"train": Calls(13, 24, 33, 45, 54, 66, 73)})
    test = JoinedDataset({"test": Calls(4, 3, 9, 6, 5)})
    said: list[str] = []
    by_time = Cut(cut_by="time", num_phases=2).parts(train, test, said.append)
    assert by_time == ([[0, 1, 2, 3], [4, 5, 6]], [[0, 1, 2], [3, 4]]) and not said
    by_tool = Cut(cut_by="tool", num_phases=2).parts(train, test, said.append)  # tools 3 and 4, then 5 and 6
    assert by_tool == ([[0, 1, 2, 4, 6], [3, 5]], [[0, 1], [3, 4]])
    assert said[0].endswith("1 samples of dataset_val call tools that dataset does not, and are left out")
    with pytest.raises(UserError, match="dataset_val has no samples for phase_6. Make fewer phases"):
        Cut(cut_by="time", num_phases=6).parts(train, test, said.append)
