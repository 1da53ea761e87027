"""Is what is shown of single experts what HuggingFace's module computes?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lensbridge import HookedTransformer, Processing
from lensbridge.errors import ReadOnlyWeightError, TraceError
from lensbridge.experts import ExpertForm, Experts, form_of
from lensbridge.points import ABSENT
from lensbridge.tiny import tiny_family, tiny_tokens

#: One of each layout: parts behind each other or in turns, [out, in] or [in, out], with biases or without.
LAYOUTS = ("mixtral", "gpt_oss")


@pytest.fixture(scope="module", params=LAYOUTS)
def lens(request: pytest.FixtureRequest) -> Any:
    return HookedTransformer.from_pretrained_no_processing(request.param, hf_model=tiny_family(request.param))


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_sum_of_all_experts_is_what_the_module_returns(family: str) -> None:
    hf = tiny_family(family)
    module = hf.model.layers[1].mlp.experts
    experts, generator = Experts(module), torch.Generator().manual_seed(0)
    x, weights = torch.randn(5, 64, generator=generator), torch.rand(5, 4, generator=generator)
    indices = torch.arange(4).expand(5, -1)
    total = torch.zeros_like(x)
    for expert in range(experts.form.count):
        gate, pre = (experts.projected(expert, part, x) for part in ("gate", "pre"))
        total += weights[:, expert, None] * experts.written(expert, experts.activations(gate, pre))
    torch.testing.assert_close(total, module(x, indices, weights))


def test_what_a_module_does_not_declare_is_not_shown() -> None:
    module = tiny_family("mixtral").model.layers[0].mlp.experts
    assert form_of(module) == ExpertForm(4, 96, True)
    del module.is_transposed
    assert form_of(module) == ExpertForm(4) and form_of(torch.nn.Linear(2, 3)) == ExpertForm()
    other = tiny_family("mixtral").model.layers[0].mlp.experts
    other.gate_up_proj = torch.nn.Parameter(other.gate_up_proj.detach().to(torch.int8), requires_grad=False)
    assert form_of(other) == ExpertForm(4) and form_of(other).shown == 0


def test_an_edit_of_one_expert_changes_what_it_writes_and_nothing_else(lens: Any) -> None:
    tokens, out = tiny_tokens(), "blocks.0.hook_mlp_out"
    point, weights = "blocks.0.mlp.experts.2.hook_post", "blocks.0.mlp.hook_expert_weights"
    _, clean = lens.run_with_cache(tokens)
    with lens.hooks(fwd_hooks=[(point, lambda value, hook: torch.zeros_like(value))]):
        _, cache = lens.run_with_cache(tokens)
    sent = (clean["blocks.0.mlp.hook_expert_indices"] == 2).any(-1)
    expert = Experts(lens.hf_model.model.layers[0].mlp.experts)
    change = expert.written(2, torch.zeros(1, 96)) - expert.written(2, clean[point])
    # The rows of an expert's points are ordered by the place that it has among the chosen.
    slot, token = torch.where((clean["blocks.0.mlp.hook_expert_indices"] == 2).T)
    chosen = clean[weights].gather(-1, clean["blocks.0.mlp.hook_expert_indices"])
    if lens.cfg.norm_topk_prob:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    difference = (cache[out] - clean[out]).flatten(0, 1)
    assert not difference[~sent].any() and difference[token].any(-1).all()
    torch.testing.assert_close(difference[token], change * chosen[token, slot, None], atol=1e-5, rtol=1e-4)
    assert torch.equal(cache["blocks.0.mlp.experts.1.hook_post"], clean["blocks.0.mlp.experts.1.hook_post"])


def test_only_what_is_asked_for_is_computed(lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []
    projected = Experts.projected
    monkeypatch.setattr(
        Experts, "projected", lambda self, e, part, x: asked.append((e, part)) or projected(self, e, part, x)
    )
    lens(tiny_tokens())
    lens.run_with_cache(tiny_tokens(), names_filter="blocks.1.hook_mlp_out")
    assert asked == []
    lens.run_with_cache(tiny_tokens(), names_filter="blocks.1.mlp.experts.3.hook_pre")
    assert asked == [(3, "pre")]


def test_reading_changes_nothing(lens: Any) -> None:
    tokens = tiny_tokens()
    with torch.no_grad():
        expected = lens.hf_model(tokens).logits
        with lens.hooks(fwd_hooks=[(lambda name: ".mlp." in name, lambda value, hook: None)]):
            assert torch.equal(lens(tokens), expected)
    kept: dict[str, torch.Tensor] = {}
    with lens.hooks(
        bwd_hooks=[(lambda name: ".experts." in name, lambda value, hook: kept.update({hook.name: value}))]
    ):
        logits = lens(tokens)
        logits.sum().backward()
    assert torch.equal(logits, expected) and all(value.any() for value in kept.values())
    assert len(kept) == 24


def test_weights_of_experts_are_read_only_where_they_are_derived(lens: Any) -> None:
    expert = lens.blocks[0].mlp.experts[1]
    assert expert.W_in.weight.shape == (96, 64) and lens.blocks[0].mlp.W_gate.weight.shape == (4, 64)
    new = torch.randn(96, 64)
    expert.W_in.weight = new
    assert torch.equal(lens.state_dict()["blocks.0.mlp.experts.1.W_in.weight"], new)
    lens.process_weights_()
    with pytest.raises(ReadOnlyWeightError):
        expert.W_in.weight = new
    lens.set_processing(Processing())


def test_an_expert_without_tokens_has_no_value_in_a_trace() -> None:
    lens = HookedTransformer.from_pretrained_no_processing("gpt_oss", hf_model=tiny_family("gpt_oss"))
    one = tiny_tokens(1, 1)
    cache = lens.run_with_cache(one)[1]
    idle = next(e for e in range(4) if f"blocks.0.mlp.experts.{e}.hook_post" not in cache)
    with pytest.raises(TraceError, match="no token was sent to this expert"), lens.trace(one):
        _ = lens.blocks[0].mlp.experts[idle].hook_post.value
    assert lens(one).shape == (1, 1, 128)


def test_absent_points_say_why() -> None:
    lens = HookedTransformer.from_pretrained_no_processing("mixtral", hf_model=tiny_family("mixtral"))
    with pytest.raises(KeyError, match="no neurons of its own"):
        lens.run_with_cache(tiny_tokens(), names_filter="blocks.0.mlp.hook_post")
    with pytest.raises(KeyError, match="does not choose among experts"):
        HookedTransformer.from_pretrained_no_processing("llama", hf_model=tiny_family("llama")).run_with_cache(
            tiny_tokens(), names_filter="blocks.0.mlp.hook_expert_weights"
        )
    assert "expert gates" in ABSENT
