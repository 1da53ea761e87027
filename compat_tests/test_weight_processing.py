"""Does weight processing make of a state dict what TransformerLens 3.9.0 makes of it?"""

from __future__ import annotations

import copy
import inspect
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.config import HookedTransformerConfig as TheirConfig
from transformer_lens.conversion_utils.conversion_steps import ChainTensorConversion as TheirChain
from transformer_lens.conversion_utils.conversion_steps import RearrangeTensorConversion as TheirRearrange
from transformer_lens.conversion_utils.conversion_steps import SplitTensorConversion as TheirSplit
from transformer_lens.conversion_utils.conversion_steps import TransposeTensorConversion as TheirTranspose
from transformer_lens.conversion_utils.param_processing_conversion import ParamProcessingConversion as TheirParam
from transformer_lens.weight_processing import ProcessWeights as Theirs

from compat_tests.rough_models import SUBJECT

ProcessWeights = import_module(f"{SUBJECT}.weight_processing").ProcessWeights
steps = import_module(f"{SUBJECT}.conversion_utils.conversion_steps")
params = import_module(f"{SUBJECT}.conversion_utils.param_processing_conversion")

#: No two sizes are equal: 3.9.0 guesses from them which way a matrix lies.
HEADS, GROUPS, D_HEAD, D_MODEL, D_MLP, VOCAB, N_CTX, LAYERS, EXPERTS = 4, 2, 3, 12, 10, 17, 8, 2, 3

MODELS: dict[str, dict[str, Any]] = {
    "LN": {},
    "LN without parameters": {"normalization_type": "LNPre"},
    "no norm": {"normalization_type": None},
    "attention only": {"attn_only": True, "act_fn": None},
    "shared keys": {"n_key_value_heads": GROUPS},
    "gated": {"gated_mlp": True},
    "RMS, gated, shared keys": {
        "normalization_type": "RMS", "gated_mlp": True, "n_key_value_heads": GROUPS,
        "positional_embedding_type": "rotary",
    },
    "RMS without parameters": {"normalization_type": "RMSPre", "gated_mlp": True},
    "experts": {
        "normalization_type": "RMS", "gated_mlp": True, "num_experts": EXPERTS, "experts_per_token": 2,
        "positional_embedding_type": "rotary",
    },
    "final RMS": {"final_rms": True},
    "parallel": {"parallel_attn_mlp": True},
    "parallel, with one norm": {"parallel_attn_mlp": True, "one_norm": True},
    "normed activations": {"act_fn": "solu_ln"},
    "post-norm": {"original_architecture": "Olmo2ForCausalLM", "positional_embedding_type": "rotary"},
    "alibi": {"positional_embedding_type": "alibi"},
}  # fmt: skip
OPTIONS = {
    "fold_ln": ("fold_layer_norm", True),
    "center_writing_weights": ("center_writing_weights", True),
    "center_unembed": ("center_unembed", False),
    "fold_value_biases": ("fold_value_biases", True),
    "refactor_factored_attn_matrices": ("refactor_factored_attn_matrices", True),
}


def config(name: str) -> TheirConfig:
    fields = {"act_fn": "gelu", **MODELS[name]}
    fields.pop("one_norm", None)
    return TheirConfig(
        d_model=D_MODEL,
        d_head=D_HEAD,
        n_heads=HEADS,
        n_layers=LAYERS,
        n_ctx=N_CTX,
        d_mlp=D_MLP,
        d_vocab=VOCAB,
        **fields,
    )


def state_dict(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    cfg, generator = config(name), torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) + 0.3).to(dtype)

    def norm(prefix: str, width: int = D_MODEL) -> dict[str, Tensor]:
        if cfg.normalization_type not in ("LN", "RMS"):
            return {}
        rms = cfg.normalization_type == "RMS"
        return {f"{prefix}.w": draw(width)} | ({} if rms else {f"{prefix}.b": draw(width)})

    out = {"embed.W_E": draw(VOCAB, D_MODEL)}
    if cfg.positional_embedding_type == "standard":
        out["pos_embed.W_pos"] = draw(N_CTX, D_MODEL)
    for layer in range(LAYERS):
        block, groups = f"blocks.{layer}.", cfg.n_key_value_heads or HEADS
        _ = "" if cfg.n_key_value_heads is None else "_"
        out |= norm(f"{block}ln1")
        out |= {f"{block}attn.W_Q": draw(HEADS, D_MODEL, D_HEAD), f"{block}attn.b_Q": draw(HEADS, D_HEAD)}
        out |= {f"{block}attn.{_}W_{letter}": draw(groups, D_MODEL, D_HEAD) for letter in "KV"}
        out |= {f"{block}attn.{_}b_{letter}": draw(groups, D_HEAD) for letter in "KV"}
        out |= {f"{block}attn.W_O": draw(HEADS, D_HEAD, D_MODEL), f"{block}attn.b_O": draw(D_MODEL)}
        out |= {f"{block}attn.mask": torch.ones(N_CTX, N_CTX).tril().bool()}
        if cfg.attn_only:
            continue
        out |= {} if "one_norm" in MODELS[name] else norm(f"{block}ln2")
        mlp = f"{block}mlp."
        if cfg.num_experts:
            out[f"{mlp}W_gate.weight"] = draw(EXPERTS, D_MODEL)
            for expert in range(EXPERTS):
                shapes = {"W_in": (D_MLP, D_MODEL), "W_gate": (D_MLP, D_MODEL), "W_out": (D_MODEL, D_MLP)}
                out |= {f"{mlp}experts.{expert}.{w}.weight": draw(*shape) for w, shape in shapes.items()}
            continue
        out |= {f"{mlp}W_in": draw(D_MODEL, D_MLP), f"{mlp}b_in": draw(D_MLP)}
        out |= {f"{mlp}W_out": draw(D_MLP, D_MODEL), f"{mlp}b_out": draw(D_MODEL)}
        if cfg.gated_mlp:
            out[f"{mlp}W_gate"] = draw(D_MODEL, D_MLP)
        if cfg.act_fn == "solu_ln":
            out |= norm(f"{mlp}ln", D_MLP)
    out |= norm("ln_final")
    return out | {"unembed.W_U": draw(D_MODEL, VOCAB), "unembed.b_U": draw(VOCAB)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        error = (ours[name].float() - expected.float()).abs().max()
        assert error <= limit * expected.float().abs().max().clamp(min=1e-2), name


def call(side: Any, option: str, w: dict[str, Tensor], cfg: Any, adapter: Any = None) -> dict[str, Tensor]:
    method, needs_cfg = OPTIONS[option]
    arguments = {"adapter": adapter} if adapter is not None else {}
    rms = option == "fold_ln" and str(cfg.normalization_type).startswith("RMS")
    if rms:
        arguments |= {"fold_biases": False, "center_weights": False}
    return getattr(side, method)(dict(w), *([cfg] if needs_cfg else []), **arguments)


def refactorable(name: str) -> bool:
    cfg = config(name)
    return cfg.positional_embedding_type != "rotary" and cfg.n_key_value_heads is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("option", OPTIONS)
def test_one_option(name: str, option: str) -> None:
    if option == "refactor_factored_attn_matrices" and not refactorable(name):
        with pytest.raises((AssertionError, ValueError)) as theirs:
            call(Theirs, option, state_dict(name), config(name))
        with pytest.raises(theirs.type):
            call(ProcessWeights, option, state_dict(name), config(name))
        return
    if option == "center_writing_weights" and config(name).num_experts:
        # 3.9.0 centres W_out over d_mlp: test_experts_are_centred_over_the_models_width in tests/.
        expected = call(Theirs, option, state_dict(name), config(name))
        kept = {key: value for key, value in expected.items() if ".experts." not in key}
        found = call(ProcessWeights, option, state_dict(name), config(name))
        assert_same({key: found[key] for key in kept}, kept)
        return
    expected = call(Theirs, option, state_dict(name), config(name))
    found = call(ProcessWeights, option, state_dict(name), config(name))
    if option == "fold_ln" and name == "final RMS":
        # 3.9.0 makes it blind to a mean that is there: test_a_last_norm_that_sees_the_mean_keeps_its_stream in tests/.
        found["unembed.W_U"] = found["unembed.W_U"] - found["unembed.W_U"].mean(0)
    assert_same(found, expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "final RMS"])
@pytest.mark.parametrize("refactor", [False, True])
@pytest.mark.parametrize("center_writing_weights", [False, True])
@pytest.mark.parametrize("fold_value_biases", [False, True])
def test_all_options(name: str, refactor: bool, center_writing_weights: bool, fold_value_biases: bool) -> None:
    options = {
        "center_writing_weights": center_writing_weights,
        "fold_value_biases": fold_value_biases,
        "refactor_factored_attn_matrices": refactor and refactorable(name),
    }
    expected = Theirs.process_weights(state_dict(name), config(name), **options)
    assert_same(ProcessWeights.process_weights(state_dict(name), config(name), **options), expected)


@pytest.mark.parametrize("name", ["LN", "RMS, gated, shared keys", "experts"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types_are_computed_at_higher_precision(name: str, dtype: torch.dtype) -> None:
    before = state_dict(name, dtype)
    expected = Theirs.process_weights(dict(before), config(name))
    # Half-precision results may fall on either side of a rounding boundary: one unit in the last place.
    limit = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-5}[dtype]
    assert_same(ProcessWeights.process_weights(before, config(name)), expected, limit)


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_gains_that_are_stored_less_one(norm: str) -> None:
    name = "RMS, gated, shared keys" if norm == "RMS" else "LN"
    cfg = SimpleNamespace(**config(name).to_dict(), rmsnorm_uses_offset=True)
    options = {"fold_biases": norm == "LN", "center_weights": norm == "LN"}
    expected = Theirs.fold_layer_norm(state_dict(name), cfg, **options)
    assert_same(ProcessWeights.fold_layer_norm(state_dict(name), cfg, **options), expected)


@pytest.mark.parametrize("fold_biases", [False, True])
@pytest.mark.parametrize("center_weights", [False, True])
def test_parts_of_folding(fold_biases: bool, center_weights: bool) -> None:
    for name in ("LN", "normed activations", "parallel, with one norm"):
        expected = Theirs.fold_layer_norm(state_dict(name), config(name), fold_biases, center_weights)
        assert_same(
            ProcessWeights.fold_layer_norm(state_dict(name), config(name), fold_biases, center_weights), expected
        )


def test_single_weights() -> None:
    w = state_dict("shared keys")
    q, k, v = w["blocks.0.attn.W_Q"], w["blocks.0.attn._W_K"], w["blocks.0.attn._W_V"]
    biases = [w["blocks.0.attn.b_Q"], None, w["blocks.0.attn._b_V"]]
    gain, shift = w["blocks.0.ln1.w"], w["blocks.0.ln1.b"]
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("fold_layer_norm_bias_single", (q, biases[0], shift)),
        ("fold_layer_norm_weight_single", (q, gain)),
        ("center_weight_single", (q,)),
        ("fold_layer_norm_biases", (q, k, v, *biases, shift)),
        ("fold_layer_norm_weights", (q, k, v, gain)),
        ("center_attention_weights", (q, k, v)),
    ]
    for method, arguments in calls:
        ours, theirs = getattr(ProcessWeights, method)(*arguments), getattr(Theirs, method)(*arguments)
        if isinstance(theirs, Tensor):
            ours, theirs = (ours,), (theirs,)
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LN", "shared keys"])
def test_attention_as_it_is_found(name: str) -> None:
    w = state_dict(name)
    del w["blocks.1.attn.b_Q"]
    ours = ProcessWeights.extract_attention_tensors_for_folding(w, config(name), 1, None)
    theirs = Theirs.extract_attention_tensors_for_folding(w, config(name), 1, None)
    assert ours["keys"] == theirs["keys"]
    assert ours.keys() == theirs.keys()
    assert all(ours[part] is theirs[part] for part in theirs if part != "keys")


def test_same_methods_with_the_same_parameters() -> None:
    for name, method in vars(Theirs).items():
        if not name.startswith("_"):
            ours = inspect.signature(getattr(ProcessWeights, name))
            theirs = inspect.signature(method.__func__)
            assert [(p.name, p.default) for p in ours.parameters.values()] == [
                (p.name, p.default) for p in theirs.parameters.values()
            ]


# --- through an adapter -----------------------------------------------------------------------------------------------


def adapters(flat_biases: bool) -> tuple[Any, Any]:
    """GPT-2's layout, in which every matrix of attention is flat, as an adapter for either side."""

    def build(chain: Any, rearrange: Any, split: Any, transpose: Any, param: Any) -> Any:
        out: dict[str, Any] = {"pos_embed.weight": "a string converts nothing"}
        for index, letter in enumerate("qkv"):
            into = rearrange("m (h d) -> h m d", h=HEADS)
            if letter == "k":
                into = chain([split(index, 3, dim=1), into])
            out[f"blocks.{{i}}.attn.{letter}"] = param(into, "blocks.{i}.attn.qkv.weight" if letter == "k" else None)
            if not flat_biases:
                out[f"blocks.{{i}}.attn.{letter}.bias"] = param(rearrange("(h d) -> h d", h=HEADS))
        out["blocks.{i}.attn.o.weight"] = param(rearrange("(h d) m -> h d m", h=HEADS))
        out["unembed.weight"] = param(transpose())
        return SimpleNamespace(weight_processing_conversions=out)

    ours = build(
        steps.ChainTensorConversion, steps.RearrangeTensorConversion, steps.SplitTensorConversion,
        steps.TransposeTensorConversion, params.ParamProcessingConversion,
    )  # fmt: skip
    return ours, build(TheirChain, TheirRearrange, TheirSplit, TheirTranspose, TheirParam)


def adapted() -> dict[str, Tensor]:
    """The state dict of "LN" by components, with attention flat, W_in and W_U the other way round."""
    out: dict[str, Tensor] = {}
    for name, w in state_dict("LN").items():
        if name.endswith("mask"):
            continue
        head, last = name.rsplit(".", 1)
        word = "weight" if last.startswith(("W", "w")) else "bias"
        path = (
            f"{head}.{last.split('_')[1].lower()}.{word}" if ".attn." in name or ".mlp." in name else f"{head}.{word}"
        )
        if last in ("W_Q", "W_K", "W_V"):
            w = w.movedim(0, 1).flatten(1)
        elif last in ("b_Q", "b_K", "b_V", "W_O"):
            w = w.flatten(0, 1)
        elif last in ("W_in", "W_U"):
            w = w.T
        out[path] = w
    return out


@pytest.mark.parametrize("option", OPTIONS)
def test_one_option_through_an_adapter(option: str) -> None:
    ours, theirs = adapters(flat_biases=False)
    expected = call(Theirs, option, adapted(), config("LN"), theirs)
    assert_same(call(ProcessWeights, option, adapted(), config("LN"), ours), expected)


@pytest.mark.ours_only
def test_biases_that_an_adapter_leaves_flat_stay_flat() -> None:
    ours, theirs = adapters(flat_biases=True)
    # 3.9.0 returns them by head.
    expected = call(Theirs, "fold_ln", adapted(), config("LN"), theirs)
    flat = {name: w.reshape(adapted()[name].shape) for name, w in expected.items()}
    assert_same(call(ProcessWeights, "fold_ln", adapted(), config("LN"), ours), flat)


def test_all_options_through_an_adapter() -> None:
    ours, theirs = adapters(False)
    expected = Theirs.process_weights(adapted(), config("LN"), adapter=theirs)
    assert_same(ProcessWeights.process_weights(adapted(), config("LN"), adapter=ours), expected)


@pytest.mark.parametrize("option", ["fold_ln", "center_writing_weights"])
def test_an_adapter_may_rule_an_option_out(option: str) -> None:
    results = []
    for side, adapter in zip((ProcessWeights, Theirs), adapters(False), strict=True):
        adapter = copy.copy(adapter)
        setattr(adapter, f"supports_{option}", False)
        with pytest.warns(UserWarning, match=option):
            results.append(side.process_weights(adapted(), config("LN"), adapter=adapter))
    assert_same(*results)


def test_single_weights_through_an_adapter() -> None:
    ours, theirs = adapters(False)
    w = adapted()
    for path in ("blocks.1.attn.q.weight", "blocks.1.attn.k.weight", "blocks.0.attn.v.bias", "pos_embed.weight", "x.y"):
        mine = ProcessWeights.convert_tensor_to_tl_format(path, w, w.get(path), None, ours)
        yours = Theirs.convert_tensor_to_tl_format(path, w, w.get(path), None, theirs)
        assert (mine is None) == (yours is None)
        if mine is not None:
            assert torch.equal(mine, yours)
            back = ProcessWeights.convert_tensor_to_hf_format(path, mine, None, ours)
            assert torch.equal(back, Theirs.convert_tensor_to_hf_format(path, yours, None, theirs))
            assert torch.equal(back, w[path])


class Component:
    """Takes notes of what it is given."""

    def __init__(self) -> None:
        self.given: list[dict[str, Tensor]] = []

    def set_processed_weights(self, weights: dict[str, Tensor], verbose: bool = False) -> None:
        self.given.append(weights)


def test_components_are_given_the_same_weights() -> None:
    given = []
    for side in (ProcessWeights, Theirs):
        components = [Component() for _ in range(5)]
        mapping = {"embed": ("wte", components[0]), "blocks": ("h", components[1:4]), "nothing": ("x", components[4])}
        side.distribute_weights_to_components(adapted(), mapping)
        given.append([[sorted(weights) for weights in component.given] for component in components])
    assert given[0] == given[1]
    assert len(given[0][0]) == len(given[0][1]) == 1 and given[0][4] == []
    for side in (ProcessWeights, Theirs):
        with pytest.raises(ValueError, match="embed"):
            side.distribute_weights_to_components({}, {"embed": Component()})
