"""What this machine's processor is: model name and instruction set flags, as the operating system reports them."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Host:
    """Processor identity. ``flags`` are sorted names such as ``avx2``, ``amx_bf16`` or ``asimd``."""

    machine: str
    model: str
    flags: tuple[str, ...]

    @property
    def flags_digest(self) -> str:
        """Twelve hexadecimal digits that change when the set of flags changes."""
        return hashlib.sha256(" ".join(self.flags).encode()).hexdigest()[:12]

    def has(self, *names: str) -> bool:
        """Whether any of the named instruction set flags is present."""
        return any(name in self.flags for name in names)


def parse_cpuinfo(text: str, machine: str) -> Host:
    """Read the first processor of a Linux ``/proc/cpuinfo`` text (x86 and Arm spellings)."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    parts = [fields.get(key, "") for key in ("CPU implementer", "CPU part", "CPU variant")]
    arm = "-".join(part for part in parts if part)
    model = fields.get("model name") or arm or machine
    if "model" in fields:
        model += (
            f" (family {fields.get('cpu family', '?')} model {fields['model']} stepping {fields.get('stepping', '?')})"
        )
    flags = fields.get("flags") or fields.get("Features") or ""
    return Host(machine=machine, model=model, flags=tuple(sorted(set(flags.split()))))


@functools.lru_cache(maxsize=1)
def host() -> Host:
    """The processor this process runs on. Never raises; unknown parts are left generic."""
    machine = platform.machine() or "unknown"
    try:
        if CPUINFO.exists():
            return parse_cpuinfo(CPUINFO.read_text(encoding="utf-8", errors="replace"), machine)
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            brand = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            return Host(machine=machine, model=brand, flags=())
    except (OSError, subprocess.SubprocessError):
        pass
    return Host(machine=machine, model=platform.processor() or machine, flags=())
