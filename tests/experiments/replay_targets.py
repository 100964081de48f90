"""What replayed rows should be trained towards: their labels, the logits of the model as it was, or both.

python tests/experiments/replay_targets.py [--seeds 3]

Dark experience replay against plain replay, in a loop of its own that shares nothing with the recipes but the data, the
model and the rates of continual.py's two phases: the quickest way to learn whether stored logits are worth their room.
The model as it was after the old tools stands for the logits it would have stored. Prints a table.
"""

import argparse
import copy
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchtune.models.qwen2 import qwen2

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.experiments.continual import EPOCHS, ROWS, TWO, write_data  # noqa: E402
from torchtune_agent.data import IGNORE_INDEX, AgentSFTDataset, toolworld_tokenizer  # noqa: E402

LEARNING_RATE, WARM_UP = 3e-3, 30
TARGETS = {"labels": (1.0, 0.0), "logits": (0.0, 1.0), "half of each": (0.5, 0.5), "both": (1.0, 1.0)}

Row = tuple[list[int], list[int]]  # tokens, and the labels of their own places


def rows_of(file: Path) -> list[Row]:
    data = AgentSFTDataset(toolworld_tokenizer(max_seq_len=256), data_files=str(file))
    return [
        (list(map(int, one["tokens"])), list(map(int, one["labels"])))
        for one in map(data.__getitem__, range(len(data)))
    ]


def collated(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and what is to follow each."""
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    following = torch.full((len(rows), longest), IGNORE_INDEX)
    for i, (own, labels) in enumerate(rows):
        tokens[i, : len(own)] = torch.tensor(own)
        following[i, : len(labels) - 1] = torch.tensor(labels[1:])
    return tokens, following


class Learner:
    """A model, its optimizer, and how many steps it has made."""

    def __init__(self) -> None:
        self.model = qwen2(
            vocab_size=2048, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=128, intermediate_dim=256,
            max_seq_len=256, tie_word_embeddings=True,
        )  # fmt: skip
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.num_steps = 0

    def step(self, new: Sequence[Row], old: Sequence[Row], target: tuple[float, float], teacher: nn.Module) -> None:
        """The mean over all trained tokens; those of `old` towards their labels and the teacher, so much each."""
        tokens, following = collated([*new, *old])
        logits, trained = self.model(tokens), following != IGNORE_INDEX
        weights = torch.ones(len(tokens), 1)
        weights[len(new) :] = target[0]
        loss = F.cross_entropy(logits[trained], following[trained], reduction="none")
        total = (loss * weights.expand_as(following)[trained]).sum()
        if old and target[1]:
            replayed = trained[len(new) :]
            with torch.no_grad():
                wanted = teacher(tokens[len(new) :])[replayed].log_softmax(-1)
            given = logits[len(new) :][replayed].log_softmax(-1)
            total = total + target[1] * F.kl_div(given, wanted, log_target=True, reduction="sum")
        self.optimizer.zero_grad()
        (total / trained.sum()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.num_steps += 1
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, self.num_steps / WARM_UP)
        self.optimizer.step()

    @torch.no_grad()
    def exact(self, rows: Sequence[Row]) -> float:
        """The share of rows of which every trained token would be written."""
        found = 0
        for start in range(0, len(rows), 100):
            tokens, following = collated(rows[start : start + 100])
            right = (self.model(tokens).argmax(-1) == following) | (following == IGNORE_INDEX)
            found += int(right.all(1).sum())
        return found / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_data(TWO, Path(folder))
        data = {file.stem: rows_of(file) for file in sorted(Path(folder).glob("*.jsonl"))}
    found: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        draw, first = random.Random(seed), Learner()
        for _ in range(EPOCHS):
            draw.shuffle(data["old_train"])
            for start in range(0, len(data["old_train"]), ROWS):
                first.step(data["old_train"][start : start + ROWS], [], (1.0, 0.0), first.model)
        buffer = draw.sample(data["old_train"], TWO.buffer_size)
        for ratio in (TWO.replay_ratio, 0.5):
            for name, target in TARGETS.items():
                learner = second_phase(first, data["new_train"], buffer, ratio, target, random.Random(seed))
                accuracy = learner.exact(data["old_test"]), learner.exact(data["new_test"])
                found.setdefault((ratio, name), []).append(accuracy)
                print(
                    f"seed {seed}, replay_ratio {ratio}, {name}: old {accuracy[0]:.3f}, new {accuracy[1]:.3f}",
                    flush=True,
                )
    print(
        "\n| replay_ratio | replayed towards | old tools: exact calls | new tools: exact calls |"
        "\n| --- | --- | --- | --- |"
    )
    for (ratio, name), values in found.items():
        old, new = (f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in zip(*values, strict=True))
        print(f"| {ratio} | {name} | {old} | {new} |")


def second_phase(
    first: Learner,
    new: Sequence[Row],
    buffer: Sequence[Row],
    ratio: float,
    target: tuple[float, float],
    draw: random.Random,
) -> Learner:
    """Go on from `first` with new rows, replayed ones among them."""
    learner, owed = copy.deepcopy(first), 0.0
    learner.optimizer = torch.optim.AdamW(learner.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    learner.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for _ in range(EPOCHS):
        left = draw.sample(new, len(new))
        while left:
            fresh: list[Row] = []
            old: list[Row] = []
            while len(fresh) + len(old) < ROWS and left:
                owed += ratio
                if owed >= 1:
                    owed -= 1
                    old.append(draw.choice(buffer))
                else:
                    fresh.append(left.pop())
            learner.step(fresh, old, target, first.model)
    return learner


if __name__ == "__main__":
    main()
