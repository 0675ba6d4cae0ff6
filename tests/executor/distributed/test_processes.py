"""What the processes of an engine do and leave: only their own files, no unpickling, nothing afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support.executors import greedy, hf_greedy
from tests.support.sharded import open_engine, sharded_engine
from tests.support.worker_crews import belongings, children, is_alive, wait_for

MODEL = ("LlamaForCausalLM", "one_kv_head")
NUM_CYCLES = int(os.environ.get("LAMELLA_TEST_CYCLES", "3"))

# Runs in every Python process at its start: notes in a file of its own what is unpickled, and which ranks' files are
# opened.
HOOK = """
import os, sys
notes = open(os.path.join(os.environ["NOTES"], str(os.getpid())), "w", buffering=1)
def note(event, args):
    if event in ("pickle.find_class", "marshal.load"):
        notes.write(f"{event} {args!r}\\n")
    if event == "open" and isinstance(args[0], str) and "safetensors" in args[0]:
        notes.write(f"opens {os.path.basename(args[0])}\\n")
sys.addaudithook(note)
"""

# No main guard, no shutdown, no `with`: the interpreter just ends.
SCRIPT = """
import json, os, sys
from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams
executor = GenerationExecutor.create(sys.argv[1], KvCacheConfig(max_tokens=256))
params = [SamplingParams(max_tokens=6, ignore_eos=True), SamplingParams(max_tokens=6, n=2, temperature=1.0)]
results = executor.generate([[5, 6, 7], [8, 9]], params)
running = executor.generate_async([5], SamplingParams(max_tokens=60, ignore_eos=True))
json.dump([results[0].outputs[0].token_ids, os.getpid()], sys.stdout)
"""


def test_no_process_unpickles_and_each_opens_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    (tmp_path / "script.py").write_text(SCRIPT)
    notes = tmp_path / "notes"
    notes.mkdir()
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "NOTES": str(notes)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(sharded_engine(*MODEL, 2))],
        capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens, pid = json.loads(done.stdout)
    assert tokens == hf_greedy([5, 6, 7], 6, MODEL)
    said = {int(note.name): note.read_text().split("\n") for note in notes.iterdir()}
    events = [line for lines in said.values() for line in lines]
    assert not [line for line in events if "pickle" in line]
    opened = {
        process: set(lines) & {"opens rank0.safetensors", "opens rank1.safetensors"} for process, lines in said.items()
    }
    assert opened.pop(pid) == {"opens rank0.safetensors"}
    (worker,) = [process for process, files in opened.items() if files]
    assert opened[worker] == {"opens rank1.safetensors"}
    assert wait_for(lambda: not is_alive(worker))


def test_the_hook_would_notice(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    script = "import pickle, collections; pickle.loads(pickle.dumps(collections.OrderedDict))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NOTES": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    assert any("pickle.find_class" in note.read_text() for note in tmp_path.glob("[0-9]*"))


def test_nothing_is_left_after_engines_that_came_and_went() -> None:
    directory = sharded_engine(*MODEL, 2)
    left = []
    for cycle in range(NUM_CYCLES):
        executor = open_engine(directory)
        assert executor.generate([5, 6], greedy(2)).outputs[0].token_ids == hf_greedy([5, 6], 2, MODEL)
        if cycle % 3 == 0:
            executor.generate_async([7], greedy(60))
            executor.shutdown()
        elif cycle % 3 == 1:
            executor.shutdown()
        else:
            del executor  # dropped, with nothing to do
        started = time.monotonic()
        assert wait_for(lambda: not children())
        assert time.monotonic() - started < 5.0
        wait_for(lambda: not left or belongings() == left[0], 2.0)
        left.append(belongings())
    assert all(each == left[0] for each in left)
    assert not [name for name in os.listdir("/dev/shm") if "lamella" in name or "torch" in name]
