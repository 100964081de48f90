"""Which conversations share a sequence.

Best fit, longest first: deterministic, no split conversation, and on real length mixes nearly full packs.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group indices so that every group's lengths sum to at most `capacity`."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack number), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert length <= capacity, "samples are cut to the capacity before they are packed"
        slot = bisect_left(room, (length, -1))
        if slot == len(room):
            packs.append([index])
            insort(room, (capacity - length, len(packs) - 1))
        else:
            free, number = room.pop(slot)
            packs[number].append(index)
            insort(room, (free - length, number))
    return packs
