"""The server's options, command line and life cycle, with a stand-in for vLLM where a process is needed."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from siren_megatron.rollout.client import RolloutError, RolloutServer, ServerOptions
from siren_megatron.rollout.health import HealthMonitor, stopped_process
from siren_megatron.rollout.http_json import http_json
from siren_megatron.rollout.server import choose_port, make_transfer_dir
from siren_megatron.rollout.vllm_command import server_arguments, server_environment
from siren_megatron.rollout.vllm_launcher import describe_status

REPOSITORY = Path(__file__).resolve().parents[2]

# Stands where vLLM's entry stands. It starts an "engine" that ignores SIGINT, then does as FAKE_VLLM says.
FAKE_ENTRY = """
import http.server, json, os, signal, subprocess, sys, time

def main():
    print("fake vLLM", *sys.argv[1:], flush=True)
    if os.environ["FAKE_VLLM"] == "dies":
        print("ValueError: the fake model is broken", flush=True)
        sys.exit(3)
    from multiprocessing import resource_tracker
    resource_tracker.ensure_running()  # as vLLM does; it unblocks SIGTERM
    if os.environ["FAKE_VLLM"] != "serves alone":
      subprocess.Popen([sys.executable, "-c",
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "print('engine is up', flush=True); time.sleep(600)"])
    if os.environ["FAKE_VLLM"] == "hangs":
        time.sleep(600)
    name = sys.argv[sys.argv.index("--served-model-name") + 1]
    if os.environ["FAKE_VLLM"] == "is another":
        name = "another"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.headers["Authorization"] != "Bearer " + os.environ["VLLM_API_KEY"]:
                self.send_response(401)
                self.end_headers()
                return
            if os.path.exists(os.environ.get("HANG_FILE", "/nowhere")):
                time.sleep(600)
            body = b"" if self.path == "/health" else json.dumps({"data": [{"id": name}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def make_options(tmp_path, checkpoint, monkeypatch):
    """Options whose server process finds the stand-in instead of vLLM."""
    package = tmp_path / "stand_in" / "vllm" / "entrypoints" / "launchers" / "api_server"
    package.mkdir(parents=True)
    for level in [package, *package.parents[:3]]:
        (level / "__init__.py").touch()  # else the real package, a regular one, would be preferred
    (package / "entry.py").write_text(FAKE_ENTRY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_in"))

    def make(behaviour, **changes):
        environment = {"FAKE_VLLM": behaviour, **changes.pop("extra_env", {})}
        defaults = {"model": checkpoint, "log_file": tmp_path / "logs" / "vllm.log", "start_timeout_s": 30.0}
        return ServerOptions(**{**defaults, **changes}, extra_env=environment)

    return make


def group_members(group: int) -> list[int]:
    """Pids of the living (not zombie) processes of a process group."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def test_a_chosen_port_can_be_bound():
    port = choose_port("127.0.0.1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))


def test_a_host_that_is_not_ours_is_refused():
    with pytest.raises(RolloutError, match=r"can't listen on 192\.0\.2\.1"):
        choose_port("192.0.2.1")


def test_arguments_on_a_cpu(checkpoint):
    options = ServerOptions(model=checkpoint, log_file=Path("x"), seed=7, extra_args=("--block-size", "32"))
    arguments = server_arguments(options, 4321, "some-name")
    value = dict(zip(arguments, arguments[1:], strict=False))
    assert value["--model"] == str(checkpoint)
    assert value["--served-model-name"] == "some-name"
    assert value["--host"] == "127.0.0.1"
    assert value["--port"] == "4321"
    assert value["--seed"] == "7"
    assert value["--dtype"] == "float32"
    assert value["--logprobs-mode"] == "processed_logprobs"
    assert value["--generation-config"] == "vllm"
    assert value["--kv-cache-memory-bytes"] == str(256 * 2**20)
    assert json.loads(value["--weight-transfer-config"]) == {"backend": "siren_shared_memory"}
    assert value["--middleware"] == "siren_megatron.rollout.auth.RequireKey"
    assert value["--load-format"] == "safetensors"
    assert "--api-key" not in arguments and "--trust-remote-code" not in arguments
    assert "--enforce-eager" in arguments
    assert "--no-enable-chunked-prefill" in arguments
    assert "--gpu-memory-utilization" not in arguments
    assert arguments[-2:] == ["--block-size", "32"]


def test_arguments_on_a_gpu(checkpoint):
    options = ServerOptions(
        model=checkpoint, log_file=Path("x"), device="cuda", kv_cache_bytes=0, gpu_memory_utilization=0.25
    )
    arguments = server_arguments(options, 1, "name")
    assert arguments[arguments.index("--gpu-memory-utilization") + 1] == "0.25"
    assert "--kv-cache-memory-bytes" not in arguments
    assert "--enforce-eager" not in arguments
    assert "--no-enable-chunked-prefill" not in arguments


def test_the_environment_hides_torchrun_and_keeps_the_rest(checkpoint):
    base = {
        "PATH": "p",
        "PYTHONPATH": "mine",
        "RANK": "1",
        "MASTER_PORT": "29500",
        "OMP_NUM_THREADS": "8",
        "TORCHELASTIC_RUN_ID": "x",
        "CUDA_VISIBLE_DEVICES": "3",
    }
    cpu = server_environment(ServerOptions(model=checkpoint, log_file=Path("x"), cpu_threads=2), base, "key")
    assert cpu["PATH"] == "p"
    assert cpu["PYTHONPATH"].split(os.pathsep) == [str(REPOSITORY), "mine"]
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & cpu.keys()
    assert cpu["OMP_NUM_THREADS"] == "2"
    assert cpu["TORCHDYNAMO_DISABLE"] == "1"
    assert cpu["VLLM_SERVER_DEV_MODE"] == "1"
    assert cpu["VLLM_API_KEY"] == "key"
    options = ServerOptions(
        model=checkpoint, log_file=Path("x"), device="cuda", extra_env={"CUDA_VISIBLE_DEVICES": "5"}
    )
    gpu = server_environment(options, base, "key")
    assert gpu["CUDA_VISIBLE_DEVICES"] == "5"
    assert "TORCHDYNAMO_DISABLE" not in gpu


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"kv_cache_bytes": -1}, "kv_cache_bytes is -1"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"port": 70000}, "port is 70000"),
        ({"start_timeout_s": 0.0}, "start_timeout_s is 0.0"),
    ],
)
def test_options_out_of_range_are_refused(checkpoint, changes, message):
    with pytest.raises(ValueError, match=message):
        ServerOptions(model=checkpoint, log_file=Path("x"), **changes)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model: .* holds no config\.json"):
        ServerOptions(model=tmp_path, log_file=Path("x"))


def test_exit_states_in_words():
    assert describe_status(3) == "exit code 3"
    assert describe_status(-9) == "killed by SIGKILL"


def test_start_ready_and_stop(make_options):
    with RolloutServer.start(make_options("serves")) as server:
        assert server.alive()
        server.wait_ready()
        wait_until(lambda: "engine is up" in server.log_tail(), 10)
        assert len(group_members(server.pid)) == 4  # launcher, vLLM, its resource tracker, engine
        assert server.transfer_dir.is_dir()
        assert server.transfer_dir.stat().st_mode & 0o077 == 0
    assert not server.alive()
    assert group_members(server.pid) == []
    assert not server.transfer_dir.exists()
    server.stop()


def test_an_early_death_shows_the_log(make_options):
    options = make_options("dies")
    options.log_file.parent.mkdir()
    options.log_file.write_text("a line of an earlier run\n")
    with RolloutServer.start(options) as server:
        with pytest.raises(RolloutError) as caught:
            server.wait_ready()
    message = str(caught.value)
    assert "vLLM ended while starting (exit code 3)" in message
    assert "ValueError: the fake model is broken" in message
    assert str(options.log_file) in message
    assert "earlier run" not in message


def test_a_server_that_never_answers_is_given_up(make_options):
    with RolloutServer.start(make_options("hangs", start_timeout_s=1.5)) as server:
        with pytest.raises(RolloutError, match="not ready after 2 s"):
            server.wait_ready()
        assert group_members(server.pid) == []


def test_another_server_on_the_port_is_noticed(make_options):
    with RolloutServer.start(make_options("is another")) as server:
        with pytest.raises(RolloutError, match="another server answers"):
            server.wait_ready()


def test_the_launcher_killed_leaves_nothing_behind(make_options):
    with RolloutServer.start(make_options("serves")) as server:
        server.wait_ready()
        wait_until(lambda: "engine is up" in server.log_tail(), 10)
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not server.alive(), 5)
        wait_until(lambda: group_members(server.pid) == [], 5)
        assert server.exit_state() == "killed by SIGKILL"
        assert str(server.options.log_file) in server.describe_death()


def test_vllm_killed_ends_the_group_and_is_described(make_options):
    with RolloutServer.start(make_options("serves")) as server:
        server.wait_ready()
        wait_until(lambda: "engine is up" in server.log_tail(), 10)
        (vllm,) = [
            pid
            for pid in group_members(server.pid)
            if b"\0serve\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(vllm, signal.SIGKILL)
        wait_until(lambda: group_members(server.pid) == [], 15)
        assert "vLLM ended by itself: killed by SIGKILL" in server.log_tail()


def pid_of_vllm(server):
    (vllm,) = [
        pid for pid in group_members(server.pid) if b"\0serve\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return vllm


@pytest.mark.parametrize("which", ["vLLM", "its launcher"])
def test_a_stopped_process_ends_the_server(make_options, which):
    with RolloutServer.start(make_options("serves")) as server:
        server.wait_ready()
        monitor = HealthMonitor(server, 600.0)
        victim = pid_of_vllm(server) if which == "vLLM" else server.pid
        assert stopped_process(server.pid) is None
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: not server.alive(), 30)
        monitor.close()
        wait_until(lambda: group_members(server.pid) == [], 5)
        assert f"killed because its process {victim} is stopped" in server.describe_death()


def test_a_server_that_does_not_answer_any_more_is_killed(make_options, tmp_path):
    hang = tmp_path / "hang"
    with RolloutServer.start(make_options("serves", extra_env={"HANG_FILE": str(hang)})) as server:
        server.wait_ready()
        monitor = HealthMonitor(server, 1.0)
        hang.touch()
        wait_until(lambda: not server.alive(), 60)
        monitor.close()
        assert "its /health did not answer for 1 s" in server.describe_death()


def test_a_healthy_server_is_left_alone(make_options):
    with RolloutServer.start(make_options("serves alone")) as server:
        server.wait_ready()
        checks, request = [], server.request
        server.request = lambda *a, **more: checks.append(request(*a, **more)) or checks[-1]
        monitor = HealthMonitor(server, 600.0)
        wait_until(lambda: len(checks) >= 3, 60)
        monitor.close()
        assert server.alive() and {status for status, _ in checks} == {200}


def test_signals_for_the_trainer_leave_the_server_alone(make_options):
    """SLURM sends them to every process of a job."""
    with RolloutServer.start(make_options("serves alone")) as server:
        server.wait_ready()
        members = group_members(server.pid)
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.killpg(server.pid, signum)
        server.wait_ready()
        for pid in (server.pid, pid_of_vllm(server)):
            pending = Path(f"/proc/{pid}/status").read_text().split("ShdPnd:")[1].split()[0]
            assert int(pending, 16) >> signal.SIGTERM - 1 & 1, "it is blocked, not handled"
        assert group_members(server.pid) == members


def test_no_answer_without_the_key_and_the_key_is_nowhere_to_be_seen(make_options):
    with RolloutServer.start(make_options("serves alone")) as server:
        server.wait_ready()
        assert http_json(server.url, "GET", "/health", timeout_s=5)[0] == 401
        assert http_json(server.url, "GET", "/health", timeout_s=5, key="guess")[0] == 401
        assert server.request("GET", "/health", timeout_s=5)[0] == 200
        for pid in group_members(server.pid):
            assert server.api_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert server.api_key not in server.options.log_file.read_text()
        assert server.api_key not in repr(server.options)


@pytest.mark.parametrize("with_sibling", [False, True], ids=["alone", "sibling holds the pipe"])
def test_a_killed_parent_takes_the_server_along(make_options, tmp_path, with_sibling):
    options = make_options("serves")
    script = textwrap.dedent(
        f"""
        import os, time
        from pathlib import Path
        from siren_megatron.rollout.client import RolloutServer, ServerOptions

        server = RolloutServer.start(ServerOptions(
            model=Path({str(options.model)!r}), log_file=Path({str(options.log_file)!r}),
            extra_env={{"FAKE_VLLM": "serves"}}))
        server.wait_ready()
        sibling = 0
        if {with_sibling}:
            sibling = os.fork()
            if sibling == 0:
                time.sleep(600)
        print(server.pid, sibling, server.transfer_dir, flush=True)
        time.sleep(600)
        """
    )
    path = os.pathsep.join([str(REPOSITORY), os.environ["PYTHONPATH"]])
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    sibling = 0
    try:
        group, sibling, transfer_dir = parent.stdout.readline().split()
        group, sibling = int(group), int(sibling)
        wait_until(lambda: "engine is up" in options.log_file.read_text(), 10)
        assert len(group_members(group)) == 4
    finally:
        parent.kill()
        parent.wait()
    try:
        wait_until(lambda: group_members(group) == [], 15)
        assert not Path(transfer_dir).exists()
    finally:
        parent.stdout.close()
        if sibling:
            os.kill(sibling, signal.SIGKILL)


def test_a_dead_runs_directory_is_removed_and_a_living_ones_is_kept(tmp_path):
    dead, dead_lock = make_transfer_dir(tmp_path)
    living, living_lock = make_transfer_dir(tmp_path)
    os.close(dead_lock)
    for directory in (dead, living):
        os.utime(directory, (1, 1))
    third, third_lock = make_transfer_dir(tmp_path)
    assert not dead.exists()
    assert living.is_dir()
    assert third.is_dir()
    os.close(living_lock)
    os.close(third_lock)
