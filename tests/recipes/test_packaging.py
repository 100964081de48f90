"""What a user installs is complete: the source archive, the wheel built from it, and the versions we let pip choose.

The wheel is unpacked into a folder that comes before the editable install on the path, and tried from elsewhere.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import torchtune_agent
from torchtune_agent._tune import RECIPES

REPOSITORY = Path(__file__).parents[2]
NOT_SHIPPED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "wandb")

# Where torchtune 0.6.1 can be imported. It is torchtune.training, not torchtune itself, that breaks first.
TORCHAO = {"0.13.0": True, "0.14.1": True, "0.15.0": True, "0.16.0": False}

# Stands in for a recipe: tells which file was run, and how, without training anything.
PROBE = """
import json, os, sys
from pathlib import Path

Path(f"rank{os.environ.get('RANK', '-')}.json").write_text(json.dumps([__file__, sys.argv[1:]]))
"""


def run(
    *command: str | Path, cwd: Path, path: Path | None = None, autoload: bool = True
) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = str(int(autoload))
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def pip(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *args, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as an index would: source archive from a copy of the tree (no leftovers, none left), wheel from that."""
    folder = tmp_path_factory.mktemp("build")
    tree = shutil.copytree(REPOSITORY, folder / "tree", ignore=NOT_SHIPPED)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    built = run(sys.executable, "-c", code, cwd=tree)
    assert built.returncode == 0, built.stderr
    (archive,) = folder.glob("*.tar.gz")
    built = pip("wheel", archive, "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, cwd=folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    result = pip("install", wheel, "--no-deps", "--no-index", "--target", folder, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def shipped(folder: str, package: str) -> set[str]:
    """What the wheel must hold of a folder of ours, under the package's name."""
    root = REPOSITORY / folder
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"{package}/{path.as_posix()}" for path in files}


def test_wheel_holds_our_files_and_no_others(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = (
        shipped("torchtune_agent", "torchtune_agent")
        | shipped("recipes", "torchtune_agent/recipes")
        | shipped("configs", "torchtune_agent/configs")
    )
    assert held == ours, "list new packages and new kinds of data files under [tool.setuptools] in pyproject.toml"
    assert {"torchtune_agent/py.typed", "torchtune_agent/configs/tiny/agent_sft.yaml"} <= held


def test_wheel_describes_itself(wheel: Path) -> None:
    info = f"torchtune_agent-{torchtune_agent.__version__}.dist-info"
    with ZipFile(wheel) as archive:
        assert "Copyright" in archive.read(f"{info}/licenses/LICENSE").decode()
        assert "torchtune_agent = torchtune_agent._tune:autoload" in archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/top_level.txt").decode().split() == ["torchtune_agent"]


def test_tune_knows_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    code = """
import sys
from torchtune._cli.tune import main
for command in ["ls"], ["cat", "tiny/agent_sft"]:
    sys.argv = ["tune", *command]
    main()
import torchtune_agent
print(torchtune_agent.__file__)
"""
    result = run(sys.executable, "-c", code, cwd=tmp_path, path=installed)
    assert result.returncode == 0, result.stderr
    *listing, last = result.stdout.splitlines()
    assert Path(last).is_relative_to(installed), "the wheel was not the one that was tried"
    words = {word for line in listing for word in line.split()}
    assert words >= {
        "full_finetune_distributed",
        *RECIPES,
        *(config for configs in RECIPES.values() for config in configs),
    }
    assert "output_dir:" in words


@pytest.mark.parametrize(
    ("tune", "autoload", "processes"),
    [
        pytest.param([Path(sys.executable).with_name("tune")], True, 2, id="tune"),
        pytest.param([sys.executable, "-m", "torchtune_agent"], False, 2, id="module"),
        pytest.param([sys.executable, "-m", "torchtune_agent"], False, 1, id="module, one process"),
    ],
)
def test_recipe_runs_by_name(
    installed: Path, tmp_path: Path, tune: list[str | Path], autoload: bool, processes: int
) -> None:
    tree = shutil.copytree(installed, tmp_path / "installed")
    recipe = tree / "torchtune_agent" / "recipes" / "agent_sft_distributed.py"
    recipe.write_text(PROBE)
    how = [] if processes == 1 else ["--nproc_per_node", str(processes)]
    command = [*tune, "run", *how, "agent_sft_distributed", "--config", "tiny/agent_sft", "epochs=1"]
    result = run(*command, cwd=tmp_path, path=tree, autoload=autoload)
    assert result.returncode == 0, result.stderr
    config = tree / "torchtune_agent" / "configs" / "tiny" / "agent_sft.yaml"
    ran = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("rank*.json")}
    ranks = range(processes) if processes > 1 else "-"
    assert ran == {f"rank{rank}.json": [str(recipe), ["--config", str(config), "epochs=1"]] for rank in ranks}


@pytest.mark.network
@pytest.mark.parametrize(("version", "works"), TORCHAO.items())
def test_torchao_bounds_are_where_torchtune_breaks(version: str, works: bool, tmp_path: Path) -> None:
    folder = tmp_path / "torchao"
    fetched = pip(
        "install",
        f"torchao=={version}",
        "--no-deps",
        "--target",
        folder,
        "--retries",
        "1",
        "--timeout",
        "20",
        cwd=tmp_path,
    )
    if fetched.returncode != 0:
        pytest.skip(f"torchao {version} could not be fetched: {fetched.stderr.splitlines()[-1]}")
    code = "import torchao, torchtune.training, torchtune_agent; print(torchao.__file__)"
    result = run(sys.executable, "-c", code, cwd=tmp_path, path=folder)
    assert (result.returncode == 0) == works, result.stderr
    if works:
        assert Path(result.stdout.splitlines()[-1]).is_relative_to(folder)
    else:
        assert "ImportError" in result.stderr and str(folder) in result.stderr
    allowed = next(r for r in map(Requirement, requires("torchtune-agent") or []) if r.name == "torchao").specifier
    assert (version in allowed) == works
