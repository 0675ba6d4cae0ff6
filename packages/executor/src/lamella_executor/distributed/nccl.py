"""Groups of GPUs that exchange tensors through NCCL, on the current CUDA stream and so also in CUDA graphs.

NCCL's library is used directly. PyTorch's own group of it starts threads that end the process when a peer fails, and
rank 0 is the user's process; a communicator of NCCL fails by itself and can be aborted at any time, even while it is
being made.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from ctypes import byref, c_int, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from lamella_core.errors import CommunicationError
from lamella_executor.distributed.nccl_library import (
    DATA_TYPES,
    IN_PROGRESS,
    SUCCESS,
    SUM,
    UNIQUE_ID_BYTES,
    Config,
    UniqueId,
    check_result,
    library,
)
from lamella_executor.distributed.store import await_keys

logger = logging.getLogger(__name__)

_CALL_PATIENCE_S = 1.0  # for a call of another thread to return, before the communicator is aborted under it
_CALL_TIMEOUT_S = 60.0  # for the connections that a first call makes
_END_TIMEOUT_S = 3.0  # for a communicator that could not be made to be freed


class NcclGroup:
    """A communicator of some ranks, made by all of them at once.

    Args:
        store: where rank 0 of the group leaves the communicator's id, under a name of its own.
        name: of the group.
        rank: this one, 0 <= rank < size.
        size: number of ranks.
        device: CUDA device of this rank; no other rank may use it.
        deadline: of `time.monotonic`, for all ranks to come.
        stop: set by another thread to give up, now or in a later call that NCCL does not finish at once.

    Raises:
        CommunicationError: not all ranks came, or NCCL failed.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        rank: int,
        size: int,
        *,
        device: torch.device,
        deadline: float,
        stop: threading.Event | None = None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._library = library()
        self._stop = stop
        self._lock = threading.Lock()  # held inside a call
        self._comm: c_void_p | None = c_void_p()
        self._name = name
        self._is_aborted = False
        self._has_ended = threading.Event()
        self._first_abort = threading.Lock()  # taken once, for good
        unique_id = self._unique_id(store, f"nccl/{name}", deadline, stop)
        config = Config.non_blocking()
        try:
            with torch.cuda.device(device), self._lock:
                result = self._library.ncclCommInitRankConfig(
                    byref(self._comm), size, unique_id, rank, byref(config)
                )  # fmt: skip
                self._finish("connecting", result, deadline)
        except BaseException:
            self.abort()
            self.await_end(_END_TIMEOUT_S)
            raise

    def _unique_id(self, store: Store, key: str, deadline: float, stop: threading.Event | None) -> UniqueId:
        unique_id = UniqueId()
        if self.rank == 0:
            check_result("naming a communicator", self._library.ncclGetUniqueId(byref(unique_id)))
            store.set(key, bytes(unique_id).hex())
        else:
            await_keys(store, [key], deadline, stop, "NCCL's communicator id")
            ctypes.memmove(byref(unique_id), bytes.fromhex(store.get(key).decode()), UNIQUE_ID_BYTES)
        return unique_id

    def all_reduce(self, x: Tensor, out: Tensor) -> None:
        """Writes the ranks' sum into out, which may be x; both contiguous."""
        self._call("ncclAllReduce", x.data_ptr(), out.data_ptr(), x.numel(), DATA_TYPES[x.dtype], SUM)

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        """Writes the ranks' x, one after another, into out [size, *x.shape]; both contiguous."""
        self._call("ncclAllGather", x.data_ptr(), out.data_ptr(), x.numel(), DATA_TYPES[x.dtype])

    def send(self, x: Tensor, rank: int) -> None:
        """Sends x, contiguous; what follows on the stream waits until the receiver takes it."""
        self._call("ncclSend", x.data_ptr(), x.numel(), DATA_TYPES[x.dtype], rank)

    def receive(self, x: Tensor, rank: int) -> None:
        """Receives into x, contiguous."""
        self._call("ncclRecv", x.data_ptr(), x.numel(), DATA_TYPES[x.dtype], rank)

    def _call(self, name: str, *arguments: Any) -> None:
        with self._lock:
            comm = self._alive()
            stream = torch.cuda.current_stream(self.device).cuda_stream
            result = getattr(self._library, name)(*arguments, comm, stream)
            if result != 0:
                self._finish(name, result, time.monotonic() + _CALL_TIMEOUT_S)

    def _alive(self) -> c_void_p:
        if self._comm is None or self._is_aborted:
            raise CommunicationError("the ranks' groups were aborted")
        return self._comm

    def _finish(self, what: str, result: int, deadline: float) -> None:
        """Returns when what a call began is done; begins to end the communicator if that fails or takes too long."""
        state = c_int(result)
        try:
            check_result(what, result)
            while state.value == IN_PROGRESS:
                if time.monotonic() > deadline or (self._stop is not None and self._stop.is_set()):
                    raise CommunicationError(f"{what} through NCCL was given up: not all ranks take part")
                time.sleep(0.0002)
                check_result(what, self._library.ncclCommGetAsyncError(self._alive(), byref(state)))
                check_result(what, state.value)
        except CommunicationError:
            self.abort()
            raise

    def abort(self) -> None:
        """Begins to end the communicator, from any thread, and does not wait: its kernels return, later calls raise.

        NCCL tells the kernels to return at once, then frees what the communicator holds. For that it waits until the
        device is idle, so until the kernels of all other communicators have returned too, and until the last CUDA graph
        that recorded a call is gone.
        """
        self._is_aborted = True
        if self._first_abort.acquire(blocking=False):
            threading.Thread(target=self._end, name=f"lamella-nccl-end-{self._name}", daemon=True).start()

    def await_end(self, timeout_s: float | None) -> bool:
        """Waits for what `abort` began; returns whether everything is freed."""
        return self._has_ended.wait(timeout_s)

    def _end(self) -> None:
        """Aborts on a thread of its own, which sets no device first: the driver may hold up who asks it for anything.

        A call of another thread may be inside NCCL because its launch waits for this communicator's kernel, which only
        the abort ends; NCCL allows that.
        """
        has_lock = self._lock.acquire(timeout=_CALL_PATIENCE_S)
        comm, self._comm = self._comm, None
        if has_lock:
            self._lock.release()
        result = self._library.ncclCommAbort(comm) if comm is not None and comm.value else SUCCESS
        if result not in (SUCCESS, IN_PROGRESS):
            logger.warning("NCCL could not end a communicator: result %d", result)
        self._has_ended.set()
