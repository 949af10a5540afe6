"""tokens.jsonl: what is recorded of a step, and of a run that goes on; the text of single tokens."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from siren_megatron import token_record
from siren_megatron.data.prompts import Prompt
from siren_megatron.report.records import read_lines, read_records, thin_out
from siren_megatron.token_record import (
    TokenRecorder,
    candidate_text,
    choose_rows,
    most_chosen,
    nucleus_size,
    position_histogram,
    token_texts,
)
from siren_megatron.vocab_parallel.top_tokens import vocab_parallel_top_tokens
from tests.token_records import Policy, config_of, make_step

PROMPT, RESPONSES = [5, 6, 7], [[8, 9, 10, 11, 12, 13, 0], [20, 21, 0], [30, 31, 32, 0], [40, 0]]
GROUPS = [(PROMPT, RESPONSES), ([50], [[60, 0], [61, 0], [62, 63, 64, 65, 66, 0], [0]])]
REWARDS = [0.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte a token: 0 to 255, and 256 the end of sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    decode = {char: byte for byte, char in _byte_characters().items()}
    vocab = {char: decode[char] for char in alphabet} | {"<|end|>": 256}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def _byte_characters():
    """byte -> character of byte-level tokenizers (GPT-2's table): printable ones stand for themselves."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in keep}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


def record(save, tokenizer, policy=None, **options):
    """The first record of a run with GROUPS, and its batch."""
    config = config_of(save, **{"rollout_max_response_length": 8, **options})
    policy = policy or Policy(257)
    batch = make_step(policy, GROUPS, REWARDS)
    recorder = TokenRecorder(config)
    prompts = [Prompt(0, (1, 2), "x", "no"), Prompt(1, tuple(PROMPT), "x", "forty-two")]
    recorder.open(0, tokenizer, prompts)
    recorder.record(1, batch, policy)
    (line,) = read_records(save / "tokens.jsonl")
    return line, batch


def test_numbers_are_those_of_the_batch(tmp_path, tokenizer):
    line, batch = record(tmp_path, tokenizer)
    assert (line["step"], line["top_p"], line["peak_quantile"]) == (1, 0.8, 0.8)
    first, second = line["prompts"]
    assert first["prompt"] == "\x05\x06\x07" and first["answer"] == "forty-two" and second["answer"] is None
    # The best and the worst in turn: rewards 1, 0, 0.5, 0 of rows 1, 2, 3, 0.
    assert [r["reward"] for r in first["responses"]] == [1, 0, 0.5, 0]
    assert [r["length"] for r in first["responses"]] == [3, 4, 2, 7]
    row, got = 0, first["responses"][3]
    mask = batch.loss_mask[row]
    for name, tensor in (
        ("logprob", batch.old_logprobs),
        ("entropy", batch.entropy),
        ("top_p_entropy", batch.top_p_entropy),
    ):
        assert got[name] == pytest.approx(tensor[row][mask].tolist(), abs=5.1e-4)
    assert got["advantage"] == pytest.approx(-0.375)
    assert "".join(got["tokens"]) == "\x08\t\n\x0b\x0c\r\0"
    for name, key in (("peak", batch.top_p_entropy), ("full_peak", batch.entropy)):
        values = key[row][mask].double()
        above = values > torch.quantile(values, 0.8)
        assert got[name] == above.nonzero().flatten().tolist() and above.any()


def test_the_likeliest_tokens_make_the_recorded_entropies(tmp_path, tokenizer):
    """q = p renormalised in the nucleus gives H_t, wherever the nucleus is written whole."""
    line, _ = record(tmp_path, tokenizer, Policy(257, sharpness=9.0))
    checked = 0
    for prompt in line["prompts"]:
        for response in prompt["responses"]:
            rows = zip(response["nucleus"], response["likeliest"], response["top_p_entropy"], strict=True)
            for size, flat, entropy in rows:
                ids, probs = flat[::2], flat[1::2]
                assert probs == sorted(probs, reverse=True) and all(i < len(line["texts"]) for i in ids)
                if size is None or size > len(probs):
                    continue
                q = [p / sum(probs[:size]) for p in probs[:size]]
                assert -sum(p * math.log(p) for p in q) == pytest.approx(entropy, abs=0.02)
                assert sum(probs[: size - 1]) < 0.8 + 1e-2 and sum(probs[:size]) > 0.8 - 1e-2
                checked += size > 1
    assert checked >= 5


def test_regularised_entropies_are_means_of_responses(tmp_path, tokenizer):
    line, batch = record(tmp_path, tokenizer)
    expected = {}
    for name, values in (("entropy", batch.entropy), ("top_p_entropy", batch.top_p_entropy)):
        rows = [v[m].double() for v, m in zip(values, batch.loss_mask, strict=True)]
        peaks = [v[v > torch.quantile(v, 0.8)] for v in rows]
        expected[name] = sum(float(v.mean()) for v in rows) / len(rows)
        expected[name + "_peaks"] = sum(float(v.mean()) if len(v) else 0.0 for v in peaks) / len(rows)
    assert line["regularised"] == pytest.approx(expected, abs=6e-4)


def test_histogram_counts_every_token_once(tmp_path, tokenizer):
    line, batch = record(tmp_path, tokenizer)
    where = line["positions"]
    assert where["width"] == 1 and where["responses"] == 8
    assert where["tokens"] == [8, 7, 4, 3, 2, 2, 1]
    third = torch.stack(
        [row[mask][2] for row, mask in zip(batch.entropy, batch.loss_mask, strict=True) if mask.sum() > 2]
    )
    assert where["entropy"][2] == pytest.approx(float(third.mean()), abs=6e-4)
    for name, of in (("entropy", "full_peak"), ("top_p_entropy", "peak")):
        cells = list(zip(*[iter(where["histograms"][name])] * 3, strict=True))
        for position, tokens in enumerate(where["tokens"]):
            assert sum(n for p, _, n in cells if p == position) == tokens
        at_third = sorted(b for p, b, n in cells if p == 2 for _ in range(n))
        values = batch.entropy if name == "entropy" else batch.top_p_entropy
        rows = [v[m] for v, m in zip(values, batch.loss_mask, strict=True)]
        assert at_third == sorted(int(float(v[2]) / 0.125) for v in rows if len(v) > 2)
        peaks = list(zip(*[iter(where["histograms"][name + "_peaks"])] * 3, strict=True))
        assert [sum(n for p, _, n in peaks if p == i) for i in range(7)] == where[of]
        assert sum(where[of]) == sum(len(v[v > torch.quantile(v, 0.8)]) for v in rows)


def test_tokens_most_often_in_the_mask():
    tokens = torch.tensor([7, 7, 3, 9, 3, 3, 5, 9, 9])
    chosen = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    assert most_chosen(tokens, chosen) == [[3, 2, 3], [7, 2, 2], [5, 1, 1]]
    assert most_chosen(tokens, chosen, limit=1) == [[3, 2, 3]]
    assert most_chosen(tokens, ~chosen.logical_or(~chosen)) == []


def test_wide_bins_and_entropies_that_are_no_number(tokenizer):
    batch = make_step(Policy(257), GROUPS, REWARDS)
    entropy = batch.entropy.clone()
    entropy[0, 2] = math.nan
    nothing = torch.zeros_like(batch.loss_mask)
    where = position_histogram(batch.replace(entropy=entropy), nothing, nothing, width=4)
    assert where["tokens"] == [22, 5] and where["peak"] == [0, 0]
    assert sum(where["histograms"]["entropy"][2::3]) == 27
    json.dumps(where, allow_nan=False)


def test_records_are_due_at_the_first_the_last_and_every_interval(tmp_path):
    def due(**options):
        recorder = TokenRecorder(config_of(tmp_path, **options))
        return [step for step in range(1, recorder.config.train.num_steps + 1) if recorder.is_due(step)]

    assert due(num_steps=60) == [1, 6, 12, 18, 24, 30, 36, 42, 48, 54, 60]
    assert due(num_steps=5) == [1, 2, 3, 4, 5]
    assert due(num_steps=9, record_interval=4) == [1, 4, 8, 9]
    assert due(num_steps=9, record_interval=100) == [1, 9]
    assert due(num_steps=9, record_prompts=0) == []


def test_a_resumed_run_has_each_step_once(tmp_path, tokenizer):
    config, policy = config_of(tmp_path, num_steps=6, record_interval=1), Policy(257)
    batch = make_step(policy, GROUPS, REWARDS)

    def train(first, last):
        recorder = TokenRecorder(config)
        recorder.open(first - 1, tokenizer, [])
        for step in range(first, last + 1):
            recorder.record(step, batch, policy)

    train(1, 5)
    path = tmp_path / "tokens.jsonl"
    with open(path, "a") as file:
        file.write('{"step":6,"torn')
    train(4, 6)  # from a checkpoint of step 3
    assert [r["step"] for r in read_records(path)] == [1, 2, 3, 4, 5, 6]
    assert path.read_text().count("\n") == 6 and not list(tmp_path.glob("*.tmp"))
    path.write_text('{"step":1,"x":0}\nnoise\n')
    with pytest.raises(ValueError, match=r"tokens.jsonl:2: not a record"):
        TokenRecorder(config).open(1, tokenizer, [])


def test_other_ranks_look_and_write_nothing(tmp_path):
    policy, seen = Policy(257), []
    policy.top_tokens, look = lambda *arguments: seen.append(1) or look(*arguments), policy.top_tokens
    recorder = TokenRecorder(config_of(tmp_path))
    recorder.record(1, make_step(policy, GROUPS, REWARDS), policy)
    recorder.record(3, make_step(policy, GROUPS, REWARDS), policy)  # not due
    assert seen == [1] and not list(tmp_path.iterdir())


def test_a_record_is_bounded(monkeypatch):
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0] * 3)
    assert choose_rows(rewards, torch.full((12,), 10), 4, 2) == [1, 3, 2, 0, 5, 7, 6, 4]
    monkeypatch.setattr(token_record, "MAX_TOKENS", 25)
    assert choose_rows(rewards, torch.full((12,), 10), 4, 2) == [1, 5]
    assert choose_rows(rewards, torch.tensor([10] * 4 + [20] * 4 + [5] * 4), 4, 3) == [1, 3, 9]
    monkeypatch.setattr(token_record, "MAX_RESPONSE_TOKENS", 6)
    assert choose_rows(rewards, torch.full((12,), 10), 4, 2) == [1, 3, 5, 7]
    assert choose_rows(torch.ones(4), torch.ones(4), 2, 9) == [0, 1, 2, 3]


def test_long_responses_are_cut_in_the_record_only(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(token_record, "MAX_RESPONSE_TOKENS", 3)
    monkeypatch.setattr(token_record, "MAX_PROMPT_CHARACTERS", 2)
    line, _ = record(tmp_path, tokenizer)
    response = line["prompts"][0]["responses"][3]
    assert response["length"] == 7 and all(i < 3 for i in response["peak"])
    assert {len(response[name]) for name in ("tokens", "logprob", "entropy", "nucleus", "likeliest")} == {3}
    assert line["prompts"][0]["prompt"] == "\x05\x06 …"
    assert line["prompts"][0]["answer"] == "forty-two"


@pytest.mark.parametrize(
    ("probs", "top_p", "inclusive"),
    [
        ([0.5, 0.3, 0.1], 0.8, 2),
        ([0.5, 0.3, 0.1], 0.81, 3),
        ([0.9, 0.05], 0.8, 1),
        ([0.3, 0.3], 0.8, None),
        ([0.6, 0.4], 1.0, 2),
    ],
)
def test_nucleus_size(probs, top_p, inclusive):
    assert nucleus_size(probs, top_p, False) == inclusive
    assert nucleus_size(probs, top_p, True) == (None if inclusive is None else inclusive - 1)


@given(text=st.text(max_size=30), before=st.text(max_size=4))
def test_token_texts_end_to_end_are_the_text(tokenizer, text, before):
    ids, prompt = list(text.encode()), list(before.encode())
    texts = token_texts(tokenizer, prompt, [*ids, 256])
    assert "".join(texts) == text + "<|end|>" and len(texts) == len(ids) + 1
    # Each character comes with its last byte.
    assert [t for t in texts[:-1] if t] == list(text)


@given(st.lists(st.integers(0, 256), max_size=24))
def test_bytes_that_are_no_character_break_nothing(tokenizer, ids):
    texts = token_texts(tokenizer, [], ids)
    assert len(texts) == len(ids)
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(texts) == whole
    else:  # whatever is whole is there, in its order
        assert "".join(texts).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_bytes_of_a_cut_character(tokenizer):
    euro = list("€".encode())
    assert token_texts(tokenizer, [], euro) == ["", "", "€"]
    assert token_texts(tokenizer, [], euro[:2]) == ["", "\ufffd"]
    assert token_texts(tokenizer, [], [65, *euro[:2], 66]) == ["A", "", "", "\ufffdB"]
    assert candidate_text(tokenizer, 65) == "A"
    assert candidate_text(tokenizer, euro[0]) == "<token 226>"


def test_top_tokens_are_those_of_a_sort():
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) * 3
    ids, logprobs = vocab_parallel_top_tokens(logits, 5, vocab_size=60)
    expected = logits[:, :60].double().log_softmax(1).sort(dim=1, descending=True)
    torch.testing.assert_close(logprobs.double(), expected.values[:, :5], rtol=1e-6, atol=1e-6)
    assert torch.equal(ids, expected.indices[:, :5])
    ids, logprobs = vocab_parallel_top_tokens(logits[:2, :4], 6, vocab_size=3)
    assert (ids[:, 3:] == -1).all() and (logprobs[:, 3:] == -math.inf).all()
    assert sorted(ids[0, :3].tolist()) == [0, 1, 2]


def test_reading_is_bounded_and_keeps_both_ends(tmp_path):
    path = tmp_path / "tokens.jsonl"
    rest = {"prompts": [], "positions": {}, "regularised": {}, "often": {}, "texts": []}
    lines = [json.dumps({"step": s, **rest}, separators=(",", ":")) for s in range(1, 101)]
    path.write_text("\n".join(lines) + "\n" + '{"step":101')
    assert [step for step, _ in read_lines(path)] == list(range(1, 101))
    assert len(read_records(path)) == 100
    few = [r["step"] for r in read_records(path, max_bytes=1200)]
    assert few[0] == 1 and few[-1] == 100 and len(few) >= 8
    assert sum(len(lines[step - 1]) + 1 for step in few) <= 1200
    assert {b - a for a, b in zip(few[:-2], few[1:-1], strict=True)} == {few[1] - 1}
    assert [r["step"] for r in read_records(path, max_bytes=1)] == [1]
    assert read_records(tmp_path / "none.jsonl") == []
    assert thin_out([], 10) == set() and thin_out([5], 10) == {0} and thin_out([5], 1) == {0}
