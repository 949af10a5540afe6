"""What a Hugging Face config.json says of a model, checked: nothing is built that would compute otherwise.

Standard library only. Both spellings are read: `rope_theta` and `rope_scaling`, and transformers 5's
`rope_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from siren_megatron.families import TABLES, Rule, Table

VOCAB_MULTIPLE = 128


class Parameter(NamedTuple):
    """One megatron-core parameter of the whole model; layer and expert are None where it has none."""

    key: str
    layer: int | None
    expert: int | None
    rule: Rule

    def sources(self) -> list[str]:
        """Names of its Hugging Face tensors."""
        return [s.name.format(layer=self.layer, expert=self.expert) for s in self.rule.sources]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Args:
        base: theta.
        kind: "default", "linear" (positions divided by factor) or "llama3".
        factor, low_freq_factor, high_freq_factor, original_length: llama3's parameters; original_length is
            `original_max_position_embeddings`, in tokens.
    """

    base: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True)
class Architecture:
    """A supported model.

    Args:
        name: its class in transformers.
        window: tokens that a position sees, None for all.
        experts: experts of a layer, 0 in dense models; expert_ffn is the width of one of them.
        norm_topk_prob: whether the chosen experts' probabilities are renormalised.
    """

    name: str
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    norm_eps: float
    tied: bool
    rope: Rope
    max_length: int
    window: int | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    norm_topk_prob: bool = False

    @classmethod
    def of(cls, hf_config: dict[str, Any]) -> Architecture:
        """Read config.json.

        Raises:
            ValueError: one line that names the key: the architecture is unknown, a key is missing or out of
                range, or it asks for something that is computed otherwise here.
        """
        names = hf_config.get("architectures")
        known = [n for n in TABLES if n in names] if isinstance(names, list) else []
        if not known:
            found = _one_line(names or "unknown")
            raise ValueError(f"architecture {found} is not supported (known: {', '.join(TABLES)})")
        name = known[0]
        _refuse_variants(hf_config)
        heads = _positive(hf_config, "num_attention_heads")
        kv_heads = _positive(hf_config, "num_key_value_heads", heads)
        hidden = _positive(hf_config, "hidden_size")
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        if "head_dim" not in hf_config and hidden % heads:
            raise ValueError(f"num_attention_heads {heads} does not divide hidden_size {hidden}")
        max_length = _positive(hf_config, "max_position_embeddings", 2048)
        head = _positive(hf_config, "head_dim", hidden // heads)
        if head % 2:
            raise ValueError(f"head_dim {head} is odd: rotary embeddings need pairs")
        experts = {}
        if "decoder.layers.mlp.router.weight" in TABLES[name]:
            experts = _experts(hf_config)
        return cls(
            name=name,
            vocab=_positive(hf_config, "vocab_size"),
            hidden=hidden,
            ffn=_positive(hf_config, "intermediate_size"),
            layers=_positive(hf_config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head=head,
            norm_eps=_number(hf_config, "rms_norm_eps", 1e-6),
            tied=bool(hf_config.get("tie_word_embeddings", False)),
            rope=_rope(hf_config, max_length),
            max_length=max_length,
            window=_window(name, hf_config),
            **experts,
        )

    @property
    def table(self) -> Table:
        return TABLES[self.name]

    @property
    def qkv_bias(self) -> bool:
        return "decoder.layers.self_attention.linear_qkv.bias" in self.table

    @property
    def qk_norm(self) -> bool:
        return "decoder.layers.self_attention.q_layernorm.weight" in self.table

    @property
    def queries(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding: a multiple of 128 on every tensor rank, as Megatron-LM pads it."""
        multiple = VOCAB_MULTIPLE * tp
        return -(-self.vocab // multiple) * multiple

    def source_shapes(self, rule: Rule) -> list[tuple[int, ...]]:
        """Shapes of a parameter's Hugging Face tensors."""
        return [tuple(getattr(self, dim) for dim in source.dims) for source in rule.sources]

    def parameters(self) -> Iterator[Parameter]:
        """Every megatron-core parameter: the embedding, the layers in order, the final norm, the head."""
        ends = [Parameter(key, None, None, rule) for key, rule in self.table.items() if not rule.per_layer]
        yield from (p for p in ends if p.key.startswith("embedding."))
        for layer in range(self.layers):
            for key, rule in self.table.items():
                if rule.per_layer:
                    for expert in range(self.experts) if rule.per_expert else (None,):
                        yield Parameter(key, layer, expert, rule)
        for parameter in ends:
            if parameter.key.startswith("embedding.") or (
                parameter.key == "output_layer.weight" and self.tied
            ):
                continue
            yield parameter

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every Hugging Face tensor, in the order of `parameters`."""
        return {
            name: shape
            for parameter in self.parameters()
            for name, shape in zip(parameter.sources(), self.source_shapes(parameter.rule), strict=True)
        }

    def check_length(self, seq_length: int) -> None:
        """Refuse sequences longer than the attention window: attention here sees all tokens.

        Args:
            seq_length: longest sequence, in tokens.
        """
        if self.window is not None and self.window < seq_length:
            raise ValueError(
                f"the model's sliding window of {self.window} tokens is shorter than the sequence length "
                f"{seq_length}, and sliding-window attention is not supported"
            )


@dataclass(frozen=True)
class Layout:
    """Ranks that share a layer (tp), pipeline stages (pp) and ranks that share a layer's experts (ep)."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def check(self, architecture: Architecture) -> None:
        """Refuse a layout that megatron-core would refuse.

        Raises:
            ValueError: one line that names the flag.
        """
        divided = [
            ("--tensor-model-parallel-size", self.tp, "num_attention_heads", architecture.heads),
            ("--tensor-model-parallel-size", self.tp, "num_key_value_heads", architecture.kv_heads),
            ("--pipeline-model-parallel-size", self.pp, "num_hidden_layers", architecture.layers),
        ]
        if architecture.experts:
            divided += [
                ("--tensor-model-parallel-size", self.tp, "moe_intermediate_size", architecture.expert_ffn),
                ("--expert-model-parallel-size", self.ep, "num_experts", architecture.experts),
            ]
        else:
            divided.append(("--tensor-model-parallel-size", self.tp, "intermediate_size", architecture.ffn))
            if self.ep > 1:
                raise ValueError(f"--expert-model-parallel-size: a {architecture.name} has no experts")
        for flag, size, key, value in divided:
            if size < 1 or value % size:
                raise ValueError(f"{flag} {size} does not divide the model's {key} {value}")


def _one_line(value: Any) -> str:
    """A value of config.json for a message, where it may hold line feeds or have no end."""
    return " ".join(str(value).split())[:200]


def _number(hf_config: dict[str, Any], key: str, default: float | None = None) -> float:
    value = hf_config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config.json has no positive {key}")
    return value


def _positive(hf_config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = _number(hf_config, key, default)
    if value != int(value):
        raise ValueError(f"config.json has no whole number {key}: {value}")
    return int(value)


def _refuse_variants(hf_config: dict[str, Any]) -> None:
    if hf_config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {_one_line(hf_config['hidden_act'])} is not supported, only silu")
    for key in ("attention_bias", "mlp_bias"):
        if hf_config.get(key):
            raise ValueError(f"{key} is not supported (biases of the output or MLP projections)")
    if hf_config.get("quantization_config"):
        raise ValueError("quantization_config is not supported: take the unquantised checkpoint")
    if hf_config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported")


def _rope(hf_config: dict[str, Any], max_length: int) -> Rope:
    parameters: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = hf_config.get(key) or {}
        if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
            raise ValueError(f"{key} of config.json is not supported: {value}")
        parameters.update(value)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported")
    base = _number({"rope_theta": hf_config.get("rope_theta"), **parameters}, "rope_theta", 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return Rope(base)
    if kind == "linear":
        return Rope(base, kind, _number(parameters, "factor"))
    if kind == "llama3":
        rope = Rope(
            base,
            kind,
            _number(parameters, "factor"),
            _number(parameters, "low_freq_factor"),
            _number(parameters, "high_freq_factor"),
            _positive(parameters, "original_max_position_embeddings", max_length),
        )
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise ValueError("rope_scaling: high_freq_factor must be greater than low_freq_factor")
        return rope
    raise ValueError(f"rope scaling of type {kind} is not supported (known: default, linear, llama3)")


def _window(name: str, hf_config: dict[str, Any]) -> int | None:
    # Mistral's window holds for every layer, and is 4096 where the key is missing (not null). Qwen's configs
    # name a window that is off unless the flag is on. Llama's have none.
    if name == "MistralForCausalLM":
        window = hf_config.get("sliding_window", 4096)
    else:
        if not hf_config.get("use_sliding_window"):
            return None
        kinds = hf_config.get("layer_types")
        if kinds and "sliding_attention" not in kinds:
            return None
        window = hf_config.get("sliding_window")
    return None if window is None else _positive({"sliding_window": window}, "sliding_window")


def _experts(hf_config: dict[str, Any]) -> dict[str, Any]:
    if hf_config.get("mlp_only_layers") or hf_config.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            "mlp_only_layers and decoder_sparse_step: dense layers among those of experts are not supported"
        )
    experts = _positive(hf_config, "num_local_experts" if "num_local_experts" in hf_config else "num_experts")
    per_token = _positive(hf_config, "num_experts_per_tok")
    normalise = bool(hf_config.get("norm_topk_prob", False))
    if per_token > experts:
        raise ValueError(f"num_experts_per_tok {per_token} exceeds num_experts {experts}")
    if per_token == 1 and normalise:
        raise ValueError(
            "norm_topk_prob with num_experts_per_tok 1 is not supported: the router gets no gradient"
        )
    return {
        "experts": experts,
        "experts_per_token": per_token,
        "expert_ffn": _positive(hf_config, "moe_intermediate_size"),
        "norm_topk_prob": normalise,
    }
