"""What a whole training step costs: with metrics, without them, and as torchtune's own recipe does it.

    python tests/benchmarks/bench_step.py [--quick] [--tokens N] [--rounds N] [--threads N] [--json PATH]

The model has the shape of Qwen2.5 0.5B and random weights; 30 % of the tokens are supervised. A step is forward,
backward, and plain gradient descent: a costlier optimizer would only hide the differences. In fp32 on a CPU (about
7 GB), in bf16 on a GPU. `--quick` takes two layers and a smaller vocabulary. Ends with a non-zero status when a target
is missed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchtune import training
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import turns  # noqa: E402
from tests.reference import IGNORE_INDEX  # noqa: E402
from torchtune_agent.data import Batch, Collator, TokenClass  # noqa: E402
from torchtune_agent.losses import CrossEntropy  # noqa: E402
from torchtune_agent.metrics.sums import Sums  # noqa: E402

SHAPE: dict[str, Any] = {
    "vocab_size": 151_936,
    "num_layers": 24,
    "num_heads": 14,
    "num_kv_heads": 2,
    "embed_dim": 896,
    "intermediate_dim": 4864,
    "max_seq_len": 32_768,
    "tie_word_embeddings": True,
}
QUICK = {"vocab_size": 16_384, "num_layers": 2}
SUPERVISED = 0.3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(shape: dict[str, Any]) -> TransformerDecoder:
    torch.manual_seed(0)
    with training.set_default_dtype(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32), DEVICE:
        model = qwen2(**shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    return model


def make_batch(num_tokens: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    trained = torch.rand(num_tokens, generator=generator) < SUPERVISED
    classes = torch.where(trained, torch.randint(1, len(TokenClass), (num_tokens,), generator=generator), 0)
    sample = {"tokens": tokens, "labels": torch.where(trained, tokens, IGNORE_INDEX), "token_class": classes}
    return Collator(0)([[{name: value.numpy() for name, value in sample.items()}]]).to(DEVICE)


def our_step(model: TransformerDecoder, batch: Batch, optimizer: torch.optim.Optimizer, measure: bool) -> float:
    """As the Trainer does it."""
    objective = CrossEntropy(compile=DEVICE.type == "cuda")
    output = objective(model, batch, with_statistics=measure)
    (output.loss_sum * (1 / objective.num_targets(batch))).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sums = Sums.empty(DEVICE)
    sums.add(output.loss_sum.detach(), output.tokens, batch)
    return float(torch.cat([field.flatten() for field in vars(sums).values()]).cpu()[0]) / objective.num_targets(batch)


def torchtune_step(
    model: TransformerDecoder, batch: Batch, optimizer: torch.optim.Optimizer, loss: CEWithChunkedOutputLoss
) -> float:
    """As full_finetune_single_device of torchtune 0.6.1 does it, labels shifted already."""
    model.set_num_output_chunks(loss.num_output_chunks)
    num_tokens = (batch.labels != loss.ignore_index).sum()
    current = loss(model(tokens=batch.tokens), batch.labels) * num_tokens
    current.backward()
    training.scale_grads(model, 1 / num_tokens)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.set_num_output_chunks(0)
    return current.item() / num_tokens.item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(turns.hardware())
    shape = SHAPE | (QUICK if options.quick else {})
    model = make_model(shape)
    batch = make_batch(options.tokens or (256 if options.quick else 1024), shape["vocab_size"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)  # weights that move would make the rounds differ
    their_loss = CEWithChunkedOutputLoss()
    contestants: dict[str, Callable[[], float]] = {
        "with metrics": lambda: our_step(model, batch, optimizer, True),
        "without metrics": lambda: our_step(model, batch, optimizer, False),
        "torchtune": lambda: torchtune_step(model, batch, optimizer, their_loss),
    }
    losses = {name: step() for name, step in contestants.items()}
    assert max(losses.values()) < min(losses.values()) * 1.001, losses
    times = turns.seconds(contestants, options.rounds)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {batch.num_tokens} tokens")
    for name, own in times.items():
        print(f"  {name:20} {statistics.median(own):8.3f} s")
    results = [
        ("metrics on / off", turns.ratio(times, "with metrics", "without metrics"), 1.02),
        ("with metrics / torchtune", turns.ratio(times, "with metrics", "torchtune"), 1.0),
    ]
    return turns.report(results, options.json, times)


if __name__ == "__main__":
    sys.exit(main())
