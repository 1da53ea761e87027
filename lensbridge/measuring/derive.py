"""Which record describes what was measured?

A record says only what differs from the defaults, and what one layer has that others do not by the modules that tell
them apart. Norms are described once for the whole model, so those that do not fit the others are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from ..architectures.forms import Refusal
from ..architectures.record import LLAMA_KINDS, Architecture, Block
from ..hf_config import USUAL_NAMES, usual
from ..points import POINTS
from .facts import Facts
from .findings import BLOCK, NEURONS, Findings
from .norms import EPSILONS, NormFact

#: The roles of a block that are norms, and the points that each is shown at.
NORMS = {
    "ln1": (f"{BLOCK}ln1.",),
    "ln2": (f"{BLOCK}ln2.",),
    "ln1_post": (f"{BLOCK}ln1_post.",),
    "ln2_post": (f"{BLOCK}ln2_post.",),
    "q_norm": (f"{BLOCK}attn.q_norm.",),
    "k_norm": (f"{BLOCK}attn.k_norm.",),
    "z_norm": (f"{BLOCK}attn.hook_result",),
    "neuron_norm": NEURONS,
}
#: Field of TransformerLens' config -> what is in the name of an attribute that holds it.
WORDS = {
    "n_heads": ("head", "num", "n_"),
    "d_head": ("head", "dim", "size"),
    "act_fn": ("act", "fn", "func"),
    "attn_scores_soft_cap": ("cap", "attn", "attention"),
    "output_logits_soft_cap": ("cap", "final", "output"),
}


def derive(facts: Facts, hf_config: Any) -> Architecture:
    """The record of what was measured, with the layers of the model that it was measured on.

    Args:
        hf_config: of that model; it tells what fields of TransformerLens' config are called there.
    """
    formula, misfits = _formula(facts)
    blocks = [_block(layer, misfits, f"{facts.whole.fields['layers']}.{i}.") for i, layer in enumerate(facts.layers)]
    config, constants = _naming(facts, hf_config)
    record = Architecture(
        model_type=facts.model_type,
        hf_class=facts.hf_class,
        **_changed(Architecture, facts.whole.fields | formula),
        config=config,
        constants=constants,
        lacks=refusals(facts.whole.reasons),
    )
    lists = {
        name: value for name, value in vars(hf_config.get_text_config(decoder=True)).items() if _lists(value, blocks)
    }
    return with_blocks(record, blocks, facts.modules, lists)


def _lists(value: Any, blocks: list[Block]) -> bool:
    """Whether an entry of a config says something of each layer."""
    return isinstance(value, list | tuple) and len(value) == len(blocks) and all(map(_simple, value))


def _simple(entry: Any) -> bool:
    return isinstance(entry, str | int | float | bool)


def _changed(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not the class's defaults."""
    defaults = {each.name: each.default for each in fields_of(cls)}
    return {name: value for name, value in values.items() if value != defaults[name]}


# --- norms ------------------------------------------------------------------------------------------------------------


def _formula(facts: Facts) -> tuple[dict[str, Any], dict[str, str]]:
    """(the fields that say how all norms work, path -> why a norm does not fit)."""
    used = _used(facts)
    known = {path: fact for path, fact in facts.norms.items() if path in used}
    if not known:
        return {}, {}
    shape = Counter((fact.kind, fact.offset, _written_eps(fact)) for fact in known.values())
    # The stream's own norms decide, of which there are most.
    kind, offset, eps = shape.most_common(1)[0][0]
    misfits = {}
    for path, fact in known.items():
        if (fact.kind, _written_eps(fact)) != (kind, eps) or (fact.offset != offset and fact.has_gain):
            misfits[path] = "its formula is not that of the model's other norms"
    found = {"norm": kind, "gain_offset": offset, "norm_eps": eps}
    return {name: value for name, value in found.items() if value is not None}, misfits


def _written_eps(fact: NormFact) -> float | None:
    """Epsilon, where it is no attribute that norms usually have."""
    return None if fact.eps_attribute in EPSILONS else fact.eps


def _used(facts: Facts) -> set[str]:
    """The paths of the norms that have a role."""
    root = facts.whole.fields["layers"]
    paths = {facts.whole.fields.get("ln_final"), facts.whole.fields.get("embed_norm")}
    for index, layer in enumerate(facts.layers):
        paths |= {f"{root}.{index}.{layer.fields[role]}" for role in NORMS if layer.fields.get(role) is not None}
    return {path for path in paths if path is not None}


# --- layers -----------------------------------------------------------------------------------------------------------


def _block(layer: Findings, misfits: Mapping[str, str], prefix: str) -> Block:
    """What the layer whose paths begin so is made of: what is of no use there is left as it is by default."""
    values, reasons = dict(layer.fields), dict(layer.reasons)
    for role, points in NORMS.items():
        if values.get(role) is not None and prefix + values[role] in misfits:
            reasons |= dict.fromkeys(points, misfits[prefix + values[role]])
            values[role] = None
    if values["attn"] is None:
        for role in ("softmax", "rotary", "query_argument"):
            values.pop(role, None)
    if values.get("qkv") is not None:
        values = {role: value for role, value in values.items() if role not in ("q", "k", "v")}
    if not values.get("rotary") and not ("v" in values and values["v"] is None):
        values.pop("query_argument", None)
    block = Block(**_changed(Block, values))
    found = refusals(reasons, BLOCK)
    return replace(block, refusals=found) if found else block


def refusals(reasons: Mapping[str, str], prefix: str = "") -> tuple[Refusal, ...]:
    """The reasons, each with the points that it is about: names in the table, without ``prefix``.

    A reason may be about all points whose names begin so (`Findings`).
    """
    found: dict[str, dict[str, None]] = {}
    for about, reason in reasons.items():
        names = [
            row.name for row in POINTS if row.name == about or (about.endswith(".") and row.name.startswith(about))
        ]
        found.setdefault(reason, {}).update(dict.fromkeys(name.removeprefix(prefix) for name in names))
    return tuple(Refusal(tuple(points), reason) for reason, points in found.items() if points)


def with_blocks(
    record: Architecture, blocks: list[Block], modules: list[frozenset[str]], lists: Mapping[str, Any]
) -> Architecture:
    """The record with a block, and kinds of layers, that give these blocks to layers with these modules.

    Where no module tells layers apart, one of the config's ``lists`` may; or else the record holds the blocks of this
    very model, and is no other's.
    """
    often = sorted({repr(block): block for block in blocks}.values(), key=lambda block: -blocks.count(block))
    unsaid = _unsaid(blocks, modules)
    for base in often:
        plain = [replace(block, **{name: getattr(base, name) for name in unsaid}) for block in blocks]
        kinds = _kinds(base, plain, modules)
        if kinds is None:
            continue
        found = replace(record, block=base, kinds=kinds, blocks=())
        if any(found.block_with(there) != block for there, block in zip(modules, plain, strict=True)):
            continue
        by_layer = _by_layer(plain, blocks, lists)
        if by_layer is not None:
            return replace(found, by_layer=by_layer)
    return replace(record, block=often[0], blocks=tuple(blocks))


def _unsaid(blocks: list[Block], modules: list[frozenset[str]]) -> list[str]:
    """The fields in which layers with the same modules differ."""
    found: dict[str, None] = {}
    for block, there in zip(blocks, modules, strict=True):
        for other, its in zip(blocks, modules, strict=True):
            if there == its:
                found |= dict.fromkeys(_difference(block, other))
    return list(found)


def _by_layer(plain: list[Block], blocks: list[Block], lists: Mapping[str, Any]) -> dict[str, Any] | None:
    """A list of the config's that tells what changes the plain blocks into the others; None if there is none."""
    changes = [_difference(one, other) for one, other in zip(plain, blocks, strict=True)]
    if not any(changes):
        return {}
    for name, entries in lists.items():
        by_entry: dict[Any, dict[str, Any]] = {}
        agree = [by_entry.setdefault(entry, change) == change for entry, change in zip(entries, changes, strict=True)]
        if all(agree):
            return {name: {entry: change for entry, change in by_entry.items() if change}}
    return None


def _kinds(base: Block, blocks: list[Block], modules: list[frozenset[str]]) -> dict[str, dict[str, Any]] | None:
    """Module -> what its presence changes in ``base``; None if no module tells some layers from the others."""
    kinds: dict[str, dict[str, Any]] = {}
    for block in {repr(block): block for block in blocks}.values():
        mine = [there for there, other in zip(modules, blocks, strict=True) if other == block]
        others = [there for there, other in zip(modules, blocks, strict=True) if other != block]
        for path in LLAMA_KINDS:
            if path in frozenset.intersection(*mine) and path not in frozenset().union(*others):
                kinds[path] = _difference(base, block)
        if block == base:
            continue
        marks = frozenset.intersection(*mine) - frozenset().union(*others)
        if not marks:
            return None
        roles = {value for value in _difference(base, block).values() if isinstance(value, str)}
        mark = min(marks, key=lambda path: (path not in LLAMA_KINDS, path not in roles, path.count("."), path))
        kinds[mark] = _difference(base, block)
    return {path: change for path, change in kinds.items() if not _said(base, path, change)}


def _said(base: Block, path: str, change: Mapping[str, Any]) -> bool:
    """Whether Llama's kinds say the same."""
    return path in LLAMA_KINDS and replace(base, **LLAMA_KINDS[path]) == replace(base, **change)


def _difference(base: Block, block: Block) -> dict[str, Any]:
    names = [each.name for each in fields_of(Block)]
    return {name: getattr(block, name) for name in names if getattr(block, name) != getattr(base, name)}


# --- what the config calls things -------------------------------------------------------------------------------------


def _naming(facts: Facts, hf_config: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """(field of TransformerLens' config -> attribute of HF's, field -> value), where usual names do not lead there."""
    config: dict[str, str] = {}
    constants: dict[str, Any] = {}
    text = hf_config.get_text_config(decoder=True)
    for name, value in facts.values.items():
        if name not in WORDS:
            constants[name] = value
            continue
        if _agrees(usual(text, name) if name in USUAL_NAMES else _by_default(text, name), value):
            continue
        attribute = _attribute(text, name, value)
        if attribute is not None:
            config[name] = attribute
        elif name != "output_logits_soft_cap":
            constants[name] = value
    return config, constants


def _by_default(text: Any, name: str) -> Any:
    """What a field is if nobody says anything."""
    if name != "d_head":
        return None
    heads = usual(text, "n_heads")
    return getattr(text, "head_dim", None) or (getattr(text, "hidden_size", 0) // heads if heads else None)


def _agrees(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 * abs(other)
    return one == other


def _attribute(text: Any, name: str, value: Any) -> str | None:
    """The attribute of a HF config with this value whose name is the most like what it should be."""
    found = [key for key, held in vars(text).items() if type(held) is type(value) and _agrees(held, value)]
    likely = [key for key in found if any(word in key for word in WORDS[name])]
    return max(likely, key=lambda key: sum(word in key for word in WORDS[name])) if likely else None
