"""Blocks of records to parts of a token store, by as many processes as there are cores, in the records' order."""

import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from torchtune_agent.data.encode import Encoded
from torchtune_agent.data.quarantine import DataReport
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.sources import Block, Lines, Source
from torchtune_agent.data.store import Part
from torchtune_agent.data.token_class import TokenClass
from torchtune_agent.errors import UserError

_ALONE = 2  # blocks made before other processes are started: most data sets in tests and trials have no more


class Transform(Protocol):
    def encode(self, record: Mapping[str, Any]) -> tuple[list[Encoded], str]:
        """The samples of a record and the format it was read as; BadRecord where there are none."""
        ...


def tokenize_block(block: Block, transform: Transform) -> tuple[Part, DataReport]:
    """The samples of a block, and what became of its records."""
    samples: list[Encoded] = []
    numbers: list[int] = []
    report = DataReport()
    for record in block.records():
        report.num_read += 1
        try:
            if record.problem is not None:
                raise record.problem
            made, name = transform.encode(record.data)
        except BadRecord as error:
            report.leave_out(record.where, error, record.excerpt or str(record.data))
            continue
        report.num_trained += 1
        report.formats += Counter([name])
        samples += made
        numbers += [record.number] * len(made)
    report.num_samples = len(samples)
    report.num_cut = sum(sample.num_cut > 0 for sample in samples)
    report.num_tokens = sum(len(sample.tokens) for sample in samples)
    report.num_supervised = sum(int(np.count_nonzero(s.token_class[1:] != TokenClass.IGNORED)) for s in samples)
    return Part.of(samples, numbers), report


def tokenize_source(
    source: Source, transform: Transform, summary: dict[str, Any], *, quiet: bool = False
) -> Iterator[Part]:
    """The samples of all records in order, with a progress bar unless `quiet`. `summary` is filled when the last was
    taken: `report`, `sources` and `names` (what the numbers in the parts stand for), and `largest_token`."""
    report = DataReport()
    sources: dict[tuple[str, bool], int] = {}
    names: dict[str, int] = {}
    largest = 0
    size = source.num_bytes
    bar = tqdm(total=size, desc="Tokenizing", unit="B", unit_scale=True, leave=False, delay=1, disable=quiet)
    with bar:
        for block, part, found in _tokenized(source.blocks(), transform):
            report.add(found)
            number = sources.setdefault((block.source, isinstance(block, Lines)), len(sources))
            largest = max(largest, int(part.tokens.max(initial=0)))
            bar.update(block.size)
            bar.set_postfix_str(f"{report.num_read:,} records", refresh=False)
            yield part.renamed(number, names)
    summary |= {
        "report": report.to_json(),
        "sources": list(sources),
        "names": list(names),
        "largest_token": largest,
    }


def _tokenized(blocks: Iterator[Block], transform: Transform) -> Iterator[tuple[Block, Part, DataReport]]:
    for block in islice(blocks, _ALONE):
        yield block, *tokenize_block(block, transform)
    first = next(blocks, None)
    if first is None:
        return
    num_processes = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # forking is not safe elsewhere
    if num_processes == 1:
        for block in chain([first], blocks):
            yield block, *tokenize_block(block, transform)
        return
    context = get_context("fork")  # hands the transform over as it is: a tokenizer need not be picklable
    with ProcessPoolExecutor(num_processes, context, initializer=_start, initargs=(transform,)) as pool:
        waiting: deque[tuple[Block, Future[tuple[Part, DataReport]]]] = deque()
        try:
            for block in chain([first], blocks):
                waiting.append((block, pool.submit(_tokenize_block, block)))
                if len(waiting) > 2 * num_processes:  # enough that none waits; reading on would fill the memory
                    block, done = waiting.popleft()
                    yield block, *done.result()
            for block, done in waiting:
                yield block, *done.result()
        except BrokenProcessPool as error:
            raise UserError(
                "dataset: a process that tokenizes died; most often the system ran out of memory and killed it."
            ) from error


_transform: Transform  # of the process that tokenizes


def _start(transform: Transform) -> None:
    global _transform
    _transform = transform
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the parent answers it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and may itself send this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _tokenize_block(block: Block) -> tuple[Part, DataReport]:
    return tokenize_block(block, _transform)
