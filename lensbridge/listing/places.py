"""Where in the HuggingFace model is a hook point, in words?"""

from __future__ import annotations

from typing import Any

from ..engine.attention_sites import AttentionInputSite, QKVSite, ZSite
from ..engine.expert_sites import ChosenSite, NeuronsSite, ScoredSite
from ..engine.norm_sites import CopySite, NormSite
from ..engine.places import AnyPlace, ArgumentPlace, FactorPlace, FirstPlace, Place, ResultPlace, RotatedPlace
from ..engine.sites import GateUpSite, PartSite, Site, SumSite


def places_of(model: Any) -> dict[str, str]:
    """Point -> its place, of a model on a HuggingFace model."""
    found: dict[str, str] = {}
    parts: dict[str, str] = {}
    for site in model.interior.engine.sites:
        if isinstance(site, PartSite):
            parts[site.names[0]] = place_in_words(site.place)
            continue
        for name in site.names:
            found[name] = _of(site, name)
            if isinstance(site, SumSite):
                found[name] += f" + {parts[name]}"
    return found


def _of(site: Site, name: str) -> str:
    place = place_in_words(site.place)
    if name.endswith((".hook_scale", ".hook_normalized")) and isinstance(site, NormSite | AttentionInputSite):
        assert site.norm is not None
        return f"computed from the input of {site.norm.path}"
    if isinstance(site, AttentionInputSite):
        return f"a copy of the {place} for each head"
    if isinstance(site, CopySite):
        return f"a copy of the {place}"
    if isinstance(site, NormSite):
        return f"output of {site.norm.path}"
    if isinstance(site, (QKVSite, GateUpSite)) and len(site.names) > 1:
        return f"a part of the {place}"
    if isinstance(site, ZSite) and name == site.result:
        return f"computed from the {place}"
    if isinstance(site, NeuronsSite):
        return f"computed from what {site.path} is given"
    if isinstance(site, ChosenSite | ScoredSite):
        return f"made from the {place}"
    return place


def place_in_words(place: AnyPlace) -> str:
    """A place of the HF model in words."""
    if isinstance(place, Place):
        return _of_module(place)
    if isinstance(place, ArgumentPlace):
        return f"argument {place.argument} of the call of attention in {place.path}"
    if isinstance(place, ResultPlace):
        return f"what the call of attention in {place.path} returns"
    if isinstance(place, RotatedPlace):
        return f"{'queries' if place.letter == 'q' else 'keys'} as they meet in {place.path}"
    return f"{place.side} of the softmax in {place.path}"


def _of_module(place: Place) -> str:
    words = f"{place.side} of {place.path}"
    if place.call:
        words = f"{words} (its call number {place.call + 1})"
    if isinstance(place, FirstPlace):
        words = f"the first stream of the {words}"
    if isinstance(place, FactorPlace):
        owner = f"{place.owner}." if place.owner else ""
        for sign, term in ((" * ", place.factor), (" + ", place.bias)):
            if term is not None:
                words += sign + (f"{owner}{term}" if isinstance(term, str) else "a factor")
    return words
