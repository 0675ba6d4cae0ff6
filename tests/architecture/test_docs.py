"""What the documentation names exists: `file.py:function` references, relative links and Python snippets."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# "lamella_executor/loop.py:EngineLoop.step" -> the file below packages/*/src and the dotted name inside it
REFERENCE = re.compile(r"`((?:lamella\w*|examples|benchmarks|tests|scripts)/[\w/.]+\.py):([\w.]+)`")


def definitions(path: Path) -> set[str]:
    names: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(path.read_text()), "")
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_references_exist(page):
    for file, name in REFERENCE.findall(page.read_text()):
        found = [*ROOT.glob(f"packages/*/src/{file}"), *ROOT.glob(file)]
        assert found, f"{page.name} names {file}, which does not exist"
        assert name in definitions(found[0]), f"{page.name} names {file}:{name}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_snippets_parse(page):
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        compile(snippet, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_request_walk_has_its_hops():
    references = REFERENCE.findall((ROOT / "docs" / "request_walk.md").read_text())
    assert len(references) >= 8
