"""The tasks of the older high-level API, on `lamella.hlapi`: only the import differs from scripts written for it.

Run: python examples/llm_examples.py --task run_llm_generate --hf_model_dir examples/demo_model/demo-4m
"""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from lamella.hlapi import LLM, CapacitySchedulerPolicy, KvCacheConfig, ModelConfig

PROMPT = "Once upon a time"


def show(llm: LLM, prompts: list[str]) -> None:
    for output in llm.generate(prompts):
        print(output.text)


def run_llm_from_huggingface_model(prompts: list[str], model_dir: Path, dump_engine_dir: Path | None = None) -> None:
    llm = LLM(ModelConfig(model_dir))
    if dump_engine_dir is not None:
        llm.save(dump_engine_dir)
    show(llm, prompts)


def run_llm_from_tllm_engine(prompts: list[str], engine_dir: Path) -> None:
    show(LLM(ModelConfig(engine_dir)), prompts)


def run_llm_generate(prompts: list[str], model_dir: Path) -> None:
    config = ModelConfig(model_dir=model_dir, max_beam_width=4)
    llm = LLM(config, kv_cache_config=KvCacheConfig(max_new_tokens=24, free_gpu_memory_fraction=0.5))
    sampling_config = llm.get_default_sampling_config()
    sampling_config.beam_width = 4
    for output in llm.generate(prompts, sampling_config=sampling_config):
        print(output.text)
    print("tokens in, tokens out:", llm.generate([32, 12]).token_ids)


def run_llm_generate_async_example(prompts: list[str], model_dir: Path, streaming: bool = False) -> None:
    policy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    llm = LLM(ModelConfig(model_dir), capacity_scheduling_policy=policy, async_mode=True)

    async def task(prompt: str) -> None:
        outputs = []
        async for output in llm.generate_async(prompt, streaming=streaming):
            outputs.append(output.text)
        print(f"{len(outputs)} updates: {outputs[-1]}")

    async def run_all() -> None:
        await asyncio.gather(*(task(prompt) for prompt in prompts))

    asyncio.run(run_all())


def run_llm_with_async_future(prompts: list[str], model_dir: Path) -> None:
    llm = LLM(ModelConfig(model_dir), async_mode=True)
    for generation in [llm.generate_async(prompt) for prompt in prompts]:
        print(generation.result(timeout=60).text)


def run_llm_on_tensor_parallel(prompts: list[str], model_dir: Path, tp_size: int = 2) -> None:
    config = ModelConfig(model_dir)
    config.parallel_config.tp_size = tp_size
    show(LLM(config), prompts)


def run_llm_with_auto_parallel(prompts: list[str], model_dir: Path, world_size: int = 2) -> None:
    config = ModelConfig(model_dir)
    config.parallel_config.auto_parallel = True
    config.parallel_config.world_size = world_size
    show(LLM(config), prompts)


def main(
    task: Annotated[str, typer.Option(help="Name of a run_* function above.")],
    hf_model_dir: Annotated[Path | None, typer.Option("--hf_model_dir")] = None,
    engine_dir: Annotated[Path | None, typer.Option("--engine_dir")] = None,
    dump_engine_dir: Annotated[Path | None, typer.Option("--dump_engine_dir")] = None,
    prompt: Annotated[list[str] | None, typer.Option()] = None,
    streaming: Annotated[bool, typer.Option("--streaming")] = False,
    num_ranks: Annotated[int, typer.Option("--tp_size", "--world_size")] = 2,
) -> None:
    directory = engine_dir or hf_model_dir
    if task not in TASKS or directory is None:
        raise typer.BadParameter(f"tasks: {', '.join(TASKS)}; with --hf_model_dir (or --engine_dir)")
    extra = {"run_llm_from_huggingface_model": {"dump_engine_dir": dump_engine_dir},
             "run_llm_generate_async_example": {"streaming": streaming},
             "run_llm_on_tensor_parallel": {"tp_size": num_ranks},
             "run_llm_with_auto_parallel": {"world_size": num_ranks}}.get(task, {})  # fmt: skip
    TASKS[task](prompt or [PROMPT], directory, **extra)


TASKS = {name: function for name, function in list(globals().items()) if name.startswith("run_")}

if __name__ == "__main__":
    typer.run(main)
