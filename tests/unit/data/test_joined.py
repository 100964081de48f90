"""Several data sets as one, and the names their samples go by."""

import json

import numpy as np
import pytest

from tests import tokenizers
from torchtune_agent.data import AgentSFTDataset, Collator, SampleLoader, StepPlan
from torchtune_agent.data.joined import JoinedDataset, SampleInfo

QUESTION = {"role": "user", "content": "hi"}
CALLS = "<function=add><parameter=a>1</parameter></function> <function=né><parameter=b>2</parameter></function>"


@pytest.fixture
def ours(tmp_path) -> AgentSFTDataset:
    rows = [
        {"messages": [QUESTION, {"role": "assistant", "content": CALLS}], "source": "web"},
        {"messages": [QUESTION, {"role": "assistant", "content": "no call"}]},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return AgentSFTDataset(tokenizers.chat_template(tmp_path), data_files=str(path))


def foreign(size: int) -> list[dict]:
    return [{"tokens": [1, 2, 3], "labels": [-100, 2, 3]}] * size


def test_samples_keep_their_order_and_their_names(ours, tmp_path):
    joined = JoinedDataset({"dataset[0]": foreign(2), "dataset[1]": ours, "dataset[2]": foreign(1)})
    assert len(joined) == 5 and joined.lengths is None
    assert [joined[i]["tokens"] for i in (0, 1, -1)] == [[1, 2, 3]] * 3
    assert np.array_equal(joined[3]["tokens"], ours[1]["tokens"])
    path = str(tmp_path / "d.jsonl")
    assert [joined.info(i) for i in range(5)] == [
        SampleInfo("dataset[0][0]", "dataset[0]", ()),
        SampleInfo("dataset[0][1]", "dataset[0]", ()),
        SampleInfo(f"{path}:1", "web", ("add", "né")),
        SampleInfo(f"{path}:3", path, ()),
        SampleInfo("dataset[2][0]", "dataset[2]", ()),
    ]
    with pytest.raises(IndexError):
        joined[5]


def test_lengths_are_known_where_all_know_them(ours):
    lengths = JoinedDataset({"a": ours, "b": ours}).lengths
    assert lengths is not None and np.array_equal(lengths, [*ours.lengths, *ours.lengths])


@pytest.mark.parametrize("pack_to", [None, 400])
def test_a_batch_knows_its_samples_and_their_calls(ours, pack_to):
    joined = JoinedDataset({"a": foreign(1), "b": ours})
    loader = SampleLoader(joined, Collator(0, pack_to), StepPlan(3), shuffle=True, seed=1)
    ((batch,),) = loader.epoch(0)
    assert batch.info is not None
    info = batch.info()
    assert sorted(one.where for one in info) == sorted(joined.info(i).where for i in range(3))
    assert len(batch.first_calls) == 4 and batch.first_calls[-1] == 2
    for number, one in enumerate(info):
        own = batch.sample_index == number
        calls = batch.call_index[own & (batch.call_index >= 0)].unique().tolist()
        assert calls == list(range(batch.first_calls[number], batch.first_calls[number] + len(one.tools)))
