"""Reports the size of files, functions and classes, and fails on one beyond the hard limit without a stated reason.

Soft limits (reported): file 300 lines, function 40, class 200. Hard limits (fail): file 450, function 60, class 300.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOFT = {"file": 300, "function": 40, "class": 200}
HARD = {"file": 450, "function": 60, "class": 300}

# "path" or "path:name" -> why it may exceed the hard limit.
EXCEPTIONS: dict[str, str] = {}


def measure(path: Path) -> list[tuple[str, str, int]]:
    """Returns (kind, name, lines) of the file and everything defined in it."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    found = [("file", name, text.count("\n"))]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            found.append((kind, f"{name}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1))
    return found


def main() -> int:
    measured = [row for path in sorted(ROOT.glob("packages/*/src/**/*.py")) for row in measure(path)]
    totals: Counter[str] = Counter()
    for kind, name, lines in measured:
        if kind == "file":
            totals[name.split("/")[1]] += lines
    print("lines per package: " + ", ".join(f"{package} {lines}" for package, lines in sorted(totals.items())))
    over_soft = sorted((row for row in measured if row[2] > SOFT[row[0]]), key=lambda row: -row[2])
    for kind, name, lines in over_soft:
        print(f"  {lines:4d} lines (aim {SOFT[kind]}): {kind} {name}")
    failures = [row for row in over_soft if row[2] > HARD[row[0]] and row[1] not in EXCEPTIONS]
    for kind, name, lines in failures:
        print(f"FAIL: {kind} {name} has {lines} lines; the limit is {HARD[kind]}. Extract a collaborator.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
