"""Which conversations share a sequence.

Best fit, longest first: deterministic, no split conversation, and on real length mixes nearly full packs.
"""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Group indices so that every group's lengths sum to at most `capacity`."""
    lengths = np.asarray(lengths, np.int64)
    assert lengths.max(initial=0) <= capacity, "samples are cut to the capacity before they are packed"
    order = np.argsort(-lengths, kind="stable")
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by their free tokens
    rooms = 0  # bit n: there is a pack with n free tokens, so that the lowest bit from `length` on is the best fit
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            number = with_room[free].pop()
            if not with_room[free]:
                rooms ^= 1 << free
            packs[number].append(index)
        else:
            free, number = capacity, len(packs)
            packs.append([index])
        with_room[free - length].append(number)
        rooms |= 1 << (free - length)
    return packs
