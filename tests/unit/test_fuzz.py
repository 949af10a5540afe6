"""What comes from outside, damaged at random: one line of ValueError, never another error, never a hang.

Prompt files, a checkpoint's JSON and tokenizer files, answers; test_conversion.py has safetensors headers.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from siren_megatron.architecture import Architecture
from siren_megatron.config import read_hf_config
from siren_megatron.conversion.files import HfReader
from siren_megatron.data.prompt_files import validate_prompt_file
from siren_megatron.data.tokenizer import load_tokenizer
from siren_megatron.rewards import countdown
from siren_megatron.rewards.functions import RewardPool, countdown_reward, exact_reward, extract_final_answer

FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["silu", "Qwen2ForCausalLM", "llama3", "yarn", "F32", "a\nb", "../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def refused_in_one_line(function, *arguments):
    """Call it: any result will do, and so will a ValueError of one line."""
    try:
        return function(*arguments)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1, str(error)


def damaged(content: bytes, data) -> bytes:
    """A file with a piece cut off, changed, doubled or put in."""
    start = data.draw(st.integers(0, len(content)), "start")
    end = data.draw(st.integers(start, min(len(content), start + 40)), "end")
    new = data.draw(st.binary(max_size=8) | st.just(content[start:end] * 2) | st.just(b"[" * 3_000), "new")
    return content[:start] + (b"" if data.draw(st.booleans(), "cut") else new + content[end:])


# ---------------------------------------------------------------- prompts

ROWS = [{"problem": "Make 3 from 1 1 1:", "answer": "3"}, {"problem": "é\u2028", "answer": "#### 4,000"}]


@settings(FILES, max_examples=300)
@given(st.data())
def test_damaged_jsonl(tmp_path, data):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(damaged("".join(json.dumps(row) + "\n" for row in ROWS).encode(), data))
    refused_in_one_line(validate_prompt_file, path)


@settings(FILES, max_examples=200)
@given(st.lists(JSON | st.fixed_dictionaries({"problem": JSON, "answer": JSON}), max_size=3))
def test_jsonl_of_any_values(tmp_path, rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused_in_one_line(validate_prompt_file, path)


@settings(FILES, max_examples=150)
@given(st.data())
def test_damaged_parquet(tmp_path, data):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "prompts.parquet"
    if not path.exists():
        columns = {key: [row[key] for row in ROWS] * 20 for key in ROWS[0]}
        parquet.write_table(pyarrow.table(columns), path)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(damaged(path.read_bytes(), data))
    refused_in_one_line(validate_prompt_file, broken)


@settings(FILES, max_examples=100)
@given(st.text(st.characters(categories=["L", "N", "P", "Z", "C", "S"], codec=None), min_size=1, max_size=8))
@example("\ud800")
def test_what_a_prompt_file_gives_is_text_that_can_be_written(tmp_path, text):
    """JSON can spell half a character, which no tokenizer takes."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"problem": text, "answer": "1"}) + "\n")
    if refused_in_one_line(validate_prompt_file, path) is not None:
        text.encode()


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% for %}", "{{ messages[9].content }}", "{{ raise_exception('a\nb') }}"]
)
def test_a_broken_chat_template_is_one_line(tmp_path, template):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from siren_megatron.data.prompts import load_prompts

    plain = Tokenizer(models.WordLevel({"<eos>": 0, "?": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", unk_token="?")
    tokenizer.chat_template = template
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ValueError, match="line 1: the tokenizer's chat template fails on it") as caught:
        load_prompts(path, tokenizer, max_prompt_length=64)
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------- checkpoints

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "sliding_window": None,
    "max_window_layers": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def test_the_configuration_is_right_before_it_is_damaged():
    assert Architecture.of(CONFIG).experts == 4


@settings(max_examples=500)
@given(
    st.dictionaries(st.sampled_from(sorted(CONFIG)), JSON, max_size=3),
    st.sampled_from(["Qwen3MoeForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"]),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "low_freq_factor"]), JSON, max_size=3),
)
def test_config_json_of_any_values(changes, name, rope):
    config = {**CONFIG, "architectures": [name], **changes}
    if rope:
        config["rope_scaling"] = rope
    architecture = refused_in_one_line(Architecture.of, config)
    if architecture is not None:
        refused_in_one_line(architecture.check_length, 128)


@settings(FILES, max_examples=200)
@given(st.data())
def test_damaged_config_json(tmp_path, data):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_bytes(damaged(json.dumps(CONFIG).encode(), data))
    config = refused_in_one_line(read_hf_config, tmp_path)
    if config is not None:
        refused_in_one_line(Architecture.of, config)


@settings(FILES, max_examples=200)
@given(
    JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.text(max_size=5), JSON)}), st.data()
)
def test_index_of_any_values(tmp_path, index, data):
    content = json.dumps(index).encode()
    if data.draw(st.booleans()):
        content = damaged(content, data)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    refused_in_one_line(HfReader, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_files(tmp_path, name):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", unk_token="?").save_pretrained(
        tmp_path
    )
    assert load_tokenizer(tmp_path).encode("b a") == [2, 1]
    content = (tmp_path / name).read_bytes()

    @settings(FILES, max_examples=60)
    @given(st.data())
    def load(data):
        (tmp_path / name).write_bytes(damaged(content, data))
        refused_in_one_line(load_tokenizer, tmp_path)

    load()


# ---------------------------------------------------------------- answers

WORDS = st.sampled_from(
    [*"0123456789", "12", "-3", "+", "-", "×", "=", "100", "<|endoftext|>", "\n", "é", "１"]
)
COUNTDOWN = st.lists(WORDS, max_size=14).map(" ".join) | st.text(max_size=60)
LATEX_PIECES = (
    r"\boxed{ } { ( ) [ ] \frac \sqrt ^ _ \left( \right) \cdot x y 1 23 0.5 -7 1,000 \pi \infty = < , $ \( \)"
    r" #### answer the is: \text{no} \{ \} \\ % & \begin{matrix} \end{matrix} \int \sum ! ** 9**9"
    r" __import__('os')"
).split()
LATEX = st.lists(st.sampled_from(LATEX_PIECES) | st.text(max_size=3), max_size=14).map("".join)


@settings(max_examples=500)
@given(COUNTDOWN, st.sampled_from(countdown.enumerate_instances()))
def test_countdown_answers(response, instance):
    reward = countdown_reward(response, countdown.render_prompt(instance))
    assert reward in (0.0, 1.0)
    assert exact_reward(response, response) == 1.0
    words = response.strip().removesuffix(countdown.END_OF_TEXT).split()
    assert reward == float(" ".join(words) in countdown.solve(instance)), (
        "a reward is a solution, word by word"
    )


@given(st.text(max_size=80))
def test_countdown_instances(text):
    assume(not countdown._PROMPT.fullmatch(text.strip()))
    with pytest.raises(ValueError) as caught:
        countdown.parse_instance(text)
    assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=500)
@given(LATEX)
def test_final_answers_are_pieces_of_the_response(response):
    answer = extract_final_answer(response)
    assert answer is None or answer in response


def test_math_answers(tmp_path):
    """The real workers: no answer takes more than its own reward with it."""
    with RewardPool("math", num_workers=2, time_limit_s=5.0) as pool:

        @settings(max_examples=8)
        @given(st.lists(st.tuples(LATEX, LATEX), min_size=25, max_size=25))
        def grade(pairs):
            # The last pair is right, and has to stay so whatever stands before it.
            result = pool.score([*pairs, (r"\boxed{\frac{1}{2}}", "0.5")])
            assert len(result.rewards) == 26 and set(result.rewards) <= {0.0, 1.0}
            assert result.rewards[-1] == 1.0
            assert result.first_error is None or len(result.first_error.splitlines()) == 1

        grade()
