"""Weight rules of tensor names that most decoders on the hub share; model files put their tables together from them."""

from __future__ import annotations

from lamella_core.checkpoint.rules import WeightRule

_LAYER = "model.layers.{i}"


def vocabulary_rules() -> list[WeightRule]:
    """Embedding, final norm and output layer."""
    return [
        WeightRule("model.embed_tokens.weight", "embed_tokens.weight"),
        WeightRule("model.norm.weight", "norm.weight"),
        WeightRule("lm_head.weight", "lm_head.weight"),
    ]


def norm_rules() -> list[WeightRule]:
    """The two norms of a pre-norm layer."""
    return [
        WeightRule(f"{_LAYER}.input_layernorm.weight", "layers.{i}.input_norm.weight"),
        WeightRule(f"{_LAYER}.post_attention_layernorm.weight", "layers.{i}.mlp_norm.weight"),
    ]


def sandwich_norm_rules() -> list[WeightRule]:
    """The four norms of a layer that norms before and after attention and MLP, as Gemma calls them."""
    names = {
        "input_layernorm": "input_norm",
        "post_attention_layernorm": "attention_out_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    }
    return [WeightRule(f"{_LAYER}.{a}.weight", f"layers.{{i}}.{b}.weight") for a, b in names.items()]


def post_norm_rules() -> list[WeightRule]:
    """The two norms of a layer that norms only after attention and MLP."""
    return [
        WeightRule(f"{_LAYER}.post_attention_layernorm.weight", "layers.{i}.attention_norm.weight"),
        WeightRule(f"{_LAYER}.post_feedforward_layernorm.weight", "layers.{i}.mlp_norm.weight"),
    ]


def head_norm_rules() -> list[WeightRule]:
    """The norms of queries and keys."""
    return [
        WeightRule(f"{_LAYER}.self_attn.{s}_norm.weight", f"layers.{{i}}.attention.{s}_norm.weight") for s in ("q", "k")
    ]


def norm_bias_rules() -> list[WeightRule]:
    """Biases of the two norms of a pre-norm layer and of the final norm."""
    return [
        WeightRule(f"{_LAYER}.input_layernorm.bias", "layers.{i}.input_norm.bias"),
        WeightRule(f"{_LAYER}.post_attention_layernorm.bias", "layers.{i}.mlp_norm.bias"),
        WeightRule("model.norm.bias", "norm.bias"),
    ]


def attention_rules(out: str = "o_proj") -> list[WeightRule]:
    """Separate query, key and value projections fused into one; biases where the model has them.

    ``out`` is what the output projection is called.
    """
    fused = [
        WeightRule(f"{_LAYER}.self_attn.{s}_proj.{leaf}", f"layers.{{i}}.attention.qkv_proj.{leaf}", section=s)
        for s in ("q", "k", "v")
        for leaf in ("weight", "bias")
    ]
    return [*fused, *_both(f"{_LAYER}.self_attn.{out}", "layers.{i}.attention.o_proj")]


def gated_mlp_rules(module: str = "mlp", target: str = "layers.{i}.mlp") -> list[WeightRule]:
    """Gate and up projections fused into one; biases where the model has them.

    ``module`` is where a layer of the checkpoint has them.
    """
    source = f"{_LAYER}.{module}"
    fused = [
        WeightRule(f"{source}.{s}_proj.{leaf}", f"{target}.gate_up_proj.{leaf}", section=s)
        for s in ("gate", "up")
        for leaf in ("weight", "bias")
    ]
    return [*fused, *_both(f"{source}.down_proj", f"{target}.down_proj")]


def shared_expert_rules(module: str = "mlp.shared_expert") -> list[WeightRule]:
    """A gated expert that every token goes to, and its own gate where the model has one."""
    target = "layers.{i}.mlp.shared"
    return [*gated_mlp_rules(module, target), WeightRule(f"{_LAYER}.{module}_gate.weight", f"{target}.gate.weight")]


def fused_mlp_rules() -> list[WeightRule]:
    """Gate and up projections in one tensor; biases where the model has them."""
    both = [
        WeightRule(f"{_LAYER}.mlp.gate_up_proj.{leaf}", f"layers.{{i}}.mlp.gate_up_proj.{leaf}", section=("gate", "up"))
        for leaf in ("weight", "bias")
    ]
    return [*both, *_both(f"{_LAYER}.mlp.down_proj", "layers.{i}.mlp.down_proj")]


def plain_mlp_rules(up: str = "up_proj", down: str = "down_proj") -> list[WeightRule]:
    """An MLP without a gate, its projections called ``up`` and ``down``; biases where the model has them."""
    return [
        rule
        for source, target in ((up, "up_proj"), (down, "down_proj"))
        for rule in _both(f"{_LAYER}.mlp.{source}", f"layers.{{i}}.mlp.{target}")
    ]


def expert_rules(
    module: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    router: str = "gate",
    held: str = "mlp",
) -> list[WeightRule]:
    """Router and experts: one tensor per expert and projection, as on the hub, or all in one, as transformers has them.

    ``module`` is where the hub has them, ``names`` are its gate, up and down projections. ``held`` is where
    transformers has them, ``router`` what it calls the router.
    """
    hub, held, target = f"{_LAYER}.{module}", f"{_LAYER}.{held}", "layers.{i}.mlp"
    gate_up, down = f"{target}.experts.gate_up_proj.weight", f"{target}.experts.down_proj.weight"
    sources = dict.fromkeys((f"{hub}.gate.weight", f"{held}.{router}.weight"))
    return [
        *(WeightRule(source, f"{target}.router.gate.weight") for source in sources),
        WeightRule(f"{hub}.experts.{{e}}.{names[0]}.weight", gate_up, section="gate"),
        WeightRule(f"{hub}.experts.{{e}}.{names[1]}.weight", gate_up, section="up"),
        WeightRule(f"{held}.experts.gate_up_proj", gate_up),
        WeightRule(f"{hub}.experts.{{e}}.{names[2]}.weight", down),
        WeightRule(f"{held}.experts.down_proj", down),
    ]


def interleaved_qkv_rules(source: str) -> list[WeightRule]:
    """Query, key and value in one tensor, head group by head group; biases where the model has them."""
    target = "layers.{i}.attention.qkv_proj"
    return [WeightRule(f"{source}.{leaf}", f"{target}.{leaf}", interleaved=True) for leaf in ("weight", "bias")]


def module_rules(names: dict[str, str], source: str = "", target: str = "") -> list[WeightRule]:
    """Weights and biases, where the model has them, of modules whose checkpoints call them otherwise.

    ``source`` and ``target`` are put before the names of checkpoint and model.
    """
    return [rule for old, new in names.items() for rule in _both(f"{source}{old}", f"{target}{new}")]


def _both(source: str, target: str) -> list[WeightRule]:
    return [WeightRule(f"{source}.{leaf}", f"{target}.{leaf}") for leaf in ("weight", "bias")]
