"""AgentSFTTrainer: fine-tunes, measures, saves and loads one model, by running the recipes."""

import os
import shutil
from pathlib import Path

from omegaconf import DictConfig

from torchtune_agent.api.config import AgentSFTConfig, References
from torchtune_agent.api.recipe_config import (
    VALIDATION,
    in_terms_of_fields,
    recipe_of,
    training_config,
    validation_config,
)
from torchtune_agent.api.references import model_folder
from torchtune_agent.api.results import EvalResult, TrainingResult
from torchtune_agent.api.running import run
from torchtune_agent.errors import UserError


class AgentSFTTrainer:
    """Fine-tunes the model that `config` names.

    The trainer has one model at a time, in a Hugging Face folder (`model_dir`): first the base model, after `train()`
    the trained one, after `load_model()` the loaded one. Whatever is called works on that.

    Example:
        >>> trainer = AgentSFTTrainer(AgentSFTConfig(base_model="Qwen/Qwen3-0.6B", train_data="train.jsonl"))
        >>> print(trainer.train().final_loss)
        >>> print(trainer.evaluate("test.jsonl").accuracy)
        >>> trainer.save_model("my_agent")
    """

    def __init__(self, config: AgentSFTConfig) -> None:
        if not isinstance(config, AgentSFTConfig):
            raise UserError(f"AgentSFTTrainer: takes an AgentSFTConfig, and was given a {type(config).__name__}.")
        recipe_of(config)  # what this version cannot do is said before anything is downloaded
        self.config = config
        self._model_dir: Path | None = None

    @property
    def model_dir(self) -> Path:
        """The folder of the model as it is now. The base model is fetched from the hub where it is there."""
        if self._model_dir is None:
            return model_folder(self.config.base_model, "base_model")
        return self._model_dir

    def train(self) -> TrainingResult:
        """Train, starting from the model as it is now; write everything to the config's `output_dir`."""
        recipe = recipe_of(self.config)
        cfg = training_config(self.config, self.model_dir)
        self._run(recipe, cfg)
        weights = Path(cfg.checkpointer.output_dir) / f"epoch_{cfg.epochs - 1}"
        result = TrainingResult.read(Path(cfg.output_dir).absolute(), weights.absolute())
        self._model_dir = result.model_dir
        return result

    def evaluate(self, data: References | None = None) -> EvalResult:
        """Measure the model as it is now on `data`, named like `train_data`; by default on the config's `eval_data`."""
        data = self.config.eval_data if data is None else data
        if data is None:
            raise UserError("evaluate(data): not given, and the config has no eval_data. Give one of them.")
        cfg = validation_config(self.config, self.model_dir, data)
        folder = Path(cfg.output_dir) / "validation"
        self._run(VALIDATION, cfg)
        return EvalResult.read(folder)

    def save_model(self, path: str | Path) -> None:
        """Write the trained or loaded model to the folder `path`: whole weights that `transformers` loads."""
        if self._model_dir is None:
            raise UserError("save_model: nothing is trained or loaded yet. Call train() or load_model(path) first.")
        target = Path(path).expanduser().absolute()
        if target.resolve() == self._model_dir.resolve():
            return
        _check_replaceable(target)
        unfinished = target.with_name(target.name + ".unfinished")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(self._model_dir, unfinished)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(unfinished, target)
        except OSError as error:
            raise UserError(f"save_model({str(path)!r}): cannot be written: {error.strerror or error}.") from error

    def load_model(self, path: str | Path) -> None:
        """Go on with the model in the folder `path` (or of the hub): evaluate it, or train it further."""
        self._model_dir = model_folder(path, "load_model")

    def _run(self, recipe: str, cfg: DictConfig) -> None:
        try:
            run(recipe, cfg, self.config.num_devices)
        except UserError as error:
            raise in_terms_of_fields(error) from error


def _check_replaceable(target: Path) -> None:
    """An earlier model may be replaced; nothing else may."""
    is_model = (target / "config.json").exists()
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_model and not is_empty:
        raise UserError(f"save_model({str(target)!r}): there is something else already. Name a new folder.")
