"""Writes docs/models.md from the conformance suite's results.

python -m pytest tests/conformance --junitxml=conformance.xml
python scripts/model_table.py conformance.xml
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from lamella_core.models.registry import get_model_class, registered_architectures

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
# Heading of a column, and the test whose results it counts.
COLUMNS = {
    "logits": "test_logits_equal_transformers",
    "greedy": "test_greedy_tokens_equal_transformers",
    "chunks": "test_chunks_equal_whole",
    "neighbours": "test_neighbours_change_no_bit",
    "half precision": "test_half_precision_is_near",
    "tp 2": "test_two_tensor_ranks_equal_one",
    "pp 2": "test_two_stages_equal_one",
    "served": "test_served_tokens_are_those_of_each_alone",
}
SCORING_COLUMNS = {
    "scores": "test_scores_equal_the_oracle",
    "pairs": "test_token_types_count",
    "tp 2, pp 2": "test_two_tensor_ranks_and_two_stages_equal_one",
}
INTRODUCTION = """# Models

Made by `scripts/model_table.py` from a run of the conformance suite (`tests/conformance`); do not edit.

Each architecture runs in several tiny random configurations, in float32 (in "half precision" bfloat16 or float16),
against `transformers`, or against an independent reference in `tests/references` where transformers has none. "served"
is through the executor: batched, in chunks, paused and resumed, prefixes reused. A cell counts the passed runs of all
runs; "-" means that the test does not apply.

## Models that generate

"""
SCORING = """
## Models that score

Classifiers and reward models, through `LLM.encode`; "pairs" are texts of two parts.

"""


def results(path: Path) -> tuple[dict[str, set[str]], dict[tuple[str, str], list[bool]]]:
    """Returns the configurations of each architecture, and per (architecture, test) whether each run passed."""
    variants: dict[str, set[str]] = defaultdict(set)
    runs: dict[tuple[str, str], list[bool]] = defaultdict(list)
    known = set(registered_architectures())
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        found = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
        if not found or case.find("skipped") is not None:
            continue
        test, parts = found[1], found[2].split("-")
        architecture = next((part for part in parts if part in known), None)
        if architecture is None or test not in {**COLUMNS, **SCORING_COLUMNS}.values():
            continue
        variants[architecture].add(parts[parts.index(architecture) + 1])
        runs[architecture, test].append(case.find("failure") is None and case.find("error") is None)
    return variants, runs


def table(path: Path, task: str, columns: dict[str, str]) -> str:
    variants, runs = results(path)
    lines = [
        "| architecture | file | configurations | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for architecture in registered_architectures(task):
        module = get_model_class(architecture).__module__.rpartition(".")[2]
        cells = []
        for test in columns.values():
            passed = runs.get((architecture, test), [])
            cells.append(f"{sum(passed)}/{len(passed)}" if passed else "-")
        names = ", ".join(sorted(variants.get(architecture, ())))
        lines.append(f"| `{architecture}` | `{module}.py` | {names} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(path: Path) -> str:
    return INTRODUCTION + table(path, "generate", COLUMNS) + SCORING + table(path, "score", SCORING_COLUMNS)


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1])), encoding="utf-8")
