"""available_bytes: the machine's free memory, or what its control group leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lamella_core import host_memory


def group(folder: Path, limit: str, used: int, file_pages: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {file_pages}\nactive_file 7\n")
    return folder


def room(folder: Path) -> int:
    return host_memory._group_room(folder, "memory.max", "memory.current")


def test_a_group_leaves_its_limit_less_what_cannot_be_dropped(tmp_path: Path) -> None:
    assert room(group(tmp_path / "a", "1000", 400, 100)) == 1000 - 400 + 107
    assert room(group(tmp_path / "b", "1000", 5000, 0)) == 0
    assert room(group(tmp_path / "c", "max", 400, 0)) == sys.maxsize
    assert room(tmp_path / "none") == sys.maxsize
    (tmp_path / "a" / "memory.current").write_text("?")
    assert room(tmp_path / "a") == sys.maxsize


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc")
def test_the_smaller_of_machine_and_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < host_memory.available_bytes() <= total
    monkeypatch.setattr(host_memory, "_cgroup_free", lambda: 12345)
    assert host_memory.available_bytes() == 12345
