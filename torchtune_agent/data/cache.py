"""Token stores on disk, made once: by the first process that asks, while the others that ask for the same wait.

A store is found by what it was made of. It is written aside and renamed when it is whole, so that one that was
interrupted is never found; the lock only saves work, and where a file system has none every process makes its own.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtune_agent.data.store import TokenStore
from torchtune_agent.distributed import rank_from_environment
from torchtune_agent.errors import UserError

_VARIABLE = "TORCHTUNE_AGENT_CACHE"


def cache_folder(configured: str | None) -> Path:
    """Where stores are kept: what the config says, $TORCHTUNE_AGENT_CACHE, or the user's cache folder."""
    chosen = configured or os.environ.get(_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchtune_agent"


def fetch(folder: Path, key: str, write: Callable[[Path], None]) -> TokenStore:
    """The store of `key` in `folder`, made by `write` where it is not there."""
    place = folder / key
    store = TokenStore.open(place)
    if store is not None:
        return store
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{key}.lock"):
            store = TokenStore.open(place)  # made while this process waited
            if store is None:
                _make(place, write)
                store = TokenStore.open(place)
    except OSError as error:
        raise UserError(
            f"dataset.cache_dir={folder}: cannot write tokens there: {error.strerror or error}. "
            f"Name another folder (or set {_VARIABLE})."
        ) from error
    assert store is not None, f"{place} was just written"
    return store


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this machine; the lock of one that dies is free."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if rank_from_environment() == 0:
                print("waiting for another process that tokenizes the same data ...", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def _make(place: Path, write: Callable[[Path], None]) -> None:
    draft = place.with_name(f"{place.name}.writing-{os.uname().nodename}-{os.getpid()}")
    for left in place.parent.glob(f"{place.name}.writing-{os.uname().nodename}-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        write(draft)
        if place.exists():  # damaged: its files are not of the size they were written
            shutil.rmtree(place)
        draft.rename(place)
    except OSError:
        if TokenStore.open(place) is None:  # else another machine was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
