"""The fields of the Python API: documented defaults, other names, and everything that is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchtune_agent import AgentSFTConfig, RLTrainingConfig, UserError
from torchtune_agent.api.config import ALIASES

DOCUMENTED: dict[str, Any] = {
    "eval_data": None,
    "output_dir": Path(".sage/finetune/"),
    "num_epochs": 3,
    "batch_size": 8,
    "learning_rate": 2e-5,
    "gradient_accumulation_steps": 4,
    "max_seq_length": 2048,
    "use_lora": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "use_dora": False,
    "use_lora_plus": False,
    "lora_plus_lr_ratio": 16.0,
    "use_coreset_selection": False,
    "coreset_strategy": "hybrid",
    "coreset_target_size": None,
    "use_online_continual": False,
    "continual_buffer_size": 2048,
    "continual_replay_ratio": 0.25,
}
GIVEN: dict[str, Any] = {"base_model": "model", "train_data": "data.jsonl"}


def test_defaults_are_the_documented_ones() -> None:
    config = AgentSFTConfig(base_model="model", train_data="data.jsonl")
    assert {name: getattr(config, name) for name in DOCUMENTED} == DOCUMENTED
    assert isinstance(config.output_dir, Path)
    assert RLTrainingConfig().model_dump() == {"algorithm": "ppo", "reward_model": None, "kl_coef": 0.1, "gamma": 0.99}


@pytest.mark.parametrize("alias", [name for name, field in ALIASES.items() if field in AgentSFTConfig.model_fields])
def test_other_names_mean_the_same(alias: str) -> None:
    field = ALIASES[alias]
    flipped = not DOCUMENTED[field] if isinstance(DOCUMENTED.get(field), bool) else None
    value: Any = {"quantize_base": True, "continual_replay_ratio": 0.5}.get(field, 7 if flipped is None else flipped)
    value = "other" if field in ("base_model", "train_data", "eval_data") else value
    given = {name: other for name, other in GIVEN.items() if name != field}
    config = AgentSFTConfig(**given, **{alias: value})
    assert getattr(config, field) == value != AgentSFTConfig.model_fields[field].default
    with pytest.raises(UserError, match=f"'{field}' and '{alias}' mean the same"):
        AgentSFTConfig(**{**GIVEN, field: value}, **{alias: value})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": ({"learnig_rate": 1e-5}, "there is no 'learnig_rate'. Did you mean 'learning_rate'?"),
    "nothing near": ({"zzzz": 1}, "Known: base_model"),
    "no epochs": ({"num_epochs": 0}, "num_epochs=0: input should be greater than or equal to 1"),
    "by another name": ({"epochs": 0}, "num_epochs=0"),
    "a text for a number": ({"batch_size": "many"}, "batch_size='many'"),
    "a text for a truth": ({"use_lora": "yes"}, "use_lora='yes'"),
    "a rate of zero": ({"learning_rate": 0}, "learning_rate=0"),
    "nothing but replay": ({"replay_ratio": 1.0}, "continual_replay_ratio=1.0"),
    "no data": ({"train_data": []}, "train_data=[]"),
    "a device": ({"device": "tpu"}, "device='tpu'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(UserError) as error:
        AgentSFTConfig(**{**GIVEN, **given})
    assert message in str(error.value)


def test_what_is_needed_is_named() -> None:
    with pytest.raises(UserError, match="base_model is not given. Name a Hugging Face folder"):
        AgentSFTConfig(train_data="data.jsonl")  # pyright: ignore[reportCallIssue]
    with pytest.raises(UserError, match="algorithm='grpo': input should be 'ppo' or 'dpo'"):
        RLTrainingConfig(algorithm="grpo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="gamma=1.5"):
        RLTrainingConfig(gamma=1.5)


def test_fields_are_checked_when_they_are_set() -> None:
    config: Any = AgentSFTConfig(base_model="model", train_data="data.jsonl")
    config.epochs = 5
    assert config.num_epochs == 5
    with pytest.raises(UserError, match="num_epochs=-1"):
        config.num_epochs = -1
    with pytest.raises(UserError, match="Did you mean 'num_epochs'"):
        config.num_epoch = 2
    assert config.num_epochs == 5


def test_a_config_costs_no_import_of_torch() -> None:
    code = "import sys; from torchtune_agent import AgentSFTConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
