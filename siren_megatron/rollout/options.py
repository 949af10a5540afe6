"""Options of the rollouts and of the vLLM server that makes them. Standard library only."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from siren_megatron.options import option
from siren_megatron.rollout.placement import split_devices


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    rollout_batch_size: int = option(32, "prompts of one step", minimum=1)
    rollout_num_samples: int = option(8, "responses of one prompt (the group)", minimum=1)
    rollout_max_response_length: int = option(3072, "most tokens of a response", minimum=1)
    rollout_temperature: float = option(1.0, "sampling temperature", above=0)
    rollout_max_in_flight: int = option(
        32, "requests (prompts) that are at each vLLM server at a time", minimum=1
    )
    rollout_nodes: str = option(
        "first", "nodes that have vLLM servers, as many each: the first one, or all", choices=("first", "all")
    )
    rollout_num_servers: int = option(1, "vLLM servers of such a node, on CPUs", minimum=1)
    rollout_async_steps: int = option(
        0,
        "steps by which rollouts run ahead: that of step s + k is sampled while step s is trained, and its "
        "weights are k steps old when it is used; 0 = sampling and training take turns",
        minimum=0,
    )
    rollout_kv_cache_mb: int = option(256, "vLLM's KV cache on a CPU, in MiB", minimum=16)
    rollout_cpu_threads: int = option(1, "threads of a vLLM server on a CPU", minimum=1)
    rollout_gpu_memory_utilization: float = option(
        0.5, "share of a GPU's memory that vLLM takes", above=0, maximum=1
    )
    rollout_devices: str | None = option(
        None,
        "GPUs of each node with vLLM servers that these have for themselves, such as 4,5,6,7; default: one "
        "server shares the first rank's GPU",
    )
    rollout_tensor_parallel_size: int = option(
        0, "GPUs of --rollout-devices that one vLLM server takes; 0 = all, which makes one server", minimum=0
    )
    weight_transfer: str = option(
        "auto",
        "how vLLM gets new weights: through shared memory, CUDA IPC (it shares the first rank's GPU) or NCCL "
        "(it has GPUs of its own); auto = the one of the three that is made for the case",
        choices=("auto", "shared-memory", "ipc", "nccl"),
    )
    rollout_sleep: int = option(
        0,
        "what a vLLM that shares the first rank's GPU frees while the trainer trains: 0 = nothing, 1 = the "
        "KV cache, and its weights move to the machine's memory, 2 = both",
        minimum=0,
        maximum=2,
    )
    rollout_start_timeout: float = option(300.0, "seconds for the server to become ready", above=0)
    rollout_request_timeout: float = option(600.0, "seconds for one generation request", above=0)
    rollout_request_retries: int = option(
        1, "how often a request that ran past its time is sent again before its prompt is dropped", minimum=0
    )
    rollout_health_timeout: float = option(
        20.0, "seconds without an answer to a health check after which vLLM hangs and is killed", above=0
    )
    rollout_max_restarts: int = option(
        3, "how often vLLMs that died or hang are started again, all together in a run; 0 = never", minimum=0
    )
    rollout_host: str = option(
        "127.0.0.1",
        "address that vLLM listens on (with --rollout-nodes all a loopback address stands for the node's own "
        "on the way to the rendezvous); it always asks for a key, but nothing is encrypted",
    )
    rollout_logprob_tolerance: float = option(
        0.0,
        "largest mean difference of vLLM's and the trainer's log-probs, in nats, before the run stops; "
        "0 = 0.01 in float32 and 0.5 in bfloat16",
        minimum=0,
    )


def check_servers(options: RolloutOptions) -> None:
    """Refuse servers that contradict each other.

    Raises:
        ValueError: one line that names the options.
    """
    devices, size = options.rollout_devices, options.rollout_tensor_parallel_size
    if size and devices is None:
        raise ValueError(f"--rollout-tensor-parallel-size {size} has no meaning without --rollout-devices")
    if devices is not None and options.rollout_num_servers > 1:
        raise ValueError(
            f"--rollout-num-servers {options.rollout_num_servers} contradicts --rollout-devices {devices}: "
            "--rollout-tensor-parallel-size says how many servers share these GPUs"
        )
    split_devices(devices, size)


def check_rollout(options: RolloutOptions) -> None:
    """Refuse what vLLM could not do, on the machine where it will be started.

    Raises:
        ValueError: one line that names the option.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    host = options.rollout_host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except (OSError, ValueError) as error:
        raise ValueError(f"--rollout-host {host!r} is no address of this machine: {error}") from None
