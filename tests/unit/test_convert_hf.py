"""tools/convert_hf.py: round trips, and one clear line with exit code 2 and no output for every mistake."""

from __future__ import annotations

import errno
import json
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from siren_megatron.conversion import convert
from siren_megatron.conversion.files import HfReader
from tests.checkpoints import FAMILY_CONFIGS, make_random_checkpoint
from tools import convert_hf

TP, PP, EP = (f"--{n}-model-parallel-size" for n in ("tensor", "pipeline", "expert"))


def run(*arguments) -> int:
    return convert_hf.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One checkpoint of two layers a family, in bf16, with a tokenizer beside it."""
    root = tmp_path_factory.mktemp("originals")
    for name in FAMILY_CONFIGS:
        path = make_random_checkpoint(root / name, name, num_hidden_layers=2, dtype=torch.bfloat16)
        (path / "tokenizer.json").write_text('{"model": "of a test"}')
        (path / "chat_template.jinja").write_text("{{ messages }}")
    return root


@pytest.fixture
def original(originals, tmp_path):
    return shutil.copytree(originals / "qwen2", tmp_path / "original")


def fails(capsys, *arguments) -> str:
    """The one line of an expected failure."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert_hf.py: error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_round_trip_is_exact(originals, tmp_path, family, capsys):
    original, megatron, back = originals / family, tmp_path / "megatron", tmp_path / "back"
    layout = [TP, 2, PP, 2] + ([EP, 2] if "moe" in family else [])
    assert run("import", "--hf", original, "--megatron", megatron, *layout) == 0
    assert run("export", "--megatron", megatron, "--hf", back, "--max-shard-size", "100KB") == 0
    stored, returned = HfReader(original).arrays, HfReader(back).arrays
    tied = {"lm_head.weight"} if "tied" in family or family == "llama3" else set()
    assert returned.keys() == stored.keys() - tied
    assert len(list(back.glob("*.safetensors"))) > 1
    expected = load_file(original / "model.safetensors")
    for path in back.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name
    for path in original.iterdir():
        if path.suffix != ".safetensors":
            assert (back / path.name).read_bytes() == path.read_bytes()
    assert "GB/s" in capsys.readouterr().out
    assert not [p.name for p in tmp_path.iterdir() if p.name not in ("megatron", "back")]


def test_verify_finds_one_changed_number(original, tmp_path, capsys):
    megatron = tmp_path / "megatron"
    assert run("import", "--hf", original, "--megatron", megatron, TP, 2) == 0
    assert run("verify", "--hf", original, "--megatron", megatron, "--no-logits") == 0
    assert "27 of 27 tensors identical" in capsys.readouterr().out
    tensors = load_file(original / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][5, 7] += 0.5
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    assert run("verify", "--hf", original, "--megatron", megatron, "--no-logits") == 1
    out = capsys.readouterr().out
    assert "26 of 27 tensors identical" in out
    assert "model.layers.1.self_attn.k_proj.weight: differs by at most 0.5" in out


def test_inspect_says_what_is_there(originals, tmp_path, capsys):
    megatron = tmp_path / "megatron"
    assert run("import", "--hf", originals / "qwen3-moe", "--megatron", megatron, TP, 2, EP, 2) == 0
    capsys.readouterr()
    assert run("inspect", "--hf", originals / "qwen3-moe") == 0
    theirs = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert run("inspect", "--megatron", megatron) == 0
    ours = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    numel = sum(t.numel() for t in load_file(originals / "qwen3-moe" / "model.safetensors").values())
    assert theirs["parameters"] == ours["parameters"] == f"{numel:,}"
    assert theirs["architecture"] == ours["architecture"] == "Qwen3MoeForCausalLM"
    assert theirs["dtype"] == ours["dtype"] == "bfloat16"
    assert ours["layout"].startswith("tensor 2, pipeline 1, expert 2 (")
    assert theirs["kind"] == "Hugging Face checkpoint"


# ---------------------------------------------------------------- mistakes


def change_config(original, **changes):
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(original, change):
    tensors = load_file(original / "model.safetensors")
    change(tensors)
    save_file(tensors, original / "model.safetensors")


def cut_short(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)


IMPORT_MISTAKES = {
    "unknown architecture": (
        lambda d: change_config(d, architectures=["BertModel"]),
        "config.json: architecture ['BertModel'] is not supported (known: LlamaForCausalLM",
    ),
    "missing tensor": (
        lambda d: change_tensors(d, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "lacks 1 tensor(s), such as model.layers.1.mlp.up_proj.weight",
    ),
    "extra tensor": (
        lambda d: change_tensors(d, lambda t: t.update({"model.layers.2.oops": torch.ones(3)})),
        "holds 1 tensor(s) that a Qwen2ForCausalLM has not, such as model.layers.2.oops",
    ),
    "wrong shape": (
        lambda d: change_tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(65)})),
        "model.norm.weight has shape [65], config.json makes it [64]",
    ),
    "mixed dtypes": (
        lambda d: change_tensors(
            d, lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.ones(64)})
        ),
        "model.layers.1.input_layernorm.weight is torch.float32, another tensor of",
    ),
    "unknown dtype": (
        lambda d: change_tensors(
            d, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})
        ),
        "'model.norm.weight' has dtype 'I8', not supported",
    ),
    "truncated file": (lambda d: cut_short(d / "model.safetensors"), "model.safetensors is truncated"),
    "empty file": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        "is truncated or no safetensors file",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no *.safetensors file"),
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "file of the index missing": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}'),
        "x.safetensors is missing",
    ),
    "broken index": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
        "model.safetensors.index.json is damaged",
    ),
}


@pytest.mark.parametrize("mistake", IMPORT_MISTAKES)
def test_import_refuses(original, tmp_path, mistake, capsys):
    damage, message = IMPORT_MISTAKES[mistake]
    damage(original)
    assert message in fails(capsys, "import", "--hf", original, "--megatron", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TP, 3], "--tensor-model-parallel-size 3 does not divide"),
        ([EP, 2], "--expert-model-parallel-size: a Qwen2ForCausalLM has no experts"),
        ([TP, "two"], "argument --tensor-model-parallel-size: invalid int value: 'two'"),
        (["--tensor-model-paralel-size", 2], "unrecognized arguments"),
    ],
)
def test_import_refuses_layouts_and_flags(original, tmp_path, arguments, message, capsys):
    assert message in fails(capsys, "import", "--hf", original, "--megatron", tmp_path / "out", *arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_existing_output_is_kept_unless_told(original, tmp_path, capsys):
    megatron = tmp_path / "megatron"
    arguments = ["import", "--hf", original, "--megatron", megatron]
    assert run(*arguments) == 0
    before = (megatron / ".metadata").read_bytes()
    assert "exists already: pass --overwrite" in fails(capsys, *arguments, TP, 2)
    assert (megatron / ".metadata").read_bytes() == before
    assert run(*arguments, TP, 2, "--overwrite") == 0
    assert (megatron / ".metadata").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["megatron", "original"]


def test_overwrite_replaces_checkpoints_only(original, tmp_path, capsys):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    message = fails(capsys, "import", "--hf", original, "--megatron", home, "--overwrite")
    assert "is not a checkpoint" in message
    assert (home / "thesis.txt").read_text() == "years of work"


def test_a_disk_without_room_is_found_before_writing(original, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    message = fails(capsys, "import", "--hf", original, "--megatron", tmp_path / "out")
    assert "no space: " in message and "has 0.00 GB left" in message
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_disk_that_fills_up_while_writing(original, tmp_path, monkeypatch, command, capsys):
    megatron = tmp_path / "megatron"
    assert run("import", "--hf", original, "--megatron", megatron) == 0

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "out"
    if command == "import":
        monkeypatch.setattr(convert, "write_megatron_checkpoint", full)
        arguments = ["import", "--hf", original, "--megatron", target]
    else:
        monkeypatch.setattr(convert.HfWriter, "write", full)
        arguments = ["export", "--megatron", megatron, "--hf", target]
    assert f"no space left while writing {target}" in fails(capsys, *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["megatron", "original"]


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_write_that_the_system_refuses(original, tmp_path, command, repository):
    """A real failed write, inside torch's archive writer as in ours: files are limited to 100 KB."""
    megatron, target = tmp_path / "megatron", tmp_path / "out"
    assert run("import", "--hf", original, "--megatron", megatron) == 0
    arguments = ["--hf", original, "--megatron", target]
    if command == "export":
        arguments = ["--hf", target, "--megatron", megatron]
    result = subprocess.run(
        [sys.executable, repository / "tools" / "convert_hf.py", command, *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr == f"convert_hf.py: error: {target} cannot be written: File too large\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["megatron", "original"]


class Evil:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('pwned').write_text('x')",))


EXPORT_MISTAKES = {
    "truncated": (lambda d: cut_short(d / "__0_0.distcp"), "__0_0.distcp is truncated"),
    "file missing": (lambda d: (d / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "no table of contents": (lambda d: (d / ".metadata").unlink(), ".metadata cannot be read"),
    "damaged table of contents": (lambda d: cut_short(d / ".metadata"), ".metadata is damaged"),
    "no such format": (
        lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "only checkpoints of format torch_dist",
    ),
    "no format": (lambda d: (d / "metadata.json").unlink(), "no metadata.json"),
    "no config": (lambda d: shutil.rmtree(d / "hf"), "name the Hugging Face checkpoint the run started from"),
    "other config": (
        lambda d: change_config(d / "hf", intermediate_size=100),
        "fc1.weight has shape [2, 192, 64], config.json makes it [2, 200, 64]",
    ),
    "more layers": (lambda d: change_config(d / "hf", num_hidden_layers=3), "config.json makes it [3, "),
    "code in the table": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps(Evil())),
        "has no place in a checkpoint",
    ),
}


@pytest.mark.parametrize("mistake", EXPORT_MISTAKES)
def test_export_refuses(original, tmp_path, mistake, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    megatron = tmp_path / "megatron"
    assert run("import", "--hf", original, "--megatron", megatron, TP, 2) == 0
    damage, message = EXPORT_MISTAKES[mistake]
    damage(megatron)
    assert message in fails(capsys, "export", "--megatron", megatron, "--hf", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["megatron", "original"]


def test_bytes_damaged_inside_a_tensors_archive(original, tmp_path, capsys):
    megatron = tmp_path / "megatron"
    assert run("import", "--hf", original, "--megatron", megatron) == 0
    path = megatron / "__0_0.distcp"
    content = path.read_bytes()
    # The archives' directories: without them no tensor is found.
    path.write_bytes(content.replace(b"PK\x05\x06", b"XX\x05\x06"))
    assert "__0_0.distcp is damaged" in fails(
        capsys, "export", "--megatron", megatron, "--hf", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_a_run_killed_while_writing_leaves_no_checkpoint(original, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_megatron_checkpoint", interrupted)
    assert run("import", "--hf", original, "--megatron", tmp_path / "out") == 130
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("2000", 2000), ("3g", 3 * 10**9)],
)
def test_sizes(text, size):
    assert convert_hf.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5TB", "5 cats", "1e9"])
def test_sizes_that_are_none(text, tmp_path, capsys):
    message = fails(capsys, "export", "--megatron", tmp_path, "--hf", tmp_path, f"--max-shard-size={text}")
    assert "is no size" in message
