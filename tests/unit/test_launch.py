"""What `tune run` asks of torchrun: time to save, unless the user says how long."""

from argparse import Namespace

import pytest

from torchtune_agent import launch
from torchtune_agent.training.signals import STOP_SIGNALS


@pytest.fixture
def args(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    return Namespace(shutdown_timeout=None, signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT")


def test_workers_get_time_to_save(args: Namespace) -> None:
    launch._give_time_to_save(args)
    assert args.shutdown_timeout == 300
    assert not {number.name for number in STOP_SIGNALS} & set(args.signals_to_handle.split(","))


def test_the_time_that_the_user_gives_is_kept(args: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "20")  # read by torchrun where no option is given
    launch._give_time_to_save(args)
    assert args.shutdown_timeout is None
    args.shutdown_timeout = 10
    launch._give_time_to_save(args)
    assert args.shutdown_timeout == 10
