"""Loading holds the rank's weights and little more: peak resident memory, measured in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.warm_python import WarmPython

from lamella_core.auto import AutoConfig
from lamella_core.checkpoint.safetensors_file import write_safetensors
from lamella_core.models.llama import LlamaConfig, LlamaForCausalLM

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "vocab_size": 8000,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}

# Loads a rank and prints: weight bytes, peak growth of the resident set (anonymous and file pages) in bytes.
CHILD = """
import json, sys
from pathlib import Path
from lamella_core.mapping import Mapping
from lamella_core.models.llama import LlamaForCausalLM

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

directory, warm, tp, dtype = sys.argv[1:]
LlamaForCausalLM.from_hugging_face(warm)  # everything that the first load imports
mapping = Mapping(world_size=int(tp), tp_size=int(tp), rank=int(tp) - 1)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
model = LlamaForCausalLM.from_hugging_face(directory, mapping=mapping, dtype=dtype)
print(json.dumps([model.weight_bytes(), status("VmHWM") - before]))
"""


def source_tensors(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Returns tensors under the names that the model reads."""
    model = LlamaForCausalLM.empty(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        for rule in model.WEIGHTS:
            indices = rule.match_target(name)
            if indices is not None:
                shape = parameter.shard.source_shape(rule.section)
                tensors[rule.source_name(*indices)] = torch.full(shape, 0.01, dtype=parameter.dtype)
    return tensors


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 214 MB model as safetensors and as .bin, and a small one to warm up with."""
    made = {}
    for kind, changes in {"small": {"num_hidden_layers": 1, "hidden_size": 64}, "safetensors": {}, "bin": {}}.items():
        directory = made[kind] = tmp_path_factory.mktemp(kind)
        (directory / "config.json").write_text(json.dumps({**HF_CONFIG, **changes}))
        tensors = source_tensors(AutoConfig.from_hugging_face(directory))  # type: ignore[arg-type]
        if kind == "bin":
            torch.save(tensors, directory / "pytorch_model.bin")
        else:
            write_safetensors(directory / "model.safetensors", tensors)
    return made


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
@pytest.mark.parametrize(
    ("kind", "tp", "dtype"),
    [("safetensors", 1, "auto"), ("bin", 1, "auto"), ("safetensors", 2, "auto"), ("bin", 1, "float32")],
)
def test_peak_is_below_1_15_of_the_weights(
    directories: dict[str, Path], warm_python: WarmPython, kind: str, tp: int, dtype: str
) -> None:
    arguments = [str(directories[kind]), str(directories["small"]), str(tp), dtype]
    child = warm_python.run(CHILD, *arguments, timeout=120)
    assert child.returncode == 0, child.stderr
    weights, growth = json.loads(child.stdout)
    assert weights > 100e6
    assert growth < 1.15 * weights, f"{growth / weights:.3f} of the weights"
    assert growth > 0.9 * weights  # the measurement sees the weights at all
