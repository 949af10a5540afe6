"""Which checkpoint is taken, what counts as damage, what is deleted: on files alone."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siren_megatron.checkpointing import files


def make(directory: Path, *steps: int, latest: str | None = None) -> Path:
    for step in steps:
        unfinished = files.begin(directory, step)
        (unfinished / "data").write_bytes(bytes([step]) * 1000)
        entries = {"data": files.describe_file(unfinished / "data")}
        files.write_manifest(unfinished, {"step": step, "versions": {}, "layout": {}, "files": entries})
        files.publish(unfinished)
    if latest is not None:
        (directory / "latest").write_text(latest)
    return directory


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.mark.parametrize(
    ("latest", "expected"),
    [
        ("step_000010\n", [10, 9, 2]),
        ("step_000009\n", [9, 2, 10]),
        ("step_000003\n", [10, 9, 2]),
        ("../elsewhere", [10, 9, 2]),
        ("", [10, 9, 2]),
    ],
)
def test_the_order_in_which_checkpoints_are_tried(tmp_path, latest, expected):
    make(tmp_path, 2, 9, 10, latest=latest)
    (tmp_path / "step_000011.partial").mkdir()
    (tmp_path / "step_000012").write_text("a file")
    assert names(files.candidates(tmp_path)) == [files.step_name(step) for step in expected]


def test_without_a_pointer_the_newest_comes_first(tmp_path):
    make(tmp_path, 2, 9)
    (tmp_path / "latest").unlink()
    assert names(files.candidates(tmp_path)) == ["step_000009", "step_000002"]
    assert files.candidates(tmp_path / "absent") == []


def test_publishing_leaves_nothing_half_done(tmp_path):
    make(tmp_path, 3)
    (tmp_path / "step_000001.partial").mkdir()
    make(tmp_path, 5, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000003", "step_000005"]
    assert (tmp_path / "latest").read_text() == "step_000003\n"
    assert files.read_manifest(tmp_path / "step_000003")["step"] == 3


@pytest.mark.parametrize(
    ("steps", "saved", "limit", "kept"),
    [
        ((1, 2, 3), 3, 0, [3, 2, 1]),
        ((1, 2, 3), 3, 2, [3, 2]),
        ((1, 2, 3), 3, 1, [3]),
        ((1, 2, 3), 3, 9, [3, 2, 1]),
        # Taken back to step 1 after 8 and 9 were found damaged: these go before 1 does.
        ((1, 8, 9, 2), 2, 2, [2, 1]),
        ((1, 8, 9, 2), 2, 3, [9, 2, 1]),
    ],
)
def test_the_limit_keeps_the_newest_and_the_one_just_saved(tmp_path, steps, saved, limit, kept):
    make(tmp_path, *steps)
    files.delete_old(tmp_path / files.step_name(saved), limit)
    assert names(files.finished(tmp_path)) == [files.step_name(step) for step in kept]
    assert not list(tmp_path.glob("*.partial"))


def test_files_are_checked_by_size_and_bytes(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"a" * 10_000_000)
    entry = files.describe_file(path)
    assert entry == {"bytes": 10_000_000, "crc32": f"{zlib.crc32(path.read_bytes()):08x}"}
    files.check_file(path, entry)
    content = bytearray(path.read_bytes())
    content[7_654_321] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="data is damaged: its bytes are not those that were written"):
        files.check_file(path, entry)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="data has 9999999 bytes and should have 10000000"):
        files.check_file(path, entry)
    path.unlink()
    with pytest.raises(ValueError, match="data is missing"):
        files.check_file(path, entry)


MANIFEST = {"format": 1, "step": 3, "versions": {"torch": "2"}, "layout": {"ranks": 2}, "files": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; this version reads format 1"),
        ({"files": {"../common.pt": {"bytes": 1, "crc32": "0"}}}, "is no manifest"),
        ({"files": {"a": {"bytes": "1", "crc32": "0"}}}, "is no manifest"),
        ({"files": {"a": {"bytes": 1}}}, "is no manifest"),
        ({"files": []}, "is no manifest"),
        ({"step": None}, "is no manifest"),
        ({"step": True}, "is no manifest"),
        ({"versions": {"torch": []}}, "is no manifest"),
        ({"layout": None}, "is no manifest"),
    ],
)
def test_manifests_that_are_none(tmp_path, change, message):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    assert files.read_manifest(tmp_path) == MANIFEST
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, **change}))
    with pytest.raises(ValueError, match=message):
        files.read_manifest(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_a_manifest_is_read_or_refused_with_one_line(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp()
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json") as error:
        files.read_manifest(directory)
    assert "\n" not in str(error.value)


@given(st.dictionaries(st.sampled_from([*MANIFEST, "other"]), json_values))
def test_parts_of_a_manifest_are_checked_too(tmp_path_factory, change):
    directory = tmp_path_factory.getbasetemp()
    (directory / "manifest.json").write_text(json.dumps({**MANIFEST, **change}))
    try:
        content = files.read_manifest(directory)
    except ValueError as error:
        assert "manifest.json" in str(error) and "\n" not in str(error)
    else:
        assert content["format"] == 1 and isinstance(content["files"], dict)


def test_the_reason_behind_an_error(tmp_path):
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672]")  # noqa: B904
    except RuntimeError as error:
        assert files.one_line(error, tmp_path) == "No space left on device"
    assert files.one_line(RuntimeError("two\n  lines"), tmp_path) == "two lines"


def test_versions_that_differ():
    before = {"torch": "2.12", "numpy": "2.0", "git commit": "a", "vllm": "1"}
    now = {"torch": "2.13", "numpy": "2.0", "git commit": "b", "transformers": "5"}
    assert files.version_differences(before, now) == [
        "torch 2.12 (now 2.13)",
        "vllm 1 (now absent)",
        "transformers absent (now 5)",
    ]
    assert files.version_differences(now, now) == []
