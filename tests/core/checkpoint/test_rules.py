"""WeightRule: names with placeholders, matched both ways."""

from __future__ import annotations

from lamella_core.checkpoint.rules import WeightRule, is_ignored


def test_names_are_filled_and_matched_back() -> None:
    rule = WeightRule("model.layers.{i}.experts.{e}.w1.weight", "layers.{i}.moe.gate_up.weight", section="gate")
    name = rule.source_name(3, 7)
    assert name == "model.layers.3.experts.7.w1.weight"
    assert rule.match_source(name) == (3, 7)
    assert rule.match_target("layers.3.moe.gate_up.weight") == (3, None)
    assert rule.stacks_experts


def test_placeholders_match_numbers_only_and_dots_are_literal() -> None:
    rule = WeightRule("h.{i}.w", "layers.{i}.w")
    for name in ("h.x.w", "h.1.2.w", "h.1.wx", "ah.1.w", "h-1.w", "h..w", "h.-1.w", "h.١.w"):
        assert rule.match_source(name) is None
    assert rule.match_source("h.12.w") == (12, None)
    assert not rule.stacks_experts


def test_ignored_patterns_are_shell_style_and_case_sensitive() -> None:
    patterns = ("*.rotary_emb.inv_freq", "h.*.attn.bias")
    assert is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq", patterns)
    assert is_ignored("h.3.attn.bias", patterns)
    assert not is_ignored("h.3.attn.Bias", patterns)
    assert not is_ignored("h.3.attn.bias2", patterns)
