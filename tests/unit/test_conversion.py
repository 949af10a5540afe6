"""The tables and cuts: shards by slicing written out here, and back, for every family, layout and cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siren_megatron.architecture import Architecture, Layout
from siren_megatron.conversion.cuts import (
    Box,
    InMemory,
    boxes,
    join,
    read_box,
    read_shard,
    split,
    whole_shape,
)
from siren_megatron.conversion.files import HfReader, HfWriter, read_safetensors_header
from siren_megatron.families import TABLES, parameter_name


def architecture(name: str = "Qwen2ForCausalLM", **overrides) -> Architecture:
    config = {
        "architectures": [name],
        "vocab_size": 300,
        "hidden_size": 24,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "sliding_window": None,
    }
    return Architecture.of({**config, **overrides})


def tensors_of(arch: Architecture) -> dict[str, torch.Tensor]:
    """A number of its own for every element of every Hugging Face tensor."""
    start, tensors = 0, {}
    for name, shape in arch.hf_shapes().items():
        numel = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + numel, dtype=torch.float64).view(shape)
        start += numel
    return tensors


def plain_shard(
    cut: str, sources: list[torch.Tensor], arch: Architecture, tp: int, rank: int
) -> torch.Tensor:
    """What Megatron-LM documents for each kind of parameter, by chunks of whole tensors."""
    if cut == "replicated":
        return sources[0]
    if cut == "columns":
        return sources[0].chunk(tp, dim=1)[rank]
    if cut == "vocab":
        padded = -(-arch.vocab // (128 * tp)) * 128 * tp
        zeros = sources[0].new_zeros(padded - arch.vocab, arch.hidden)
        return torch.cat([sources[0], zeros]).chunk(tp)[rank]
    if cut == "gated":
        return torch.cat([sources[0].chunk(tp)[rank], sources[1].chunk(tp)[rank]])
    assert cut == "qkv"
    heads, per_group = [], arch.heads // arch.kv_heads
    query, key, value = (t.split(arch.head) for t in sources)
    for group in range(arch.kv_heads):
        heads += [*query[group * per_group : (group + 1) * per_group], key[group], value[group]]
    return torch.cat(heads).chunk(tp)[rank]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", TABLES)
def test_shards_are_megatrons_and_join_to_the_same_tensors(name, tp):
    arch = architecture(name)
    tensors = tensors_of(arch)
    seen = set()
    for parameter in arch.parameters():
        sources = [tensors[source] for source in parameter.sources()]
        shards = split(parameter.rule, arch, sources, tp)
        for rank, shard in enumerate(shards):
            assert torch.equal(shard, plain_shard(parameter.rule.cut, sources, arch, tp, rank)), parameter.key
        back = join(parameter.rule, arch, shards)
        assert [t.shape for t in back] == [t.shape for t in sources]
        assert all(torch.equal(a, b) for a, b in zip(back, sources, strict=True)), parameter.key
        seen.update(parameter.sources())
    assert seen == set(tensors)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(TABLES)),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.data(),
)
def test_any_box_of_a_whole_tensor_reads_as_its_slice(name, tp, groups, per_group, data):
    arch = architecture(name, num_key_value_heads=groups * tp, num_attention_heads=groups * per_group * tp)
    tensors = tensors_of(arch)
    parameter = data.draw(st.sampled_from(list(arch.parameters())))
    rule, sources = parameter.rule, [tensors[source] for source in parameter.sources()]
    shape = whole_shape(rule, arch, tp)
    whole = torch.full(shape, -1.0, dtype=torch.float64)
    for rank in range(tp):
        shard, row = read_shard(rule, arch, [InMemory(t) for t in sources], tp, rank), 0
        for box in boxes(rule, arch, tp, rank):
            box.of(whole).copy_(shard[row : row + box.shape[0]])
            row += box.shape[0]
    assert (whole >= 0).all(), "shards leave a part of the whole out"
    row = data.draw(st.integers(0, shape[0] - 1))
    column = data.draw(st.integers(0, shape[1] - 1)) if len(shape) == 2 else 0
    box = Box(
        row,
        data.draw(st.integers(row + 1, shape[0])),
        column,
        data.draw(st.integers(column + 1, shape[1])) if len(shape) == 2 else 0,
    )
    assert torch.equal(read_box(rule, arch, [InMemory(t) for t in sources], box), box.of(whole))


def test_a_cut_that_does_not_divide_is_refused():
    arch = architecture(num_key_value_heads=2)
    rule = arch.table["decoder.layers.self_attention.linear_qkv.weight"]
    with pytest.raises(ValueError, match="4 tensor ranks do not divide the 2 .*q_proj"):
        boxes(rule, arch, 4, 0)


@pytest.mark.parametrize(
    ("parameter", "name", "expected"),
    [
        (
            "module.module.decoder.layers.3.input_layernorm.weight",
            "Qwen2ForCausalLM",
            ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", 3, None),
        ),
        (
            "decoder.layers.0.pre_mlp_layernorm.weight",
            "LlamaForCausalLM",
            ("decoder.layers.mlp.linear_fc1.layer_norm_weight", 0, None),
        ),
        (
            "decoder.layers.0.pre_mlp_layernorm.weight",
            "Qwen3MoeForCausalLM",
            ("decoder.layers.pre_mlp_layernorm.weight", 0, None),
        ),
        (
            "decoder.layers.1.mlp.experts.local_experts.5.linear_fc1.weight",
            "Qwen3MoeForCausalLM",
            ("decoder.layers.mlp.experts.experts.linear_fc1.weight", 1, 5),
        ),
        (  # Transformer Engine's grouped experts
            "decoder.layers.1.mlp.experts.linear_fc2.weight12",
            "Qwen3MoeForCausalLM",
            ("decoder.layers.mlp.experts.experts.linear_fc2.weight", 1, 12),
        ),
        (
            "module.embedding.word_embeddings.weight",
            "LlamaForCausalLM",
            ("embedding.word_embeddings.weight", None, None),
        ),
    ],
)
def test_parameter_names(parameter, name, expected):
    assert tuple(parameter_name(parameter, TABLES[name])) == expected


def test_a_parameter_without_a_row_is_refused():
    with pytest.raises(ValueError, match=r"decoder.layers.0.self_attention.linear_qkv.bias has no row"):
        parameter_name("decoder.layers.0.self_attention.linear_qkv.bias", TABLES["LlamaForCausalLM"])


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("GPT2LMHeadModel", {}, r"architecture \['GPT2LMHeadModel'\] is not supported \(known: Llama"),
        ("LlamaForCausalLM", {"attention_bias": True}, "attention_bias is not supported"),
        ("LlamaForCausalLM", {"mlp_bias": True}, "mlp_bias is not supported"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type dynamic"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "type yarn"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("LlamaForCausalLM", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ("LlamaForCausalLM", {"vocab_size": None}, "no positive vocab_size"),
        ("LlamaForCausalLM", {"hidden_size": "24"}, "no positive hidden_size"),
        ("LlamaForCausalLM", {"num_hidden_layers": True}, "no positive num_hidden_layers"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds num_experts 4"),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "no gradient"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message) as error:
        architecture(name, **change)
    assert "\n" not in str(error.value)


def test_old_and_new_spellings_of_rotations_are_the_same():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = architecture("LlamaForCausalLM", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    older = architecture("LlamaForCausalLM", rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = architecture(
        "LlamaForCausalLM", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}
    )
    assert old.rope == older.rope == new.rope
    assert old.rope.base == 5e5 and old.rope.factor == 8.0 and old.rope.original_length == 8192


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 6.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 24,
        },
    ],
)
def test_rotary_frequencies_are_transformers_to_the_bit(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from siren_megatron import platform

    platform.install()
    from siren_megatron.model import inverse_frequencies

    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=scaling)
    rope = architecture("LlamaForCausalLM", head_dim=128, rope_parameters=scaling).rope
    assert torch.equal(inverse_frequencies(rope, 128), LlamaRotaryEmbedding(config).inv_freq)


@pytest.mark.parametrize(
    ("name", "change", "window"),
    [
        ("MistralForCausalLM", {"sliding_window": 4096}, 4096),
        ("MistralForCausalLM", {"sliding_window": None}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 4096, "use_sliding_window": False}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 4096, "use_sliding_window": True}, 4096),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
            None,
        ),
        ("LlamaForCausalLM", {"sliding_window": 4096}, None),
    ],
)
def test_sliding_window(name, change, window):
    arch = architecture(name, **change)
    assert arch.window == window
    arch.check_length(4096)
    if window is not None:
        with pytest.raises(ValueError, match="sliding window of 4096 tokens is shorter than the .* 4097"):
            arch.check_length(4097)


def test_a_missing_window_of_mistral_is_transformers_default():
    from transformers import MistralConfig

    config = {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    assert Architecture.of(config).window == MistralConfig().sliding_window


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=3), "--tensor-model-parallel-size 3 does not divide the model's num_attention_heads 8"),
        (Layout(tp=8), "--tensor-model-parallel-size 8 does not divide the model's num_key_value_heads 4"),
        (Layout(pp=4), "--pipeline-model-parallel-size 4 does not divide the model's num_hidden_layers 2"),
        (Layout(ep=3), "--expert-model-parallel-size 3 does not divide the model's num_experts 4"),
        (Layout(tp=0), "--tensor-model-parallel-size 0"),
    ],
)
def test_layouts_that_do_not_fit(layout, message):
    with pytest.raises(ValueError, match=message):
        layout.check(architecture("Qwen3MoeForCausalLM"))


def test_a_dense_model_has_no_experts_to_share():
    with pytest.raises(ValueError, match="a Qwen2ForCausalLM has no experts"):
        Layout(ep=2).check(architecture())


# ---------------------------------------------------------------- safetensors


def test_files_written_in_parts_are_safetensors(tmp_path):
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(11, generator=generator).bfloat16(),
        "c": torch.randn(3, 2, generator=generator).half(),
    }
    plan = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with HfWriter(tmp_path, plan, max_file_bytes=150) as writer:
        for name in ("c", "b"):
            writer.write(name, tensors[name])
        writer.write("a", tensors["a"][4:], 4)
        writer.write("a", tensors["a"][:4])
        writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    arrays = HfReader(tmp_path).arrays
    part = torch.empty(2, 2)
    arrays["a"].read_into(part, Box(3, 5, 1, 3))
    assert torch.equal(part, tensors["a"][3:5, 1:3])


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory) -> tuple[Path, bytes]:
    """A small safetensors file's path, free to be overwritten, and its bytes."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file({"x": torch.arange(12.0).view(3, 4), "y": torch.ones(5, dtype=torch.bfloat16)}, path)
    return path, path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_in_one_line(valid_file, data):
    path, content = valid_file[0], bytearray(valid_file[1])
    kind = data.draw(st.sampled_from(["cut", "bytes", "header"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "bytes":
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, 160))] = data.draw(st.integers(0, 255))
    else:
        values = st.recursive(
            st.none() | st.integers(-(10**20), 10**20) | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3)
            ),
            max_leaves=6,
        )
        entry = st.fixed_dictionaries(
            {"dtype": values | st.just("F32"), "shape": values, "data_offsets": values}
        )
        header = json.dumps(
            data.draw(st.dictionaries(st.text(max_size=3), values | entry, max_size=3))
        ).encode()
        content = bytearray(len(header).to_bytes(8, "little") + header + b"\0" * 48)
    path.write_bytes(bytes(content))
    try:
        arrays = read_safetensors_header(path)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
    else:
        end = max((a.offset + a.nbytes for a in arrays.values()), default=0)
        assert end <= path.stat().st_size
