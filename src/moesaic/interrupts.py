"""Signals that ask a process to end: Ctrl-C, SIGTERM of a scheduler, SIGHUP of a closed terminal."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = [
    "ENDING",
    "WARNING",
    "Interrupted",
    "answering_signals",
    "exit_status",
    "handling",
    "ignoring_warnings",
    "interruptible",
]

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command."""
WARNING: signal.Signals | None = getattr(signal, "SIGUSR1", None)
"""The signal by which schedulers say that time is nearly over."""


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end; whatever cleans up after Ctrl-C cleans up after it too."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def exit_status(error: BaseException) -> int:
    """The exit status of a process that a signal ended, as shells have it: 130, 143 or 129."""
    return 128 + (error.signum if isinstance(error, Interrupted) else signal.SIGINT)


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], Any], *signals: signal.Signals) -> Iterator[None]:
    """Let `handler` take these signals within. One that is ignored (nohup) stays so; other threads change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in signals}
    taken = {each: old for each, old in before.items() if old is not signal.SIG_IGN}
    for each in taken:
        signal.signal(each, handler)
    try:
        yield
    finally:
        for each, old in taken.items():
            signal.signal(each, signal.SIG_DFL if old is None else old)


def answering_signals(work: Callable[[], Any]) -> None:
    """Do work that does not return to Python for long: in a thread, so that a signal is answered at once."""
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    failed: list[BaseException] = []

    def do() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
    if failed:
        raise failed[0]


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Within, signals that end a process raise Interrupted, so that what is open is closed."""
    return handling(_interrupt, *ENDING, *(() if WARNING is None else (WARNING,)))


def ignoring_warnings() -> contextlib.AbstractContextManager[None]:
    """Within, a scheduler's warning does not kill; training reacts to it, what is short ends by itself."""
    return handling(_ignore, *(() if WARNING is None else (WARNING,)))


def _ignore(signum: int, frame: Any) -> None:
    pass


def _interrupt(signum: int, frame: Any) -> None:
    raise Interrupted(signum)
