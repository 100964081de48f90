"""How fast turns are tagged: against the naive way, against tokenizing, and on 10 MB of hostile text or tiny calls.

    python tests/benchmarks/bench_tagging.py [--quick] [--json PATH]

Uses the tokenizer and the real turns of the shared folder beside the repository where it is there, toolworld's
tokenizer and written turns where it is not. Ends with a non-zero status when a target is missed.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.reference import call_blocks, tag_by_decoding_every_token  # noqa: E402
from tests.tagged_turns import WRITERS, written_turn  # noqa: E402
from torchtune_agent.data.tagging import tag_turn, tags_per_token  # noqa: E402

SHARED = ROOT.parent / "shared"
NUM_TOKENS = 30_000
# style -> what 10 MB of hostile text are made of: beginning, repeated, end
HOSTILE: dict[str, list[tuple[bytes, bytes, bytes]]] = {
    "xml": [(b"", b"<function=", b""), (b"<function=f>", b"<parameter=a>", b""), (b"", b"<think>", b"")],
    "tool_call": [
        (b"", b"<tool_call>", b""),
        (b'<tool_call>{"name":"f","arguments":{"a":', b'{"a":[', b"</tool_call>"),
        (b'<tool_call>{"name":"f","arguments":{"a":[', b'"[",', b"</tool_call>"),
        (b'<tool_call>{"name":"f","arguments":{"a":"', b'\\"', b"</tool_call>"),
        (b"<tool_call>", b'"', b"</tool_call>"),
    ],
    "llama3": [(b"", b"{", b""), (b'{"name":"a","parameters":{"a":', b'{"a":', b""), (b"", b"<|python_tag|>", b"")],
    "mistral": [(b"", b"[TOOL_CALLS]", b""), (b'[TOOL_CALLS]f{"a":', b"[", b""), (b'[TOOL_CALLS]f{"a":', b'"', b"")],
    "pythonic": [(b"", b"[f(", b""), (b"[f(a=", b"[", b""), (b"[f(a=", b'"', b""), (b'[f(a="', b"\\'", b"")],
    "react": [(b"", b"Action:", b""), (b'Action: f\nAction Input: {"a":', b"[", b""), (b"", b"\n", b"")],
    "fenced": [(b"", b"```", b""), (b"```bash\n", b"```", b""), (b"", b"`", b"")],
    "auto": [
        (b"", b"<tool_call>", b""),
        (b"", b"{", b""),
        (b"", b'"', b""),
        (b"", b"<function=", b""),
        (b"", b"[", b""),
    ],
}


# the same for legal text: as many tiny calls, arguments or thoughts as there can be
DENSE: dict[str, list[tuple[bytes, bytes, bytes]]] = {
    "xml": [
        (b"", b"<function=f><parameter=a>1</parameter></function>", b""),
        (b"", b"<function=f></function>", b""),
        (b"", b"<think></think>", b""),
        (b"", b"<think></think><function=f></function>", b""),
    ],
    "tool_call": [
        (b"", b'<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>', b""),
        (b"<tool_call>", b'{"name":"f"}', b"</tool_call>"),
        (b'<tool_call>{"name":"f","arguments":{"a":1', b',"a":1', b"}}</tool_call>"),
    ],
    "llama3": [
        (b"", b"<|python_tag|>f.call(a=1)\n", b""),
        (b"", b'<|python_tag|>{"name":"f","parameters":{"a":1}}\n', b""),
        (b"[", b'{"name":"f","parameters":{}},', b'{"name":"f","parameters":{}}]'),
    ],
    "mistral": [
        (b"", b"[TOOL_CALLS]f{}", b""),
        (b"", b'[TOOL_CALLS][{"name":"f","arguments":{"a":1}}]', b""),
        (b"[TOOL_CALLS][", b'{"name":"f","arguments":{"a":1}},', b'{"name":"f","arguments":{}}]'),
    ],
    "pythonic": [(b"[", b"f(a=1), ", b"g()]"), (b"[", b"f(a=1), g(), ", b"g()]"), (b"[f(", b"1,", b"1)]")],
    "react": [(b"", b'Action: f\nAction Input: {"a": 1}\n', b""), (b"", b"Action:f[]\n", b"")],
    "fenced": [(b"", b"```\nx\n```\n", b""), (b"", b"```py\n```\n", b"")],
    "auto": [(b"", b"<think></think>", b""), (b"", b'<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>', b"")],
}


def load_tokenizer() -> tuple[Tokenizer, str]:
    path = SHARED / "models/qwen2_5/tokenizer.json"
    path = path if path.is_file() else ROOT / "torchtune_agent/toolworld/tokenizer/tokenizer.json"
    return Tokenizer.from_file(str(path)), path.parent.name


def real_turns() -> list[str]:
    xml = SHARED / "data/swe-smith/tests/test_logs/ft_xml_example.jsonl"
    hermes = SHARED / "data/toolrl/dataset/rlla_4k_raw/rlla_sft.json"
    if not (xml.is_file() and hermes.is_file()):
        rng = random.Random(0)
        return [written_turn(rng.choice(list(WRITERS)), rng).text * 5 for _ in range(500)]
    lines = [json.loads(line) for line in xml.read_text().splitlines()]
    turns = [m["content"] for record in lines for m in record["messages"] if m["role"] == "assistant"]
    turns = [turn if isinstance(turn, str) else turn[0]["text"] for turn in turns]
    turns += [record["output"] for record in json.loads(hermes.read_text())]
    random.Random(0).shuffle(turns)
    return turns


def thirty_thousand_tokens(tokenizer: Tokenizer) -> tuple[list[str], list[list[int]]]:
    turns, ids, total = [], [], 0
    for turn in real_turns():
        encoded = tokenizer.encode(turn, add_special_tokens=False).ids
        if turn and encoded:
            turns.append(turn)
            ids.append(encoded)
            total += len(encoded)
        if total >= NUM_TOKENS:
            break
    return turns, ids


def token_starts(tokenizer: Tokenizer, turn: str) -> np.ndarray:
    """The byte at which each token begins; tokens of one character share its start, and are folded as one here."""
    offsets = tokenizer.encode(turn, add_special_tokens=False).offsets
    sizes = np.cumsum([0] + [len(char.encode()) for char in turn])
    return np.unique(sizes[[start for start, _ in offsets]])


def seconds(rounds: int, **alternatives: Callable[[], object]) -> dict[str, list[float]]:
    """The processor time of every round, the alternatives taking turns: what else the machine does counts little."""
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    return times


def medians(rounds: int, **alternatives: Callable[[], object]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds(rounds, **alternatives).items()}


def compare_speeds(rounds: int) -> dict[str, float]:
    tokenizer, _ = load_tokenizer()
    turns, ids = thirty_thousand_tokens(tokenizer)
    texts = [turn.encode() for turn in turns]
    starts = [token_starts(tokenizer, turn) for turn in turns]
    whole = [token for turn in ids for token in turn]

    def tagged() -> None:
        for text, begin in zip(texts, starts, strict=True):
            tags_per_token(tag_turn(text, style="auto")[0], begin)

    times = medians(
        rounds,
        naive=lambda: tag_by_decoding_every_token(whole, lambda t: tokenizer.decode(t, False), call_blocks),
        tokenize=lambda: [tokenizer.encode(turn, add_special_tokens=False) for turn in turns],
        tag=tagged,
    )
    print(
        f"{len(whole):,} tokens in {len(turns)} turns: " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in times.items())
    )
    return times


def slowest_and_growth(
    texts: dict[str, list[tuple[bytes, bytes, bytes]]], size: int, rounds: int, ways: tuple[bool, ...]
) -> tuple[float, float]:
    """The slowest text of all, in seconds, and the largest growth when a text is doubled, both at their fastest."""
    slowest, growth = 0.0, 0.0
    for style, patterns in texts.items():
        for beginning, repeated, end in patterns:
            text = beginning + repeated * (size // len(repeated)) + end
            twice = beginning + repeated * (2 * size // len(repeated)) + end
            for truncated in ways:
                times = seconds(
                    rounds,
                    once=lambda: tag_turn(text, style=style, truncated=truncated),  # noqa: B023
                    twice=lambda: tag_turn(twice, style=style, truncated=truncated),  # noqa: B023
                )
                once, doubled = min(times["once"]), min(times["twice"])
                print(f"  {style:9} {repeated.decode()!r:56} {once * 1e3:7.1f} ms, doubled x{doubled / once:.2f}")
                slowest = max(slowest, once)
                if doubled > 0.25:  # below, getting the memory for the tags is most of it
                    growth = max(growth, doubled / once)
    return slowest, growth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, commit {commit}")
    times = compare_speeds(7 if options.quick else 21)
    rounds = 3 if options.quick else 9
    slowest, growth = slowest_and_growth(HOSTILE, 10_000_000, rounds, (False, True))
    slowest_dense, dense_growth = slowest_and_growth(DENSE, 10_000_000, rounds, (False,))
    results = [
        ("naive / tagging", times["naive"] / times["tag"], ">=", 50.0),
        ("tagging / tokenizing", times["tag"] / times["tokenize"], "<=", 0.15),
        ("slowest 10 MB, seconds", slowest, "<=", 1.0),
        ("largest growth when doubled", growth, "<=", 2.5),
        ("slowest 10 MB of tiny calls", slowest_dense, "<=", 1.0),
        ("their growth when doubled", dense_growth, "<=", 2.5),
    ]
    met = True
    for name, value, relation, target in results:
        good = value >= target if relation == ">=" else value <= target
        met = met and good
        print(f"{name:30} {value:8.3f}   target {relation} {target:g}   {'ok' if good else 'MISSED'}")
    if options.json:
        rows = {name: {"value": value, "target": f"{relation} {target:g}"} for name, value, relation, target in results}
        options.json.write_text(
            json.dumps({"commit": commit, "hardware": platform.platform(), "results": rows}, indent=1)
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
