"""Scores of a sharded model: on two ranks as on one to the last bit, killed and started again too, and as plain logits
have them.

`torchrun THIS_FILE FOLDER JOB ...` is what the tests start.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pyarrow import parquet
from torch.nn import functional
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from torchtune_agent.data import Collator  # noqa: E402
from torchtune_agent.data.joined import JoinedDataset, SampleInfo  # noqa: E402
from torchtune_agent.data.token_class import GROUPS, TokenClass  # noqa: E402
from torchtune_agent.distributed import World, make_mesh, process_group  # noqa: E402
from torchtune_agent.errors import UserError  # noqa: E402
from torchtune_agent.selection import ScoringOptions, score, scoring  # noqa: E402
from torchtune_agent.selection.scores import read_pool  # noqa: E402
from torchtune_agent.training.parallel import prepare  # noqa: E402
from torchtune_agent.training.settings import Settings  # noqa: E402

pytestmark = pytest.mark.distributed

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "embed_dim": 16,
    "intermediate_dim": 24,
    "max_seq_len": 64,
}
NUM = 61
OPTIONS = ScoringOptions(batch_size=3, batches_per_part=2, embedding_dim=8)  # 21 batches, 11 parts, the last is short


def make_model(seed: int = 0) -> TransformerDecoder:
    torch.manual_seed(seed)
    return qwen2(**SIZES, tie_word_embeddings=True)


def samples() -> list[dict[str, np.ndarray]]:
    """Of 5 to 40 tokens; one has only the end of a turn to train."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(NUM):
        size = int(rng.integers(5, 41))
        tokens, classes = rng.integers(0, 67, size), rng.integers(0, 8, size)
        classes[-1] = TokenClass.SPECIAL
        if i == 9:
            classes[:-1] = TokenClass.IGNORED
        labels = np.where(classes == TokenClass.IGNORED, -100, tokens)
        made.append({"tokens": tokens, "labels": labels, "token_class": classes})
    return made


class Data(list):
    """Two samples of every record."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(sample["tokens"]) for sample in self])

    def info(self, row: int) -> SampleInfo:
        return SampleInfo(f"d.jsonl:{row // 2 + 1}", "web", ("add",) * (row % 3))


def run(folder: Path, size: int, *, seed: int = 0) -> Path:
    full = make_model(seed).state_dict()
    with torch.device("meta"):
        model = qwen2(**SIZES, tie_word_embeddings=True)
    settings = Settings(output_dir=folder, device="cpu", dtype="fp32")
    world = World(torch.distributed.get_rank(), size, torch.device("cpu"), make_mesh("cpu", size, 1))
    prepare(model, OmegaConf.create(), settings, world, full)
    data = JoinedDataset({"data": Data(samples())})
    return score(model, data, Collator(pad_id=0), folder, world, OPTIONS)


def die_after(number: int) -> None:
    """Kill this process, as hard as can be, when it has written so many parts."""
    write, left = scoring.write_table, [number]

    def write_and_die(table: Any, path: Path) -> None:
        if left[0] == 0:
            path.with_suffix(".partial").write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        write(table, path)

    scoring.write_table = write_and_die


def main() -> None:
    folder, jobs = Path(sys.argv[1]), sys.argv[2:]
    with process_group("cpu") as (rank, size):
        for job in jobs:
            if job == "other":
                try:
                    run(folder / "one", size, seed=1)
                except UserError as error:
                    (folder / f"mistake_{rank}").write_text(str(error))
                continue
            if job.endswith("!"):
                die_after(2)
            run(folder / job.rstrip("!"), size)


def launch(folder: Path, size: int, *jobs: str) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size), __file__]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), *jobs], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert "Error" not in done.stderr or done.returncode, done.stderr[-3000:]
    return done.returncode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores")
    assert launch(path, 2, "two", "killed!") != 0
    assert 0 < len(list((path / "killed" / "scores").glob("*.parquet"))) < 11
    assert launch(path, 1, "one", "killed", "other") == 0
    return path


@pytest.mark.parametrize("other", ["two", "killed"])
def test_files_do_not_tell_how_many_ranks_made_them_nor_how_often_they_were_killed(folder: Path, other: str) -> None:
    names = [path.relative_to(folder / "one") for path in sorted((folder / "one").rglob("*.parquet"))]
    assert len(names) == 12
    for name in names:
        assert (folder / other / name).read_bytes() == (folder / "one" / name).read_bytes(), name


def test_scores_are_those_of_plain_logits(folder: Path) -> None:
    pool = read_pool(folder / "one" / "scores.parquet")
    table = parquet.read_table(folder / "one" / "scores.parquet")
    assert table["row"].to_pylist() == list(range(NUM))
    assert list(pool.ids[:3]) == ["d.jsonl:1", "d.jsonl:1#2", "d.jsonl:2"]
    assert pool.tools is not None and pool.tools[2] == ("add", "add") and pool.sources == ["web"] * NUM
    assert pool.entropy is not None and pool.error is not None and pool.embeddings is not None
    model = make_model()
    matrix = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) / 8**0.5
    hidden: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
    for row, sample in enumerate(samples()):
        with torch.no_grad():
            logits = model(torch.from_numpy(sample["tokens"])[None])[0, :-1].double()
        labels, classes = torch.from_numpy(sample["labels"])[1:], sample["token_class"][1:]
        log_p = functional.log_softmax(logits, -1)
        nll = -log_p[torch.arange(len(labels)), labels.clamp(min=0)].numpy()
        entropy = -(log_p.exp() * log_p).sum(-1).numpy()
        trained = labels.numpy() != -100
        for group, kinds in GROUPS.items():
            own = trained & np.isin(classes, kinds)
            if group == "overall" and not own.any():
                own = trained
            expected = nll[own].mean() if own.any() else np.nan
            assert pool.losses[group][row] == pytest.approx(expected, rel=1e-5, nan_ok=True), (group, row)
            if group == "overall":
                assert pool.entropy[row] == pytest.approx(entropy[own].mean(), rel=1e-4)
                assert pool.error[row] == pytest.approx((1 - np.exp(-nll[own])).mean(), rel=1e-5)
        state = hidden.pop()[:-1][torch.from_numpy(trained)].mean(0) @ matrix
        assert pool.embeddings[row] == pytest.approx(state.numpy(), rel=1e-3, abs=1e-5)
        assert pool.num_tokens[row] == len(sample["tokens"])


def test_scores_of_another_model_are_refused(folder: Path) -> None:
    message = (folder / "mistake_0").read_text()
    assert "holds scores of another model" in message and "Delete the folder" in message
    assert len(json.loads((folder / "one" / "scores" / "scoring.json").read_text())["first_losses"]) == 3


if __name__ == "__main__":
    main()
