"""The shell scripts: setup_venv.sh's decisions with a fake Python and pip, and what the example starts."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "tools/setup_venv.sh",
    "tests/run.sh",
    "examples/run_siren_cpu.sh",
    "examples/run_siren_7b_tp4.sh",
    "tests/nightly/run.slurm",
    ".ci/run",
)

# Answers to what setup_venv.sh asks of Python; calls that change something are written to $CALLS.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    *"version_info"*) exit "${FAKE_OLD:-0}" ;;
    *"import ensurepip"*) exit "${FAKE_NO_ENSUREPIP:-0}" ;;
    *"libnuma"*) exit "${FAKE_NO_LIBNUMA:-0}" ;;
    --version) echo "Python 3.11.99" ;;
    "-m venv "*)
        echo "venv" >>"$CALLS"
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        echo "VIRTUAL_ENV=\"$3\"" >"$3/bin/activate"
        ;;
    -) cat >/dev/null; printf '%s' "${FAKE_HALF_WRITTEN:-}" ;;
    *"pip install"*)
        all="$*"
        echo "pip ${all#*--no-deps }" >>"$CALLS"
        sleep "${FAKE_PIP_SECONDS:-0}"
        [ -z "${FAKE_PIP_STATUS:-}" ] || echo "ERROR: no such wheel"
        exit "${FAKE_PIP_STATUS:-0}"
        ;;
esac
"""
LOCK_CALL = "pip -r requirements/cpu.lock"
DEV_CALL = "pip -r requirements/cpu.lock -r requirements/dev.lock"
PACKAGE_CALL = "pip --no-build-isolation --editable ."


class Checkout:
    """A copy of what setup_venv.sh needs, with fake interpreters first on PATH."""

    def __init__(self, path):
        self.path = path
        for name in ("tools/setup_venv.sh", "requirements/cpu.lock", "requirements/dev.lock"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, path / name)
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, path / name)
        fake = path / "fake"
        fake.mkdir()
        (fake / "python3.11").write_text(FAKE_PYTHON)
        (fake / "python3.11").chmod(0o755)
        for name in ("python3", "python"):
            (fake / name).symlink_to("python3.11")
        self.calls_file = path / "calls"
        self.environment = {"PATH": f"{fake}:{os.environ['PATH']}", "CALLS": str(self.calls_file)}

    def start(self, *arguments, **environment):
        command = ["bash", self.path / "tools/setup_venv.sh", *arguments]
        self.calls_file.unlink(missing_ok=True)
        pipe = subprocess.PIPE
        environment = self.environment | environment
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *arguments, **environment):
        process = self.start(*arguments, **environment)
        process.out, process.err = process.communicate(timeout=60)
        return process

    @property
    def calls(self):
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def checkout(tmp_path):
    path = tmp_path / "a checkout"  # with a space: everything must be quoted
    path.mkdir()
    return Checkout(path)


def test_first_call_installs_and_the_second_does_nothing(checkout):
    process = checkout.run()
    assert process.returncode == 0, process.err
    assert checkout.calls == ["venv", LOCK_CALL, PACKAGE_CALL]
    assert "is ready" in process.out
    process = checkout.run()
    assert (process.returncode, process.out, process.err, checkout.calls) == (0, "", "", [])


def test_dev_serves_both_and_base_does_not_serve_dev(checkout):
    checkout.run()
    assert checkout.run("--dev").returncode == 0
    assert checkout.calls == [DEV_CALL, PACKAGE_CALL]
    for arguments in ([], ["--dev"]):
        checkout.run(*arguments)
        assert checkout.calls == []


@pytest.mark.parametrize(
    ("name", "for_base"),
    [
        ("requirements/cpu.lock", True),
        ("setup.py", True),
        ("pyproject.toml", True),
        ("requirements/dev.lock", False),
    ],
)
def test_changed_input_makes_it_stale(checkout, name, for_base):
    checkout.run("--dev")
    with open(checkout.path / name, "a") as file:
        file.write("# changed\n")
    checkout.run()
    assert bool(checkout.calls) == for_base
    checkout.run("--dev")
    assert checkout.calls == [DEV_CALL, PACKAGE_CALL]


def test_failed_install_says_so_and_is_gone_on_with(checkout):
    process = checkout.run(FAKE_PIP_STATUS="1")
    assert process.returncode == 1 and "pip failed" in process.err and "no such wheel" in process.err
    assert checkout.run(FAKE_HALF_WRITTEN="torch").returncode == 0
    assert checkout.calls == [LOCK_CALL, PACKAGE_CALL]  # the venv is kept
    checkout.run()
    assert checkout.calls == []


def test_killed_install_is_waited_for_and_repaired(checkout):
    first = checkout.start(FAKE_PIP_SECONDS="2")
    deadline = time.monotonic() + 30
    while LOCK_CALL not in checkout.calls and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = checkout.run(FAKE_HALF_WRITTEN="torch")
    assert second.returncode == 0, second.err
    assert "waiting for it" in second.out and "done again: torch" in second.out
    assert checkout.calls == [LOCK_CALL, PACKAGE_CALL]


def test_two_calls_at_a_time_install_once(checkout):
    processes = [checkout.start(FAKE_PIP_SECONDS="0.5") for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert checkout.calls == ["venv", LOCK_CALL, PACKAGE_CALL]


def test_moved_checkout_is_made_anew(checkout):
    checkout.run()
    moved = checkout.path.with_name("moved")
    checkout.path.rename(moved)
    checkout.path, checkout.calls_file = moved, moved / "calls"
    checkout.environment = {"PATH": f"{moved}/fake:{os.environ['PATH']}", "CALLS": str(moved / "calls")}
    assert checkout.run().returncode == 0
    assert checkout.calls == ["venv", LOCK_CALL, PACKAGE_CALL]


@pytest.mark.parametrize(
    ("lack", "message"),
    [
        ("FAKE_OLD", "needs Python 3.11"),
        ("FAKE_NO_ENSUREPIP", "apt-get install python3.11-venv"),
        ("FAKE_NO_LIBNUMA", "apt-get install libnuma1"),
    ],
)
def test_what_is_missing_is_one_line(checkout, lack, message):
    process = checkout.run(**{lack: "1"})
    assert process.returncode == 1
    assert message in process.err and process.err.count("\n") == 1
    assert not any(call.startswith("pip") for call in checkout.calls)


def test_unknown_argument_is_refused(checkout):
    process = checkout.run("--develop")
    assert process.returncode == 2 and process.err.startswith("usage:") and checkout.calls == []


@pytest.fixture
def example(tmp_path):
    """run_siren_cpu.sh beside stand-ins that write their arguments to `calls`."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(REPOSITORY / "examples/run_siren_cpu.sh", tmp_path / "examples")
    stand_in = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>calls\n'
    python = stand_in + '[[ "$*" == *--lr\\ wrong*--check ]] && exit 2\nexit 0\n'
    for name, text in (
        ("tools/setup_venv.sh", stand_in),
        (".venv/bin/python", python),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments, **environment):
        (tmp_path / "calls").unlink(missing_ok=True)
        command = ["bash", "examples/run_siren_cpu.sh", *arguments]
        environment = os.environ | environment
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        return result, (tmp_path / "calls").read_text().splitlines()

    run.path = tmp_path
    return run


def test_example_sets_up_checks_and_trains(example):
    result, calls = example("--num-steps", "5")
    assert result.returncode == 0, result.stderr
    assert [call.split()[0] for call in calls] == ["setup_venv.sh", "python", "python", "python"]
    assert "make_toy_checkpoint.py countdown --output runs/toy-countdown" in calls[1]
    assert calls[2].endswith("--save runs/siren-cpu --num-steps 5 --check")
    launch = "python -m siren_megatron.launch --standalone --nproc-per-node 2 pretrain_siren.py "
    assert calls[3].startswith(launch)
    assert calls[3].endswith("--save runs/siren-cpu --num-steps 5")


def test_example_chooses_a_fresh_directory_and_says_where(example):
    (example.path / "runs/siren-cpu").mkdir(parents=True)
    result, calls = example()
    assert "runs/siren-cpu exists: this run goes to runs/siren-cpu-2" in result.stdout
    assert "--save runs/siren-cpu-2" in calls[-1]


@pytest.mark.parametrize(
    ("arguments", "save"),
    [
        (("--save", "runs/mine"), "runs/mine"),
        (("--save=runs/mine",), "runs/mine"),
        (("--load", "runs/siren-cpu"), "runs/siren-cpu"),
        (("--load=runs/other", "--save", "runs/mine"), "runs/mine"),
        (("--overwrite",), "runs/siren-cpu"),
    ],
)
def test_example_leaves_the_directory_to_the_user(example, arguments, save):
    (example.path / "runs/siren-cpu").mkdir(parents=True)
    result, calls = example(*arguments)
    assert "exists" not in result.stdout
    assert f"--save {save} {' '.join(arguments)}" in calls[-1]


def test_example_ends_with_2_on_wrong_options_before_the_launch(example):
    result, calls = example("--lr", "wrong")
    assert result.returncode == 2
    assert not any("siren_megatron.launch" in call for call in calls)


def test_example_help_says_what_it_does_and_installs_nothing(example):
    result, calls = example("--help")
    assert result.returncode == 0 and "From nothing to a trained model" in result.stdout
    assert calls == ["python pretrain_siren.py --help"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script):
    subprocess.run(["shellcheck", REPOSITORY / script], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable(script):
    assert os.access(REPOSITORY / script, os.X_OK)
