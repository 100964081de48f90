"""What a run of the Python API is made of: fields under their documented names, with their documented defaults.

Other names that are in use for the same things are taken too (ALIASES); a name that nobody knows is refused with the
nearest that is known. Imports nothing heavy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from torchtune_agent.errors import UserError, did_you_mean

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
References = str | Path | Annotated[list[str | Path], Field(min_length=1)]

# Every other name of a field, and the field it means.
ALIASES: dict[str, str] = {
    "model_name_or_path": "base_model",
    "train_dataset": "train_data",
    "eval_dataset": "eval_data",
    "dev_data": "eval_data",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "per_device_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "lr": "learning_rate",
    "gradient_accumulation": "gradient_accumulation_steps",
    "max_length": "max_seq_length",
    "max_seq_len": "max_seq_length",
    "max_sequence_length": "max_seq_length",
    "lora_rank": "lora_r",
    "load_in_4bit": "quantize_base",
    "use_coreset": "use_coreset_selection",
    "coreset_size": "coreset_target_size",
    "use_continual": "use_online_continual",
    "use_continual_learning": "use_online_continual",
    "replay_buffer_size": "continual_buffer_size",
    "replay_ratio": "continual_replay_ratio",
    "kl_coefficient": "kl_coef",
    "discount_factor": "gamma",
}


class _Fields(BaseModel):
    """Fields by name or alias; whatever is wrong with one is a UserError, when it is given or set later."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    if not TYPE_CHECKING:  # where the fields are the signature

        def __init__(self, **given: Any) -> None:
            self._checked(lambda values: super(_Fields, self).__init__(**values), self._by_field(given))

        def __setattr__(self, name: str, value: Any) -> None:
            ((field, value),) = self._by_field({name: value}).items()
            self._checked(lambda values: super(_Fields, self).__setattr__(field, value), {field: value})

    @classmethod
    def _by_field(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        known = {*cls.model_fields, *(alias for alias, field in ALIASES.items() if field in cls.model_fields)}
        values: dict[str, Any] = {}
        names: dict[str, str] = {}
        for name, value in given.items():
            if name not in known:
                raise UserError(f"{cls.__name__}: there is no '{name}'. {did_you_mean(name, known)}")
            field = ALIASES.get(name, name)
            if field in values:
                raise UserError(f"{cls.__name__}: '{names[field]}' and '{name}' mean the same. Give one of them.")
            values[field], names[field] = value, name
        return values

    @classmethod
    def _checked(cls, work: Any, values: dict[str, Any]) -> None:
        try:
            work(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0]) if first["loc"] else cls.__name__
            if first["type"] == "missing":
                raise UserError(f"{cls.__name__}: {field} is not given. {_NEEDED[field]}") from None
            raise UserError(f"{field}={values.get(field)!r}: {first['msg'].lower()}.") from None


_NEEDED = {
    "base_model": "Name a Hugging Face folder or a model of the hub, for example base_model='Qwen/Qwen3-0.6B'.",
    "train_data": "Name a file, for example train_data='conversations.jsonl'.",
}


class AgentSFTConfig(_Fields):
    """Supervised fine-tuning of an agent; docs/python-api.md says what each field does."""

    base_model: str | Path
    train_data: References
    eval_data: References | None = None
    output_dir: Path = Path(".sage/finetune/")
    num_epochs: Count = 3
    batch_size: Count = 8
    learning_rate: Positive = 2e-5
    gradient_accumulation_steps: Count = 4
    max_seq_length: Count = 2048
    use_lora: StrictBool = True
    lora_r: Count = 16
    lora_alpha: Positive = 32
    use_dora: StrictBool = False
    use_lora_plus: StrictBool = False
    lora_plus_lr_ratio: Positive = 16.0
    use_coreset_selection: StrictBool = False
    coreset_strategy: str = "hybrid"
    coreset_target_size: Count | None = None
    use_online_continual: StrictBool = False
    continual_buffer_size: Count = 2048
    continual_replay_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    # Not in the documented table
    continual_replay_from: Path | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_target_modules: list[str] = ["all-linear"]
    quantize_base: StrictBool = False
    num_devices: Count = 1
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    overrides: list[str] = []


class RLTrainingConfig(_Fields):
    """Reinforcement learning on top of a fine-tuned model. Checked now; what trains by it is not there yet."""

    algorithm: Literal["ppo", "dpo"] = "ppo"
    reward_model: str | None = None
    kl_coef: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
