"""The vLLM servers of one node: started, watched, given weights and ended by the node's first rank."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from siren_megatron.config import Config
from siren_megatron.rollout.health import HealthMonitor
from siren_megatron.rollout.hosts import Hosts, node_address
from siren_megatron.rollout.placement import server_devices
from siren_megatron.rollout.server import RemoteServer, RolloutServer
from siren_megatron.rollout.transfer.choice import weight_transfer
from siren_megatron.rollout.vllm_command import ServerOptions
from siren_megatron.rollout.weight_sync import ServerSyncFailed, UpdateStats, WeightPublisher


def server_options(config: Config, hosts: Hosts, *, on_cpu: bool) -> list[ServerOptions]:
    """How this node's servers are started; for a rank that hosts some.

    Raises:
        ValueError: `--rollout-devices` names a GPU that is not there or not free, or `--weight-transfer` or
            `--rollout-sleep` needs one.
    """
    rollout = config.rollout
    placed = server_devices(
        rollout.rollout_devices,
        os.environ,
        gpus=0 if on_cpu else torch.cuda.device_count(),
        servers=rollout.rollout_num_servers,
        tensor_parallel=rollout.rollout_tensor_parallel_size,
    )
    host = rollout.rollout_host
    if hosts.several and host in ("127.0.0.1", "::1"):
        host = node_address()
    common = ServerOptions(
        model=config.model.hf_checkpoint,
        log_file=config.run.save / "vllm.log",
        dtype="bfloat16" if config.model.bf16 else "float32",
        max_model_len=config.train.seq_length,
        seed=config.train.seed,
        kv_cache_bytes=rollout.rollout_kv_cache_mb * 2**20 if on_cpu else 0,
        host=host,
        device="cpu" if on_cpu else "cuda",
        cpu_threads=rollout.rollout_cpu_threads,
        gpu_memory_utilization=rollout.rollout_gpu_memory_utilization,
        start_timeout_s=rollout.rollout_start_timeout,
        weight_transfer=weight_transfer(rollout, on_cpu=on_cpu),
        sleep_level=rollout.rollout_sleep,
    )
    if not hosts.several and len(placed) == 1:
        return [dataclasses.replace(common, **placed[0])]
    log = common.log_file
    return [
        dataclasses.replace(common, log_file=log.with_name(f"vllm-{hosts.node}-{k}.log"), **fields)
        for k, fields in enumerate(placed)
    ]


class NodeServers:
    """Starts the servers at once; `connect` waits for them.

    Args:
        options: of each server.
        health_timeout_s: `--rollout-health-timeout`.

    Attributes:
        last_update: what the last complete update moved; None before one.
    """

    def __init__(self, options: Sequence[ServerOptions], health_timeout_s: float) -> None:
        self._options, self._health_timeout_s = options, health_timeout_s
        self.last_update: UpdateStats | None = None
        self._publisher: WeightPublisher | None = None  # of all servers as they are now
        self._servers: list[RolloutServer] = []
        self._monitors: dict[int, HealthMonitor] = {}
        try:
            for one in options:
                self._servers.append(RolloutServer.start(one, [s.port for s in self._servers]))
        except BaseException:
            self.stop()
            raise

    def __len__(self) -> int:
        return len(self._options)

    def __iter__(self) -> Iterator[RolloutServer]:
        return iter(self._servers)

    def __getitem__(self, index: int) -> RolloutServer:
        return self._servers[index]

    def remote(self) -> list[RemoteServer]:
        """What other nodes' ranks need to ask them."""
        address = node_address()
        return [server.remote(address) for server in self._servers]

    def connect(self) -> None:
        """Wait until all are ready.

        Raises:
            RolloutError: one does not start.
        """
        for index in range(len(self)):
            self._watch(index)
        self._of_all()

    def publish(self, weights: Iterator[tuple[str, Tensor]], only: int | None = None) -> dict[int, str]:
        """Give the weights to all servers, or to one.

        Returns:
            Why each server that failed did; then none of those that were to get them serves any.

        Raises:
            WeightSyncError: the tensors do not fit.
        """
        try:
            if only is None:
                self.last_update = self._of_all().update(weights)
            else:
                self._part()
                publisher = self._joined([self._servers[only]])
                try:
                    self.last_update = publisher.update(weights)
                finally:
                    publisher.close()
        except ServerSyncFailed as failure:
            return self._named(failure)
        return {}

    def sleep(self) -> dict[int, str]:
        """All servers free GPU memory until the next update, as `--rollout-sleep` says.

        Returns:
            Why each server that failed did.
        """
        try:
            self._of_all().sleep()
        except ServerSyncFailed as failure:
            return self._named(failure)
        return {}

    def restart(self, index: int) -> None:
        """Another server in the place of a failed one, ready for weights.

        Raises:
            RolloutError: it does not start.
        """
        self._end(index)
        taken = [server.port for server in self._servers]
        self._servers[index] = RolloutServer.start(self._options[index], taken)
        self._watch(index)
        self._part()

    def stop(self) -> None:
        """End all servers, side by side. May be called again."""
        self._part()
        if self._servers:
            with ThreadPoolExecutor(len(self._servers)) as pool:
                list(pool.map(self._end, range(len(self._servers))))

    def _of_all(self) -> WeightPublisher:
        self._publisher = self._publisher or self._joined(self._servers)
        return self._publisher

    def _part(self) -> None:
        """Let go of the servers' common update: one of them is another now, or goes its own way."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def _named(self, failure: ServerSyncFailed) -> dict[int, str]:
        return {k: str(failure) for k, server in enumerate(self._servers) if server in failure.servers}

    def _joined(self, servers: Sequence[RolloutServer]) -> WeightPublisher:
        publisher = WeightPublisher(servers)
        publisher.init()
        return publisher

    def _watch(self, index: int) -> None:
        self._servers[index].wait_ready()
        self._monitors[index] = HealthMonitor(self._servers[index], self._health_timeout_s)

    def _end(self, index: int) -> None:
        if index in self._monitors:
            self._monitors.pop(index).close()
        self._servers[index].stop()
