"""Plans: parameter counts of real models, memory by hand, refusals that name what to change, placement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from siren_megatron.architecture import Architecture
from siren_megatron.config import Config, ParallelOptions
from siren_megatron.planning.hardware import GIB, GPUS, find_gpu
from siren_megatron.planning.known_models import KNOWN_MODELS
from siren_megatron.planning.memory_model import (
    active_parameters,
    kv_cache_bytes_per_token,
    logit_bytes,
    parameter_counts,
    state_bytes,
    total_parameters,
)
from siren_megatron.planning.plan import Cluster, Lengths, make_plan
from siren_megatron.planning.published import FIGURES, speed_ratio
from siren_megatron.planning.scale import best_layout
from siren_megatron.planning.time_model import (
    ASSUMPTIONS,
    decode_seconds,
    forward_flops_per_token,
    response_lengths,
)
from siren_megatron.rollout.placement import parse_devices, server_devices

REPOSITORY = Path(__file__).resolve().parents[2]
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
MATH_7B = KNOWN_MODELS["qwen2.5-math-7b"]
H100 = GPUS["h100-80gb"]


def config(**options) -> Config:
    values = {
        "hf_checkpoint": "none",
        "prompt_data": "none",
        "save": "none",
        "bf16": True,
        TP: 4,
        "sequence_parallel": True,
        "rollout_batch_size": 128,
        "max_tokens_per_microbatch": 16384,
        "rollout_devices": "4,5,6,7",
        "rollout_gpu_memory_utilization": 0.85,
        **options,
    }
    return Config.of(**values)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_parameter_counts_are_those_of_transformers(name):
    import transformers

    fields = dict(KNOWN_MODELS[name])
    class_name = fields.pop("architectures")[0].replace("ForCausalLM", "Config")
    real = getattr(transformers, class_name)(**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(real)
    assert total_parameters(Architecture.of(KNOWN_MODELS[name])) == sum(p.numel() for p in model.parameters())


def test_counts_that_are_published():
    counts = {name: total_parameters(Architecture.of(fields)) for name, fields in KNOWN_MODELS.items()}
    assert counts["qwen2.5-7b"] == counts["qwen2.5-math-7b"] == 7_615_616_512
    assert counts["llama-3.1-8b"] == 8_030_261_248
    assert counts["llama-3.1-70b"] == 70_553_706_496
    assert counts["llama-3.1-405b"] == 405_853_388_800
    experts = Architecture.of(KNOWN_MODELS["qwen3-30b-a3b"])
    assert 3.3e9 < active_parameters(experts) < 3.4e9


@pytest.mark.parametrize("tp, pp", [(1, 1), (4, 1), (2, 4), (1, 7)])
def test_shards_add_up_to_the_whole(tp, pp):
    architecture = Architecture.of(MATH_7B)
    parallel = ParallelOptions(**{TP: tp, PP: pp})
    whole = sum(parameter_counts(architecture, parallel, stage).dense * tp for stage in range(pp))
    replicated = (tp - 1) * (2 * architecture.layers + 1) * architecture.hidden  # norms, on every rank
    padding = 2 * (architecture.padded_vocab(tp) - architecture.vocab) * architecture.hidden
    assert whole == total_parameters(architecture) + replicated + padding


def test_states_of_7b_by_hand():
    """bf16, TP=4, DP=2: 2 + 4 + 12/2 bytes a parameter of a quarter of the model."""
    parallel = ParallelOptions(**{TP: 4})
    parts = state_bytes(Architecture.of(MATH_7B), parallel, stage=0, world_size=8, bf16=True)
    quarter = 7_615_616_512 / 4
    assert parts == pytest.approx((2 * quarter, 4 * quarter, 6 * quarter), rel=1e-4)


def test_kv_cache_of_7b_by_hand():
    """28 layers x (key, value) x 4 heads x 128 x 2 bytes."""
    assert kv_cache_bytes_per_token(Architecture.of(MATH_7B), bf16=True) == 57_344


def test_the_default_plan_fits_and_says_everything():
    plan = make_plan(config(), MATH_7B, Cluster(1, 8, H100), Lengths(200, 1000))
    text = plan.text()
    assert plan.refusals == [] and plan.world_size == 4
    for part in (
        "7,615,616,512 parameters",
        "GPUs 0-3: trainer ranks 0-3",
        "GPUs 4-7: the vLLM server, tensor-parallel 4",
        "1,024 responses, 16 optimizer step(s) of 64, at most 4,194,304 tokens; about 1,228,800",
        "it fits",
    ):
        assert part in text, text
    for _, memory in plan.memory:
        assert memory.total < H100.memory_gib * GIB


def test_servers_of_one_node_and_ranks_of_several():
    plan = make_plan(config(), MATH_7B, Cluster(3, 8, H100))
    assert plan.world_size == 4 + 8 + 8
    assert plan.placement[-2:] == [
        "node 1: GPUs 0-7: trainer ranks 4-11",
        "node 2: GPUs 0-7: trainer ranks 12-19",
    ]


def test_servers_on_every_node():
    options = {"rollout_nodes": "all", "rollout_tensor_parallel_size": 2}
    plan = make_plan(config(**options), MATH_7B, Cluster(2, 8, H100))
    assert plan.world_size == 8 and plan.refusals == []
    assert plan.placement == [
        "node 0: GPUs 0-3: trainer ranks 0-3; torchrun's store",
        "node 0: GPUs 4-7: 2 vLLM servers, tensor-parallel 2 each, for themselves",
        "node 0: CPU: prompts, rewards, metrics (rank 0)",
        "node 1: GPUs 0-3: trainer ranks 4-7",
        "node 1: GPUs 4-7: 2 vLLM servers, tensor-parallel 2 each, for themselves",
    ]
    one = make_plan(config(), MATH_7B, Cluster(2, 8, H100))
    assert plan.time.rollout < 0.6 * one.time.rollout, "four servers share the responses"
    ahead = config(**options, rollout_async_steps=1, rollout_correction="token-truncate")
    overlapped = make_plan(ahead, MATH_7B, Cluster(2, 8, H100)).time
    saved = plan.time.total - overlapped.total
    assert saved == pytest.approx(min(plan.time.rollout, plan.time.logprob + plan.time.train))
    on_cpus = config(rollout_devices=None, bf16=False, rollout_nodes="all", rollout_num_servers=2, **{TP: 2})
    text = make_plan(on_cpus, MATH_7B, Cluster(2, 0, None, ranks_per_node=1)).text()
    assert "node 1: CPU: 2 vLLM servers, shared with rank 1" in text


@pytest.mark.parametrize(
    "options, gpu, change",
    [
        ({"max_tokens_per_microbatch": 65536}, "h100-80gb", "lower --max-tokens-per-microbatch 65536"),
        ({}, "a100-40gb", "raise --tensor-model-parallel-size 4"),
        (
            {"rollout_devices": None, "rollout_gpu_memory_utilization": 0.9},
            "h100-80gb",
            "lower --rollout-gpu-memory-utilization to 0.",
        ),
        ({"rollout_gpu_memory_utilization": 0.05}, "h100-80gb", "raise ROLLOUT_GPUS"),
        (
            {"rollout_devices": "5,6,7"},
            "h100-80gb",
            "GPUs, 3, does not divide the model's num_attention_heads",
        ),
    ],
)
def test_a_plan_that_does_not_fit_names_what_to_change(options, gpu, change):
    tp = {TP: 1, "sequence_parallel": False} if options.get("rollout_devices") == "5,6,7" else {}
    plan = make_plan(config(**options, **tp), MATH_7B, Cluster(1, 8, find_gpu(gpu)))
    assert any(change in reason for reason in plan.refusals), plan.refusals


def test_the_advice_leads_to_a_plan_that_fits():
    """What a refusal proposes, followed until nothing is refused: fewer tokens in a micro-batch."""
    tokens = 131072
    while make_plan(config(max_tokens_per_microbatch=tokens), MATH_7B, Cluster(1, 8, H100)).refusals:
        tokens //= 2
    assert 4096 <= tokens < 65536
    recomputed = config(max_tokens_per_microbatch=65536, recompute_granularity="full")
    assert make_plan(recomputed, MATH_7B, Cluster(1, 8, H100)).refusals == []


@pytest.mark.parametrize(
    "options, cluster, message",
    [
        ({"rollout_devices": "8,9"}, (1, 8), "a node of the run has 8 GPU"),
        ({"rollout_devices": "0,1,2,3,4,5,6,7"}, (1, 8), "leaves no GPU"),
        ({"rollout_devices": "0,1,2,3"}, (1, 8), "has to be the last GPUs"),
        ({TP: 3}, (1, 8), "--tensor-model-parallel-size 3 does not divide"),
        ({}, (0, 8), "--nodes must be at least 1"),
        ({"lr": -1.0}, (1, 8), "--lr must be greater than 0"),
    ],
)
def test_contradictions_are_refused(options, cluster, message):
    with pytest.raises(ValueError, match=message):
        make_plan(config(**options), MATH_7B, Cluster(*cluster, H100))


def test_a_vllm_that_sleeps_leaves_its_memory_to_the_activations():
    shared = dict(rollout_devices=None, rollout_gpu_memory_utilization=0.6)
    awake = dict(make_plan(config(**shared), MATH_7B, Cluster(1, 8, H100)).memory)["rank 0 with vLLM"]
    rows = dict(make_plan(config(**shared, rollout_sleep=2), MATH_7B, Cluster(1, 8, H100)).memory)
    generating, training = rows["rank 0, vLLM awake"], rows["rank 0, vLLM asleep"]
    assert generating.vllm == awake.vllm > 10 * training.vllm
    assert (generating.activations, training.activations) == (0, awake.activations)
    assert max(generating.total, training.total) < awake.total - 3 * 2**30


def test_cpus_have_a_placement_and_no_memory():
    plan = make_plan(
        config(rollout_devices=None, bf16=False, **{TP: 2}), MATH_7B, Cluster(2, 0, None, ranks_per_node=1)
    )
    assert plan.world_size == 2 and plan.memory == [] and plan.time is None
    assert "node 1: CPU: trainer rank 1" in plan.text()


@pytest.mark.parametrize("mean, limit", [(1000, 3072), (2500, 3072), (50, 3072), (3072, 3072)])
def test_response_lengths_have_their_mean_and_limit(mean, limit):
    lengths = response_lengths(512, mean, limit, 0.6)
    assert sum(lengths) / 512 == pytest.approx(mean, rel=0.02)
    assert max(lengths) <= limit and lengths == sorted(lengths)


def test_decoding_is_bound_by_memory_and_grows_with_the_longest():
    """One sequence of 8B at bf16: each token reads 16 GB; at 70% of 3.35 TB/s and 4 ms more, by hand."""
    architecture = Architecture.of(KNOWN_MODELS["llama-3.1-8b"])
    options = {"prompt_length": 0, "server_gpus": 1, "kv_cache_tokens": 1e6}
    seconds = decode_seconds(architecture, H100, [100], **options)
    token = 2 * 8_030_261_248 / (3.35e12 * 0.7) + 0.004 + 131072 * 50 / (3.35e12 * 0.7)
    assert seconds == pytest.approx(100 * token, rel=0.01)
    even = decode_seconds(architecture, H100, [500] * 128, **options)
    uneven = decode_seconds(architecture, H100, [375] * 127 + [16375], **options)
    assert uneven > 5 * even, "the same tokens; everything waits for one long response"
    crowded = decode_seconds(architecture, H100, [500] * 128, **{**options, "kv_cache_tokens": 500 * 16})
    assert crowded > 3 * even, "a small cache lets few sequences run at a time"


def test_flops_are_six_a_parameter_and_token():
    architecture = Architecture.of(KNOWN_MODELS["llama-3.1-70b"])
    flops = 3 * forward_flops_per_token(architecture, 0)
    assert flops == pytest.approx(6 * (70_553_706_496 - 128256 * 8192))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.system}, {f.model}, {f.value:g}")
def test_estimates_beside_published_figures(figure, record_property):
    """Pre-training within a third; whole RL steps are estimated too fast, dense ones less than mixtures."""
    ratio = speed_ratio(figure)
    record_property("estimated speed / published", round(ratio, 2))
    print(f"{figure.system}, {figure.model}: estimated speed / published = {ratio:.2f}")
    assert figure.source.startswith("https://")
    assert 0.75 < ratio < (2.5 if figure.unit == "seconds a step" else 1.33)


def test_other_assumptions_change_the_estimate():
    arguments = (config(), MATH_7B, Cluster(1, 8, H100), Lengths(200, 1000))
    usual = make_plan(*arguments).time
    slower = make_plan(*arguments, ASSUMPTIONS.changed(["matrix_efficiency=0.3"])).time
    assert slower.train > 1.5 * usual.train and slower.weight_sync == usual.weight_sync
    even = make_plan(*arguments, ASSUMPTIONS.changed(["length_spread=0", "overlap=0"])).time
    assert even.rollout < usual.rollout, "no response is longer than the mean"


def test_larger_models_need_more_gpus():
    assert best_layout("llama-3.1-405b", 32, H100) is None
    row = best_layout("llama-3.1-405b", 512, H100)
    assert row.parallel.tensor_model_parallel_size == 8 and row.parallel.pipeline_model_parallel_size > 1
    small, large = best_layout("qwen2.5-7b", 8, H100), best_layout("qwen2.5-7b", 32, H100)
    assert small.tokens_per_second < large.tokens_per_second < 4 * small.tokens_per_second


def test_devices_of_the_servers():
    assert parse_devices("4,5, 6,7") == (4, 5, 6, 7)
    for text, message in (("4,4", "twice"), ("a", "no list"), ("", "no list"), ("-1", "no list")):
        with pytest.raises(ValueError, match=message):
            parse_devices(text)
    two_ranks = {"LOCAL_WORLD_SIZE": "2"}
    by_slurm = {**two_ranks, "CUDA_VISIBLE_DEVICES": "0,1,6,7"}
    (chosen,) = server_devices("2,3", by_slurm, gpus=4)
    assert chosen == {"extra_env": {"CUDA_VISIBLE_DEVICES": "6,7"}, "tensor_parallel_size": 2}, "SLURM's own"
    assert server_devices("2,3", by_slurm, gpus=4, tensor_parallel=1) == [
        {"extra_env": {"CUDA_VISIBLE_DEVICES": name}, "tensor_parallel_size": 1} for name in "67"
    ]
    assert server_devices("3", two_ranks, gpus=4)[0]["extra_env"] == {"CUDA_VISIBLE_DEVICES": "3"}
    assert server_devices(None, two_ranks, gpus=4) == [{}]
    assert server_devices(None, two_ranks, gpus=0, servers=3) == [{}, {}, {}]
    with pytest.raises(ValueError, match="--rollout-num-servers 2 is for CPUs"):
        server_devices(None, two_ranks, gpus=4, servers=2)
    with pytest.raises(ValueError, match="there is no GPU 4"):
        server_devices("4", two_ranks, gpus=4)
    with pytest.raises(ValueError, match="GPU 1 is that of a trainer rank"):
        server_devices("1", two_ranks, gpus=4)


def plan_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = REPOSITORY / "tools" / "plan.py"
    return subprocess.run([sys.executable, tool, *arguments], capture_output=True, text=True, timeout=60)


def test_the_tool_reads_a_checkpoint_and_needs_no_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MATH_7B))
    (tmp_path / "model.safetensors").touch()
    options = ["--bf16", f"--{TP.replace('_', '-')}", "4", "--hf-checkpoint", str(tmp_path)]
    done = plan_tool("--rollout-gpus", "4", "--", *options, "--max-tokens-per-microbatch", "16384")
    assert done.returncode == 0 and "it fits" in done.stdout, done.stderr
    command = "import sys; sys.modules['torch'] = None; sys.path.insert(0, '.'); import tools.plan"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=REPOSITORY, timeout=60)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "gpt-5"], "--model gpt-5 is unknown"),
        (["--gpu", "tpu"], "--gpu tpu is unknown"),
        (["--assume", "speed=2"], "--assume speed: unknown"),
        (["--assume", "overlap=two"], "'two' is no number"),
        (["--assume", "matrix_efficiency=0"], "has to be a positive number"),
        (["--assume", "matrix_efficiency=1.1"], "a share is at most 1"),
        (["--model", "qwen2.5-7b", "--", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["--", "--hf-checkpoint", "/nowhere"], "--hf-checkpoint /nowhere is not a directory"),
    ],
)
def test_the_tool_refuses_in_one_line(arguments, message):
    done = plan_tool(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_logits_are_kept_while_they_are_small_beside_the_states():
    """--fused-linear auto: a chunk alone where the logits would take over a quarter of the states."""
    architecture = Architecture.of(MATH_7B)
    parallel = ParallelOptions(tensor_model_parallel_size=4)
    states = sum(state_bytes(architecture, parallel, stage=0, world_size=4, bf16=True))
    row = architecture.padded_vocab(4) // 4 * 2

    def needed(logits, option="auto"):
        return logit_bytes(
            architecture, parallel, tokens=int(logits / row), bf16=True, states=states, fused_linear=option
        )

    chunk = 64 * 2**20
    assert needed(0.2 * states) == pytest.approx(0.2 * states + chunk, rel=1e-3)
    assert needed(0.3 * states) == chunk
    assert needed(0.2 * states, "on") == chunk
    assert needed(0.3 * states, "off") == pytest.approx(0.3 * states + chunk, rel=1e-3)
