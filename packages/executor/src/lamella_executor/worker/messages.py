"""What rank 0 and its workers tell each other, except for steps, which are raw frames."""

from __future__ import annotations

from typing import Any

import msgspec

SERVE = "lamella_executor.worker.serve:serve"


class Setup(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 -> worker, first: who it is. `Crew` fills in ``rank``, ``device_index`` and the mapping's rank."""

    rank: int
    world_size: int
    store_host: str  # the TCPStore of the data plane, hosted by rank 0
    store_port: int
    mapping: dict[str, Any]  # fields of `lamella_core.mapping.Mapping`
    device: str  # "cpu" or "cuda"
    device_index: int  # among the devices of the worker's machine
    num_threads: int  # of torch, 0: as torch chooses
    worker_timeout_s: float
    log_level: int  # of the logging module
    serve: str = SERVE  # "module:function", called as f(channel, setup, state)


class Load(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 -> worker: get your engine from ``target``, "module:function", called as f(rank=rank, **arguments)."""

    target: str
    arguments: bytes  # JSON object


class Start(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 -> worker: make cache and runner; from here on steps come."""

    options: bytes  # JSON object


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 -> worker: end."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Worker -> rank 0, first. Rank 0 refuses a worker of another version."""

    pid: int
    version: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker -> rank 0: what ``phase`` asked for is done; see `Crew.wait_ready`."""

    phase: str


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Worker -> rank 0, every half second from a thread of its own."""

    phase: str
    step: int  # steps done
    place: str = ""  # file, line and function where the serving thread is


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker -> rank 0, last: an exception ended it."""

    phase: str
    error: str  # name of the exception's class
    message: str
    traceback: str


class Log(msgspec.Struct, frozen=True, tag=True):
    """Worker -> rank 0: a record of the worker's logging."""

    level: int
    text: str


Message = Setup | Load | Start | Stop | Hello | Ready | Heartbeat | Failed | Log
