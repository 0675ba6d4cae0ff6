"""Errors that outlive the step they came from."""

from __future__ import annotations

import traceback

from lamella_core.errors import RequestError, WorkerError


def detach(error: BaseException) -> str:
    """Takes the tracebacks out of an error and what caused it; returns them as text.

    The text is also added to the error as a note (Python 3.11 and later). The failure of another rank, a `WorkerError`
    without a cause, has no frames of interest in this process: its text is its message alone, without a note.

    A result may be kept long after its engine is gone, and a traceback's frames would keep the model in memory.
    """
    is_elsewhere = isinstance(error, WorkerError) and error.__cause__ is None
    text = str(error) if is_elsewhere else "".join(traceback.format_exception(error))
    pending, seen = [error], set()
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        current.__traceback__ = None
        pending += [e for e in (current.__cause__, current.__context__) if e is not None]
    if hasattr(error, "add_note") and not is_elsewhere:
        error.add_note(f"Where it came from:\n{text}")
    return text


def decoder_error(cause: BaseException) -> RequestError:
    """Returns the error of a request whose decoder, the user's code, raised ``cause``."""
    detach(cause)
    error = RequestError(f"the request's decoder raised {type(cause).__name__}: {cause}; check the tokenizer")
    error.__cause__ = cause
    return error
