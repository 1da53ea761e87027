"""Is `HookedAudioEncoder` on HuggingFace's HuBERT and wav2vec 2.0 equal to TransformerLens 3.9.0's?"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor

from compat_tests.comparison import caches_close, close, outcome, same_outcome
from compat_tests.edits import EDITS
from compat_tests.rough_encoders import edits_at, flags, out_of_place, reference, sound, waves
from lensbridge import HookedAudioEncoder

KINDS = ("hubert", "wav2vec2")
FLAGGED = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", "hook_result")
FLAGS = ("use_split_qkv_input", "use_hook_mlp_in", "use_attn_result")
NAMES = list(reference("hubert").hook_dict)


@cache
def ours(kind: str) -> HookedAudioEncoder:
    name = "facebook/hubert-base-ls960" if kind == "hubert" else "facebook/wav2vec2-base"
    model = HookedAudioEncoder.from_pretrained(name, hf_model=sound(kind))
    model.processor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return model


def frames() -> torch.Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(9))


def mask(padding: str) -> torch.Tensor | None:
    ones = torch.ones(2, 6, dtype=torch.long)
    ones[1, -2:] = 0
    return {"right": ones, "left": ones.flip(-1), "none": None}[padding]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_on_frames(kind: str, padding: str) -> None:
    given, before = frames(), frames()
    output, mine = ours(kind).run_with_cache(given, mask(padding))
    expected, theirs = reference(kind).run_with_cache(frames(), mask(padding))
    close("output", output, expected)
    caches_close(mine, theirs)
    assert torch.equal(given, before)


@pytest.mark.parametrize("kind", KINDS)
def test_waveforms(kind: str) -> None:
    """3.9.0's result for a single waveform, a batch of unequal ones, and one with two channels; and HF's own."""
    stereo = torch.stack([waves()[0], waves((64,))[0]], dim=1)
    for given in (waves()[0], waves(), waves()[0].numpy(), [wave.tolist() for wave in waves()], [stereo]):
        mine, theirs = (model.to_frames(given) for model in (ours(kind), reference(kind)))
        # 3.9.0 hands out wav2vec 2.0's pair of projected and normed features.
        close("frames", mine[0], theirs[0][0] if isinstance(theirs[0], tuple) else theirs[0])
        assert torch.equal(mine[1], theirs[1])
        close("output", ours(kind)(given), reference(kind)(given))
    prepared = ours(kind).processor(
        [w.numpy() for w in waves()], sampling_rate=16000, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(ours(kind)(waves()), sound(kind)(**prepared).last_hidden_state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_frames_and_mask(kind: str) -> None:
    both = (frames(), mask("right"))
    close("output", ours(kind)(both), reference(kind)(both))
    close("output", ours(kind).encoder_output(*both), reference(kind).encoder_output(*both))


@pytest.mark.parametrize(("name", "edit"), edits_at(NAMES))
def test_edit_at_every_point(name: str, edit: str) -> None:
    mine, theirs = ours("hubert"), reference("hubert")
    with (
        flags(mine, theirs, *FLAGS),
        mine.hooks(fwd_hooks=[(name, EDITS[edit])]),
        theirs.hooks(fwd_hooks=[(name, out_of_place(EDITS[edit]))]),
    ):
        output, cache_ = mine.run_with_cache(frames(), mask("right"))
        expected, reference_cache = theirs.run_with_cache(frames(), mask("right"))
    close("output", output, expected)
    caches_close(cache_, reference_cache)


@pytest.mark.parametrize("kind", KINDS)
def test_points_weights_and_config(kind: str) -> None:
    mine, theirs = ours(kind), reference(kind)
    assert list(mine.hook_dict) == list(theirs.hook_dict)
    # 3.9.0's has the convolutions' weights besides, under HF's names.
    for name, weight in theirs.state_dict().items():
        if not name.startswith("hubert_model."):
            close("weights", mine.state_dict()[name], weight) if weight.dtype.is_floating_point else None
    for name in [f"{kind_}_{x}" for kind_ in "Wb" for x in ("Q", "K", "V", "O", "in", "out")]:
        close(name, getattr(mine, name).as_subclass(torch.Tensor), getattr(theirs, name))
    for name in ("QK", "OV"):
        close(name, getattr(mine, name).AB, getattr(theirs, name).AB)
    assert mine.all_head_labels() == theirs.all_head_labels()
    configs = [dataclasses.asdict(model.cfg) for model in (mine, theirs)]
    assert {
        name: (configs[0][name], configs[1][name]) for name in configs[1] if configs[0][name] != configs[1][name]
    } == {}


@pytest.mark.parametrize("given", ["text", 3, [3]], ids=str)
def test_what_is_no_waveform(given: Any) -> None:
    same_outcome("to_frames", *(outcome(lambda m=m: m.to_frames(given)) for m in (ours("hubert"), reference("hubert"))))
