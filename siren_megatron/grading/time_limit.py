"""A limit on processor time for calls of pure Python, from inside the process."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class OutOfTime(BaseException):
    """The block ran past its limit. Not an Exception: libraries that swallow those must not swallow this."""


@contextlib.contextmanager
def cpu_time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block once the process has computed for so many seconds.

    Processor time and not the clock's: a busy machine does not turn right answers into wrong ones. Only the
    main thread can be interrupted, and no single long operation of C code; elsewhere nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    # Again and again: a finalizer may swallow the first one.
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
