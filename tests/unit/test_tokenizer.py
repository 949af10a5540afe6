"""SentencePiece tokenizers, trained here; Hugging Face ones are in test_prompts.py."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from siren_megatron.data.options import DataOptions
from siren_megatron.data.prompts import load_data_tokenizer, load_dataset, load_prompts
from siren_megatron.data.tokenizer import SentencePieceTokenizer, load_tokenizer, replace_tokenizer_files

REPOSITORY = Path(__file__).resolve().parents[2]
SENTENCES = [f"What is {a} plus {b}? The answer is {a + b}." for a in range(30) for b in range(30)]


def train(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        **{"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, **options},
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / "own.model"
    path.write_bytes(train())
    return path


@pytest.fixture(scope="module")
def tokenizer(model_file):
    return load_tokenizer(model_file, flag="--tokenizer")


@given(st.text("0123456789abcdefgh+-*/=()$\\\\{}éß漢🙂", max_size=20))
def test_text_comes_back(tokenizer, text):
    # Characters that the model's NFKC leaves alone; those it never saw go through bytes.
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_the_ids_are_sentencepieces_own(tokenizer, model_file):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    text = "What is 3 plus 4?"
    assert tokenizer.encode(text, add_special_tokens=False) == plain.encode(text)
    assert tokenizer(text)["input_ids"] == [plain.bos_id(), *plain.encode(text)]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (plain.bos_id(), plain.eos_id())
    assert len(tokenizer) == 400 and tokenizer.chat_template is None


def test_special_and_unknown_tokens(tokenizer):
    seven = tokenizer.encode("answer 7", add_special_tokens=False)
    ids = [tokenizer.bos_token_id, *seven, tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "answer 7"
    assert tokenizer.decode(ids) == "<s>answer 7</s>"
    # A padded embedding's token between two digits must not make one number of them.
    one, two = (tokenizer.encode(digit, add_special_tokens=False)[-1] for digit in "12")
    assert "12" not in tokenizer.decode([one, 10_000, two], skip_special_tokens=True)
    assert tokenizer.decode([], skip_special_tokens=True) == ""


def test_a_checkpoint_directory_with_tokenizer_model_only(tmp_path, model_file):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceTokenizer)
    assert loaded.encode("What is 1?") == load_tokenizer(model_file).encode("What is 1?")


def test_models_that_do_not_load(tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(ValueError, match=r"--tokenizer .*t\.model: No such file"):
        load_tokenizer(path, flag="--tokenizer")
    for content in (b"", b"not a model", b'{"version": "1.0"}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"--tokenizer .*t\.model: not a SentencePiece model") as error:
            load_tokenizer(path, flag="--tokenizer")
        assert "\n" not in str(error.value)
    path.write_bytes(train(eos_id=-1))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(path, flag="--tokenizer")


def test_no_begin_of_sequence_is_added_where_there_is_none(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train(bos_id=-1))
    tokenizer = load_tokenizer(path)
    assert tokenizer.bos_token_id is None
    assert tokenizer.encode("What is") == tokenizer.encode("What is", add_special_tokens=False)


def test_prompts_of_a_sentencepiece_model(tmp_path, model_file, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"problem": "3 plus 4?", "answer": "7"}))
    data = DataOptions(
        prompt_data=path, tokenizer=model_file, prompt_template=r"What is {prompt}\nThe answer"
    )
    loaded = load_data_tokenizer(data, tmp_path / "unused")
    (prompt,) = load_dataset(data, loaded, max_prompt_length=99, vocab_size=400).prompts
    assert prompt.text == "What is 3 plus 4?\nThe answer"
    assert list(prompt.token_ids) == tokenizer.encode(prompt.text)
    with pytest.raises(
        ValueError, match=r"--tokenizer .*own\.model: the tokenizer gives token \d+, but the mod"
    ):
        load_dataset(data, loaded, max_prompt_length=99, vocab_size=100)
    with pytest.raises(ValueError, match="--prompt-chat-template: .* the tokenizer has none"):
        load_prompts(path, tokenizer, apply_chat_template=True, max_prompt_length=99)


def test_an_export_gets_the_runs_own_tokenizer(tmp_path, model_file):
    target = tmp_path / "hf"
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (target / name).write_text("{}")
    replace_tokenizer_files(model_file, target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "tokenizer.model"]
    assert isinstance(load_tokenizer(target), SentencePieceTokenizer)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "notes.txt"):
        (source / name).write_text("[]")
    replace_tokenizer_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "merges.txt", "tokenizer.json"]


def test_a_sentencepiece_model_needs_no_transformers(model_file):
    code = (
        "import sys; from siren_megatron.data.prompts import load_tokenizer; "
        f"load_tokenizer({str(model_file)!r}); "
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
