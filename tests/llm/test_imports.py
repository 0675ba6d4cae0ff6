"""Importing is light: no torch, no transformers, all public names there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.warm_python import WarmPython

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


def test_using_a_model_needs_no_transformers_and_no_compiler(model_dir: Path, warm_python: WarmPython):
    """Each takes seconds to import."""
    code = f"""if True:
        import sys
        from lamella import LLM, SamplingParams
        with LLM({str(model_dir)!r}) as llm:
            assert llm.generate("The fox", SamplingParams(max_tokens=6)).text
        print(*sys.modules)
    """
    done = warm_python.run(code, timeout=60)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert "lamella_executor.loop" in modules
    assert not {"transformers", "torch._dynamo", "torch._inductor", "sympy"} & modules


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
