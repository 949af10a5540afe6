"""A vLLM server as a separate process: options, command line, life cycle.

The server is started in its own session by `vllm_launcher`, which ends it with the trainer even when that is
killed with SIGKILL. This module imports neither vLLM nor torch nor Megatron.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from siren_megatron.http_json import http_json
from siren_megatron.vllm_launcher import GRACE_S, describe_status

TRANSFER_BACKEND = "siren_shared_memory"
"""Name under which `vllm_worker` registers its weight-transfer engine with vLLM."""
WORKER_EXTENSION = "siren_megatron.vllm_worker.WorkerExtension"

# torchrun's own variables would make vLLM believe that it is one of the trainer's ranks.
_TORCHRUN_NAMES = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE "
    "ROLE_NAME MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
).split()
_TORCHRUN_PREFIXES = ("TORCHELASTIC_", "PET_", "TORCH_NCCL_")

_TRANSFER_PREFIX = "siren-megatron-"
_LOG_TAIL_LINES = 15
_DEATH_NOTICE_S = 6.0  # a dying vLLM answers HTTP 500 first and exits about 3 s later


class RolloutError(RuntimeError):
    """The rollout server did not start, died, or did not answer as asked; the message is one clear line."""


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
        host: address to listen on; keep to loopback, the control endpoints know no password.
        port: port to listen on; 0 = choose a free one.
        device: "cpu" or "cuda".
        gpu_memory_utilization: share of a GPU's memory for vLLM, in (0, 1]; used when kv_cache_bytes is 0.
        cpu_threads: OpenMP threads of each CPU worker.
        start_timeout_s: seconds until the server has to be ready.
        transfer_dir: parent of the private directory through which new weights come; "" = shared memory.
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
    transfer_dir: str = ""
    extra_args: tuple[str, ...] = ()
    extra_env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; vLLM is served in float32 or bfloat16")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it has to be cpu or cuda")
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


def choose_port(host: str) -> int:
    """A TCP port of host that is free now.

    vLLM binds it seconds later, and gloo and NCCL open many connections meanwhile: so it is taken from below
    the range in which the kernel chooses ports for them (32768 and up on Linux).

    Raises:
        RolloutError: host is no address of this machine, or no port was free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, port))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise RolloutError(f"vLLM can't listen on {host}: {error}") from error
    raise RolloutError(f"no free port was found on {host}")


def make_transfer_dir(parent: Path) -> tuple[Path, int]:
    """A private directory for weight updates and a descriptor that holds its lock while we live.

    What a run left behind that was killed together with its launcher is removed on this occasion.
    """
    for stale in parent.glob(f"{_TRANSFER_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or removed meanwhile
            # A young directory's owner may not have locked it yet.
            if time.time() - stale.stat().st_mtime > 60:
                with open(stale / "lock") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(stale)
    directory = Path(tempfile.mkdtemp(prefix=_TRANSFER_PREFIX, dir=parent))
    lock_fd = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    return directory, lock_fd


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
        "--weight-transfer-config", json.dumps({"backend": TRANSFER_BACKEND}),
        "--worker-extension-cls", WORKER_EXTENSION,
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if options.kv_cache_bytes:
        arguments += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    else:
        arguments += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if options.device == "cpu":
        arguments += ["--enforce-eager"]
    return arguments + list(options.extra_args)


def server_environment(options: ServerOptions, base: Mapping[str, str]) -> dict[str, str]:
    """Environment of the server: base without torchrun's variables, with what vLLM needs."""
    environment = {
        name: value
        for name, value in base.items()
        if name not in _TORCHRUN_NAMES and not name.startswith(_TORCHRUN_PREFIXES)
    }
    package_parent = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, base.get("PYTHONPATH", "")]))
    environment.update(
        VLLM_SERVER_DEV_MODE="1",  # the endpoints for pausing and weight transfer
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
    )
    if options.device == "cpu":
        environment.update(
            TORCHDYNAMO_DISABLE="1",  # else the first generation compiles for 14 s
            OMP_NUM_THREADS=str(options.cpu_threads),
            CUDA_VISIBLE_DEVICES="",
        )
        if options.tensor_parallel_size == 1:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # starts in half the time
    environment.update(options.extra_env)
    return environment


class RolloutServer:
    """A running vLLM server; make one with `RolloutServer.start(options)`. Also a context manager.

    Attributes:
        options: what it was started with.
        url: "http://host:port".
        name: the model's name in requests, random, so that another server on the same port is noticed.
        transfer_dir: private directory for weight updates, removed with the server.
        vocab_size: size of the model's vocabulary; None when its config.json does not say.
    """

    def __init__(
        self,
        options: ServerOptions,
        process: subprocess.Popen[bytes],
        port: int,
        name: str,
        transfer_dir: Path,
        held_fds: tuple[int, ...],
        log_offset: int,
    ) -> None:
        self.options = options
        self.url = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{port}"
        self.name = name
        self.transfer_dir = transfer_dir
        self.vocab_size = json.loads((options.model / "config.json").read_text()).get("vocab_size")
        self._process = process
        self._held_fds = held_fds
        self._log_offset = log_offset
        self._lock = threading.RLock()
        self._started = time.monotonic()
        self._stopped = False

    @classmethod
    def start(cls, options: ServerOptions) -> RolloutServer:
        """Start vLLM in its own session and return at once; `wait_ready` waits for it.

        Raises:
            RolloutError: the process can't be started.
        """
        port = options.port or choose_port(options.host)
        name = f"siren-{secrets.token_hex(8)}"
        shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
        parent = options.transfer_dir or shared_memory
        options.log_file.parent.mkdir(parents=True, exist_ok=True)
        transfer_dir, lock_fd = make_transfer_dir(Path(parent))
        # Python makes both ends close-on-exec, and pass_fds hands over the read end only.
        read_end, write_end = os.pipe()
        command = [
            sys.executable, "-m", "siren_megatron.vllm_launcher", "watch",
            "--parent-pid", str(os.getpid()), "--watch-fd", str(read_end), "--remove", str(transfer_dir),
            "--", *server_arguments(options, port, name),
        ]  # fmt: skip
        try:
            with open(options.log_file, "ab") as log:
                log_offset = log.tell()
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=server_environment(options, os.environ),
                    start_new_session=True,
                    pass_fds=(read_end,),
                )
        except OSError as error:
            shutil.rmtree(transfer_dir, ignore_errors=True)
            os.close(write_end)
            os.close(lock_fd)
            raise RolloutError(f"vLLM could not be started: {error}") from error
        finally:
            os.close(read_end)
        return cls(options, process, port, name, transfer_dir, (write_end, lock_fd), log_offset)

    @property
    def pid(self) -> int:
        """Pid of the launcher, which is the id of the server's process group and session as well."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether the server's processes run (it may still be loading the model)."""
        with self._lock:
            if self._process.returncode is not None:
                return False
            # WNOWAIT leaves a zombie that keeps the group's id reserved, so that killpg can't hit a stranger.
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return True
            self._kill_group(signal.SIGKILL)
            self._process.wait()
            return False

    def wait_ready(self) -> None:
        """Wait until the server answers, at most options.start_timeout_s seconds after its start.

        Raises:
            RolloutError: it ended or was not ready in time; the message has the log's last lines and path.
        """
        while True:
            if not self.alive():
                raise RolloutError(f"vLLM ended while starting ({self.exit_state()}). {self.log_tail()}")
            if self._answers():
                return
            if time.monotonic() - self._started > self.options.start_timeout_s:
                self.stop()
                raise RolloutError(
                    f"vLLM was not ready after {self.options.start_timeout_s:.0f} s. {self.log_tail()}"
                )
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            status, _ = http_json(self.url, "GET", "/health", timeout_s=5.0)
            if status != 200:
                return False
            status, models = http_json(self.url, "GET", "/v1/models", timeout_s=5.0)
        except (OSError, http.client.HTTPException):
            return False
        if status != 200:
            return False
        names = [model.get("id") for model in models.get("data", [])]
        if self.name not in names:
            raise RolloutError(
                f"another server answers on {self.url}, it serves {names}: choose another port"
            )
        return True

    def exit_state(self) -> str:
        """How the server ended, in words ("exit code 1", "killed by SIGKILL"), or "still running"."""
        if self.alive():
            return "still running"
        code = self._process.returncode
        return describe_status(128 - code if code > 128 else code)

    def describe_death(self, wait_s: float = _DEATH_NOTICE_S) -> str:
        """One line on the server's state, for an error; waits up to wait_s seconds for a dying one to end."""
        deadline = time.monotonic() + wait_s
        while self.alive():
            if time.monotonic() > deadline:
                return f"vLLM at {self.url} is still running but failed; its log: {self.options.log_file}"
            time.sleep(0.05)
        return f"the vLLM server at {self.url} died ({self.exit_state()}); its log: {self.options.log_file}"

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """The last lines of this server's log, with the log's path."""
        try:
            with open(self.options.log_file, "rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(self._log_offset, log.tell() - 64 * 1024))
                tail = log.read().decode(errors="replace").splitlines()[-lines:]
        except OSError as error:
            tail = [f"(the log can't be read: {error})"]
        return "\n".join([f"Last lines of {self.options.log_file}:", *tail])

    def stop(self) -> None:
        """End the server's whole process group: SIGTERM, then SIGKILL. May be called again."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            if self.alive():
                self._kill_group(signal.SIGTERM)
                deadline = time.monotonic() + GRACE_S + 2.0
                while self.alive() and time.monotonic() < deadline:
                    time.sleep(0.05)
            if self.alive():
                self._kill_group(signal.SIGKILL)
                self._process.wait()
            self._wait_for_empty_group(2.0)
            shutil.rmtree(self.transfer_dir, ignore_errors=True)
            for fd in self._held_fds:
                os.close(fd)

    def _kill_group(self, signum: int) -> None:
        try:
            os.killpg(self.pid, signum)
        except ProcessLookupError:
            pass  # nobody is left

    def _wait_for_empty_group(self, wait_s: float) -> None:
        """Killed processes take a moment to let go of their memory and port; an init may never reap some."""
        deadline = time.monotonic() + wait_s
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < deadline:
                os.killpg(self.pid, 0)
                time.sleep(0.01)

    def __enter__(self) -> RolloutServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
