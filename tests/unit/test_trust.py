"""Configs name only components of packages that are trusted, by where these were really defined."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch.optim import AdamW

from torchtune_agent import config
from torchtune_agent.config import check_components, component, instantiate, trust
from torchtune_agent.data import AgentSFTDataset, toolworld_tokenizer
from torchtune_agent.errors import UserError


@pytest.fixture(autouse=True)
def _trust_ends_with_the_test() -> Iterator[None]:
    yield
    trust([])


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that leaves a file when it is imported."""
    package = tmp_path / "stranger_pkg"
    package.mkdir()
    code = f"open({str(tmp_path / 'imported')!r}, 'w')\nimport os\ndef work(**options): return 'worked'\n"
    (package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "imported"
    sys.modules.pop("stranger_pkg", None)


REFUSED = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "torchtune.config._instantiate.os.system",  # reached through a package that is trusted
    "torch.os.popen",
    "torchtune_agent.distributed.os._exit",
    "torchtune_agent.config.OmegaConf.load",
    "torchtune_agentx.thing",  # a name that only begins alike
]


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_not_trusted_is_refused_with_the_remedy(path: str) -> None:
    with pytest.raises(UserError, match=f"dataset: cannot load '{path}'.*trusted_components="):
        component(path, "dataset")


def test_the_remedy_in_the_message_works() -> None:
    with pytest.raises(UserError) as refused:
        component("torchtune.config._instantiate.os.system", "dataset")
    trust([str(refused.value).rpartition("trusted_components=[")[2].rstrip("]")])
    assert callable(component("torchtune.config._instantiate.os.system", "dataset"))


def test_a_package_that_is_not_trusted_is_not_even_imported(stranger: Path) -> None:
    with pytest.raises(UserError, match="stranger_pkg"):
        instantiate({"_component_": "stranger_pkg.work"}, "dataset")
    assert not stranger.exists()
    trust(["stranger_pkg"])
    assert instantiate({"_component_": "stranger_pkg.work"}, "dataset") == "worked"
    assert stranger.exists()


def test_trust_in_a_package_is_none_in_what_it_imports(stranger: Path) -> None:
    trust(["stranger_pkg"])
    with pytest.raises(UserError, match=r"It is posix\.system"):
        component("stranger_pkg.os.system", "dataset")


@pytest.mark.parametrize(
    "section",
    [
        {"dataset": {"_component_": "torchtune_agent.data.AgentSFTDataset", "extra": {"_component_": "os.system"}}},
        {"dataset": [{"_component_": "os.system"}]},
        {"tokenizer": {"_component_": "torchtune.models.qwen2_5.qwen2_5_tokenizer", "prompt_template": "os.system"}},
        {"nobody": {"reads": [{"this": {"_component_": "torch.os.system"}}]}},
        {"name": "os.system", "loss": {"_component_": "${name}"}},
    ],
)
def test_a_config_is_searched_however_deep(section: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"cannot load '(torch\.)?os.system'"):
        check_components(OmegaConf.create(section))


def test_formats_and_styles_of_ones_own_go_through_the_same_gate(stranger: Path) -> None:
    for option in ("format", "call_style"):
        with pytest.raises(UserError, match=rf"dataset\.{option}: cannot load 'stranger_pkg.work'"):
            AgentSFTDataset(toolworld_tokenizer(), source=[], **{option: "stranger_pkg.work"})  # pyright: ignore
    with pytest.raises(UserError, match="cannot load 'stranger_pkg.work'"):
        AgentSFTDataset(toolworld_tokenizer(), source=[], message_transform={"_component_": "stranger_pkg.work"})
    assert not stranger.exists()


def test_ordinary_components_pass_also_where_they_are_partials() -> None:
    assert component("torch.optim.AdamW", "optimizer") is AdamW
    assert callable(component("torchtune.models.llama3.qlora_llama3_8b", "model"))  # a functools.partial
    assert component("torchtune.datasets.AgentSFTDataset", "dataset") is AgentSFTDataset  # moved


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(UserError, match="It is not a class or function"):
        component("torchtune.models", "model")


def test_every_config_of_ours_passes() -> None:
    paths = sorted((Path(config.__file__).parent.parent / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        check_components(OmegaConf.load(path))
