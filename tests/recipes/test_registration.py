"""`tune` knows our recipes and configs by name, and nobody who imports torch pays for it.

Every test runs programs of its own, away from the checkout: registration happens at import, in whichever process.
Importing torchtune takes seconds, so the commands of one kind share one process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from torchtune_agent._tune import RECIPES, config_path, recipe_path

REPOSITORY = Path(__file__).parents[2]
TUNE = Path(sys.executable).with_name("tune")
CONFIGS = [config for configs in RECIPES.values() for config in configs]

# Runs pairs of folder and command line (JSON on standard input) through torchtune's own main, each there.
COMMAND_LINES = """
import contextlib, io, json, os, sys
from torchtune._cli.tune import main

def run(folder, command):
    os.chdir(folder)
    sys.argv = ["tune", *command]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as stop:
            print("exit", stop.code)
    return out.getvalue()

print(json.dumps([run(*pair) for pair in json.load(sys.stdin)]))
"""
WELL_FORMED = "Config is well-formed!\n"
BROKEN_CONFIG = "tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: x, no_such_key: 1}\n"


def python(
    *args: str, cwd: Path, stdin: str = "", path: Path | None = None, autoload: bool = True
) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = str(int(autoload))
    if path is not None:
        env["PYTHONPATH"] = str(path)
    result = subprocess.run([sys.executable, *args], cwd=cwd, env=env, input=stdin, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def names(listing: str) -> set[str]:
    """What `tune ls` lists."""
    return {word for line in listing.splitlines() for word in line.split()}


def run_commands(*commands: tuple[Path, list[str]], autoload: bool = True) -> list[str]:
    pairs = [(str(folder), command) for folder, command in commands]
    result = python("-c", COMMAND_LINES, cwd=commands[0][0], stdin=json.dumps(pairs), autoload=autoload)
    return json.loads(result.stdout.splitlines()[-1])


def test_registered_files_are_those_that_exist() -> None:
    recipes = {path for path in (REPOSITORY / "recipes").glob("*.py") if not path.name.startswith("_")}
    assert {recipe_path(name) for name in RECIPES} == recipes
    configs = set((REPOSITORY / "configs").rglob("*.yaml"))
    assert {config_path(name) for name in CONFIGS} == configs
    assert len(set(CONFIGS)) == len(CONFIGS), "a config belongs to one recipe"


def test_tune_lists_ours_beside_its_own(tmp_path: Path) -> None:
    result = subprocess.run([TUNE, "ls"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert names(result.stdout) >= {*RECIPES, *CONFIGS, "full_finetune_distributed", "llama2/7B_full"}
    assert result.stdout.split().count("tiny/agent_sft") == 1
    assert "torchtune_agent" not in result.stderr


def test_commands_take_names(tmp_path: Path) -> None:
    config, away, shadowed = config_path("tiny/agent_sft"), tmp_path / "away", tmp_path / "shadowed"
    away.mkdir()
    (away / "broken.yaml").write_text(BROKEN_CONFIG)
    (shadowed / "tiny").mkdir(parents=True)
    (shadowed / "tiny" / "agent_sft").write_text(BROKEN_CONFIG)
    cat, cp_recipe, cp_config, by_path, broken, file_first, *by_name = run_commands(
        (away, ["cat", "tiny/agent_sft"]),
        (away, ["cp", "agent_sft_distributed", "mine.py"]),
        (away, ["cp", "tiny/agent_sft", "mine.yaml"]),
        (away, ["validate", str(config)]),
        (away, ["validate", "broken.yaml"]),
        (shadowed, ["validate", "tiny/agent_sft"]),
        *((away, ["validate", name]) for name in CONFIGS),
    )
    assert yaml.safe_load(cat) == yaml.safe_load(config.read_text())
    assert (away / "mine.py").read_text() == recipe_path("agent_sft_distributed").read_text(), cp_recipe
    assert (away / "mine.yaml").read_text() == config.read_text(), cp_config
    assert dict(zip(CONFIGS, by_name, strict=True)) == dict.fromkeys(CONFIGS, WELL_FORMED)
    assert by_path == WELL_FORMED
    assert "no_such_key" in broken and "exit 2" in broken
    assert "no_such_key" in file_first, "a file must come before a registered name"


def test_without_autoload_only_our_own_command_line_knows_ours(tmp_path: Path) -> None:
    (listing,) = run_commands((tmp_path, ["ls"]), autoload=False)
    assert "full_finetune_distributed" in names(listing)
    assert not names(listing) & {*RECIPES, *CONFIGS}
    ours = python("-m", "torchtune_agent", "ls", cwd=tmp_path, autoload=False)
    assert names(ours.stdout) >= {*RECIPES, *CONFIGS, "full_finetune_distributed"}


def test_importing_torch_imports_nothing_else_of_ours(tmp_path: Path) -> None:
    code = (
        "import torch, sys, json; print(json.dumps([sorted(sys.modules), [type(f).__name__ for f in sys.meta_path]]))"
    )
    modules, finders = json.loads(python("-c", code, cwd=tmp_path).stdout)
    ours = {name for name in modules if name.startswith("torchtune_agent")}
    assert ours == {"torchtune_agent", "torchtune_agent._tune"}, (
        "torch did not call our entry point, or it did too much"
    )
    assert finders.count("_Finder") == 1
    assert not {"torchtune", "torchao", "omegaconf", "transformers"} & set(modules)


def test_registration_itself_needs_the_standard_library_only(tmp_path: Path) -> None:
    code = """
import sys, json
before = set(sys.modules)
from torchtune_agent._tune import autoload
autoload()
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)))
"""
    assert json.loads(python("-c", code, cwd=tmp_path).stdout) == ["torchtune_agent"]


# The rest runs against a stand-in for torchtune, which imports at once and can be broken at will.

REGISTRY = """
from dataclasses import dataclass

@dataclass
class Config:
    name: str
    file_path: str

@dataclass
class Recipe:
    name: str
    file_path: str
    configs: list
    supports_distributed: bool

_ALL_RECIPES = [Recipe("theirs", "theirs.py", [], False)]
"""
VALIDATE = """
class Validate:
    def _validate_cmd(self, args):
        print(args.config)
"""
SHOW = """
import sys
from torchtune import _recipe_registry as registry
from torchtune._cli import validate
print([recipe.name for recipe in getattr(registry, "_ALL_RECIPES", [])])
"""


def fake_torchtune(folder: Path, version: str = "0.6.1", registry: str = REGISTRY, validate: str = VALIDATE) -> Path:
    (folder / "torchtune" / "_cli").mkdir(parents=True)
    (folder / "torchtune" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    (folder / "torchtune" / "_recipe_registry.py").write_text(registry)
    (folder / "torchtune" / "_cli" / "__init__.py").write_text("")
    (folder / "torchtune" / "_cli" / "validate.py").write_text(validate)
    return folder


AUTOLOAD = "from torchtune_agent._tune import autoload; autoload()\n"
RELOAD = "import importlib, torchtune._recipe_registry as registry; importlib.reload(registry)\n"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(AUTOLOAD + SHOW, id="before"),
        pytest.param("import torchtune._recipe_registry, torchtune._cli.validate\n" + AUTOLOAD + SHOW, id="after"),
        pytest.param(AUTOLOAD * 2 + "import torchtune._recipe_registry\n" + AUTOLOAD * 2 + SHOW, id="repeated"),
        pytest.param(AUTOLOAD + SHOW + "import importlib; print = importlib.reload(registry)", id="reload"),
    ],
)
def test_registered_once_whenever_we_are_called(tmp_path: Path, code: str) -> None:
    result = python("-c", code, cwd=tmp_path, path=fake_torchtune(tmp_path))
    assert result.stdout == f"{['theirs', *RECIPES]}\n"
    assert result.stderr == ""


def test_completed_modules_keep_their_own_loader(tmp_path: Path) -> None:
    code = AUTOLOAD + SHOW + "import inspect; print(registry.__spec__.loader, inspect.getsource(registry.Recipe))"
    result = python("-c", code, cwd=tmp_path, path=fake_torchtune(tmp_path))
    assert "SourceFileLoader" in result.stdout and "supports_distributed: bool" in result.stdout


def test_validate_is_wrapped_once(tmp_path: Path) -> None:
    code = AUTOLOAD + SHOW + "once = validate.Validate._validate_cmd\n" + AUTOLOAD
    code += "print(validate.Validate._validate_cmd is once, once.__module__)"
    result = python("-c", code, cwd=tmp_path, path=fake_torchtune(tmp_path))
    assert result.stdout.splitlines()[1] == "True torchtune_agent._tune"


@pytest.mark.parametrize(
    ("broken", "complaint", "listed"),
    [
        ({"version": "0.7.0"}, "torchtune 0.7.0 is installed", ["theirs"]),
        ({"registry": "def get_all_recipes(): ..."}, "_ALL_RECIPES", []),
        ({"registry": REGISTRY.replace("    configs: list\n", "").replace("[], ", "")}, "keyword", ["theirs"]),
        ({"validate": ""}, "Validate", ["theirs", *RECIPES]),
    ],
    ids=["unknown version", "no list", "other fields", "no validate"],
)
def test_unknown_torchtune_goes_on_without_us(
    tmp_path: Path, broken: dict[str, str], complaint: str, listed: list[str]
) -> None:
    result = python("-c", AUTOLOAD + SHOW, cwd=tmp_path, path=fake_torchtune(tmp_path, **broken))
    (line,) = result.stderr.splitlines()
    assert complaint in line and "pip install torchtune==0.6.1" in line
    assert result.stdout == f"{listed}\n"


def test_missing_recipes_folder_goes_on_without_us(tmp_path: Path) -> None:
    code = AUTOLOAD + "import sys; sys.modules['torchtune_agent.recipes'] = None\n" + SHOW
    result = python("-c", code, cwd=tmp_path, path=fake_torchtune(tmp_path))
    (line,) = result.stderr.splitlines()
    assert "reinstall torchtune_agent" in line
    assert result.stdout == "['theirs']\n"
