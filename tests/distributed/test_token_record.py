"""A record of tokens is the same in every layout, and its likeliest tokens are those of transformers."""

from __future__ import annotations

import json

import pytest
import torch

from tests.checkpoints import make_random_checkpoint
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import GROUP_SIZE, Layout, config_of, fixed_samples

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, PACKED = "num_virtual_stages_per_pipeline_rank", "max_tokens_per_microbatch"
LAYOUTS = [
    Layout("TP=2 SP", {TP: 2, "sequence_parallel": True}),
    Layout("PP=2 VPP=2", {PP: 2, VPP: 2}),
    Layout("PP=2 VPP=2 packed", {PP: 2, VPP: 2, PACKED: 64}),
    Layout("CP=2 packed", {CP: 2, PACKED: 64}),
    Layout("DP=2", {"micro_batch_size": 2}),
]
PROMPTS = 3  # of three responses at most each: no multiple of any layout's smallest batch
TEMPERATURE = 0.7


class WordTokenizer:
    """Token 17 is " w17"."""

    def decode(self, ids, skip_special_tokens):
        return "".join(f" w{i}" for i in ids)


def record_layouts(rank, world_size, checkpoint, directory):
    """For `run_ranks`: the same step's record, written by the trainer of each layout."""
    from megatron.core import parallel_state

    from siren_megatron import platform

    device = platform.install()
    from siren_megatron import token_record
    from siren_megatron.advantages import group_advantages
    from siren_megatron.batch import make_batch
    from siren_megatron.config import read_hf_config
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer

    token_record.MAX_RESPONSES = 3
    for index, layout in enumerate(LAYOUTS):
        config = config_of(
            checkpoint,
            save=directory / str(index),
            record_prompts=PROMPTS,
            rollout_temperature=TEMPERATURE,
            **layout.options,
        )
        initialize_model_parallel(config)
        trainer = Trainer(config, read_hf_config(checkpoint), device)
        samples, rewards = fixed_samples()
        batch = make_batch(
            samples, rewards, group_advantages(rewards, GROUP_SIZE), multiple=trainer.length_multiple
        )
        recorder = token_record.TokenRecorder(config)
        if rank == 0:
            config.run.save.mkdir()
            recorder.open(0, WordTokenizer(), [])
        recorder.record(1, trainer.compute_logprobs(batch), trainer)
        parallel_state.destroy_model_parallel()


def top_of_shards(rank, world_size, logits, count, vocab_size):
    from siren_megatron.vocab_parallel.top_tokens import vocab_parallel_top_tokens

    shard = logits.chunk(world_size, dim=1)[rank]
    group = torch.distributed.group.WORLD
    return vocab_parallel_top_tokens(shard, count, vocab_size=vocab_size, tp_group=group)


@pytest.mark.parametrize(("vocab_size", "columns", "count"), [(250, 256, 20), (9, 16, 12)])
def test_top_tokens_of_shards_equal_a_sort(vocab_size, columns, count):
    """The second case: of four shards one has one true column, one none; and fewer exist than asked for."""
    logits = torch.randn(30, columns, generator=torch.Generator().manual_seed(2)) * 3
    logits[:, vocab_size:] = 99.0  # padding that must not be seen
    expected = logits[:, :vocab_size].double().log_softmax(1).sort(dim=1, descending=True)
    found = min(count, vocab_size)
    for ids, logprobs in run_ranks(top_of_shards, 4, logits, count, vocab_size):
        assert torch.equal(ids[:, :found], expected.indices[:, :count])
        torch.testing.assert_close(
            logprobs[:, :found].double(), expected.values[:, :count], rtol=1e-5, atol=1e-6
        )
        assert (ids[:, found:] == -1).all() and (logprobs[:, found:] == -torch.inf).all()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    checkpoint = make_random_checkpoint(directory / "model", hidden_size=32, num_hidden_layers=4)
    run_ranks(record_layouts, 2, checkpoint, directory, timeout=200)
    return checkpoint, [
        json.loads((directory / str(i) / "tokens.jsonl").read_text()) for i in range(len(LAYOUTS))
    ]


def close(got, want):
    """The same structure; numbers equal but for a last digit of the three that are written."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        return all(close(got[key], want[key]) for key in want)
    if isinstance(want, list):
        return len(got) == len(want) and all(close(g, w) for g, w in zip(got, want, strict=True))
    return got == pytest.approx(want, abs=1.1e-3) if isinstance(want, float | int) else got == want


def test_every_layout_writes_the_same(records):
    _, (first, *others) = records
    assert sum(len(prompt["responses"]) for prompt in first["prompts"]) == 9
    for layout, other in zip(LAYOUTS[1:], others, strict=True):
        for name in first.keys() - {"texts", "positions"}:
            assert close(other[name], first[name]), f"{layout.name}: {name}"


def test_likeliest_tokens_equal_transformers(records):
    from transformers import AutoModelForCausalLM

    checkpoint, (record, *_) = records
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager")
    for prompt in record["prompts"]:
        asked = [int(word[1:]) for word in prompt["prompt"].split()]
        for response in prompt["responses"]:
            ids = [int(text.strip()[1:]) for text in response["tokens"]]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([asked + ids])).logits[0, len(asked) - 1 : -1]
            p = (logits / TEMPERATURE).softmax(-1).sort(dim=-1, descending=True)
            for at, flat in enumerate(response["likeliest"]):
                texts = [record["texts"][place] for place in flat[::2]]
                assert flat[1::2] == pytest.approx(p.values[at, : len(texts)].tolist(), abs=6e-4)
                # Where two are as likely to the third digit, either may come first.
                gaps = p.values[at, : len(texts)] - p.values[at, 1 : len(texts) + 1]
                for text, token, gap in zip(texts, p.indices[at].tolist(), gaps.tolist(), strict=False):
                    assert text == f" w{token}" or gap < 1e-6
                size = int((p.values[at].cumsum(0) < 0.8).sum()) + 1
                assert response["nucleus"][at] == (size if size <= 32 else None)
