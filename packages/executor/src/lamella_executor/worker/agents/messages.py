"""What a session's launcher and the agents tell each other.

Orders travel from the launcher to agent 0 (a `Channel` over the loopback) and on to the agent of the rank (MPI);
reports travel back alike.
``session`` is the number that agent 0 gave to the launcher's connection; the launcher itself leaves it 0.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from lamella_executor.worker.channel import Channel, ChannelTimeout

AGENTS = 2  # kind of the frames between a launcher and agent 0: msgpack of an `AgentMessage`

Rank: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]


class Node(msgspec.Struct, frozen=True, tag=True):
    """Where an agent runs.

    Attributes:
        rank: of the agent in the job.
        host: name of its machine, for messages.
        node: lowest rank on the same machine: equal for agents that share one.
        local_rank: index of the agent on its machine.
        device_index: of the GPU that the rank should use, among those that its process sees.
    """

    rank: Rank
    host: str
    node: Rank
    local_rank: Rank
    device_index: Rank


class Job(msgspec.Struct, frozen=True, tag=True):
    """Agent 0's greeting to a launcher: all agents of the job by rank."""

    nodes: list[Node]


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Order: connect to the first of rank 0's ``endpoints`` that knows ``token``, on behalf of the worker ``rank``."""

    session: int
    rank: Rank
    endpoints: list[tuple[str, int]]
    token: bytes


class Start(msgspec.Struct, frozen=True, tag=True):
    """Order: start the worker of ``rank`` on the connection that `Connect` made."""

    session: int
    rank: Rank
    environment: dict[str, str]


class Kill(msgspec.Struct, frozen=True, tag=True):
    """Order: SIGKILL the worker of ``rank``."""

    session: int
    rank: Rank


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Order: report the state of the worker of ``rank``."""

    session: int
    rank: Rank


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Order: the session is over; SIGKILL what is left of it."""

    session: int


class Quit(msgspec.Struct, frozen=True, tag=True):
    """Order: the command has ended; end everything and exit with ``code``."""

    code: int


class Started(msgspec.Struct, frozen=True, tag=True):
    """Report: the worker of ``rank`` runs as ``pid``."""

    session: int
    rank: Rank
    pid: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """Report: how the worker of ``rank`` ended, as the rest of a sentence about it."""

    session: int
    rank: Rank
    how: str


class Inspected(msgspec.Struct, frozen=True, tag=True):
    """Report: what the worker of ``rank`` is doing ("is stopped (SIGSTOP?)"), where the machine can tell."""

    session: int
    rank: Rank
    state: str | None


Order: TypeAlias = Connect | Start | Kill | Inspect | Forget
Report: TypeAlias = Started | Ended | Inspected
AgentMessage: TypeAlias = Node | Job | Connect | Start | Kill | Inspect | Forget | Quit | Started | Ended | Inspected

_decoder = msgspec.msgpack.Decoder(AgentMessage)
_encoder = msgspec.msgpack.Encoder()


def encode(message: AgentMessage) -> bytes:
    """Returns ``message`` as msgpack."""
    return _encoder.encode(message)


def decode(payload: bytes | bytearray) -> AgentMessage:
    """Returns the message in ``payload``; msgspec.DecodeError if there is none."""
    return _decoder.decode(payload)


def send(channel: Channel, message: AgentMessage, timeout_s: float = 2.0) -> None:
    """Sends ``message``; OSError (`ChannelTimeout` is one) if the other end is gone or does not read."""
    channel.send_frame(AGENTS, encode(message), timeout_s)


def receive(channel: Channel, timeout_s: float = 0.0) -> AgentMessage | None:
    """Returns the next message, None if none came within ``timeout_s``.

    Raises:
        EOFError: the other end is gone.
        ChannelError, msgspec.DecodeError: what came is no message of the agents.
    """
    try:
        frame = channel.receive(timeout_s)
    except ChannelTimeout:
        return None
    if frame is None:
        raise EOFError("the connection was closed")
    return decode(frame.payload)
