"""Reading configs: components by name, keys that are checked, secrets that stay secret.

torchtune's own `instantiate` does the work. This module adds what a user who mistyped a key needs:
the nearest known key, before anything expensive starts.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune import config as torchtune_config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from torchtune_agent.errors import UserError, did_you_mean

# The metrics document was written for a fork in which these lived inside torchtune.
_MOVED = {
    "torchtune.datasets.AgentSFTDataset": "torchtune_agent.data.AgentSFTDataset",
    "torchtune.datasets.AgentSFTTransform": "torchtune_agent.data.AgentSFTTransform",
    "torchtune.data.JSONToMessages": "torchtune.data.OpenAIToMessages",
}

_SECRET_KEY = re.compile(r"(^|_)(api_?key|access_?key|private_?key|auth|token|secret|passw(or)?d|credentials?)$", re.I)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,})"
)
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
REDACTED = "***"


def component(path: str, key: str) -> Any:
    """The object a dotted path names; `key` is where the config says so."""
    path = _MOVED.get(path, path)
    try:
        return _get_component_from_path(path)
    except (InstantiationError, ValueError) as error:
        reason = str(error).splitlines()[-1] if str(error) else repr(error)
        raise UserError(f"{key}: cannot load '{path}'. {reason}") from error


def instantiate(cfg: DictConfig | Mapping[str, Any], key: str, *args: Any, **kwargs: Any) -> Any:
    """Make the component that `cfg` describes; `key` names it in errors.

    The component's signature is its schema: a key it does not take is refused with the nearest it does.
    """
    node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    if node.get("_component_") is None:
        raise UserError(f"{key}: no '_component_' given. Name what to build, for example {key}._component_=...")
    made = component(node["_component_"], key)
    _check_signature(made, node, key, kwargs)
    node = node.copy()
    node["_component_"] = _MOVED.get(node["_component_"], node["_component_"])
    try:
        return torchtune_config.instantiate(node, *args, **kwargs)
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {error}") from error


def _check_signature(made: Any, node: DictConfig, key: str, kwargs: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):  # built-ins without a signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = {name for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL}
    for name in (*node, *kwargs):
        if name != "_component_" and name not in known:
            raise UserError(
                f"{key}.{name}: '{node['_component_']}' has no such option. {did_you_mean(str(name), known)}"
            )


def check_keys(cfg: DictConfig, known: set[str], prefix: str = "") -> None:
    """Refuse a key nobody reads, of the config or of the section that `prefix` ("name.") names."""
    for key in cfg:
        if key not in known:
            raise UserError(f"{prefix}{key}: unknown config key. {did_you_mean(str(key), known)}")


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values with every `${...}` filled in."""
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {error}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def redacted(value: Any, key: str = "") -> Any:
    """`value` with everything that looks like a password or an API key replaced."""
    if isinstance(value, (dict, DictConfig)):
        return {name: redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple, ListConfig)):
        return [redacted(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if _SECRET_KEY.search(key) and value:
        return REDACTED
    return _URL_PASSWORD.sub(REDACTED, _SECRET_VALUE.sub(REDACTED, value))
