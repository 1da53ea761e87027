"""Is what irregular families do not offer refused with a reason, and is the reason true?

A refused point follows from the record: without the refusal it would be there. So its place is read here, and what is
read must not be what the point means; as soon as it is, the refusal is wrong, and this fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import HookedTransformer
from lensbridge.architectures import BY_CLASS, RECORDS, architecture_of
from lensbridge.architectures.irregular import REFUSED
from lensbridge.architectures.llama import LLAMA
from lensbridge.architectures.record import Architecture, Block
from lensbridge.errors import UnknownPointError, UnsupportedModelError
from lensbridge.tiny import tiny_family, tiny_tokens

TOKENS = tiny_tokens()


def lens_of(model_type: str) -> Any:
    return HookedTransformer.from_pretrained_no_processing(model_type, hf_model=tiny_family(model_type))


# --- families that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_is_refused_with_its_reason(model_type: str) -> None:
    hf = tiny_family(model_type)
    cls, reason = REFUSED[model_type]
    assert type(hf).__name__ == cls and cls not in BY_CLASS
    with pytest.raises(UnsupportedModelError, match=f"{cls} is not supported: ") as caught:
        HookedTransformer.from_pretrained(model_type, hf_model=hf)
    assert reason in str(caught.value)


def test_a_refused_family_is_refused_before_its_weights_are_read(tmp_path: Any) -> None:
    tiny_family("reformer").config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="its layers have two residual streams"):
        HookedTransformer.from_pretrained(str(tmp_path))


def calls_of(hf: Any, paths: list[str]) -> dict[str, list[Any]]:
    """What each module returned in one forward pass, call by call."""
    found: dict[str, list[Any]] = {path: [] for path in paths}
    handles = [
        hf.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: found[path].append(output))
        for path in paths
    ]
    hf(TOKENS)
    for handle in handles:
        handle.remove()
    return found


def test_blt_has_stacks_over_bytes_and_over_patches_whose_number_depends_on_the_text() -> None:
    hf = tiny_family("blt")
    paths = [f"model.{stack}.layers.0" for stack in ("local_encoder", "global_transformer", "local_decoder")]
    lengths = []
    for seed in range(4):
        hf.get_submodule(paths[1]).register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
        hf(tiny_tokens(1, seed=seed))
    first, _, last = (output.shape[1] for (output,) in calls_of(hf, paths).values())
    assert first == last == TOKENS.shape[1]
    assert set(lengths) - {TOKENS.shape[1]}


def test_layers_of_reformer_have_two_streams_and_no_graph() -> None:
    hf = tiny_family("reformer")
    ((output,),) = calls_of(hf, ["reformer.encoder.layers.0"]).values()
    assert not torch.equal(output.attn_output, output.hidden_states)
    assert hf(TOKENS).logits.requires_grad and not output.hidden_states.requires_grad


# --- points that are refused ------------------------------------------------------------------------------------------


def refusals_of(record: Architecture) -> Iterator[tuple[int, str, str]]:
    """(layer, point, reason) of every refusal in the layers of the tiny model."""
    for layer, block in enumerate(record.blocks):
        for refusal in block.refusals:
            yield from ((layer, point, refusal.reason) for point in refusal.points)


def has_refusals(record: Architecture) -> bool:
    return bool(record.block.refusals) or any("refusals" in change for change in record.kinds.values())


IRREGULAR = [record.model_type for record in RECORDS if has_refusals(record)]


@pytest.mark.parametrize("model_type", IRREGULAR)
def test_a_refused_point_is_not_there_and_says_why(model_type: str) -> None:
    model = lens_of(model_type)
    _, cache = model.run_with_cache(TOKENS)
    rows = list(refusals_of(model.interior.architecture))
    for layer, point, reason in rows:
        name = f"blocks.{layer}.{point}"
        assert name not in model.hook_dict and name not in cache
        with pytest.raises(UnknownPointError) as caught:
            model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: value)])
        assert reason in str(caught.value)


Cache = dict[str, Tensor]
#: (model, cache, layer) -> the two sides of an equation.
Identity = Callable[[Any, Cache, int], tuple[Tensor, Tensor]]


def at(cache: Cache, layer: int, point: str) -> Tensor:
    return cache[f"blocks.{layer}.{point}"]


def passed_on(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """What leaves a layer enters the next one, and is as wide as the model."""
    last = layer + 1 == model.cfg.n_layers
    after = at(cache, layer, "hook_resid_post")
    assert after.shape == (*TOKENS.shape, model.cfg.d_model)
    return after, after if last else at(cache, layer + 1, "hook_resid_pre")


def entering(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """What enters a layer has left the one before, or is the embedding."""
    before = at(cache, layer - 1, "hook_resid_post") if layer else cache["hook_embed"]
    assert before.shape == (*TOKENS.shape, model.cfg.d_model)
    return at(cache, layer, "hook_resid_pre"), before


def middle(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    return at(cache, layer, "hook_resid_pre") + at(cache, layer, "hook_attn_out"), at(cache, layer, "hook_resid_mid")


def end(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    return at(cache, layer, "hook_resid_mid") + at(cache, layer, "hook_mlp_out"), at(cache, layer, "hook_resid_post")


def whole(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """A layer is one attention and one MLP."""
    parts = (at(cache, layer, f"hook_{name}") for name in ("resid_pre", "attn_out", "mlp_out"))
    return sum(parts), at(cache, layer, "hook_resid_post")  # type: ignore[return-value]


def scale(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """The norm before attention norms the stream."""
    norm = model.interior.engine.norms[model.interior.architecture.in_layer(layer, "ln1")]
    return at(cache, layer, "ln1.hook_scale"), norm.split(at(cache, layer, "hook_resid_pre"))[1]


def mixed(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """One key and one value for each position, mixed by the pattern."""
    pattern, v, z = (at(cache, layer, f"attn.hook_{name}") for name in ("pattern", "v", "z"))
    heads = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
    assert at(cache, layer, "attn.hook_rot_k").shape[1] == TOKENS.shape[1]
    return torch.einsum("bhqk,bkhd->bqhd", pattern, heads), z


def written(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """What attention writes to the stream is the sum of what its heads write, and a bias."""
    heads = at(cache, layer, "attn.hook_result").sum(dim=2) + model.blocks[layer].attn.b_O
    return at(cache, layer, "hook_resid_pre") + heads, at(cache, layer, "hook_resid_mid")


def meeting(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """Scores are products of queries and keys, one for each position, times one factor."""
    scores, q, k = (at(cache, layer, f"attn.hook_{name}") for name in ("attn_scores", "rot_q", "rot_k"))
    assert k.shape[1] == TOKENS.shape[1]
    products = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))
    attended = scores > -1e4
    scores, products = scores[attended], products[attended]
    return products * (scores @ products / (products @ products)), scores


def keys(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """The layer's own keys, rotated, are those that it attends to: heads at a position have the same products."""
    k, rotated = (at(cache, layer, f"attn.hook_{name}") for name in ("k", "rot_k"))
    return k.norm(dim=-1), rotated.norm(dim=-1)


IDENTITIES: dict[str, Identity] = {
    "hook_resid_pre": entering,
    "hook_resid_mid": middle,
    "hook_resid_post": passed_on,
    "hook_attn_out": middle,
    "attn.hook_result": written,
    "hook_mlp_out": end,
    **dict.fromkeys(("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"), entering),
    "hook_mlp_in": middle,
    **dict.fromkeys(("ln1.hook_scale", "ln1.hook_normalized"), scale),
    **dict.fromkeys((f"attn.hook_{name}" for name in ("v", "attn_scores", "pattern", "z")), mixed),
    **dict.fromkeys(("attn.hook_rot_q", "attn.hook_rot_k"), meeting),
    **dict.fromkeys(("attn.hook_k", "attn.k_norm.hook_scale", "attn.k_norm.hook_normalized"), keys),
}
#: What one would write for layers of which the record names no part: their first attention and MLP.
TEMPTING = {
    "longcat_flash": (
        Block(
            ln1="input_layernorm.0",
            attn="self_attn.0",
            q=None,
            k=None,
            v=None,
            o="self_attn.0.o_proj",
            ln2="post_attention_layernorm.0",
            mlp="mlps.0",
            gate="mlps.0.gate_proj",
            mlp_in="mlps.0.up_proj",
            mlp_out="mlps.0.down_proj",
        ),
        whole,
    )
}


def without_refusals(record: Architecture) -> Architecture:
    kinds = {
        path: {field: value for field, value in change.items() if field != "refusals"}
        for path, change in record.kinds.items()
    }
    block = TEMPTING[record.model_type][0] if record.model_type in TEMPTING else record.block
    return dataclasses.replace(record, block=dataclasses.replace(block, refusals=()), kinds=kinds)


def holds(identity: Identity, model: Any, cache: Cache, layer: int) -> bool:
    """Whether an equation holds; it does not where there is nothing to put in, or nothing of the right shape."""
    try:
        left, right = identity(model, cache, layer)
        return left.shape == right.shape and torch.allclose(left, right, atol=1e-4, rtol=1e-4)
    except (AssertionError, AttributeError, KeyError, RuntimeError):
        return False


def tempting_cache(model: Any) -> Cache:
    """All points; without what heads write, where asking for it fails, as it may where a refusal says so."""
    for with_result in (True, False):
        model.set_use_attn_result(with_result)
        with torch.no_grad(), suppress(RuntimeError):
            return dict(model.run_with_cache(TOKENS)[1].items())
    raise AssertionError("no run succeeds")


@pytest.mark.parametrize("model_type", IRREGULAR)
def test_a_refused_point_would_not_be_what_it_means(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_family(model_type)
    rows = list(refusals_of(architecture_of(hf)))
    record = next(record for record in RECORDS if record.model_type == model_type)
    monkeypatch.setitem(BY_CLASS, record.hf_class, without_refusals(record))
    model = HookedTransformer.from_pretrained_no_processing(model_type, hf_model=hf)
    cache = tempting_cache(model)
    for layer, point, _ in rows:
        identity = TEMPTING[model_type][1] if model_type in TEMPTING else IDENTITIES[point]
        assert not holds(identity, model, cache, layer), f"blocks.{layer}.{point} works: refuse it no longer"


def test_the_equations_hold_where_points_mean_what_they_should() -> None:
    """Else the test before this one could not fail."""
    model = lens_of(LLAMA.model_type)
    cache = tempting_cache(model)
    for identity in {*IDENTITIES.values(), *(identity for _, identity in TEMPTING.values())}:
        assert all(holds(identity, model, cache, layer) for layer in range(model.cfg.n_layers)), identity.__name__


# --- what is there ----------------------------------------------------------------------------------------------------


def test_rwkv_is_loaded_without_halvings_and_refused_with_them(tmp_path: Any) -> None:
    hf = tiny_family("rwkv")
    hf.config.rescale_every = 1
    with pytest.raises(UnsupportedModelError, match="rescale_every=1 is not supported: its stream is halved"):
        HookedTransformer.from_pretrained("rwkv", hf_model=hf)
    hf.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = hf(TOKENS).logits
    model = HookedTransformer.from_pretrained_no_processing(str(tmp_path))
    assert model.hf_model.config.rescale_every == 0
    assert torch.allclose(model(TOKENS), expected, atol=1e-4)


def test_the_first_layer_of_rwkv_begins_behind_its_norm() -> None:
    model = lens_of("rwkv")
    _, cache = model.run_with_cache(TOKENS)
    pre = cache["resid_pre", 0]
    assert torch.equal(pre, cache["hook_embed"])
    assert torch.allclose(pre + cache["attn_out", 0], cache["resid_mid", 0], atol=1e-6)
    assert torch.allclose(model(pre, start_at_layer=0), model(TOKENS), atol=1e-6)
    assert torch.equal(model(TOKENS, stop_at_layer=0), pre)
    halved = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value / 2)])
    assert torch.allclose(halved, model(pre / 2, start_at_layer=0), atol=1e-6)
