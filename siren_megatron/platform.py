"""CUDA with NCCL or CPU with gloo: the only place that knows which, and that adapts megatron-core to it.

megatron-core names CUDA in many places (`torch.cuda.current_device()`, `device="cuda"`, RNG states, tensor
type names). On a machine without a GPU `install()` points these names at the CPU; on CUDA it changes nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Factories that megatron-core calls with device="cuda".
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


@dataclass(frozen=True)
class Platform:
    """The device of this rank and the collective backend that goes with it."""

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def install(local_rank: int | None = None) -> Platform:
    """Choose the platform of this process and make megatron-core run on it.

    Call before `megatron.core` is imported. Idempotent.

    Args:
        local_rank: index of the GPU on this machine; `LOCAL_RANK` of torchrun when None.
    """
    # megatron-core warns at import of what is not installed and of its own deprecations: nothing to act on.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if torch.cuda.is_available():
        if local_rank is None:
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        _name_missing_kernels()
        return Platform(torch.device("cuda", local_rank), "nccl")
    _point_cuda_at_cpu()
    _name_missing_kernels()
    return Platform(torch.device("cpu"), "gloo")


def init_process_group(platform: Platform, timeout_s: float) -> None:
    """Join torchrun's process group (a group of one when the program is started without torchrun).

    Args:
        timeout_s: seconds after which a collective that a dead rank never joins fails.
    """
    if "RANK" not in os.environ:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group(platform.backend, store=store, rank=0, world_size=1)
        return
    dist.init_process_group(platform.backend, timeout=datetime.timedelta(seconds=timeout_s))


def _name_missing_kernels() -> None:
    """megatron-core's router asks whether a Transformer Engine kernel is None: without it, it is unbound."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


class _NullStream:
    """Stands for a CUDA stream or event where there is one queue only: the CPU's own order."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def _nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = record = wait = synchronize = _nothing

    def record_event(self, event=None):
        return event or _NullStream()

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def _nothing():
    """A new function each time: torch.compile's tables want one function a name."""

    def nothing(*args, **kwargs):
        return None

    return nothing


@functools.cache
def _point_cuda_at_cpu() -> None:
    cpu = torch.device("cpu")
    _import_megatron_uncompiled()
    cuda = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    for name in (
        "manual_seed",
        "manual_seed_all",
        "set_rng_state",
        "synchronize",
        "set_device",
        "empty_cache",
    ):
        setattr(cuda, name, _nothing())
    cuda.random.set_rng_state, cuda.random.manual_seed = _nothing(), _nothing()
    cuda.Stream = cuda.Event = _NullStream
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.current_stream = lambda device=None: _NullStream()
    cuda.default_stream = lambda device=None: _NullStream()
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _nothing(), _nothing()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self

    # `with torch.device(...)` knows factories by identity, from a list made on its first use: before ours.
    with cpu:
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name), cpu))

    # The optimizers sort parameters by the name of their CUDA type.
    plain_type = torch.Tensor.type

    def type_as_cuda(self, dtype=None, *args, **kwargs):
        if dtype is None and not args and not kwargs and self.dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[self.dtype]
        return plain_type(self, dtype, *args, **kwargs) if dtype is not None else plain_type(self)

    torch.Tensor.type = type_as_cuda

    # Queues one stack trace a call for a CUDA that never initialises; there is no dropout RNG to set here.
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = _nothing()

    # The experts' all-to-all takes its split sizes as numbers, which they become on their way off a GPU.
    from megatron.core.transformer.moe import token_dispatcher

    def to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _import_megatron_uncompiled() -> None:
    """megatron-core decorates small functions with torch.compile, which on a CPU costs more than it gains."""
    compile_ = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else (lambda function: function)
    try:
        for module in ("models.gpt.gpt_layer_specs", "optimizer", "pipeline_parallel", "dist_checkpointing"):
            importlib.import_module(f"megatron.core.{module}")
    finally:
        torch.compile = compile_


def _on_cpu(factory, cpu):
    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = cpu
        kwargs.pop("pin_memory", None)  # there is no allocator of pinned memory either
        return factory(*args, **kwargs)

    return on_cpu
