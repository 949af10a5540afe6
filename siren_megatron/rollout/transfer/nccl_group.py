"""A NCCL communicator of this process and vLLM's workers, on libnccl itself.

torch builds communicators for process groups only, and importing vLLM's wrapper takes a rank 5 to 11 s. These
are six functions of NCCL's C interface (nccl.h, unchanged since NCCL 2.0 but for `ncclCommAbort`, 2.4).
"""

from __future__ import annotations

import base64
import ctypes
from typing import Any

import torch
from torch import Tensor

_UINT8, _FLOAT32, _SUM = 1, 7, 0  # ncclDataType_t, ncclRedOp_t


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


def load_nccl() -> ctypes.CDLL:
    """The library that torch itself uses.

    Raises:
        RuntimeError: there is none.
    """
    try:
        nccl = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise RuntimeError(f"--weight-transfer nccl: NCCL's library was not found: {error}") from error
    nccl.ncclGetErrorString.restype = ctypes.c_char_p
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    nccl.ncclGetUniqueId.argtypes = [ctypes.POINTER(_UniqueId)]
    nccl.ncclCommInitRank.argtypes = [ctypes.POINTER(pointer), ctypes.c_int, _UniqueId, ctypes.c_int]
    nccl.ncclAllReduce.argtypes = [pointer, pointer, size, ctypes.c_int, ctypes.c_int, pointer, pointer]
    nccl.ncclBroadcast.argtypes = [pointer, pointer, size, ctypes.c_int, ctypes.c_int, pointer, pointer]
    nccl.ncclCommAbort.argtypes = [pointer]
    return nccl


class NcclGroup:
    """`BroadcastGroup` over NCCL: rank 0 on this process's current GPU. See there for the methods.

    Raises:
        RuntimeError: NCCL is not there, or fails.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._nccl = load_nccl()
        self._id = _UniqueId()
        self._check(self._nccl.ncclGetUniqueId(ctypes.byref(self._id)))
        self.rendezvous: dict[str, Any] = {"nccl_unique_id_b64": base64.b64encode(bytes(self._id)).decode()}
        self._comm = ctypes.c_void_p()
        self._stream: torch.cuda.Stream | None = None

    def join(self, world_size: int) -> None:
        with torch.cuda.device(self.device):
            self._check(self._nccl.ncclCommInitRank(ctypes.byref(self._comm), world_size, self._id, 0))
            self._stream = torch.cuda.Stream()
            # vLLM's workers add up one number before anything else, and wait for this rank in it.
            warm_up = torch.zeros(1, device=self.device)
            torch.cuda.current_stream().synchronize()
            at = warm_up.data_ptr()
            self._check(self._nccl.ncclAllReduce(at, at, 1, _FLOAT32, _SUM, self._comm, self._raw_stream))
            self._stream.synchronize()

    def broadcast(self, buffer: Tensor) -> None:
        with torch.cuda.device(self.device):
            at = buffer.data_ptr()
            self._check(
                self._nccl.ncclBroadcast(at, at, buffer.numel(), _UINT8, 0, self._comm, self._raw_stream)
            )
            self._stream.synchronize()

    def abort(self) -> None:
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            self._nccl.ncclCommAbort(comm)

    @property
    def _raw_stream(self) -> int:
        return self._stream.cuda_stream

    def _check(self, result: int) -> None:
        if result != 0:
            raise RuntimeError(f"NCCL: {self._nccl.ncclGetErrorString(result).decode()}")
