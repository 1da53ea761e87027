"""Can the components be used by themselves, as TransformerLens 3.9.0's can?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformer_lens import TransformerLensKeyValueCacheEntry as ReferenceEntry
from transformer_lens import components as theirs
from transformer_lens.components.mlps.gpt_oss_moe import GptOssMoE as ReferenceGptOssMoE
from transformer_lens.config import HookedTransformerConfig as ReferenceConfig

from compat_tests.comparison import caches_close, close, outcome, same_outcome
from compat_tests.native_models import BASE, caching, roughen
from lensbridge import HookedTransformerConfig, TransformerLensKeyValueCacheEntry
from lensbridge import components as ours
from lensbridge.components.mlps.gpt_oss_moe import GptOssMoE

ROTARY = {"positional_embedding_type": "rotary"}
EXPERTS = {"num_experts": 3, "experts_per_token": 2}


def stream(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def ids(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


BERT = {"attention_dir": "bidirectional"}
T5 = {
    "attention_dir": "bidirectional",
    "positional_embedding_type": "relative_positional_bias",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 5,
    "use_attn_scale": False,
}
X, Y = stream(2, 6, 12), stream(2, 6, 12, seed=1)
HEADS = stream(2, 6, 3, 12)
#: name -> (class, options, constructor arguments after cfg, forward arguments)
CASES: dict[str, tuple[str, dict[str, Any], tuple, tuple]] = {
    "Embed": ("Embed", {}, (), (ids(17, 2, 6),)),
    "Embed, normed": ("Embed", {"post_embedding_ln": True}, (), (ids(17, 2, 6),)),
    "PosEmbed": ("PosEmbed", {}, (), (ids(17, 2, 6),)),
    "PosEmbed, offset": ("PosEmbed", {}, (), (ids(17, 2, 6), 3)),
    "PosEmbed, mask": ("PosEmbed", {}, (), (ids(17, 2, 6), 2, torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1], [1] * 8]))),
    "Unembed": ("Unembed", {"d_vocab_out": 5}, (), (X,)),
    "TokenTypeEmbed": ("TokenTypeEmbed", {}, (), (ids(2, 2, 6),)),
    "LayerNorm": ("LayerNorm", {}, (), (X,)),
    "LayerNorm, heads": ("LayerNorm", {"eps": 0.3}, (), (HEADS,)),
    "LayerNorm, length": ("LayerNorm", {}, (5,), (stream(2, 3, 5),)),
    "LayerNormPre": ("LayerNormPre", {}, (), (X,)),
    "LayerNormPre, heads": ("LayerNormPre", {"eps": 0.3}, (), (HEADS,)),
    "RMSNorm": ("RMSNorm", {}, (), (X,)),
    "RMSNorm, length": ("RMSNorm", {"eps": 0.3}, (5,), (stream(4, 5),)),
    "RMSNormPre": ("RMSNormPre", {}, (), (X,)),
    "RMSNormPre, heads": ("RMSNormPre", {"eps": 0.3}, (), (HEADS,)),
    "Attention": ("Attention", {}, (), (X, Y, stream(2, 6, 12, seed=2))),
    "Attention, local": ("Attention", {"window_size": 2}, ("local", 1), (X, X, X)),
    "Attention, layer": ("Attention", {"scale_attn_by_inverse_layer_idx": True}, ("global", 3), (X, X, X)),
    "Attention, heads": ("Attention", {"use_split_qkv_input": True}, (), (HEADS, HEADS, 2 * HEADS)),
    "Attention, masks": ("Attention", {}, (), (X, X, X, None, stream(2, 1, 1, 6), ids(2, 2, 6))),
    "Attention, cross": ("Attention", {"attention_dir": "bidirectional"}, (), (X, stream(2, 4, 12), stream(2, 4, 12))),
    "Attention, rotary": ("Attention", ROTARY, (), (X, X, X)),
    "GroupedQueryAttention": ("GroupedQueryAttention", {"n_key_value_heads": 1} | ROTARY, (), (X, X, Y)),
    "MLP": ("MLP", {}, (), (X,)),
    "GatedMLP": ("GatedMLP", {"act_fn": "silu"}, (), (X,)),
    "MoE": ("MoE", EXPERTS, (), (X,)),
    "BertEmbed": ("BertEmbed", {}, (), (ids(17, 2, 6), ids(2, 2, 6))),
    "BertEmbed, one sentence": ("BertEmbed", {}, (), (ids(17, 2, 6),)),
    "BertBlock": ("BertBlock", BERT, (), (X, stream(2, 1, 1, 6))),
    "BertBlock, all inputs": ("BertBlock", BERT | {"use_split_qkv_input": True, "use_hook_mlp_in": True}, (), (X,)),
    "BertMLMHead": ("BertMLMHead", {}, (), (X,)),
    "BertPooler": ("BertPooler", {}, (), (X,)),
    "BertNSPHead": ("BertNSPHead", {}, (), (stream(2, 12),)),
    "T5Attention": ("T5Attention", T5, (), (X, Y, Y)),
    "T5Attention, bias": ("T5Attention", T5, (True,), (X, Y, Y, None, None, None, stream(1, 3, 6, 6))),
    "T5Attention, decoder": ("T5Attention", T5, (False, "global", None, True), (X, X, X)),
    "T5Block, encoder": ("T5Block", T5, (0, False), (X, stream(2, 1, 1, 6), None, stream(1, 3, 6, 6))),
    "T5Block, later": ("T5Block", T5 | {"use_hook_mlp_in": True, "use_attn_in": True}, (1, False), (X,)),
    "T5Block, decoder": (
        "T5Block",
        T5,
        (0, True),
        (X, None, stream(2, 1, 1, 4), stream(1, 3, 6, 6), stream(2, 4, 12)),
    ),
    "T5Block, later decoder": ("T5Block", T5 | {"use_hook_mlp_in": True}, (1, True), (X, None, None, None, Y)),
    "T5Block, split": ("T5Block", T5 | {"use_split_qkv_input": True}, (0, False), (X, None, None, stream(1, 3, 6, 6))),
    "TransformerBlock": ("TransformerBlock", {}, (1,), (X,)),
    "TransformerBlock, shortformer": ("TransformerBlock", {"positional_embedding_type": "shortformer"}, (0,), (X, Y)),
    "TransformerBlock, mask": (
        "TransformerBlock",
        ROTARY,
        (0,),
        (X, None, None, torch.tensor([[0] + [1] * 5, [1] * 6])),
    ),
}


def both(name: str, options: dict[str, Any], arguments: tuple) -> tuple[nn.Module, nn.Module]:
    """A component of either library with the same weights."""
    fields = BASE | options
    reference = getattr(theirs, name)(ReferenceConfig(**fields), *arguments)
    roughen(reference)
    mine = getattr(ours, name)(HookedTransformerConfig(**fields), *arguments)
    # Without the tables of sines and cosines, so that ours are put to the test too.
    mine.load_state_dict({name: value for name, value in reference.state_dict().items() if "rotary_" not in name})
    return mine, reference


@pytest.mark.parametrize("case", CASES)
def test_a_component_by_itself(case: str) -> None:
    name, options, arguments, inputs = CASES[case]
    mine, reference = both(name, options, arguments)
    assert list(mine.state_dict()) == list(reference.state_dict())
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in reference.named_parameters()]
    with caching(mine) as seen:
        output = mine(*inputs)
    close(case, output, reference(*inputs))
    with caching(reference) as expected:
        reference(*inputs)
    caches_close(seen, expected)


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (6, 9), (9, 6), (40, 40)])
def test_the_position_bias_of_t5(lengths: tuple[int, int], is_decoder: bool) -> None:
    for buckets, farthest in ((8, 5), (32, 128)):
        fields = T5 | {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": farthest}
        mine, reference = both("T5Attention", fields, (True, "global", None, is_decoder))
        biases = [module.compute_relative_attention_bias(*lengths) for module in (mine, reference)]
        close("position_bias", *biases)


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith(("BertBlock", "T5Block"))])
def test_a_component_takes_a_dict_for_a_config(case: str) -> None:
    name, options, arguments, _ = CASES[case]
    mine = getattr(ours, name)(BASE | options, *arguments)
    expected = getattr(ours, name)(HookedTransformerConfig(**BASE | options), *arguments)
    assert [p.shape for p in mine.parameters()] == [p.shape for p in expected.parameters()]


def test_gpt_oss_experts() -> None:
    fields = BASE | EXPERTS
    reference = ReferenceGptOssMoE(ReferenceConfig(**fields))
    roughen(reference)
    mine = GptOssMoE(HookedTransformerConfig(**fields))
    mine.load_state_dict(reference.state_dict())
    large = 6 * X
    close("GptOssMoE", mine(large), reference(large))


@pytest.mark.parametrize("name", ["OV", "QK"])
@pytest.mark.parametrize("kind", ["Attention", "GroupedQueryAttention"])
def test_circuits(kind: str, name: str) -> None:
    mine, reference = both(kind, {"n_heads": 4, "n_key_value_heads": 2} if "Grouped" in kind else {}, ())
    close(name, getattr(mine, name).AB, getattr(reference, name).AB)


@pytest.mark.parametrize("name", ["W_K", "W_V", "b_K", "b_V", "_W_K", "W_Q", "W_O"])
def test_weights_of_groups(name: str) -> None:
    mine, reference = both("GroupedQueryAttention", {"n_heads": 4, "n_key_value_heads": 2}, ())
    close(name, getattr(mine, name), getattr(reference, name))


def test_an_entry_of_the_cache() -> None:
    mine, reference = both("Attention", ROTARY, ())
    entries = [TransformerLensKeyValueCacheEntry.init_cache_entry(mine.cfg, "cpu", 2)]
    entries.append(ReferenceEntry.init_cache_entry(reference.cfg, "cpu", 2))
    for start, end in ((0, 3), (3, 4), (4, 6)):
        piece = X[:, start:end]
        close(
            "Attention",
            mine(piece, piece, piece, past_kv_cache_entry=entries[0]),
            reference(piece, piece, piece, past_kv_cache_entry=entries[1]),
        )
    close("past_keys", entries[0].past_keys, entries[1].past_keys)


# --- the steps of attention by themselves -----------------------------------------------------------------------------

STEPS: dict[str, tuple[dict[str, Any], str, tuple]] = {
    "alibi slope": ({}, "create_alibi_slope", (5,)),
    "alibi multipliers": ({}, "create_alibi_multipliers", (3,)),
    "alibi multipliers, one": ({}, "create_alibi_multipliers", (1,)),
    "alibi bias": ({}, "create_alibi_bias", (4, 6)),
    "turn halves": ({}, "rotate_every_two", (stream(2, 3, 4),)),
    "turn neighbours": ({"rotary_adjacent_pairs": True}, "rotate_every_two", (stream(2, 3, 4),)),
    "tables": ({}, "calculate_sin_cos_rotary", (4, 9)),
    "tables of another base": ({"rotary_adjacent_pairs": True}, "calculate_sin_cos_rotary", (4, 9, 77.0)),
    "tables in float64": ({}, "calculate_sin_cos_rotary", (6, 3, 100, torch.float64)),
    "tables in half": ({}, "calculate_sin_cos_rotary", (6, 3, 100, torch.bfloat16)),
    "mask": ({}, "apply_causal_mask", (stream(2, 3, 4, 4),)),
    "mask with offset": ({}, "apply_causal_mask", (stream(2, 3, 2, 6), 4, ids(2, 2, 6))),
    "mask that does not fit": ({}, "apply_causal_mask", (stream(2, 3, 2, 6), 3)),
    "rotation": (ROTARY, "apply_rotary", (stream(2, 5, 3, 4), 2)),
    "rotation with mask": (ROTARY, "apply_rotary", (stream(2, 3, 3, 4), 1, torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]]))),
    "rotation too far": (ROTARY, "apply_rotary", (stream(2, 3, 3, 4), 1, torch.ones(2, 30, dtype=torch.long))),
    "scores": ({"attn_scores_soft_cap": 2.0}, "calculate_attention_scores", (stream(2, 3, 3, 4), stream(2, 5, 3, 4))),
    "z": ({}, "calculate_z_scores", (stream(2, 5, 3, 4), stream(2, 3, 2, 5))),
    "q, k, v": ({}, "calculate_qkv_matrices", (X, Y, X)),
}


@pytest.mark.parametrize("step", STEPS)
def test_steps_of_attention(step: str) -> None:
    options, method, arguments = STEPS[step]
    mine, reference = both("Attention", options, ())
    results = [outcome(lambda m=m: getattr(m, method)(*arguments)) for m in (mine, reference)]
    if results[0].error is None and isinstance(results[0].value, tuple):
        results[0].value = tuple(results[0].value)
    same_outcome(step, *results)


def test_missing_inputs_of_t5() -> None:
    mine, reference = both("T5Block", T5, (0, True))
    same_outcome("T5Block", outcome(lambda: mine(X)), outcome(lambda: reference(X)))
    mine, reference = both("T5Attention", T5, (True,))
    same_outcome("T5Attention", outcome(lambda: mine(X, X, X)), outcome(lambda: reference(X, X, X)))


# --- what cannot be built ---------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], tuple]] = {
    "attention type": ("Attention", {}, ("sideways",)),
    "no window": ("Attention", {}, ("local",)),
    "no layer": ("Attention", {"scale_attn_by_inverse_layer_idx": True}, ()),
    "no groups": ("GroupedQueryAttention", {}, ()),
    "no buckets": ("T5Attention", {"positional_embedding_type": "relative_positional_bias"}, (True,)),
    "norm": ("TransformerBlock", {"normalization_type": "BatchNorm"}, (0,)),
    "no experts": ("MoE", {}, ()),
    "too few experts": ("MoE", {"num_experts": 1, "experts_per_token": 2}, ()),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built(case: str) -> None:
    name, options, arguments = REFUSED[case]
    mine = outcome(lambda: getattr(ours, name)(HookedTransformerConfig(**BASE | options), *arguments))
    reference = outcome(lambda: getattr(theirs, name)(ReferenceConfig(**BASE | options), *arguments))
    assert mine.error is not None and reference.error is not None
    same_outcome(case, mine, reference)
    assert str(mine.error)
