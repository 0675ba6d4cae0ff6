"""Trains the demo models: one tokenizer, ``demo-4m`` and the draft-sized ``demo-draft``, each a Hugging Face directory.

    python train.py                          # everything, as committed (a GPU, about ten minutes)
    python train.py --documents 400 --steps 20 --output /tmp/demo    # a smoke run on a CPU

Writes per model ``config.json``, ``generation_config.json``, ``model.safetensors`` (bfloat16), tokenizer files and
``training.json`` (seed, steps, tokens, hardware, versions, held-out perplexity), and ``heldout.txt`` next to them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from corpus import documents
from heldout import heldout_perplexity
from tokenizer import VOCAB_SIZE, train_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 1024  # tokens per training row and the longest position of the models
CHUNK = 2000  # documents that one worker process writes and encodes at a time
HELDOUT_BYTES = 300_000
HELDOUT_SEED = 101


@dataclass(frozen=True)
class Recipe:
    """Shape and schedule of one model; ``batch`` is in rows of ``CONTEXT`` tokens."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    steps: int
    batch: int = 64
    peak_lr: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.05


RECIPES = (
    Recipe("demo-4m", hidden=256, intermediate=512, layers=6, heads=8, kv_heads=4, steps=10_000),
    Recipe("demo-draft", hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, steps=10_000, peak_lr=6e-3),
)


def make_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The Llama configuration of a recipe: rotary positions, grouped key/value heads of size 32, tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
    )


def encode_chunk(start: int, *, count: int, seed: int, tokenizer_file: str) -> np.ndarray:
    """Write ``count`` documents from number ``start`` and pack them into rows ``[rows, CONTEXT]`` of token ids.

    Every row starts at the start of a document; the last document of a row is cut where the row ends.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fast = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, bos_token="<s>", eos_token="</s>")
    texts = [d.text for d in documents(seed, "train", count, start)]
    rows: list[list[int]] = []
    row: list[int] = []
    for ids in fast(texts)["input_ids"]:
        row += [*ids, fast.eos_token_id]
        if len(row) >= CONTEXT:
            rows.append(row[:CONTEXT])
            row = []
    return np.asarray(rows, dtype=np.int16).reshape(-1, CONTEXT)


def make_rows(count: int, seed: int, tokenizer_file: Path, workers: int) -> torch.Tensor:
    """All training rows ``[rows, CONTEXT]`` (int16), the same for any number of workers."""
    job = partial(encode_chunk, count=min(CHUNK, count), seed=seed, tokenizer_file=str(tokenizer_file))
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(job, range(0, count, CHUNK)))
    return torch.from_numpy(np.concatenate(parts))


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.peak_lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.98), fused=fused)


def fit(model: LlamaForCausalLM, rows: torch.Tensor, recipe: Recipe, seed: int, device: torch.device) -> float:
    """Train on ``rows`` ``[num_rows, CONTEXT]`` for ``recipe.steps`` steps; returns the mean loss of the last steps.

    Rows are visited in a fresh random order each epoch. Matrix products run in bfloat16 on a GPU.
    """
    on_gpu = device.type == "cuda"
    model.to(device).train()
    optimizer = make_optimizer(model, recipe, fused=on_gpu)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    runner = torch.compile(loss_of) if on_gpu else loss_of
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    losses: list[torch.Tensor] = []
    began = time.perf_counter()
    for step in range(recipe.steps):
        if len(order) < recipe.batch:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        batch, order = order[: recipe.batch], order[recipe.batch :]
        ids = rows[batch.to(rows.device)].to(device=device, dtype=torch.long)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        loss = runner(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % 200 == 0 or step == recipe.steps - 1:
            seconds = time.perf_counter() - began
            rate = (step + 1) * recipe.batch * CONTEXT / seconds
            print(
                f"{recipe.name} step {step} loss {loss.item():.4f} {seconds:.0f} s {rate / 1e6:.2f} M tok/s", flush=True
            )
    return torch.stack(losses[-50:]).mean().item()


def write_heldout(path: Path) -> None:
    """Write whole held-out documents, separated by blank lines, up to ``HELDOUT_BYTES``."""
    texts: list[str] = []
    size = 0
    for document in documents(HELDOUT_SEED, "heldout", 100_000):
        size += len(document.text.encode()) + 2
        if size > HELDOUT_BYTES:
            break
        texts.append(document.text)
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the Hugging Face directory with bfloat16 weights."""
    model.to("cpu", torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)


def train_one(recipe: Recipe, rows: torch.Tensor, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train, save and measure one model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(make_config(recipe, tokenizer))
    began = time.perf_counter()
    loss = fit(model, rows.to(device), recipe, args.seed, device)
    seconds = time.perf_counter() - began
    directory = args.output / recipe.name
    save(model, tokenizer, directory)
    report = {
        "model": recipe.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "seed": args.seed,
        "documents": args.documents,
        "corpus_tokens": rows.numel(),
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.batch * CONTEXT,
        "seconds": round(seconds, 1),
        "train_loss": round(loss, 4),
        "hardware": torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "heldout": heldout_perplexity(directory, args.output / "heldout.txt"),
    }
    (directory / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2), flush=True)


def main() -> None:
    """Make the tokenizer, the rows and both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--documents", type=int, default=1_000_000, help="training documents to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="replaces the steps of both recipes")
    parser.add_argument("--batch", type=int, help="replaces the rows per step of both recipes")
    parser.add_argument("--model", choices=[r.name for r in RECIPES], help="train only this one")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    write_heldout(args.output / "heldout.txt")
    tokenizer = train_tokenizer(d.text for d in documents(args.seed, "train", min(args.documents, 20_000)))
    tokenizer_dir = args.output / RECIPES[0].name
    tokenizer.save_pretrained(tokenizer_dir)
    print(f"tokenizer: {len(tokenizer)} of {VOCAB_SIZE} tokens, {time.perf_counter() - began:.0f} s", flush=True)
    rows = make_rows(args.documents, args.seed, tokenizer_dir / "tokenizer.json", args.workers)
    print(f"corpus: {rows.numel() / 1e6:.0f} M tokens, {time.perf_counter() - began:.0f} s", flush=True)
    for recipe in RECIPES:
        if args.model in (None, recipe.name):
            train_one(
                replace(recipe, steps=args.steps or recipe.steps, batch=args.batch or recipe.batch),
                rows,
                args,
                tokenizer,
            )


if __name__ == "__main__":
    main()
