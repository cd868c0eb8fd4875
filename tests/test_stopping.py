"""The first signal is noted, the second ends the process; outside of a training one ends the work."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from whp_fast.stopping import SIGNALS, Stopped, StopRequest, deaf_to_sigterm, interrupt_on_sigterm

STOPPING = b"stopping: this step is finished and saved (once more leaves at once)\n"
LEFT = b"left at once; the last snapshot is kept\n"

CHILD = """
import signal, sys
from whp_fast.stopping import StopRequest
request = StopRequest(tell=sys.argv[2] == "loud")
with request.awaited():
    assert not request.asked
    signal.raise_signal(int(sys.argv[1]))
    assert request.asked
    print("noted", flush=True)
    signal.raise_signal(int(sys.argv[1]))
    print("not reached", flush=True)
"""


@pytest.mark.parametrize(("number", "loudness"), [(signal.SIGINT, "loud"), (signal.SIGTERM, "quiet")])
def test_the_first_signal_is_noted_and_the_second_leaves_at_once(number, loudness):
    done = subprocess.run([sys.executable, "-c", CHILD, str(int(number)), loudness], capture_output=True)
    assert done.returncode == 128 + number
    assert done.stdout == b"noted\n"
    assert done.stderr == (STOPPING + LEFT if loudness == "loud" else b"")


@pytest.fixture
def handlers():
    """Handlers as they were, afterwards too."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_handlers_come_back(handlers, capfd):
    request = StopRequest()
    with pytest.raises(ValueError, match="of the work"), request.awaited() as same:
        assert same is request
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("of the work")
    assert request.asked
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
    assert capfd.readouterr().err.encode() == STOPPING


def test_sigterm_ends_the_work_as_ctrl_c_does(handlers):
    interrupt_on_sigterm()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    with deaf_to_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_other_threads_leave_signals_alone(handlers):
    """Only the main thread may set handlers."""
    seen = []

    def work():
        with StopRequest().awaited() as request, deaf_to_sigterm():
            interrupt_on_sigterm()
            seen.append((request.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, handlers[signal.SIGTERM])]


def test_a_stop_is_an_interrupt():
    assert issubclass(Stopped, KeyboardInterrupt)
