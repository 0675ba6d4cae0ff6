"""Sets the version of the metapackage and of all four packages, and their exact pins on each other.

Usage: python scripts/bump.py 0.2.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(version: str) -> None:
    if not re.fullmatch(r"\d+\.\d+\.\d+(?:[a-z]+\d+)?", version):
        sys.exit(f"version is {version!r}; expected three numbers such as 0.2.0")
    for path in [ROOT / "pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]:
        text = path.read_text()
        text = re.sub(r'(?m)^version = ".*"$', f'version = "{version}"', text)
        text = re.sub(r'"(lamella(?:-\w+)?)==[^"]*"', rf'"\1=={version}"', text)
        path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {version}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")
