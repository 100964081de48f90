"""Makes our recipes and configs known to `tune`, torchtune's command line, under their names.

torchtune has no plugin mechanism, but torch has: it calls `autoload`, our entry point in its group `torch.backends`,
whenever it is imported, in every process. So `autoload` must cost nothing and must never raise. All it does is to leave
a finder on `sys.meta_path` that waits for three modules of torchtune's command line and completes them when they have
been executed. Programs that never import those modules notice nothing.

What we complete is private to torchtune. With a version that we do not know we say so in one line, and `tune` goes on
without us.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

# recipes/<key>.py runs with configs/<name>.yaml for each of its names. `tune` finds a config's name whichever recipe it
# belongs to, so a recipe that takes the configs of another names none.
RECIPES: dict[str, tuple[str, ...]] = {
    "agent_sft_distributed": (
        "agent_sft_distributed",
        "tiny/agent_sft",
        "hf/agent_sft",
        "hf/agent_sft_lora",
        "qwen2_5/0.5B_agent_sft",
        "qwen2_5/7B_agent_sft",
    ),
    "agent_coreset_distributed": ("tiny/agent_coreset",),
    "agent_active_distributed": (),
    "agent_validate_distributed": (),
    "agent_replay_distributed": ("tiny/agent_replay", "tiny/agent_stream"),
    "agent_data_check": (),
    "agent_plan": (),
    "agent_export": (),
}


def autoload() -> None:
    """Has our recipes registered as soon as torchtune's registry is imported, or now if it already is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _COMPLETIONS:
        if name in sys.modules:
            _complete(sys.modules[name])


def recipe_path(name: str) -> Path:
    """Where the recipe lies: recipes/ in a checkout, torchtune_agent/recipes/ where a wheel was installed."""
    return _folder("torchtune_agent.recipes") / f"{name}.py"


def config_path(name: str) -> Path:
    """Where the config lies: configs/ in a checkout, torchtune_agent/configs/ where a wheel was installed."""
    return _folder("torchtune_agent.configs") / f"{name}.yaml"


def _folder(package: str) -> Path:
    from importlib.resources import files  # only `tune` pays for this import

    return Path(str(files(package))).absolute()


def _register_recipes(registry: ModuleType) -> None:
    """Appends our recipes. torchtune joins its own folder with `file_path`, and an absolute path wins such a join."""
    known = {recipe.name for recipe in registry._ALL_RECIPES}
    ours = [
        registry.Recipe(
            name=name,
            file_path=str(recipe_path(name)),
            configs=[registry.Config(name=config, file_path=str(config_path(config))) for config in configs],
            supports_distributed=True,
        )
        for name, configs in RECIPES.items()
        if name not in known
    ]
    registry._ALL_RECIPES.extend(ours)


def _validate_by_name(validate: ModuleType) -> None:
    """Lets `tune validate` take the names of our configs; torchtune's own takes nothing but paths."""
    validate_file: Callable[[Any, Namespace], None] = validate.Validate._validate_cmd
    if validate_file.__module__ == __name__:
        return
    paths = {config: config_path(config) for configs in RECIPES.values() for config in configs}

    def validate_name_or_file(command: Any, args: Namespace) -> None:
        if not args.config.is_file():
            args.config = paths.get(args.config.as_posix(), args.config)
        validate_file(command, args)

    validate.Validate._validate_cmd = validate_name_or_file


def _launch_with_care(run: ModuleType) -> None:
    """Has several processes started by our own `launch`, which lets them save when they are told to stop and spares
    users torchrun's report where it is known why a run failed."""
    run_workers: Callable[..., None] = run.Run._run_distributed
    if run_workers.__module__ == __name__:
        return

    def launch_workers(command: Any, args: Namespace, is_builtin: bool) -> None:
        from torchtune_agent.launch import launch  # needs torch, which only a run pays for

        launch(lambda: run_workers(command, args, is_builtin=is_builtin), args)

    run.Run._run_distributed = launch_workers


_COMPLETIONS: dict[str, Callable[[ModuleType], None]] = {
    "torchtune._cli.run": _launch_with_care,
    "torchtune._recipe_registry": _register_recipes,
    "torchtune._cli.validate": _validate_by_name,
}


def _complete(module: ModuleType) -> None:
    version = str(getattr(sys.modules.get("torchtune"), "__version__", "of unknown version"))
    if not version.startswith("0.6."):
        _warn(f"torchtune {version} is installed, and we know 0.6", "pip install torchtune==0.6.1")
        return
    try:
        _COMPLETIONS[module.__name__](module)
    except ImportError as error:
        _warn(str(error), "reinstall torchtune_agent")
    except Exception as error:  # whatever torchtune has become, its command line and `import torch` must go on
        _warn(f"torchtune {version} is not the one we know ({error!r})", "pip install torchtune==0.6.1")


@cache  # several modules may have the same thing wrong with them
def _warn(problem: str, remedy: str) -> None:
    print(f"torchtune_agent: `tune` goes on without our recipes: {problem}. To mend it: {remedy}", file=sys.stderr)


class _Finder:
    """Finds these modules where they always were, and has `_complete` called after they are executed."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in _COMPLETIONS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _CompletingLoader(spec.loader)
        return spec


class _CompletingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps no trace of us: its source, tracebacks and resources are found by its own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _complete(module)
