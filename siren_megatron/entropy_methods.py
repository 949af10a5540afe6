"""The entropy methods, one literal dict: `--entropy-method` names a row. docs/methods.md has their formulas.

Legend: N = responses of an optimizer step (over all ranks), B = responses of a micro-batch, S = positions,
h_i = the mean entropy of response i that a method acts on, H = mean of h_i over the N responses, in nats.

A method acts at up to three places, each a pure function:
- `plan` sees the whole optimizer step, the same on every rank: it may change advantages, take tokens out of
  the policy gradient, or mark positions. So a choice of "k of N tokens" is the same in every layout;
- `penalty` is a function of H. Its gradient slope(H)·sum_i grad h_i / N, slope a constant of the step, is a
  plain sum over responses, and so the same in every layout, too. `loss` is any other term with a gradient;
- `next_coeff` gives the coefficient of the next optimizer step.
What `loss` and `penalty` return adds up over micro-batches and ranks, like the policy loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from siren_megatron.method_options import EntropyOptions
from siren_megatron.siren import anchored_penalty, masked_entropy, peak_entropy_mask


@dataclass(frozen=True)
class StepInputs:
    """The whole optimizer step as a method's `plan` sees it: no gradients, the same on every rank.

    Args:
        logprobs, entropy, top_p_entropy, top_two_gap: [N, S] of the policy: of the log-prob pass, or, where
            it was refreshed, of the pass just before this optimizer step.
        loss_mask: [N, S] bool, the positions of the responses.
        advantages: [N, S], the response's at each of its tokens.
        clipped: [N, S] bool, the clip of the policy loss leaves no gradient.
        moved: an optimizer step has been taken since the log-prob pass that gave the old log-probs.
        coeff: the method's coefficient at this step.
        generator: random numbers of (seed, step, optimizer step), on the CPU.
        options: `--entropy-...`, `--siren-...`.
    """

    logprobs: Tensor
    entropy: Tensor
    top_p_entropy: Tensor
    top_two_gap: Tensor
    loss_mask: Tensor
    advantages: Tensor
    clipped: Tensor
    moved: bool
    coeff: float
    generator: torch.Generator
    options: EntropyOptions


@dataclass(frozen=True)
class StepPlan:
    """What a method does with this optimizer step. All tensors [N, S]; None = nothing.

    Args:
        advantages: new advantages.
        keep: bool, tokens that keep their policy gradient.
        entropy_weights: fp32 marks on positions, for the method's own loss.
        metrics: values of the whole step.
    """

    advantages: Tensor | None = None
    keep: Tensor | None = None
    entropy_weights: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LossInputs:
    """A micro-batch as a method's loss sees it.

    Args:
        logprobs, entropy, top_p_entropy: [B, S] of the policy in training, with gradient.
        old_logprobs: [B, S]; outside loss_mask ignored.
        loss_mask: [B, S] bool.
        entropy_weights: [B, S] of the plan.
        aggregation: [B, S] weights by which token losses become one (`grpo.token_weights`).
        coeff: the method's coefficient at this step.
        target: entropy in nats to hold to: --entropy-target or the initial policy's.
        step_entropy: H over the optimizer step, in nats; None = each micro-batch takes its own.
        num_responses: N.
        options: `--entropy-...`, `--siren-...`.
    """

    logprobs: Tensor
    entropy: Tensor
    top_p_entropy: Tensor
    old_logprobs: Tensor
    loss_mask: Tensor
    entropy_weights: Tensor
    aggregation: Tensor
    coeff: float
    target: float
    step_entropy: float | None
    num_responses: int
    options: EntropyOptions


ResponseEntropies = Callable[[Tensor, Tensor, Tensor, Tensor, EntropyOptions], Tensor]
"""(entropy, top_p_entropy, loss_mask, entropy_weights [B, S], options) -> h_i [B]."""

# ---------------------------------------------------------------- which entropy


def all_tokens(entropy: Tensor, top_p_entropy: Tensor, loss_mask: Tensor, weights: Tensor, options) -> Tensor:
    """h_i = mean of the full entropy over the response."""
    return masked_entropy(entropy, loss_mask)


def both_masks(entropy: Tensor, top_p_entropy: Tensor, loss_mask: Tensor, weights: Tensor, options) -> Tensor:
    """h_i = mean of the top-p entropy over the response's peaks (SIREN's two masks)."""
    mask = peak_entropy_mask(top_p_entropy, loss_mask, options.siren_peak_quantile)
    return masked_entropy(top_p_entropy, mask)


def soft_mask(entropy: Tensor, top_p_entropy: Tensor, loss_mask: Tensor, weights: Tensor, options) -> Tensor:
    """h_i = mean of the top-p entropy of the response, weighted by the plan's soft mask; 0 without weight."""
    weights = torch.where(loss_mask, weights, torch.zeros_like(weights))
    total = weights.sum(dim=1)
    return (weights * top_p_entropy).sum(dim=1) / torch.where(total > 0, total, torch.ones_like(total))


# ---------------------------------------------------------------- penalties: H -> loss


def bonus(entropy: Tensor, coeff: float, target: float, options: EntropyOptions) -> Tensor:
    """-beta·H."""
    return -coeff * entropy


def anchor_or_bonus(entropy: Tensor, coeff: float, target: float, options: EntropyOptions) -> Tensor:
    """beta·(H - H_0)²; without the anchor -beta·H."""
    if not options.siren_anchor:
        return bonus(entropy, coeff, target, options)
    return anchored_penalty(entropy, coeff=coeff, anchor=target)


def constraint(entropy: Tensor, coeff: float, target: float, options: EntropyOptions) -> Tensor:
    """The Lagrangian's term lambda·(H_target - H)."""
    return coeff * (target - entropy)


def lower_bound(entropy: Tensor, coeff: float, target: float, options: EntropyOptions) -> Tensor:
    """beta·max(0, H_0 - H)²: nothing to pay at or above the bound."""
    return coeff * (target - entropy).clamp(min=0).square()


def penalty_share(
    response_entropies: Tensor,
    penalty: Callable[[Tensor], Tensor],
    *,
    num_responses: int,
    step_entropy: float | None,
) -> Tensor:
    """This micro-batch's share of a loss whose gradient is that of penalty(H).

    That gradient is penalty'(H)·sum_i grad h_i / N. With the slope a detached constant of the step this is a
    plain sum: it comes out the same however the responses are spread over micro-batches and ranks.

    Args:
        response_entropies: [B] h_i, with gradient.
        penalty: scalar H in nats -> loss.
        num_responses: N.
        step_entropy: H of the optimizer step in nats; None takes the micro-batch's own mean and applies the
            penalty to that (`--siren-anchor-estimate microbatch`, as SIREN's released code does).

    Returns:
        A scalar for the backward pass; its value is the penalty itself only with step_entropy None.
    """
    if step_entropy is None:
        return response_entropies.numel() / num_responses * penalty(response_entropies.mean())
    with torch.enable_grad():
        point = torch.tensor(step_entropy, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(penalty(point), point)
    return float(slope) * response_entropies.sum() / num_responses


# ---------------------------------------------------------------- plans


def token_covariance(logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """cov_t = (A_t - mean A)(logp_t - mean logp), means over the tokens of the optimizer step.

    Args:
        logprobs, advantages: [N, S].
        loss_mask: [N, S] bool.

    Returns:
        [N, S] fp64, 0 outside loss_mask.

    References: arXiv 2505.22617.
    """
    count = loss_mask.sum().clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(loss_mask, values, torch.zeros_like(values)).double()
        return values - values.sum() / count

    return torch.where(loss_mask, centred(advantages) * centred(logprobs), 0.0)


def _number_chosen(inputs: StepInputs) -> int:
    # At least one, as the released code: below 5,000 tokens the methods would silently do nothing.
    return max(1, int(inputs.options.entropy_cov_fraction * int(inputs.loss_mask.sum())))


def clip_covariance(inputs: StepInputs) -> StepPlan:
    """Clip-Cov: random tokens among those with low < cov < high and not clipped have no policy gradient."""
    covariance = token_covariance(inputs.logprobs, inputs.advantages, inputs.loss_mask)
    options = inputs.options
    inside = (covariance > options.entropy_cov_low) & (covariance < options.entropy_cov_high)
    candidates = (inside & inputs.loss_mask & ~inputs.clipped).flatten().nonzero().squeeze(1)
    order = torch.randperm(candidates.numel(), generator=inputs.generator)
    chosen = candidates[order[: _number_chosen(inputs)].to(candidates.device)]
    keep = inputs.loss_mask.flatten().index_fill(0, chosen, False).view_as(inputs.loss_mask)
    return StepPlan(
        keep=keep,
        metrics={
            "clip-cov/tokens": float(chosen.numel()),
            "clip-cov/candidates": float(candidates.numel()),
        },
    )


def kl_covariance(inputs: StepInputs) -> StepPlan:
    """KL-Cov: mark the tokens of largest covariance.

    Before the first optimizer step on a rollout |logp - old_logp| is 0 and so is its gradient, whatever sign
    rounding gives it: nothing is marked then.
    """
    covariance = token_covariance(inputs.logprobs, inputs.advantages, inputs.loss_mask)
    # Not topk: which of equal values it takes depends on the device.
    ranked = covariance.masked_fill(~inputs.loss_mask, float("-inf")).flatten()
    chosen = ranked.sort(descending=True, stable=True).indices[: _number_chosen(inputs)]
    weights = torch.zeros_like(ranked, dtype=torch.float32)
    if inputs.moved:
        weights[chosen] = 1.0
    return StepPlan(
        entropy_weights=weights.view_as(covariance),
        metrics={
            "kl-cov/tokens": float(weights.sum()),
            "kl-cov/covariance": float(covariance.flatten()[chosen].mean()),
        },
    )


def entropy_advantage(inputs: StepInputs) -> StepPlan:
    """A + min(alpha·H_t, |A| / kappa), alpha the coefficient, H_t the full entropy, a constant."""
    limit = inputs.advantages.abs() / inputs.options.entropy_advantage_kappa
    added = torch.minimum(inputs.coeff * inputs.entropy, limit) * inputs.loss_mask
    mean = added.double().sum() / inputs.loss_mask.sum().clamp(min=1)
    return StepPlan(advantages=inputs.advantages + added, metrics={"entropy-advantage/bonus": float(mean)})


def high_entropy_tokens(inputs: StepInputs) -> StepPlan:
    """Policy gradient only on tokens above their response's quantile of the full entropy."""
    keep = peak_entropy_mask(inputs.entropy, inputs.loss_mask, inputs.options.entropy_token_quantile)
    share = keep.sum() / inputs.loss_mask.sum().clamp(min=1)
    return StepPlan(keep=keep, metrics={"high-entropy-tokens/kept": float(share)})


def count_peaks(inputs: StepInputs) -> StepPlan:
    """SIREN takes its masks from the forward pass; here they are only counted."""
    mask = peak_entropy_mask(inputs.top_p_entropy, inputs.loss_mask, inputs.options.siren_peak_quantile)
    return StepPlan(metrics={"siren/positions_per_response": float(mask.sum()) / mask.size(0)})


def competition_mask(inputs: StepInputs) -> StepPlan:
    """PAEC's soft mask as built here: w_t = (1 - e^-H_t)·e^-g_t, H_t top-p entropy, g_t top-two gap.

    1 - e^-H is 0 where the nucleus is one token and nears 1 with its perplexity e^H; e^-g is the second
    token's probability relative to the first's. No scale has to be chosen.
    """
    weights = -torch.expm1(-inputs.top_p_entropy) * torch.exp(-inputs.top_two_gap)
    weights = torch.where(inputs.loss_mask, weights, torch.zeros_like(weights))
    mean = weights.double().sum() / inputs.loss_mask.sum().clamp(min=1)
    return StepPlan(entropy_weights=weights.float(), metrics={"paec/mask_mean": float(mean)})


# ---------------------------------------------------------------- other losses and coefficients


def marked_kl(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """coeff·|logp - old_logp| on the marked tokens, aggregated as the policy loss."""
    old = torch.where(inputs.loss_mask, inputs.old_logprobs, inputs.logprobs.detach())
    distance = (inputs.logprobs - old).abs()
    loss = inputs.coeff * (inputs.aggregation * inputs.entropy_weights * distance).sum()
    return loss, {"kl-cov/loss": loss.detach()}


def ascend(coeff: float, entropy: float, target: float, rate: float) -> float:
    """max(0, coeff + rate·(target - H)): projected gradient ascent of coeff·(target - H) in coeff."""
    return max(0.0, coeff + rate * (target - entropy))


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class EntropyMethod:
    """A row of ENTROPY_METHODS.

    Args:
        source: where it was published.
        coeff: default of --entropy-coeff; None = takes none.
        regularised: h_i, the entropies that `penalty` acts on and that are measured for the anchor.
        penalty: (H, coeff, target, options) -> loss, differentiable in H.
        plan: before the optimizer step.
        loss: a further loss term.
        next_coeff: (coeff, H, target, rate) -> coeff after the optimizer step.
        uses_top_p: needs top-p entropies in training.
        uses_gap: needs the top-two gap.
        always_refresh: its plan needs the current policy (see --entropy-refresh).
    """

    source: str
    coeff: float | None
    regularised: ResponseEntropies = all_tokens
    penalty: Callable[[Tensor, float, float, EntropyOptions], Tensor] | None = None
    plan: Callable[[StepInputs], StepPlan] | None = None
    loss: Callable[[LossInputs], tuple[Tensor, dict[str, Tensor]]] | None = None
    next_coeff: Callable[[float, float, float, float], float] | None = None
    uses_top_p: bool = False
    uses_gap: bool = False
    always_refresh: bool = False


ENTROPY_METHODS: dict[str, EntropyMethod] = {
    "none": EntropyMethod("arXiv 2402.03300 (GRPO)", None),
    "naive": EntropyMethod("arXiv 1602.01783 (A3C), section 4; coefficient: 2509.25133", 1e-4, penalty=bonus),
    "adaptive": EntropyMethod(
        "arXiv 2505.22312 (Skywork-OR1); coefficient: ours",
        0.0,
        penalty=bonus,
        next_coeff=ascend,
    ),
    "entropy-advantage": EntropyMethod("arXiv 2506.14758", 0.4, plan=entropy_advantage),
    "high-entropy-tokens": EntropyMethod("arXiv 2506.01939", None, plan=high_entropy_tokens),
    "clip-cov": EntropyMethod("arXiv 2505.22617 (Clip-Cov)", None, plan=clip_covariance, always_refresh=True),
    "kl-cov": EntropyMethod(
        "arXiv 2505.22617 (KL-Cov)", 1.0, plan=kl_covariance, loss=marked_kl, always_refresh=True
    ),
    "siren": EntropyMethod(
        "arXiv 2509.25133",
        0.005,
        regularised=both_masks,
        penalty=anchor_or_bonus,
        plan=count_peaks,
        uses_top_p=True,
    ),
    "entropy-constraint": EntropyMethod(
        "arXiv 1812.05905 (soft actor-critic), section 5; on SIREN's masks: ours",
        0.0,
        regularised=both_masks,
        penalty=constraint,
        next_coeff=ascend,
        uses_top_p=True,
    ),
    "paec": EntropyMethod(
        "arXiv 2606.08543; its formulas as far as they are public, see docs/methods.md",
        0.005,
        regularised=soft_mask,
        penalty=lower_bound,
        plan=competition_mask,
        uses_top_p=True,
        uses_gap=True,
    ),
}


def entropy_loss(name: str, inputs: LossInputs) -> tuple[Tensor | None, dict[str, Tensor]]:
    """This micro-batch's share of the loss terms of --entropy-method `name`, and of its metrics."""
    method = ENTROPY_METHODS[name]
    loss, metrics = method.loss(inputs) if method.loss else (None, {})
    if method.penalty is not None:
        entropies = method.regularised(
            inputs.entropy, inputs.top_p_entropy, inputs.loss_mask, inputs.entropy_weights, inputs.options
        )
        loss = penalty_share(
            entropies,
            lambda h: method.penalty(h, inputs.coeff, inputs.target, inputs.options),
            num_responses=inputs.num_responses,
            step_entropy=inputs.step_entropy,
        )
        metrics[entropy_metric(name)] = entropies.detach().sum() / inputs.num_responses
    return loss, metrics


def entropy_metric(name: str) -> str:
    """Under which name H of a method with a penalty is recorded."""
    return "siren/entropy_masked" if name == "siren" else f"{name}/entropy"
