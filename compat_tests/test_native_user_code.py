"""Does code that was written around TransformerLens' models of a config run on ours: own modules, subclasses, wrappers?

One source of such code is run with each of the two packages.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformer_lens
from torch import nn

import lensbridge
from compat_tests.comparison import caches_close, close
from compat_tests.native_models import BASE

PACKAGES = (lensbridge, transformer_lens)
TOKENS = torch.randint(0, 17, (2, 7), generator=torch.Generator().manual_seed(5))


def built(package: Any, kind: Any = None, **fields: Any) -> Any:
    """The model of a package's, or of a subclass of it, on a config; a seed makes its weights the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return (kind or package.HookedTransformer)(package.HookedTransformerConfig(**BASE | {"seed": 2} | fields))


class OwnAttention(nn.Module):
    """Takes arguments in an order of its own, and fewer of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, BASE["d_model"]))

    def forward(self, *, value_input: torch.Tensor, query_input: torch.Tensor, **others: Any) -> torch.Tensor:
        return value_input * self.gain + query_input.tanh() * len(others)


class OwnBlock(nn.Module):
    """Its optional arguments are in another order than those of TransformerLens' block."""

    def forward(
        self, stream: torch.Tensor, attention_mask: Any = None, past_kv_cache_entry: Any = None, **others: Any
    ) -> torch.Tensor:
        keep = 1.0 if attention_mask is None else attention_mask[..., None]
        return stream * keep + (0.0 if others["shortformer_pos_embed"] is None else others["shortformer_pos_embed"])


class OwnPositions(nn.Module):
    """Knows of the tokens which ones they are."""

    def forward(self, tokens: torch.Tensor, offset: int = 0, attention_mask: Any = None) -> torch.Tensor:
        return torch.sin(tokens.cumsum(1)[..., None] * torch.linspace(0.1, 1, BASE["d_model"]))


def own_attention(model: Any) -> None:
    model.blocks[0].attn = OwnAttention()


def own_block(model: Any) -> None:
    model.blocks[1] = OwnBlock()


def own_positions(model: Any) -> None:
    model.pos_embed = OwnPositions()


@pytest.mark.parametrize("positions", ["standard", "shortformer"])
@pytest.mark.parametrize("put", [own_attention, own_block, own_positions])
def test_modules_of_ones_own_are_called_as_there(put: Callable[[Any], None], positions: str) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    results = []
    for package in PACKAGES:
        model = built(package, positional_embedding_type=positions)
        put(model)
        model.setup()
        _, cache = model.run_with_cache(TOKENS)
        results.append((model(TOKENS), model(TOKENS, attention_mask=mask)[:, 2:], dict(cache)))
    (logits, masked, cache), (expected, expected_masked, expected_cache) = results
    close("logits", logits.detach(), expected.detach())
    close("masked logits", masked.detach(), expected_masked.detach())
    caches_close(cache, expected_cache)


def subclasses(package: ModuleType) -> dict[str, type]:
    """Ways to go through a model of one's own."""

    class Probed(package.HookedTransformer):  # type: ignore[name-defined]
        """Reads the stream before the last block, with a point behind it."""

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.probe = nn.Linear(BASE["d_model"], 3)
            self.hook_probe = package.hook_points.HookPoint()
            with torch.no_grad():
                self.probe.weight.copy_(torch.arange(3.0 * BASE["d_model"]).cos().view(3, -1))
                self.probe.bias.zero_()
            self.setup()

        def forward(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
            return self.hook_probe(self.probe(super().forward(tokens, stop_at_layer=-1, **options)))

    class Looped(package.HookedTransformer):  # type: ignore[name-defined]
        """Goes through its blocks twice."""

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            stream = self.hook_embed(self.embed(tokens)) + self.hook_pos_embed(self.pos_embed(tokens))
            for block in (*self.blocks, *self.blocks):
                stream = block(stream)
            return self.unembed(self.ln_final(stream))

    return {"probed": Probed, "looped": Looped}


@pytest.mark.parametrize("kind", ["probed", "looped"])
def test_a_subclass_with_a_forward_of_its_own(kind: str) -> None:
    def quiet(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return tensor * 0.3

    results = []
    for package in PACKAGES:
        model = built(package, subclasses(package)[kind])
        output, cache = model.run_with_cache(TOKENS)
        point = list(cache)[-1]
        hooked = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_mlp_out", quiet), (point, quiet)])
        with_edit = model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith(("resid_post", "probe")))[1]
        results.append((output, hooked, dict(cache), dict(with_edit)))
    (output, hooked, cache, some), (expected, expected_hooked, expected_cache, expected_some) = results
    close("output", output.detach(), expected.detach())
    close("hooked", hooked.detach(), expected_hooked.detach())
    caches_close(cache, expected_cache)
    caches_close(some, expected_some)


def around(package: ModuleType) -> type:
    """A hooked module with a model inside."""

    class Around(package.HookedRootModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = built(package)
            self.hook_out = package.hook_points.HookPoint()
            self.setup()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.hook_out(self.model(tokens).log_softmax(-1))

    return Around


def test_a_model_inside_another_hooked_module() -> None:
    """Points whose flag is off are no points of the module around it either."""
    results = []
    for package in PACKAGES:
        outer = around(package)()
        output, cache = outer.run_with_cache(TOKENS)
        edited = outer.run_with_hooks(TOKENS, fwd_hooks=[("model.blocks.0.hook_resid_mid", lambda x, hook: x * 0.5)])
        outer.model.set_use_attn_result(True)
        more = outer.run_with_cache(TOKENS, names_filter=lambda name: "attn" in name)[1]
        results.append((output, edited, cache, more, list(outer.hook_dict)))
    (output, edited, cache, more, names), (expected, *others) = results
    close("output", output.detach(), expected.detach())
    close("edited", edited.detach(), others[0].detach())
    caches_close(cache, others[1])
    caches_close(more, others[2])
    assert names == others[3]
    assert "model.blocks.0.attn.hook_result" in more and "model.blocks.0.attn.hook_result" not in cache


def test_what_is_added_stands_where_it_stands_there() -> None:
    """An optimiser's state dict knows parameters by their place in the list alone."""
    listed = []
    for package in PACKAGES:
        model = built(package)
        model.temperature = nn.Parameter(torch.ones(3))
        model.probe = nn.Linear(4, 2)
        model.blocks[0].mlp.probe = nn.Linear(4, 2)
        parameters = [name for name, _ in model.named_parameters()]
        listed.append((parameters, list(model.state_dict()), len(list(model.buffers()))))
    assert listed[0] == listed[1]


def test_a_state_dict_is_pytorchs() -> None:
    for package in PACKAGES:
        model = built(package)
        state = model.state_dict()
        assert isinstance(state, OrderedDict)
        assert "blocks.0.attn" in state._metadata
        assert all(model.state_dict(keep_vars=True)[name] is p for name, p in model.named_parameters())
        mine: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            assert model.state_dict(mine, "at.") is mine
        assert list(mine) == [f"at.{name}" for name in state]


def longer_positions(model: Any) -> None:
    table = torch.arange(30.0 * BASE["d_model"]).sin().view(30, -1)
    model.pos_embed.W_pos = nn.Parameter(table)


@pytest.mark.parametrize(
    ("kind", "put"),
    [("alibi", None), ("standard", longer_positions), ("shortformer", own_positions)],
    ids=["alibi", "standard", "shortformer"],
)
def test_a_context_is_as_long_as_there_are_positions(kind: str, put: Callable[[Any], None] | None) -> None:
    """ALiBi has no end, and positions of one's own have theirs, whatever ``n_ctx`` was."""
    long = torch.randint(0, 17, (2, BASE["n_ctx"] + 9), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(long)
    mask[0, :2] = 0
    results = []
    for package in PACKAGES:
        model = built(package, positional_embedding_type=kind)
        if put is not None:
            put(model)
        results.append((model(long), model(long, attention_mask=mask)[:, 2:]))
    for mine, theirs in zip(*results, strict=True):
        close("logits", mine.detach(), theirs.detach())


def test_alibi_goes_on_beyond_the_context() -> None:
    texts = []
    for package in PACKAGES:
        model = built(package, positional_embedding_type="alibi")
        options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False}
        # TransformerLens needs a tokenizer to generate with a key-value cache.
        options["use_past_kv_cache"] = package is lensbridge
        texts.append(model.generate(TOKENS, max_new_tokens=BASE["n_ctx"], **options))
    assert torch.equal(*texts)


def test_an_input_beyond_longer_positions_is_refused() -> None:
    model = built(lensbridge)
    longer_positions(model)
    with pytest.raises(IndexError, match="31 tokens long.* 30"):
        model(torch.zeros(1, 31, dtype=torch.long))
