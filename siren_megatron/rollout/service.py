"""vLLM for a run: one server, its client and its weights, made anew when the server dies or hangs.

Rank 0 leads. The other ranks wait in `assist` while it generates or updates weights: handing over the policy
is a collective, and a server that was started again needs the current one, not that of `--hf-checkpoint`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from siren_megatron.batch import Sample
from siren_megatron.config import Config
from siren_megatron.control import Control
from siren_megatron.rollout.client import (
    RolloutClient,
    RolloutError,
    RolloutServer,
    ServerFailed,
    ServerOptions,
)
from siren_megatron.rollout.health import HealthMonitor
from siren_megatron.rollout.placement import server_devices
from siren_megatron.rollout.weight_sync import WeightPublisher

# What rank 0 wants of the others.
_DONE, _GIVE_WEIGHTS, _ABORT = range(3)
_ABORT_S = 10.0


def server_options(config: Config, *, on_cpu: bool) -> ServerOptions:
    """How a run's server is started; for rank 0, on whose machine it is.

    Raises:
        ValueError: `--rollout-devices` names a GPU that is not there or not free.
    """
    rollout = config.rollout
    return ServerOptions(
        model=config.model.hf_checkpoint,
        log_file=config.run.save / "vllm.log",
        dtype="bfloat16" if config.model.bf16 else "float32",
        max_model_len=config.train.seq_length,
        seed=config.train.seed,
        kv_cache_bytes=rollout.rollout_kv_cache_mb * 2**20 if on_cpu else 0,
        host=rollout.rollout_host,
        device="cpu" if on_cpu else "cuda",
        cpu_threads=rollout.rollout_cpu_threads,
        gpu_memory_utilization=rollout.rollout_gpu_memory_utilization,
        start_timeout_s=rollout.rollout_start_timeout,
        **server_devices(
            rollout.rollout_devices, os.environ, gpus=0 if on_cpu else torch.cuda.device_count()
        ),
    )


class RolloutService:
    """Build one on every rank; the methods say which ranks call them. A context manager.

    Args:
        config: the run's options.
        options: of the server; None on the ranks that have none.
        control: how the ranks talk.
        is_main: whether this is rank 0.
        report: prints a line for the user.
    """

    def __init__(
        self,
        config: Config,
        options: ServerOptions | None,
        control: Control,
        *,
        is_main: bool,
        report: Callable[[str], None] = print,
    ) -> None:
        self._config, self._options, self._report = config.rollout, options, report
        self.control = control
        self._is_main = is_main
        self._others_wait = False
        self._restarts = 0
        self._counted = (0, 0, 0)
        self._retries_before = self._drops_before = 0
        self._weights: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
        self._server: RolloutServer | None = None
        self._client: RolloutClient | None = None
        self._publisher: WeightPublisher | None = None
        self._monitor: HealthMonitor | None = None
        if is_main:
            self._server = RolloutServer.start(options)

    def __enter__(self) -> RolloutService:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self._others_wait:
            # In a thread: should another rank wait for something else, this one ends all the same.
            abort = threading.Thread(target=self._abort, daemon=True)
            abort.start()
            abort.join(_ABORT_S)
        self._stop()

    def connect(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """On every rank: from now on the service can be used; rank 0 waits for the server.

        Args:
            weights: a collective that gives the policy's tensors under Hugging Face names on rank 0.

        Raises:
            RolloutError: the server does not start; a first start is not tried twice.
        """
        self._weights = weights
        if self._is_main:
            self._connect()

    def lead(self) -> None:
        """On every rank: rank 0 now leads, and the others go on to `assist`."""
        self._others_wait = self._is_main

    def assist(self) -> None:
        """On the other ranks: give the policy's weights as often as rank 0 wants them, until it releases.

        On rank 0 it releases the others.
        """
        if self._is_main:
            self._others_wait = False
            self.control.tell(_DONE)
            return
        while (command := self.control.hear()) != _DONE:
            if command == _ABORT:
                raise SystemExit(1)
            for _ in self._weights():
                pass

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int,
        stop_token_ids: Sequence[int],
        stream_ids: Sequence[int] | None = None,
        may_drop: bool = False,
        on_group: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """On rank 0, while the others assist: `RolloutClient.generate`, whatever happens to the server.

        What a failed server has finished is kept; the rest is sent to its successor with the same seeds.

        Raises:
            RolloutError: a request was refused, or the server failed more often than it may.
        """
        groups: dict[int, list[Sample]] = {}
        streams = list(range(len(prompts)) if stream_ids is None else stream_ids)
        while True:
            missing = [k for k in range(len(prompts)) if k not in groups]

            def keep(position: int, samples: list[Sample], missing: list[int] = missing) -> None:
                groups[missing[position]] = samples
                if on_group is not None:
                    on_group(missing[position], samples)

            try:
                got = self._client.generate(
                    [prompts[k] for k in missing],
                    num_samples=num_samples,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed,
                    stop_token_ids=stop_token_ids,
                    stream_ids=[streams[k] for k in missing],
                    may_drop=may_drop,
                    on_group=keep,
                )
            except ServerFailed as failure:
                self._restart(failure)
            else:
                groups.update(zip(missing, got, strict=True))
                return [groups[k] for k in range(len(prompts))]

    def update_weights(self) -> None:
        """On rank 0, while the others assist: send the policy to the server.

        Raises:
            RolloutError: the server failed more often than it may.
            WeightSyncError: the policy's tensors do not fit.
        """
        try:
            self._publish()
        except ServerFailed as failure:
            self._restart(failure)

    def pop_counts(self) -> dict[str, float]:
        """On rank 0: restarts, requests sent again and prompts dropped since the last call."""
        now = (
            self._restarts,
            self._retries_before + self._client.num_retries,
            self._drops_before + self._client.num_dropped,
        )
        counts = [float(a - b) for a, b in zip(now, self._counted, strict=True)]
        self._counted = now
        return dict(zip(("rollout_restarts", "rollout_retries", "rollout_dropped"), counts, strict=True))

    def _connect(self) -> None:
        self._server.wait_ready()
        rollout = self._config
        if self._client is not None:
            self._retries_before += self._client.num_retries
            self._drops_before += self._client.num_dropped
        self._client = RolloutClient(
            self._server.url,
            rollout.rollout_request_timeout,
            rollout.rollout_max_in_flight,
            server=self._server,
            request_retries=rollout.rollout_request_retries,
        )
        self._monitor = HealthMonitor(self._server, rollout.rollout_health_timeout)
        self._publisher = WeightPublisher(self._server)
        self._publisher.init()

    def _publish(self) -> None:
        self.control.tell(_GIVE_WEIGHTS)
        weights = self._weights()
        try:
            self._publisher.update(weights)
        finally:
            for _ in weights:  # the other ranks are in it, whatever became of the server
                pass

    def _restart(self, failure: RolloutError) -> None:
        """Another server with the current weights in place of the failed one; the others assist."""
        most = self._config.rollout_max_restarts
        while True:
            if self._restarts == most:
                raise RolloutError(
                    f"{failure}; vLLM was started again {most} time(s) already, --rollout-max-restarts {most}"
                )
            self._restarts += 1
            self._report(f"{failure}; starting vLLM again ({self._restarts} of at most {most} times)")
            try:
                self._stop()
                self._server = RolloutServer.start(self._options)
                self._connect()
                self._publish()
                return
            except RolloutError as next_failure:
                failure = next_failure

    def _abort(self) -> None:
        with contextlib.suppress(RuntimeError):  # they are gone already
            self.control.tell(_ABORT)

    def _stop(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self._server is not None:
            self._server.stop()
