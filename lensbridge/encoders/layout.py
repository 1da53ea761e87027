"""Which sites does an encoder have, and where?

Each row of its family becomes the sites that serve the row's points; rows of modules that this HF model does not have
(a head that it was made without) are left out.
"""

from __future__ import annotations

from typing import Any

from ..engine.norm_sites import Norm
from ..engine.places import Place
from ..engine.sites import PlainSite, Site
from .record import At, AttentionAt, Family, NormAt, Row, Stack, joined
from .sites import LETTERS, HeadsSite, InputsSite, Modules, NormSite, PatternSite, RowsSite, ScoresSite, ZSite


def sites_of(family: Family, hf_model: Any) -> list[Site]:
    """Every site, in the order of the family's rows."""
    there = dict(hf_model.named_modules(remove_duplicate=False))
    sites: list[Site] = []
    for prefix, path, row in placed(family, hf_model):
        if not isinstance(row, AttentionAt) and joined(path, row.path) not in there:
            continue
        sites += _sites_of_row(family, prefix, path, row, hf_model.get_submodule)
    return sites


def placed(family: Family, hf_model: Any) -> list[tuple[str, str, Row]]:
    """(TransformerLens' name, HF's path, row) of every row: those of its layer, and empty outside of the stacks."""
    rows: list[tuple[str, str, Row]] = []
    for part in family.parts:
        if isinstance(part, Stack):
            for layer in range(len(hf_model.get_submodule(part.path))):
                rows += [(f"{part.name}.{layer}", f"{part.path}.{layer}", row) for row in part.rows]
        else:
            rows.append(("", "", part))
    return rows


def attentions_of(family: Family, hf_model: Any) -> list[str]:
    """The paths of the modules with a softmax in their forward."""
    rows = placed(family, hf_model)
    return [joined(path, row.path) for _, path, row in rows if isinstance(row, AttentionAt)]


def point_names(family: Family, hf_model: Any) -> list[str]:
    """Every point of the model, in the order of TransformerLens' components."""
    names: list[str] = []
    done: set[str] = set()
    for template in family.points:
        stack = next((stack for stack in family.stacks if template.startswith(f"{stack.name}.")), None)
        if stack is None:
            names.append(template)
        elif stack.name not in done:
            done.add(stack.name)
            own = [template for template in family.points if template.startswith(f"{stack.name}.")]
            for layer in range(len(hf_model.get_submodule(stack.path))):
                # One that names a layer is that layer's alone.
                filled = [template.replace("{l}", str(layer)) for template in own]
                names += [name for name in filled if name.startswith(f"{stack.name}.{layer}.")]
    return names


def flags_of(family: Family, hf_model: Any) -> dict[str, str]:
    """The config field that turns a point on, of each point that has one."""
    flags: dict[str, str] = {}
    for prefix, _, row in placed(family, hf_model):
        if isinstance(row, At) and row.flag is not None:
            flags[joined(prefix, row.point)] = row.flag
        elif isinstance(row, AttentionAt):
            flags[joined(prefix, row.name, "hook_result")] = "use_attn_result"
            if row.reads is not None:
                flags |= {f"{prefix}.hook_{letter}_input": "use_split_qkv_input" for letter in LETTERS}
                flags |= {f"{prefix}.hook_attn_in": "use_attn_in"} if row.together else {}
    return flags


def _sites_of_row(family: Family, prefix: str, path: str, row: Row, modules: Modules) -> list[Site]:
    if isinstance(row, At):
        kind = RowsSite if row.per_row else PlainSite
        return [kind(joined(prefix, row.point), Place(joined(path, row.path), row.side))]
    if isinstance(row, NormAt):
        return [NormSite(joined(prefix, row.name), _norm(family, joined(path, row.path), modules), modules)]
    if isinstance(row, AttentionAt):
        return _attention_sites(family, prefix, path, row, modules)
    return []


def _attention_sites(family: Family, prefix: str, path: str, row: AttentionAt, modules: Modules) -> list[Site]:
    name, inputs = joined(prefix, row.name), None
    sites: list[Site] = []
    if row.reads is not None:
        norm = None if row.norm is None else _norm(family, joined(path, row.norm.path), modules)
        inputs = InputsSite(prefix, path, row, norm, modules)
        sites.append(inputs)
    sites += [HeadsSite(f"{name}.hook_{each}", joined(path, getattr(row, each)), inputs, modules) for each in LETTERS]
    scores = ScoresSite(f"{name}.hook_attn_scores", joined(path, row.path), row.infinite)
    pattern = PatternSite(f"{name}.hook_pattern", joined(path, row.path), scores)
    return [*sites, scores, pattern, ZSite(name, joined(path, row.o), modules)]


def _norm(family: Family, path: str, modules: Modules) -> Norm:
    return Norm(path, float(getattr(modules(path), family.norm_epsilon)), family.norm == "LN")
