"""Small files kept between runs in ``$LAMELLA_CACHE_DIR``, by default ``~/.cache/lamella``: what was compiled or timed.

Nothing depends on them: what cannot be read is made again, and what cannot be written is not kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Returns the folder, which need not exist yet; for a user without a home one that cannot be made."""
    root = os.environ.get("LAMELLA_CACHE_DIR")
    try:
        return Path(root).expanduser() if root else Path.home() / ".cache" / "lamella"
    except RuntimeError:
        return Path(os.devnull) / "lamella"


def digest(*parts: bytes | str) -> str:
    """Returns 24 hexadecimal digits that differ where any part does."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:24]


def read(path: Path) -> bytes | None:
    """Returns a file's content; None if there is no such file, or none that can be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def write(path: Path, data: bytes) -> None:
    """Writes a file all at once, so that others never see a part of it; what goes wrong is only logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".write-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        logger.info("%s is not kept for later runs: %s; LAMELLA_CACHE_DIR names another folder", path.name, error)
