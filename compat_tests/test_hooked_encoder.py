"""Is `HookedEncoder` on HuggingFace's BERT equal to TransformerLens 3.9.0's, point by point, read and edited?"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from transformer_lens import BertNextSentencePrediction as ReferenceNextSentence

from compat_tests.comparison import caches_close, close, outcome, same_outcome, weights_close
from compat_tests.edits import EDITS
from compat_tests.rough_encoders import VOCABULARY, bert, edits_at, flags, out_of_place, reference, tokenizer
from lensbridge import BertNextSentencePrediction, HookedEncoder

THEIRS = reference("bert")
#: Points that need a flag.
FLAGGED = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", "hook_result")
MASKED_LANGUAGE = [n for n in THEIRS.hook_dict if not n.startswith(("pooler", "nsp_head")) and not n.endswith(FLAGGED)]
NEXT_SENTENCE = ["pooler.hook_pooler_out", "nsp_head.hook_nsp_out", "blocks.1.attn.hook_pattern"]
FLAGS = ("use_split_qkv_input", "use_hook_mlp_in", "use_attn_result")


@cache
def ours() -> HookedEncoder:
    return HookedEncoder.from_pretrained("bert-base-cased", hf_model=bert(), tokenizer=tokenizer())


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(6, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def inputs(padding: str) -> dict[str, torch.Tensor]:
    """Two sentences of token types 0 and 1, with padding at one side of the second row, or no mask at all."""
    types = (torch.arange(7) > 3).long().expand(2, -1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, -3:] = 0
    mask = {"right": mask, "left": mask.flip(-1), "none": None}[padding]
    return {"token_type_ids": types} | ({} if mask is None else {"one_zero_attention_mask": mask})


def compare(name: str, edit: Any, mine: Any = None, theirs: Any = None, **arguments: Any) -> None:
    """An edit at one point: outputs and everything cached on the way agree."""
    mine, theirs = mine or ours(), theirs or THEIRS
    with ours().hooks(fwd_hooks=[(name, edit)]), THEIRS.hooks(fwd_hooks=[(name, out_of_place(edit))]):
        output, cache_ = mine.run_with_cache(tokens(), **arguments)
        expected, reference_cache = theirs.run_with_cache(tokens(), **arguments)
    close("output", output, expected)
    caches_close(cache_, reference_cache)


def test_the_points_are_the_same_in_the_same_order() -> None:
    assert list(ours().hook_dict) == list(THEIRS.hook_dict)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_every_activation(padding: str) -> None:
    output, mine = ours().run_with_cache(tokens(), **inputs(padding))
    expected, theirs = THEIRS.run_with_cache(tokens(), **inputs(padding))
    close("output", output, expected)
    caches_close(mine, theirs)


def test_logits_are_huggingfaces_own() -> None:
    plain = bert()(tokens(), token_type_ids=inputs("none")["token_type_ids"]).prediction_logits
    assert torch.equal(ours()(tokens(), **inputs("none")), plain)
    assert torch.equal(ours().run_with_cache(tokens(), **inputs("none"))[0], plain)


@pytest.mark.parametrize(("name", "edit"), edits_at(MASKED_LANGUAGE))
def test_edit_at_every_point(name: str, edit: str) -> None:
    compare(name, EDITS[edit], **inputs("right"))


@pytest.mark.parametrize(("name", "edit"), edits_at([n for n in THEIRS.hook_dict if n.endswith(FLAGGED)]))
def test_edit_at_points_that_need_a_flag(name: str, edit: str) -> None:
    with flags(ours(), THEIRS, *FLAGS):
        compare(name, EDITS[edit], **inputs("left"))


def test_minus_infinity_at_whole_rows_of_scores() -> None:
    """A row that attends to nothing has a pattern of zeros."""

    def blind(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, 1, 2:4] = -torch.inf
        return value

    compare("blocks.0.attn.hook_attn_scores", blind, **inputs("right"))


@pytest.mark.parametrize("flag", [None, *FLAGS])
def test_every_activation_with_flags(flag: str | None) -> None:
    with flags(ours(), THEIRS, *([flag] if flag else FLAGS)):
        _, mine = ours().run_with_cache(tokens(), **inputs("right"))
        _, theirs = THEIRS.run_with_cache(tokens(), **inputs("right"))
        caches_close(mine, theirs)


@pytest.mark.parametrize("name", [*MASKED_LANGUAGE, *(n for n in THEIRS.hook_dict if n.endswith(FLAGGED))])
def test_gradients(name: str) -> None:
    """At the point itself, with a backward hook that halves it, and at the embedding before it."""
    found: dict[str, list[torch.Tensor]] = {}

    def halve(gradient: torch.Tensor, hook: Any) -> tuple[torch.Tensor]:
        gradients.append(gradient.clone())
        return (gradient * 0.5,)

    with flags(ours(), THEIRS, *FLAGS):
        for which, model in (("ours", ours()), ("theirs", THEIRS)):
            gradients = found[which] = []
            weight = model.W_E if which == "theirs" else bert().bert.embeddings.word_embeddings.weight
            weight.requires_grad_(True)
            with model.hooks(bwd_hooks=[(name, halve)]):
                loss = model(tokens(), **inputs("right")).log_softmax(-1)[..., 3].sum()
                gradients += torch.autograd.grad(loss, model.W_pos if which == "theirs" else positions())
    assert len(found["ours"]) == len(found["theirs"])
    for mine, theirs in zip(found["ours"], found["theirs"], strict=True):
        close(f"gradient at {name}", mine, theirs)


def positions() -> torch.nn.Parameter:
    return bert().bert.embeddings.position_embeddings.weight


def test_names_filter_device_and_positions() -> None:
    wanted = ["blocks.1.attn.hook_z", "embed.ln.hook_scale"]
    for options in ({"names_filter": wanted}, {"names_filter": lambda name: "hook_q" in name, "pos_slice": -1}):
        _, mine = ours().run_with_cache(tokens(), **options)
        _, theirs = THEIRS.run_with_cache(tokens(), **options)
        caches_close(mine, theirs)
    _, mine = ours().run_with_cache(tokens(1), remove_batch_dim=True, return_cache_object=False)
    _, theirs = THEIRS.run_with_cache(tokens(1), remove_batch_dim=True, return_cache_object=False)
    assert type(mine) is dict
    caches_close(mine, theirs)


def test_encoder_output() -> None:
    def scale(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value * 1.5

    for name in (None, "embed.hook_pos_embed", "blocks.1.hook_normalized_resid_post"):
        hooks = [] if name is None else [(name, scale)]
        with ours().hooks(fwd_hooks=hooks), THEIRS.hooks(fwd_hooks=hooks):
            mask = inputs("left")["one_zero_attention_mask"]
            close("encoder output", *(m.encoder_output(tokens(), None, mask) for m in (ours(), THEIRS)))


# --- text -------------------------------------------------------------------------------------------------------------

TEXTS = ["the cat [MASK] on a mat", ["the cat [MASK] on a [MASK]", "mary saw [MASK]"], "the [MASK] sat on [MASK] mat"]


@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("truncate", [True, False])
def test_to_tokens(text: Any, truncate: bool) -> None:
    many = [text] * 4 if isinstance(text, str) else text
    found = (model.to_tokens(many, truncate=truncate) for model in (ours(), THEIRS))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("return_type", ["logits", "predictions", None])
def test_forward_on_text(text: Any, return_type: Any) -> None:
    same_outcome("forward", *(outcome(lambda m=m: m(text, return_type=return_type)) for m in (ours(), THEIRS)))


# --- next sentence prediction -----------------------------------------------------------------------------------------


@cache
def both_next_sentence() -> tuple[BertNextSentencePrediction, Any]:
    return BertNextSentencePrediction(ours()), ReferenceNextSentence(THEIRS)


SENTENCES = ["the cat sat on a mat", "and then dog saw mary"]


@pytest.mark.parametrize("return_type", ["logits", "predictions", None])
def test_next_sentence_on_text(return_type: Any) -> None:
    calls = [outcome(lambda m=m: m(SENTENCES, return_type=return_type)) for m in both_next_sentence()]
    same_outcome("next sentence", *calls)


def test_next_sentence_tokens() -> None:
    for mine, theirs in zip(*(m.to_tokens(SENTENCES) for m in both_next_sentence()), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("given", [["one"], ["one", "two", "three"]])
def test_next_sentence_wants_two(given: list[str]) -> None:
    same_outcome("to_tokens", *(outcome(lambda m=m: m.to_tokens(given)) for m in both_next_sentence()))
    same_outcome("without types", *(outcome(lambda m=m: m(tokens())) for m in both_next_sentence()))


def test_next_sentence_cache() -> None:
    (output, mine), (expected, theirs) = (m.run_with_cache(tokens(), **inputs("right")) for m in both_next_sentence())
    close("next sentence", output, expected)
    caches_close(mine, theirs)
    assert "forward" not in vars(ours())


@pytest.mark.parametrize(("name", "edit"), edits_at([*NEXT_SENTENCE, "embed.ln.hook_scale", "hook_full_embed"]))
def test_next_sentence_edits(name: str, edit: str) -> None:
    compare(name, EDITS[edit], *both_next_sentence(), **inputs("right"))


def test_the_other_heads_points_do_not_fire() -> None:
    seen: list[str] = []
    with ours().hooks(fwd_hooks=[(lambda name: True, lambda value, hook: seen.append(hook.name))]):
        ours()(tokens())
        assert not [name for name in seen if name.startswith(("pooler", "nsp_head"))]
        seen.clear()
        both_next_sentence()[0](tokens(), **inputs("none"))
        assert not [name for name in seen if name.startswith(("mlm_head", "unembed"))]


# --- weights and config -----------------------------------------------------------------------------------------------


def test_state_dict() -> None:
    weights_close(ours().state_dict(), THEIRS.state_dict())


STACKED = [f"W_{x}" for x in ("Q", "K", "V", "O", "in", "out")] + [f"b_{x}" for x in ("Q", "K", "V", "O", "in", "out")]


@pytest.mark.parametrize("name", [*STACKED, "W_U", "b_U", "W_E", "W_pos", "W_E_pos"])
def test_weight_properties(name: str) -> None:
    close(name, getattr(ours(), name).as_subclass(torch.Tensor), getattr(THEIRS, name))


def test_circuits_and_labels() -> None:
    for name in ("QK", "OV"):
        close(name, getattr(ours(), name).AB, getattr(THEIRS, name).AB)
        close(name, getattr(ours().blocks[1].attn, name).AB, getattr(THEIRS.blocks[1].attn, name).AB)
    assert ours().all_head_labels() == THEIRS.all_head_labels()


def test_config() -> None:
    mine, theirs = (dataclasses.asdict(model.cfg) for model in (ours(), THEIRS))
    assert {name: (mine[name], theirs[name]) for name in theirs if mine[name] != theirs[name]} == {}


def test_components_by_themselves() -> None:
    generator = torch.Generator().manual_seed(4)
    stream = torch.randn(2, 5, 20, generator=generator)
    for part in ("mlm_head", "unembed", "pooler"):
        close(part, getattr(ours(), part)(stream), getattr(THEIRS, part)(stream))
    close("nsp_head", ours().nsp_head(stream[:, 0]), THEIRS.nsp_head(stream[:, 0]))
    close("block", ours().blocks[1](stream), THEIRS.blocks[1](stream))
    close("ln2", ours().blocks[1].ln2(stream), THEIRS.blocks[1].ln2(stream))
    close("embed", ours().embed(tokens()), THEIRS.embed(tokens()))
