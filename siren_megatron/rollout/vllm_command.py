"""How a vLLM server is started: its options, command line and environment. Standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TRANSFER_BACKENDS = {
    "shared-memory": "siren_shared_memory",
    "ipc": "siren_ipc",
    "nccl": "siren_nccl",
}
"""Values of `weight_transfer`, and the names under which `vllm_worker` registers their engines with vLLM."""
WORKER_EXTENSION = "siren_megatron.rollout.vllm_worker.WorkerExtension"
KEY_MIDDLEWARE = "siren_megatron.rollout.auth.RequireKey"

# torchrun's own variables would make vLLM believe that it is one of the trainer's ranks.
_TORCHRUN_NAMES = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE "
    "ROLE_NAME MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
).split()
_TORCHRUN_PREFIXES = ("TORCHELASTIC_", "PET_", "TORCH_NCCL_")


@dataclass(frozen=True)
class ServerOptions:
    """How to start one vLLM server.

    Args:
        model: directory of a Hugging Face checkpoint (config.json and safetensors).
        log_file: file that vLLM's output is appended to.
        dtype: "float32" or "bfloat16".
        max_model_len: longest prompt + response, in tokens.
        seed: vLLM's own seed; requests carry their own.
        tensor_parallel_size: ranks that share the served model.
        kv_cache_bytes: size of the key-value cache in bytes; 0 = what gpu_memory_utilization allows.
        max_num_seqs: sequences that vLLM runs at a time.
        host: address to listen on. Every endpoint asks for a key, but nothing is encrypted.
        port: port to listen on; 0 = choose a free one.
        device: "cpu" or "cuda".
        gpu_memory_utilization: share of a GPU's memory for vLLM, in (0, 1]; used when kv_cache_bytes is 0.
        cpu_threads: OpenMP threads of each CPU worker.
        start_timeout_s: seconds until the server has to be ready.
        weight_transfer: how new weights come: "shared-memory", "ipc" (from the same GPU) or "nccl" (from
            another).
        transfer_dir: parent of the private directory through which new weights come; "" = shared memory.
        sleep_level: what `WeightPublisher.sleep` frees on a GPU: 0 = nothing, 1 = the KV cache, with the
            weights moved to the machine's memory, 2 = both.
        extra_args: further arguments for vLLM's API server.
        extra_env: further environment variables of the server.
    """

    model: Path
    log_file: Path
    dtype: str = "float32"
    max_model_len: int = 4096
    seed: int = 0
    tensor_parallel_size: int = 1
    kv_cache_bytes: int = 256 * 2**20
    max_num_seqs: int = 256
    host: str = "127.0.0.1"
    port: int = 0
    device: str = "cpu"
    gpu_memory_utilization: float = 0.5
    cpu_threads: int = 1
    start_timeout_s: float = 300.0
    weight_transfer: str = "shared-memory"
    transfer_dir: str = ""
    sleep_level: int = 0
    extra_args: tuple[str, ...] = ()
    extra_env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; vLLM is served in float32 or bfloat16")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it has to be cpu or cuda")
        if self.weight_transfer not in TRANSFER_BACKENDS:
            raise ValueError(
                f"weight_transfer is {self.weight_transfer!r}; it has to be {', '.join(TRANSFER_BACKENDS)}"
            )
        if self.sleep_level not in (0, 1, 2):
            raise ValueError(f"sleep_level is {self.sleep_level}; it has to be 0, 1 or 2")
        if self.device == "cpu" and (self.weight_transfer != "shared-memory" or self.sleep_level):
            raise ValueError("a server on a CPU takes weights from shared memory, and does not sleep")
        if not (Path(self.model) / "config.json").is_file():
            raise ValueError(f"model: {self.model} holds no config.json, so it is no Hugging Face checkpoint")
        positive = ("max_model_len", "tensor_parallel_size", "max_num_seqs", "cpu_threads", "start_timeout_s")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be positive")
        if self.kv_cache_bytes < 0:
            raise ValueError(f"kv_cache_bytes is {self.kv_cache_bytes}; it has to be at least 0 (automatic)")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it has to be in (0, 1]"
            )
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}; it has to be between 0 (choose a free one) and 65535")


def server_arguments(options: ServerOptions, port: int, name: str) -> list[str]:
    """vLLM's command line; port is a real one, name the model's name in requests."""
    arguments = [
        "--model", str(options.model), "--served-model-name", name,
        "--host", options.host, "--port", str(port),
        "--dtype", options.dtype, "--seed", str(options.seed),
        "--max-model-len", str(options.max_model_len), "--max-num-seqs", str(options.max_num_seqs),
        "--tensor-parallel-size", str(options.tensor_parallel_size),
        # The default mode ignores the temperature and top-p: not the distribution that was sampled from.
        "--logprobs-mode", "processed_logprobs",
        # A checkpoint's generation_config.json would change top-k, top-p and the stop tokens silently.
        "--generation-config", "vllm",
        "--skip-tokenizer-init",
        "--load-format", "safetensors",  # never a pickle
        "--weight-transfer-config", json.dumps({"backend": TRANSFER_BACKENDS[options.weight_transfer]}),
        "--worker-extension-cls", WORKER_EXTENSION,
        "--disable-uvicorn-access-log",
        # vLLM's own check of the key leaves out the endpoints that pause it and change its weights.
        "--middleware", KEY_MIDDLEWARE,
    ]  # fmt: skip
    if options.kv_cache_bytes:
        arguments += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    else:
        arguments += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if options.device == "cpu":
        # A prompt cut into chunks kills the engine where requests have seeds: it wants to take a random
        # number back, which generators on a CPU cannot (vLLM 0.32.0, GPUModelRunner._bookkeeping_sync).
        arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
    if options.sleep_level:
        arguments += ["--enable-sleep-mode"]
    return arguments + list(options.extra_args)


def server_environment(options: ServerOptions, base: Mapping[str, str], api_key: str) -> dict[str, str]:
    """Environment of the server: base without torchrun's variables, with what vLLM needs.

    Args:
        api_key: what requests have to carry. Only here: a command line is open to every user of a machine.
    """
    environment = {
        name: value
        for name, value in base.items()
        if name not in _TORCHRUN_NAMES and not name.startswith(_TORCHRUN_PREFIXES)
    }
    package_parent = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, base.get("PYTHONPATH", "")]))
    environment.update(
        VLLM_SERVER_DEV_MODE="1",  # the endpoints for pausing and weight transfer
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_API_KEY=api_key,
        # Where vLLM's workers meet each other; its own guess is the machine's public address.
        VLLM_HOST_IP="127.0.0.1",
    )
    if options.device == "cpu":
        environment.update(
            TORCHDYNAMO_DISABLE="1",  # else the first generation compiles for 14 s
            OMP_NUM_THREADS=str(options.cpu_threads),
            CUDA_VISIBLE_DEVICES="",
            # Each weight update makes every layer anew. Memory that goes back to the system between two of
            # them comes back page by page: a third of the update's time.
            MALLOC_MMAP_MAX_="0",
            MALLOC_TRIM_THRESHOLD_=str(2**40),
        )
        if options.tensor_parallel_size == 1:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # starts in half the time
    if options.weight_transfer == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the handles of GPU memory are pickles
    environment.update(options.extra_env)
    return environment
