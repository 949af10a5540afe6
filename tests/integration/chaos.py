"""pretrain_siren.py with faults on the way: FAULTS is JSON {"step": "fault"}. See test_chaos.py.

What fails here fails as it would outside: real processes are killed and stopped, a real connection hangs.
Only where the fault is put, and the NaN, is ours.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

FAULTS = json.loads(os.environ["FAULTS"])
SWALLOWED = {"hang a request": 1, "hang a request and its second try": 2}


def engine_of(server) -> psutil.Process:
    processes = psutil.Process(server.pid).children(recursive=True)
    (engine,) = [p for p in processes if "EngineCore" in " ".join([p.name(), *p.cmdline()])]
    return engine


def api_server_of(server) -> psutil.Process:
    (api_server,) = psutil.Process(server.pid).children()
    return api_server


def proxy_that_swallows(count: int, url: str) -> str:
    """A proxy of url; the first connections, each a request, are read and never answered."""
    host, port = url.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket | None) -> None:
        try:
            while data := source.recv(65536):
                if target is not None:
                    target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # close alone would wait for the other thread's recv

    def accept() -> None:
        for number in itertools.count():
            client, _ = listener.accept()
            server = None if number < count else socket.create_connection((host, int(port)))
            pumps = [(client, server)] if server is None else [(client, server), (server, client)]
            for ends in pumps:
                threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def install_faults() -> None:
    """Patch the stages of a run; needs the platform, so it comes with the first import of the job."""
    from siren_megatron import job
    from siren_megatron.rollout import service
    from siren_megatron.rollout.transfer.shared_memory import SharedMemoryTransport

    step_of = {"now": 0}
    pending = {int(step): fault for step, fault in FAULTS.items()}

    def due(*faults: str) -> str | None:
        return pending.pop(step_of["now"]) if pending.get(step_of["now"]) in faults else None

    goes_on = job.Job.goes_on

    def counting_goes_on(self) -> bool:
        step_of["now"] = self.step + 1
        return goes_on(self)

    job.Job.goes_on = counting_goes_on

    generate = service.RolloutService.generate

    def generate_with_faults(self, prompts, *, on_group=None, **options):
        # Not the check after a weight update, which is one prompt.
        fault = due("kill the engine", "stop the engine", *SWALLOWED) if len(prompts) > 1 else None
        client, url = self._clients[0], self._clients[0].url
        if fault in SWALLOWED:
            client.url = proxy_that_swallows(SWALLOWED[fault], url)

        def first_group(index, samples):
            nonlocal fault
            if fault in ("kill the engine", "stop the engine"):
                engine_of(client._server).send_signal(
                    signal.SIGKILL if fault == "kill the engine" else signal.SIGSTOP
                )
                fault = None
            if on_group is not None:
                on_group(index, samples)

        try:
            return generate(self, prompts, on_group=first_group, **options)
        finally:
            if fault in SWALLOWED:
                client.url = url

    service.RolloutService.generate = generate_with_faults

    send = SharedMemoryTransport.send

    def send_with_faults(self, chunk):
        if due("kill the API server in an update"):
            api_server_of(self.group.servers[0]).send_signal(signal.SIGKILL)
        send(self, chunk)

    SharedMemoryTransport.send = send_with_faults

    compute_advantages = job.Job.compute_advantages

    def advantages_with_faults(self, batch):
        batch = compute_advantages(self, batch)
        if not due("not a number"):
            return batch
        advantages = batch.token_advantages.clone()
        advantages[-1] = math.nan
        return batch.replace(token_advantages=advantages)

    job.Job.compute_advantages = advantages_with_faults


if __name__ == "__main__":
    import pretrain_siren
    from siren_megatron import platform

    install = platform.install

    def install_all(*arguments):
        result = install(*arguments)
        install_faults()
        return result

    platform.install = install_all
    pretrain_siren.main()
