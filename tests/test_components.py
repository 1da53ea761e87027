"""Are the components what their formulas say, and do they keep what they promise about calls, masks and memory?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lensbridge import HookedTransformerConfig
from lensbridge import components as parts
from lensbridge.components._masks import causal_mask
from lensbridge.components.abstract_attention import AbstractAttention
from lensbridge.components.mlps.choice import create_mlp
from lensbridge.components.mlps.gpt_oss_moe import GptOssMoE
from lensbridge.errors import UnsupportedModelError
from lensbridge.hook_points import HookPoint, ReadOnlyHook

EXPERTS = {"num_experts": 3, "experts_per_token": 2}


def cfg(**options: Any) -> HookedTransformerConfig:
    fields = {"d_model": 12, "d_head": 4, "n_layers": 2, "n_ctx": 16, "d_vocab": 19, "act_fn": "relu", "device": "cpu"}
    return HookedTransformerConfig(**fields | options)


def rough(module: nn.Module) -> nn.Module:
    """The module with random parameters, none of them near its neutral value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) + 0.2)
    return module


def attention(kind: type = parts.Attention, *arguments: Any, **options: Any) -> Any:
    return rough(kind(cfg(**options), *arguments)).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1)) + 0.3


class Counter(ReadOnlyHook):
    """Counts calls and edits nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensor: torch.Tensor, *, hook: HookPoint) -> None:
        self.calls += 1


# --- norms ------------------------------------------------------------------------------------------------------------

NORMS = {
    parts.LayerNorm: lambda x, m: F.layer_norm(x, (12,), m.w, m.b, m.eps),
    parts.LayerNormPre: lambda x, m: F.layer_norm(x, (12,), eps=m.eps),
    parts.RMSNorm: lambda x, m: F.rms_norm(x, (12,), m.w, m.eps),
    parts.RMSNormPre: lambda x, m: F.rms_norm(x, (12,), eps=m.eps),
}


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_is_its_formula_whoever_listens(kind: Any, x: torch.Tensor) -> None:
    norm = rough(kind(cfg(eps=0.1)))
    expected = NORMS[kind](x, norm)
    torch.testing.assert_close(norm(x), expected)
    norm.hook_scale.add_hook(lambda tensor, hook: tensor * 1)
    torch.testing.assert_close(norm(x), expected)
    norm.hook_scale.remove_hooks()
    norm.hook_scale.add_hook(lambda tensor, hook: tensor * 2)
    bias = norm.b if kind is parts.LayerNorm else 0
    torch.testing.assert_close(norm(x), (expected - bias) / 2 + bias)


@pytest.mark.parametrize("kind", NORMS)
def test_points_of_a_norm(kind: Any, x: torch.Tensor) -> None:
    norm = rough(kind(cfg(eps=0.1)))
    seen = {}
    norm.hook_scale.add_hook(lambda tensor, hook: seen.update(scale=tensor))
    norm.hook_normalized.add_hook(lambda tensor, hook: seen.update(normalized=tensor))
    with torch.no_grad():
        output = norm(x)
    centred = x - x.mean(-1, keepdim=True) if kind.centres else x
    torch.testing.assert_close(seen["scale"], (centred.square().mean(-1, keepdim=True) + 0.1).sqrt())
    torch.testing.assert_close(seen["normalized"] * seen["scale"], centred)
    torch.testing.assert_close(seen["normalized"] * getattr(norm, "w", 1) + getattr(norm, "b", 0), output)


@pytest.mark.parametrize("edit", ["replace", "in place"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_edit_in_a_norm_counts(edit: str, mode: Any, x: torch.Tensor) -> None:
    norm = rough(parts.LayerNorm(cfg()))

    def hook(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
        if edit == "replace":
            return torch.ones_like(tensor)
        tensor.fill_(1)
        return None

    norm.hook_normalized.add_hook(hook)
    with mode():
        output = norm(x.clone())
    torch.testing.assert_close(output, (norm.w + norm.b).expand_as(output))


def test_half_precision_norms_compute_in_float32(x: torch.Tensor) -> None:
    norm = parts.LayerNorm(cfg(dtype=torch.bfloat16))
    seen = []
    norm.hook_scale.add_hook(lambda tensor, hook: seen.append(tensor.dtype))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_how_often_a_norm_is_called(x: torch.Tensor) -> None:
    """Queries, keys and values each pass it when somebody listens; otherwise they share one pass."""
    block = rough(parts.TransformerBlock(cfg(), 0))
    calls = []
    forward = type(block.ln1).forward
    block.ln1.forward = lambda x: calls.append(1) or forward(block.ln1, x)
    output = block(x)
    assert len(calls) == 1
    counter = Counter()
    block.ln1.hook_scale.add_hook(counter)
    torch.testing.assert_close(block(x), output)
    assert (len(calls), counter.calls) == (4, 3)
    block.ln1.hook_scale.remove_hooks()
    block.ln1.register_forward_hook(lambda *args: None)
    block(x)
    assert len(calls) == 7


# --- attention --------------------------------------------------------------------------------------------------------


def plain_attention(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Attention head by head, in loops."""
    out = module.b_O.expand_as(x).clone()
    for head in range(module.W_Q.shape[0]):
        q, k, v = (
            x @ w[head] + b[head]
            for w, b in ((module.W_Q, module.b_Q), (module.W_K, module.b_K), (module.W_V, module.b_V))
        )
        scores = q @ k.transpose(1, 2) / module.attn_scale
        later = torch.ones(6, 6).triu(1).bool()
        out += scores.masked_fill(later, -torch.inf).softmax(-1) @ v @ module.W_O[head]
    return out


@pytest.mark.parametrize("kind", [parts.Attention, parts.GroupedQueryAttention])
@pytest.mark.parametrize("result", [False, True])
def test_attention_is_its_formula(kind: Any, result: bool, x: torch.Tensor) -> None:
    module = attention(kind, n_heads=4, n_key_value_heads=2, use_attn_result=result)
    torch.testing.assert_close(module(x, x, x), plain_attention(module, x))


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (2, 5), (1, 1)])
def test_masks(queries: int, keys: int, window: int | None) -> None:
    mask = causal_mask(queries, keys, window, torch.device("cpu"))[0, 0]
    for row in range(queries):
        position = keys - queries + row
        for key in range(keys):
            near = window is None or position - key < window
            assert bool(mask[row, key]) == (key <= position and near)


def test_nothing_looks_ahead_or_at_padding(x: torch.Tensor) -> None:
    module = attention()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])
    seen = []
    module.hook_pattern.add_hook(lambda tensor, hook: seen.append(tensor))
    output = module(x, x, x, attention_mask=mask)
    (pattern,) = seen
    visible = torch.ones(6, 6).tril().bool() & mask[:, None, None, :].bool()
    assert (pattern[~visible.expand_as(pattern)] == 0).all()
    # Padding before the first token has nothing to look at.
    assert torch.equal(output[0, :2], module.b_O.expand(2, 12))


def test_scores_that_are_no_numbers_make_empty_rows(x: torch.Tensor) -> None:
    module = attention()
    seen = []
    module.hook_q.add_hook(lambda tensor, hook: tensor.index_fill(1, torch.tensor(3), torch.nan))
    module.hook_pattern.add_hook(lambda tensor, hook: seen.append(tensor))
    module(x, x, x)
    (pattern,) = seen
    assert (pattern[:, :, 3] == 0).all()
    torch.testing.assert_close(pattern.sum(-1)[:, :, [0, 1, 2, 4, 5]], torch.ones(2, 3, 5))


def test_sinks_take_their_share(x: torch.Tensor) -> None:
    module = attention(use_attention_sinks=True)
    seen = []
    module.hook_pattern.add_hook(lambda tensor, hook: seen.append(tensor))
    module.hook_attn_scores.add_hook(lambda tensor, hook: seen.append(tensor))
    module(x, x, x)
    scores, pattern = seen
    total = scores.exp().sum(-1) + module.sinks.exp()[:, None]
    torch.testing.assert_close(pattern, scores.exp() / total[..., None])


def test_alibi_does_not_depend_on_what_ran_before(x: torch.Tensor) -> None:
    options = {"positional_embedding_type": "alibi", "attention_dir": "bidirectional"}
    module, fresh = (attention(**options) for _ in range(2))
    module(x, x, x)
    short = x[:, :3]
    seen: list[torch.Tensor] = []
    for each in (module, fresh):
        each.hook_attn_scores.add_hook(lambda tensor, hook: seen.append(tensor))
        each(short, short, short)
    assert torch.equal(*seen)
    assert module.alibi.shape == (3, 6, 6)


@pytest.mark.parametrize("adjacent", [False, True])
def test_rotary_scores_depend_on_distances_only(adjacent: bool) -> None:
    module = attention(positional_embedding_type="rotary", rotary_adjacent_pairs=adjacent)
    q, k = torch.randn(2, 1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    scores = [(module.apply_rotary(q, 5 + shift) * module.apply_rotary(k, 2 + shift)).sum(-1) for shift in (0, 4, 10)]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])
    assert not torch.allclose(scores[0], (module.apply_rotary(q, 6) * module.apply_rotary(k, 2)).sum(-1))
    torch.testing.assert_close(module.apply_rotary(q, 9).norm(dim=-1), q.norm(dim=-1))


def test_rotary_tables_grow_up_to_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attention(positional_embedding_type="rotary", n_ctx=40)
    monkeypatch.setattr(AbstractAttention, "ROTARY_INITIAL_CACHE_SIZE", 4)
    module = attention(positional_embedding_type="rotary", n_ctx=40)
    assert module.rotary_sin.shape == (4, 4)
    lengths = []
    for length in (4, 5, 17, 40):
        x = torch.ones(1, length, 1, 4)
        assert torch.equal(module.apply_rotary(x), whole.apply_rotary(x))
        lengths.append(len(module.rotary_cos))
    assert lengths == [4, 8, 17, 40]
    with pytest.raises(IndexError, match="41 tokens.*n_ctx is 40"):
        module.apply_rotary(torch.ones(1, 41, 1, 4))
    # What a longer run has left behind loads into a new model, and the other way round.
    attention(positional_embedding_type="rotary", n_ctx=40).load_state_dict(module.state_dict())
    module.load_state_dict(whole.state_dict())
    assert len(module.rotary_cos) == 40


def test_dynamic_ntk_depends_on_this_input_only() -> None:
    options = {"positional_embedding_type": "rotary", "use_dynamic_ntk_rope": True, "train_seq_length": 4}
    module, fresh = (attention(**options) for _ in range(2))
    short, long = torch.ones(1, 3, 1, 4), torch.ones(1, 9, 1, 4)
    widened = module.apply_rotary(long)
    assert not torch.allclose(widened[:, :3], fresh.apply_rotary(short))
    assert torch.equal(module.apply_rotary(short), fresh.apply_rotary(short))
    module.apply_rotary(long)
    plain = attention(positional_embedding_type="rotary")
    assert torch.equal(module.train().apply_rotary(long), plain.apply_rotary(long))


@pytest.mark.parametrize("kind", ["rotary", "alibi", "standard"])
def test_a_run_in_inference_mode_leaves_training_possible(kind: str, x: torch.Tensor) -> None:
    causal_mask.cache_clear()
    module = attention(positional_embedding_type=kind)
    with torch.inference_mode():
        module(x, x, x)
    module(x, x, x).sum().backward()
    assert module.W_Q.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["mask", "IGNORE", "rotary_sin", "rotary_cos"])
def test_state_dicts_without_constants(name: str) -> None:
    module = attention(positional_embedding_type="rotary")
    state = module.state_dict()
    del state[name]
    other = parts.Attention(cfg(positional_embedding_type="rotary"))
    other.load_state_dict(state)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in other.state_dict().items())
    del state["b_K"]
    with pytest.raises(RuntimeError, match="b_K"):
        other.load_state_dict(state)


def test_weights_of_groups_are_repeated() -> None:
    module = attention(parts.GroupedQueryAttention, n_heads=4, n_key_value_heads=2)
    assert torch.equal(module.W_K, module._W_K[[0, 0, 1, 1]])
    assert torch.equal(module.b_V, module._b_V[[0, 0, 1, 1]])
    assert module.QK.AB.shape == module.OV.AB.shape == (4, 12, 12)
    assert {name for name, _ in module.named_parameters()} >= {"_W_K", "_W_V", "_b_K", "_b_V"}


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_hook_mlp_in_is_a_copy(x: torch.Tensor) -> None:
    block = rough(parts.TransformerBlock(cfg(use_hook_mlp_in=True), 0))
    seen = []
    block.hook_resid_mid.add_hook(lambda tensor, hook: seen.append(tensor))
    block.hook_mlp_in.add_hook(lambda tensor, hook: tensor.zero_())
    with torch.no_grad():
        block(x)
    assert seen[0].abs().max() > 0


def test_positions_are_not_shared_between_rows() -> None:
    module = rough(parts.PosEmbed(cfg()))
    with torch.no_grad():
        embedded = module(torch.zeros(2, 3, dtype=torch.long))
        embedded[0] = 0
    assert torch.equal(embedded[1], module.W_pos[:3])
    with pytest.raises(IndexError, match="17 tokens.*n_ctx is 16"):
        module(torch.zeros(2, 5, dtype=torch.long), past_kv_pos_offset=12)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, parts.MLP),
        ({"gated_mlp": True}, parts.GatedMLP),
        (EXPERTS, parts.MoE),
        (EXPERTS | {"original_architecture": "GptOssForCausalLM"}, GptOssMoE),
    ],
)
def test_the_mlp_that_a_config_asks_for(options: dict[str, Any], kind: type) -> None:
    assert type(create_mlp(cfg(**options))) is kind


@pytest.mark.parametrize("kind", [parts.MoE, GptOssMoE])
def test_experts_are_weighted_sums(kind: Any, x: torch.Tensor) -> None:
    module = rough(kind(cfg(**EXPERTS)))
    weights, chosen = module.route(module.W_gate(x.reshape(-1, 12)))
    expected = torch.zeros(12, 12)
    for token, flat in enumerate(x.reshape(-1, 12)):
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            expected[token] += weight * module.experts[expert](flat[None])[0]
    torch.testing.assert_close(module(x).reshape(-1, 12), expected)


@pytest.mark.parametrize("kind", [parts.MoE, GptOssMoE])
def test_experts_in_half_precision(kind: Any, x: torch.Tensor) -> None:
    module = rough(kind(cfg(**EXPERTS, dtype=torch.bfloat16)))
    exact = rough(kind(cfg(**EXPERTS)))
    output = module(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact(x)).abs().max() < 0.1 * exact(x).abs().max()


def test_xielu_is_trained_with_the_mlp(x: torch.Tensor) -> None:
    mlp = parts.MLP(cfg(act_fn="xielu"))
    rough(mlp)(x).sum().backward()
    assert mlp.act_fn.alpha_p.grad != 0


@pytest.mark.parametrize("kind", [parts.Attention, parts.MLP, parts.GatedMLP])
def test_quantized_weights_are_refused(kind: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="load_in_4bit"):
        kind(cfg(load_in_4bit=True))


@pytest.mark.parametrize("norm", ["LN", "LNPre", "RMS", "RMSPre"])
def test_norms_after_a_part_keep_their_gain(norm: str, x: torch.Tensor) -> None:
    block = rough(parts.TransformerBlock(cfg(normalization_type=norm, use_normalization_before_and_after=True), 0))
    expected = parts.LayerNorm if norm.startswith("LN") else parts.RMSNorm
    assert type(block.ln1_post) is type(block.ln2_post) is expected
    seen = []
    block.hook_mlp_out.add_hook(lambda tensor, hook: seen.append(tensor))
    block(x)
    with torch.no_grad():
        block.ln2_post.w.zero_()
    block(x)
    assert seen[0].std() > 0 and seen[1].std(dim=(0, 1)).max() == 0
