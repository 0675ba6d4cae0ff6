"""The key-value store through which the ranks of one engine find each other; rank 0 hosts it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import Store, TCPStore

from lamella_core.errors import CommunicationError

_LONGEST_PAUSE_S = 0.05


def host_store(address: str = "127.0.0.1", timeout_s: float = 60.0) -> TCPStore:
    """Returns a store that listens on ``address`` alone, at a port of the system's choice (its ``port``)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((address, 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        return TCPStore(
            address,
            port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store closes it
        )


def reach_store(address: str, port: int, timeout_s: float = 60.0) -> TCPStore:
    """Returns another rank's connection to the store that rank 0 hosts at ``address``:``port``."""
    return TCPStore(
        address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )  # fmt: skip


def await_keys(store: Store, keys: Sequence[str], deadline: float, stop: threading.Event | None, what: str) -> None:
    """Returns when all ``keys`` are set.

    Args:
        store: where.
        keys: what other ranks will set.
        deadline: of `time.monotonic`.
        stop: when set, waiting ends too.
        what: completes the error's sentence "... did not come in time".

    Raises:
        CommunicationError: the deadline passed, ``stop`` was set, or the store's host has gone.
    """
    pause_s = 0.001
    while not _has(store, keys):
        if stop is not None and stop.is_set():
            raise CommunicationError(f"joining the ranks was given up while waiting for {what}")
        if time.monotonic() > deadline:
            missing = [key for key in keys if not _has(store, [key])]
            raise CommunicationError(f"{what} did not come in time; missing: {', '.join(missing)}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _has(store: Store, keys: Sequence[str]) -> bool:
    try:
        return store.check(list(keys))
    except RuntimeError as error:
        raise CommunicationError(f"rank 0's store does not answer: {error}") from error
