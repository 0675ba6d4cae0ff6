"""Channel: framed messages over a connected stream socket, alike at both ends.

A frame is a uint32 length (little-endian, of the payload), a uint8 kind and the payload. A frame of kind MESSAGE holds
a typed `Message` as msgpack; other kinds are raw bytes that their reader understands. Nothing is ever unpickled.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from typing import NamedTuple

import msgspec

from lamella_core.errors import LamellaError
from lamella_executor.worker.messages import Message

MESSAGE = 0  # kind: msgpack of a `Message`
STEP = 1  # kind: one step's plan, raw
MAX_PAYLOAD_BYTES = 1 << 30  # more than this is no frame of ours

_HEADER = struct.Struct("<IB")
_READ_BYTES = 1 << 16
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a script may have set SIGPIPE back to deadly
_HANGUP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class ChannelError(LamellaError, ConnectionError):
    """What came is no frame: the other end is no Lamella process, or one of another version."""


class ChannelTimeout(LamellaError, TimeoutError):
    """Nothing whole came, or not everything could be sent, within the time given."""


class Frame(NamedTuple):
    """One frame as received."""

    kind: int  # MESSAGE, STEP or another kind that both ends know
    payload: bytes

    def message(self) -> Message:
        """Decodes a frame of kind MESSAGE.

        Raises:
            ChannelError: it is none, or of a form that this version does not know.
        """
        if self.kind != MESSAGE:
            raise ChannelError(f"a frame of kind {self.kind} came where a message (kind {MESSAGE}) was expected")
        try:
            return _decoder.decode(self.payload)
        except msgspec.MsgspecError as error:
            raise ChannelError(f"a message could not be read ({error}); do all ranks run one version?") from error


class Channel:
    """Owns the socket. Any thread may send; one thread at a time may receive."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._sending = threading.Lock()
        self._received = bytearray()  # not yet a whole frame, or not yet taken

    def send(self, message: Message, timeout_s: float | None = None) -> None:
        """Sends one message; see `send_frame`."""
        self.send_frame(MESSAGE, _encoder.encode(message), timeout_s)

    def send_frame(self, kind: int, payload: bytes | memoryview, timeout_s: float | None = None) -> None:
        """Sends one frame, waiting while the other end does not read.

        Raises:
            ChannelTimeout: not sent within ``timeout_s``. A part may have gone out: the channel is of no more use.
            OSError: the other end is gone, or this end was shut down or closed.
        """
        data = memoryview(_HEADER.pack(memoryview(payload).nbytes, kind) + payload)
        if timeout_s is None:
            with self._sending:
                self._socket.sendall(data, _NO_SIGNAL)
            return
        deadline = time.monotonic() + timeout_s
        if not self._sending.acquire(timeout=max(0.0, timeout_s)):
            raise ChannelTimeout(f"another thread was still sending after {timeout_s:g} s")
        try:
            while data:
                if not self._wait(select.POLLOUT, deadline):
                    raise ChannelTimeout(f"the other end did not read within {timeout_s:g} s")
                data = data[self._socket.send(data, _NO_SIGNAL | socket.MSG_DONTWAIT) :]
        finally:
            self._sending.release()

    def receive(self, timeout_s: float | None = None) -> Frame | None:
        """Returns the next frame, or None when the other end is gone.

        Args:
            timeout_s: how long to wait for it, None for ever; 0 takes what has arrived already.

        Raises:
            ChannelTimeout: no whole frame came in time; what came is kept for the next call.
            ChannelError: the other end sends what is no frame.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            frame = self._take()
            if frame is not None:
                return frame
            if deadline is not None and not self._wait(select.POLLIN, deadline):
                raise ChannelTimeout(f"nothing came within {timeout_s:g} s")
            try:
                received = self._socket.recv(_READ_BYTES)
            except ConnectionError:
                return None
            if not received:
                return None
            self._received += received

    def _take(self) -> Frame | None:
        """Takes a whole frame out of what has been received, if there is one."""
        if len(self._received) < _HEADER.size:
            return None
        num_bytes, kind = _HEADER.unpack_from(self._received)
        if num_bytes > MAX_PAYLOAD_BYTES:
            raise ChannelError(f"a frame claims {num_bytes} bytes; the other end is no Lamella process")
        end = _HEADER.size + num_bytes
        if len(self._received) < end:
            return None
        payload = bytes(memoryview(self._received)[_HEADER.size : end])
        del self._received[:end]
        return Frame(kind, payload)

    def _wait(self, events: int, deadline: float) -> bool:
        """Waits for the socket to become readable or writable; returns whether it did (or broke) by ``deadline``."""
        poll = select.poll()
        poll.register(self._socket, events)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def wait_hangup(self, timeout_s: float) -> bool:
        """Waits until the other end is gone, leaving what it sent unread; returns whether it is. For any thread."""
        poll = select.poll()
        poll.register(self._socket, _HANGUP)
        return bool(poll.poll(timeout_s * 1000))

    def fileno(self) -> int:
        return self._socket.fileno()

    def shut_down(self) -> None:
        """Ends the connection: whoever waits in a send, here, or in a receive, at either end, comes back at once."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed, or the other end is gone

    def close(self) -> None:
        self.shut_down()
        with self._sending:  # the descriptor's number must not find a new owner under a send
            self._socket.close()
