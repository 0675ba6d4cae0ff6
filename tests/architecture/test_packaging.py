"""The four distributions agree with each other and with what they declare."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"core": "lamella_core", "builder": "lamella_builder", "executor": "lamella_executor", "llm": "lamella"}


def manifest(folder: str) -> dict:
    return tomllib.loads((ROOT / "packages" / folder / "pyproject.toml").read_text())


def test_versions_are_in_lock_step():
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for folder in PACKAGES:
        project = manifest(folder)["project"]
        assert project["version"] == root
        siblings = [d for d in project["dependencies"] if d.startswith("lamella")]
        assert all(d.endswith(f"=={root}") for d in siblings), siblings


def test_every_folder_is_a_package_and_typed():
    for folder, name in PACKAGES.items():
        source = ROOT / "packages" / folder / "src" / name
        assert (source / "py.typed").exists()
        for directory in {p.parent for p in source.rglob("*.py")}:
            assert (directory / "__init__.py").exists(), directory


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {re.split(r"==", line)[0].lower().replace("_", "-") for line in lines if "==" in line}
    for folder in PACKAGES:
        for dependency in manifest(folder)["project"]["dependencies"]:
            name = re.split(r"[<>=!~ \[;]", dependency)[0].lower().replace("_", "-")
            assert name in pinned or name.startswith("lamella"), f"{folder} needs {name}, constraints.txt has no pin"


IMPORT_TIME = """
import sys, time
start = time.perf_counter()
import {name}
seconds = time.perf_counter() - start
print(seconds, 'torch' in sys.modules)
"""


@pytest.mark.parametrize("name", PACKAGES.values())
def test_import_does_not_load_torch(name):
    out = subprocess.run(
        [sys.executable, "-c", IMPORT_TIME.format(name=name)], capture_output=True, text=True, check=True
    )
    assert out.stdout.split()[1] == "False", f"import {name} loads torch"


# Imports every module of one package while only the distributions it declares (and theirs) can be imported.
# A module may need one that an extra declares: then that is what its import asks for.
ONLY_DECLARED = """
import importlib, importlib.metadata as md, pkgutil, re, sys

def norm(name): return re.sub(r"[-_.]+", "-", name).lower()

def closure(dist, with_extras):
    found, queue = set(), [dist]
    while queue:
        dist = norm(queue.pop())
        if dist in found: continue
        found.add(dist)
        try: needs = md.requires(dist) or []
        except md.PackageNotFoundError: continue
        extras = with_extras and dist.startswith("lamella")
        queue += [re.match(r"[A-Za-z0-9._-]+", n)[0] for n in needs if extras or "extra ==" not in n]
    return found

allowed, optional = closure(sys.argv[1], False), closure(sys.argv[1], True)

owners = md.packages_distributions()

class Fence:
    def find_spec(self, fullname, path=None, target=None):
        top = fullname.partition(".")[0]
        dists = {norm(d) for d in owners.get(top, [])}
        if dists and not dists & allowed:
            what = "optional" if dists & optional else "undeclared"
            raise ModuleNotFoundError(f"{what} dependency: {fullname}", name=fullname)

assert "torch" in sys.modules  # its optional imports are not ours
assert not [name for name in sys.modules if name.startswith("lamella")]
sys.meta_path.insert(0, Fence())
package = importlib.import_module(sys.argv[2])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        try: importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if "optional dependency" not in str(error): raise
"""


@pytest.mark.parametrize("folder,name", PACKAGES.items())
def test_modules_import_only_what_the_package_declares(folder, name, warm_python):
    dist = manifest(folder)["project"]["name"]
    out = warm_python.run(ONLY_DECLARED, dist, name, timeout=120)
    assert out.returncode == 0, out.stderr[-2000:]
