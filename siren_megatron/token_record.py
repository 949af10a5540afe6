"""<save>/tokens.jsonl: a few responses of a run token by token, and where in all responses the entropy is.

One line, a JSON object, for each recorded step: the first, every `--record-interval` and the last. What is in
it is of the policy that sampled the responses, before the step's update. docs/report.md names its fields.

Legend: N = responses of the step, S = padded length, k = TOP_TOKENS.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from siren_megatron.batch import TrainBatch
from siren_megatron.config import Config
from siren_megatron.data.prompts import Prompt
from siren_megatron.report.records import RECORD_NAME, TOP_TOKENS, read_lines
from siren_megatron.siren import masked_entropy, peak_entropy_mask

MAX_RESPONSES = 4  # of a prompt
MAX_TOKENS = 8192  # of a record
MAX_RESPONSE_TOKENS = 2048  # shown of a response
MAX_PROMPT_CHARACTERS = 4000
SHOWN_TOKENS = 6  # written at most
OFTEN_TOKENS = 16  # those most often in the peak mask
SHOWN_MASS = 0.99  # the likeliest tokens are written until they reach this
AUTO_RECORDS = 10  # of a run, where no interval is given
POSITION_BINS = 64
ENTROPY_BIN, ENTROPY_BINS = 0.125, 64  # nats; the last bin is open
CHARACTER_BYTES = 4  # longest UTF-8 character: so many tokens may share one


class TokenRecorder:
    """Records steps of a run. One on every rank, as looking at the likeliest tokens is a collective.

    Args:
        config: the run's options.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = config.run.save / RECORD_NAME
        self._tokenizer: Any = None
        self._prompts: Sequence[Prompt] = ()

    def open(self, step: int, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        """On rank 0: drop the records later than `step` (and a torn last line), and be ready to write.

        Args:
            step: steps done: 0, or that of the loaded checkpoint.
            tokenizer: decodes token ids.
            prompts: of the data set, for their answers.
        """
        self._tokenizer, self._prompts = tokenizer, prompts
        if not self.path.exists():
            return
        temporary = self.path.with_suffix(".jsonl.tmp")
        with open(temporary, "wb") as file:
            file.writelines(line for of_step, line in read_lines(self.path) if of_step <= step)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def is_due(self, step: int) -> bool:
        """Whether `step`, counted from 1, has a record: the same answer on every rank."""
        run, steps = self.config.run, self.config.train.num_steps
        if not run.record_prompts:
            return False
        interval = run.record_interval or max(1, steps // AUTO_RECORDS)
        return step in (1, steps) or step % interval == 0

    def record(self, step: int, batch: TrainBatch, trainer: Any) -> None:
        """Write a line, if `step` is due. A collective: every rank calls it with the same arguments.

        Args:
            step: the step that is going on, counted from 1.
            batch: [N, S] with log-probs, entropies and advantages; those of a prompt side by side.
            trainer: gives the likeliest tokens; its weights are still those of the log-prob pass.
        """
        if not self.is_due(step):
            return
        rows = choose_rows(
            batch.rewards,
            batch.lengths,
            self.config.rollout.rollout_num_samples,
            self.config.run.record_prompts,
        )
        chosen = batch.select(rows).trimmed(trainer.length_multiple)
        top = [part.cpu() for part in trainer.top_tokens(chosen, TOP_TOKENS)]
        if self._tokenizer is None:
            return
        line = {
            "step": step,
            "top_p": self.config.entropy.entropy_top_p,
            "top_p_boundary": self.config.entropy.entropy_top_p_boundary,
            "peak_quantile": self.config.entropy.siren_peak_quantile,
            **self._everywhere(batch.to(torch.device("cpu"))),
            **self._responses(chosen.to(torch.device("cpu")), *top),
        }
        with open(self.path, "a", encoding="ascii") as file:
            file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")

    def _peaks(self, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """SIREN's peak mask [N, S], and the one of the full entropy, as without the top-p mask."""
        quantile = self.config.entropy.siren_peak_quantile
        return tuple(
            peak_entropy_mask(h, batch.loss_mask, quantile) for h in (batch.top_p_entropy, batch.entropy)
        )

    def _everywhere(self, batch: TrainBatch) -> dict[str, Any]:
        """What is of all responses: H under each pair of masks, and how entropy is spread over positions."""
        peak, full_peak = self._peaks(batch)
        masks = {
            "entropy": (batch.entropy, batch.loss_mask),
            "top_p_entropy": (batch.top_p_entropy, batch.loss_mask),
            "entropy_peaks": (batch.entropy, full_peak),
            "top_p_entropy_peaks": (batch.top_p_entropy, peak),
        }
        width = -(-self.config.rollout.rollout_max_response_length // POSITION_BINS)
        return {
            "regularised": {name: _rounded(masked_entropy(*m).double().mean()) for name, m in masks.items()},
            "positions": position_histogram(batch, peak, full_peak, width=width),
            "often": {
                name: [
                    [candidate_text(self._tokenizer, token), *counts]
                    for token, *counts in most_chosen(batch.labels[batch.loss_mask], mask[batch.loss_mask])
                ]
                for name, mask in (("entropy", full_peak), ("top_p_entropy", peak))
            },
        }

    def _responses(self, batch: TrainBatch, top_ids: Tensor, top_logprobs: Tensor) -> dict[str, Any]:
        peak, full_peak = self._peaks(batch)
        shown: dict[int, int] = {}  # token id -> its place in "texts"
        prompts: list[dict[str, Any]] = []
        last_prompt = None
        for row in range(batch.num_responses):
            places = batch.loss_mask[row].nonzero().squeeze(1)
            prompt_ids = tuple(batch.tokens[row, : int(places[0]) + 1].tolist())
            if prompt_ids != last_prompt:
                prompts.append(self._prompt(prompt_ids))
                last_prompt = prompt_ids
            kept = places[:MAX_RESPONSE_TOKENS]
            nuclei = [
                self._nucleus(ids, logprobs, shown)
                for ids, logprobs in zip(
                    top_ids[row, kept].tolist(), top_logprobs[row, kept].double().exp().tolist(), strict=True
                )
            ]
            prompts[-1]["responses"].append(
                {
                    "reward": _rounded(batch.rewards[row]),
                    "advantage": _rounded(batch.advantages[row]),
                    "length": len(places),
                    "truncated": bool(batch.truncated[row]),
                    "tokens": token_texts(self._tokenizer, prompt_ids, batch.labels[row, kept].tolist()),
                    "logprob": _rounded(batch.old_logprobs[row, kept]),
                    "entropy": _rounded(batch.entropy[row, kept]),
                    "top_p_entropy": _rounded(batch.top_p_entropy[row, kept]),
                    "peak": peak[row, kept].nonzero().squeeze(1).tolist(),
                    "full_peak": full_peak[row, kept].nonzero().squeeze(1).tolist(),
                    "nucleus": [size for size, _ in nuclei],
                    "likeliest": [flat for _, flat in nuclei],
                }
            )
        return {"texts": [candidate_text(self._tokenizer, token) for token in shown], "prompts": prompts}

    def _prompt(self, ids: tuple[int, ...]) -> dict[str, Any]:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        if len(text) > MAX_PROMPT_CHARACTERS:
            text = text[:MAX_PROMPT_CHARACTERS] + " …"
        answer = next((p.answer for p in self._prompts if tuple(p.token_ids) == ids), None)
        return {"prompt": text, "answer": answer, "responses": []}

    def _nucleus(self, ids: list[int], probs: list[float], shown: dict[int, int]) -> tuple[int | None, list]:
        """(size of the nucleus, None beyond TOP_TOKENS; the likeliest tokens as [text, probability, ...])."""
        entropy = self.config.entropy
        size = nucleus_size(probs, entropy.entropy_top_p, entropy.entropy_top_p_boundary == "exclusive")
        flat: list[int | float] = []
        mass = 0.0
        for token, p in zip(ids[:SHOWN_TOKENS], probs, strict=False):
            if token < 0 or (flat and mass >= SHOWN_MASS):
                break
            flat += [shown.setdefault(token, len(shown)), round(p, 3)]
            mass += p
        return size, flat


def choose_rows(rewards: Tensor, lengths: Tensor, group_size: int, num_prompts: int) -> list[int]:
    """The rows of a record: of the first prompts, their best and their worst responses in turn.

    Each prompt gets one response, then each a second, ... as long as the record holds at most MAX_TOKENS.

    Args:
        rewards, lengths: [N], those of a prompt side by side; lengths in tokens.
        group_size: responses of a prompt.
        num_prompts: most prompts.

    Returns:
        Row numbers, those of a prompt side by side.
    """
    orders = []
    for start in list(range(0, len(rewards), group_size))[:num_prompts]:
        best = sorted(range(start, start + group_size), key=lambda row: (-float(rewards[row]), row))
        turns = [pair for both in zip(best, reversed(best), strict=True) for pair in both]
        orders.append(list(dict.fromkeys(turns)))
    rows, budget = [], MAX_TOKENS
    for turn in range(min(MAX_RESPONSES, group_size)):
        for order in orders:
            cost = min(int(lengths[order[turn]]), MAX_RESPONSE_TOKENS)
            if cost <= budget:
                rows.append((order[0] // group_size, turn, order[turn]))
                budget -= cost
    return [row for _, _, row in sorted(rows)]


def nucleus_size(probs: Sequence[float], top_p: float, exclusive: bool) -> int | None:
    """Tokens of the shortest prefix whose mass reaches top_p, less one when exclusive; None beyond probs.

    Args:
        probs: of the likeliest tokens, the likeliest first.
    """
    mass = 0.0
    for count, p in enumerate(probs, start=1):
        mass += p
        if mass >= top_p:
            return count - exclusive
    return None


def position_histogram(batch: TrainBatch, peak: Tensor, full_peak: Tensor, *, width: int) -> dict[str, Any]:
    """How entropy and peaks are spread over the positions of all responses.

    Args:
        batch: [N, S] on the CPU.
        peak, full_peak: [N, S] peak masks of the top-p and of the full entropy.
        width: positions of a bin.

    Returns:
        "responses", N; "width"; "entropy_bin" in nats; per bin of positions "tokens", the means "entropy" and
        "top_p_entropy" in nats, the counts "peak" and "full_peak". And in "histograms", by the same two
        names, with and without "_peaks": [bin of positions, bin of entropy, tokens] for each cell that has
        some, flat.
    """
    mask = batch.loss_mask
    bins = ((mask.cumsum(dim=1) - 1) // width)[mask]
    num_bins = int(bins.max()) + 1
    tokens = torch.bincount(bins, minlength=num_bins)
    result: dict[str, Any] = {
        "responses": batch.num_responses,
        "width": width,
        "entropy_bin": ENTROPY_BIN,
        "tokens": tokens.tolist(),
        "histograms": {},
    }
    for name, values, peaks in (
        ("entropy", batch.entropy[mask], full_peak[mask]),
        ("top_p_entropy", batch.top_p_entropy[mask], peak[mask]),
    ):
        values = values.double().nan_to_num(0.0)
        result[name] = _rounded(torch.bincount(bins, values, minlength=num_bins) / tokens)
        result["peak" if name == "top_p_entropy" else "full_peak"] = torch.bincount(
            bins[peaks], minlength=num_bins
        ).tolist()
        cells = bins * ENTROPY_BINS + (values / ENTROPY_BIN).long().clamp(0, ENTROPY_BINS - 1)
        for suffix, chosen in (("", cells), ("_peaks", cells[peaks])):
            unique, counts = chosen.unique(return_counts=True)
            triples = torch.stack([unique // ENTROPY_BINS, unique % ENTROPY_BINS, counts], dim=1)
            result["histograms"][name + suffix] = triples.flatten().tolist()
    return result


def most_chosen(tokens: Tensor, chosen: Tensor, limit: int = OFTEN_TOKENS) -> list[list[int]]:
    """The tokens that stand most often where a mask chooses: [id, times chosen, times in all], most first.

    Args:
        tokens: [T] ids.
        chosen: [T] bool.
    """
    ids, places = tokens.unique(return_inverse=True)
    often = torch.bincount(places[chosen], minlength=len(ids))
    order = often.sort(descending=True, stable=True).indices[:limit]
    rows = torch.stack([ids, often, torch.bincount(places)], dim=1)[order]
    return rows[rows[:, 1] > 0].tolist()


def token_texts(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The text of each response token; end to end they are the response's text.

    A token that ends inside a character (bytes of a byte-level tokenizer) is "", and the one that completes
    it has the character; bytes that never become one come as U+FFFD, as the tokenizer decodes them.

    Args:
        prompt_ids: what stands before: a SentencePiece tokenizer drops a leading space otherwise.
        ids: of the response.
    """
    context = list(prompt_ids[-CHARACTER_BYTES:])
    everything = context + list(ids)
    # `done` tokens have their text, and `start` is where decoding begins anew: a window of few tokens.
    start, done, texts = 0, len(context), []
    for end in range(len(context) + 1, len(everything) + 1):
        before = tokenizer.decode(everything[start:done], skip_special_tokens=False)
        now = tokenizer.decode(everything[start:end], skip_special_tokens=False)
        if now.endswith("\ufffd") and end - done < CHARACTER_BYTES and end < len(everything):
            texts.append("")
            continue
        # What U+FFFD stood for may have become a character: then the texts differ before `before` ends.
        texts.append(now[len(os.path.commonprefix((before, now))) :])
        start, done = done, end
    return texts


def candidate_text(tokenizer: Any, token: int) -> str:
    """A token's text by itself; its id where it is not whole characters."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    return f"<token {token}>" if not text or "\ufffd" in text else text


def _rounded(values: Tensor) -> Any:
    """Numbers with three decimals, whole ones as integers (half the size); None for NaN, infinities."""
    numbers = [round(v, 3) if math.isfinite(v) else None for v in values.double().reshape(-1).tolist()]
    numbers = [int(v) if v is not None and v == int(v) else v for v in numbers]
    return numbers if values.dim() else numbers[0]
