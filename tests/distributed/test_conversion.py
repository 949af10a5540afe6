"""Converted checkpoints in megatron-core's hands: loaded in other layouts, and its own saves exported."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from siren_megatron.architecture import Layout
from siren_megatron.conversion.convert import plan_export, plan_import
from tests.checkpoints import make_random_checkpoint
from tests.distributed.families import load_megatron, save_megatron, weights_of_trainer
from tests.distributed.launch import run_ranks

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
SP = "sequence_parallel"


def assert_same(found: dict[str, torch.Tensor], checkpoint, dtype: torch.dtype, what) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    assert found.keys() == stored.keys(), what
    for name, tensor in found.items():
        assert tensor.dtype == stored[name].dtype == dtype, (what, name)
        assert torch.equal(tensor.view(torch.uint8), stored[name].view(torch.uint8)), (what, name)


def test_imported_in_one_layout_and_loaded_in_any_other(tmp_path):
    """By `dist_checkpointing.load`; the weights come back to the bit, in bf16 as stored."""
    cases = {
        "qwen2-tied": (
            [Layout(1), Layout(4), Layout(2, 2)],
            {1: [{}], 2: [{TP: 2}, {PP: 2}], 4: [{TP: 4}, {TP: 2, PP: 2}]},
        ),
        "qwen3-moe": (
            [Layout(1), Layout(2, 2, 2), Layout(ep=4)],
            {1: [{}], 2: [{EP: 2}], 4: [{PP: 2, EP: 2}, {TP: 2, SP: True, EP: 2}]},
        ),
    }
    checkpoints, jobs = {}, {1: [], 2: [], 4: []}
    for family, (imports, loads) in cases.items():
        checkpoint = make_random_checkpoint(tmp_path / family, family, dtype=torch.bfloat16)
        for index, layout in enumerate(imports):
            megatron = tmp_path / f"{family}-{index}"
            plan_import(checkpoint, megatron, layout).run(lambda nbytes: None)
            checkpoints[megatron] = layout
            for world_size, options in loads.items():
                jobs[world_size] += [(megatron, checkpoint, option, True) for option in options]
    for world_size, todo in jobs.items():
        results = run_ranks(load_megatron, world_size, todo, timeout=400)
        for (megatron, checkpoint, options, _), weights in zip(todo, results[0], strict=True):
            what = (checkpoints[megatron], options)
            assert_same(weights, checkpoint, torch.bfloat16, what)
            layers = [int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")]
            assert layers == sorted(layers), what  # vLLM keeps what it has of a layer until it has all of it


def test_megatrons_own_checkpoints_are_exported(tmp_path):
    """Both of megatron-core's ways to lay tensors out, and layouts that cut everything that can be cut."""
    todo = []
    for family, options in (
        ("qwen2", {TP: 2, PP: 2}),
        ("qwen3-tied", {TP: 4}),
        ("qwen3-moe", {TP: 2, SP: True, EP: 2}),
    ):
        checkpoint = make_random_checkpoint(tmp_path / family, family)
        for singles in (False, True):
            todo.append((checkpoint, tmp_path / f"{family}-{singles}", options, singles))
    run_ranks(save_megatron, 4, todo, timeout=300)
    for checkpoint, megatron, options, singles in todo:
        back = tmp_path / f"{megatron.name}-back"
        plan_export(megatron, back, config_from=checkpoint).run(lambda nbytes: None)
        found = load_file(back / "model.safetensors")
        assert_same(found, checkpoint, torch.float32, (options, singles))


def test_a_run_starts_from_a_converted_checkpoint(tmp_path):
    """--pretrained-checkpoint: its weights count, not those of --hf-checkpoint."""
    first = make_random_checkpoint(tmp_path / "first", "qwen3", seed=0)
    second = make_random_checkpoint(tmp_path / "second", "qwen3", seed=1)
    megatron = tmp_path / "megatron"
    plan_import(second, megatron, Layout(1, 4)).run(lambda nbytes: None)
    weights = run_ranks(weights_of_trainer, 2, first, megatron)[0]
    assert_same(weights, second, torch.float32, "run")
    assert not torch.equal(
        weights["lm_head.weight"], load_file(first / "model.safetensors")["lm_head.weight"]
    )
