"""Choices of kernels that were timed on a GPU, kept on disk: a later build on the same kind of GPU takes them over.

One JSON file per choice in ``timings`` of the cache folder (`lamella_core.disk_cache`), named after everything that the
choice depends on. A file that is damaged, or of another version of anything, is ignored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lamella_core
from lamella_core import disk_cache
from lamella_core.device import gpu_fingerprint
from lamella_core.errors import ConfigError
from lamella_core.kernels import cublaslt_library
from lamella_core.kernels.matmul import MatmulPlan

logger = logging.getLogger(__name__)


def gpu_environment() -> dict[str, Any]:
    """Returns the current GPU and the versions that times depend on."""
    library = cublaslt_library.library()
    versions = {"lamella": lamella_core.__version__, "cublaslt": None if library is None else library.version}
    return {**gpu_fingerprint(), **versions}


class TimedChoice:
    """The file of one choice.

    Args:
        key: all that the choice depends on, as JSON-ready values.
    """

    def __init__(self, key: Mapping[str, Any]) -> None:
        self._key = json.dumps(key, sort_keys=True)
        self.path: Path = disk_cache.cache_root() / "timings" / f"{disk_cache.digest(self._key)}.json"

    def load(self) -> tuple[MatmulPlan, int | None] | None:
        """Returns the plan that was chosen, and from how many rows on it remains to be timed, as saved.

        None if there is none for this key.
        """
        data = disk_cache.read(self.path)
        if data is None:
            return None
        try:
            record = json.loads(data)
            if record["key"] != json.loads(self._key):
                return None
            untimed = record["untimed"]
            if untimed is not None and type(untimed) is not int:
                raise ValueError(f"untimed is {untimed!r}; need a number of rows, or null")
            return MatmulPlan.from_dict(record["plan"]), untimed
        except (ValueError, TypeError, KeyError, ConfigError) as error:
            logger.warning("kernels are timed again, for %s is damaged: %s", self.path, error)
            return None

    def save(self, plan: MatmulPlan, untimed: int | None) -> None:
        """Keeps the plan, timed below ``untimed`` rows (None: whole); where that is not possible, builds time again."""
        record = {"key": json.loads(self._key), "plan": plan.to_dict(), "untimed": untimed}
        disk_cache.write(self.path, json.dumps(record, indent=1).encode() + b"\n")
