"""Is `HookedEncoderDecoder` on HuggingFace's T5 equal to TransformerLens 3.9.0's, point by point, read and edited?"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from compat_tests.comparison import caches_close, close, outcome, same_outcome, weights_close
from compat_tests.edits import EDITS
from compat_tests.rough_encoders import VOCABULARY, edits_at, flags, out_of_place, reference, t5, tokenizer
from lensbridge import HookedEncoderDecoder

THEIRS = reference("t5")
#: 3.9.0's cross attention fails with ``use_attn_in``, so that its points cannot be compared.
NOT_THERE = ("hook_cross_attn_in", "rel_pos_hook", "hook_attn_in")
FLAGGED = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", "hook_result")
POINTS = [name for name in THEIRS.hook_dict if not name.endswith((*FLAGGED, *NOT_THERE))]


@cache
def ours() -> HookedEncoderDecoder:
    return HookedEncoderDecoder.from_pretrained("t5-small", hf_model=t5(), tokenizer=tokenizer(special=False))


def tokens(rows: int = 2, length: int = 7, seed: int = 3) -> torch.Tensor:
    return torch.randint(6, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs(padding: str = "right") -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, -3:] = 0
    mask = {"right": mask, "left": mask.flip(-1), "none": None}[padding]
    return {"decoder_input": tokens(2, 5, 8)} | ({} if mask is None else {"one_zero_attention_mask": mask})


def compare(name: str, edit: Any, **arguments: Any) -> None:
    """An edit at one point: outputs and everything cached on the way agree."""
    with ours().hooks(fwd_hooks=[(name, edit)]), THEIRS.hooks(fwd_hooks=[(name, out_of_place(edit))]):
        output, mine = ours().run_with_cache(tokens(), **arguments)
        expected, theirs = THEIRS.run_with_cache(tokens(), **arguments)
    close("output", output, expected)
    caches_close(mine, theirs)


def test_the_points_are_the_same_in_the_same_order() -> None:
    assert list(ours().hook_dict) == list(THEIRS.hook_dict)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_every_activation(padding: str) -> None:
    output, mine = ours().run_with_cache(tokens(), **inputs(padding))
    expected, theirs = THEIRS.run_with_cache(tokens(), **inputs(padding))
    close("output", output, expected)
    caches_close(mine, theirs)
    masks = {"attention_mask": inputs(padding).get("one_zero_attention_mask")}
    plain = t5()(input_ids=tokens(), decoder_input_ids=inputs()["decoder_input"], **masks).logits
    assert torch.equal(output, plain)
    assert torch.equal(ours()(tokens(), **inputs(padding)), plain)


@pytest.mark.parametrize(("name", "edit"), edits_at(POINTS))
def test_edit_at_every_point(name: str, edit: str) -> None:
    compare(name, EDITS[edit], **inputs())


@pytest.mark.parametrize(
    ("name", "edit"),
    edits_at([name for name in THEIRS.hook_dict if name.endswith((".hook_mlp_in", "attn.hook_result"))]),
)
def test_edit_at_points_that_need_a_flag(name: str, edit: str) -> None:
    with flags(ours(), THEIRS, "use_hook_mlp_in", "use_attn_result"):
        compare(name, EDITS[edit], **inputs("left"))


def test_minus_infinity_at_whole_rows_of_scores() -> None:
    def blind(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, 1, 2:4] = -torch.inf
        return value

    for name in ("encoder.0.attn", "decoder.1.attn", "decoder.0.cross_attn"):
        compare(f"{name}.hook_attn_scores", blind, **inputs())


@pytest.mark.parametrize("firing", [0, 1, 2, None])
def test_the_norm_before_attention_fires_for_each_projection(firing: int | None) -> None:
    """An edit at one of its firings reaches that projection only."""

    def at_one_firing() -> Any:
        count = iter(range(100))

        def edit(value: torch.Tensor, hook: Any) -> torch.Tensor | None:
            return value * 1.5 if next(count) == firing or firing is None else None

        return edit

    for point in ("scale", "normalized"):
        name = f"decoder.1.ln1.hook_{point}"
        with ours().hooks(fwd_hooks=[(name, at_one_firing())]), THEIRS.hooks(fwd_hooks=[(name, at_one_firing())]):
            _, mine = ours().run_with_cache(tokens(), **inputs())
            _, theirs = THEIRS.run_with_cache(tokens(), **inputs())
        for letter in "qkv":
            close(f"hook_{letter}", mine[f"decoder.1.attn.hook_{letter}"], theirs[f"decoder.1.attn.hook_{letter}"])
        close("logits", mine["unembed.hook_out"], theirs["unembed.hook_out"])


@pytest.mark.parametrize("name", POINTS)
def test_gradients(name: str) -> None:
    """At the point itself, with a backward hook that halves it, and at the beginning of both stacks."""
    found: dict[str, list[torch.Tensor]] = {}

    def halve(gradient: torch.Tensor, hook: Any) -> tuple[torch.Tensor]:
        gradients.append(gradient.clone())
        return (gradient * 0.5,)

    for which, model in (("ours", ours()), ("theirs", THEIRS)):
        gradients = found[which] = []
        leaves = [torch.zeros(18, requires_grad=True) for _ in range(2)]
        starts = ("hook_embed", "decoder.0.hook_resid_pre")
        added = [(start, lambda x, hook, leaf=leaf: x + leaf) for start, leaf in zip(starts, leaves, strict=True)]
        with model.hooks(fwd_hooks=added, bwd_hooks=[(name, halve)]):
            loss = model(tokens(), **inputs()).log_softmax(-1)[..., 3].sum()
            # The embedding lies before every point; its own gradient is not compared, because HF's is the head's too.
            embedding = t5().shared.weight if which == "ours" else THEIRS.W_E
            gradients += torch.autograd.grad(loss, [*leaves, embedding])[:2]
    assert len(found["ours"]) == len(found["theirs"]) > 2
    if ".ln1." in name:
        # Its three firings come in the order of the backward pass, which is nobody's promise.
        for gradients in found.values():
            gradients[:-2] = [torch.stack(gradients[:-2]).sum(0)]
    for mine, theirs in zip(found["ours"], found["theirs"], strict=True):
        close(f"gradient at {name}", mine, theirs)


# --- text -------------------------------------------------------------------------------------------------------------

TEXTS = ["the cat sat on a mat", ["the cat sat on a mat", "mary saw john"]]


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_text(text: Any) -> None:
    for mine, theirs in zip(*(model.to_tokens(text) for model in (ours(), THEIRS)), strict=True):
        assert torch.equal(mine, theirs)
    for options in ({}, {"return_type": None}, {"decoder_input": tokens(1 if isinstance(text, str) else 2, 4)}):
        same_outcome("forward", *(outcome(lambda m=m, o=options: m(text, **o)) for m in (ours(), THEIRS)))


def test_tokens_need_a_decoder_input() -> None:
    same_outcome("forward", *(outcome(lambda m=m: m(tokens())) for m in (ours(), THEIRS)))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "return_type": "tensor", "max_new_tokens": 4},
        {"do_sample": True, "top_k": 5, "temperature": 0.7, "freq_penalty": 0.5},
        {"do_sample": True, "top_p": 0.8, "stop_at_eos": False},
        {"do_sample": False, "eos_token_id": [7, 9, 11, 13, 15, 17, 19, 21]},
    ],
    ids=str,
)
@pytest.mark.parametrize("given", ["the cat sat on a mat", tokens()], ids=["text", "tokens"])
def test_generate(given: Any, options: dict[str, Any]) -> None:
    results = []
    for model in (ours(), THEIRS):
        torch.manual_seed(11)
        results.append(outcome(lambda m=model: m.generate(given, verbose=False, **options)))
    same_outcome("generate", *results)


def test_generate_with_hooks() -> None:
    def turn(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value.roll(3, -1)

    found = []
    for model in (ours(), THEIRS):
        with model.hooks(fwd_hooks=[("decoder_final_ln.hook_normalized", turn), ("encoder.0.attn.hook_z", turn)]):
            found.append(model.generate(tokens(), do_sample=False, verbose=False, max_new_tokens=6))
    assert torch.equal(*found)
    assert not torch.equal(found[0], ours().generate(tokens(), do_sample=False, verbose=False, max_new_tokens=6))


# --- weights and config -----------------------------------------------------------------------------------------------


def test_state_dict() -> None:
    weights_close(ours().state_dict(), THEIRS.state_dict())


STACKED = [f"W_{x}" for x in ("Q", "K", "V", "O", "in", "out")] + [f"b_{x}" for x in ("Q", "K", "V", "O", "in", "out")]


@pytest.mark.parametrize("name", [*STACKED, "W_U", "b_U", "W_E"])
def test_weight_properties(name: str) -> None:
    close(name, getattr(ours(), name).as_subclass(torch.Tensor), getattr(THEIRS, name))


def test_circuits_and_labels() -> None:
    for name in ("QK", "OV"):
        close(name, getattr(ours(), name).AB, getattr(THEIRS, name).AB)
    close("cross", ours().decoder[1].cross_attn.OV.AB, THEIRS.decoder[1].cross_attn.OV.AB)
    assert ours().all_head_labels() == THEIRS.all_head_labels()
    same_outcome("W_pos", *(outcome(lambda m=m: m.W_pos) for m in (ours(), THEIRS)))


def test_config() -> None:
    mine, theirs = (dataclasses.asdict(model.cfg) for model in (ours(), THEIRS))
    assert {name: (mine[name], theirs[name]) for name in theirs if mine[name] != theirs[name]} == {}


def test_moving_takes_torchs_own_arguments() -> None:
    for model in (ours(), THEIRS):
        assert model.to(dtype=torch.float32) is model
        assert model.to("cpu") is model
