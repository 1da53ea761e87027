"""Does each component, called by itself, compute its part of a run, in the active basis and with its hooks firing?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import FactoredMatrix, HookPoint
from lensbridge.cache import TransformerLensKeyValueCacheEntry
from lensbridge.processing import Processing

PROCESSINGS = {
    "raw": Processing(),
    "default": Processing(True, True, True, True, False),
    "refactored": Processing(True, True, True, True, True),
}


@pytest.fixture(params=PROCESSINGS)
def model(request: pytest.FixtureRequest, lens: Any) -> Any:
    lens.set_processing(PROCESSINGS[request.param])
    return lens


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, atol=2e-5, rtol=1e-4)


def zeroed(value: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(value)


# --- as parts of a run -----------------------------------------------------------------------------------------------


def test_every_component_computes_its_part_of_a_run(model: Any, tokens: Tensor) -> None:
    logits, cache = model.run_with_cache(tokens)
    assert close(model.embed(tokens), cache["hook_embed"])
    assert close(model.pos_embed(tokens), cache["hook_pos_embed"])
    for layer, block in enumerate(model.blocks):
        prefix = f"blocks.{layer}."
        normed = block.ln1(cache[prefix + "hook_resid_pre"])
        gain_and_bias = (1, 0) if model.processing.fold_ln else (block.ln1.w, block.ln1.b)
        assert close(normed, cache[prefix + "ln1.hook_normalized"] * gain_and_bias[0] + gain_and_bias[1])
        assert close(block.attn(normed), cache[prefix + "hook_attn_out"])
        assert close(block.attn(normed, normed, normed), cache[prefix + "hook_attn_out"])
        assert close(block.mlp(block.ln2(cache[prefix + "hook_resid_mid"])), cache[prefix + "hook_mlp_out"])
        assert close(block(cache[prefix + "hook_resid_pre"]), cache[prefix + "hook_resid_post"])
    final = model.ln_final(cache["blocks.1.hook_resid_post"])
    assert close(final, cache["unembed.hook_in"])
    assert close(model.unembed(final), logits)


def test_components_compose_to_the_model(model: Any, tokens: Tensor) -> None:
    x = model.embed(tokens) + model.pos_embed(tokens)
    for block in model.blocks:
        x = x + block.attn(block.ln1(x))
        x = x + block.mlp(block.ln2(x))
    assert close(model.unembed(model.ln_final(x)), model(tokens))


def test_what_is_computed_is_what_the_weights_say(model: Any) -> None:
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(-1, keepdim=True)
    mlp, attention = model.blocks[1].mlp, model.blocks[1].attn
    hidden = torch.nn.functional.gelu(x @ mlp.W_in + mlp.b_in, approximate="tanh")
    assert close(mlp(x), hidden @ mlp.W_out + mlp.b_out)
    q, k, v = (torch.einsum("bpm,hmd->bhpd", x, w) + b[:, None] for w, b in (
        (attention.W_Q, attention.b_Q), (attention.W_K, attention.b_K), (attention.W_V, attention.b_V)
    ))  # fmt: skip
    scores = (q @ k.mT / 5**0.5).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    out = torch.einsum("bhqk,bhkd,hdm->bqm", scores.softmax(-1), v, attention.W_O) + attention.b_O
    assert close(attention(x), out)
    assert close(model.unembed(x), x @ model.W_U + model.b_U)


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_position_embeddings_count_from_the_offset_and_skip_padding(model: Any, tokens: Tensor) -> None:
    table = model.W_pos
    assert close(model.pos_embed(tokens, 3), table[3:10].expand(2, -1, -1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    shown = model.pos_embed(tokens, 0, mask)
    assert close(shown[0, 2:], table[:5]) and not shown[0, :2].any()
    assert close(shown[1], table[:7])
    longer = torch.cat([torch.tensor([[0, 1, 1], [1, 1, 1]]), mask], 1)
    shown = model.pos_embed(tokens, 3, longer)
    assert close(shown[0, 2:], table[2:7]) and close(shown[1], table[3:10])


# --- attention's arguments -------------------------------------------------------------------------------------------


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))


def test_queries_keys_and_values_may_read_different_things(model: Any, x: Tensor) -> None:
    attention, other = model.blocks[0].attn, x.flip(-1)
    out = attention(x, other, other * 2)
    patterns = []
    with _hooks(attention, "hook_pattern", lambda value, hook: patterns.append(value.clone())):
        attention(x, other, x)
    with _hooks(attention, "hook_pattern", lambda value, hook: patterns[0]):
        assert close(attention(other * 2), out)
    assert not close(out, attention(x))


def test_each_head_may_read_something_of_its_own(model: Any, x: Tensor) -> None:
    attention = model.blocks[0].attn
    per_head = x.unsqueeze(2).expand(-1, -1, 4, -1)
    assert close(attention(per_head, per_head, per_head), attention(x))
    zs = []
    heads = torch.stack([x * (head + 1) for head in range(4)], 2)
    with _hooks(attention, "hook_z", lambda value, hook: zs.append(value.clone())):
        attention(heads, heads, heads)
        attention(x * 3)
    assert close(zs[0][:, :, 2], zs[1][:, :, 2]) and not close(zs[0][:, :, 1], zs[1][:, :, 1])


def test_masks_keep_padding_out(model: Any, x: Tensor) -> None:
    attention = model.blocks[0].attn
    keep = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    out = attention(x, attention_mask=keep)
    assert close(out[1], attention(x)[1]) and close(out[:1, 1:], attention(x[:1, 1:]))
    additive = torch.zeros(2, 1, 1, 4).masked_fill(keep[:, None, None] == 0, torch.finfo(torch.float32).min)
    assert close(attention(x, additive_attention_mask=additive)[:, 1:], out[:, 1:])


def test_a_key_value_entry_remembers(model: Any, x: Tensor) -> None:
    attention = model.blocks[0].attn
    entry = TransformerLensKeyValueCacheEntry.init_cache_entry(model.cfg, "cpu", 2)
    keys = []
    with _hooks(attention, "hook_k", lambda value, hook: keys.append(value.clone())):
        parts = [attention(part, past_kv_cache_entry=entry) for part in (x[:, :3], x[:, 3:])]
        assert close(torch.cat(parts, 1), attention(x))
    assert close(entry.past_keys, keys[-1]) and entry.past_values.shape == (2, 4, 4, 5)
    entry.frozen = True
    attention(x[:, 3:], past_kv_cache_entry=entry)
    assert entry.past_keys.shape == (2, 4, 4, 5)


def test_a_block_takes_a_mask(model: Any, x: Tensor) -> None:
    keep = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert close(model.blocks[0](x, attention_mask=keep)[:1, 1:], model.blocks[0](x[:1, 1:]))


def test_attention_called_alone_is_the_same_under_every_implementation(
    new_hf: Callable, new_lens: Callable, x: Tensor
) -> None:
    sdpa = new_hf(attention="sdpa")
    assert close(new_lens(sdpa).blocks[0].attn(x), new_lens(new_hf()).blocks[0].attn(x))
    assert sdpa.config._attn_implementation == "sdpa"


# --- hooks -----------------------------------------------------------------------------------------------------------


class _hooks:
    """A hook on one point of a component, for a while."""

    def __init__(self, component: Any, point: str, hook: Any) -> None:
        self.point: HookPoint = getattr(component, point)
        self.hook = hook

    def __enter__(self) -> None:
        self.point.add_hook(self.hook)

    def __exit__(self, *_: Any) -> None:
        self.point.remove_hooks()


CALLS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "blocks.0.ln1.hook_scale": lambda m, x, tokens: m.blocks[0].ln1(x),
    "blocks.0.ln2.hook_normalized": lambda m, x, tokens: m.blocks[0].ln2(x),
    "ln_final.hook_normalized": lambda m, x, tokens: m.ln_final(x),
    "blocks.1.attn.hook_q": lambda m, x, tokens: m.blocks[1].attn(x),
    "blocks.1.attn.hook_v": lambda m, x, tokens: m.blocks[1].attn(x),
    "blocks.1.attn.hook_attn_scores": lambda m, x, tokens: m.blocks[1].attn(x),
    "blocks.1.attn.hook_pattern": lambda m, x, tokens: m.blocks[1].attn(x),
    "blocks.1.attn.hook_z": lambda m, x, tokens: m.blocks[1].attn(x),
    "blocks.1.attn.hook_result": lambda m, x, tokens: m.blocks[1].attn(x),
    "blocks.1.mlp.hook_pre": lambda m, x, tokens: m.blocks[1].mlp(x),
    "blocks.1.mlp.hook_post": lambda m, x, tokens: m.blocks[1].mlp(x),
    "blocks.1.hook_attn_out": lambda m, x, tokens: m.blocks[1](x),
    "blocks.1.hook_resid_mid": lambda m, x, tokens: m.blocks[1](x),
    "unembed.hook_in": lambda m, x, tokens: m.unembed(x),
    "unembed.hook_out": lambda m, x, tokens: m.unembed(x),
}


@pytest.mark.parametrize("name", CALLS)
def test_hooks_fire_and_edit_when_a_component_is_called(model: Any, x: Tensor, tokens: Tensor, name: str) -> None:
    model.set_use_attn_result(True)
    call, seen = CALLS[name], []
    plain = call(model, x, tokens)
    with model.hooks([(name, lambda value, hook: seen.append(value.shape))]):
        assert close(call(model, x, tokens), plain)
    assert len(seen) == 1
    with model.hooks([(name, lambda value, hook: value * torch.linspace(0.5, 2, value.shape[-1]))]):
        assert not close(call(model, x, tokens), plain)
    assert torch.equal(call(model, x, tokens), plain)


def test_an_edit_in_a_component_is_the_edit_in_a_run(model: Any, tokens: Tensor) -> None:
    cache = model.run_with_cache(tokens)[1]
    half = [("blocks.0.attn.hook_pattern", lambda value, hook: value / 2)]
    with model.hooks(half):
        edited = model.run_with_cache(tokens, names_filter="blocks.0.hook_attn_out")[1]["blocks.0.hook_attn_out"]
        alone = model.blocks[0].attn(model.blocks[0].ln1(cache["blocks.0.hook_resid_pre"]))
        block = model.blocks[0](cache["blocks.0.hook_resid_pre"])
        assert close(alone, edited)
        assert close(block, model(tokens, stop_at_layer=1))


def test_a_hook_that_raises_in_a_component_leaves_nothing_behind(hf: Any, model: Any, x: Tensor) -> None:
    def fail(value: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError

    for name in ("blocks.1.attn.hook_pattern", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_mid"):
        plain = CALLS[name](model, x, x)
        with pytest.raises(ZeroDivisionError), model.hooks([(name, fail)]):
            CALLS[name](model, x, x)
        assert not any("__nnsight__" in module.__dict__ for module in hf.modules())
        assert model.list_hooks() == {} and torch.equal(CALLS[name](model, x, x), plain)


def test_gradients_flow_through_components(model: Any, x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    block = model.blocks[0]
    for call in (block.ln1, block.attn, block.mlp, block, model.ln_final, model.unembed):
        leaf.grad = None
        (call(leaf) ** 2).sum().backward()
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0


# --- as objects ------------------------------------------------------------------------------------------------------


def test_components_show_their_weights(raw: Any) -> None:
    attention = raw.blocks[0].attn
    assert {"W_Q", "b_O", "hook_z"} <= set(dir(attention)) and hasattr(raw.ln_final, "w")
    assert isinstance(attention.QK, FactoredMatrix) and attention.OV.AB.shape == (4, 20, 20)
    assert attention.cfg is raw.cfg and attention.layer_id == 0 and raw.blocks[1].mlp.layer_id == 1
    with pytest.raises(AttributeError, match="W_X"):
        _ = attention.W_X


def test_ordinary_attributes_can_be_set(raw: Any) -> None:
    raw.blocks[0].attn.note = "mine"
    raw.blocks[0].mlp.extra = nn.Linear(2, 2)
    assert raw.blocks[0].attn.note == "mine" and isinstance(raw.blocks[0].mlp.extra, nn.Linear)


def test_blocks_are_a_module_list_without_parameters_of_their_own(raw: Any) -> None:
    assert isinstance(raw.blocks, nn.ModuleList) and len(raw.blocks) == 2
    assert [type(block).__name__ for block in raw.blocks] == ["TransformerBlock"] * 2
    assert not list(raw.blocks.parameters())
