"""What the whole road from a file to tagged tokens costs, beside tokenizing the same text alone.

    python tests/benchmarks/bench_road.py [--quick] [--rounds N] [--json PATH]

The road reads the file, converts, checks, renders by the chat template, tokenizes and tags. What it is measured by is
`Tokenizer.encode` of every rendered text as a whole, in the same process and thread. Real data and templates of the
shared folder beside the repository where it is there; ToolWorld, plain and with many turns, always. Ends with a
non-zero status when a target is missed.

- A text is tokenized once for each sample that is trained: where the template rewrites history (Qwen3), samples of one
  conversation share most of their text, and who tokenizes them alone does it for every sample.
- Records that are refused cost the road its time, and tokenizing nothing.
- Before every round the road forgets all texts and words it remembers, while the tokenizer keeps the words in its own
  cache. `details` has the ratios of a road that keeps single words too, as both do from record to record.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import turns  # noqa: E402
from torchtune_agent.data.dataset import AgentSFTTransform  # noqa: E402
from torchtune_agent.data.reasons import BadRecord  # noqa: E402
from torchtune_agent.data.sources import read_records  # noqa: E402
from torchtune_agent.data.templates import ChatTemplateTokenizer  # noqa: E402
from torchtune_agent.data.toolworld import toolworld_tokenizer  # noqa: E402
from torchtune_agent.toolworld import ToolWorld  # noqa: E402

SHARED = ROOT.parent / "shared"
TARGET = 1.5
REAL = {
    "glaive": "llamafactory/data/glaive_toolcall_en_demo.json",
    "toolrl": "toolrl/dataset/rlla_4k_raw/rlla_sft.json",
    "swe xml": "swe-smith/tests/test_logs/ft_xml_example.jsonl",
}


def contestants(folder: Path) -> Iterator[tuple[str, Path, ChatTemplateTokenizer]]:
    rows = ToolWorld(num_tools=200, seed=0).conversations("train", 300)
    plain, long = folder / "toolworld.jsonl", folder / "long.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    together = [message for row in rows for message in row["messages"] if message["role"] != "system"]
    many = [{"messages": together[i : i + 200]} for i in range(0, len(together) - 200, 200)]
    long.write_text("".join(json.dumps(row) + "\n" for row in many))
    yield "toolworld", plain, toolworld_tokenizer()
    yield "toolworld, 200 messages", long, toolworld_tokenizer()
    for model in ("qwen2_5", "qwen3"):
        if (SHARED / "models" / model).is_dir():
            tokenizer = ChatTemplateTokenizer(SHARED / "models" / model)
            yield f"200 messages, {model}", long, tokenizer
            for name, path in REAL.items():
                if (SHARED / "data" / path).is_file():
                    yield f"{name}, {model}", SHARED / "data" / path, tokenizer


def compare(path: Path, tokenizer: ChatTemplateTokenizer, rounds: int) -> tuple[float, float, int]:
    """How many times the time of tokenizing the whole road takes, the same with words from the round before, and the
    tokens that come out."""
    transform = AgentSFTTransform(tokenizer, over_long="drop")
    texts: list[str] = []
    num_tokens = 0
    for record in read_records("json", str(path)):
        try:
            samples = tokenizer.samples(transform.conversation(record.data)[0])
        except (BadRecord, ValueError):
            continue
        texts += [sample.text for sample in samples]
        num_tokens += sum(len(sample.tokens) for sample in samples)

    def road(words: bool = True) -> None:
        tokenizer._controls.forget(words=words)
        for record in read_records("json", str(path)):
            try:
                transform.encode(record.data)
            except BadRecord:
                continue

    def tokenize() -> None:
        for text in texts:
            tokenizer.encode(text)

    times = turns.seconds({"road": road, "tokenizing": tokenize, "warm": lambda: road(words=False)}, rounds)
    return turns.ratio(times, "road", "tokenizing"), turns.ratio(times, "warm", "tokenizing"), num_tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(turns.hardware())
    rounds = options.rounds or (3 if options.quick else 7)
    results, warm = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path, tokenizer in contestants(Path(folder)):
            rows = islice(read_records("json", str(path)), 40 if options.quick else 300)
            part = Path(folder) / "part.jsonl"
            part.write_text("".join(json.dumps(row.data) + "\n" for row in rows))
            ratio, warm[name], num_tokens = compare(part, tokenizer, rounds)
            results.append((f"{name}, {num_tokens:,} tokens", ratio, TARGET))
    median = statistics.median(value for _, value, _ in results)
    print("\nwith words from the round before:", ", ".join(f"{name} {value:.2f}" for name, value in warm.items()))
    return turns.report(results, options.json, {"median": median, "with words from the round before": warm})


if __name__ == "__main__":
    sys.exit(main())
