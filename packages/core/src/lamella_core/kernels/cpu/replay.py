"""Recording the native kernel calls of a computation once and replaying them with one call.

Between two kernels of a decoding step the interpreter takes longer than the smaller kernels themselves. A `Tape` holds
the calls of a step with the addresses they were made with; replaying it repeats them on the same buffers, so inputs are
copied into the buffers that were recorded and outputs are read from them: what a CUDA graph is to a GPU.

Only computations whose every arithmetic is a native kernel can be replayed. Whatever PyTorch computes while recording
is noticed and refused; views and uninitialized memory are not arithmetic.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lamella_core.kernels.cpu.abi import F32, RECORDABLE, SIGNATURES, check_status, kernels, observed

_WIDTH = max(len(SIGNATURES[name]) for name in RECORDABLE)  # argument words of a recorded call

# PyTorch operations that compute nothing: they make views, or memory without contents.
_FREE = frozenset(
    "aten::" + name
    for name in (
        "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "new_empty",
        "narrow", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
        "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias",
    )
)  # fmt: skip


_FREE_IF_UNCHANGED = frozenset(("aten::to", "aten::contiguous", "aten::reshape"))  # when they return their input


class NotReplayableError(Exception):
    """The computation uses more than native kernels; the message names what."""


class Tape:
    """Recorded kernel calls and the memory they use.

    Attributes:
        output: what the recorded function returned; written anew by every `replay`.
    """

    def __init__(self, calls: list[tuple[int, tuple[Any, ...]]], held: list[Tensor], output: Tensor) -> None:
        self.output = output
        self._held = held  # every tensor made while recording: their memory must stay theirs
        self._count = len(calls)
        self._words = (ctypes.c_uint64 * (len(calls) * (1 + _WIDTH)))()
        for i, (code, arguments) in enumerate(calls):
            words: list[Any] = [code, *_words(RECORDABLE[code], arguments)]
            self._words[i * (1 + _WIDTH) : i * (1 + _WIDTH) + len(words)] = words
        self._failed = ctypes.c_int64()
        self._replay = kernels().lamella_replay

    def replay(self) -> Tensor:
        """Repeats the calls on their buffers and returns `output`.

        Raises:
            ValueError, MemoryError: as the failing operation would.
        """
        status = self._replay(
            ctypes.addressof(self._words), self._count, _WIDTH, ctypes.addressof(self._failed)
        )  # fmt: skip
        if status:
            code = self._words[self._failed.value * (1 + _WIDTH)]
            check_status(RECORDABLE[code].removeprefix("lamella_"), status)
        return self.output


def record(function: Callable[[], Tensor]) -> Tape:
    """Runs ``function`` once and returns the tape of its native calls.

    Its result and everything it reads that changes between replays must lie in tensors that the caller keeps.

    Raises:
        NotReplayableError: there are no native kernels here, or the function computes something without them. It has
            been run to its end all the same.
    """
    library = kernels()
    if library is None:
        raise NotReplayableError("the native kernels are not available")
    recorder, watcher = _Recorder(library), _Watcher()
    with observed(recorder), watcher:
        output = function()
    if watcher.computed:
        raise NotReplayableError(f"PyTorch computes {', '.join(sorted(watcher.computed))}")
    return Tape(recorder.calls, watcher.made, output)


class _Recorder:
    """Stands in for the native library: notes each call and passes it on."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.calls: list[tuple[int, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        function, code = getattr(self._library, name), RECORDABLE.index(name)

        def call(*arguments: Any) -> int:
            self.calls.append((code, arguments))
            return int(function(*arguments))

        return call


class _Watcher(TorchDispatchMode):
    """Notes what PyTorch computes, and holds on to the tensors that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: set[str] = set()
        self.made: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else PyTorch would import its compiler, seconds long, to keep it from a mode that is never compiled."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().split(".")[0]
        is_input = name in _FREE_IF_UNCHANGED and result.data_ptr() == args[0].data_ptr()
        if name not in _FREE and not is_input:
            self.computed.add(name)
        self.made.extend(x for x in (result if isinstance(result, (list, tuple)) else (result,)) if torch.is_tensor(x))
        return result


def _words(name: str, arguments: tuple[Any, ...]) -> list[int]:
    """Returns a call's arguments as 64-bit words."""
    kinds = SIGNATURES[name]
    return [
        struct.unpack("I", struct.pack("f", value))[0] if kind is F32 else int(value or 0) & 0xFFFFFFFFFFFFFFFF
        for kind, value in zip(kinds, arguments, strict=True)
    ]
