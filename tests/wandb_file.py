"""Reads what WandB wrote offline: LevelDB log blocks of 32 KiB that hold its own protobuf messages."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(run_file: Path) -> Iterator[Any]:
    """Every message in a `run-*.wandb`."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    content = run_file.read_bytes()
    assert content[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        if kind == 0:
            break
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or last part
            yield Record.FromString(record)
            record = b""


def history(run_file: Path) -> Iterator[dict[str, Any]]:
    """The rows that were logged."""
    for message in records(run_file):
        if message.HasField("history"):
            items = message.history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
