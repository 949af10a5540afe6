"""Rewards -> advantages of responses, as pure functions.

Legend: N = responses of a rollout, those of a prompt side by side, G = responses of a prompt, S = positions.
Every rank holds all N: nothing here depends on the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siren_megatron.batch import TrainBatch
from siren_megatron.divergence import response_kl
from siren_megatron.method_options import GrpoOptions

EPSILON = 1e-6


def group_advantages(rewards: Tensor, group_size: int, *, normalize_std: bool = False) -> Tensor:
    """A_i = R_i - mean of its group, optionally divided by the group's standard deviation.

    Args:
        rewards: [N] one reward a response, the responses of a prompt side by side.
        group_size: responses of one prompt.
        normalize_std: divide by the (unbiased) standard deviation + 1e-6, as GRPO does.

    Returns:
        [N] fp32.

    Raises:
        ValueError: N is not a multiple of group_size.

    References: arXiv 2503.20783 (Dr. GRPO), section 3.2; arXiv 2402.03300, section 4.1.2.
    """
    groups = _groups(rewards, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_std:
        std = groups.std(dim=1, keepdim=True) if group_size > 1 else torch.zeros_like(groups)
        advantages = advantages / (std + EPSILON)
    return advantages.view(-1).float()


def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """RLOO: A_i = R_i - mean of the other responses of its group = G / (G - 1) · (R_i - mean of all).

    Args:
        rewards: [N].
        group_size: G, at least 2.

    Returns:
        [N] fp32.

    Raises:
        ValueError: N is not a multiple of group_size, or group_size is 1.

    References: arXiv 2402.14740 (RLOO).
    """
    if group_size < 2:
        raise ValueError("RLOO needs at least 2 responses of a prompt (--rollout-num-samples)")
    groups = _groups(rewards, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).view(-1).float()


def whitened_advantages(rewards: Tensor, group_size: int, lengths: Tensor) -> Tensor:
    """REINFORCE++ with baseline: R - group mean, then mean 0 and variance 1 over the rollout's tokens.

    Args:
        rewards: [N].
        group_size: G.
        lengths: [N] response tokens; each token of a response carries its advantage.

    Returns:
        [N] fp32.

    References: arXiv 2501.03262 (REINFORCE++, variant with a group baseline).
    """
    groups = _groups(rewards, group_size)
    centred = (groups - groups.mean(dim=1, keepdim=True)).view(-1)
    weights = lengths.double() / lengths.sum()
    mean = (weights * centred).sum()
    # The variance of the tokens is unbiased, as torch.var: n / (n - 1).
    count = lengths.sum().double()
    variance = (weights * (centred - mean).square()).sum() * count / (count - 1).clamp(min=1)
    return ((centred - mean) / (variance.sqrt() + EPSILON)).float()


def estimate_advantages(
    rewards: Tensor, lengths: Tensor, *, estimator: str, group_size: int, normalize_std: bool
) -> Tensor:
    """Advantages [N] by `--grpo-advantage-estimator`.

    Args:
        rewards: [N].
        lengths: [N] response tokens.
        estimator: "grpo", "dr-grpo", "rloo" or "reinforce++-baseline".
        group_size: responses of one prompt.
        normalize_std: of "grpo" only.
    """
    if estimator in ("grpo", "dr-grpo"):
        return group_advantages(rewards, group_size, normalize_std=normalize_std and estimator == "grpo")
    if estimator == "rloo":
        return leave_one_out_advantages(rewards, group_size)
    if estimator == "reinforce++-baseline":
        return whitened_advantages(rewards, group_size, lengths)
    raise ValueError(f"--grpo-advantage-estimator {estimator} is unknown")


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, penalty: float) -> Tensor:
    """What is added to a reward for its response's length, in units of reward: 0 down to -penalty.

    0 up to max_length - buffer tokens, then falling linearly to -penalty at max_length.

    Args:
        lengths: [N] response tokens.
        max_length: `--rollout-max-response-length`.
        buffer: `--grpo-overlong-buffer`, in tokens; 0 = no penalty.

    Returns:
        [N] fp32.

    References: arXiv 2503.14476 (DAPO), equation 13.
    """
    if buffer == 0:
        return torch.zeros(lengths.shape, dtype=torch.float32, device=lengths.device)
    over = (lengths.double() - (max_length - buffer)) / buffer
    return (-penalty * over.clamp(0.0, 1.0)).float()


def assign_advantages(
    batch: TrainBatch, options: GrpoOptions, *, group_size: int, max_response_length: int
) -> TrainBatch:
    """Advantages of a rollout from its rewards, the length penalty and, with --grpo-kl-in reward, the KL.

    Args:
        batch: after the log-prob pass (and the reference's, where there is one); `rewards` stay as they are.
        options: `--grpo-...`.
        group_size: `--rollout-num-samples`.
        max_response_length: `--rollout-max-response-length`.
    """
    shaped = batch.rewards + overlong_penalty(
        batch.lengths,
        max_length=max_response_length,
        buffer=options.grpo_overlong_buffer,
        penalty=options.grpo_overlong_penalty,
    )
    if options.grpo_kl_coeff and options.grpo_kl_in == "reward":
        kl = response_kl(batch.old_logprobs, batch.ref_logprobs, batch.loss_mask, options.grpo_kl_estimator)
        shaped = shaped - options.grpo_kl_coeff * kl
    advantages = estimate_advantages(
        shaped,
        batch.lengths,
        estimator=options.grpo_advantage_estimator,
        group_size=group_size,
        normalize_std=options.grpo_normalize_std,
    )
    return batch.replace(advantages=advantages, token_advantages=advantages.unsqueeze(1) * batch.loss_mask)


def flat_groups(rewards: Tensor, group_size: int) -> Tensor:
    """[N / G] bool: groups whose rewards are all equal, which have no gradient (DAPO's dynamic sampling)."""
    groups = _groups(rewards, group_size)
    return (groups == groups[:, :1]).all(dim=1)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not form groups of {group_size}")
    return rewards.double().view(-1, group_size)
