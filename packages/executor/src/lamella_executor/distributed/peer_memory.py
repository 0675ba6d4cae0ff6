"""GPU memory that every rank of a group can write: shared between processes by CUDA's inter-process handles.

The driver's functions are called directly (CUDA Driver API, "Memory Management"): PyTorch shares tensors too, but with
files and reference counts that outlive a killed process.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from lamella_core.kernels.triton.exchange import Peers
from lamella_executor.distributed.gloo import GlooGroup

logger = logging.getLogger(__name__)

_HANDLE_BYTES = 64
_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(Structure):
    """CUipcMemHandle."""

    _fields_ = [("reserved", c_char * _HANDLE_BYTES)]


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    pointer = c_void_p  # CUdeviceptr: 64 bits
    signatures: dict[str, tuple[type, ...]] = {
        "cuMemAlloc_v2": (POINTER(pointer), c_size_t),
        "cuMemFree_v2": (pointer,),
        "cuMemsetD8_v2": (pointer, c_ubyte, c_size_t),
        "cuIpcGetMemHandle": (POINTER(_Handle), pointer),
        "cuIpcOpenMemHandle_v2": (POINTER(pointer), _Handle, c_uint),
        "cuIpcCloseMemHandle": (pointer,),
    }
    for name, arguments in signatures.items():
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, c_int
    return driver


class PeerMemory:
    """This rank's slots and all ranks' slots as mapped here; see `lamella_core.kernels.triton.exchange`.

    Attributes:
        peers: what the kernels take.
    """

    def __init__(self, rank: int, size: int, device: torch.device, own: int, mapped: Sequence[int | None]) -> None:
        self._device = device
        self._own = own
        self._mapped = [address for address in mapped if address is not None]
        self._abort = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        addresses = [own if address is None else address for address in mapped]
        table = torch.tensor([*addresses, self._abort.data_ptr()], dtype=torch.int64).to(device)
        self.peers = Peers(rank, size, table, torch.zeros(Peers.num_channels, dtype=torch.int32, device=device))

    @classmethod
    def share(cls, world: GlooGroup, ranks: Sequence[int], device: torch.device) -> PeerMemory | None:
        """Returns the memory that ``ranks`` share, among them this one; all of the world must call this.

        None for all of them where one cannot reach another: GPUs of several machines, or without a link between them.
        """
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the driver's functions need PyTorch's context
            own, handle = _allocate(Peers.slots_bytes(len(ranks)))
            everyone = world.all_gather(_record(handle), dim=0).view(world.size, -1)
            group = [everyone[rank] for rank in ranks]
            mapped = _map_all(group, ranks.index(world.rank)) if own else None
            all_can = world.agree_min(int(mapped is not None))
            if mapped is None or not all_can:
                _close([address for address in mapped or () if address is not None], own)
                return None
            return cls(ranks.index(world.rank), len(ranks), device, own, mapped)

    def abort(self) -> None:
        """Makes kernels that wait for a peer return, with wrong sums; from any thread."""
        self._abort[0] = 1

    def close(self) -> None:
        """Frees the memory; no rank may still use it."""
        with torch.cuda.device(self._device):
            _close(self._mapped, self._own)
        self._mapped, self._own = [], 0


def _allocate(num_bytes: int) -> tuple[int, bytes]:
    """Returns the address and the handle of zeroed memory of this GPU; 0 if there is none to share."""
    pointer, handle = c_void_p(), _Handle()
    if _failed("allocate", _driver().cuMemAlloc_v2(byref(pointer), num_bytes)):
        return 0, bytes(_HANDLE_BYTES)
    _driver().cuMemsetD8_v2(pointer, 0, num_bytes)
    torch.cuda.synchronize()
    if _failed("share", _driver().cuIpcGetMemHandle(byref(handle), pointer)):
        _driver().cuMemFree_v2(pointer)
        return 0, bytes(_HANDLE_BYTES)
    return pointer.value or 0, bytes(handle)


def _map_all(records: Sequence[Tensor], own: int) -> list[int | None] | None:
    """Returns where each rank's memory lies here, None for this rank's own; None if one cannot be mapped."""
    machine = records[own][_HANDLE_BYTES:]
    mapped: list[int | None] = []
    for rank, record in enumerate(records):
        pointer = c_void_p()
        if rank == own:
            mapped.append(None)
            continue
        is_near = torch.equal(record[_HANDLE_BYTES:], machine)
        handle = _Handle.from_buffer_copy(bytes(record[:_HANDLE_BYTES].tolist()))
        if not is_near or _failed(
            "map", _driver().cuIpcOpenMemHandle_v2(byref(pointer), handle, _ENABLE_PEER_ACCESS)
        ):  # fmt: skip
            _close([address for address in mapped if address is not None], 0)
            return None
        mapped.append(pointer.value)
    return mapped


def _record(handle: bytes) -> Tensor:
    """A handle and the machine it is good on, as bytes [80]."""
    return torch.tensor(list(handle + _machine()), dtype=torch.uint8)


def _machine() -> bytes:
    """Returns what tells this boot of this machine from others."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip().replace("-", ""))


def _close(mapped: Sequence[int], own: int) -> None:
    for address in mapped:
        _driver().cuIpcCloseMemHandle(address)
    if own:
        _driver().cuMemFree_v2(own)


def _failed(what: str, result: int) -> bool:
    if result:
        logger.info("GPUs sum through NCCL alone: the driver could not %s memory (CUresult %d)", what, result)
    return result != 0
