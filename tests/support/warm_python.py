"""Python processes that begin with PyTorch imported: forks of one that has imported it, in milliseconds each.

They are processes of their own to the end: script and signals on the main thread, all that an interpreter does at its
end, exit code. What they lack is a start: nothing here shows what a fresh interpreter imports, or how soon.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

MAX_TASK_BYTES = 1 << 17


class WarmProcess:
    """A process as `subprocess.Popen` of a text mode shows it; a child of another, which tells how it ended."""

    def __init__(self, pid: int, stdout: IO[str], stderr: IO[str] | None, reply: IO[bytes]) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._reply = reply

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code, or raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._reply], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = int(self._reply.readline())
            self._reply.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Returns what it writes until its end; kills it and raises subprocess.TimeoutExpired if that is too late."""
        texts = ["", ""]

        def read(index: int, file: IO[str]) -> None:
            texts[index] = file.read()

        files = [(i, file) for i, file in enumerate((self.stdout, self.stderr)) if file is not None]
        readers = [threading.Thread(target=read, args=each) for each in files]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for reader in readers:
                reader.join(timeout)
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for its end, as a `Popen` does."""
        self.wait()
        self.stdout.close()
        if self.stderr is not None:
            self.stderr.close()


class WarmPython:
    """Starts processes; the one that they are forked from is no child of this process, and ends with it."""

    def __init__(self, *modules: str, env: Mapping[str, str] | None = None) -> None:
        """Imports modules before the first process begins, in this process's environment and ``env``."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        added = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(env or {})}
        reading, writing = os.pipe()  # the streams of the forks are made for pipes, which take its place
        with theirs, open(reading, "rb"), open(writing, "wb"):
            subprocess.run(
                [sys.executable, __file__, str(theirs.fileno()), *modules], pass_fds=[theirs.fileno()],
                env={**os.environ, **added}, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, check=True,
            )  # fmt: skip

    def start(
        self,
        code: str,
        *arguments: str,
        path: Path | None = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stderr: int | None = None,
    ) -> WarmProcess:
        """Starts a process.

        Args:
            code: what it runs, as of ``-c``.
            arguments: of the code.
            path: the script whose text the code is, if it is one.
            cwd: its working directory; this process's by default.
            env: is added to this process's.
            stderr: descriptor that it shares as its own; by default a pipe that the result reads.
        """
        task = {
            "code": code,
            "arguments": arguments,
            "path": None if path is None else str(path),
            "cwd": str(cwd or os.getcwd()),
            "environment": {**os.environ, **(env or {})},
        }
        theirs: list[int] = []
        with contextlib.ExitStack() as sent:

            def pipe(mode: str, buffering: int = -1) -> IO[Any]:
                reading, writing = os.pipe()
                sent.callback(os.close, writing)
                theirs.append(writing)
                return open(reading, mode, buffering)

            answer = pipe("rb", 0)  # unbuffered, so that a line read leaves the next one for `select`
            stdout, errors = pipe("r"), None
            if stderr is None:
                errors = pipe("r")
            else:
                theirs.append(stderr)
            socket.send_fds(self._socket, [json.dumps(task).encode()], theirs)
        return WarmProcess(int(answer.readline()), stdout, errors, answer)

    def run(self, code: str, *arguments: str, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
        """Starts a process as `start` does, and waits for its end."""
        with self.start(code, *arguments, **options) as process:
            output, errors = process.communicate(timeout)
        assert process.returncode is not None
        return subprocess.CompletedProcess(list(arguments), process.returncode, output, errors)

    def close(self) -> None:
        self._socket.close()


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Forks for each request; returns the task in the new process, None in this one when nobody is there any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, MAX_TASK_BYTES, 3)
        if not data:
            return None
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child = os.fork()
            if child == 0:
                os.dup2(descriptors[1], 1)
                os.dup2(descriptors[2], 2)
            else:
                report(child, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            return json.loads(data)
        for descriptor in descriptors:
            os.close(descriptor)


def report(child: int, descriptors: list[int]) -> None:
    """Tells a process's number and then how it ended, and ends."""
    reply, *others = descriptors
    for each in others:
        os.close(each)
    os.write(reply, b"%d\n" % child)
    _, status = os.waitpid(child, 0)
    os.write(reply, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def begin(task: dict[str, Any]) -> tuple[types.CodeType, dict[str, Any]]:
    """Makes this process look like a new one; returns the code of its main module and the module's namespace."""
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["environment"])
    path = task["path"]
    sys.argv = [path or "-c", *task["arguments"]]
    sys.path.insert(0, str(Path(path).parent) if path else "")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if path:
        main.__file__ = path
    gc.enable()
    return compile(task["code"], path or "<string>", "exec"), main.__dict__


if __name__ == "__main__":
    if os.fork() == 0:
        gc.disable()
        del sys.path[0]  # this file's folder
        for name in sys.argv[2:]:
            importlib.import_module(name)
        gc.freeze()  # collections, and the ends of the forks, need not look at what was imported
        with socket.socket(fileno=int(sys.argv[1])) as channel:
            new = serve(channel)
        if new is not None:
            exec(*begin(new))
