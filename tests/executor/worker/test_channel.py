"""Channel: what goes in at one end comes out at the other, whole, or an error says why not."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import msgspec
import pytest
from tests.support.worker_crews import make_setup

from lamella_executor.worker.channel import MAX_PAYLOAD_BYTES, MESSAGE, STEP, Channel, ChannelError, ChannelTimeout
from lamella_executor.worker.messages import Failed, Heartbeat, Hello, Load, Log, Ready, Start, Stop

LARGE = bytes(range(256)) * 20_000  # more than socket buffers hold
HEADER_BYTES = 5


@pytest.fixture(params=["unix", "tcp"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Channel, Channel]]:
    if request.param == "unix":
        one, other = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            one = socket.create_connection(server.getsockname())
            other, _ = server.accept()
    channels = Channel(one), Channel(other)
    yield channels
    for channel in channels:
        channel.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A bare socket and the channel at its other end."""
    one, other = socket.socketpair()
    channel = Channel(other)
    yield one, channel
    one.close()
    channel.close()


def in_thread(function, *arguments) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "message",
    [
        make_setup(2),
        Load("module:function", b'{"a": 1}'),
        Start(b"{}"),
        Stop(),
        Hello(7, "1.2.3"),
        Ready("load"),
        Heartbeat("decode", 1 << 40, "file.py:3 in f"),
        Failed("load", "ValueError", "ü", "Traceback"),
        Log(30, ""),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_arrives_as_it_was_sent(message, ends) -> None:
    ends[0].send(message)
    frame = ends[1].receive(5)
    assert frame.kind == MESSAGE
    assert frame.message() == message


@pytest.mark.parametrize("payload", [b"", b"\0", LARGE, memoryview(LARGE)], ids=["none", "one", "large", "view"])
def test_raw_frames_of_any_size_arrive_in_order(payload, ends) -> None:
    sender = in_thread(lambda: (ends[0].send_frame(STEP, payload), ends[0].send(Stop(), 5)))
    frame = ends[1].receive(5)
    assert (frame.kind, frame.payload) == (STEP, bytes(payload))
    assert ends[1].receive(5).message() == Stop()
    sender.join()


def test_a_view_of_wide_numbers_counts_in_bytes(ends) -> None:
    numbers = memoryview(b"\1\0\0\0\2\0\0\0").cast("i")
    ends[0].send_frame(STEP, numbers)
    assert ends[1].receive(5).payload == bytes(numbers)


def test_a_frame_that_comes_in_pieces_is_kept_over_timeouts(raw) -> None:
    socket_end, channel = raw
    data = HEADER_BYTES.to_bytes(4, "little") + bytes([STEP]) + b"abcde"
    for i in range(len(data)):
        with pytest.raises(ChannelTimeout):
            channel.receive(0)
        socket_end.sendall(data[i : i + 1])
    assert channel.receive(0).payload == b"abcde"


def test_what_was_sent_before_the_end_is_read_first(ends) -> None:
    ends[1].send(Stop())  # stays unread: over a socket pair, the reader then sees a reset and not an end
    ends[0].send(Ready("load"))
    assert ends[1].receive(5).message() == Ready("load")
    ends[0].close()
    assert ends[1].receive(5) is None
    assert ends[1].receive() is None


def test_the_end_within_a_frame_is_an_end(raw) -> None:
    socket_end, channel = raw
    socket_end.sendall(b"\5\0\0")
    socket_end.close()
    assert channel.receive(5) is None


def test_what_is_no_frame_is_refused(raw) -> None:
    socket_end, channel = raw
    socket_end.sendall((MAX_PAYLOAD_BYTES + 1).to_bytes(4, "little") + b"\0")
    with pytest.raises(ChannelError, match="no Lamella process"):
        channel.receive(5)


@pytest.mark.parametrize("payload", [b"", b"\x80", b"garbage", msgspec.msgpack.encode({"type": "Unknown"})])
def test_what_is_no_message_is_refused(payload, ends) -> None:
    ends[0].send_frame(MESSAGE, payload)
    with pytest.raises(ChannelError, match="one version"):
        ends[1].receive(5).message()


def test_a_raw_frame_is_no_message(ends) -> None:
    ends[0].send_frame(STEP, msgspec.msgpack.encode(Stop()))
    with pytest.raises(ChannelError, match="kind 1 came"):
        ends[1].receive(5).message()


def test_threads_do_not_mix_their_frames(ends) -> None:
    payloads = [bytes([i]) * 30_000 for i in range(4)]
    senders = [in_thread(lambda p=p: [ends[0].send_frame(STEP, p, 10) for _ in range(20)]) for p in payloads]
    received = [ends[1].receive(10).payload for _ in range(80)]
    assert sorted(received) == sorted(payloads * 20)
    for sender in senders:
        sender.join()


def test_a_send_to_who_does_not_read_ends_in_time(ends) -> None:
    with pytest.raises(ChannelTimeout, match="did not read within 0.05 s"):
        ends[0].send_frame(STEP, LARGE, timeout_s=0.05)


@pytest.mark.parametrize("end", [0, 1], ids=["this end", "the other end"])
def test_closing_frees_a_send_that_waits(end, ends) -> None:
    errors = []

    def send() -> None:
        try:
            ends[0].send_frame(STEP, LARGE)
        except OSError as error:
            errors.append(error)

    sender = in_thread(send)
    sender.join(0.05)
    assert sender.is_alive()
    ends[end].close()
    sender.join(5)
    assert len(errors) == 1


def test_shutting_down_frees_a_receive_that_waits(ends) -> None:
    frames = []
    receiver = in_thread(lambda: frames.append(ends[0].receive()))
    receiver.join(0.05)
    assert receiver.is_alive()
    ends[0].shut_down()
    receiver.join(5)
    assert frames == [None]


def test_a_hangup_shows_though_something_is_unread(ends) -> None:
    ends[1].send(Stop())
    assert not ends[0].wait_hangup(0.01)
    ends[1].close()
    assert ends[0].wait_hangup(5)
    assert ends[0].receive(0).message() == Stop()


def test_sending_to_nobody_is_an_error_even_where_sigpipe_kills() -> None:
    script = """if True:
        import signal, socket
        from lamella_executor.worker.channel import Channel
        from lamella_executor.worker.messages import Stop
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        one, other = socket.socketpair()
        other.close()
        for timeout_s in (None, 1.0):
            try:
                Channel(one).send(Stop(), timeout_s)
            except BrokenPipeError:
                print("raised")
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["raised", "raised"])
