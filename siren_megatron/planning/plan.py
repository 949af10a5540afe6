"""The plan of a run before it starts: where every process goes, what fits on each GPU, how long a step takes.

Standard library only, so that a login node without torch can make one. `tools/plan.py` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from siren_megatron.architecture import Architecture
from siren_megatron.config import Config, check_plan
from siren_megatron.planning.hardware import GIB, Gpu
from siren_megatron.planning.memory_model import (
    Memory,
    activation_bytes,
    kv_cache_bytes_per_token,
    logit_bytes,
    state_bytes,
    total_parameters,
)
from siren_megatron.planning.time_model import ASSUMPTIONS, Assumptions, StepTime, Workload, step_time
from siren_megatron.rollout.placement import parse_devices, split_devices

RESERVE_GIB = 4.0
"""Left free on each GPU: the CUDA context, NCCL's buffers, the allocator's holes, passing copies."""
VLLM_OVERHEAD_GIB = 3.0
"""vLLM's own activations and CUDA graphs, out of its share."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a run.

    Args:
        gpu: None where ranks run on CPUs.
        gpus_per_node: GPUs of a node that the run uses, those of its servers included; 0 on CPUs.
        ranks_per_node: trainer ranks of a node on CPUs.
    """

    nodes: int
    gpus_per_node: int
    gpu: Gpu | None
    ranks_per_node: int = 1

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"--nodes must be at least 1, got {self.nodes}")
        if self.gpus_per_node < 0:
            raise ValueError(f"--gpus-per-node must be at least 0 (CPUs), got {self.gpus_per_node}")
        if self.ranks_per_node < 1:
            raise ValueError(f"--ranks-per-node must be at least 1, got {self.ranks_per_node}")


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a response, for the estimate of time; None = guessed from the limits."""

    prompt: float | None = None
    response: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a run would be.

    Attributes:
        placement: a line for each group of processes.
        memory: (who, bytes on one GPU); empty on CPUs.
        kv_cache_tokens: tokens that a server's cache holds.
        refusals: why it cannot run, each naming what to change; empty when it fits.
        time: estimate; None on CPUs.
    """

    config: Config
    architecture: Architecture
    cluster: Cluster
    work: Workload
    world_size: int
    placement: list[str]
    memory: list[tuple[str, Memory]]
    kv_cache_tokens: float
    refusals: list[str]
    time: StepTime | None

    def text(self) -> str:
        """The whole plan, ready to print."""
        return "\n".join([*self._head(), *self._memory_lines(), *self._work_lines(), *self._verdict()])

    def _head(self) -> list[str]:
        cluster, parallel = self.cluster, self.config.parallel
        machine = f"{cluster.gpus_per_node} x {cluster.gpu.name}" if cluster.gpu else "CPUs (gloo)"
        data = self.world_size // self.config.model_parallel_size
        layout = (
            f"TP={parallel.tensor_model_parallel_size} PP={parallel.pipeline_model_parallel_size} "
            f"CP={parallel.context_parallel_size} EP={parallel.expert_model_parallel_size} DP={data}"
        )
        number = total_parameters(self.architecture)
        return [
            f"model      {self.architecture.name}, {number:,} parameters",
            f"machines   {cluster.nodes} node(s) of {machine}; {self.world_size} trainer rank(s), {layout}",
            "placement",
            *(f"  {line}" for line in self.placement),
        ]

    def _memory_lines(self) -> list[str]:
        if not self.memory:
            return ["memory     not planned on CPUs"]
        names = ("parameters", "gradients", "optimizer", "activations", "logits", "vllm", "reserve", "total")
        rows = [f"{'memory, GiB a GPU':28}" + "".join(f"{name:>12}" for name in names)]
        for who, memory in self.memory:
            rows.append(f"  {who:26}" + "".join(f"{getattr(memory, n) / GIB:12.1f}" for n in names))
        limit, cache = self.config.train.seq_length, self.kv_cache_tokens
        rows.append(
            f"  each GPU has {self.cluster.gpu.memory_gib:.1f} GiB; KV cache of a server: {cache:,.0f} "
            f"tokens, {cache / limit:,.0f} sequences of --seq-length {limit:,}"
        )
        return rows

    def _work_lines(self) -> list[str]:
        work, train = self.work, self.config.train
        most = work.responses * train.seq_length
        lines = [
            f"a step     {work.responses:,} responses, {work.optimizer_steps} optimizer step(s) of "
            f"{train.global_batch_size}, at most {most:,} tokens; about {work.tokens:,.0f} at "
            f"{work.prompt_length:.0f} + {work.response_length:.0f} tokens a response"
        ]
        if self.time is not None:
            t = self.time
            share = work.tokens / t.total
            lines += [
                f"estimate   {t.total:,.0f} s a step: rollout {t.rollout:,.0f}, log-probs {t.logprob:,.0f}, "
                f"update {t.train:,.0f}, weights {t.weight_sync:,.0f}, other {t.other:,.0f}; "
                f"{share:,.0f} tokens a second",
                "           (an estimate; docs/slurm.md compares it with published runs)",
            ]
        return lines

    def _verdict(self) -> list[str]:
        if not self.refusals:
            return ["verdict    it fits"]
        return [f"refused    {reason}" for reason in self.refusals]


def make_plan(
    config: Config,
    hf_config: dict[str, Any],
    cluster: Cluster,
    lengths: Lengths | None = None,
    assumptions: Assumptions = ASSUMPTIONS,
) -> Plan:
    """Plan a run.

    Args:
        config: its options; the servers' GPUs are `--rollout-devices`.
        hf_config: the model's config.json.

    Raises:
        ValueError: options that contradict each other or the machines, one line that names the option.
    """
    rollout = config.rollout
    text = rollout.rollout_devices
    devices = parse_devices(text) if text is not None else ()
    if devices and (max(devices) >= cluster.gpus_per_node or cluster.gpu is None):
        raise ValueError(
            f"--rollout-devices {text}: a node of the run has {cluster.gpus_per_node} GPU(s); lower "
            "ROLLOUT_GPUS or raise GPUS_PER_NODE"
        )
    first = cluster.gpus_per_node - len(devices) if cluster.gpu else cluster.ranks_per_node
    if first < 1:
        raise ValueError(
            f"--rollout-devices {text} leaves no GPU of a node to the trainer: lower ROLLOUT_GPUS"
        )
    if devices and sorted(devices) != list(range(first, cluster.gpus_per_node)):
        raise ValueError(f"--rollout-devices {text} has to be the last GPUs of the node, {first} and up")
    hosts = cluster.nodes if rollout.rollout_nodes == "all" else 1
    whole = cluster.gpus_per_node if cluster.gpu else cluster.ranks_per_node
    ranks = [first if node < hosts else whole for node in range(cluster.nodes)]
    world_size = sum(ranks)
    check_plan(config, hf_config, world_size)
    # Of each host; a server that shares a GPU has none of its own.
    servers = split_devices(text, rollout.rollout_tensor_parallel_size) or [()] * rollout.rollout_num_servers
    server_gpus = max(1, len(servers[0]))
    architecture = Architecture.of(hf_config)
    work = _workload(config, world_size, lengths or Lengths())
    memory, kv_tokens = [], 0.0
    refusals = _placement_refusals(config, architecture, cluster, ranks[0], len(servers[0]))
    time = None
    if cluster.gpu is not None:
        memory, kv_tokens, more = _memory(config, architecture, cluster, work, world_size, len(servers[0]))
        refusals += more
        if kv_tokens > 0:
            time = step_time(
                architecture,
                config.parallel,
                cluster.gpu,
                work,
                world_size=world_size,
                gpus_per_node=cluster.gpus_per_node,
                servers=hosts * len(servers),
                server_gpus=server_gpus,
                kv_cache_tokens=kv_tokens,
                overlaps=rollout.rollout_async_steps > 0,
                assumptions=assumptions,
            )
    return Plan(
        config,
        architecture,
        cluster,
        work,
        world_size,
        _placement(config, cluster, ranks, hosts, servers),
        memory,
        kv_tokens,
        refusals,
        time,
    )


def _workload(config: Config, world_size: int, lengths: Lengths) -> Workload:
    train, rollout = config.train, config.rollout
    responses = rollout.rollout_batch_size * rollout.rollout_num_samples
    limit = rollout.rollout_max_response_length
    prompt = lengths.prompt if lengths.prompt is not None else (train.seq_length - limit) / 4
    response = lengths.response if lengths.response is not None else limit / 2
    share = train.global_batch_size / (world_size // config.model_parallel_size)
    if train.max_tokens_per_microbatch:
        micro_batches = -(-share * (prompt + response) // train.max_tokens_per_microbatch)
    else:
        micro_batches = share // train.micro_batch_size
    return Workload(
        responses=responses,
        prompt_length=prompt,
        response_length=response,
        max_response_length=limit,
        optimizer_steps=responses // train.global_batch_size * config.grpo.grpo_epochs,
        micro_batches=max(1, int(micro_batches)),
        logprob_passes=2 if config.grpo.grpo_kl_coeff else 1,
    )


def _placement(
    config: Config, cluster: Cluster, ranks: list[int], hosts: int, servers: list[tuple[int, ...]]
) -> list[str]:
    """Lines for each node of which there are few, or few different ones.

    Args:
        ranks: trainer ranks of each node.
        hosts: nodes with servers, the first ones.
        servers: GPUs of each server of a host.
    """

    def gpus(start: int, count: int) -> str:
        if cluster.gpu is None:
            return "CPU"
        return f"GPU {start}" if count == 1 else f"GPUs {start}-{start + count - 1}"

    own = sum(len(server) for server in servers)
    if len(servers) == 1:
        what = "the vLLM server" if hosts == 1 else "a vLLM server"
        size, alone = f", tensor-parallel {own}, ", "for itself"
    else:
        what = f"{len(servers)} vLLM servers"
        size, alone = f", tensor-parallel {len(servers[0])} each, ", "for themselves"
    sleeps = "asleep while it trains" if config.rollout.rollout_sleep else "both stay in memory"
    lines, start = [], 0
    for node, count in enumerate(ranks):
        if node in (0, 1, 2, cluster.nodes - 1):
            named = f"rank {start}" if count == 1 else f"ranks {start}-{start + count - 1}"
            store = "; torchrun's store" if node == 0 else ""
            lines.append(f"node {node}: {gpus(0, count)}: trainer {named}{store}")
            if node < hosts and own:
                lines.append(f"node {node}: {gpus(count, own)}: {what}{size}{alone}")
            elif node < hosts:
                lines.append(f"node {node}: {gpus(0, 1)}: {what}, shared with rank {start} ({sleeps})")
            if node == 0:
                lines.append("node 0: CPU: prompts, rewards, metrics (rank 0)")
        elif node == 3:
            lines.append("...")
        start += count
    return lines


def _placement_refusals(
    config: Config, architecture: Architecture, cluster: Cluster, first: int, server_gpus: int
) -> list[str]:
    reasons = []
    tp = config.parallel.tensor_model_parallel_size
    if cluster.gpu is not None and cluster.nodes > 1 and first % tp:
        reasons.append(
            f"the first node has {first} trainer rank(s), no multiple of --tensor-model-parallel-size {tp}: "
            f"a tensor-parallel group would span nodes; choose ROLLOUT_GPUS so that {tp} divides the rest"
        )
    if server_gpus and architecture.heads % server_gpus:
        reasons.append(
            f"the number of a vLLM server's GPUs, {server_gpus}, does not divide the model's "
            f"num_attention_heads {architecture.heads}: choose another ROLLOUT_GPUS or ROLLOUT_TP"
        )
    return reasons


def _memory(
    config: Config,
    architecture: Architecture,
    cluster: Cluster,
    work: Workload,
    world_size: int,
    server_gpus: int,
) -> tuple[list[tuple[str, Memory]], float, list[str]]:
    bf16, parallel, train = config.model.bf16, config.parallel, config.train
    tokens = train.max_tokens_per_microbatch or train.micro_batch_size * train.seq_length
    stages = parallel.pipeline_model_parallel_size
    capacity = cluster.gpu.memory_gib * GIB
    rows, refusals = [], []
    for stage in range(stages):
        states = state_bytes(architecture, parallel, stage=stage, world_size=world_size, bf16=bf16)
        memory = Memory(
            *states,
            activations=activation_bytes(
                architecture,
                parallel,
                stage=stage,
                tokens=tokens,
                micro_batches=work.micro_batches,
                bf16=bf16,
                packed=bool(train.max_tokens_per_microbatch),
            ),
            logits=logit_bytes(
                architecture,
                parallel,
                tokens=tokens,
                bf16=bf16,
                states=sum(states),
                fused_linear=train.fused_linear,
                chunk_mb=config.entropy.entropy_chunk_mb,
            )
            if stage == stages - 1
            else 0,
            reserve=RESERVE_GIB * GIB,
        )
        rows.append((f"trainer, stage {stage}" if stages > 1 else "trainer", memory))
    share = config.rollout.rollout_gpu_memory_utilization * capacity
    server = Memory(0, 0, 0, 0, 0, vllm=share)
    first = rows[0][1]
    if server_gpus:
        rows.append((f"vLLM ({server_gpus} GPU{'s' if server_gpus > 1 else ''})", server))
    elif config.rollout.rollout_sleep:
        rows.append(("rank 0, vLLM asleep", replace(first, vllm=VLLM_OVERHEAD_GIB * GIB)))
        rows.append(("rank 0, vLLM awake", replace(first, activations=0, logits=0, vllm=share)))
    else:
        rows.append(("rank 0 with vLLM", replace(first, vllm=share)))
    for who, memory in rows:
        if memory.total > capacity:
            refusals.append(_too_much(who, memory, capacity, config))
    count = max(1, server_gpus)
    weights = total_parameters(architecture) * (2 if bf16 else 4) / count
    room = (share - weights - VLLM_OVERHEAD_GIB * GIB) * count
    kv_tokens = max(0.0, room / kv_cache_bytes_per_token(architecture, bf16=bf16))
    if kv_tokens < train.seq_length:
        refusals.append(
            f"vLLM has {share / GIB:.1f} GiB on each of {count} GPU(s), {weights / GIB:.1f} of them "
            f"weights: no room for the keys and values of one sequence of {train.seq_length} tokens; "
            "raise ROLLOUT_GPUS" + ("" if server_gpus else " or --rollout-gpu-memory-utilization")
        )
    return rows, kv_tokens, refusals


def _too_much(who: str, memory: Memory, capacity: float, config: Config) -> str:
    """Which number to change, by what takes most."""
    over = (memory.total - capacity) / GIB
    head = f"{who}: {memory.total / GIB:.1f} GiB of {capacity / GIB:.1f}, {over:.1f} too much; "
    states = memory.parameters + memory.gradients + memory.optimizer
    passing = memory.activations + memory.logits
    train = config.train
    if memory.vllm and memory.total - memory.vllm <= capacity:
        left = max(0.0, (capacity - memory.total + memory.vllm) / capacity)
        return (
            head
            + f"lower --rollout-gpu-memory-utilization to {left:.2f} or less, or give vLLM GPUs of its own "
            "(ROLLOUT_GPUS)"
        )
    if passing >= (memory.total - memory.vllm - states - memory.reserve) and passing > states:
        tokens = train.max_tokens_per_microbatch
        option = (
            f"--max-tokens-per-microbatch {tokens}"
            if tokens
            else f"--micro-batch-size {train.micro_batch_size}"
        )
        advice = f"lower {option}"
        if config.parallel.recompute_granularity != "full":
            advice += ", or set --recompute-granularity full"
        return head + advice
    return (
        head + f"most of it is the model's states: raise --tensor-model-parallel-size "
        f"{config.parallel.tensor_model_parallel_size} or --pipeline-model-parallel-size "
        f"{config.parallel.pipeline_model_parallel_size}, or NODES (more ranks share the optimizer's)"
    )
