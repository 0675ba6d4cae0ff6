"""How the processes of a job find and trust each other: addresses, listeners, a mutual proof of one token.

The proof (both ways, HMAC-SHA256 over fresh nonces) keeps a stranger out, and keeps a process from taking a stranger's
port for its partner: private networks often give several hosts the same address (a bridge's, for instance).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence

from lamella_core.errors import ConfigError

HOST_ADDRESS_VARIABLE = "LAMELLA_HOST_ADDRESS"
LOOPBACK = "127.0.0.1"
TOKEN_BYTES = 32
PROOF_TIMEOUT_S = 2.0
DIAL_TIMEOUT_S = 3.0
_IDENTITY = struct.Struct("<I")
_SIOCGIFADDR = 0x8915


def new_token() -> bytes:
    """Returns a fresh secret of 256 bits."""
    return secrets.token_bytes(TOKEN_BYTES)


def listen(address: str) -> socket.socket:
    """Returns a listener on a free port of ``address`` (empty: of every IPv4 address of this host).

    Raises:
        ConfigError: this host does not have the address.
    """
    try:
        family = socket.getaddrinfo(address or "0.0.0.0", 0, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, 0), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"{HOST_ADDRESS_VARIABLE}={address!r}: cannot listen there ({error}); give an address of the host that "
            f"runs the command, one of {', '.join(local_addresses())}"
        ) from error


def forced_address(environ: Mapping[str, str]) -> str | None:
    """Returns the address that the user chose for this host, if any."""
    return environ.get(HOST_ADDRESS_VARIABLE) or None


def local_addresses() -> list[str]:
    """Returns the IPv4 addresses of this host's interfaces that are up, the loopback's last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found.append(_interface_address(probe, name))
    outer = [address for address in dict.fromkeys(found) if not address.startswith("127.")]
    return [*outer, LOOPBACK]


def _interface_address(probe: socket.socket, name: str) -> str:
    """Returns an interface's IPv4 address (Linux: netdevice(7)); OSError if it has none or the system cannot tell."""
    if sys.platform != "linux":
        return socket.gethostbyname(socket.gethostname())
    import fcntl

    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])


def admit(connection: socket.socket, token: bytes) -> int | None:
    """Proves ``token`` to a caller and has it prove the same; returns who it says it is, None for a stranger."""
    connection.settimeout(PROOF_TIMEOUT_S)
    try:
        ours = secrets.token_bytes(TOKEN_BYTES)
        connection.sendall(ours)
        answer = _receive_exactly(connection, 2 * TOKEN_BYTES + _IDENTITY.size)
        theirs, identity, proof = answer[:TOKEN_BYTES], answer[TOKEN_BYTES:-TOKEN_BYTES], answer[-TOKEN_BYTES:]
        if not hmac.compare_digest(proof, _proof(token, b"caller", ours, theirs, identity)):
            return None
        connection.sendall(_proof(token, b"listener", ours, theirs, identity))
    except OSError:
        return None
    connection.settimeout(None)
    return int(_IDENTITY.unpack(identity)[0])


def introduce(connection: socket.socket, token: bytes, identity: int) -> None:
    """Proves ``token`` to a listener as ``identity`` (a rank) and has it prove the same.

    Raises:
        OSError: it does not know the token, or did not answer in `PROOF_TIMEOUT_S`.
    """
    connection.settimeout(PROOF_TIMEOUT_S)
    theirs = _receive_exactly(connection, TOKEN_BYTES)
    ours, name = secrets.token_bytes(TOKEN_BYTES), _IDENTITY.pack(identity)
    connection.sendall(ours + name + _proof(token, b"caller", theirs, ours, name))
    proof = _receive_exactly(connection, TOKEN_BYTES)
    if not hmac.compare_digest(proof, _proof(token, b"listener", theirs, ours, name)):
        raise ConnectionRefusedError("another program listens there")
    connection.settimeout(None)


def dial(endpoints: Sequence[tuple[str, int]], token: bytes, identity: int) -> socket.socket:
    """Returns a connection to the first of ``endpoints`` (host, port) that answers and knows ``token``.

    Raises:
        ConnectionError: none does; names each with its reason, and the remedy.
    """
    reasons = []
    for host, port in endpoints:
        connection = None
        try:
            connection = socket.create_connection((host, port), timeout=DIAL_TIMEOUT_S)
            introduce(connection, token, identity)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as error:
            reasons.append(f"{host}:{port} ({error})")
            if connection is not None:
                connection.close()
    raise ConnectionError(
        f"cannot reach rank 0 at {', '.join(reasons)}; open the network between the hosts for TCP, or name an "
        f"address of rank 0's host that every host can reach with {HOST_ADDRESS_VARIABLE}"
    )


def accept_peer(listener: socket.socket, token: bytes, timeout_s: float) -> tuple[int, socket.socket] | None:
    """Returns the next caller that proves ``token`` and who it says it is, None if none does within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        listener.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return None
        identity = admit(connection, token)
        if identity is not None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return identity, connection
        connection.close()


def _proof(token: bytes, role: bytes, listener_nonce: bytes, caller_nonce: bytes, identity: bytes) -> bytes:
    return hmac.new(token, role + listener_nonce + caller_nonce + identity, hashlib.sha256).digest()


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        part = connection.recv(num_bytes - len(received))
        if not part:
            raise ConnectionResetError("closed the connection")
        received += part
    return received
