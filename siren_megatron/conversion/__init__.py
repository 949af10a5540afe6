"""Weights between Hugging Face's names and megatron-core's shards, both ways, by the tables of `families`.

- `cuts`: where each rank's shard lies in the whole tensor, and each Hugging Face tensor.
- `files`: tensors in files, read and written in parts; safetensors.
- `live`: a running model: load, gather for vLLM's weight update, export.
- `megatron_writer`, `megatron_reader`: Megatron distributed checkpoints in parts, without a process group.
- `convert`: whole checkpoints: what `tools/convert_hf.py` calls.
"""
