"""Rollouts and weight updates with a real vLLM server, compared with Hugging Face's fp32 forward."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from siren_megatron.rollout.client import RolloutClient, RolloutError, RolloutServer, ServerOptions
from siren_megatron.rollout.http_json import http_json
from siren_megatron.rollout.transfer.shared_memory import SharedMemoryTransport
from siren_megatron.rollout.weight_sync import WeightPublisher, WeightSyncError
from tests.tiny_qwen import (
    EOS,
    MAX_MODEL_LEN,
    PROMPTS,
    TOLERANCE,
    VOCAB,
    largest_difference,
    make_model,
    randomize,
    weights_of,
)

pytestmark = pytest.mark.vllm

REPOSITORY = Path(__file__).resolve().parents[2]


def tokens_of(groups):
    return [[sample.response_ids for sample in group] for group in groups]


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
        time.sleep(0.05)


class Served:
    """A server, its client and publisher, and the model whose weights it should have."""

    def __init__(self, directory: Path, tied: bool) -> None:
        self.tied = tied
        self.model = make_model(tied)
        self.model.save_pretrained(directory / "model")
        options = ServerOptions(
            model=directory / "model", log_file=directory / "vllm.log", max_model_len=MAX_MODEL_LEN
        )
        self.server = RolloutServer.start(options)
        self.client = RolloutClient(self.server.url, 60.0, 64, server=self.server)

    def ready(self) -> None:
        self.server.wait_ready()
        # Chunks of 4 KiB: an update is some twenty files, and q, k and v come in different ones.
        self.publisher = WeightPublisher([self.server], chunk_bytes=4096, timeout_s=60.0)
        self.publisher.init()

    def generate(self, *, temperature=1.0, seed=0, prompts=PROMPTS, num_samples=4, max_tokens=12, **more):
        return self.client.generate(
            prompts,
            num_samples=num_samples,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop_token_ids=more.pop("stop_token_ids", [EOS]),
            **more,
        )


@pytest.fixture(scope="module")
def tied_and_untied(tmp_path_factory):
    """Both servers, started side by side: most of a start is spent waiting for imports."""
    both = {}
    try:
        for name in ("untied", "tied"):
            both[name] = Served(tmp_path_factory.mktemp(name), tied=name == "tied")
        for served in both.values():
            served.ready()
        yield both
    finally:
        for served in both.values():
            served.server.stop()


@pytest.fixture(params=["untied", "tied"])
def served(request, tied_and_untied):
    return tied_and_untied[request.param]


# A few of many: the guard knows no paths.
ENDPOINTS = """GET /health;GET /metrics;GET /v1/models;GET /is_paused;GET /openapi.json;GET /nowhere
POST /v1/completions;POST /pause?mode=wait;POST /collective_rpc;POST /update_weights;POST /reset_prefix_cache
OPTIONS /pause""".replace("\n", ";").split(";")


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_no_endpoint_answers_without_the_key(served, endpoint):
    method, path = endpoint.split()
    for key in (None, "guess", served.server.api_key[:-1]):
        assert http_json(served.server.url, method, path, timeout_s=10.0, key=key)[0] == 401
    assert served.server.request("GET", "/is_paused", timeout_s=10.0) == (200, {"is_paused": False})


def test_nobody_else_can_reach_the_server_or_see_its_key(served):
    for pid in group_members(served.server.pid):
        assert served.server.api_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::1"), (
                    connection,
                    psutil.Process(pid).cmdline(),
                )
    assert served.server.api_key not in served.server.options.log_file.read_text()


def test_signals_for_the_trainer_leave_it_alone(served):
    members = group_members(served.server.pid)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.killpg(served.server.pid, signum)
    assert largest_difference(served.model, served.generate(seed=21), 1.0) < TOLERANCE
    assert sorted(group_members(served.server.pid)) == sorted(members)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_distribution(served, temperature):
    groups = served.generate(temperature=temperature, seed=1)
    assert [len(group) for group in groups] == [4] * len(PROMPTS)
    assert [group[0].prompt_ids for group in groups] == [tuple(prompt) for prompt in PROMPTS]
    assert all(0 <= token < VOCAB for group in groups for sample in group for token in sample.response_ids)
    assert largest_difference(served.model, groups, temperature) < TOLERANCE


def test_logprobs_under_top_p_are_renormalised(served):
    groups = served.generate(temperature=0.7, top_p=0.7, seed=2)
    assert largest_difference(served.model, groups, 0.7, top_p=0.7) < TOLERANCE


def test_greedy_takes_the_likeliest_token(served):
    groups = served.generate(temperature=0.0, num_samples=1)
    for (sample,) in groups:
        ids = torch.tensor(sample.prompt_ids + sample.response_ids)
        with torch.no_grad():
            best = served.model(ids[None]).logits[0].argmax(-1)
        assert sample.response_ids == tuple(best[len(sample.prompt_ids) - 1 : -1].tolist())


def test_the_seed_decides_the_tokens(served):
    first = tokens_of(served.generate(seed=3))
    assert tokens_of(served.generate(seed=3)) == first
    assert tokens_of(served.generate(seed=4)) != first
    # The samples of a prompt, and equal prompts, have random numbers of their own.
    one, other = served.generate(seed=3, prompts=[PROMPTS[0]] * 2)
    assert len({sample.response_ids for sample in one + other}) == 8


def test_more_prompt_tokens_than_one_forward_pass_takes_are_sampled_from(served):
    # 12,800 tokens; vLLM's passes are of some thousand, and a prompt cut in two would kill its engine.
    prompts = [[3 + (31 * row + 7 * position) % 500 for position in range(200)] for row in range(64)]
    groups = served.generate(prompts=prompts, num_samples=2, max_tokens=3, seed=8)
    assert largest_difference(served.model, groups, 1.0) < TOLERANCE


def test_the_tokens_are_the_same_where_nobody_asks_for_log_probs(served):
    groups = served.generate(seed=3, logprobs=False)
    assert tokens_of(groups) == tokens_of(served.generate(seed=3))
    assert all(sample.rollout_logprobs == () for group in groups for sample in group)


def test_responses_end_at_a_stop_token_or_at_the_budget(served):
    stops = list(range(0, VOCAB, 8))
    groups = served.generate(seed=5, stop_token_ids=stops)
    samples = [sample for group in groups for sample in group]
    for sample in samples:
        stopped = sample.response_ids[-1] in stops
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert not any(token in stops for token in sample.response_ids[:-1])
        assert stopped or len(sample.response_ids) == 12
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    # Without stop tokens not even the model's own end of sequence ends a response.
    everything = served.generate(seed=5, stop_token_ids=[])
    assert all(len(sample.response_ids) == 12 for group in everything for sample in group)


def test_prompts_that_can_not_be_served_are_refused_at_once(served):
    with pytest.raises(
        ValueError, match="prompt 1 has 250 tokens; with max_tokens 12 .* max_model_len is 256"
    ):
        served.generate(prompts=[[3], [3] * 250])
    for token in (-1, VOCAB):
        with pytest.raises(ValueError, match="prompt 1 has a token outside the vocabulary, 0 to 512 - 1"):
            served.generate(prompts=[[3], [4, token]])
    stranger = RolloutClient(served.server.url, 10.0, 4, model="another")
    with pytest.raises(RolloutError, match="HTTP 401 for prompt 0: no or a wrong API key"):
        stranger.generate(
            PROMPTS[:1], num_samples=1, max_tokens=1, temperature=1.0, seed=0, stop_token_ids=[]
        )
    assert served.server.alive()


def test_an_update_replaces_every_weight(served):
    for seed in (11, 12):
        before = served.generate(seed=6)
        randomize(served.model, seed)
        # What was generated with the old weights must be far from the new ones, else nothing is tested.
        assert largest_difference(served.model, before, 1.0) > 1.0
        stats = served.publisher.update(weights_of(served.model))
        parameters = list(served.model.parameters())
        assert stats.num_tensors == len(parameters)
        assert stats.bytes == sum(parameter.nbytes for parameter in parameters)
        # The same prompts again: keys and values of the old weights must be out of the prefix cache.
        assert largest_difference(served.model, served.generate(seed=6), 1.0) < TOLERANCE
        assert largest_difference(served.model, served.generate(seed=7, temperature=0.7), 0.7) < TOLERANCE
    assert [path.name for path in served.server.transfer_dir.iterdir()] == ["lock"]


def test_an_update_waits_for_running_requests(served):
    groups = []
    thread = threading.Thread(
        target=lambda: groups.extend(
            served.generate(prompts=PROMPTS[:8], max_tokens=200, stop_token_ids=[], seed=8)
        )
    )
    old = make_model(served.tied)
    old.load_state_dict(served.model.state_dict())
    running = threading.Event()

    def metrics_say_running():
        """All 8 x 4: a request that comes behind the pause gets the new weights, and rightly."""
        _, text = served.server.request("GET", "/metrics", timeout_s=10.0)
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
        return any(float(line.split()[-1]) == 32 for line in lines)

    thread.start()
    try:
        wait_until(lambda: metrics_say_running() or not thread.is_alive(), 20)
        running.set()
        randomize(served.model, 13)
        served.publisher.update(weights_of(served.model))
    finally:
        thread.join()
    # What was under way was finished with the old weights, all of it.
    assert largest_difference(old, groups, 1.0) < TOLERANCE
    assert largest_difference(served.model, served.generate(seed=8), 1.0) < TOLERANCE


@pytest.mark.parametrize("fault", ["stops in a layer", "lacks a tensor", "wrong shape", "broken file"])
def test_after_a_failed_update_the_next_one_puts_it_right(served, fault, monkeypatch):
    randomize(served.model, 14)
    tensors = dict(weights_of(served.model))
    if fault == "stops in a layer":

        def broken():
            for name, tensor in tensors.items():
                yield name, tensor + 1
                if name.endswith("layers.1.self_attn.k_proj.weight"):
                    raise ZeroDivisionError("in the trainer")

        with pytest.raises(ZeroDivisionError):
            served.publisher.update(broken())
    elif fault == "lacks a tensor":
        with pytest.raises(WeightSyncError, match=r"lacks 1 tensors, among them model\.norm\.weight"):
            served.publisher.update(item for item in tensors.items() if item[0] != "model.norm.weight")
    elif fault == "wrong shape":
        padded = {**tensors, "model.embed_tokens.weight": torch.zeros(VOCAB + 64, 64)}
        with pytest.raises(WeightSyncError, match=r"embed_tokens\.weight of shape \(576, 64\)"):
            served.publisher.update(iter(padded.items()))
    else:
        # The worker itself fails: this is vLLM's own error path.

        def too_little(self, buffer):
            self._path.write_bytes(b"x")

        monkeypatch.setattr(SharedMemoryTransport, "_write", too_little)
        with pytest.raises(WeightSyncError, match=r"/update_weights failed: HTTP 500"):
            served.publisher.update(iter(tensors.items()))
        monkeypatch.undo()

    # Half updated, the server must not generate.
    impatient = RolloutClient(served.server.url, 1.0, 4, server=served.server)
    with pytest.raises(RolloutError, match="took longer than 1 s"):
        impatient.generate(
            PROMPTS[:1], num_samples=1, max_tokens=1, temperature=1.0, seed=0, stop_token_ids=[]
        )
    served.publisher.update(iter(tensors.items()))
    assert largest_difference(served.model, served.generate(seed=9), 1.0) < TOLERANCE


def test_an_engine_killed_in_mid_generation_is_told_within_seconds(tied_and_untied):
    """Runs last of those that use the shared servers: it ends one of them."""
    served = tied_and_untied["untied"]
    others = [pid for pid in group_members(served.server.pid) if pid != served.server.pid]
    engine = next(pid for pid in others if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
    first_group = threading.Event()
    killed_at = []

    def kill():
        assert first_group.wait(30)
        killed_at.append(time.monotonic())
        os.kill(engine, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(RolloutError) as caught:
        served.generate(
            prompts=[[3 + index % 500, 5] for index in range(2000)],
            max_tokens=64,
            stop_token_ids=[],
            on_group=lambda index, samples: first_group.set(),
        )
    assert time.monotonic() - killed_at[0] < 15
    thread.join()
    message = str(caught.value)
    assert "\n" not in message
    assert f"the vLLM server at {served.server.url} died (exit code " in message
    assert str(served.server.options.log_file) in message
    wait_until(lambda: group_members(served.server.pid) == [], 15)
    with pytest.raises(WeightSyncError, match="/pause.* failed: the vLLM server at .* died"):
        served.publisher.update(weights_of(served.model))


def test_a_killed_trainer_leaves_no_vllm_behind(tmp_path):
    make_model(tied=False).save_pretrained(tmp_path / "model")
    script = textwrap.dedent(
        f"""
        import json, os
        from pathlib import Path
        from siren_megatron.rollout.client import RolloutClient, RolloutServer, ServerOptions

        directory = Path({str(tmp_path)!r})
        server = RolloutServer.start(ServerOptions(
            model=directory / "model", log_file=directory / "vllm.log", max_model_len={MAX_MODEL_LEN}))
        server.wait_ready()
        state = dict(group=server.pid, transfer_dir=str(server.transfer_dir))
        client = RolloutClient(server.url, 600.0, 64, server=server)
        # Killed while it generates: on_group says that it does.
        client.generate([[3 + k % 500, 5] for k in range(20000)], num_samples=4, max_tokens=64,
            temperature=1.0, seed=0, stop_token_ids=[],
            on_group=lambda index, samples: print(json.dumps(state), flush=True))
        """
    )
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        state = json.loads(parent.stdout.readline())
        assert len(group_members(state["group"])) >= 3
        assert Path(state["transfer_dir"]).is_dir()
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    wait_until(lambda: group_members(state["group"]) == [], 30)
    assert not Path(state["transfer_dir"]).exists()
