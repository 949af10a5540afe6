"""Prompt files, tokenised prompts and the cursor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pyarrow_parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from siren_megatron.data.prompts import (
    MixtureCursor,
    PromptCursor,
    data_fingerprint,
    final_answer,
    join_datasets,
    load_prompts,
    load_tokenizer,
    make_cursor,
    read_jsonl_field,
    validate_prompt_file,
)

REPOSITORY = Path(__file__).resolve().parents[2]
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
WORDS = ["<eos>", "<unk>", *(f"w{n}" for n in range(10)), "user:", "system:", "bot:"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture
def write(tmp_path):
    def write(*records, name="data.jsonl"):
        path = tmp_path / name
        lines = (r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in records)
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


def test_prompts_in_the_files_order(tokenizer, write):
    path = write({"problem": "w1 w2", "answer": "3"}, b"  ", {"problem": "w4", "answer": 5})
    dataset = load_prompts(path, tokenizer, max_prompt_length=2)
    assert [(p.index, p.token_ids, p.text, p.answer) for p in dataset.prompts] == [
        (0, (3, 4), "w1 w2", "3"),
        (1, (6,), "w4", "5"),
    ]
    assert dataset.num_skipped_too_long == 0
    assert validate_prompt_file(path) == 2


def test_too_long_prompts_are_left_out_and_counted(tokenizer, write):
    records = [{"prompt": "w1 " * n, "answer": str(n)} for n in (3, 1, 4, 2)]
    dataset = load_prompts(write(*records), tokenizer, max_prompt_length=2)
    assert [(p.index, p.answer) for p in dataset.prompts] == [(0, "1"), (1, "2")]
    assert dataset.num_skipped_too_long == 2
    with pytest.raises(ValueError, match="all 4 prompts are longer than 0 tokens"):
        load_prompts(write(*records), tokenizer, max_prompt_length=0)


@pytest.mark.parametrize(
    ("record", "problem", "answer"),
    [
        ({"prompt": "w3", "question": "w2", "problem": "w1", "solution": "s", "answer": "a"}, "w1", "a"),
        ({"prompt": "w3", "question": "w2", "solution": "s"}, "w2", "s"),
        ({"prompt": "w3", "label": "l", "ground_truth": "g"}, "w3", "g"),
    ],
)
def test_keys_are_found_in_their_order(tokenizer, write, record, problem, answer):
    (prompt,) = load_prompts(write(record), tokenizer, max_prompt_length=9).prompts
    assert (prompt.text, prompt.answer) == (problem, answer)


def test_keys_may_be_named(tokenizer, write):
    path = write({"problem": "w1", "answer": "a", "task": "w2", "gold": "b"})
    (prompt,) = load_prompts(
        path, tokenizer, prompt_key="task", answer_key="gold", max_prompt_length=9
    ).prompts
    assert (prompt.text, prompt.answer) == ("w2", "b")
    with pytest.raises(ValueError, match="line 1: no field 'other'"):
        validate_prompt_file(path, prompt_key="other")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 2+2 = <<2+2=4>>4.\n#### 4", "4"),
        ("#### 1\n#### 1,234,567", "1234567"),
        ("####   -12,000.50 ", "-12000.50"),
        ("#### (1,2)", "(1,2)"),
        ("(1,234)", "(1,234)"),
        (r" \frac{1}{2} ", r"\frac{1}{2}"),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"problem": "w1", ', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["problem"]', "not a JSON object but list"),
        (b'{"answer": "1"}', "no field 'problem'"),
        (b'{"problem": "w1"}', "no field 'answer'"),
        (b'{"problem": ["w1"], "answer": "1"}', "field 'problem' is not text but list"),
        (b'{"problem": 1, "answer": "1"}', "field 'problem' is not text but int"),
        (b'{"problem": "w1", "answer": null}', "field 'answer' is not text but NoneType"),
        (b'{"problem": "w1", "answer": true}', "field 'answer' is not text but bool"),
        (b'{"problem": "w1", "answer": 0.5}', "field 'answer' is not text but float"),
        (b'{"problem": " ", "answer": "1"}', "field 'problem' is empty"),
        (b'{"problem": "w1", "answer": "so it is ####"}', "field 'answer' has no final answer"),
    ],
)
def test_a_broken_line_is_named(tokenizer, write, line, message):
    path = write({"problem": "w1", "answer": "1"}, b"", line)
    for read in (
        lambda: validate_prompt_file(path),
        lambda: load_prompts(path, tokenizer, max_prompt_length=9),
    ):
        with pytest.raises(ValueError) as caught:
            read()
        assert str(caught.value).startswith(f"--prompt-data {path}, line 3: {message}")
        assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path, write):
    with pytest.raises(ValueError, match=r"--prompt-data .*missing\.jsonl: No such file"):
        validate_prompt_file(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r"--eval-data .*: Is a directory"):
        validate_prompt_file(tmp_path, flag="--eval-data")
    with pytest.raises(ValueError, match="no records in it"):
        validate_prompt_file(write(b"", b"  "))
    with pytest.raises(ValueError, match="line 1: none of the fields problem, question, prompt is there"):
        validate_prompt_file(write({"text": "w1", "answer": "1"}))
    with pytest.raises(ValueError, match=r"--text-data .*, line 2: no field 'q'"):
        read_jsonl_field(write({"q": "a"}, {"p": "b"}), "q", flag="--text-data")


def test_a_byte_order_mark_is_no_fault(write):
    assert validate_prompt_file(write(b'\xef\xbb\xbf{"problem": "w1", "answer": "1"}')) == 1


def test_the_chat_template(tokenizer, write):
    path = write({"problem": "w1", "answer": "1"})
    assert load_prompts(path, tokenizer, max_prompt_length=9).prompts[0].text == "w1"
    with pytest.raises(ValueError, match="the tokenizer has none"):
        load_prompts(path, tokenizer, apply_chat_template=True, max_prompt_length=9)
    with pytest.raises(ValueError, match="a system prompt needs a chat template"):
        load_prompts(path, tokenizer, system_prompt="w2", max_prompt_length=9)

    tokenizer.chat_template = TEMPLATE
    (prompt,) = load_prompts(path, tokenizer, max_prompt_length=9).prompts
    assert prompt.text == "user: w1 bot:"
    assert [WORDS[n] for n in prompt.token_ids] == ["user:", "w1", "bot:"]
    (prompt,) = load_prompts(path, tokenizer, system_prompt="w2", max_prompt_length=9).prompts
    assert prompt.text == "system: w2 user: w1 bot:"
    (prompt,) = load_prompts(path, tokenizer, apply_chat_template=False, max_prompt_length=9).prompts
    assert prompt.text == "w1"


def test_a_plain_template(tokenizer, write):
    tokenizer.chat_template = TEMPLATE
    path = write({"problem": "w1 {w2} {prompt}", "answer": "1"})
    (prompt,) = load_prompts(
        path, tokenizer, template="user: {prompt} w3 {x} bot:", max_prompt_length=9
    ).prompts
    assert prompt.text == "user: w1 {w2} {prompt} w3 {x} bot:"
    with pytest.raises(ValueError, match=r"--prompt-template 'w1' holds no \{prompt\}"):
        load_prompts(path, tokenizer, template="w1", max_prompt_length=9)
    for more in ({"system_prompt": "w1"}, {"apply_chat_template": True}):
        with pytest.raises(ValueError, match="--prompt-template takes no --prompt-system and no"):
            load_prompts(path, tokenizer, template="{prompt}", max_prompt_length=9, **more)


@pytest.fixture
def write_parquet(tmp_path):
    def write(columns, name="data.parquet", **options):
        pyarrow_parquet.write_table(pyarrow.table(columns), tmp_path / name, **options)
        return tmp_path / name

    return write


def test_parquet_holds_what_jsonl_holds(tokenizer, write, write_parquet):
    records = [{"problem": f"w{n % 10} w1", "answer": n, "level": 1.5} for n in range(3000)]
    parquet = write_parquet(
        {key: [record[key] for record in records] for key in records[0]}, row_group_size=700
    )
    ours, theirs = (load_prompts(path, tokenizer, max_prompt_length=9) for path in (parquet, write(*records)))
    assert len(ours) == 3000 and ours == theirs
    assert validate_prompt_file(parquet) == 3000
    other = write_parquet({"task": ["w1"], "gold": ["so\n#### 1,000"]}, "OTHER.PARQUET")
    (prompt,) = load_prompts(
        other, tokenizer, prompt_key="task", answer_key="gold", max_prompt_length=9
    ).prompts
    assert (prompt.text, prompt.answer) == ("w1", "1000")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"problem": ["w1", "w2"], "answer": ["1", None]},
            ", row 2: field 'answer' is not text but NoneType",
        ),
        ({"problem": ["w1", " "], "answer": ["1", "2"]}, ", row 2: field 'problem' is empty"),
        ({"problem": ["w1"], "answer": [0.5]}, ", row 1: field 'answer' is not text but float"),
        ({"prompt": [[{"role": "user"}]], "answer": ["1"]}, ", row 1: field 'prompt' is not text but list"),
        ({"problem": ["w1"]}, ", row 1: none of the fields answer, solution, ground_truth, label is there"),
        ({"text": ["w1"]}, ", row 1: none of the fields problem, question, prompt is there"),
        ({"problem": [], "answer": []}, ": no records in it"),
    ],
)
def test_a_broken_row_is_named(write_parquet, columns, message):
    path = write_parquet(columns)
    with pytest.raises(ValueError) as caught:
        validate_prompt_file(path)
    assert str(caught.value) == f"--prompt-data {path}{message}"


def test_files_that_are_not_parquet(tmp_path, write_parquet):
    whole = write_parquet({"problem": ["w1"] * 5000, "answer": [str(n) for n in range(5000)]}).read_bytes()
    path = tmp_path / "wrong.parquet"
    for content in (b"", b'{"problem": "w1", "answer": "1"}', whole[:-100], whole[200:]):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            validate_prompt_file(path)
        assert str(caught.value).startswith(f"--prompt-data {path}: not a Parquet file that can be read")
        assert "\n" not in str(caught.value)
    for byte in range(
        4, 2000, 37
    ):  # a page that is broken may still hold text, but never ends in a traceback
        path.write_bytes(whole[:byte] + bytes(16) + whole[byte + 16 :])
        try:
            validate_prompt_file(path)
        except ValueError as error:
            assert str(error).startswith(f"--prompt-data {path}") and "\n" not in str(error)
    with pytest.raises(ValueError, match=r"missing\.parquet: No such file"):
        validate_prompt_file(tmp_path / "missing.parquet")


def test_several_files_end_to_end(tokenizer, write):
    files = [[3, 1, 9], [9, 2], [1]]
    paths = [
        write(*({"problem": "w1 " * n, "answer": f"{k}:{n}"} for n in lengths), name=f"{k}.jsonl")
        for k, lengths in enumerate(files)
    ]
    dataset = join_datasets([load_prompts(path, tokenizer, max_prompt_length=5) for path in paths])
    assert [p.answer for p in dataset.prompts] == ["0:3", "0:1", "1:2", "2:1"]
    assert [p.index for p in dataset.prompts] == [0, 1, 2, 3]
    assert (dataset.num_skipped_too_long, dataset.sizes) == (2, (2, 1, 1))
    with pytest.raises(ValueError, match=r"1\.jsonl: all 2 prompts are longer than 1 tokens"):
        [load_prompts(path, tokenizer, max_prompt_length=1) for path in paths]


def test_the_fingerprint_sees_every_change(tokenizer, write):
    records = [{"problem": "w1", "answer": "1"}, {"problem": "w2", "answer": "2"}]

    def fingerprint(*records):
        return load_prompts(write(*records), tokenizer, max_prompt_length=9).fingerprint()

    prints = {
        fingerprint(*records),
        fingerprint(*reversed(records)),
        fingerprint(records[0]),
        fingerprint(records[0], {"problem": "w2", "answer": "3"}),
        fingerprint(records[0], {"problem": "w3", "answer": "2"}),
    }
    assert len(prints) == 5
    assert fingerprint(*records) in prints
    assert data_fingerprint(["ab", "c"]) != data_fingerprint(["a", "bc"])


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"--hf-checkpoint .*: no such directory"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"--hf-checkpoint .*: no tokenizer loads from it"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_file_is_taken_as_it_is(tokenizer, tmp_path):
    # AutoTokenizer would rebuild a Qwen2Tokenizer here and drop the word splitting.
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert load_tokenizer(tmp_path)("w1 w2")["input_ids"] == [3, 4]


def test_checking_a_file_imports_nothing_heavy(write):
    path = write({"problem": "w1", "answer": "1"})
    code = (
        "import sys; from siren_megatron.data.prompts import validate_prompt_file; "
        f"validate_prompt_file({str(path)!r}); "
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not beside the repository (../shared/data)")
def test_gsm8k(tokenizer):
    assert validate_prompt_file(GSM8K) == 7473
    tokenizer.chat_template = TEMPLATE
    dataset = load_prompts(GSM8K, tokenizer, max_prompt_length=10_000)
    assert len(dataset) == 7473 and dataset.num_skipped_too_long == 0
    assert dataset.prompts[0].answer == "72"
    assert dataset.prompts[0].text.startswith("user: Natalia sold clips")
    for prompt in dataset.prompts:
        float(prompt.answer)


@given(
    num_prompts=st.integers(1, 30), takes=st.lists(st.integers(0, 20), max_size=20), seed=st.integers(0, 9)
)
def test_the_cursors_order_does_not_depend_on_how_many_are_taken(num_prompts, takes, seed):
    in_parts = PromptCursor(num_prompts, seed=seed)
    taken = [index for n in takes for index in in_parts.next(n)]
    assert taken == PromptCursor(num_prompts, seed=seed).next(sum(takes))


@given(num_prompts=st.integers(1, 30), before=st.integers(0, 70), after=st.integers(0, 70))
def test_the_cursor_resumes_exactly(num_prompts, before, after):
    cursor = PromptCursor(num_prompts, seed=5)
    cursor.next(before)
    state = json.loads(json.dumps(cursor.state_dict()))
    resumed = PromptCursor(num_prompts, seed=99, shuffle=False)
    resumed.load_state_dict(state)
    assert resumed.next(after) == cursor.next(after)
    assert resumed.state_dict() == cursor.state_dict()
    assert resumed.epoch == cursor.epoch == (before + after) // num_prompts


def test_each_epoch_is_a_permutation_of_its_own():
    cursor = PromptCursor(50, seed=1)
    epochs = [cursor.next(50) for _ in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert PromptCursor(50, seed=2).next(50) not in epochs
    assert PromptCursor(4, seed=1, shuffle=False).next(6) == [0, 1, 2, 3, 0, 1]


def test_no_place_in_the_epoch_is_favoured():
    # 3 prompts over 600 epochs: each stands first about 200 times (five sigma is 58).
    cursor = PromptCursor(3, seed=0)
    first = Counter(cursor.next(3)[0] for _ in range(600))
    assert all(abs(first[n] - 200) < 58 for n in range(3))


def test_states_of_other_data_are_refused():
    state = PromptCursor(10, seed=1).state_dict()
    with pytest.raises(ValueError, match="goes over 10 prompts, but the prompt data now has 11"):
        PromptCursor(11, seed=1).load_state_dict(state)
    for wrong in ({}, {**state, "more": 1}, {**state, "position": 11}, {**state, "epoch": -1}):
        with pytest.raises(ValueError, match="not the state of a prompt cursor"):
            PromptCursor(10, seed=1).load_state_dict(wrong)
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptCursor(0, seed=1)


SIZES = st.lists(st.integers(1, 12), min_size=2, max_size=4)


@given(sizes=SIZES, takes=st.lists(st.integers(0, 20), max_size=10), seed=st.integers(0, 9))
def test_a_mixtures_order_does_not_depend_on_how_many_are_taken(sizes, takes, seed):
    in_parts = make_cursor(sizes, seed=seed)
    taken = [index for n in takes for index in in_parts.next(n)]
    assert taken == make_cursor(sizes, seed=seed).next(sum(takes))


@given(sizes=SIZES, before=st.integers(0, 70), after=st.integers(0, 70), data=st.data())
def test_a_mixture_resumes_exactly(sizes, before, after, data):
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)))
    cursor = MixtureCursor(sizes, weights, seed=5)
    cursor.next(before)
    state = json.loads(json.dumps(cursor.state_dict()))
    resumed = MixtureCursor(sizes, weights, seed=99)
    resumed.next(3)
    resumed.load_state_dict(state)
    assert resumed.next(after) == cursor.next(after)
    assert resumed.state_dict() == cursor.state_dict() and resumed.epochs == cursor.epochs


@given(sizes=SIZES, num=st.integers(0, 100), seed=st.integers(0, 9))
def test_each_file_of_a_mixture_runs_through_its_own_epochs(sizes, num, seed):
    cursor = make_cursor(sizes, seed=seed)
    taken = cursor.next(num)
    assert len(taken) == num and all(0 <= index < cursor.num_prompts for index in taken)
    begin = 0
    for size, epoch in zip(sizes, cursor.epochs, strict=True):
        own = [index - begin for index in taken if begin <= index < begin + size]
        epochs = [own[n : n + size] for n in range(0, len(own), size)]
        assert all(sorted(whole) == list(range(size)) for whole in epochs[: len(own) // size])
        assert len(set(epochs[-1] if epochs else [])) == (len(epochs[-1]) if epochs else 0)
        assert epoch == len(own) // size
        begin += size


def test_a_mixture_keeps_its_weights():
    # 4000 draws of shares 0.7, 0.2, 0.1: five sigma of the largest share is 145.
    cursor = make_cursor([10, 1000, 3], seed=0, weights=[7, 2, 1])
    counts = Counter((index >= 10) + (index >= 1010) for index in cursor.next(4000))
    assert all(abs(counts[n] - share) < 145 for n, share in enumerate((2800, 800, 400)))
    # Without weights every prompt counts alike.
    counts = Counter(index >= 100 for index in make_cursor([100, 300], seed=0).next(4000))
    assert abs(counts[True] - 3000) < 137
    assert make_cursor([5, 5], seed=1).next(50) != make_cursor([5, 5], seed=2).next(50)


def test_files_of_one_size_have_orders_of_their_own():
    taken = make_cursor([50, 50], seed=1).next(1000)
    first, second = [n for n in taken if n < 50][:50], [n - 50 for n in taken if n >= 50][:50]
    assert sorted(first) == sorted(second) and first != second


def test_one_file_has_the_cursor_it_had():
    assert make_cursor([20], seed=3, weights=[0.5]).state_dict() == PromptCursor(20, seed=3).state_dict()
    assert make_cursor([20], seed=3).next(50) == PromptCursor(20, seed=3).next(50)


def test_states_of_other_mixtures_are_refused():
    state = make_cursor([3, 4], seed=1).state_dict()
    with pytest.raises(ValueError, match="--load: .* goes over 2 files, --prompt-data names one"):
        PromptCursor(3, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="--load: .* goes over 2 files, --prompt-data names 3"):
        make_cursor([3, 4, 5], seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="--load: .* goes over one file, --prompt-data names 2"):
        make_cursor([3, 4], seed=1).load_state_dict(PromptCursor(3, seed=1).state_dict())
    with pytest.raises(ValueError, match="file 2 of --prompt-data: .* 4 prompts, but .* now has 5"):
        make_cursor([3, 5], seed=1).load_state_dict(state)
    for wrong in ({}, {**state, "more": 1}, {**state, "num_drawn": -1}):
        with pytest.raises(ValueError, match="not the state of a mixture's cursor"):
            make_cursor([3, 4], seed=1).load_state_dict(wrong)
    for sizes, weights in (([], []), ([1, 2], [1]), ([1, 2], [1, 0]), ([1, 2], [1, float("nan")])):
        with pytest.raises(ValueError):
            MixtureCursor(sizes, weights, seed=1)


def test_new_weights_hold_from_the_resume_on():
    cursor = make_cursor([5, 5], seed=1, weights=[1, 1])
    cursor.next(20)
    resumed = make_cursor([5, 5], seed=1, weights=[1, 1e-12])
    resumed.load_state_dict(cursor.state_dict())
    assert max(resumed.next(50)) < 5
