"""Rewards and the pool that computes them: values, hostile inputs, and processes that go away."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from siren_megatron.rewards.functions import (
    REWARDS,
    RewardPool,
    RewardResult,
    exact_reward,
    extract_final_answer,
    math_reward,
    resolve_reward,
)

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY.parent / "shared" / "data" / "benchmarks"
HOSTILE = "tests.unit.hostile_rewards:act"


@pytest.fixture(scope="module")
def math_pool():
    with RewardPool("math", num_workers=2, time_limit_s=3) as pool:
        yield pool


def test_countdown_reward():
    reward = REWARDS["countdown"]
    assert reward("12 - 5 = 7 7 × 2 = 14", "Make 14 from 2 5 12:") == 1.0
    assert reward("12 - 5 = 7 7 + 2 = 9", "Make 14 from 2 5 12:") == 0.0
    with pytest.raises(ValueError, match="not a Countdown instance"):
        reward("12 - 5 = 7 7 × 2 = 14", "14")


def test_exact_reward():
    assert exact_reward(" B\n", "B") == 1.0
    assert exact_reward("b", "B") == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} and cut off \boxed{4", "3"),
        (r"\boxed {\{1,2\}}", r"\{1,2\}"),
        ("7 in all\n#### 1,234\n", "1,234"),
        ("The answer is 12. Check: 3 * 4 = 12, not 13.", "12"),
        ("The final answer is: $x = \\frac{3}{4}$.", r"x = \frac{3}{4}"),
        ("Answer: (C)", "(C)"),
        ("He pays 3 + 4 = 7 dollars", "7"),
        ("so it is -2.5", "-2.5"),
        ("It is $\\sqrt{2}$", r"\sqrt{2}"),
        ("no number here", None),
        ("", None),
    ],
)
def test_the_final_answer_of_a_response(response, expected):
    assert extract_final_answer(response) == expected


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"\boxed{72}", "72", 1),
        (r"\boxed{072}", "72", 1),
        (r"\boxed{-0}", "0", 1),
        (r"\boxed{73}", "72", 0),
        (r"\boxed{-72}", "72", 0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{\dfrac12}", "0.5", 1),
        (r"\boxed{0.51}", r"\frac{1}{2}", 0),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1),
        (r"\boxed{x^2+2x+2}", "$(x+1)^2$", 0),
        (r"\boxed{2^{10}}", "1024", 1),
        (r"\boxed{x=5}", "5", 1),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", 1),
        (r"\boxed{(2,1)}", "(1,2)", 0),
        (r"\boxed{[0,1)}", "[0,1)", 1),
        (r"\boxed{[0,1]}", "[0,1)", 0),
        (r"\boxed{\text{(C)}}", "C", 1),
        (r"\boxed{\text{(B)}}", "C", 0),
        (r"\boxed{12\text{ cm}}", "12", 1),
        ("The price is $1,000.", "1000", 1),
        ("#### 18", "18", 1),
        ("The answer is 3/4.", "0.75", 1),
        ("I do not know", "0", 0),
        (r"\boxed{}", "0", 0),
        (r"\boxed{\frac{1}{0}}", "0", 0),
        (r"\boxed{" + "9" * 900 + "}", "9" * 900, 1),
        (r"\boxed{" + "9" * 900 + "}", "9" * 899, 0),
    ],
)
def test_math_reward(response, answer, reward):
    assert math_reward(response, answer) == reward


def test_math_reward_runs_no_code_of_the_model(tmp_path):
    target = tmp_path / "touched"
    code = f"open({str(target)!r}, 'w').close()"
    for text in (code, f"exec({code!r})", f"__import__('os').mknod('{target}')", f"1+{code}"):
        for response in (rf"\boxed{{{text}}}", f"#### {text}", f"The answer is {text}", f"$ {text} $"):
            math_reward(response, "1")
            math_reward(response, text)
    assert not target.exists()


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not beside the repository")
def test_math_reward_knows_every_gold_answer_again():
    golds = [
        json.loads(line)["answer"]
        for name in ("aime24", "amc23", "minerva", "olympiadbench")
        for line in (BENCHMARKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(golds) == 1017
    # \displaystyle keeps equal texts from being enough.
    same = [(rf"Hence \boxed{{\displaystyle {gold}}}.", gold) for gold in golds[::6]]
    neighbours = list(zip(golds[::13], golds[1::13], strict=False))
    others = [(rf"\boxed{{{other}}}", gold) for other, gold in neighbours]
    with RewardPool("math", num_workers=2, time_limit_s=60) as pool:
        result = pool.submit(same), pool.submit(others)
        assert [
            pair for pair, reward in zip(same, result[0].result().rewards, strict=True) if reward != 1
        ] == []
        equal = [other == gold for other, gold in neighbours]
        assert [reward == 1 for reward in result[1].result().rewards] == equal


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{9^{9^{9^{9^{9^9}}}}}",
        r"\boxed{9!!!!!!}",
        r"\boxed{" + r"\frac{1}{" * 29 + "2" + "}" * 29 + "}",
        r"\boxed{" + "{" * 5000 + "1" + "}" * 5000 + "}",
        r"\boxed{" * 20_000 + "1",
        r"\boxed{" + "(" * 1_000_000,
        "$" * 1_000_000,
        r"\(" * 300_000,
        "1," * 400_000,
        "9" * 1_000_000,
        "answer is " * 100_000,
        "$" + "a" * 500_000 + "\n" + "$" * 3,
        r"\boxed{\int_0^1 \int_0^1 \int_0^1 e^{xyz\sin(xyz)} dx dy dz}",
        r"\boxed{\sum_{n=1}^{10^{9}} \frac{1}{n^3+n+1}}",
        r"\boxed{(x+1)^{99999}(x-1)^{99999}}",
        "\x00\ud800\uffff",
    ],
)
def test_hostile_text_costs_its_own_reward_only(math_pool, response):
    good = (r"\boxed{\frac{2}{4}}", "0.5")
    result = math_pool.score([good, (response, "x^2-1"), good])
    assert result.rewards == [1.0, 0.0, 1.0]


def test_the_pool_gives_what_the_function_gives():
    pairs = [(str(n), "0") for n in range(1000)]
    with RewardPool(HOSTILE, num_workers=3) as pool:
        assert pool.score(pairs) == RewardResult([float(n) for n in range(1000)], 0, 0)
        assert pool.score([]) == RewardResult([], 0, 0)
        assert pool.score([("print", ""), ("2", "")]).rewards == [1.0, 2.0]


@pytest.mark.parametrize("response", ["loop", "big power"])
def test_a_hang_costs_its_own_reward_only(response):
    pairs = [(str(n), "") for n in range(100)]
    pairs[3] = pairs[40] = pairs[41] = (response, "")
    expected = [0.0 if n in (3, 40, 41) else float(n) for n in range(100)]
    with RewardPool(HOSTILE, num_workers=2, time_limit_s=1) as pool:
        before = set(psutil.Process(pool.supervisor_pid).children())
        result = pool.score(pairs)
        after = set(psutil.Process(pool.supervisor_pid).children())
        assert result == RewardResult(expected, num_timeouts=3, num_errors=0)
        assert len(after) == 2 and after != before


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("crash", "signal 11"),
        ("exit", "exit code 3"),
        ("sys.exit", "exit code"),
        ("raise", "KeyError"),
        ("recurse", "RecursionError"),
        ("memory", "MemoryError"),
        ("nan", "not a finite number"),
        ("text", "the reward is not a number but str"),
    ],
)
def test_an_error_costs_its_own_reward_only_and_is_told(response, message):
    pairs = [(str(n), "") for n in range(40)]
    pairs[5] = pairs[17] = (response, "")
    with RewardPool(HOSTILE, num_workers=1, time_limit_s=30, memory_limit_mb=512) as pool:
        result = pool.score(pairs)
    assert result.rewards == [0.0 if n in (5, 17) else float(n) for n in range(40)]
    assert (result.num_timeouts, result.num_errors) == (0, 2)
    assert message in result.first_error and "\n" not in result.first_error


def test_submissions_are_graded_side_by_side(tmp_path):
    flag = tmp_path / "flag"
    with RewardPool("tests.unit.hostile_rewards:wait_for_file", num_workers=2, time_limit_s=60) as pool:
        slow = pool.submit([(str(flag), "")])
        quick = pool.submit([(str(tmp_path), "")] * 50)
        assert quick.result().rewards == [1.0] * 50
        assert not slow.done()
        with pytest.raises(TimeoutError, match="no rewards after"):
            slow.result(timeout_s=0)
        flag.touch()
        assert slow.result() == RewardResult([1.0], 0, 0)


def test_workers_load_none_of_the_trainers_libraries():
    with RewardPool("tests.unit.hostile_rewards:imports_torch", num_workers=1) as pool:
        assert pool.score([("", "")]).rewards == [0.0]


def test_only_the_end_of_a_long_response_is_graded():
    with RewardPool("tests.unit.hostile_rewards:length", num_workers=1, max_response_chars=100) as pool:
        assert pool.score([("a" * 1000, ""), ("b" * 99, "")]).rewards == [100.0, 99.0]
    with RewardPool("exact", num_workers=1, max_response_chars=4) as pool:
        assert pool.score([("x" * 1000 + "1234", "1234")]).rewards == [1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "maths",
            "--reward maths: neither one of countdown, exact, math, rewrite nor package.module:function",
        ),
        ("no_such_module:reward", "--reward no_such_module:reward: No module named 'no_such_module'"),
        (
            "tests.unit.hostile_rewards:no_such",
            "--reward tests.unit.hostile_rewards:no_such: module 'tests.unit.hostile_rewards' has no",
        ),
        (
            "tests.unit.hostile_rewards:not_callable",
            "--reward tests.unit.hostile_rewards:not_callable: not a function",
        ),
    ],
)
def test_rewards_that_are_not_there(name, message):
    for load in (resolve_reward, RewardPool):
        with pytest.raises(ValueError) as caught:
            load(name)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


OWN_REWARD = """
import dataclasses
import own_reward_helper

@dataclasses.dataclass
class Grade:
    value: float

VALUES = {"none": None, "text": "1", "list": [1.0], "nan": float("nan"), "complex": 1j, "yes": True, "int": 2}

def grade(response, answer):
    if response in VALUES:
        return VALUES[response]
    return Grade(float(response == answer) * own_reward_helper.FULL_MARKS).value
"""


def test_a_function_of_ones_own_file(tmp_path):
    (tmp_path / "own:reward.py").write_text(OWN_REWARD)
    (tmp_path / "own_reward_helper.py").write_text("FULL_MARKS = 3")
    with RewardPool(f"{tmp_path}/own:reward.py:grade", num_workers=1, time_limit_s=30) as pool:
        assert pool.score([("a", "a"), ("a", "b"), ("yes", ""), ("int", "")]) == RewardResult(
            [3.0, 0.0, 1.0, 2.0], 0, 0
        )
        for response, message in (
            ("none", "not a number but NoneType"),
            ("text", "not a number but str"),
            ("list", "not a number but list"),
            ("complex", "not a number but complex"),
            ("nan", "not a finite number"),
        ):
            result = pool.score([("a", "a"), (response, ""), ("a", "a")])
            assert (result.rewards, result.num_errors) == ([3.0, 0.0, 3.0], 1)
            assert message in result.first_error
    assert not any("own" in name and "reward" in name for name in sys.modules if name.startswith("_siren"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "No such file"),
        ("grade = 1", "not a function"),
        ("def other(): pass", "has no attribute 'grade'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_library", "No module named 'no_such_library'"),
        ("def grade(:", "SyntaxError"),
    ],
)
def test_a_file_that_does_not_import_is_one_line(tmp_path, source, message):
    path = tmp_path / "own.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ValueError) as caught:
        RewardPool(f"{path}:grade")
    assert str(caught.value).startswith(f"--reward-function {path}:grade: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "option",
    [{"num_workers": 0}, {"time_limit_s": 0}, {"time_limit_s": float("inf")}, {"memory_limit_mb": 0}],
)
def test_options_out_of_range(option):
    with pytest.raises(ValueError):
        RewardPool("exact", **option)


def test_a_closed_pool_grades_no_more():
    pool = RewardPool(HOSTILE, num_workers=1, time_limit_s=60)
    processes = _family(pool.supervisor_pid)
    unfinished = pool.submit([("loop", "")])
    pool.close()
    pool.close()
    assert not any(process.is_running() for process in processes)
    with pytest.raises(RuntimeError, match="the reward process ended"):
        unfinished.result()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit([("1", "")])


def test_a_killed_supervisor_is_replaced(tmp_path):
    flag = tmp_path / "flag"
    with RewardPool("tests.unit.hostile_rewards:wait_for_file", num_workers=1, time_limit_s=60) as pool:
        pending = pool.submit([(str(flag), "")])
        _kill_and_wait(_family(pool.supervisor_pid))
        flag.touch()
        assert pending.result(timeout_s=60) == RewardResult([1.0], 0, 0)


def test_a_supervisor_that_keeps_dying_is_given_up(tmp_path):
    with RewardPool("tests.unit.hostile_rewards:wait_for_file", num_workers=1, time_limit_s=60) as pool:
        pending = pool.submit([(str(tmp_path / "never"), "")])
        pid = None
        while not pending.done():
            if pool.supervisor_pid != pid:
                pid = pool.supervisor_pid
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="the reward process ended"):
            pending.result()
        with pytest.raises(RuntimeError, match="closed"):
            pool.submit([("1", "")])


CHILD = """
import sys
from siren_megatron.rewards.functions import RewardPool
pool = RewardPool("tests.unit.hostile_rewards:act", num_workers=2, time_limit_s=600)
pool.submit([("loop", ""), ("loop", "")])
print(pool.supervisor_pid, flush=True)
if sys.argv[1] == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_the_processes_end_with_the_trainer(how):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    processes = _family(int(child.stdout.readline()))
    assert len(processes) == 3
    handles = [os.pidfd_open(process.pid) for process in processes]
    if how == "killed":
        child.kill()
    _, errors = child.communicate(timeout=60)
    for handle in handles:
        ready, _, _ = select.select([handle], [], [], 30)
        assert ready, "a reward process outlived the trainer"
        os.close(handle)
    if how == "ended":
        assert (child.returncode, errors) == (0, "")


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children()]


def _kill_and_wait(processes: list[psutil.Process]) -> None:
    handles = [os.pidfd_open(process.pid) for process in processes]
    os.kill(processes[0].pid, signal.SIGKILL)
    for handle in handles:
        assert select.select([handle], [], [], 30)[0]
        os.close(handle)
