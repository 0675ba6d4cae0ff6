"""Rules that keep the house as DESIGN says: sizes, no pickle, no repository code, one caller of the hub."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in nodes(path) if isinstance(node, ast.Call)]


def test_size_limits():
    out = subprocess.run([sys.executable, str(ROOT / "scripts/size_report.py")], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout


def test_nothing_unpickles():
    """The one word of pickle allowed is the name of the exception that `torch.load(weights_only=True)` raises."""
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in banned:
                assert node.attr == "UnpicklingError", f"{path}:{node.lineno}"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not {n.partition(".")[0] for n in names} & (banned - {"pickle"}), f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in banned, f"{path}:{node.lineno}"
        for name, call in calls(path):
            if name == "torch.load":
                flags = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert flags.get("weights_only") == "True", f"{path}:{call.lineno}"


def test_repository_code_is_never_trusted():
    for path in SOURCES:
        for name, call in calls(path):
            for keyword in call.keywords:
                if keyword.arg == "trust_remote_code" and "from_pretrained" in name:
                    assert ast.unparse(keyword.value) == "False", f"{path}:{call.lineno}"


def test_no_assert_validates_input():
    """`python -O` must not change behaviour: packages raise, they do not assert on user input."""
    counts = {p: sum(isinstance(n, ast.Assert) for n in nodes(p)) for p in SOURCES}
    for path, count in counts.items():
        assert count <= 2, f"{path} has {count} assert statements; raise a LamellaError instead"
