"""What a step of LoRA and QLoRA takes: ours, with metrics, against torchtune's own and peft with transformers.

    python tests/benchmarks/bench_adapters.py [--quick] [--tokens N] [--rounds N] [--threads N] [--json PATH]

The same decoder (Qwen2's kind, random weights) with adapters of rank 16 on all linears of all layers, and the same
tokens, 30 % of them trained. A step is forward, backward, and plain gradient descent on the adapters. They take turns
in one process; the memory is that of a fresh process each, from before there is a model to the fullest moment of its
second step. QLoRA of torchtune alone: peft's needs a GPU. Ends with a non-zero status where ours is slower or larger.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import turns  # noqa: E402
from tests.benchmarks.bench_step import DEVICE, SHAPE, make_batch, make_model, our_step, torchtune_step  # noqa: E402
from torchtune_agent.data import Batch  # noqa: E402
from torchtune_agent.models.adapter import AdapterSettings  # noqa: E402
from torchtune_agent.training.adapters import add_adapters  # noqa: E402

RANK, ALPHA = 16, 32
LINEARS = ["q_proj", "k_proj", "v_proj", "output_proj"]
Step = Callable[[], float]


def ours(shape: dict[str, Any], batch: Batch, *, quantized: bool) -> Step:
    model = make_model(shape)
    add_adapters(model, AdapterSettings(rank=RANK, alpha=ALPHA, quantize_base=quantized))
    optimizer = _optimizer(model)
    return lambda: our_step(model, batch, optimizer, True)


def torchtunes(shape: dict[str, Any], batch: Batch, *, quantized: bool) -> Step:
    sizes = {"lora_rank": RANK, "lora_alpha": ALPHA, "quantize_base": quantized}
    with DEVICE:
        model = lora_qwen2(lora_attn_modules=LINEARS, apply_lora_to_mlp=True, **sizes, **shape)  # pyright: ignore
    for name, parameter in model.named_parameters():
        if "lora" not in name and type(parameter) is torch.nn.Parameter and not quantized:
            torch.nn.init.normal_(parameter, 0.0, 0.02)
    set_trainable_params(model, get_adapter_params(model))
    optimizer, loss = _optimizer(model), CEWithChunkedOutputLoss()
    return lambda: torchtune_step(model, batch, optimizer, loss)


def pefts(shape: dict[str, Any], batch: Batch) -> Step:
    import peft
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embed_dim"],
        intermediate_size=shape["intermediate_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    base = transformers.AutoModelForCausalLM.from_config(config).to(DEVICE)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = _optimizer(model)

    def step() -> float:
        loss = model(input_ids=batch.tokens, shift_labels=batch.labels, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _optimizer(model: torch.nn.Module | TransformerDecoder) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9)


CONTESTANTS: dict[str, Callable[[dict[str, Any], Batch], Step]] = {
    "LoRA, ours": lambda shape, batch: ours(shape, batch, quantized=False),
    "LoRA, torchtune": lambda shape, batch: torchtunes(shape, batch, quantized=False),
    "LoRA, peft": pefts,
    "QLoRA, ours": lambda shape, batch: ours(shape, batch, quantized=True),
    "QLoRA, torchtune": lambda shape, batch: torchtunes(shape, batch, quantized=True),
}
PAIRS = (("LoRA, ours", "LoRA, torchtune"), ("LoRA, ours", "LoRA, peft"), ("QLoRA, ours", "QLoRA, torchtune"))


def peak_of(name: str, shape: dict[str, Any], tokens: int) -> int:
    """Bytes that the contestant takes at most in its second step; this process must be a fresh one."""
    tiny = {**shape, "num_layers": 1, "vocab_size": 256, "embed_dim": 128, "num_heads": 2, "intermediate_dim": 256}
    CONTESTANTS[name](tiny, make_batch(64, 256))()  # the code of libraries does not count
    batch = make_batch(tokens, shape["vocab_size"])
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _resident("VmRSS")
    step = CONTESTANTS[name](shape, batch)
    step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPE | ({"vocab_size": 16_384, "num_layers": 2} if options.quick else {"num_layers": 6})
    tokens = options.tokens or (256 if options.quick else 1024)
    if options.peak_of:
        print(peak_of(options.peak_of, shape, tokens))
        return 0
    print(turns.hardware())
    memory = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        memory[name] = int(done.stdout.splitlines()[-1])
    batch = make_batch(tokens, shape["vocab_size"])
    times = turns.seconds({name: make(shape, batch) for name, make in CONTESTANTS.items()}, options.rounds)
    for name, own in times.items():
        print(f"  {name:20} {statistics.median(own):8.3f} s {memory[name] / 1e9:8.2f} GB")
    results = [
        result
        for one, other in PAIRS
        for result in (
            (f"{one} / {other}, time", turns.ratio(times, one, other), 1.0),
            (f"{one} / {other}, memory", memory[one] / memory[other], 1.0),
        )
    ]
    details = {"times": times, "memory": memory, "shape": shape}
    return turns.report(results, options.json, details)


if __name__ == "__main__":
    sys.exit(main())
