"""How megatron-core's parameters are made of Hugging Face's tensors: one table a model family. Data only.

A row reads: megatron-core's name = cut (Hugging Face name [its dimensions], ...). The names on the left are
those of Megatron's distributed checkpoints: layers stacked along a first dimension, a layer's experts along
a second. They are the same for local layers and for Transformer Engine's fused ones.

cut         the whole megatron-core tensor                   what tensor rank r of tp holds
----------  -----------------------------------------------  ---------------------------------------------
replicated  the Hugging Face tensor                          all of it
vocab       the tensor, rows padded to 128·tp with zeros     the r-th of tp equal row blocks
columns     the tensor                                       the r-th of tp equal column blocks
gated       [gate; up]                                       the r-th row block of gate, then that of up
qkv         a key-value head's queries, key, value, ...      the r-th of tp equal row blocks: whole heads

A new family is a new entry of TABLES. What a model is built with follows from it: a row `linear_qkv.bias`
gives the projections biases, `q_layernorm` normalises queries and keys, `router` makes layers of experts.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CUTS = ("replicated", "vocab", "columns", "gated", "qkv")


class Source(NamedTuple):
    """A Hugging Face tensor: name with `{layer}` and `{expert}`, dimensions as `Architecture` names them."""

    name: str
    dims: tuple[str, ...]


class Rule(NamedTuple):
    """How one megatron-core parameter is made of Hugging Face tensors: the cut, see the head of this file."""

    cut: str
    sources: tuple[Source, ...]

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.sources[0].name

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.sources[0].name


Table = dict[str, Rule]


def _rule(cut: str, *sources: str) -> Rule:
    assert cut in CUTS, cut
    parsed = [re.fullmatch(r"(\S+) \[(.+)\]", source) for source in sources]
    return Rule(cut, tuple(Source(match[1], tuple(match[2].split(", "))) for match in parsed))


_L = "decoder.layers."
_H = "model.layers.{layer}."
_E = _H + "mlp.experts.{expert}."

# fmt: off
# ruff: noqa: E501
ENDS = {
    "embedding.word_embeddings.weight": _rule("vocab", "model.embed_tokens.weight [vocab, hidden]"),
    "decoder.final_layernorm.weight": _rule("replicated", "model.norm.weight [hidden]"),
    "output_layer.weight": _rule("vocab", "lm_head.weight [vocab, hidden]"),
}
ATTENTION = {
    _L + "self_attention.linear_qkv.layer_norm_weight": _rule("replicated", _H + "input_layernorm.weight [hidden]"),
    _L + "self_attention.linear_qkv.weight": _rule(
        "qkv",
        _H + "self_attn.q_proj.weight [queries, hidden]",
        _H + "self_attn.k_proj.weight [keys, hidden]",
        _H + "self_attn.v_proj.weight [keys, hidden]",
    ),
    _L + "self_attention.linear_proj.weight": _rule("columns", _H + "self_attn.o_proj.weight [hidden, queries]"),
}
QKV_BIAS = {
    _L + "self_attention.linear_qkv.bias": _rule(
        "qkv",
        _H + "self_attn.q_proj.bias [queries]",
        _H + "self_attn.k_proj.bias [keys]",
        _H + "self_attn.v_proj.bias [keys]",
    ),
}
QK_NORM = {
    _L + "self_attention.q_layernorm.weight": _rule("replicated", _H + "self_attn.q_norm.weight [head]"),
    _L + "self_attention.k_layernorm.weight": _rule("replicated", _H + "self_attn.k_norm.weight [head]"),
}
DENSE_MLP = {
    _L + "mlp.linear_fc1.layer_norm_weight": _rule("replicated", _H + "post_attention_layernorm.weight [hidden]"),
    _L + "mlp.linear_fc1.weight": _rule(
        "gated", _H + "mlp.gate_proj.weight [ffn, hidden]", _H + "mlp.up_proj.weight [ffn, hidden]"
    ),
    _L + "mlp.linear_fc2.weight": _rule("columns", _H + "mlp.down_proj.weight [hidden, ffn]"),
}
EXPERTS = {
    _L + "pre_mlp_layernorm.weight": _rule("replicated", _H + "post_attention_layernorm.weight [hidden]"),
    _L + "mlp.router.weight": _rule("replicated", _H + "mlp.gate.weight [experts, hidden]"),
    _L + "mlp.experts.experts.linear_fc1.weight": _rule(
        "gated", _E + "gate_proj.weight [expert_ffn, hidden]", _E + "up_proj.weight [expert_ffn, hidden]"
    ),
    _L + "mlp.experts.experts.linear_fc2.weight": _rule("columns", _E + "down_proj.weight [hidden, expert_ffn]"),
}

TABLES: dict[str, Table] = {
    "LlamaForCausalLM":    ENDS | ATTENTION | DENSE_MLP,
    "MistralForCausalLM":  ENDS | ATTENTION | DENSE_MLP,
    "Qwen2ForCausalLM":    ENDS | ATTENTION | QKV_BIAS | DENSE_MLP,
    "Qwen3ForCausalLM":    ENDS | ATTENTION | QK_NORM | DENSE_MLP,
    "Qwen3MoeForCausalLM": ENDS | ATTENTION | QK_NORM | EXPERTS,
}
# fmt: on

IGNORED_SOURCES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Tensors of old Hugging Face checkpoints that follow from the configuration; transformers ignores them too."""


class ParameterName(NamedTuple):
    """A parameter's name in the tables, and which layer and expert of those that this module holds it is of."""

    key: str
    layer: int | None
    expert: int | None


def parameter_name(name: str, table: Table) -> ParameterName:
    """The name in the table of a megatron-core model's parameter, local or Transformer Engine layers.

    Args:
        name: as `named_parameters` gives it, with any wrappers' prefix; layer and expert count from this
            module's first.
        table: the model's.

    Raises:
        ValueError: the table has no such row.
    """
    full_name = name
    name = re.sub(r"^(module\.)+", "", name)
    layer = expert = None
    if match := re.match(r"decoder\.layers\.(\d+)\.", name):
        layer, name = int(match[1]), _L + name[match.end() :]
    if match := re.search(r"mlp\.experts\.local_experts\.(\d+)\.", name):
        expert, name = int(match[1]), name.replace(match[0], "mlp.experts.experts.")
    elif match := re.search(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)$", name):
        expert, name = int(match[2]), name.replace(match[0], f"mlp.experts.experts.{match[1]}")
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    if name not in table:
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    if name not in table:
        raise ValueError(f"parameter {full_name} has no row in the conversion table")
    return ParameterName(name, layer, expert)
