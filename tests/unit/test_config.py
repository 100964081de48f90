"""Config reading: nearest keys, secrets, names that moved."""

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from torchtune_agent.config import check_keys, instantiate, redacted
from torchtune_agent.data import AgentSFTDataset, toolworld_tokenizer
from torchtune_agent.errors import UserError
from torchtune_agent.metrics import RunLog, read_rows


def test_an_option_a_component_does_not_take_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"tokenizer.max_seqlen: .* Did you mean 'max_seq_len'\?"):
        instantiate({"_component_": "torchtune_agent.data.toolworld_tokenizer", "max_seqlen": 5}, "tokenizer")


@pytest.mark.parametrize("path", ["torchtune_agent.data.nothing", "no_such_package.thing", ""])
def test_a_component_that_cannot_be_loaded_is_named_with_its_key(path: str) -> None:
    with pytest.raises(UserError, match=f"dataset: cannot load '{path}'"):
        instantiate({"_component_": path}, "dataset")


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="epoch: unknown config key. Did you mean 'epochs'"):
        check_keys(OmegaConf.create({"epoch": 1}), {"epochs", "batch_size"})


def test_interpolations_reach_into_the_rest_of_the_config() -> None:
    section = {"_component_": "torchtune_agent.data.toolworld_tokenizer", "max_seq_len": "${length}"}
    cfg = OmegaConf.create({"length": 7, "tokenizer": section})
    assert instantiate(cfg.tokenizer, "tokenizer").max_seq_len == 7


def test_the_dataset_section_of_the_metrics_document_works_as_written(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<function=f>\n</function>"}]
    data.write_text(json.dumps({"messages": messages}))
    section = OmegaConf.create(
        {
            "_component_": "torchtune.datasets.AgentSFTDataset",
            "source": "json",
            "data_files": str(data),
            "message_transform": {
                "_component_": "torchtune.data.JSONToMessages",
                "column_map": {"messages": "messages"},
            },
            "enable_token_classification": True,
        }
    )
    dataset = instantiate(section, "dataset", toolworld_tokenizer())
    assert isinstance(dataset, AgentSFTDataset)
    assert dataset[0]["tool_call_mask"].any()


SECRETS = {
    "api_key": "abc",
    "WANDB_API_KEY": "abc",
    "hf_token": "abc",
    "nested": [{"password": "abc", "auth": "abc"}],
    "url": "https://user:abc@example.org/x",
    "note": "use hf_abcdefghijklmnopqrst here",
}
HARMLESS = {"num_tokens": 5, "tokenizer": {"path": "tokens/abc"}, "max_token": 3, "url": "https://example.org/a@b"}


def test_secrets_are_redacted_by_key_by_form_and_in_urls() -> None:
    text = json.dumps(redacted(SECRETS))
    assert "abc" not in text
    assert "https://***@example.org/x" in text and "use *** here" in text


def test_what_is_no_secret_stays() -> None:
    assert redacted(HARMLESS) == HARMLESS


def test_rows_of_an_earlier_run_are_kept_and_not_mixed(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        log = RunLog(tmp_path, DictConfig({}))
        log.log({"loss": loss}, 1)
        log.close()
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2.0]
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.earlier-1.jsonl")] == [1.0]


@pytest.mark.parametrize(
    "left", ["", '{"step": 1, "loss": 1.0}\n', '{"step": 1, "loss": 1.0}\n{"step": 2, "lo', '{"st']
)
def test_a_run_that_goes_on_drops_the_row_that_was_cut_off(left: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(left)
    log = RunLog(tmp_path, DictConfig({}), continues=True)
    log.log({"loss": 2.0}, 2)
    log.close()
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1.0] * left.count("\n") + [2.0]


def test_a_row_says_nan_and_infinity_in_valid_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path, DictConfig({}))
    log.log({"loss": float("nan"), "grad_norm": float("inf")}, 1)
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["grad_norm"]) == ("nan", "inf")
    assert read_rows(tmp_path / "metrics.jsonl")[0]["grad_norm"] == float("inf")
