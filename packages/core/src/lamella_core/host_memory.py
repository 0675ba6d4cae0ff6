"""How much memory this process may still use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

UNKNOWN_BYTES = 4 << 30  # assumed free where the system does not tell


def available_bytes() -> int:
    """Returns the bytes this process may still use: free memory of the machine, or of its control group if less."""
    if sys.platform == "linux":
        return min(_linux_free(), _cgroup_free())
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES")
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_BYTES


def _linux_free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return UNKNOWN_BYTES
    return UNKNOWN_BYTES


def _cgroup_free() -> int:
    """Returns the least room left in this process's memory control groups (versions 1 and 2); huge if unlimited."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return sys.maxsize
    room = sys.maxsize
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            room = min(room, _group_room(folder, limit, usage))
            if folder == root:
                break
    return room


def _group_room(folder: Path, limit: str, usage: str) -> int:
    """Returns limit minus usage of one group; file pages that can be dropped count as room."""
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        if most == "max":
            return sys.maxsize
        used = int((folder / usage).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(most) - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))
    except (OSError, ValueError):
        return sys.maxsize
