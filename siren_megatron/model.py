"""Hugging Face config -> TransformerConfig -> megatron-core GPTModel, with layers that run on CPU and CUDA.

Legend: s = sequence length, b = micro-batch, h = hidden size, np = attention heads of this tensor rank,
ng = key-value heads of this rank, hn = head size.

megatron-core's local attention materialises s x s scores and knows no grouped-query kernel, and its local
norm refuses sequence parallelism; the layer spec here brings its own of both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from siren_megatron.config import ParallelOptions
from siren_megatron.platform import Platform

ARCHITECTURES = ("Qwen2ForCausalLM",)
VOCAB_MULTIPLE = 128


class RMSNorm(torch.nn.Module):
    """x / rms(x) · weight over the last dimension, computed in fp32.

    The weight is marked so that Megatron sums its gradient over the tensor ranks under sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return torch.nn.functional.rms_norm(x.float(), (x.size(-1),), self.weight.float(), self.eps).to(
            x.dtype
        )


class CausalAttention(torch.nn.Module):
    """Megatron's core-attention interface on `scaled_dot_product_attention`: causal, grouped-query.

    Rows are padded on the right only, so the causal mask alone keeps real tokens from seeing padding.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, np, hn], key and value [s, b, ng, hn] -> [s, b, np·hn]."""
        assert packed_seq_params is None and attention_bias is None
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = key.size(1) != query.size(1)
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
        return context.permute(2, 0, 1, 3).reshape(context.size(2), context.size(0), -1)


def check_architecture(hf_config: dict[str, Any]) -> None:
    """Refuse models that the layers here would compute wrongly.

    Raises:
        ValueError: one line that names the key of config.json.
    """
    names = hf_config.get("architectures") or []
    if not set(names) & set(ARCHITECTURES):
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"--hf-checkpoint: architecture {names or 'unknown'} is not supported (known: {known})"
        )
    if hf_config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"--hf-checkpoint: hidden_act {hf_config['hidden_act']} is not supported, only silu")
    if hf_config.get("use_sliding_window"):
        raise ValueError("--hf-checkpoint: use_sliding_window is not supported")
    kind = _rope(hf_config).get("rope_type") or _rope(hf_config).get("type") or "default"
    if kind != "default":
        raise ValueError(f"--hf-checkpoint: rope scaling of type {kind} is not supported")


def _rope(hf_config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters: `rope_parameters` since transformers 5, `rope_scaling` and `rope_theta` before."""
    return hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Columns of the embedding: a multiple of 128 on every tensor rank, as Megatron-LM pads it."""
    multiple = VOCAB_MULTIPLE * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def transformer_config(
    hf_config: dict[str, Any], parallel: ParallelOptions, platform: Platform, *, bf16: bool = False
) -> TransformerConfig:
    """megatron-core's configuration of a Hugging Face model.

    Args:
        hf_config: config.json.
        parallel: how the model is cut.
        platform: device and backend of this rank.
        bf16: parameters and activations in bfloat16.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    heads = hf_config["num_attention_heads"]
    return TransformerConfig(
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hf_config["hidden_size"],
        ffn_hidden_size=hf_config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=hf_config.get("num_key_value_heads", heads),
        kv_channels=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
        layernorm_epsilon=hf_config.get("rms_norm_eps", 1e-6),
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Every weight is loaded from the checkpoint; initialising it first would be time thrown away.
        perform_initialization=False,
        use_cpu_initialization=not platform.is_cuda,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        # gloo mixes up several sends between two ranks, and frees tensors that are still being sent.
        batch_p2p_comm=platform.is_cuda,
        deallocate_pipeline_outputs=platform.is_cuda,
        # Gradients are plain sums over micro-batches and ranks: see loss_func in trainer.py.
        calculate_per_token_loss=True,
    )


def build_model(hf_config: dict[str, Any], config: TransformerConfig) -> GPTModel | Float16Module:
    """This rank's stage of the model, weights not yet loaded.

    Args:
        hf_config: config.json.
        config: from `transformer_config`; megatron-core's parallel state is initialised.
    """
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention = layer.submodules.self_attention
    layer.submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(
            attention, submodules=dataclasses.replace(attention.submodules, core_attention=CausalAttention)
        ),
        # Our checkpoints name norms as Transformer Engine's fused layers do not: keep the plain names.
        sharded_state_dict_keys_map={},
    )
    block = TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )
    rope = _rope(hf_config)
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=padded_vocab_size(hf_config["vocab_size"], config.tensor_model_parallel_size),
        max_sequence_length=hf_config.get("max_position_embeddings", 4096),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=bool(hf_config.get("tie_word_embeddings", False)),
        position_embedding_type="rope",
        rotary_base=rope.get("rope_theta", hf_config.get("rope_theta", 10000.0)),
    )
    _mark_tensor_parallel(model)
    model.to(torch.cuda.current_device())
    return Float16Module(config, model) if config.bf16 else model


def _mark_tensor_parallel(model: GPTModel) -> None:
    """Say which dimension of a weight is cut over the tensor ranks.

    megatron-core does so while it initialises a weight. Without the mark it takes the other ranks' shards for
    copies, and leaves them out of the gradient norm.
    """
    dimensions = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) in dimensions and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dimensions[type(module)], 1)
