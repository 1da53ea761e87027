"""Does each processing option change the basis of a whole model and leave its function alone?

The function is written out here on dicts of TransformerLens-shaped weights: one layer's attention, its MLP and the
unembedding, each behind its norm. In float64 both sides agree to rounding.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import processing
from lensbridge.processing import Processing
from lensbridge.weight_processing import ProcessWeights

HEADS, D_HEAD, D_MODEL, D_MLP, VOCAB, N_CTX, LAYERS = 2, 3, 7, 5, 11, 6, 2
OPTIONS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


CFG = SimpleNamespace(n_layers=LAYERS, d_model=D_MODEL)


def state_dict(d_mlp: int = D_MLP, vocab: int = VOCAB) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator) + 0.3

    out = {"embed.W_E": draw(vocab, D_MODEL), "pos_embed.W_pos": draw(N_CTX, D_MODEL)}
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        out |= {f"{block}ln{i}.{part}": draw(D_MODEL) for i in (1, 2) for part in "wb"}
        out |= {f"{block}attn.W_{letter}": draw(HEADS, D_MODEL, D_HEAD) for letter in "QKV"}
        out |= {f"{block}attn.b_{letter}": draw(HEADS, D_HEAD) for letter in "QKV"}
        out |= {f"{block}attn.W_O": draw(HEADS, D_HEAD, D_MODEL), f"{block}attn.b_O": draw(D_MODEL)}
        out |= {f"{block}mlp.W_in": draw(D_MODEL, d_mlp), f"{block}mlp.b_in": draw(d_mlp)}
        out |= {f"{block}mlp.W_out": draw(d_mlp, D_MODEL), f"{block}mlp.b_out": draw(D_MODEL)}
    return out | {
        "ln_final.w": draw(D_MODEL), "ln_final.b": draw(D_MODEL),
        "unembed.W_U": draw(D_MODEL, vocab), "unembed.b_U": draw(vocab),
    }  # fmt: skip


def normed(x: Tensor, w: dict[str, Tensor], prefix: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[prefix + "w"] + w[prefix + "b"]


def attention(x: Tensor, w: dict[str, Tensor], layer: int) -> Tensor:
    n, at = normed(x, w, f"blocks.{layer}.ln1."), f"blocks.{layer}.attn."
    q, k, v = (torch.einsum("pm,hmd->hpd", n, w[f"{at}W_{i}"]) + w[f"{at}b_{i}"][:, None] for i in "QKV")
    future = torch.ones(len(x), len(x)).triu(1).bool()
    pattern = (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,hkd,hdm->qm", pattern, v, w[at + "W_O"]) + w[at + "b_O"]


def log_probs(w: dict[str, Tensor]) -> Tensor:
    x = w["embed.W_E"][torch.arange(4)] + w["pos_embed.W_pos"][:4]
    for layer in range(LAYERS):
        x = x + attention(x, w, layer)
        hidden = (normed(x, w, f"blocks.{layer}.ln2.") @ w[f"blocks.{layer}.mlp.W_in"]) + w[f"blocks.{layer}.mlp.b_in"]
        x = x + hidden.relu() @ w[f"blocks.{layer}.mlp.W_out"] + w[f"blocks.{layer}.mlp.b_out"]
    logits = normed(x, w, "ln_final.") @ w["unembed.W_U"] + w["unembed.b_U"]
    return logits.log_softmax(-1)


def apply(option: str, w: dict[str, Tensor]) -> dict[str, Tensor]:
    return getattr(ProcessWeights, "fold_layer_norm" if option == "fold_ln" else option)(w, CFG)


def combinations() -> list[tuple[str, ...]]:
    return [chosen for n in range(len(OPTIONS) + 1) for chosen in itertools.combinations(OPTIONS, n)]


@pytest.mark.parametrize("chosen", combinations(), ids=lambda chosen: "+".join(chosen) or "none")
def test_every_combination_keeps_the_function(chosen: tuple[str, ...]) -> None:
    before = state_dict()
    after = before
    for option in chosen:
        after = apply(option, after)
    assert after.keys() == before.keys()
    assert torch.allclose(log_probs(after), log_probs(before), atol=1e-9)
    if chosen:
        assert any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_leaves_its_argument_alone_and_keeps_shapes(option: str) -> None:
    given, untouched = state_dict(), state_dict()
    after = apply(option, given)
    assert given.keys() == untouched.keys() and all(torch.equal(given[name], untouched[name]) for name in given)
    assert all(after[name].shape == given[name].shape for name in given)


def test_folding_leaves_neutral_norms_and_centred_readers() -> None:
    after = ProcessWeights.fold_layer_norm(state_dict(), CFG)
    assert all(torch.equal(after[n], torch.ones(D_MODEL)) for n in after if n.endswith("ln1.w") or n == "ln_final.w")
    assert all(torch.equal(after[n], torch.zeros(D_MODEL)) for n in after if ".ln2.b" in n or n == "ln_final.b")
    for name in ("blocks.1.attn.W_Q", "blocks.0.attn.W_V", "blocks.1.mlp.W_in", "unembed.W_U"):
        assert after[name].mean(-2).abs().max() < 1e-12


def test_folding_without_biases_or_centring() -> None:
    w = state_dict()
    after = ProcessWeights.fold_layer_norm(w, CFG, fold_biases=False, center_weights=False)
    assert torch.equal(after["blocks.0.ln1.b"], w["blocks.0.ln1.b"])
    assert torch.equal(after["blocks.0.attn.b_Q"], w["blocks.0.attn.b_Q"])
    assert torch.allclose(after["blocks.0.attn.W_Q"], w["blocks.0.attn.W_Q"] * w["blocks.0.ln1.w"][:, None])


def test_centring_takes_the_mean_out_of_everything_that_writes() -> None:
    w = state_dict()
    after = ProcessWeights.center_writing_weights(w, CFG)
    written = [n for n in w if n.split(".")[-1] in ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out")]
    assert len(written) == 2 + 4 * LAYERS
    assert all(after[name].mean(-1).abs().max() < 1e-12 for name in written)
    assert all(torch.equal(after[name], w[name]) for name in w if name not in written)
    unembedded = ProcessWeights.center_unembed(w, CFG)
    assert unembedded["unembed.W_U"].mean(-1).abs().max() < 1e-12 and abs(unembedded["unembed.b_U"].mean()) < 1e-12


def test_value_biases_move_to_the_output() -> None:
    w = state_dict()
    after = ProcessWeights.fold_value_biases(w, CFG)
    assert all(after[f"blocks.{layer}.attn.b_V"].abs().sum() == 0 for layer in range(LAYERS))
    moved = torch.einsum("hd,hdm->m", w["blocks.1.attn.b_V"], w["blocks.1.attn.W_O"])
    assert torch.allclose(after["blocks.1.attn.b_O"], w["blocks.1.attn.b_O"] + moved)


def test_refactored_circuits_are_the_same_products_in_a_special_form() -> None:
    w = state_dict()
    after = ProcessWeights.refactor_factored_attn_matrices(w, CFG)
    at = "blocks.0.attn."
    assert torch.allclose(after[at + "W_V"] @ after[at + "W_O"], w[at + "W_V"] @ w[at + "W_O"])
    assert torch.allclose(after[at + "W_Q"] @ after[at + "W_K"].mT, w[at + "W_Q"] @ w[at + "W_K"].mT)
    rows = after[at + "W_O"] @ after[at + "W_O"].mT
    assert torch.allclose(rows, torch.eye(D_HEAD, dtype=torch.float64).expand_as(rows))
    query = torch.cat([after[at + "W_Q"], after[at + "b_Q"][:, None]], 1)
    key = torch.cat([after[at + "W_K"], after[at + "b_K"][:, None]], 1)
    assert torch.allclose(query.norm(dim=1), key.norm(dim=1))
    gram = query.mT @ query
    assert torch.allclose(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), atol=1e-9)


def test_a_part_of_a_state_dict_is_processed_as_far_as_it_goes() -> None:
    whole = state_dict()
    part = {name: whole[name] for name in whole if name.startswith("blocks.1.mlp")}
    # There is no norm to fold: the weight only stops reading the mean.
    folded = ProcessWeights.fold_layer_norm(part, CFG)
    assert folded.keys() == part.keys()
    expected = whole["blocks.1.mlp.W_in"] - whole["blocks.1.mlp.W_in"].mean(0)
    assert torch.allclose(folded["blocks.1.mlp.W_in"], expected)
    attention_less = {n: v for n, v in whole.items() if ".attn." not in n}
    assert ProcessWeights.fold_value_biases(attention_less, CFG).keys() == attention_less.keys()


@pytest.mark.parametrize(("option", "name"), [
    ("center_writing_weights", "embed.W_E"), ("center_writing_weights", "pos_embed.W_pos"),
    ("center_unembed", "unembed.W_U"),
])  # fmt: skip
def test_what_an_option_is_about_must_be_there(option: str, name: str) -> None:
    part = state_dict()
    del part[name]
    with pytest.raises(KeyError, match=name):
        apply(option, part)


@pytest.mark.parametrize("missing", ["W_K", "W_V"])
def test_a_layer_that_lacks_a_weight_is_refused(missing: str) -> None:
    part = state_dict()
    del part[f"blocks.1.attn.{missing}"]
    for option in ("fold_ln", "refactor_factored_attn_matrices"):
        with pytest.raises(ValueError, match=missing):
            apply(option, part)


def test_refactoring_needs_biases_and_no_rotation() -> None:
    part = state_dict()
    del part["blocks.0.attn.b_K"]
    with pytest.raises(AssertionError, match="b_K"):
        apply("refactor_factored_attn_matrices", part)
    with pytest.raises(AssertionError, match="rotary"):
        ProcessWeights.refactor_factored_attn_matrices({}, SimpleNamespace(positional_embedding_type="rotary"))


@pytest.mark.parametrize("chosen", [("fold_ln",), OPTIONS])
def test_square_matrices_are_not_taken_for_turned_ones(chosen: tuple[str, ...]) -> None:
    before = after = state_dict(d_mlp=D_MODEL, vocab=D_MODEL)
    for option in chosen:
        after = apply(option, after)
    assert torch.allclose(log_probs(after), log_probs(before), atol=1e-9)


def test_biases_that_are_missing_are_made() -> None:
    whole = state_dict()
    bare = {name: w for name, w in whole.items() if name.split(".")[-1] not in ("b_Q", "b_K", "b_in", "b_U")}
    zeros = {name: torch.zeros_like(w) if name not in bare else w for name, w in whole.items()}
    after = apply("fold_ln", bare)
    assert after.keys() == whole.keys()
    assert torch.allclose(log_probs(after), log_probs(zeros), atol=1e-9)
    no_output = {name: w for name, w in whole.items() if not name.endswith("b_O")}
    assert apply("fold_value_biases", no_output).keys() == whole.keys()


def test_shared_keys_and_values_keep_their_names() -> None:
    w, cfg = state_dict(), SimpleNamespace(n_layers=LAYERS, d_model=D_MODEL, n_key_value_heads=1)
    for name in list(w):
        head, last = name.rsplit(".", 1)
        if last in ("W_K", "W_V", "b_K", "b_V"):
            w[f"{head}._{last}"] = w.pop(name)[:1]

    def opened(w: dict[str, Tensor]) -> dict[str, Tensor]:
        shared = {name.replace("._", "."): v.repeat_interleave(HEADS, 0) for name, v in w.items() if "._" in name}
        return {name: v for name, v in w.items() if "._" not in name} | shared

    bare = {name: v for name, v in w.items() if not name.endswith("_b_K")}
    after = ProcessWeights.process_weights(bare, cfg)
    assert after.keys() == w.keys()
    zeroed = {name: torch.zeros_like(v) if name.endswith("_b_K") else v for name, v in w.items()}
    assert torch.allclose(log_probs(opened(after)), log_probs(opened(zeroed)), atol=1e-9)
    assert all(after[name].abs().sum() == 0 for name in after if name.endswith("_b_V"))


def experts(d_mlp: int = D_MLP) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"W_in": (d_mlp, D_MODEL), "W_gate": (d_mlp, D_MODEL), "W_out": (D_MODEL, d_mlp)}
    at = "blocks.0.mlp."
    out = {
        f"{at}experts.{e}.{n}.weight": torch.randn(s, generator=generator) for e in (0, 1) for n, s in shapes.items()
    }
    return out | {f"{at}W_gate.weight": torch.randn(2, D_MODEL), "blocks.0.ln2.w": torch.rand(D_MODEL) + 0.5}


@pytest.mark.parametrize("d_mlp", [D_MLP, D_MODEL])
def test_experts_and_their_router_take_over_the_gain(d_mlp: int) -> None:
    w, cfg = experts(d_mlp), SimpleNamespace(n_layers=1, d_model=D_MODEL, num_experts=2)
    after = ProcessWeights.fold_layer_norm(w, cfg, fold_biases=False, center_weights=False)
    x, at = torch.randn(5, D_MODEL), "blocks.0.mlp."
    for name in ("W_gate", "experts.0.W_in", "experts.1.W_gate"):
        before = (x * w["blocks.0.ln2.w"]) @ w[f"{at}{name}.weight"].T
        assert torch.allclose(x @ after[f"{at}{name}.weight"].T, before, atol=1e-5)
    assert torch.equal(after["blocks.0.ln2.w"], torch.ones(D_MODEL))
    assert after[f"{at}experts.0.W_out.weight"] is w[f"{at}experts.0.W_out.weight"]
    # Where the experts are missing, or a bias would be lost, the norm stays.
    for other in ({k: v for k, v in w.items() if "experts" not in k}, w | {"blocks.0.ln2.b": torch.ones(D_MODEL)}):
        assert all(v is other[k] for k, v in ProcessWeights.fold_layer_norm(other, cfg).items())
    # There is nothing to lose of a bias that is zero.
    again = ProcessWeights.fold_layer_norm(w | {"blocks.0.ln2.b": torch.zeros(D_MODEL)}, cfg)
    assert all(torch.equal(again[name], value) for name, value in after.items())


def test_experts_are_centred_over_the_models_width() -> None:
    w, cfg = (
        experts(),
        SimpleNamespace(n_layers=1, d_model=D_MODEL, num_experts=2, original_architecture="Olmo2ForCausalLM"),
    )
    w |= {f"blocks.0.mlp.experts.{expert}.W_out.bias": torch.randn(D_MODEL) for expert in (0, 1)}
    after = ProcessWeights.center_writing_weights(w, cfg)
    for expert in (0, 1):
        of_expert = f"blocks.0.mlp.experts.{expert}.W_out"
        written = torch.randn(4, D_MLP) @ after[f"{of_expert}.weight"].T
        assert written.mean(-1).abs().max() < 1e-5
        assert (written + after[f"{of_expert}.bias"]).mean(-1).abs().max() < 1e-5
    assert after["blocks.0.mlp.W_gate.weight"] is w["blocks.0.mlp.W_gate.weight"]


def test_a_last_norm_that_sees_the_mean_keeps_its_stream() -> None:
    """Nothing that is written is centred then, and b_O takes over the value biases as they are."""
    w, cfg = state_dict(), SimpleNamespace(n_layers=LAYERS, d_model=D_MODEL, final_rms=True)
    after = ProcessWeights.process_weights(w, cfg)
    moved = torch.einsum("hd,hdm->m", w["blocks.0.attn.b_V"], w["blocks.0.attn.W_O"])
    shift = w["blocks.0.ln1.b"] @ w["blocks.0.attn.W_V"]
    moved = moved + torch.einsum("hd,hdm->m", shift, w["blocks.0.attn.W_O"])
    assert torch.allclose(after["blocks.0.attn.b_O"], w["blocks.0.attn.b_O"] + moved)
    assert torch.equal(after["ln_final.b"], w["ln_final.b"])
    assert torch.equal(after["embed.W_E"], w["embed.W_E"])
    folded = ProcessWeights.process_weights(w, cfg, center_unembed=False)
    assert torch.equal(folded["unembed.W_U"], w["unembed.W_U"] * w["ln_final.w"][:, None])


def test_half_precision_goes_in_and_comes_out() -> None:
    half = {name: w.to(torch.bfloat16) for name, w in state_dict().items()}
    del half["blocks.0.attn.b_O"]
    after = ProcessWeights.process_weights(half, CFG)
    assert {w.dtype for w in after.values()} == {torch.bfloat16} and "blocks.0.attn.b_O" in after
    assert {w.dtype for w in half.values()} == {torch.bfloat16}
    exact = ProcessWeights.process_weights({name: w.double() for name, w in half.items()}, CFG)
    for name, w in after.items():
        assert (w.double() - exact[name]).abs().max() <= 2**-8 * exact[name].abs().max() + 1e-6, name


@pytest.mark.parametrize("flat", [False, True])
def test_short_convolutions_take_over_the_norm_if_they_can(flat: bool) -> None:
    cfg = SimpleNamespace(n_layers=1, d_model=D_MODEL, attn_only=True)
    weight, gain = torch.randn(D_MODEL, 3 * D_MODEL), torch.rand(D_MODEL) + 0.5
    given = {"blocks.0.conv.W_in": weight.T if flat else weight, "blocks.0.ln1.w": gain}
    after = ProcessWeights.fold_layer_norm(given, cfg)
    folded = gain[:, None] * weight
    assert torch.allclose(after["blocks.0.conv.W_in"], folded.T if flat else folded)
    assert torch.equal(after["blocks.0.ln1.w"], torch.ones(D_MODEL))
    unplaced = given | {"blocks.0.ln1.b": torch.ones(D_MODEL)}
    assert all(w is unplaced[name] for name, w in ProcessWeights.fold_layer_norm(unplaced, cfg).items())
    after = ProcessWeights.fold_layer_norm(unplaced | {"blocks.0.conv.b_in": torch.zeros(3 * D_MODEL)}, cfg)
    assert torch.allclose(after["blocks.0.conv.b_in"], weight.sum(0), atol=1e-5)


def test_weights_are_shown_on_their_way_to_components(capsys: pytest.CaptureFixture[str]) -> None:
    class Taker:
        def set_processed_weights(self, weights: Any, verbose: bool) -> None:
            print(sorted(weights), verbose)

    weights = {"embed.weight": torch.ones(1), "blocks.1.attn.q.weight": torch.ones(1)}
    mapping = {"embed": ("wte", Taker()), "blocks": ("h", [Taker(), Taker()])}
    ProcessWeights.distribute_weights_to_components(weights, mapping, verbose=True)
    shown = capsys.readouterr().out
    assert "embed (wte): weight" in shown and "blocks.0 (h): no weights" in shown
    assert "['attn.q.weight'] True" in shown and "[] True" not in shown


def test_foreign_entries_pass_through() -> None:
    w = state_dict() | {
        "blocks.0.attn.mask": torch.ones(1),
        "blocks.0.attn.deeper.x": torch.ones(1),
        "other": torch.ones(1),
    }
    for option in OPTIONS:
        after = apply(option, w)
        assert all(torch.equal(after[name], torch.ones(1)) for name in ("blocks.0.attn.mask", "other"))
        assert "blocks.0.attn.deeper.x" in after


@pytest.mark.parametrize("chosen", combinations()[1:], ids="+".join)
def test_a_branch_is_processed_as_the_whole_state_dict_is(chosen: tuple[str, ...]) -> None:
    whole, options = state_dict(), Processing(**dict.fromkeys(chosen, True))
    expected = whole
    for option in OPTIONS:
        if option in chosen:
            expected = apply(option, expected)
    branch = {name.removeprefix("blocks.1.attn."): w for name, w in whole.items() if name.startswith("blocks.1.attn.")}
    branch |= {f"ln.{part}": whole[f"blocks.1.ln1.{part}"] for part in "wb"}
    found = processing.process_attention(branch, options)
    for short in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
        assert torch.allclose(found[short], expected[f"blocks.1.attn.{short}"], atol=1e-9), short
    mlp = {name.removeprefix("blocks.1.mlp."): w for name, w in whole.items() if name.startswith("blocks.1.mlp.")}
    mlp |= {f"ln.{part}": whole[f"blocks.1.ln2.{part}"] for part in "wb"}
    found = processing.process_mlp(mlp, options)
    assert all(torch.allclose(found[s], expected[f"blocks.1.mlp.{s}"]) for s in ("W_in", "b_in", "W_out", "b_out"))
    head = {"W_U": whole["unembed.W_U"], "b_U": whole["unembed.b_U"]}
    head |= {f"ln.{part}": whole[f"ln_final.{part}"] for part in "wb"}
    found = processing.process_unembed(head, options)
    assert all(torch.allclose(found[short], expected[f"unembed.{short}"]) for short in ("W_U", "b_U"))
    embedding = {"W_E": whole["embed.W_E"], "W_pos": whole["pos_embed.W_pos"]}
    assert torch.allclose(processing.process_embedding(embedding, options)["W_E"], expected["embed.W_E"])
