"""Rewards computed in processes that can be killed: a pool for the trainer's side of the pipe.

The trainer starts one supervisor (`python -m siren_megatron.rewards.worker`), a fresh light process without
torch. The supervisor loads the reward once and forks the workers, so that one killed for a hang is replaced
in milliseconds, and the trainer itself, with its threads and process groups, is never forked.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path

START_LIMIT_S = 120.0
MAX_RESTARTS = 3


class RewardPoolError(RuntimeError):
    """The reward processes can't be started or kept alive; the message is one line."""


@dataclass(frozen=True)
class RewardResult:
    """The rewards of one submission.

    Args:
        rewards: one per pair, in order; 0 for a pair that was lost to a time-out or an error.
        num_timeouts: pairs that ran past the time limit.
        num_errors: pairs whose reward raised, crashed, ran out of memory or gave no finite number.
        first_error: what the first of those errors said, or None.
    """

    rewards: list[float]
    num_timeouts: int
    num_errors: int
    first_error: str | None = None


class PendingReward:
    """A submission that is being graded."""

    def __init__(self, future: Future[RewardResult]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether :meth:`result` would return at once."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> RewardResult:
        """Wait for the rewards.

        Raises:
            TimeoutError: they were not there after ``timeout_s`` seconds (None waits without limit).
            RewardPoolError: the pool was closed, or its process died too often.
        """
        try:
            return self._future.result(timeout_s)
        except FutureTimeoutError:
            raise TimeoutError(f"no rewards after {timeout_s} s") from None


class RewardPool:
    """Worker processes that compute one reward; use it as a context manager or call :meth:`close`.

    A pair that runs past the time limit costs its own reward (0, counted) and its worker, which is killed and
    replaced; so does one that crashes it. The other pairs go on. The processes end with this one, however
    it ends.

    Args:
        reward_name: a key of :data:`siren_megatron.rewards.functions.REWARDS`, ``package.module:function`` or
            ``path.py:function``.
        num_workers: processes that grade at the same time.
        time_limit_s: seconds for one pair.
        memory_limit_mb: MiB of address space that a worker may take beyond what it has when idle.
        max_response_chars: of a longer response the last so many characters are graded.

    Raises:
        ValueError: an argument is out of range, or the reward cannot be loaded.
        RewardPoolError: the process does not start.
    """

    def __init__(
        self,
        reward_name: str,
        *,
        num_workers: int = 2,
        time_limit_s: float = 5.0,
        memory_limit_mb: int = 1024,
        max_response_chars: int = 50_000,
    ) -> None:
        if num_workers < 1 or max_response_chars < 1 or memory_limit_mb < 1:
            raise ValueError("a reward pool needs at least one worker, one MiB and one character")
        if not (time_limit_s > 0 and math.isfinite(time_limit_s)):
            raise ValueError(f"the reward's time limit must be above 0 seconds, got {time_limit_s}")
        self._max_response_chars = max_response_chars
        self._settings = {
            "reward": reward_name,
            "num_workers": num_workers,
            "time_limit_s": time_limit_s,
            "memory_limit_mb": memory_limit_mb,
            "parent_pid": os.getpid(),
        }
        self._lock = threading.Lock()
        self._closed = False
        self._next_id = 0
        self._restarts = 0
        self._pending: dict[int, tuple[bytes, Future[RewardResult]]] = {}
        self._start()
        # Before the interpreter is torn down, while the reader thread still runs.
        atexit.register(self.close)

    @property
    def supervisor_pid(self) -> int:
        """Process id of the supervisor; the workers are its children."""
        return self._process.pid

    def submit(self, pairs: Sequence[tuple[str, str]]) -> PendingReward:
        """Begin to grade (response, answer) pairs; returns at once. May be called from several threads.

        Raises:
            RewardPoolError: the pool is closed, or its process died too often.
        """
        future: Future[RewardResult] = Future()
        if not pairs:
            future.set_result(RewardResult([], 0, 0))
            return PendingReward(future)
        limit = self._max_response_chars
        trimmed = [(response[-limit:], answer) for response, answer in pairs]
        with self._lock:
            if self._closed:
                raise RewardPoolError("the reward pool is closed")
            message = json.dumps({"id": self._next_id, "pairs": trimmed}).encode() + b"\n"
            self._pending[self._next_id] = (message, future)
            self._next_id += 1
            self._send(message)
        return PendingReward(future)

    def score(self, pairs: Sequence[tuple[str, str]]) -> RewardResult:
        """Grade (response, answer) pairs and wait for the rewards; raises as :meth:`submit`."""
        return self.submit(pairs).result()

    def close(self) -> None:
        """End the processes. Submissions that are still being graded raise RewardPoolError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._close_stdin()
        atexit.unregister(self.close)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=5)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        """Start the supervisor and wait until its reward is loaded."""
        # The package and the user's own reward must be found as they are found here.
        paths = [str(Path(__file__).resolve().parents[2]), *(os.path.abspath(path) for path in sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "siren_megatron.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
        )
        self._send(json.dumps(self._settings).encode() + b"\n")
        watchdog = threading.Timer(START_LIMIT_S, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        message = json.loads(line) if line.endswith(b"\n") else {}
        if "ready" not in message:
            self._closed = True
            self._close_stdin()
            self._process.kill()
            code = self._process.wait()
            self._process.stdout.close()
            if "fatal" in message:
                raise ValueError(message["fatal"])
            raise RewardPoolError(f"the reward process did not start (exit code {code})")
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _send(self, message: bytes) -> None:
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except OSError:
            pass  # The process died: the reader sees it too, starts another and sends this again.

    def _close_stdin(self) -> None:
        try:
            self._process.stdin.close()
        except OSError:
            pass  # what was not yet written has no reader any more

    def _read(self, process: subprocess.Popen) -> None:
        """Resolve submissions until the supervisor's output ends."""
        for line in process.stdout:
            message = json.loads(line)
            with self._lock:
                _, future = self._pending.pop(message["id"])
            result = RewardResult(
                message["rewards"], message["num_timeouts"], message["num_errors"], message["first_error"]
            )
            future.set_result(result)
        process.stdout.close()
        code = process.wait()
        with self._lock:
            if not self._closed:
                self._restarts += 1
                if self._restarts <= MAX_RESTARTS:
                    try:
                        self._close_stdin()
                        self._start()
                    except (OSError, ValueError, RuntimeError):
                        self._closed = True
                    else:
                        for message, _ in self._pending.values():
                            self._send(message)
                        return
                self._closed = True
            lost, self._pending = self._pending, {}
        for _, future in lost.values():
            future.set_exception(RewardPoolError(f"the reward process ended (exit code {code})"))
