"""Reading configs: components by name and from packages that are trusted, keys that are checked.

torchtune's own `instantiate` does the work. This module adds what a user who mistyped a key needs:
the nearest known key, before anything expensive starts.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune import config as torchtune_config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from torchtune_agent.errors import UserError, did_you_mean
from torchtune_agent.redaction import redacted as redacted

# The metrics document was written for a fork in which these lived inside torchtune.
_MOVED = {
    "torchtune.datasets.AgentSFTDataset": "torchtune_agent.data.AgentSFTDataset",
    "torchtune.datasets.AgentSFTTransform": "torchtune_agent.data.AgentSFTTransform",
    "torchtune.data.JSONToMessages": "torchtune.data.OpenAIToMessages",
}

# Whose callables a config may name. A config is often someone else's, and naming a callable is running it.
_TRUSTED = ("torch", "torchtune", "torchao", "torchtune_agent")
# Options that torchtune's components themselves take for dotted paths
_DOTTED_OPTIONS = ("prompt_template",)
_trusted_by_user: list[str] = []


def trust(names: Iterable[str]) -> None:
    """Let configs of this process name components in these packages, or at these dotted paths, from now on."""
    _trusted_by_user[:] = names


def component(path: str, key: str) -> Any:
    """The object a dotted path names; `key` is where the config says so. Refused unless it is a callable of a package
    that is trusted: by its name, before anything is imported, and by where it was really defined."""
    path = _MOVED.get(path, path)
    if path and not _is_trusted(path):
        # Also what is not installed is refused for this reason: looking would import its parents.
        raise UserError(_untrusted(path, path.partition(".")[0], key))
    try:
        found = _get_component_from_path(path)
    except (InstantiationError, ValueError) as error:
        reason = str(error).splitlines()[-1] if str(error) else repr(error)
        raise UserError(f"{key}: cannot load '{path}'. {reason}") from error
    if not callable(found):
        raise UserError(f"{key}: cannot load '{path}'. It is not a class or function.")
    home = _home(found)
    if path not in _trusted_by_user and not _is_trusted(home):
        raise UserError(_untrusted(path, home, key))
    return found


def _is_trusted(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in (*_TRUSTED, *_trusted_by_user))


def _untrusted(path: str, home: str, key: str) -> str:
    where = f"'{home}'" if home == path.partition(".")[0] else f"It is {home}, which"
    return (
        f"{key}: cannot load '{path}'. {where} is not part of {', '.join(_TRUSTED)}. "
        f"If you trust the code, add it: trusted_components=[{home}]"
    )


def _home(found: Any) -> str:
    """Where a callable was defined, whatever path led to it."""
    while isinstance(found, functools.partial):
        found = found.func
    named = found if hasattr(found, "__qualname__") else type(found)  # an object that can be called
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"


def check_components(cfg: Any, key: str = "") -> None:
    """Refuse a config that names a component of a package that is not trusted, however deep.

    What cannot be loaded is left to where it is used: not every section is.
    """
    if isinstance(cfg, DictConfig):
        for name in cfg:
            if OmegaConf.is_missing(cfg, name):
                continue
            value = cfg[name]
            if isinstance(value, str) and (name == "_component_" or (name in _DOTTED_OPTIONS and "." in value)):
                _check_trust(value, key if name == "_component_" else f"{key}.{name}")
            else:
                check_components(value, f"{key}.{name}" if key else str(name))
    elif isinstance(cfg, ListConfig):
        for i, item in enumerate(cfg):
            check_components(item, f"{key}[{i}]")


def _check_trust(path: str, key: str) -> None:
    try:
        component(path, key)
    except UserError as error:
        if not isinstance(error.__cause__, (InstantiationError, ValueError)):
            raise


def instantiate(cfg: DictConfig | Mapping[str, Any], key: str, *args: Any, **kwargs: Any) -> Any:
    """Make the component that `cfg` describes; `key` names it in errors.

    The component's signature is its schema: a key it does not take is refused with the nearest it does.
    """
    node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    if node.get("_component_") is None:
        raise UserError(f"{key}: no '_component_' given. Name what to build, for example {key}._component_=...")
    check_components(node, key)
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
