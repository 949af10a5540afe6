"""Compiled CPU engine: builds csrc/ with the C++ compiler on first use, and wraps its C interface.

The library is kept in a per-user cache folder under a name that hashes sources, compiler and CPU. It is built
under a file lock and moved into place at once, so ranks that start together build it once and never load half
a file. It needs no header of torch's or Python's: about two seconds, and no rebuild when torch changes.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .torch_engine import HEADER, Nucleus, RowSums

SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
_PTR, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SHARD = [_PTR, _INT]
_SIGNATURES = {
    "vp_forward": (_I64, _SHARD + [_I64] * 3 + [_PTR, ctypes.c_double, _INT, _INT, _PTR, _PTR, _PTR]),
    "vp_sweep": (None, _SHARD + [_I64] * 3 + [_PTR, _INT, _INT, _PTR, _PTR]),
    "vp_merge": (None, [_PTR, _INT, _I64, _INT, _INT, _PTR, ctypes.c_double, _INT, _INT] + [_PTR] * 4),
    "vp_histogram": (None, _SHARD + [_PTR] + [_I64] * 3 + [_PTR, _INT, _PTR]),
    "vp_collect": (None, _SHARD + [_PTR] + [_I64] * 3 + [_PTR, _PTR, _INT, _PTR, _PTR, _PTR]),
    "vp_ed_above": (None, _SHARD + [_PTR] + [_I64] * 3 + [_PTR, _PTR, _INT, _PTR]),
    "vp_backward": (None, [_PTR, _PTR, _INT] + [_I64] * 3 + [_PTR] * 6 + [_INT, _INT]),
}
_STREAM_BYTES = 8 << 20  # results larger than this bypass the cache on their way to memory


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def cache_dir() -> Path:
    """Where compiled libraries are kept: XDG_CACHE_HOME or ~/.cache, else a folder of this process's own."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "siren_megatron"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="siren_megatron_"))


def _cpu_identity() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def build(folder: Path | None = None) -> Path:
    """Path of the shared library, compiled when missing. Raises: RuntimeError in the compiler's words."""
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler found (CXX, g++, clang++, c++)")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{compiler} does not run: {error}") from error
    digest = hashlib.sha256("\0".join([version, _cpu_identity(), platform.machine(), *_FLAGS]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    folder = folder or cache_dir()
    library = folder / f"vocab_parallel_{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    with open(folder / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        partial = folder / f"{library.name}.{os.getpid()}"
        message = ""
        for target in (["-march=native"], ["-mcpu=native"], []):
            command = [compiler, *_FLAGS, *target, "-o", str(partial), str(SOURCES / "native.cpp")]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise RuntimeError(f"{compiler} failed: {error}") from error
            if done.returncode == 0:
                os.replace(partial, library)
                return library
            message = done.stderr
        raise RuntimeError(f"{compiler} could not build {SOURCES.name}:\n{message[-2000:]}")


def _share_openmp() -> None:
    """Make the OpenMP runtime that torch has loaded visible: one pool of threads, not two that fight."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return
    for line in maps.splitlines():
        path = line.split(maxsplit=5)[-1]
        if any(name in os.path.basename(path) for name in ("libgomp", "libiomp5", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None (with one warning) where it can't be built."""
    try:
        path = build()
        _share_openmp()
        loaded = ctypes.CDLL(str(path))
    except (RuntimeError, OSError) as error:
        warnings.warn(f"compiled vocab_parallel is unavailable, using plain torch: {error}", stacklevel=2)
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def supports(z: Tensor) -> bool:
    """Whether this engine takes these logits."""
    return z.device.type == "cpu" and z.dtype in (torch.float32, torch.bfloat16) and library() is not None


def _shard(z: Tensor) -> tuple:
    assert z.is_contiguous()
    return z.data_ptr(), int(z.dtype == torch.bfloat16)


def _results(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(3, rows, dtype=torch.float32),
        torch.empty(4, rows, dtype=torch.float64),
        torch.empty(rows, dtype=torch.int64),
    )


def _nucleus(f32: Tensor, f64: Tensor, cut: Tensor, certified: Tensor) -> Nucleus:
    return Nucleus(RowSums(f32[0], f32[1], f64[0], f64[1]), f32[2], cut, f64[2], f64[3], certified)


def forward(
    z: Tensor, local_labels: Tensor, width: int, top_p: float, exclusive: bool
) -> tuple[Nucleus, int]:
    """Unsharded rows in one go, radix select included: (nucleus, rows that needed it)."""
    rows, (f32, f64, cut) = z.shape[0], _results(z.shape[0])
    labels = local_labels.contiguous()
    fallback = library().vp_forward(
        *_shard(z), rows, z.shape[1], width, labels.data_ptr(), top_p, int(exclusive),
        torch.get_num_threads(), f32.data_ptr(), f64.data_ptr(), cut.data_ptr(),
    )  # fmt: skip
    return _nucleus(f32, f64, cut, torch.ones(rows, dtype=torch.bool)), fallback


def sweep(z: Tensor, local_labels: Tensor, width: int, top_k: int, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """As torch_engine.sweep."""
    pack = torch.empty(z.shape[0], HEADER + top_k, dtype=torch.float32)
    columns = torch.empty(z.shape[0], top_k, dtype=torch.int64)
    labels = local_labels.contiguous()
    library().vp_sweep(
        *_shard(z), z.shape[0], z.shape[1], width, labels.data_ptr(), top_k,
        torch.get_num_threads(), pack.data_ptr(), columns.data_ptr(),
    )  # fmt: skip
    return pack, columns


def merge(packs: Tensor, columns: Tensor, rank: int, top_p: float, exclusive: bool) -> Nucleus:
    """As torch_engine.merge."""
    size, rows, words = packs.shape
    assert size <= 1024 and packs.is_contiguous()
    f32, f64, cut = _results(rows)
    certified = torch.empty(rows, dtype=torch.bool)
    library().vp_merge(
        packs.data_ptr(), size, rows, words - HEADER, rank, columns.data_ptr(), top_p, int(exclusive),
        torch.get_num_threads(), f32.data_ptr(), f64.data_ptr(), cut.data_ptr(), certified.data_ptr(),
    )  # fmt: skip
    return _nucleus(f32, f64, cut, certified)


def backward(z, out, coefs, state, plan, local_labels, label_grad) -> None:
    """As torch_engine.backward."""
    tensors = (coefs, state.row_max, state.tau, state.cut, local_labels, label_grad)
    tensors = [t.contiguous() for t in tensors]
    library().vp_backward(
        z.data_ptr(), out.data_ptr(), int(z.dtype == torch.bfloat16), z.shape[0], z.shape[1], plan.width,
        *(t.data_ptr() for t in tensors), int(out.nbytes > _STREAM_BYTES), torch.get_num_threads(),
    )  # fmt: skip


class RowScans:
    """As radix.RowScans, for the rows z[index] without a copy of them."""

    bins, per_nat = 1024, 32.0
    bytes_per_logit = 0.5

    def __init__(self, z: Tensor, index: Tensor, row_max: Tensor, width: int):
        self.row_max = row_max.contiguous()
        self.index = index.contiguous()
        self.shard = (*_shard(z), self.index.data_ptr(), index.numel(), z.shape[1], width)
        self.z = z

    def histogram(self) -> Tensor:
        out = torch.empty(self.index.numel(), self.bins, dtype=torch.float64)
        library().vp_histogram(*self.shard, self.row_max.data_ptr(), torch.get_num_threads(), out.data_ptr())
        return out

    def collect(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        counts = torch.empty(self.index.numel(), dtype=torch.int64)
        head = (*self.shard, self.row_max.data_ptr(), chosen.contiguous().data_ptr(), torch.get_num_threads())
        library().vp_collect(*head, counts.data_ptr(), None, None)
        offsets = counts.cumsum(0) - counts
        columns = torch.empty(int(counts.sum()), dtype=torch.int64)
        values = torch.empty(columns.numel(), dtype=torch.float32)
        if columns.numel():
            library().vp_collect(*head, offsets.data_ptr(), columns.data_ptr(), values.data_ptr())
        return torch.arange(counts.numel()).repeat_interleave(counts), columns, values

    def ed_above(self, tau: Tensor) -> Tensor:
        out = torch.empty(self.index.numel(), dtype=torch.float64)
        library().vp_ed_above(
            *self.shard,
            self.row_max.data_ptr(),
            tau.contiguous().data_ptr(),
            torch.get_num_threads(),
            out.data_ptr(),
        )
        return out
