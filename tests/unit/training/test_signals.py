"""Being asked to stop: at once before the first step, by a flag afterwards, and a second time without effect."""

import os
import signal

import pytest

from torchtune_agent.training.signals import EXIT_STOPPED, STOP_SIGNALS, Stopped, listening


@pytest.fixture(autouse=True)
def _handlers_stay_as_they_were():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_the_first_step_the_process_ends_at_once(number: signal.Signals) -> None:
    with pytest.raises(Stopped) as stopped, listening() as request:
        os.kill(os.getpid(), number)
    assert stopped.value.code == EXIT_STOPPED == 75 == os.EX_TEMPFAIL
    assert request.by == number.name and request.ends_start


def test_during_training_it_is_only_noted_and_a_second_one_changes_nothing() -> None:
    with listening() as request:
        request.start()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.by == "SIGUSR1" and not request.ends_start
    os.kill(os.getpid(), signal.SIGTERM)  # the process is ending: it would die of this one if it were not ignored


def test_one_that_was_swallowed_during_the_start_is_remembered() -> None:
    with listening() as request:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            pass
        with pytest.raises(Stopped):
            request.start()


def test_without_a_signal_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
