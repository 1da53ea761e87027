"""What is the full name of the activation that a shorthand means?

The full name of an activation says where it is (``blocks.6.attn.hook_k``); people write ``k6`` or ``("k", 6)``. Most
short names exist in one place of a block only, so the place is looked up; ``scale`` and ``normalized`` exist at every
norm and need it said (``scale4ln1``).
"""

from __future__ import annotations

import re

#: Activations that exist once per block, by the part of the block that holds them.
_HOME = {
    **dict.fromkeys(("q", "k", "v", "z", "rot_q", "rot_k", "result", "pattern", "attn_scores"), "attn"),
    **dict.fromkeys(("pre", "pre_linear", "mid", "post"), "mlp"),
}

_NAME_ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}

_PART_ALIASES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}

#: Activations of a norm; without a layer they are those of the final norm.
_OF_NORMS = ("scale", "normalized")

#: "k6", "scale4ln1": a name, a layer, and perhaps a part of the block.
_SHORTHAND = re.compile(r"([a-z]+)(\d+)(.*)")


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The hook name that a short name, a layer and a part of the block stand for (TransformerLens' shorthand).

    ``layer_type`` is a part of the block: ``"attn"`` (or ``"a"``), ``"mlp"`` (``"m"``), ``"ln1"``, ..., or ``"b"`` for
    the block itself. A name with a layer in it (``"k6"``, ``"scale4ln1"``) overrides the other arguments. A name that
    is already full (it has a dot or begins with ``hook_``) is returned as it is when nothing else is given. The result
    is built from the rules alone: no model is asked whether the point exists.

        >>> get_act_name("k", 6, "a"), get_act_name("pre5"), get_act_name("embed")
        ('blocks.6.attn.hook_k', 'blocks.5.mlp.hook_pre', 'hook_embed')
        >>> get_act_name("scale4ln1"), get_act_name("scale")
        ('blocks.4.ln1.hook_scale', 'ln_final.hook_scale')
    """
    if layer is None and layer_type is None and ("." in name or name.startswith("hook_")):
        return name
    shorthand = _SHORTHAND.match(name)
    if shorthand:
        name, layer, layer_type = shorthand.groups()
    name = _NAME_ALIASES.get(name, name)
    part = _HOME.get(name) or _PART_ALIASES.get(layer_type or "", layer_type)
    pieces = [f"blocks.{layer}"] if layer is not None else []
    if layer is None and name in _OF_NORMS:
        pieces.append("ln_final")
    if part:
        pieces.append(part)
    return ".".join([*pieces, f"hook_{name}"])
