"""What models that score a text have in common: how labels are read, and the shape of their output."""

from __future__ import annotations

from typing import Any

from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig

REGRESSION, SINGLE_LABEL, MULTI_LABEL = "regression", "single_label_classification", "multi_label_classification"
_DEFAULT_LABELS = 2


def scoring_fields(hf: HfConfig, default_labels: int = _DEFAULT_LABELS) -> dict[str, Any]:
    """Returns the fields ``labels`` and ``problem_type``, from ``id2label`` or ``num_labels`` of the file.

    Raises:
        ConfigError: they contradict each other or are of another kind.
    """
    given = hf.get("id2label", default=None)
    count = hf.integer("num_labels", default=None, nullable=True)
    if given is None:
        labels = [f"LABEL_{i}" for i in range(default_labels if count is None else count)]
    elif not isinstance(given, dict) or not given or {str(key) for key in given} != set(map(str, range(len(given)))):
        raise ConfigError(f"{hf.where}: id2label is {given!r}; it must name the labels 0, 1, ... in an object")
    else:
        labels = [str({str(key): value for key, value in given.items()}[str(i)]) for i in range(len(given))]
    if count is not None and count != len(labels):
        raise ConfigError(f"{hf.where}: num_labels is {count}, but id2label names {len(labels)}; correct one of them")
    problem = hf.get("problem_type", default=None)
    if problem is None:
        problem = REGRESSION if len(labels) == 1 else SINGLE_LABEL
    if problem not in (REGRESSION, SINGLE_LABEL, MULTI_LABEL):
        raise ConfigError(
            f"{hf.where}: problem_type is {problem!r}; allowed: {REGRESSION}, {SINGLE_LABEL}, {MULTI_LABEL}"
        )
    return {"labels": labels, "problem_type": problem}
