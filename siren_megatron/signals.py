"""SIGTERM and SIGUSR1: the step is finished, the run saved and ended with exit code 0.

SLURM sends SIGUSR1 before a time limit (`--signal=USR1@120`) and SIGTERM at it, to every process of a job;
torchrun sends SIGTERM to its ranks when it is told to end, and when one of them failed. So the signals may
reach some ranks only, and the ranks agree once a step.

The signals are blocked and a thread waits for them: it hears them while the main thread sits in a collective,
and processes that are started from here (vLLM, rewards, checkpoint writers) inherit the blocking, so that
what is sent to the whole process group does not take them away from under the step. Should a library unblock
them, a handler hears them too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ORPHANED = 1_000  # above every signal number: the launcher is gone
_POLL_S = 1.0


class StopSignals:
    """Blocks the signals at once, so make it before any library starts threads, in the main thread.

    Until `arm` is called a signal ends the process as it always does: there is nothing to save yet. One that
    the launcher had ignored waits.
    """

    def __init__(self) -> None:
        self._received = 0
        self._peer_failed: Callable[[], bool] | None = None
        self._parent = os.getppid()
        # SIGUSR1 first, which would kill the resource tracker; it unblocks SIGTERM where it is started.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        ignored = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) == signal.SIG_IGN]
        self._deadly = set(STOP_SIGNALS) - set(ignored)
        for signum in STOP_SIGNALS:
            signal.signal(signum, lambda number, frame: self._hear(number))
        threading.Thread(target=self._listen, name="stop-signals", daemon=True).start()

    def arm(self, peer_failed: Callable[[], bool]) -> None:
        """From now on a signal waits for the end of the step.

        Args:
            peer_failed: whether another rank has failed. torchrun's SIGTERM then means that there will be no
                end of the step, and this process ends at once.
        """
        self._peer_failed = peer_failed

    def received(self) -> int:
        """What this process was sent, as a number to compare with those of other ranks; 0 = nothing."""
        return self._received

    def _listen(self) -> None:
        while True:
            info = signal.sigtimedwait(STOP_SIGNALS, _POLL_S)
            # Where the process was stopped (SIGSTOP, a suspended SLURM job) past the end of that time,
            # CPython returns a siginfo that nobody has filled.
            was_sent = info is not None and info.si_signo in STOP_SIGNALS
            number = info.si_signo if was_sent else self._received
            if not number and self._is_orphan():
                number = _ORPHANED
            if number:
                self._hear(number)

    def _hear(self, number: int) -> None:
        if self._peer_failed is None and (number in self._deadly or number == _ORPHANED):
            _end_by(number)
        elif self._peer_failed is not None and self._peer_failed():
            os._exit(1)
        self._received = self._received or number

    def _is_orphan(self) -> bool:
        # Only torchrun's ranks: a run without it may well outlive the shell that started it.
        return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent


def describe(received: int) -> str:
    """What `StopSignals.received` means, in words."""
    return "the end of its launcher" if received == _ORPHANED else signal.Signals(received).name


def _end_by(number: int) -> None:
    """End this process by the signal, as if it had neither been blocked nor handled; from any thread."""
    number = int(signal.SIGTERM) if number == _ORPHANED else int(number)
    ctypes.CDLL(None).signal(number, 0)  # SIG_DFL; Python's own call is for the main thread only
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
