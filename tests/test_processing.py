"""Does each processing option change the basis and leave the function alone?

The function is written out here on dicts of TransformerLens-shaped weights: one layer's attention, its MLP and the
unembedding, each behind its norm. In float64 both sides agree to rounding.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lensbridge import processing
from lensbridge.processing import Processing

HEADS, D_HEAD, D_MODEL, D_MLP, VOCAB, N_CTX, LAYERS = 2, 3, 7, 5, 11, 6, 2
OPTIONS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


def state_dict() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator) + 0.3

    out = {"embed.W_E": draw(VOCAB, D_MODEL), "pos_embed.W_pos": draw(N_CTX, D_MODEL)}
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        out |= {f"{block}ln{i}.{part}": draw(D_MODEL) for i in (1, 2) for part in "wb"}
        out |= {f"{block}attn.W_{letter}": draw(HEADS, D_MODEL, D_HEAD) for letter in "QKV"}
        out |= {f"{block}attn.b_{letter}": draw(HEADS, D_HEAD) for letter in "QKV"}
        out |= {f"{block}attn.W_O": draw(HEADS, D_HEAD, D_MODEL), f"{block}attn.b_O": draw(D_MODEL)}
        out |= {f"{block}mlp.W_in": draw(D_MODEL, D_MLP), f"{block}mlp.b_in": draw(D_MLP)}
        out |= {f"{block}mlp.W_out": draw(D_MLP, D_MODEL), f"{block}mlp.b_out": draw(D_MODEL)}
    return out | {
        "ln_final.w": draw(D_MODEL), "ln_final.b": draw(D_MODEL),
        "unembed.W_U": draw(D_MODEL, VOCAB), "unembed.b_U": draw(VOCAB),
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
    if option == "fold_ln":
        return processing.fold_layer_norm(w, LAYERS)
    return getattr(processing, option)(w, LAYERS)


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
    after = processing.fold_layer_norm(state_dict(), LAYERS)
    assert all(torch.equal(after[n], torch.ones(D_MODEL)) for n in after if n.endswith("ln1.w") or n == "ln_final.w")
    assert all(torch.equal(after[n], torch.zeros(D_MODEL)) for n in after if ".ln2.b" in n or n == "ln_final.b")
    for name in ("blocks.1.attn.W_Q", "blocks.0.attn.W_V", "blocks.1.mlp.W_in", "unembed.W_U"):
        assert after[name].mean(-2).abs().max() < 1e-12


def test_folding_without_biases_or_centring() -> None:
    w = state_dict()
    after = processing.fold_layer_norm(w, LAYERS, fold_biases=False, center_weights=False)
    assert torch.equal(after["blocks.0.ln1.b"], w["blocks.0.ln1.b"])
    assert torch.equal(after["blocks.0.attn.b_Q"], w["blocks.0.attn.b_Q"])
    assert torch.allclose(after["blocks.0.attn.W_Q"], w["blocks.0.attn.W_Q"] * w["blocks.0.ln1.w"][:, None])


def test_centring_takes_the_mean_out_of_everything_that_writes() -> None:
    w = state_dict()
    after = processing.center_writing_weights(w, LAYERS)
    written = [n for n in w if n.split(".")[-1] in ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out")]
    assert len(written) == 2 + 4 * LAYERS
    assert all(after[name].mean(-1).abs().max() < 1e-12 for name in written)
    assert all(torch.equal(after[name], w[name]) for name in w if name not in written)
    unembedded = processing.center_unembed(w, LAYERS)
    assert unembedded["unembed.W_U"].mean(-1).abs().max() < 1e-12 and abs(unembedded["unembed.b_U"].mean()) < 1e-12


def test_value_biases_move_to_the_output() -> None:
    w = state_dict()
    after = processing.fold_value_biases(w, LAYERS)
    assert all(after[f"blocks.{layer}.attn.b_V"].abs().sum() == 0 for layer in range(LAYERS))
    moved = torch.einsum("hd,hdm->m", w["blocks.1.attn.b_V"], w["blocks.1.attn.W_O"])
    assert torch.allclose(after["blocks.1.attn.b_O"], w["blocks.1.attn.b_O"] + moved)


def test_refactored_circuits_are_the_same_products_in_a_special_form() -> None:
    w = state_dict()
    after = processing.refactor_factored_attn_matrices(w, LAYERS)
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
    part = {name: whole[name] for name in whole if name.startswith("blocks.1.mlp") or name == "embed.W_E"}
    # Without its norm there is nothing to fold.
    assert processing.fold_layer_norm(part, LAYERS).keys() == part.keys()
    assert torch.equal(processing.fold_layer_norm(part, LAYERS)["blocks.1.mlp.W_in"], part["blocks.1.mlp.W_in"])
    centred, expected = (
        processing.center_writing_weights(part, LAYERS),
        processing.center_writing_weights(whole, LAYERS),
    )
    assert all(torch.equal(centred[name], expected[name]) for name in part)
    attention_less = {n: v for n, v in whole.items() if ".attn." not in n}
    assert processing.fold_value_biases(attention_less, LAYERS).keys() == attention_less.keys()


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


def test_what_a_choice_of_options_means() -> None:
    assert not Processing().any
    assert all(Processing(**{option: True}).any for option in OPTIONS)
    assert Processing(fold_value_biases=True).moves_value_bias
    assert Processing(refactor_factored_attn_matrices=True).moves_value_bias
    assert not Processing(fold_ln=True).moves_value_bias
    assert hash(Processing(True)) == hash(Processing(fold_ln=True))


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
