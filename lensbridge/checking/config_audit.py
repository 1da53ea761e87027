"""What becomes of a family's points where its config says something else than the tiny one?

Each attribute that the modeling code reads is given other values, one at a time. A model that transformers builds and
runs with them must be served with what `check_model` checks, or be refused by the attribute's name; that it is served
with wrong values is a hole in the record. ``python -m lensbridge.checking.config_audit llama gpt2`` (all families by
default) prints the holes, and writes how each attribute went into the table that `lensbridge.config_reads` knows.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedConfig

from ..config_reads import IDLE, TABLE, attributes_read, compared_with
from ..errors import UnsupportedModelError
from ..tiny import tiny_config, tiny_model, tiny_tokens
from .config_values import others
from .families import recorded, refusal
from .hooking import hooked
from .known import KNOWN
from .report import check_model

#: What is checked of every model: seconds for a family.
CHEAP = ("points", "identities", "HuggingFace's values", "exactness")
#: What rounding may leave where numbers cancel, in models of odd proportions; a term that is forgotten leaves more.
ROUNDING = 1e-4
#: Family -> attribute -> why nothing else can be said of it.
LEFT_OUT: dict[str, dict[str, str]] = {
    "jetmoe": dict.fromkeys(
        ("num_attention_heads", "num_experts_per_tok", "num_key_value_heads"),
        "there are as many heads as key-value heads times experts for each token, whatever the config says",
    ),
    "xlstm": {
        "embedding_dim": "it is another name of hidden_size, which checkpoints set alike",
        "max_inference_chunksize": "the record takes it for the length of the context, and refuses longer texts",
    },
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"),
        {"num_codebooks": "a text is several rows of tokens then, which the checks' texts are not"},
    ),
}

#: The worst first: what is said of an attribute of which several values were tried.
STATUSES = ("fails", "refused", "works", "unchanged", "unbuildable")
Status = Literal["fails", "refused", "works", "unchanged", "unbuildable"]


@dataclass(frozen=True)
class Tried:
    """One attribute (a path below the text's config) at one other value, and how it went."""

    attribute: str
    value: Any
    status: Status
    detail: str = ""


def audit(key: str, groups: Sequence[str] = CHEAP, values: int | None = None) -> Iterator[Tried]:
    """Try other values for each attribute of the config of a family of `lensbridge.tiny.FAMILIES`.

    Args:
        groups: what is checked of models whose logits change, of `GROUPS`; of the others it is that they are served.
        values: how many values of an attribute are tried that transformers builds; all if not given.
    """
    config = tiny_config(key)
    base = tiny_model(config)
    logits = _logits(base)
    read = attributes_read(base) | {"tie_word_embeddings"}
    modules = sorted({type(module).__module__ for module in base.modules()})
    for attribute, candidates in _changes(config.get_text_config(decoder=True), read, modules):
        if attribute in LEFT_OUT.get(key.partition("@")[0], {}):
            continue
        built = 0
        for value in candidates:
            tried = _try(key, _with(config, attribute, value), base, logits, groups)
            yield Tried(attribute, value, *tried)
            built += tried[0] != "unbuildable"
            if built == values:
                break


def _try(key: str, config: Any, base: Any, logits: torch.Tensor, groups: Sequence[str]) -> tuple[Status, str]:
    try:
        model = tiny_model(config)
        same = _take_weights(model, base)
        after = _logits(model)
    except Exception as error:  # whatever transformers says of a config that makes no model
        return "unbuildable", f"{type(error).__name__}: {error}"
    same = same and torch.equal(after, logits)
    if not same and not (after.isfinite().all() and after.numel()):
        return "unbuildable", "logits that are not finite"
    try:
        found = hooked(model, key)
        report = check_model(found, KNOWN.get(key), groups if not same else ())
    except UnsupportedModelError as error:
        return "refused", str(error)
    except Exception as error:
        return "fails", f"{type(error).__name__}: {error}"
    failures = [each for each in report.failures if each.difference is None or each.difference > ROUNDING]
    if failures:
        return "fails", "; ".join(f"{each.group}: {each.check}: {each.detail}" for each in failures)
    return ("unchanged" if same else "works"), ""


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_tokens()).logits


def _take_weights(model: Any, base: Any) -> bool:
    """Give a model the weights of another where they have the same name and shape; whether that is everywhere."""
    theirs, mine = base.state_dict(), model.state_dict()
    shared = {name: value for name, value in theirs.items() if name in mine and mine[name].shape == value.shape}
    model.load_state_dict(shared, strict=False)
    return len(shared) == len(mine) == len(theirs)


def _with(config: Any, path: str, value: Any) -> Any:
    """A config that differs in one attribute, and in what its class works out from that."""
    changed = copy.deepcopy(config)
    *parts, name = path.split(".")
    holder = changed.get_text_config(decoder=True)
    for part in parts:
        holder = getattr(holder, part)
    try:
        setattr(holder, name, value)
    except Exception:  # a value that the class does not take: kept, to be found unbuildable
        vars(holder)[name] = value
        return changed
    try:
        return type(changed).from_dict(changed.to_dict())
    except Exception:  # a class that does not take what it gives
        return changed


def _changes(
    config: Any, read: Iterable[str], modules: list[str], prefix: str = ""
) -> Iterator[tuple[str, Iterator[Any]]]:
    """The attributes that the code reads and that could matter, each with the values to try."""
    for name in sorted(read):
        try:
            value = getattr(config, name, None)
        except Exception:  # what differs by layer
            continue
        if isinstance(value, PreTrainedConfig):
            yield from _changes(value, read, modules, f"{prefix}{name}.")
        elif not (IDLE.fullmatch(name) or callable(value) or (value is None and name.endswith("_config"))):
            texts = frozenset[str]().union(*(compared_with(module, name) for module in modules))
            yield prefix + name, others(name, value, sorted(texts))


def summary(key: str, tried: Iterable[Tried]) -> dict[str, str]:
    """Status -> the attributes of which it is the worst; "read" has those that the code reads besides."""
    worst: dict[str, Status] = {}
    for each in tried:
        before = worst.get(each.attribute, each.status)
        worst[each.attribute] = min(before, each.status, key=STATUSES.index)
    read = attributes_read(tiny_model(tiny_config(key))) - {path.rpartition(".")[2] for path in worst}
    found = {status: " ".join(path for path in sorted(worst) if worst[path] == status) for status in STATUSES}
    return {status: names for status, names in (found | {"read": " ".join(sorted(read))}).items() if names}


def main(keys: Sequence[str]) -> int:
    """Audit these families, or all, and write the table anew; 1 if there are holes."""
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    chosen = keys or [key for key in recorded() if refusal(key) is None]
    written = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}
    families, holes = written.get("families", {}) if keys else {}, 0
    for key in chosen:
        tried = list(audit(key))
        for each in tried:
            if each.status == "fails":
                holes += 1
                print(f"{key}: {each.attribute}={each.value!r}: {each.detail[:300]}", flush=True)
        families[key] = summary(key, tried)
        print(f"{key}: {len(tried)} configs", flush=True)
        table = {"transformers": transformers.__version__, "families": dict(sorted(families.items()))}
        TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
