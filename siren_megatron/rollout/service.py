"""vLLM for a run: all its servers, one queue for them, and their weights; failed ones are made anew.

Rank 0 leads. The other ranks wait in `assist` while it samples or updates weights: handing over the policy is
a collective, and a server that was started again needs the current one, not that of `--hf-checkpoint`.
Sampling runs in a thread of rank 0, which asks the servers of all nodes over HTTP. Collectives are for main
threads alone: what the sampling thread needs of them waits for `finish`.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from torch import Tensor

from siren_megatron.batch import Sample
from siren_megatron.config import Config
from siren_megatron.control import Control
from siren_megatron.rollout.balancer import Balancer
from siren_megatron.rollout.client import RolloutClient
from siren_megatron.rollout.hosts import Hosts
from siren_megatron.rollout.node_servers import NodeServers
from siren_megatron.rollout.server import RemoteServer, RolloutError, RolloutServer, ServerFailed
from siren_megatron.rollout.vllm_command import ServerOptions
from siren_megatron.rollout.weight_sync import WeightSyncError

T = TypeVar("T")
Weights = Callable[[], Iterator[tuple[str, Tensor]]]

# What rank 0 wants of the others; giving weights and starting again name a server, or all.
_DONE, _GIVE_WEIGHTS, _ABORT, _RESTART, _SLEEP = range(5)
_ALL = -1
_ABORT_S = 10.0


class RolloutService:
    """Build one on every rank; the methods say which ranks call them. A context manager.

    Args:
        config: the run's options.
        options: of this node's servers, as many on every host; empty on the ranks that host none.
        control: how the ranks talk.
        hosts: which ranks have servers.
        is_main: whether this is rank 0.
        report: prints a line for the user.

    Attributes:
        sync_metrics: on rank 0, size and time of the last weight update.
    """

    def __init__(
        self,
        config: Config,
        options: Sequence[ServerOptions],
        control: Control,
        *,
        hosts: Hosts,
        is_main: bool,
        report: Callable[[str], None] = print,
    ) -> None:
        self._config, self._report = config.rollout, report
        self.control, self._hosts = control, hosts
        self._is_main = is_main
        self.sync_metrics: dict[str, float] = {}
        self._others_wait = False
        self._restarts = 0
        self._counted: dict[str, float] = {}
        self._clients: list[RolloutClient] = []
        self._balancer = Balancer(self._clients, self._want_replacement)
        # Of the thread that samples: (server, its failure, reply), and None at its end.
        self._wanted: queue.SimpleQueue[tuple[int, ServerFailed, Future[None]] | None] = queue.SimpleQueue()
        self._servers: NodeServers | None = None
        if hosts.node is not None:
            self._servers = NodeServers(options, self._config.rollout_health_timeout)

    def __enter__(self) -> RolloutService:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self._others_wait:
            # In a thread: should another rank wait for something else, this one ends all the same.
            abort = threading.Thread(target=self._abort, daemon=True)
            abort.start()
            abort.join(_ABORT_S)
        if self._servers is not None:
            self._servers.stop()

    def connect(self, weights: Weights, version: Callable[[], int]) -> None:
        """On every rank: from now on the service can be used; waits for the servers.

        Args:
            weights: a collective that gives the policy's tensors under Hugging Face names on every host.
            version: training steps that these tensors have seen.

        Raises:
            RolloutError: a server does not start; a first start is not tried twice.
        """
        self._weights, self._version = weights, version
        outcome = self._attempt(self._connect) if self._servers is not None else []
        outcomes = self._outcomes(outcome)
        if self._is_main:
            remote = (server for found in outcomes[1:] for server in found)
            self._clients += [self._client(server) for server in [*self._servers, *remote]]
        elif isinstance(outcome, Exception):
            raise SystemExit(1)  # rank 0 tells why

    # ---------------------------------------------------------------- the ranks together

    def lead(self) -> None:
        """On every rank: rank 0 now leads, and the others go on to `assist`."""
        self._others_wait = self._is_main

    def assist(self) -> None:
        """On the other ranks: do what rank 0 wants, as often as it wants it, until it releases.

        On rank 0 it releases the others.
        """
        if self._is_main:
            self._others_wait = False
            self.control.tell(_DONE)
            return
        while True:
            command, server = self.control.hear()
            if command == _DONE:
                return
            if command == _ABORT:
                raise SystemExit(1)
            if command == _RESTART:
                self._start_again(server)
            elif command == _SLEEP:
                self._put_to_sleep()
            else:
                self._give_weights(server)

    # ---------------------------------------------------------------- sampling, on rank 0

    @property
    def num_servers(self) -> int:
        """On rank 0: servers of all nodes."""
        return len(self._clients)

    def start(self, work: Callable[[], T]) -> Future[T]:
        """On rank 0: run `work`, which calls `generate`, in a thread. `finish` it before the next one."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._wanted.put(None)

        threading.Thread(target=run, name="rollout", daemon=True).start()
        return future

    def finish(self, future: Future[T]) -> T:
        """On rank 0, while the others assist: what the work gives; meanwhile failed servers are replaced.

        Raises:
            RolloutError: the servers failed more often than they may.
            Exception: what the work raised.
        """
        while (wanted := self._wanted.get()) is not None:
            server, failure, reply = wanted
            if not reply.set_running_or_notify_cancel():
                continue  # the call that wanted it failed for another reason
            try:
                self._replace(server, failure)
            except Exception as error:
                reply.set_exception(error)
            else:
                reply.set_result(None)
        return future.result()

    def run(self, work: Callable[[], T]) -> T:
        """On rank 0, while the others assist: `start` and `finish`."""
        return self.finish(self.start(work))

    def generate(self, prompts: Sequence[Sequence[int]], **arguments: Any) -> list[list[Sample]]:
        """In the thread that samples: `Balancer.generate`, whatever happens to the servers.

        What a failed server has not finished goes to the others at once, with the same seeds.

        Raises:
            RolloutError: a request was refused, or the servers failed more often than they may.
        """
        return self._balancer.generate(prompts, **arguments)

    def update_weights(self) -> None:
        """On rank 0, while the others assist and nothing is sampled: send the policy to the servers.

        Raises:
            RolloutError: the servers failed more often than they may.
            WeightSyncError: the policy's tensors do not fit.
        """
        self._publish(_ALL)

    def sleep(self) -> None:
        """On rank 0, while the others assist: nothing will be sampled before the next weight update.

        Raises:
            RolloutError: the servers failed more often than they may.
        """
        if not self._config.rollout_sleep:
            return
        while failed := self._tell_to(_SLEEP, _ALL, self._put_to_sleep):
            for k, why in failed.items():
                self._replace(k, ServerFailed(why))

    def pop_counts(self) -> dict[str, float]:
        """On rank 0: what happened since the last call.

        Restarts, requests sent again, prompts dropped; of several servers each one's requests and response
        tokens; the mean seconds that a prompt waited for a server to have room.
        """
        clients = self._clients
        now = {
            "rollout_restarts": self._restarts,
            "rollout_retries": sum(client.num_retries for client in clients),
            "rollout_dropped": sum(client.num_dropped for client in clients),
        }
        if len(clients) > 1:
            for k, client in enumerate(clients):
                now |= {
                    f"rollout_requests/{k}": client.num_requests,
                    f"rollout_tokens/{k}": client.num_tokens,
                }
        now |= {"waits": self._balancer.num_waits, "time/rollout_queue": self._balancer.wait_s}
        counts = {name: float(value - self._counted.get(name, 0)) for name, value in now.items()}
        self._counted = now
        counts["time/rollout_queue"] /= max(1.0, counts.pop("waits"))
        return counts

    # ---------------------------------------------------------------- weights and failures

    def _publish(self, server: int) -> None:
        """The current weights to a server or to all, until each of them has them."""
        while failed := self._tell_to(_GIVE_WEIGHTS, server, lambda: self._give_weights(server)):
            for k, why in failed.items():
                self._restart(k, ServerFailed(why))
        for client in self._clients if server == _ALL else [self._clients[server]]:
            client.weight_version = self._version()
        if (update := self._servers.last_update) is not None:
            self.sync_metrics = {"weight_sync_bytes": update.bytes, "time/weight_transfer": update.seconds}

    def _tell_to(self, command: int, server: int, act: Callable[[], list[Any]]) -> dict[int, str]:
        """On rank 0: what all ranks do together; why each server that failed did."""
        self.control.tell(command, server)
        failed = enumerate(act())
        return {n * len(self._servers) + k: why for n, of_node in failed for k, why in of_node.items()}

    def _put_to_sleep(self) -> list[Any]:
        """On every rank; on rank 0 which servers failed and why, host by host."""
        return self._outcomes(self._attempt(self._servers.sleep) if self._servers is not None else {})

    def _give_weights(self, server: int) -> list[Any]:
        """On every rank; on rank 0 which servers failed and why, host by host."""
        weights, outcome = self._weights(), {}
        try:
            if self._servers is not None:
                node, only = divmod(server, len(self._servers)) if server != _ALL else (None, None)
                if node in (None, self._hosts.node):
                    outcome = self._attempt(lambda: self._servers.publish(weights, only))
        finally:
            for _ in weights:  # the other ranks are in it, whatever became of the servers
                pass
        return self._outcomes(outcome)

    def _want_replacement(self, server: int, failure: ServerFailed) -> Future[None]:
        reply: Future[None] = Future()
        self._wanted.put((server, failure, reply))
        return reply

    def _replace(self, server: int, failure: RolloutError) -> None:
        """Another server with the current weights in place of the failed one; the others assist."""
        self._restart(server, failure)
        self._publish(server)

    def _restart(self, server: int, failure: RolloutError) -> None:
        most = self._config.rollout_max_restarts
        while True:
            if self._restarts == most:
                raise RolloutError(
                    f"{failure}; vLLM was started again {most} time(s) already, --rollout-max-restarts {most}"
                )
            self._restarts += 1
            self._report(f"{failure}; starting vLLM again ({self._restarts} of at most {most} times)")
            if server >= len(self._servers):
                self.control.tell(_RESTART, server)
            try:
                self._clients[server].use(self._start_again(server))
                return
            except RolloutError as next_failure:
                failure = next_failure

    def _start_again(self, server: int) -> RolloutServer | RemoteServer | None:
        """On rank 0 and, where the server is another node's, on all ranks: the new server, on rank 0.

        Raises:
            RolloutError: on rank 0, the server does not start.
        """
        if self._servers is None:
            self._outcomes(None)
            return None
        node, index = divmod(server, len(self._servers))
        if node == 0 and self._is_main:
            self._servers.restart(index)
            return self._servers[index]

        def restart() -> RemoteServer:
            self._servers.restart(index)
            return self._servers.remote()[index]

        outcomes = self._outcomes(self._attempt(restart) if node == self._hosts.node else None)
        return outcomes[node] if self._is_main else None

    # ---------------------------------------------------------------- the hosts

    def _connect(self) -> list[RemoteServer]:
        self._servers.connect()
        return [] if self._is_main else self._servers.remote()

    def _client(self, server: RolloutServer | RemoteServer) -> RolloutClient:
        rollout = self._config
        return RolloutClient(
            server.url,
            rollout.rollout_request_timeout,
            rollout.rollout_max_in_flight,
            server=server,
            request_retries=rollout.rollout_request_retries,
        )

    def _attempt(self, act: Callable[[], T]) -> T | RolloutError | WeightSyncError:
        """What it gives, or its error as one that can be sent to rank 0."""
        try:
            return act()
        except RolloutError as error:
            return RolloutError(str(error))
        except WeightSyncError as error:
            return WeightSyncError(str(error))

    def _outcomes(self, outcome: Any) -> list[Any]:
        """What `_attempt` gave on each host, on rank 0; a collective of all ranks where there are several.

        Raises:
            RolloutError or WeightSyncError: on rank 0, the first host's that has one.
        """
        gathered = self.control.gather(outcome) if self._hosts.several else {0: outcome}
        if not self._is_main:
            return []
        outcomes = [gathered[rank] for rank in self._hosts.ranks]
        for one in outcomes:
            if isinstance(one, Exception):
                raise one
        return outcomes

    def _abort(self) -> None:
        with contextlib.suppress(RuntimeError):  # they are gone already
            self.control.tell(_ABORT)
