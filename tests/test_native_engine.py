"""Does the engine of native models run what it is asked for, and leave nothing behind?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lensbridge import HookedRootModule, HookedTransformerConfig, HookPoint, TransformerLensKeyValueCache
from lensbridge.engine import Request
from lensbridge.engine.plan import Span
from lensbridge.native import NativeForCausalLM
from lensbridge.native.engine import NativeEngine

POSITIONS = ["standard", "rotary", "shortformer", "alibi"]


class Facade(HookedRootModule):
    """The least that names the hook points: the model's own modules as its submodules."""

    def __init__(self, model: NativeForCausalLM) -> None:
        super().__init__()
        self._modules.update(model._modules)
        self.setup()


class Kept:
    """A recording."""

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)
        self.values: dict[str, torch.Tensor] = {}

    def keep(self, name: str, value: torch.Tensor) -> None:
        self.values[name] = value.detach()

    def keep_later(self, name: str, value: Any) -> None:
        self.values[name] = value().detach()


@pytest.fixture(params=POSITIONS)
def model(request: pytest.FixtureRequest) -> NativeForCausalLM:
    cfg = HookedTransformerConfig(
        d_model=12,
        d_head=4,
        n_layers=3,
        n_ctx=16,
        d_vocab=19,
        act_fn="gelu",
        device="cpu",
        seed=1,
        initializer_range=0.6,
        positional_embedding_type=request.param,
    )
    model = NativeForCausalLM.from_cfg(cfg).eval()
    Facade(model)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(0))


WHOLE = Span(0, 3, embeds=True, norm=True, unembeds=True)


def test_the_whole(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    engine = NativeEngine(model)
    assert torch.equal(engine.run(Request({"input_ids": ids}, WHOLE), {}), model(ids).logits)
    without_head = Span(0, 3, embeds=True, norm=True, unembeds=False)
    kept = Kept("ln_final.hook_scale", "unembed.hook_in")
    assert engine.run(Request({"input_ids": ids}, without_head), {}, kept) is None
    assert list(kept.values) == ["ln_final.hook_scale"]


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_start_and_a_stop(model: NativeForCausalLM, ids: torch.Tensor, at: int) -> None:
    engine = NativeEngine(model)
    first = Request({"input_ids": ids}, Span(0, at, embeds=True, norm=False, unembeds=False))
    kept = Kept("hook_pos_embed") if model.cfg.positional_embedding_type == "shortformer" else None
    residual = engine.run(first, {}, kept)
    inputs = {} if kept is None else {"shortformer_pos_embed": kept.values["hook_pos_embed"]}
    rest = Request(inputs, Span(at, 3, embeds=False, norm=True, unembeds=True), residual)
    assert torch.equal(engine.run(rest, {}), model(ids).logits)


def test_masks_and_caches(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    engine = NativeEngine(model)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    whole = engine.run(Request({"input_ids": ids, "attention_mask": mask}, WHOLE), {})
    assert torch.equal(whole, model(ids, attention_mask=mask).logits)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    for start, end in ((0, 4), (4, 7)):
        inputs = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "past_key_values": cache}
        piece = engine.run(Request(inputs, WHOLE), {})
        torch.testing.assert_close(piece, whole[:, start:end])


def test_recordings_see_what_hooks_made_of_a_value(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    engine, point = NativeEngine(model), model.blocks[1].hook_resid_pre
    point.add_hook(lambda tensor, hook: tensor * 0 + 1)
    kept = Kept("blocks.1.hook_resid_pre", "blocks.0.attn.hook_pattern")
    logits = engine.run(Request({"input_ids": ids}, WHOLE), {"blocks.1.hook_resid_pre": point}, kept)
    assert list(kept.values) == ["blocks.0.attn.hook_pattern", "blocks.1.hook_resid_pre"]
    assert (kept.values["blocks.1.hook_resid_pre"] == 1).all()
    assert torch.equal(logits, model(ids).logits)
    assert [module for module in model.modules() if isinstance(module, HookPoint) and module.has_hooks()] == [point]


def test_nothing_is_left_after_a_failure(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    def fail(tensor: torch.Tensor, hook: HookPoint) -> None:
        raise RuntimeError("on purpose")

    model.blocks[1].attn.hook_v.add_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        NativeEngine(model).run(Request({"input_ids": ids}, WHOLE), {}, Kept("blocks.0.hook_resid_pre"))
    assert not model.blocks[0].hook_resid_pre.has_hooks()


def test_one_block(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    residual = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    engine = NativeEngine(model)
    assert torch.equal(engine.run_block(1, residual, {}), model.blocks[1](residual))
    assert torch.equal(engine.run_block(2, residual, {}, mask), model.blocks[2](residual, attention_mask=mask))
    assert not torch.equal(engine.run_block(2, residual, {}, mask), model.blocks[2](residual))
