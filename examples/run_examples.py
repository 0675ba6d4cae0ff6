"""Runs the tasks of llm_examples.py for one device or for several, each in its own process.

Run: python examples/run_examples.py run_single_gpu [--hf_model_dir DIR]
     python examples/run_examples.py run_multi_gpu [--hf_model_dir DIR] [--world_size 2]
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
app = typer.Typer(add_completion=False, help=__doc__)


def run(task: str, *arguments: str) -> None:
    print(f"== {task} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, str(HERE / "llm_examples.py"), "--task", task, *arguments], check=True)


@app.callback()
def _root() -> None:
    """A command per kind of machine."""


@app.command("run_single_gpu")
def run_single_device(
    hf_model_dir: Annotated[Path, typer.Option("--hf_model_dir")] = HERE / "demo_model" / "demo-4m",
) -> None:
    """All tasks that need one device; a CPU will do."""
    model = ("--hf_model_dir", str(hf_model_dir))
    with tempfile.TemporaryDirectory() as scratch:
        engine = str(Path(scratch) / "engine")
        run("run_llm_from_huggingface_model", *model, "--dump_engine_dir", engine)
        run("run_llm_from_tllm_engine", "--engine_dir", engine)
    run("run_llm_generate", *model)
    run("run_llm_generate_async_example", *model)
    run("run_llm_generate_async_example", *model, "--streaming")
    run("run_llm_with_async_future", *model)


@app.command("run_multi_gpu")
def run_several_devices(
    hf_model_dir: Annotated[Path, typer.Option("--hf_model_dir")] = HERE / "demo_model" / "demo-4m",
    world_size: Annotated[int, typer.Option("--world_size")] = 2,
) -> None:
    """All tasks that spread a model over devices; several processes on a CPU will do."""
    model = ("--hf_model_dir", str(hf_model_dir))
    run("run_llm_on_tensor_parallel", *model, "--tp_size", str(world_size))
    run("run_llm_with_auto_parallel", *model, "--world_size", str(world_size))


if __name__ == "__main__":
    app()
