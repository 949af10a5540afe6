"""The servers of a run as one: the same call to all of them side by side, and who failed."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from siren_megatron.rollout.http_json import error_text
from siren_megatron.rollout.server import RolloutServer, ServerFailed


class WeightSyncError(RuntimeError):
    """The weights could not be replaced: the servers stay paused, and another complete update is needed."""


class ServerSyncFailed(WeightSyncError, ServerFailed):
    """They could not be replaced because a server died, hangs or fails by itself.

    Attributes:
        servers: those that failed; the others take a complete update as if nothing had happened.
    """

    def __init__(self, message: str, servers: Sequence[RolloutServer] = ()) -> None:
        super().__init__(message)
        self.servers = tuple(servers)


class Calls:
    """Calls under way, one to each server."""

    def __init__(self, futures: Sequence[Future[None]]) -> None:
        self._futures = futures

    def wait(self, *, at_first_failure: bool = False, beside: Future[None] | None = None) -> None:
        """Return when every server has answered.

        Args:
            at_first_failure: do not wait for the others when one has failed.
            beside: something else that has to end well, or fails with a ServerSyncFailed.

        Raises:
            ServerSyncFailed: it carries every server that has failed until then.
        """
        futures = [*self._futures, *([] if beside is None else [beside])]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION if at_first_failure else ALL_COMPLETED)
        failures = [f.exception() for f in futures if f in done and f.exception() is not None]
        if not failures:
            return
        if unexpected := [e for e in failures if not isinstance(e, ServerSyncFailed)]:
            raise unexpected[0]
        servers = [server for failure in failures for server in failure.servers]
        raise ServerSyncFailed("; ".join(map(str, failures)), servers)


class ServerGroup:
    """Servers that get the same weights.

    Args:
        servers: at least one, ready.
        timeout_s: seconds that any single call may take.
    """

    def __init__(self, servers: Sequence[RolloutServer], timeout_s: float) -> None:
        self.servers = tuple(servers)
        self._timeout_s = timeout_s

    def post(self, path: str, body: Any = None) -> None:
        """The same call to all servers side by side; returns when every one has answered.

        Raises:
            ServerSyncFailed: one or more failed.
        """
        self.begin(path, [body] * len(self.servers)).wait()

    def begin(self, path: str, bodies: Sequence[Any]) -> Calls:
        """Start a call to every server, each with its own body."""
        pool = ThreadPoolExecutor(len(self.servers))
        calls = [
            pool.submit(self._post_one, server, path, body)
            for server, body in zip(self.servers, bodies, strict=True)
        ]
        pool.shutdown(wait=False)
        return Calls(calls)

    def abort_update(self) -> None:
        """Close vLLM's update sessions, so that the next update can start some. They answer with an error."""

        def abort(server: RolloutServer) -> None:
            # Where the server is gone or hangs, the error that brought us here says so.
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.request("POST", "/update_weights", {"update_info": {"abort": True}}, timeout_s=10.0)

        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(abort, self.servers))

    def _post_one(self, server: RolloutServer, path: str, body: Any) -> None:
        log_file = server.options.log_file
        try:
            status, answer = server.request("POST", path, body, timeout_s=self._timeout_s)
        except TimeoutError as error:
            raise ServerSyncFailed(
                f"{path} took longer than {self._timeout_s:g} s; vLLM's log: {log_file}", [server]
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerSyncFailed(
                f"{path} failed: {server.describe_death()} ({error!r})", [server]
            ) from error
        if status != 200:
            raise ServerSyncFailed(
                f"{path} failed: HTTP {status}: {error_text(answer)}; vLLM's log: {log_file}", [server]
            )
