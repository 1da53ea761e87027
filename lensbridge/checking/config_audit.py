"""What becomes of a family's points where its config says something else than the tiny one?

Each attribute that the modeling code reads is given other values, one at a time. A model that transformers builds and
runs with them must be served with everything that `GROUPS` checks, or be refused by the attribute's name; that it is
served with wrong values is a hole in the record.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..errors import UnsupportedModelError
from ..tiny import sizes, tiny_config, tiny_model, tiny_tokens
from .config_reads import attributes_read, compared_with
from .hooking import hooked
from .known import KNOWN
from .report import GROUPS, check_model

#: What is checked of every model: seconds for a family.
CHEAP = ("points", "identities", "HuggingFace's values", "exactness")
#: What says nothing of the function: what is only there in training, or asked of its output, or where it runs.
IDLE = re.compile(
    r".*(dropout|_pdrop|drop_rate|layerdrop|loss|problem_type|label|output_|return_dict|summary_|gradient_checkpointing"
    r"|initializer|init_|use_cache|chunk_size_applied|architectures|aux|z_coef|jitter|_name_or_path|dtype).*"
)

#: A size that no rule gives.
UNUSUAL = 997

Status = Literal["unchanged", "works", "refused", "fails", "unbuildable"]


@dataclass(frozen=True)
class Tried:
    """One attribute (below the text's config) at one other value, and how it went."""

    attribute: str
    value: Any
    status: Status
    detail: str = ""


def audit(key: str, groups: Sequence[str] = CHEAP) -> Iterator[Tried]:
    """Try other values for each attribute of the config of a family of `lensbridge.tiny.FAMILIES`."""
    config = tiny_config(key)
    base = tiny_model(config)
    logits = _logits(base)
    for attribute, value in _changes(config, base):
        yield _try(key, config, base, logits, attribute, value, groups)


def _try(
    key: str, config: Any, base: Any, logits: torch.Tensor, attribute: str, value: Any, groups: Sequence[str]
) -> Tried:
    try:
        changed = copy.deepcopy(config)
        _set(changed, attribute, value)
        model = tiny_model(changed)
        same = _take_weights(model, base)
        after = _logits(model)
    except Exception as error:
        return Tried(attribute, value, "unbuildable", f"{type(error).__name__}: {error}".split("\n")[0][:200])
    same = same and after.shape == logits.shape and torch.equal(after, logits)
    if not same and not after.isfinite().all():
        return Tried(attribute, value, "unbuildable", "logits that are not finite")
    try:
        report = check_model(hooked(model, key), KNOWN.get(key), groups)
    except UnsupportedModelError as error:
        return Tried(attribute, value, "refused", str(error))
    except Exception as error:
        return Tried(attribute, value, "fails", f"{type(error).__name__}: {error}")
    if report.failures:
        detail = "; ".join(f"{each.group}: {each.check}: {each.detail}" for each in report.failures)
        return Tried(attribute, value, "fails", detail)
    return Tried(attribute, value, "unchanged" if same else "works")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_tokens()).logits


def _take_weights(model: Any, base: Any) -> bool:
    """Give a model the weights of another where they have the same name and shape; whether that is everywhere."""
    theirs, mine = base.state_dict(), model.state_dict()
    shared = {name: value for name, value in theirs.items() if name in mine and mine[name].shape == value.shape}
    model.load_state_dict(shared, strict=False)
    return len(shared) == len(mine) == len(theirs)


def _set(config: Any, path: str, value: Any) -> None:
    *parts, name = path.split(".")
    text = config.get_text_config(decoder=True)
    for part in parts:
        text = getattr(text, part)
    setattr(text, name, value)


def _changes(config: Any, base: Any) -> Iterator[tuple[str, Any]]:
    """The attributes that the code reads, each with the values to try."""
    read = attributes_read(base) | {"tie_word_embeddings"}
    modules = sorted({type(module).__module__ for module in base.modules()})
    text = config.get_text_config(decoder=True)
    yield from _of_config(text, "", read, modules)


def _of_config(config: Any, prefix: str, read: frozenset[str], modules: list[str]) -> Iterator[tuple[str, Any]]:
    for name in sorted(read):
        if IDLE.fullmatch(name) or not hasattr(config, name) and name.endswith("_config"):
            continue
        try:
            value = getattr(config, name, None)
        except Exception:  # attributes that differ by layer raise
            continue
        if callable(value) or name in ("vocab_size", "num_hidden_layers"):
            continue
        if isinstance(value, PreTrainedConfig):
            yield from _of_config(value, f"{prefix}{name}.", read, modules)
            continue
        texts = frozenset[str]().union(*(compared_with(module, name) for module in modules))
        for other in _others(name, value, sorted(texts)):
            if type(other) is not type(value) or other != value:
                yield prefix + name, other


def _others(name: str, value: Any, texts: list[str]) -> Iterator[Any]:
    """Other values of one attribute."""
    if name in ("rope_parameters", "rope_scaling"):
        yield from _ropes(value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, str):
        yield from ([other for other in ("relu", "silu", "gelu") if other != value] if value in ACT2FN else texts)
    elif isinstance(value, float):
        yield 0.05 if "eps" in name else value * 1.5 if value else 0.3
        if "eps" not in name and value not in (0.0, 1.0):
            yield 1.0
    elif isinstance(value, int):
        yield from (value * 2, value // 2) if _is_size(name) else (value + 1, 0, 1, 2, value * 2, -1)
    elif value is None:
        yield from _of_none(name, texts)
    elif isinstance(value, (list, tuple)):
        yield from (type(value)(each) for each in _lists(value, texts))


def _of_none(name: str, texts: list[str]) -> Iterator[Any]:
    if texts:
        yield from texts
    if "token" in name:
        yield 3
        return
    if _is_size(name):
        yield sizes.size_of(name, UNUSUAL)
    elif name.startswith(("is_", "use_")):
        yield from (True, False)
    elif name == "layer_types":
        yield ["sliding_attention", "full_attention"]
    elif not texts:
        yield from (True, 2, 0.7, 1.5, "silu")


def _is_size(name: str) -> bool:
    """Whether a rule of the tiny configs knows the attribute as a size."""
    return sizes.size_of(name, UNUSUAL) != UNUSUAL


def _lists(value: Sequence[Any], texts: list[str]) -> Iterator[list[Any]]:
    yield list(reversed(value))
    kinds: dict[Any, None] = dict.fromkeys([*value, *texts]) if all(isinstance(each, str) for each in value) else {}
    for kind in kinds:
        yield [kind] * len(value)
    if value and all(isinstance(each, (int, float)) for each in value):
        for factor in (0, 1, 2):
            yield [type(each)(each * factor) for each in value]
        yield [1] * len(value)


def _ropes(value: Any) -> Iterator[Any]:
    """Every way to scale rotary frequencies that transformers knows."""
    if not isinstance(value, dict):
        return
    nested = {name: each for name, each in value.items() if isinstance(each, dict)}
    if nested:
        for name, each in nested.items():
            for other in _ropes(each):
                yield value | {name: other}
        return
    common = {"rope_theta": 10000.0} | {name: each for name, each in value.items() if name not in ("rope_type", "type")}
    yield common | {"rope_type": "default", "rope_theta": 777.0}
    yield common | {"rope_type": "linear", "factor": 2.0}
    yield common | {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    yield common | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    yield common | {
        **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8,
    }
    yield common | {"rope_type": "proportional", "factor": 2.0}
    yield common | {"rope_type": value.get("rope_type", "default"), "partial_rotary_factor": 0.5}


__all__ = ["CHEAP", "GROUPS", "Tried", "audit"]
