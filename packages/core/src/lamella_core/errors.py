"""Every error that Lamella raises on purpose.

Three kinds (see docs/errors.md): of one request (`RequestError`: the others go on), of one step (`StepError`: its
requests fail, the engine goes on), fatal (`EngineDeadError`: every waiter gets the cause). The rest happen before an
engine exists. Each class also derives from the built-in exception that a user would catch for that mistake.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LamellaError(Exception):
    """Base class of all errors raised on purpose by Lamella."""


class ConfigError(LamellaError, ValueError):
    """A configuration value is invalid; the message names field, value, what is allowed and the remedy."""


class UnsupportedModelError(LamellaError, NotImplementedError):
    """The architecture is not registered; the message lists the supported ones."""


class CheckpointError(LamellaError, ValueError):
    """A model directory or weight file is missing, truncated, corrupted or does not fit the model."""


class EngineFormatError(CheckpointError):
    """An engine directory is foreign, damaged or of a schema that this version cannot read."""


class OutOfMemoryError(LamellaError, MemoryError):
    """The memory plan does not fit; the message holds the numbers and the knob to turn."""


class RequestError(LamellaError, ValueError):
    """One request is invalid or failed; the engine keeps serving the others."""


class StepError(RequestError):
    """A forward step failed; the requests in that step fail with this, the engine goes on."""


class EngineDeadError(LamellaError, RuntimeError):
    """The engine stopped: fatally failed (see `__cause__`) or was shut down."""


class WorkerError(LamellaError, RuntimeError):
    """The process of another rank died, failed or fell silent; the message names rank, phase and how. Fatal."""


class CommunicationError(LamellaError, RuntimeError):
    """Ranks could not exchange a tensor: a peer died or fell silent, or the group was aborted. Fatal."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""
