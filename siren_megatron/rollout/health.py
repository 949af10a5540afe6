"""Watches a running vLLM server and kills it when it hangs. Standard library only.

A dead server is noticed by whoever waits for it: its connections break. A stopped or hanging one keeps them
open; killing it turns the one case into the other, for requests and weight updates alike.
"""

from __future__ import annotations

import http.client
import threading
import time
from pathlib import Path

from siren_megatron.rollout.server import RolloutServer

CHECK_S = 1.0
"""Seconds between two looks at the server."""
STOPPED_LOOKS = 3
"""Looks in a row that find a stopped process; a suspended job wakes its processes one after the other."""
_ANSWER_S = 5.0


class HealthMonitor:
    """A thread that ends a server whose processes are stopped, or whose /health does not answer.

    A stopped process (SIGSTOP) is seen in `/proc` within STOPPED_LOOKS x CHECK_S seconds. An engine that is
    busy for ever is not seen here: its API server answers for it. The request time limit finds that one.

    Args:
        server: the server, ready.
        limit_s: seconds without an answer after which it hangs.
    """

    def __init__(self, server: RolloutServer, limit_s: float) -> None:
        if limit_s <= 0:
            raise ValueError(f"limit_s is {limit_s}; it has to be positive")
        self._server, self._limit_s = server, limit_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vllm-health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the server stays as it is."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        answered, failures, stopped_looks = time.monotonic(), 0, 0
        while not self._end.wait(CHECK_S) and self._server.alive():
            stopped = stopped_process(self._server.pid)
            stopped_looks = stopped_looks + 1 if stopped else 0
            if stopped_looks >= STOPPED_LOOKS:
                self._server.kill(f"its process {stopped} is stopped")
                return
            if stopped:
                continue  # it may not answer, and the next look tells
            if self._answers():
                answered, failures = time.monotonic(), 0
                continue
            failures += 1
            # Two in a row: after the trainer itself was suspended one check is late through no fault of vLLM.
            if failures > 1 and time.monotonic() - answered > self._limit_s:
                self._server.kill(f"its /health did not answer for {self._limit_s:g} s")
                return

    def _answers(self) -> bool:
        """Any answer will do: a server that says it is broken ends by itself."""
        try:
            self._server.request("GET", "/health", timeout_s=min(_ANSWER_S, self._limit_s))
        except (OSError, http.client.HTTPException):
            return False
        return True


def stopped_process(pid: int) -> int | None:
    """A process that is stopped (SIGSTOP or a debugger) among pid and its descendants, or None."""
    waiting = [pid]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            if process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] in "tT":
                return int(process.name)
            for thread in process.joinpath("task").iterdir():
                waiting += map(int, thread.joinpath("children").read_text().split())
        except OSError:
            continue  # it ended meanwhile, or this is not Linux
    return None
