"""Importing is light: no torch, no transformers, all public names there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lamella


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import lamella",
        "import lamella.cli.main",
        "from lamella import KvCacheConfig, SchedulerConfig, BuildConfig, QuantConfig",
    ],
)
def test_import_leaves_the_heavy_libraries_alone(code: str):
    assert not {"torch", "transformers", "numpy", "tokenizers"} & modules_after(code)


def test_using_a_model_needs_no_transformers():
    assert "transformers" not in modules_after("from lamella import LLM, SamplingParams")


def test_public_names():
    assert {
        "LLM", "SamplingParams", "KvCacheConfig", "SchedulerConfig", "CapacitySchedulerPolicy", "BuildConfig",
        "QuantConfig", "QuantAlgo", "RequestOutput", "CompletionOutput", "__version__",
    } <= set(lamella.__all__)  # fmt: skip
    for name in lamella.__all__:
        assert getattr(lamella, name) is not None
    assert set(lamella.__all__) <= set(dir(lamella))
    with pytest.raises(AttributeError, match="no attribute 'LLm'"):
        _ = lamella.LLm
