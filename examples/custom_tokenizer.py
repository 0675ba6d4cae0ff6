"""Any object with encode and decode serves as tokenizer. Run: python examples/custom_tokenizer.py"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lamella import LLM, SamplingParams

MODEL = Path(__file__).parent / "demo_model" / "demo-4m"


class Lowercase:
    """Lowers what goes in and counts the tokens that come out; ids are the demo model's."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self.num_encoded = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = self._tokenizer.encode(text.lower(), add_special_tokens=add_special_tokens).ids
        self.num_encoded += len(ids)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))


def main() -> None:
    tokenizer = Lowercase(MODEL / "tokenizer.json")
    with LLM(MODEL, tokenizer=tokenizer) as llm:
        output = llm.generate("ONCE UPON A TIME, a little CAT", SamplingParams(max_tokens=30))
        ids = llm.generate(output.prompt_token_ids, SamplingParams(max_tokens=30))
    print(output.text)
    print(f"{tokenizer.num_encoded} tokens encoded")
    print(f"the same prompt as token ids: text {ids.text!r}, equal ids: {ids.token_ids == output.token_ids}")


if __name__ == "__main__":
    main()
