"""A vLLM server as a separate process: its life cycle. `vllm_command` says how it is started.

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
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siren_megatron.rollout.http_json import http_json
from siren_megatron.rollout.vllm_command import ServerOptions, server_arguments, server_environment
from siren_megatron.rollout.vllm_launcher import GRACE_S, STOP_SIGNAL, describe_status

# A server that listens on every address is asked on loopback.
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_TRANSFER_PREFIX = "siren-megatron-"
_LOG_TAIL_LINES = 15
_DEATH_NOTICE_S = 6.0  # a dying vLLM answers HTTP 500 first and exits about 3 s later


class RolloutError(RuntimeError):
    """The rollout server did not start, died, or did not answer as asked; the message is one clear line."""


class ServerFailed(RolloutError):
    """The server died, hangs or fails by itself: another one may do the same work."""


def choose_port(host: str, taken: Collection[int] = ()) -> int:
    """A TCP port of host that is free now and not among those that others are about to bind.

    vLLM binds it seconds later, and gloo and NCCL open many connections meanwhile: so it is taken from below
    the range in which the kernel chooses ports for them (32768 and up on Linux).

    Raises:
        RolloutError: host is no address of this machine, or no port was free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = sorted(set(range(20000, 32000)).difference(taken))
    for port in random.SystemRandom().sample(ports, min(100, len(ports))):
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


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@dataclass(frozen=True)
class RemoteServer:
    """What another node's rank knows of a RolloutServer: enough to ask it, not to see or end its processes.

    Attributes as those of RolloutServer; the url is for the other nodes.
    """

    options: ServerOptions
    url: str
    api_key: str
    name: str
    vocab_size: int | None

    def alive(self) -> bool:
        """True: its connections break when it ends."""
        return True

    def describe_death(self) -> str:
        """One line for an error."""
        return f"the vLLM server at {self.url} failed; its log: {self.options.log_file}"


class RolloutServer:
    """A running vLLM server; make one with `RolloutServer.start(options)`. Also a context manager.

    Attributes:
        options: what it was started with.
        port: where it listens.
        url: "http://host:port", for this machine.
        api_key: what every request has to carry, new for each server.
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
        api_key: str,
        transfer_dir: Path,
        held_fds: tuple[int, ...],
        log_offset: int,
    ) -> None:
        self.options, self.port = options, port
        host = _ANY_ADDRESS.get(options.host, options.host)
        self.url = _url(host, port)
        self.name, self.api_key = name, api_key
        self.transfer_dir = transfer_dir
        self.vocab_size = json.loads((options.model / "config.json").read_text()).get("vocab_size")
        self._process = process
        self._held_fds = held_fds
        self._log_offset = log_offset
        self._lock = threading.RLock()
        self._started = time.monotonic()
        self._stopped = False
        self._killed_because = ""

    @classmethod
    def start(cls, options: ServerOptions, taken_ports: Collection[int] = ()) -> RolloutServer:
        """Start vLLM in its own session and return at once; `wait_ready` waits for it.

        Args:
            taken_ports: of servers that were started a moment ago and may not listen yet.

        Raises:
            RolloutError: the process can't be started.
        """
        port = options.port or choose_port(options.host, taken_ports)
        name, api_key = f"siren-{secrets.token_hex(8)}", secrets.token_urlsafe(32)
        shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
        parent = options.transfer_dir or shared_memory
        options.log_file.parent.mkdir(parents=True, exist_ok=True)
        transfer_dir, lock_fd = make_transfer_dir(Path(parent))
        # Python makes both ends close-on-exec, and pass_fds hands over the read end only.
        read_end, write_end = os.pipe()
        command = [
            sys.executable, "-m", "siren_megatron.rollout.vllm_launcher", "watch",
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
                    env=server_environment(options, os.environ, api_key),
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
        return cls(options, process, port, name, api_key, transfer_dir, (write_end, lock_fd), log_offset)

    def remote(self, address: str) -> RemoteServer:
        """What ranks of other nodes need to ask it.

        Args:
            address: this node's, for them; used where the server listens on every address.
        """
        host = address if self.options.host in _ANY_ADDRESS else self.options.host
        return RemoteServer(self.options, _url(host, self.port), self.api_key, self.name, self.vocab_size)

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

    def request(self, method: str, path: str, body: Any = None, *, timeout_s: float) -> tuple[int, Any]:
        """`http_json` with the server's address and key."""
        return http_json(self.url, method, path, body, timeout_s=timeout_s, key=self.api_key)

    def _answers(self) -> bool:
        try:
            status, _ = self.request("GET", "/health", timeout_s=5.0)
            if status == 401:
                raise RolloutError(f"another server answers on {self.url}, and wants another key")
            if status != 200:
                return False
            status, models = self.request("GET", "/v1/models", timeout_s=5.0)
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
        if self._killed_because:
            return f"killed because {self._killed_because}"
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

    def kill(self, because: str) -> None:
        """End the whole process group at once; `describe_death` then says why. `stop` is still due."""
        with self._lock:
            if self.alive():
                self._killed_because = because
                self._kill_group(signal.SIGKILL)
                self._process.wait()

    def stop(self) -> None:
        """End the server's whole process group: SIGINT, then SIGKILL. May be called again."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            if self.alive():
                self._kill_group(STOP_SIGNAL)
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
