"""Train the same rollouts in any parallel layout, and once in plain float64 with transformers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from siren_megatron.batch import Sample, make_batch
from siren_megatron.config import Config, read_hf_config
from tests.distributed.launch import run_ranks

GROUP_SIZE = 4
RESPONSES = 16
MAX_RESPONSE = 16
ANCHOR = 3.6  # nats; off the policy's own entropy, so that the penalty has a gradient


@dataclass(frozen=True)
class Layout:
    """A parallel layout by its options, e.g. {"tensor_model_parallel_size": 2}."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def fixed_samples(num_responses: int = RESPONSES, vocab_size: int = 500) -> tuple[list[Sample], torch.Tensor]:
    """Prompts and responses of many lengths (one of a single token), and rewards; the same every time."""
    generator = torch.Generator().manual_seed(7)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    samples = []
    for index in range(num_responses):
        prompt, length = (
            draw(0, vocab_size, draw(2, 9, 1)[0]),
            1 if index == 3 else draw(2, MAX_RESPONSE, 1)[0],
        )
        samples.append(Sample(tuple(prompt), tuple(draw(0, vocab_size, length)), (-6.0,) * length, "stop"))
    return samples, torch.rand(num_responses, generator=generator).round(decimals=1)


def config_of(checkpoint: Path, **options: Any) -> Config:
    values = {
        "hf_checkpoint": checkpoint,
        "prompt_data": Path("unused"),
        "save": Path("unused"),
        "rollout_num_samples": GROUP_SIZE,
        "rollout_max_response_length": MAX_RESPONSE,
        "global_batch_size": RESPONSES,
        "micro_batch_size": 4,
        "lr": 2e-4,
        "lr_warmup_steps": 2,
        "entropy_coeff": 0.2,
        "clip_grad": 0.5,
        **options,
    }
    return Config.of(**values)


def train(
    checkpoint: Path, updates: int, layout: Layout
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """`updates` updates on the fixed rollouts; metrics of each, and the final weights (rank 0) by HF name."""
    from megatron.core import parallel_state

    from siren_megatron import platform
    from siren_megatron.advantages import group_advantages
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer

    device = platform.install()
    config = config_of(checkpoint, **layout.options)
    initialize_model_parallel(config)
    trainer = Trainer(config, read_hf_config(checkpoint), device)
    samples, rewards = fixed_samples()
    advantages = group_advantages(rewards, GROUP_SIZE)
    batch = make_batch(samples, rewards, advantages, multiple=trainer.length_multiple)
    batch = trainer.compute_logprobs(batch.to(device.device))
    history = []
    for _ in range(updates):
        history.append(trainer.update(batch, ANCHOR))
        # The penalty's factor follows the policy, the ratios keep the first policy as their base.
        now = trainer.compute_logprobs(batch)
        batch = batch.replace(top_p_entropy=now.top_p_entropy)
    weights = {name: tensor.cpu().clone() for name, tensor in trainer.hf_weights()}
    parallel_state.destroy_model_parallel()
    return history, weights


def train_layouts(rank: int, world_size: int, checkpoint: Path, updates: int, layouts: list[Layout]):
    """For `run_ranks`: the layouts one after the other in the same processes."""
    return [train(checkpoint, updates, layout) for layout in layouts]


def compare_layouts(
    checkpoint: Path,
    layouts_by_ranks: dict[int, list[Layout]],
    updates: int,
    *,
    backend: str = "gloo",
    tolerance: float = 1e-4,
) -> None:
    """Train in every layout and hold losses, gradient norms and weights to the float64 reference.

    Args:
        layouts_by_ranks: number of ranks -> layouts.
        tolerance: largest relative difference.
    """
    expected, expected_weights = reference(checkpoint, updates)
    print(f"\n{'layout':34}{'loss':>12}{'grad norm':>12}{'weights':>12}   (largest relative difference)")
    for world_size, layouts in layouts_by_ranks.items():
        results = run_ranks(
            train_layouts, world_size, checkpoint, updates, layouts, timeout=300, backend=backend
        )
        for layout, (history, weights), other in zip(layouts, results[0], results[-1], strict=True):
            assert other[0] == history, f"{layout.name}: ranks disagree on the metrics"
            worst = {
                name: max(
                    abs(got[name] - want[name]) / (abs(want[name]) + 1e-3 * (name == "loss/policy"))
                    for got, want in zip(history, expected, strict=True)
                )
                for name in expected[0]
            }
            # AdamW divides by |gradient|: where a gradient is nearly 0 its rounding decides the direction.
            drift = max(
                float((weights[name].double() - want).norm() / want.norm())
                for name, want in expected_weights.items()
            )
            print(f"{layout.name:34}{worst['loss/policy']:12.1e}{worst['grad_norm']:12.1e}{drift:12.1e}")
            assert weights.keys() == expected_weights.keys()
            assert max(worst.values()) < tolerance, f"{layout.name}: {worst}"
            assert drift < tolerance, layout.name


def plain_top_p_entropy(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Top-p entropy by sorting, [..., V] -> [...]."""
    order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = order.values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep = before < top_p
    kept = order.values.masked_fill(~keep, float("-inf")).log_softmax(-1)
    return -(kept.exp() * kept.masked_fill(~keep, 0.0)).sum(-1)


def reference(checkpoint: Path, updates: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The same updates in float64 with transformers, torch's AdamW and formulas written out, one process."""
    from transformers import AutoModelForCausalLM

    config = config_of(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    norms = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.train.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        eps=config.train.adam_eps,
    )
    samples, rewards = fixed_samples()
    rewards = rewards.double()
    old, history = None, []
    for update in range(updates):
        logprobs, entropies = [], []
        for sample in samples:
            ids = torch.tensor([sample.prompt_ids + sample.response_ids])
            logits = model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1]
            labels = torch.tensor(sample.response_ids)
            logprobs.append(logits.log_softmax(-1).gather(1, labels[:, None])[:, 0])
            entropies.append(plain_top_p_entropy(logits, config.entropy.entropy_top_p))
        if old is None:
            old = [lp.detach() for lp in logprobs]
        masked = []
        for entropy in entropies:
            peak = entropy > torch.quantile(entropy.detach(), config.entropy.siren_peak_quantile)
            masked.append(entropy[peak].mean() if peak.any() else entropy.sum() * 0)
        step_entropy = torch.stack(masked).mean()
        policy = torch.zeros((), dtype=torch.float64)
        for i, logprob in enumerate(logprobs):
            group = rewards[i // GROUP_SIZE * GROUP_SIZE :][:GROUP_SIZE]
            advantage = rewards[i] - group.mean()
            ratio = (logprob - old[i]).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            if advantage < 0:
                surrogate = torch.maximum(surrogate, 3.0 * advantage)
            policy = policy - surrogate.sum() / (MAX_RESPONSE * RESPONSES)
        penalty = config.entropy.entropy_coeff * (step_entropy - ANCHOR) ** 2
        optimizer.zero_grad()
        (policy + penalty).backward()
        for group in optimizer.param_groups:
            group["lr"] = config.train.lr * min((update + 1) / config.train.lr_warmup_steps, 1.0)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_grad)
        optimizer.step()
        history.append(
            {
                "loss/policy": float(policy.detach()),
                "siren/loss": float(penalty.detach()),
                "siren/entropy_masked": float(step_entropy.detach()),
                "grad_norm": float(norm),
                "lr": optimizer.param_groups[0]["lr"],
            }
        )
    # Saved and read again: in memory transformers fuses tensors that its checkpoints keep apart.
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        weights = load_file(Path(directory) / "model.safetensors")
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return history, weights
