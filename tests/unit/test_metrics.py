"""metrics.jsonl, the terminal, TensorBoard and wandb: what is written reads back."""

import io
import json
import math
import os
import pty
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from siren_megatron.charts import format_seconds, format_value
from siren_megatron.metrics import MetricsLogger, StageTimer, read_metrics
from tests.integration.jobs import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


def plain_console():
    return Console(file=io.StringIO(), width=100)


def values(rows):
    return [{key: value for key, value in row.items() if key != "wall_time"} for row in rows]


def test_rows_read_back_exactly(tmp_path):
    rows = [
        {"reward": 0.1 + 0.2, "lr": 1e-300, "time/step": 3},
        {"reward": math.inf, "lr": -math.inf, "grad_norm": math.nan},
    ]
    with MetricsLogger(tmp_path, 2, console=plain_console()) as logger:
        for step, row in enumerate(rows, start=1):
            logger.log(step, row)
    read = values(read_metrics(tmp_path / "metrics.jsonl"))
    assert read[0] == {"step": 1, **rows[0]}
    assert math.isnan(read[1].pop("grad_norm"))
    assert read[1] == {"step": 2, "reward": math.inf, "lr": -math.inf}


def test_lines_are_strict_json(tmp_path):
    with MetricsLogger(tmp_path, 1, console=plain_console()) as logger:
        logger.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5), "e": None})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert {key: row[key] for key in "abcd"} == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.5}
    assert "e" not in row


def test_each_row_is_on_disk_when_log_returns(tmp_path):
    logger = MetricsLogger(tmp_path, 2, console=plain_console())
    logger.log(1, {"reward": 0.25})
    assert values(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": 1, "reward": 0.25}]
    logger.close()


def test_truncate_after_drops_later_rows_and_the_run_goes_on(tmp_path):
    with MetricsLogger(tmp_path, 5, console=plain_console()) as logger:
        for step in (1, 2, 3, 4):
            logger.log(step, {"reward": step / 10})
    with MetricsLogger(tmp_path, 5, console=plain_console()) as logger:
        assert logger.truncate_after(2) == 2
        logger.log(3, {"reward": 0.9})
    rows = values(read_metrics(tmp_path / "metrics.jsonl"))
    assert rows == [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}, {"step": 3, "reward": 0.9}]
    assert not list(tmp_path.glob("*.tmp"))


def test_truncation_that_is_forgotten_or_late_is_refused(tmp_path):
    with MetricsLogger(tmp_path, 5, console=plain_console()) as logger:
        logger.log(1, {"reward": 0.1})
        logger.log(2, {"reward": 0.1})
    logger = MetricsLogger(tmp_path, 5, console=plain_console())
    with pytest.raises(ValueError, match="already has step 2: cannot log step 2"):
        logger.log(2, {"reward": 0.5})
    logger.log(3, {"reward": 0.5})
    with pytest.raises(RuntimeError, match="before the first log"):
        logger.truncate_after(1)
    logger.close()


def test_torn_last_line_of_a_killed_writer_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    assert read_metrics(path) == [{"step": 1, "reward": 0.5}]
    with MetricsLogger(tmp_path, 2, console=plain_console()) as logger:
        logger.log(2, {"reward": 0.75})
    assert [row["reward"] for row in read_metrics(path)] == [0.5, 0.75]


@pytest.mark.parametrize("line", ["[1]", "{}", '{"step": 1, "reward": "high"}', "nonsense"])
def test_broken_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a row of metrics"):
        read_metrics(path)


@pytest.mark.parametrize("metrics", [{"reward": "0.5x"}, {"reward": [1, 2]}, {"wall_time": 1.0}, {"step": 3}])
def test_what_is_no_metric_is_refused_and_not_written(tmp_path, metrics):
    logger = MetricsLogger(tmp_path, 1, console=plain_console())
    with pytest.raises((TypeError, ValueError)):
        logger.log(1, metrics)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    logger.close()


def test_plain_lines_one_a_step_and_the_summary(tmp_path):
    console = plain_console()
    with MetricsLogger(tmp_path, 20, log_interval=5, console=console) as logger:
        for step in range(1, 21):
            logger.log(step, {"reward": step / 20, "entropy": 0.5, "eval/avg@8": 0.25, "time/step": 2.0})
    text = console.file.getvalue()
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/20", "5/20", "10/20", "15/20", "20/20"]
    assert all("reward" in line and "entropy 0.5" in line and "eval/avg@8 0.25" in line for line in lines)
    assert "finished: step 20 of 20" in text
    assert "1 at step 20" in text
    (heading,) = [line for line in text.splitlines() if "metric" in line and "first 5" in line]
    (reward,) = [line for line in text.splitlines() if line.startswith("│ reward")]
    assert [cell.strip() for cell in reward.split("│")[2:4]] == ["0.15", "0.9"]  # means of 5 steps
    assert heading.index("first 5") < heading.index("last 5")
    assert str(tmp_path / "report.html") in text
    assert "\x1b[" not in text


def test_terminal_gets_a_bar_and_no_lines(tmp_path):
    script = (
        "import sys; from siren_megatron.metrics import MetricsLogger\n"
        "with MetricsLogger(sys.argv[1], 3) as logger:\n"
        "    for step in (1, 2, 3): logger.log(step, {'reward': 0.125 * step, 'entropy': 0.5})\n"
    )
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=slave, env=environment)
    os.close(slave)
    output = b""
    try:
        while chunk := os.read(master, 65536):
            output += chunk
    except OSError:  # Linux answers EIO at the end of a pseudo-terminal
        pass
    assert process.wait(timeout=60) == 0
    text = output.decode()
    assert "━" in text and "step 3/3" in text and "0.375" in text and "eta" in text
    assert "step_s" not in text and "entropy 0.5     " not in text


def test_exceptions_and_interrupts_become_the_status(tmp_path):
    for error, status in (
        (RuntimeError("no [bold] luck\nmore"), "failed: RuntimeError: no [bold] luck"),
        (KeyboardInterrupt(), "interrupted"),
    ):
        console = plain_console()
        run = tmp_path / status[:4]
        with pytest.raises(type(error)), MetricsLogger(run, 3, console=console) as logger:
            logger.log(1, {"reward": 0.5})
            raise error
        assert f"{status}: step 1 of 3" in console.file.getvalue()
        assert status in (run / "report.html").read_text()


def test_close_twice_and_without_rows(tmp_path):
    console = plain_console()
    logger = MetricsLogger(tmp_path, 3, console=console)
    logger.close("interrupted")
    logger.close()
    assert console.file.getvalue().count("step 0 of 3") == 1


def test_tensorboard_holds_the_values_and_forgets_the_truncated(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = tmp_path / "events"
    for resumed in (False, True):
        with MetricsLogger(tmp_path / "run", 4, tensorboard_dir=events, console=plain_console()) as logger:
            if resumed:
                logger.truncate_after(2)
            for step in (3, 4) if resumed else (1, 2, 3, 4):
                logger.log(step, {"reward": step / 8 + resumed, "siren/loss": 0.5})
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert sorted(accumulator.Tags()["scalars"]) == ["reward", "siren/loss"]
    points = [(event.step, event.value) for event in accumulator.Scalars("reward")]
    assert points == [(1, 0.125), (2, 0.25), (3, 1.375), (4, 1.5)]


def wandb_history(path):
    """Rows of a .wandb file: a LevelDB log (7-byte file header, 32 KiB blocks) of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, rows, record = path.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            break  # not all written yet
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            message = Record.FromString(record)
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
            record = b""
    return rows


def test_wandb_offline_holds_the_values_and_a_resumed_run_keeps_its_id(tmp_path):
    ids = []
    for resumed in (False, True):
        with MetricsLogger(
            tmp_path,
            3,
            wandb_project="siren-test",
            wandb_mode="offline",
            config={"lr": 1e-4, "load": Path("runs/a")},
            console=plain_console(),
        ) as logger:
            if resumed:
                logger.truncate_after(1)
            for step in (2, 3) if resumed else (1, 2):
                logger.log(step, {"reward": step / 8, "siren/loss": 0.25})
            directory = Path(logger.paths["wandb"])
        assert directory.parent.parent == tmp_path
        ids.append((tmp_path / "wandb_id").read_text())
        history = next(directory.glob("*.wandb"))
        # wandb's own process writes the file a moment after finish() has returned.
        wait_until(lambda path=history: len(wandb_history(path)) == 2, 30, "wandb's file")
        found = [(row["step"], row["reward"], row["siren/loss"]) for row in wandb_history(history)]
        assert found == (
            [(2, 0.25, 0.25), (3, 0.375, 0.25)] if resumed else [(1, 0.125, 0.25), (2, 0.25, 0.25)]
        )
    assert ids[0] == ids[1]


def test_missing_library_is_named_with_its_option(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb-project needs the Python package wandb"):
        MetricsLogger(tmp_path, 1, wandb_project="x", console=plain_console())
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard-dir needs the Python package tensorboard"):
        MetricsLogger(tmp_path, 1, tensorboard_dir=tmp_path / "tb", console=plain_console())


def test_stage_timer_sums_stages_and_starts_a_new_step(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0, 11.0, 13.0, 14.0])
    monkeypatch.setattr("siren_megatron.metrics.time.perf_counter", lambda: next(clock))
    synchronized = []
    timer = StageTimer(lambda: synchronized.append(1))
    with timer.stage("rollout"):
        pass
    with timer.stage("rollout"):
        pass
    assert timer.pop() == {"time/rollout": 2.5, "time/step": 10.0}
    with pytest.raises(KeyError), timer.stage("train"):
        raise KeyError
    assert timer.pop() == {"time/train": 2.0, "time/step": 4.0}
    assert len(synchronized) == 9


def test_importing_metrics_does_not_import_torch():
    script = "import sys, siren_megatron.metrics; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.125, "0.125"),
        (1.0, "1"),
        (0.123456, "0.1235"),
        (0.000345678, "0.0003457"),
        (2.5e-6, "2.5e-6"),
        (1e-4, "0.0001"),
        (1523.4, "1,523"),
        (-0.5, "-0.5"),
        (3e9, "3e9"),
        (math.nan, "NaN"),
        (-math.inf, "-∞"),
    ],
)
def test_format_value(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (7325, "2h02m"), (180000, "2d02h")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
