"""Does a native model of fewer layers, or of another context, compute what the whole one does?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lensbridge import HookedTransformer, HookedTransformerConfig
from lensbridge.native import NativeForCausalLM
from lensbridge.native.narrowing import narrowed

FIELDS: dict[str, Any] = {
    "d_model": 12,
    "d_head": 4,
    "n_layers": 3,
    "n_ctx": 10,
    "d_vocab": 19,
    "act_fn": "gelu",
    "device": "cpu",
    "seed": 1,
    "initializer_range": 0.5,
}
IDS = torch.randint(1, 19, (2, 6), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "rotary, groups": {"positional_embedding_type": "rotary", "n_key_value_heads": 1},
    "alibi, attention only": {"positional_embedding_type": "alibi", "attn_only": True},
    "local": {"use_local_attn": True, "window_size": 2, "attn_types": ["local", "global", "local"]},
    "experts": {"num_experts": 2, "experts_per_token": 1},
}


def new_model(**options: Any) -> NativeForCausalLM:
    return NativeForCausalLM.from_cfg(HookedTransformerConfig(**FIELDS | options)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_layers", [0, 1, 2])
def test_the_first_layers(kind: str, n_layers: int) -> None:
    model = new_model(**KINDS[kind])
    part = narrowed(model, n_layers, None)
    with torch.no_grad():
        embedded = model.embedded(IDS)
        stream = model.through_blocks(embedded.residual, 0, n_layers, embedded.shortformer_pos_embed)
        assert torch.equal(part(IDS).logits, model.logits(model.normed(stream)))
    assert part.cfg.n_layers == len(part.blocks) == n_layers
    assert model.cfg.n_layers == len(model.blocks) == 3
    assert part.config.num_hidden_layers == n_layers
    assert part.cfg.n_params == (model.cfg.n_params or 0) * n_layers // 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_context(kind: str) -> None:
    model = new_model(**KINDS[kind])
    part = narrowed(model, None, 6)
    assert torch.equal(part(IDS).logits, model(IDS).logits)
    assert part.cfg.n_ctx == part.config.max_position_embeddings == 6
    if part.cfg.positional_embedding_type in ("standard", "shortformer"):
        assert part.pos_embed.W_pos.shape == (6, 12)
        with pytest.raises(IndexError):
            part(torch.ones(1, 7, dtype=torch.long))


@pytest.mark.parametrize("kind", ["rotary, groups", "alibi, attention only"])
def test_a_longer_context_where_positions_are_not_learned(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = new_model(**KINDS[kind])
    with caplog.at_level(logging.WARNING):
        longer = narrowed(model, None, 30)
    assert "longer than the 10 tokens" in caplog.text
    assert torch.equal(longer(IDS).logits, model(IDS).logits)
    assert longer(torch.ones(1, 30, dtype=torch.long)).logits.isfinite().all()
    expected = new_model(**KINDS[kind], n_ctx=30)
    expected.load_state_dict(longer.state_dict())
    assert torch.equal(longer(IDS.repeat(1, 4)).logits, expected(IDS.repeat(1, 4)).logits)


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("standard", (4, None), "first_n_layers must be between 0 and 3, not 4"),
        ("standard", (-1, None), "first_n_layers must be between 0 and 3, not -1"),
        ("standard", (None, 11), "n_ctx must be between 1 and 10, the model's learned positions, not 11"),
        ("shortformer", (None, 0), "n_ctx must be between 1 and 10"),
        ("rotary, groups", (None, 0), "n_ctx must be at least 1, not 0"),
    ],
)
def test_what_is_not_there(kind: str, asked: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        narrowed(new_model(**KINDS[kind]), *asked)


def test_nothing_is_shared_and_nothing_else_changes() -> None:
    model = new_model(dtype=torch.float64).train()
    model.blocks[0].attn.IGNORE.fill_(-1e5)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    part = narrowed(model, 2, 5)
    # Weights that are copied need no random numbers, and the seed of the config is for new ones.
    assert torch.equal(torch.rand(1), expected)
    assert part.training
    assert part.dtype == part.cfg.dtype == torch.float64
    assert (part.cfg.seed, part.cfg.init_weights) == (1, True)
    assert part.blocks[0].attn.IGNORE == -1e5
    places = {value.data_ptr() for value in model.parameters()}
    assert not places & {value.data_ptr() for value in part.parameters()}
    assert narrowed(model, None, None) is narrowed(model, 3, 10) is model


def test_when_loading(tmp_path: Path) -> None:
    model = new_model()
    model.save_pretrained(tmp_path)
    part = HookedTransformer.from_pretrained(str(tmp_path), first_n_layers=2, n_ctx=8, device="cpu")
    assert (part.cfg.n_layers, part.cfg.n_ctx, part.cfg.normalization_type) == (2, 8, "LNPre")
    expected = narrowed(model, 2, 8)(IDS).logits.log_softmax(-1)
    torch.testing.assert_close(part(IDS).log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
    given = HookedTransformer.from_pretrained("mine", hf_model=model, first_n_layers=1)
    assert given.hf_model is not model
    assert given.cfg.n_layers == 1
    # What is processed are the weights of the part.
    assert model.cfg.normalization_type == "LN"
    torch.testing.assert_close(narrowed(model, 2, 8)(IDS).logits.log_softmax(-1), expected)
