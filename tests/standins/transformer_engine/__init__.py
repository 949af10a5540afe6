"""A stand-in for Transformer Engine on CPUs: what megatron-core's extension needs of it, in plain torch.

It has the modules' names, arguments, parameters, their attributes and results as Transformer Engine 2.x has
them, and nothing of its kernels: no FP8, no context parallelism, no dropout. So a CPU can test that our layer
spec, names of weights, checkpoints, layouts and packed sequences are right for Transformer Engine's layers.
Only `tests/nightly` tests Transformer Engine itself. On sys.path by `tests.distributed.te_standin` alone.
"""

from transformer_engine import common, pytorch

# megatron-core asks which of its features there are; 2.7 brings kernels that have no stand-in.
__version__ = "2.6.0"
__all__ = ["common", "pytorch"]
