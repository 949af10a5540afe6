"""Weights between Hugging Face's names and megatron-core's shards: one table a model family, both ways.

A table maps a megatron-core parameter to a `Rule`: the Hugging Face tensors it is made of and how it is cut
over the tensor ranks. Loading, export and the weight update of vLLM all read the same table.

Legend: tp = tensor-parallel size, h = hidden size, g = key-value heads, q = attention heads / g, hn = head size.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from siren_megatron.model import padded_vocab_size

MAX_FILE_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class Rule:
    """How one megatron-core parameter is made of Hugging Face tensors.

    Args:
        sources: Hugging Face names, `{layer}` standing for the layer's number.
        cut: "replicated"; "rows" or "columns" (dimension 0 or 1 over the tensor ranks); "vocab" (dimension 0,
            padded); "gated" (gate and up projection, each cut in rows); "qkv" (query, key and value heads side
            by side for each key-value head, cut in rows).
    """

    sources: tuple[str, ...]
    cut: str


_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."

QWEN2 = {
    "embedding.word_embeddings.weight": Rule(("model.embed_tokens.weight",), "vocab"),
    "decoder.final_layernorm.weight": Rule(("model.norm.weight",), "replicated"),
    "output_layer.weight": Rule(("lm_head.weight",), "vocab"),
    "decoder.layers.*.input_layernorm.weight": Rule((_LAYER + "input_layernorm.weight",), "replicated"),
    "decoder.layers.*.self_attention.linear_qkv.weight": Rule(
        tuple(_ATTENTION + f"{x}_proj.weight" for x in "qkv"), "qkv"
    ),
    "decoder.layers.*.self_attention.linear_qkv.bias": Rule(
        tuple(_ATTENTION + f"{x}_proj.bias" for x in "qkv"), "qkv"
    ),
    "decoder.layers.*.self_attention.linear_proj.weight": Rule((_ATTENTION + "o_proj.weight",), "columns"),
    "decoder.layers.*.pre_mlp_layernorm.weight": Rule(
        (_LAYER + "post_attention_layernorm.weight",), "replicated"
    ),
    "decoder.layers.*.mlp.linear_fc1.weight": Rule(
        (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"), "gated"
    ),
    "decoder.layers.*.mlp.linear_fc2.weight": Rule((_LAYER + "mlp.down_proj.weight",), "columns"),
}

TABLES: dict[str, dict[str, Rule]] = {"Qwen2ForCausalLM": QWEN2}


@dataclass(frozen=True)
class Shape:
    """What the cuts need to know of the architecture."""

    vocab_size: int
    heads: int
    kv_heads: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, hf_config: dict[str, Any]) -> Shape:
        heads = hf_config["num_attention_heads"]
        return cls(
            hf_config["vocab_size"],
            heads,
            hf_config.get("num_key_value_heads", heads),
            bool(hf_config.get("tie_word_embeddings", False)),
        )


def split(rule: Rule, tensors: list[Tensor], shape: Shape, tp: int) -> list[Tensor]:
    """Whole Hugging Face tensors -> the parameter's shard on each of tp tensor ranks."""
    first = tensors[0]
    if rule.cut == "replicated":
        return [first] * tp
    if rule.cut in ("rows", "columns"):
        return list(first.chunk(tp, dim=0 if rule.cut == "rows" else 1))
    if rule.cut == "vocab":
        padding = padded_vocab_size(shape.vocab_size, tp) - first.size(0)
        return list(torch.cat([first, first.new_zeros(padding, *first.shape[1:])]).chunk(tp))
    if rule.cut == "gated":
        return [torch.cat(pair) for pair in zip(*(t.chunk(tp) for t in tensors), strict=True)]
    assert rule.cut == "qkv", rule.cut
    # [g, q·hn + hn + hn, ...]: a rank holds whole groups.
    groups = [t.reshape(shape.kv_heads, -1, *t.shape[1:]) for t in tensors]
    return [chunk.flatten(0, 1) for chunk in torch.cat(groups, dim=1).chunk(tp)]


def join(rule: Rule, shards: list[Tensor], shape: Shape) -> list[Tensor]:
    """The inverse of `split`: shards in rank order -> whole Hugging Face tensors."""
    if rule.cut == "replicated":
        return shards[:1]
    if rule.cut in ("rows", "columns"):
        return [torch.cat(shards, dim=0 if rule.cut == "rows" else 1)]
    if rule.cut == "vocab":
        return [torch.cat(shards)[: shape.vocab_size]]
    if rule.cut == "gated":
        pairs = [s.chunk(2) for s in shards]
        return [torch.cat([p[i] for p in pairs]) for i in range(2)]
    assert rule.cut == "qkv", rule.cut
    whole = torch.cat(shards)
    per_group = shape.heads // shape.kv_heads
    head_size = whole.size(0) // (shape.kv_heads * (per_group + 2))
    groups = whole.reshape(shape.kv_heads, (per_group + 2) * head_size, *whole.shape[1:])
    sizes = [per_group * head_size, head_size, head_size]
    return [part.flatten(0, 1) for part in groups.split(sizes, dim=1)]


def table_of(hf_config: dict[str, Any]) -> dict[str, Rule]:
    """The table of a checkpoint's architecture.

    Raises:
        ValueError: there is none.
    """
    for name in hf_config.get("architectures") or []:
        if name in TABLES:
            return TABLES[name]
    raise ValueError(f"architecture {hf_config.get('architectures')} has no conversion table")


def local_parameters(model: torch.nn.Module) -> Iterator[tuple[str, int | None, Tensor]]:
    """(name in the table, global layer number or None, parameter) of this rank's stage, in a fixed order."""
    offsets = {
        name: module.layer_number - 1
        for name, module in model.named_modules()
        if isinstance(module, TransformerLayer)
    }
    for name, parameter in model.named_parameters():
        match = re.search(r"decoder\.layers\.(\d+)\.", name)
        if match is None:
            yield re.sub(r"^(module\.)+", "", name), None, parameter
        else:
            layer = offsets[name[: match.end() - 1]]
            yield "decoder.layers.*." + name[match.end() :], layer, parameter


class HfReader:
    """Tensors of a Hugging Face checkpoint by name, from one or several safetensors files.

    Raises:
        ValueError: a file is truncated, a tensor is missing or appears twice; the line names the file.
    """

    def __init__(self, directory: Path):
        self.files: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in self.files:
                    raise ValueError(f"{path} repeats the tensor {name}")
                self.files[name] = file
        self.directory = directory

    def tensor(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(f"{self.directory} holds no tensor {name}")
        return self.files[name].get_tensor(name)


@torch.no_grad()
def load_hf_weights(model: torch.nn.Module, directory: Path, hf_config: dict[str, Any]) -> None:
    """Fill this rank's parameters from a Hugging Face checkpoint.

    Args:
        model: from `build_model`.
        directory: the checkpoint.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape; nothing else is checked by loading.
    """
    table, shape, reader = table_of(hf_config), Shape.of(hf_config), HfReader(directory)
    tp, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    for name, layer, parameter in local_parameters(model):
        rule = table.get(name)
        if rule is None:
            raise ValueError(f"parameter {name} has no row in the conversion table")
        if name == "output_layer.weight" and shape.tie_word_embeddings:
            rule = table["embedding.word_embeddings.weight"]
        tensors = [reader.tensor(source.format(layer=layer)) for source in rule.sources]
        shard = split(rule, tensors, shape, tp)[rank]
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{directory}: {rule.sources[0].format(layer=layer)} gives a shard of {tuple(shard.shape)}, "
                f"the model wants {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)
    left = set(reader.files) - expected_names(table, hf_config)
    left -= {"lm_head.weight"} if shape.tie_word_embeddings else set()
    if left:
        raise ValueError(
            f"{directory} holds {len(left)} tensor(s) that the model has not, such as {min(left)}"
        )


def expected_names(table: dict[str, Rule], hf_config: dict[str, Any]) -> set[str]:
    """Hugging Face names of all tensors of a model."""
    names = set()
    for name, rule in table.items():
        if name == "output_layer.weight" and hf_config.get("tie_word_embeddings"):
            continue
        layers = range(hf_config["num_hidden_layers"]) if ".*." in name else [None]
        names.update(source.format(layer=layer) for layer in layers for source in rule.sources)
    return names


@torch.no_grad()
def iterate_hf_weights(model: torch.nn.Module, hf_config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under their Hugging Face names on rank 0, one parameter at a time.

    A collective: every rank of the first data-parallel replica iterates it to its end, and only rank 0 gets
    items. At most one whole parameter is held at a time.
    """
    table, shape = table_of(hf_config), Shape.of(hf_config)
    if parallel_state.get_data_parallel_rank() != 0:
        return
    tp_group = parallel_state.get_tensor_model_parallel_group()
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    pp, stage = pp_group.size(), parallel_state.get_pipeline_model_parallel_rank()
    local = list(local_parameters(model))
    described: list[Any] = [None] * pp
    mine = [(name, layer, tuple(p.shape), str(p.dtype)) for name, layer, p in local]
    dist.all_gather_object(described, mine, group=pp_group)
    # Global ranks of the pipeline group: rank 0 is on the first stage.
    stages = dist.get_process_group_ranks(pp_group)
    first_tp_rank = dist.get_rank(tp_group) == 0
    for owner in range(pp):
        for index, (name, layer, local_shape, dtype) in enumerate(described[owner]):
            if name == "output_layer.weight" and shape.tie_word_embeddings:
                continue
            rule, shards = table[name], None
            if stage == owner:
                parameter = local[index][2].detach()
                shards = [parameter]
                if rule.cut != "replicated" and tp_group.size() > 1:
                    shards = [torch.empty_like(parameter) for _ in range(tp_group.size())]
                    dist.all_gather(shards, parameter.contiguous(), group=tp_group)
            if not first_tp_rank or stage not in (0, owner):
                continue
            if owner != 0:
                count = 1 if rule.cut == "replicated" else tp_group.size()
                for i in range(count):
                    if stage == owner:
                        dist.send(shards[i].contiguous(), dst=stages[0])
                    else:
                        shards = shards or []
                        kind = getattr(torch, dtype.removeprefix("torch."))
                        shards.append(
                            torch.empty(local_shape, dtype=kind, device=torch.cuda.current_device())
                        )
                        dist.recv(shards[i], src=stages[owner])
            if stage == 0:
                for source, tensor in zip(rule.sources, join(rule, shards, shape), strict=True):
                    yield source.format(layer=layer), tensor


def export_hf_checkpoint(
    model: torch.nn.Module, source: Path, hf_config: dict[str, Any], target: Path
) -> None:
    """Write the model as a Hugging Face checkpoint, with the tokenizer and configs of the one it started from.

    A collective. Written under a temporary name beside `target`, then renamed; an old `target` is replaced.

    Args:
        source: the Hugging Face checkpoint the run started from.
        target: the directory to write.
    """
    weights = iterate_hf_weights(model, hf_config)
    if dist.get_rank() != 0:
        for _ in weights:
            pass
    else:
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in source.iterdir():
            if (
                path.is_file()
                and path.suffix in (".json", ".txt", ".model", ".jinja")
                and "index" not in path.name
            ):
                shutil.copy(path, partial / path.name)
        _write_files(weights, partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    dist.barrier()


def _write_files(weights: Iterator[tuple[str, Tensor]], directory: Path) -> None:
    files: list[dict[str, Tensor]] = [{}]
    paths, where, total, size = [], {}, 0, 0

    def write() -> None:
        paths.append(directory / f"model-{len(paths) + 1:05d}.safetensors")
        save_file(files[-1], paths[-1], metadata={"format": "pt"})
        where.update(dict.fromkeys(files[-1], len(paths) - 1))
        files[-1] = {}

    for name, tensor in weights:
        size_of = tensor.numel() * tensor.element_size()
        if files[-1] and size + size_of > MAX_FILE_BYTES:
            write()
            size = 0
        files[-1][name] = tensor.cpu().contiguous().clone()
        size, total = size + size_of, total + size_of
    write()
    if len(paths) == 1:
        paths[0].rename(directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(paths):05d}.safetensors" for i in range(len(paths))]
    for path, name in zip(paths, names, strict=True):
        path.rename(directory / name)
    index = {"metadata": {"total_size": total}, "weight_map": {k: names[i] for k, i in sorted(where.items())}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
