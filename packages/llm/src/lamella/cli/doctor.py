"""``lamella doctor``: what this machine can run, what is missing, and the command that adds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamella.cli.machine import GIB, gpus, is_installed, machine, versions
from lamella_core.device import why_no_cuda

# Optional module -> what it is for, command that adds it.
EXTRAS = {
    "tiktoken": ("tokenizers of some hub models", "pip install 'lamella[tokenizers]'"),
    "sentencepiece": ("tokenizer.model files without tokenizer.json", "pip install 'lamella[tokenizers]'"),
    "mpi4py": ("several machines, lamella-launch", "pip install 'lamella[mpi]'"),
    "flashinfer": ("long prompts on NVIDIA GPUs", "pip install 'lamella[cuda]'"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    ok: bool = True
    remedy: str = ""  # command or step that makes it ok


def findings() -> list[Finding]:
    """Looks at the machine; takes seconds when the native kernels have to be compiled first."""
    return [*_machine(), *_packages(), *_kernels(), *_gpu(), *_extras()]


def run_doctor(*, as_json: bool) -> None:
    """Prints the findings. Missing optional parts are no failure."""
    rows = findings()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = Table("", "what", "found", "to add it", box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"  # a path or command is never cut
    for row in rows:
        mark = "[green]ok[/green]" if row.ok else "[yellow]--[/yellow]"
        table.add_row(mark, *map(escape, (row.name, row.value, row.remedy)))  # 'lamella[cuda]' is no markup
    console = Console(highlight=False)
    console.print(table)


def _machine() -> list[Finding]:
    facts = machine()
    free = facts["available_memory_bytes"] / GIB
    return [
        Finding("processor", f"{facts['cpu']}, {facts['usable_cores']} usable cores"),
        Finding("instruction sets", ", ".join(facts["isa"]) or "none that the kernels use"),
        Finding("memory", f"{free:.1f} GiB free of {facts['memory_bytes'] / GIB:.1f} GiB"),
        Finding("largest model", f"about {free * 0.8 * GIB / 2 / 1e9:.0f} billion parameters in bfloat16"),
        Finding("system", facts["os"]),
    ]


def _packages() -> list[Finding]:
    return [
        Finding(name, found or "missing", found is not None, "" if found else f"pip install {name}")
        for name, found in versions().items()
    ]


def _kernels() -> list[Finding]:
    from lamella_core.kernels.cpu.build import native_status

    status = native_status()
    if status.available:
        return [
            Finding("native CPU kernels", f"loaded from {status.path}"),
            Finding("compiler", status.compiler),
        ]
    return [Finding("native CPU kernels", "off, slower torch code serves", False, status.reason)]


def _gpu() -> list[Finding]:
    import torch

    found = gpus()
    if found:
        names = ", ".join(f"{gpu['name']} ({gpu['memory_bytes'] / GIB:.0f} GiB)" for gpu in found)
        reason = why_no_cuda()
        return [Finding("GPU", names, reason is None, reason or "")]
    built = torch.version.cuda
    return [Finding("GPU", f"none that torch sees (torch is built {'for CUDA ' + built if built else 'for CPUs'})")]


def _extras() -> list[Finding]:
    rows = []
    for module, (purpose, command) in EXTRAS.items():
        found = is_installed(module)
        rows.append(
            Finding(f"{module} ({purpose})", "installed" if found else "missing", found, "" if found else command)
        )
    return rows
