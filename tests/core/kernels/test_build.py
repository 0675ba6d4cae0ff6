"""Compiling on first use: the cache, its safety, what happens without a compiler, and the shared OpenMP runtime."""

import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lamella_core.kernels.cpu import abi, build, host

needs_native = pytest.mark.skipif(not build.native_status().available, reason="needs a compiler")
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")


def outcome():
    """A fresh look for the kernels that leaves the process's own alone."""
    return build._outcome.__wrapped__()[0]


@pytest.fixture
def tiny_sources(tmp_path, monkeypatch):
    """One function instead of all kernels, and an empty cache."""
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "tiny.cpp").write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n')
    monkeypatch.setattr(build, "SOURCE_DIR", folder)
    monkeypatch.setenv("LAMELLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LAMELLA_DISABLE_NATIVE", raising=False)
    return folder


def test_importing_the_registry_compiles_nothing():
    code = "import sys, lamella_core.kernels; assert 'torch' not in sys.modules\n"
    code += "import lamella_core.kernels.matmul; from lamella_core.kernels.cpu import build\n"
    code += "assert build._outcome.cache_info().misses == 0"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr


@needs_native
def test_second_use_loads_what_the_first_compiled(tiny_sources):
    first = outcome()
    assert first.available and not first.reason
    stamp = Path(first.path).stat().st_mtime_ns
    assert outcome() == first and Path(first.path).stat().st_mtime_ns == stamp
    assert [p.name for p in Path(first.path).parent.iterdir()] == [build.LIBRARY_NAME]


@needs_native
def test_changed_sources_compile_anew(tiny_sources):
    first = outcome()
    (tiny_sources / "extra.h").write_text("// more\n")
    second = outcome()
    assert second.available and second.digest != first.digest


@needs_native
def test_two_processes_may_compile_at_once(tiny_sources, warm_python):
    code = f"""
        import ctypes
        from pathlib import Path
        from lamella_core.kernels.cpu import build
        build.SOURCE_DIR = Path({str(tiny_sources)!r})
        status = build.native_status()
        assert status.available, status.reason
        assert build.native_library().answer() == 42
        print(status.path)
    """
    processes = [warm_python.start(textwrap.dedent(code)) for _ in range(2)]
    paths = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        paths.append(out.strip())
    assert paths[0] == paths[1]
    assert [p.name for p in Path(paths[0]).parent.iterdir()] == [build.LIBRARY_NAME]


def check_fallback(caplog, *words):
    with caplog.at_level(logging.INFO, logger=build.__name__):
        status = outcome()
    assert not status.available and all(word in status.reason for word in words)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and status.reason in warnings[0].getMessage()


def test_missing_compiler_is_one_warning(tiny_sources, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_fallback(caplog, "no-such-compiler", "install g++")


@needs_native
def test_failing_compilation_is_one_warning(tiny_sources, caplog):
    (tiny_sources / "tiny.cpp").write_text("this is not C++;\n")
    check_fallback(caplog, "failed with exit status", "set CXX")
    assert not list(build.cache_dir().rglob("*.so"))


@needs_native
def test_damaged_library_is_compiled_again(tiny_sources, tmp_path, monkeypatch):
    digest = outcome().digest
    monkeypatch.setenv("LAMELLA_CACHE_DIR", str(tmp_path / "other"))
    path = build.cache_dir() / digest / build.LIBRARY_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    assert outcome().path == str(path) and path.stat().st_size > 1000


@needs_native
def test_library_that_does_not_load_is_one_warning(tiny_sources, caplog):
    (tiny_sources / "tiny.cpp").write_text("void nowhere(); __attribute__((constructor)) void start() { nowhere(); }\n")
    check_fallback(caplog, "does not load", "set CXX")


@needs_native
def test_unwritable_cache_is_one_warning(tiny_sources, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LAMELLA_CACHE_DIR", str(tmp_path / "file"))
    check_fallback(caplog, "LAMELLA_CACHE_DIR")


def test_unexpected_error_is_one_warning(tiny_sources, monkeypatch, caplog):
    monkeypatch.setattr(build, "_find_toolchain", lambda: 1 / 0)
    check_fallback(caplog, "ZeroDivisionError")


def test_disabled_kernels_fall_back_quietly_and_correctly(warm_python):
    code = """
        import logging, torch
        from lamella_core.kernels import matmul
        from lamella_core.kernels.cpu import build, ops
        records = []
        logging.getLogger().addHandler(type("H", (logging.Handler,), {"emit": lambda self, r: records.append(r)})())
        status = build.native_status()
        assert not status.available and "LAMELLA_DISABLE_NATIVE" in status.reason and not records
        x, w, bias = torch.randn(20, 33), torch.randn(40, 33), torch.randn(40)
        for layout in ("rows", "panel16"):
            for dtype in (torch.float32, torch.bfloat16):
                plan = matmul.default_plan(dtype, 40, 33, batch_invariant=False, layout=layout)
                assert not any(name.startswith("native") for _, name in plan.steps)
                stored = matmul.to_layout(w.to(dtype), layout)
                y = plan.run(x.to(dtype), stored, 40, bias.to(dtype))
                torch.testing.assert_close(y.float(), x @ w.T + bias, rtol=5e-2, atol=2e-1)
                if dtype == torch.float32:
                    alone = torch.cat([plan.run(x[i : i + 1], stored, 40, bias) for i in range(20)])
                    assert torch.equal(alone, y)
        q, cache = torch.randn(2, 4, 8), torch.randn(3, 2, 4, 8)
        ops.write_kv(q[:, :2], q[:, 2:], cache, cache.clone(), torch.tensor([1, -1]))
        ops.rope_inplace(q, q.clone(), torch.ones(2, 4), torch.zeros(2, 4), 8)
        i32 = lambda *v: torch.tensor(v, dtype=torch.int32)
        out = ops.paged_attention(q, cache, cache, i32(0, 2)[None], i32(0, 2), i32(7), 0.3)
        assert out.shape == q.shape and out.isfinite().all()
        assert ops.silu_and_mul(x[:, :32]).shape == (20, 16) and ops.rms_norm(x, x[0], 1e-5)[0].shape == x.shape
    """
    process = warm_python.run(textwrap.dedent(code), env={"LAMELLA_DISABLE_NATIVE": "1"}, timeout=120)
    assert process.returncode == 0, process.stderr


@needs_native
@needs_proc
def test_kernels_share_torchs_openmp_runtime(warm_python):
    if build.native_status().openmp == "own":
        pytest.skip("this compiler cannot use torch's OpenMP runtime")
    assert [abi.kernels().lamella_team_size(n) for n in (1, 2)] == [1, 2]
    code = """
        from pathlib import Path
        import torch
        from lamella_core.kernels.cpu import abi
        torch.ones(100_000).sum()
        abi.kernels().lamella_team_size(2)
        paths = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
        print(sum(Path(path).name.startswith(("libgomp", "libomp", "libiomp")) for path in paths))
    """  # a process of its own: other libraries bring runtimes of theirs
    process = warm_python.run(textwrap.dedent(code), timeout=120)
    assert process.stdout.split() == ["1"], process.stderr


ARM = """processor : 0
BogoMIPS : 50.00
Features : fp asimd bf16 i8mm
CPU implementer : 0x41
CPU part : 0xd40
"""
X86 = """processor : 0
model name : Some CPU
cpu family : 6
model : 143
stepping : 8
flags : avx2 fma amx_bf16
processor : 1
flags : other
"""


def test_processor_is_read_from_both_spellings():
    arm, x86 = host.parse_cpuinfo(ARM, "aarch64"), host.parse_cpuinfo(X86, "x86_64")
    assert arm.has("bf16") and not arm.has("avx2") and arm.model == "0x41-0xd40"
    assert x86.flags == ("amx_bf16", "avx2", "fma") and x86.model == "Some CPU (family 6 model 143 stepping 8)"
    assert arm.flags_digest != x86.flags_digest
    assert host.parse_cpuinfo("", "riscv64") == host.Host("riscv64", "riscv64", ())
    assert host.host() == host.host()
