"""The reward processes: a supervisor that never grades, and the workers that it forks.

Started by :class:`siren_megatron.rewards.pool.RewardPool` as ``python -m siren_megatron.rewards.worker``.
Standard input takes one JSON line of settings, then one per submission; standard output gives
``{"ready": true}`` or ``{"fatal": why}``, then one line per submission graded. The supervisor is one thread,
so forking it is safe, and it ends when its input does or its parent is gone; the workers end with it.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_IDLE_DEATHS = 20  # in a row
POLL_S = 0.5
_PR_SET_PDEATHSIG = 1


@dataclass(eq=False)
class _Submission:
    id: int
    rewards: list[float]
    missing: int
    num_timeouts: int = 0
    num_errors: int = 0
    first_error: str | None = None


@dataclass(eq=False)
class _Task:
    submission: _Submission
    index: int
    response: str
    answer: str


@dataclass(eq=False)
class _Worker:
    pid: int
    channel: socket.socket
    task: _Task | None = None
    started: float = 0.0  # when the task was sent, by time.monotonic
    received: bytes = b""


class Supervisor:
    """Hands each worker one pair at a time and watches its clock.

    More than one at a time would save a tenth of a millisecond a pair, but let pairs wait behind one that
    hangs while other workers are idle.
    """

    def __init__(self, reward: Callable[[str, str], float], settings: dict[str, Any], output: int) -> None:
        self._reward = reward
        self._settings = settings
        self._time_limit_s = settings["time_limit_s"]
        self._output = output
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        self._received = b""
        self._to_write = bytearray()
        self._queue: deque[_Task] = deque()
        self._workers: list[_Worker] = []
        self._idle_deaths = 0
        os.set_blocking(0, False)
        os.set_blocking(output, False)

    def run(self) -> None:
        """Serve until the input ends or the parent is gone."""
        for _ in range(self._settings["num_workers"]):
            self._workers.append(self._fork_worker())
        self._to_write += b'{"ready": true}\n'
        self._write_results()
        try:
            while self._serve_once():
                pass
        finally:
            for worker in self._workers:
                self._end(worker)

    def _serve_once(self) -> bool:
        for key, _ in self._selector.select(self._wait_s()):
            if key.fd == 0:
                if not self._read_submissions():
                    return False
            elif key.fd == self._output:
                self._write_results()
            elif key.data in self._workers:
                self._read_answer(key.data)
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.task is not None and now - worker.started > self._time_limit_s:
                self._replace(worker, timed_out=True)
        for worker in list(self._workers):
            if worker.task is None and self._queue:
                self._hand_out(worker)
        # The input's other end may be held open by some fork of the parent.
        return os.getppid() == self._settings["parent_pid"]

    def _wait_s(self) -> float:
        deadlines = [
            worker.started + self._time_limit_s for worker in self._workers if worker.task is not None
        ]
        until_first = min(deadlines) - time.monotonic() + 0.001 if deadlines else POLL_S
        return min(POLL_S, max(0.0, until_first))

    def _read_submissions(self) -> bool:
        data = _read_available(0)
        if data is None:
            return False
        self._received += data
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            message = json.loads(line)
            pairs = message["pairs"]
            submission = _Submission(message["id"], [0.0] * len(pairs), len(pairs))
            self._queue.extend(_Task(submission, n, *pair) for n, pair in enumerate(pairs))
        return True

    def _hand_out(self, worker: _Worker) -> None:
        task = self._queue.popleft()
        worker.started = time.monotonic()
        try:
            worker.channel.sendall(json.dumps((task.response, task.answer)).encode() + b"\n")
        except OSError:
            # It died while idle: the task is not to blame.
            self._queue.appendleft(task)
            self._replace(worker)
        else:
            worker.task = task

    def _read_answer(self, worker: _Worker) -> None:
        data = _read_available(worker.channel.fileno())
        if data is None:
            self._replace(worker)
            return
        worker.received += data
        if worker.received.endswith(b"\n"):
            reward, error, retires = json.loads(worker.received)
            task, worker.task, worker.received = worker.task, None, b""
            self._idle_deaths = 0
            if retires:
                self._replace(worker)
            self._finish(task, reward, error=error)

    def _replace(self, worker: _Worker, *, timed_out: bool = False) -> None:
        """Put a new worker in the place of a dead or hanging one; the task it was at is lost."""
        status = self._end(worker)
        if worker.task is None:
            self._idle_deaths += 1
            if self._idle_deaths > MAX_IDLE_DEATHS:
                raise RuntimeError(f"reward workers end before they are given anything ({_describe(status)})")
        self._workers[self._workers.index(worker)] = self._fork_worker()
        if worker.task is not None:
            error = None if timed_out else f"the reward's process ended ({_describe(status)})"
            self._finish(worker.task, 0.0, timed_out=timed_out, error=error)

    def _finish(
        self, task: _Task, reward: float, *, timed_out: bool = False, error: str | None = None
    ) -> None:
        submission = task.submission
        submission.rewards[task.index] = reward
        submission.missing -= 1
        submission.num_timeouts += timed_out
        if error is not None:
            submission.num_errors += 1
            submission.first_error = submission.first_error or error
        if submission.missing == 0:
            result = {
                "id": submission.id,
                "rewards": submission.rewards,
                "num_timeouts": submission.num_timeouts,
                "num_errors": submission.num_errors,
                "first_error": submission.first_error,
            }
            self._to_write += json.dumps(result).encode() + b"\n"
            self._write_results()

    def _write_results(self) -> None:
        watched = self._output in self._selector.get_map()
        try:
            del self._to_write[: os.write(self._output, self._to_write)]
        except BlockingIOError:
            pass
        if self._to_write and not watched:
            self._selector.register(self._output, selectors.EVENT_WRITE)
        elif not self._to_write and watched:
            self._selector.unregister(self._output)

    def _fork_worker(self) -> _Worker:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                for other in self._workers:
                    other.channel.close()
                ours.close()
                self._selector.close()
                os.close(self._output)
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, 0)
                _limit_memory(self._settings["memory_limit_mb"])
                _work(self._reward, theirs)
            finally:
                os._exit(0)
        theirs.close()
        # A worker reads its pair before it grades: a send that takes longer has no reader.
        ours.settimeout(10)
        worker = _Worker(pid, ours)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _end(self, worker: _Worker) -> int:
        """Kill a worker by its id, if it still runs; returns its wait status."""
        self._selector.unregister(worker.channel)
        worker.channel.close()
        # Not yet waited for, so the id cannot belong to another process.
        os.kill(worker.pid, signal.SIGKILL)
        return os.waitpid(worker.pid, 0)[1]


def _work(reward: Callable[[str, str], float], channel: socket.socket) -> None:
    """A worker's life: one pair in, one line out, until the channel closes."""
    with channel.makefile("rb") as pairs:
        for pair in pairs:
            value, error, retires = 0.0, None, False
            try:
                value = _to_float(reward(*json.loads(pair)))
                if not math.isfinite(value):
                    value, error = 0.0, f"the reward is not a finite number: {value}"
            except Exception as exception:
                retires = isinstance(exception, MemoryError)  # what it left may be in any state
                error = f"{type(exception).__name__}: {' '.join(str(exception).split())[:300]}"
            channel.sendall(json.dumps((value, error, retires)).encode() + b"\n")


def _to_float(value: Any) -> float:
    """Any number, numpy's and torch's scalars too; a text that reads like one is somebody's mistake."""
    if not hasattr(value, "__float__"):
        raise TypeError(f"the reward is not a number but {type(value).__name__}")
    return float(value)


def _limit_memory(limit_mb: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        in_use = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = in_use + limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read_available(fd: int) -> bytes | None:
    """Up to 1 MiB that can be read at once; None at the end or when the other side is gone."""
    try:
        return os.read(fd, 2**20) or None
    except BlockingIOError:
        return b""
    except ConnectionError:
        return None


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def main() -> int:
    """Read the settings, load the reward, serve; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    # Whatever a reward prints must not end up between the results.
    output = os.dup(1)
    os.dup2(2, 1)
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return 0
        line += byte
    settings = json.loads(line)
    from siren_megatron.rewards.functions import prepare_reward

    try:
        reward = prepare_reward(settings["reward"])
    except Exception as exception:
        why = f"--reward {settings['reward']}: {exception}"
        if isinstance(exception, ValueError) and str(exception).startswith("--reward"):
            why = str(exception)
        os.write(output, json.dumps({"fatal": " ".join(why.split())[:500]}).encode() + b"\n")
        return 2
    Supervisor(reward, settings, output).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
