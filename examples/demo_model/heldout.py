"""Held-out perplexity through transformers, in float32 on the saved bfloat16 weights.

python heldout.py demo-4m
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from corpus import read_documents
from transformers import AutoModelForCausalLM, AutoTokenizer

SLICE_DOCUMENTS = 16  # the first documents of heldout.txt, a quick check


@torch.inference_mode()
def document_nll(model: torch.nn.Module, ids: list[int]) -> tuple[float, int]:
    """Summed negative log likelihood in nats of ``ids[1:]``, and how many tokens that is."""
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item(), len(ids) - 1


def heldout_perplexity(directory: Path, heldout: Path, slice_only: bool = False) -> dict[str, float | int]:
    """Perplexity of the model in ``directory`` on the documents of ``heldout``.

    A document is encoded with bos in front and eos behind, each document by itself; every token but bos is predicted.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if torch.cuda.is_available():
        model.to("cuda")
    total, count = 0.0, 0
    report: dict[str, float | int] = {}
    texts = read_documents(heldout)
    for number, text in enumerate(texts[:SLICE_DOCUMENTS] if slice_only else texts, start=1):
        nll, tokens = document_nll(model, [*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        total, count = total + nll, count + tokens
        if number == SLICE_DOCUMENTS:
            report |= {
                "slice_documents": number,
                "slice_tokens": count,
                "slice_perplexity": round(math.exp(total / count), 5),
            }
    if not slice_only:
        report |= {"documents": len(texts), "tokens": count, "perplexity": round(math.exp(total / count), 5)}
    return report


def main() -> None:
    """Print the perplexities of one model."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo-4m, demo-draft or any directory with the same tokenizer")
    parser.add_argument("--heldout", type=Path, default=here / "heldout.txt")
    parser.add_argument("--record", action="store_true", help="write the numbers into training.json")
    args = parser.parse_args()
    directory = here / args.model if (here / args.model).is_dir() else Path(args.model)
    report = heldout_perplexity(directory, args.heldout)
    print(json.dumps(report, indent=2))
    if args.record:
        card = directory / "training.json"
        training = json.loads(card.read_text(encoding="utf-8")) | {"heldout": report}
        card.write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
