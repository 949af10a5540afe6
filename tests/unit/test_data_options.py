"""Options of prompts and rewards: what contradicts what, and reward files checked without running them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from siren_megatron.config import Config, build_parser
from siren_megatron.data.options import DataOptions, check_data, check_reward_function
from tests.checkpoints import write_prompts


@pytest.fixture
def prompts(tmp_path):
    records = [{"problem": "1+1", "answer": "2"}]
    return [write_prompts(tmp_path / f"{name}.jsonl", records) for name in "abc"]


def parse(*argv):
    return Config.of(
        **vars(build_parser().parse_args(["--hf-checkpoint", "m", "--save", "s", *map(str, argv)]))
    )


def test_several_files_arrive_as_a_tuple():
    for argv in (["--prompt-data", "a", "b"], ["--prompt-data", "a", "--prompt-data", "b"]):
        data = parse(*argv, "--prompt-weights", "0.7", "3").data
        assert data.prompt_data == (Path("a"), Path("b"))
        assert data.prompt_weights == (0.7, 3.0)
    flat = parse("--prompt-data", "a", "b", "--prompt-weights", "0.7", "3").flat()
    assert flat["prompt_data"] == ["a", "b"] and flat["prompt_weights"] == [0.7, 3.0]
    assert json.loads(json.dumps(flat)) == flat


def test_one_path_is_what_it_was(tmp_path):
    config = Config.of(hf_checkpoint=tmp_path, save=tmp_path, prompt_data=tmp_path / "a")
    assert config.data.prompt_data == (tmp_path / "a",)
    assert config.flat()["prompt_data"] == str(tmp_path / "a")
    assert config.flat()["prompt_weights"] is None
    assert config.data.reward == config.data.reward_name == "math"


def test_the_rewards_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataOptions(prompt_data=Path("a"), reward_function="own:x.py:grade")
    assert data.reward is None and data.reward_name == f"{tmp_path / 'own:x.py'}:grade"
    assert DataOptions(prompt_data=Path("a"), reward="exact").reward_name == "exact"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Question: {prompt}\nAnswer:", "Question: {prompt}\nAnswer:"),
        ("Question: {prompt}\nAnswer:", "Question: {prompt}\nAnswer:"),
        (r"\\neq {prompt} \boxed{}", r"\neq {prompt} \boxed{}"),
    ],
)
def test_line_breaks_of_a_template(text, expected):
    assert DataOptions(prompt_data=Path("a"), prompt_template=text).template_text == expected


WRONG = [
    ({"prompt_template": "Q: {problem}"}, "--prompt-template 'Q: {problem}'", "{prompt}"),
    ({"prompt_template": "{prompt}", "prompt_system": "s"}, "--prompt-template", "--prompt-system"),
    ({"prompt_template": "{prompt}", "prompt_chat_template": True}, "--prompt-template", "chat-template"),
    ({"prompt_system": "s", "prompt_chat_template": False}, "--prompt-system", "--no-prompt-chat-template"),
    ({"tokenizer": "t.model", "prompt_system": "s"}, "--tokenizer", "--prompt-system"),
    ({"tokenizer": "t.model", "prompt_chat_template": True}, "--tokenizer", "--prompt-chat-template"),
    ({"tokenizer": "no.model"}, "--tokenizer", "no such directory or file"),
    ({"tokenizer": "a.jsonl"}, "--tokenizer", "neither a directory nor a SentencePiece .model file"),
    ({"prompt_weights": (1.0, 2.0)}, "--prompt-weights has 2", "the 3 file(s) of --prompt-data"),
    ({"prompt_data": ()}, "--prompt-data names no file", ""),
    ({"prompt_data": ("a.jsonl", "./a.jsonl")}, "--prompt-data names", "twice"),
    ({"prompt_data": ("a.jsonl", "missing.jsonl")}, "--prompt-data missing.jsonl", "No such file"),
    ({"reward": "math", "reward_function": "r.py:grade"}, "--reward math", "--reward-function r.py:grade"),
    ({"reward_function": "no.py:grade"}, "--reward-function no.py:grade", "No such file"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "first", "second"), WRONG, ids=[" ".join(o) for o, *_ in WRONG])
def test_contradictions_name_both_flags(tmp_path, monkeypatch, prompts, options, first, second):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.model").write_bytes(b"")
    (tmp_path / "r.py").write_text("def grade(response, answer): return 1.0")
    paths = {name: Path(options[name]) for name in ("tokenizer",) if name in options}
    data = DataOptions(**{"prompt_data": prompts, **options, **paths})
    with pytest.raises(ValueError) as error:
        check_data(data)
    assert first in str(error.value) and second in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_contradict_is_accepted(tmp_path, prompts):
    (tmp_path / "r.py").write_text("raise SystemExit('the check runs nothing')\ndef grade(r, a): return 1.0")
    (tmp_path / "t.model").write_bytes(b"")
    check_data(
        DataOptions(
            prompt_data=prompts,
            prompt_weights=[1, 2, 0.5],
            prompt_template="{prompt}",
            prompt_chat_template=False,
            tokenizer=tmp_path / "t.model",
            reward_function=f"{tmp_path / 'r.py'}:grade",
        )
    )


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "much"])
def test_weights_out_of_range(weight, tmp_path):
    from siren_megatron.config import _check_bounds

    with pytest.raises(ValueError, match="--prompt-weights"):
        _check_bounds(parse("--prompt-data", "a", "b", "--prompt-weights", "1", weight))


@pytest.mark.parametrize(
    "source",
    [
        "def grade(response, answer): return 1.0",
        "def grade(*texts): return 1.0",
        "def grade(response, answer, scale=1, *, strict=False): return 1.0",
        "from elsewhere import reward as grade",
        "grade = lambda response, answer: 1.0",
        "first, (grade, second) = make()",
        "class grade: pass",
        "try:\n    from fast import grade\nexcept ImportError:\n    def grade(r, a): return 1.0",
        "@decorated\ndef grade(config): return 1.0",
    ],
)
def test_files_that_define_the_reward(tmp_path, source):
    (tmp_path / "r.py").write_text(source)
    check_reward_function(f"{tmp_path / 'r.py'}:grade")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(): pass", "the file defines no grade at its top level"),
        ("def other():\n    def grade(r, a): pass", "the file defines no grade at its top level"),
        ("grade: float", "the file defines no grade at its top level"),
        ("x = 1\ndef grade(:", "line 2: not Python"),
        ("\0", "not Python"),
        ("async def grade(r, a): return 1.0", "grade is async"),
        ("def grade(response): return 1.0", "cannot be called as grade(response, answer)"),
        ("def grade(a, b, c): return 1.0", "cannot be called as grade(response, answer)"),
        ("def grade(a, b, *, c): return 1.0", "cannot be called as grade(response, answer)"),
    ],
)
def test_files_that_do_not(tmp_path, source, message):
    spec = f"{tmp_path / 'r.py'}:grade"
    (tmp_path / "r.py").write_text(source)
    with pytest.raises(ValueError) as error:
        check_reward_function(spec)
    assert str(error.value).startswith(f"--reward-function {spec}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["r.py", "r:grade", "r.py:", "r.py:not a name", ":grade", ""])
def test_the_form_of_a_reward_function(spec):
    with pytest.raises(ValueError, match="not of the form path.py:name"):
        check_reward_function(spec)
