"""What a run says it computes with: class and package of what is there, whatever the options were."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import torch
from rich.console import Console

from siren_megatron.implementations import find_implementations
from siren_megatron.metrics import MetricsLogger
from siren_megatron.vocab_parallel import engine_name, native_available


def kind(name: str, package: str, *bases: type) -> type:
    return type(name, bases or (torch.nn.Module,), {"__module__": f"{package}.some.module"})


def layer(norm: type, core: type, linear: type) -> torch.nn.Module:
    attention = torch.nn.Module()
    attention.core_attention, attention.linear_qkv, attention.linear_proj = core(), linear(), linear()
    module = torch.nn.Module()
    module.input_layernorm, module.self_attention = norm(), attention
    module.weight = torch.nn.Parameter(torch.zeros(2))
    return module


def test_the_package_is_the_class_or_what_it_is_derived_from():
    # As megatron-core wraps Transformer Engine's modules in classes of its own.
    core = kind("TEDotProductAttention", "megatron", kind("DotProductAttention", "transformer_engine"))
    model = layer(kind("RMSNorm", "siren_megatron"), core, kind("ColumnParallelLinear", "megatron"))
    adam = kind("FusedAdam", "apex", torch.optim.Optimizer)([torch.nn.Parameter(torch.zeros(1))], {})
    parts = [SimpleNamespace(optimizer=adam), SimpleNamespace(optimizer=None)]
    found = find_implementations([model, model], SimpleNamespace(chained_optimizers=parts))
    assert found == {
        "norm": "RMSNorm (siren_megatron)",
        "attention": "TEDotProductAttention (Transformer Engine)",
        "linear": "ColumnParallelLinear (megatron-core)",
        "optimizer": "FusedAdam (Apex)",
        "entropy": "compiled C++" if native_available() else "plain torch",
    }


def test_the_entropy_engine_is_the_one_that_would_be_chosen(monkeypatch):
    # The compiled engine takes fp32 and bf16 only.
    assert engine_name(torch.device("cpu"), torch.float64) == "plain torch"
    monkeypatch.setattr("siren_megatron.vocab_parallel.native.library", lambda: None)
    assert engine_name(torch.device("cpu"), torch.float32) == "plain torch"


def test_a_run_begins_with_it(tmp_path):
    console = Console(file=io.StringIO(), width=100)
    found = {"norm": "RMSNorm (Transformer Engine)", "optimizer": "AdamW (torch)"}
    with MetricsLogger(tmp_path, 1, console=console, implementations=found):
        assert console.file.getvalue().splitlines() == [
            "norm       RMSNorm (Transformer Engine)",
            "optimizer  AdamW (torch)",
        ]
    assert json.loads((tmp_path / "run.json").read_text())["implementations"] == found
