"""Hugging Face config -> TransformerConfig -> megatron-core GPTModel, with one of two kinds of layers.

"local" layers run on CPU and CUDA. megatron-core's local attention materialises s x s scores and knows no
grouped-query kernel, and its local norm refuses sequence parallelism; the layer spec here brings its own of
both. "transformer_engine" layers are megatron-core's own spec of Transformer Engine's modules, for CUDA.
Parameters, checkpoints and rotary frequencies are the same for both.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from siren_megatron.architecture import Architecture, Rope
from siren_megatron.attention import CausalAttention
from siren_megatron.platform import Platform
from siren_megatron.run_options import ParallelOptions


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


def check_architecture(hf_config: dict[str, Any], seq_length: int = 0) -> None:
    """Refuse models that the layers here would compute wrongly.

    Args:
        hf_config: config.json.
        seq_length: longest sequence, in tokens.

    Raises:
        ValueError: one line that names the key of config.json.
    """
    try:
        Architecture.of(hf_config).check_length(seq_length)
    except ValueError as error:
        raise ValueError(f"--hf-checkpoint: {error}") from None


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians a token of each pair of a head's dimensions, float32 [head_dim / 2].

    llama3 (Llama 3.1) stretches wavelengths longer than original_length / low_freq_factor by factor, keeps
    those shorter than original_length / high_freq_factor, and blends in between. The order of operations is
    transformers' (`modeling_rope_utils`), so that the float32 values are the same to the bit: an error of one
    unit in the last place is a wrong phase at position 100,000.
    """
    frequencies = 1.0 / (rope.base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequencies
        kept = (rope.original_length / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blend = (1 - kept) * frequencies / rope.factor + kept * frequencies
        stretched = torch.where(
            wavelength > rope.original_length / rope.low_freq_factor, frequencies / rope.factor, blend
        )
        return torch.where(wavelength < rope.original_length / rope.high_freq_factor, frequencies, stretched)
    assert rope.kind == "default", rope.kind
    return frequencies


def transformer_config(
    hf_config: dict[str, Any],
    parallel: ParallelOptions,
    platform: Platform,
    *,
    bf16: bool = False,
    transformer_impl: str = "local",
) -> TransformerConfig:
    """megatron-core's configuration of a Hugging Face model.

    Args:
        hf_config: config.json.
        parallel: how the model is cut.
        platform: device and backend of this rank.
        bf16: parameters and activations in bfloat16.
        transformer_impl: "local" or "transformer_engine".
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    architecture = Architecture.of(hf_config)
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        ffn_hidden_size=architecture.ffn,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head,
        layernorm_epsilon=architecture.norm_eps,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        transformer_impl=transformer_impl,
        # Transformer Engine's experts are one grouped product, local ones are computed one after the other.
        moe_grouped_gemm=transformer_impl == "transformer_engine" and architecture.experts > 0,
        # Every weight is loaded from the checkpoint; initialising it first would be time thrown away.
        perform_initialization=False,
        use_cpu_initialization=not platform.is_cuda,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        # gloo mixes up several sends between two ranks, and frees tensors that are still being sent; the
        # interleaved schedule needs the overlapped form everywhere.
        batch_p2p_comm=platform.is_cuda and parallel.virtual_stages is None,
        overlap_p2p_comm=parallel.virtual_stages is not None,
        deallocate_pipeline_outputs=platform.is_cuda,
        # Gradients are plain sums over micro-batches and ranks: see loss_func in trainer.py.
        calculate_per_token_loss=True,
        **_recompute_options(parallel),
        **(_expert_options(architecture, parallel, platform) if architecture.experts else {}),
    )


def _recompute_options(parallel: ParallelOptions) -> dict[str, Any]:
    if parallel.recompute_granularity == "none":
        return {}
    if parallel.recompute_granularity == "selective":
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": parallel.recompute_num_layers,
    }


def _expert_options(
    architecture: Architecture, parallel: ParallelOptions, platform: Platform
) -> dict[str, Any]:
    # gloo gathers equal shares only, and the all-to-all dispatcher gathers experts' shares over tensor ranks.
    equal_shares_only = not platform.is_cuda and parallel.expert_tensor_size > 1
    return {
        "num_moe_experts": architecture.experts,
        "moe_router_topk": architecture.experts_per_token,
        "moe_ffn_hidden_size": architecture.expert_ffn,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        # The chosen experts' probabilities, renormalised, are the softmax of their logits alone.
        "moe_router_pre_softmax": not architecture.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "allgather" if equal_shares_only else "alltoall",
    }


def build_model(hf_config: dict[str, Any], config: TransformerConfig) -> list[GPTModel | Float16Module]:
    """This rank's chunks of the model (one without virtual stages), weights not yet loaded.

    Args:
        hf_config: config.json.
        config: from `transformer_config`; megatron-core's parallel state is initialised.

    Raises:
        ValueError: Transformer Engine's layers are asked for, and it cannot be imported.
    """
    stages = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(hf_config, config, stage) for stage in ([None] if stages is None else range(stages))]


def _layer_spec(architecture: Architecture, config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """How a layer is built, and the norm behind the last one."""
    if config.transformer_impl == "local":
        return _local_layer_spec(architecture), RMSNorm
    if not HAVE_TE:
        raise ValueError(
            "--transformer-impl transformer_engine: Transformer Engine is installed and cannot be imported; "
            "python -c 'import transformer_engine.pytorch' says why"
        )
    experts = architecture.experts or None
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=architecture.qk_norm
    )
    return layer, TENorm


def _local_layer_spec(architecture: Architecture) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(num_experts=architecture.experts or None, normalization="RMSNorm")
    attention = layer.submodules.self_attention
    head_norm = RMSNorm if architecture.qk_norm else IdentityOp
    layer.submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(
            attention,
            submodules=dataclasses.replace(
                attention.submodules,
                core_attention=CausalAttention,
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        # Checkpoints name norms as Transformer Engine's layers do: each fused with the matrix behind it.
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            **({} if architecture.experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
        },
    )
    return layer


def _build_chunk(
    hf_config: dict[str, Any], config: TransformerConfig, virtual_stage: int | None
) -> GPTModel | Float16Module:
    architecture = Architecture.of(hf_config)
    layer, norm = _layer_spec(architecture, config)
    block = TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, virtual_stage), layer_norm=norm
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=architecture.padded_vocab(config.tensor_model_parallel_size),
        max_sequence_length=architecture.max_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
        vp_stage=virtual_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
    )
    # megatron-core's own scaling fixes three of llama3's four parameters.
    device = torch.cuda.current_device()
    model.rotary_pos_emb.inv_freq = inverse_frequencies(architecture.rope, architecture.head).to(device)
    _mark_tensor_parallel(model)
    model.to(torch.cuda.current_device())
    return Float16Module(config, model) if config.bf16 else model


def _mark_tensor_parallel(model: GPTModel) -> None:
    """Say which dimension of a weight is cut over the tensor ranks.

    megatron-core does so while it initialises a weight; Transformer Engine always does. Without the mark
    megatron-core takes the other ranks' shards for copies, and leaves them out of the gradient norm.
    """
    dimensions = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) in dimensions and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dimensions[type(module)], 1)
