"""What does the page ``docs/hook-points.md`` say? What ``lensbridge/points.py`` says, as a table for people.

``python docs/make_hook_points.py`` writes the page; a test checks that it is up to date.
"""

from __future__ import annotations

import json
from pathlib import Path

from lensbridge.points import FLAG_SETTERS, POINTS, Point
from lensbridge.utilities import get_act_name

PAGE = Path(__file__).with_name("hook-points.md")

HEAD = """\
# Hook points

<!-- Made by docs/make_hook_points.py from lensbridge/points.py; edit these. -->

The hook points of TransformerLens 3.9.0, in the order in which a forward pass reaches them. A name is what
`run_with_hooks`, `hooks`, `add_hook` and `names_filter` take, with the number of a layer for `{l}`; the next column is
how an `ActivationCache` gives the same tensor. With the processing of `from_pretrained`, values and weights are in the
processed basis and the equations hold there ([design.md](design.md) says how).

- `x` is the residual stream at that point, `n` what the norm before a branch passes on (with its gain and bias, unless
  processing has folded them into the weights that follow), and a weight is the one of the same layer.
- Sizes: `batch` and `pos` are those of the input; `head` is `cfg.n_heads`; `d_model`, `d_head`, `d_mlp` and `d_vocab`
  are fields of `cfg`. `query_pos` and `key_pos` are positions too; with a key-value cache, `key_pos` counts the cached
  ones.
- A point with an entry under "turned on by" is off until that setter is called with `True`. Asking by name for a point
  that is off is an error that names the setter.
- A point with an entry in the last column exists in families that have that: GPT-2 has learned positions, norms before
  its branches, and is sequential; Llama has rotary positions and a gate. The mean of x is taken out by LayerNorms only.
- Once `set_use_split_qkv_input` or `set_use_attn_in` is on, the `ln1` points have a `head` axis too:
  `batch pos head 1` and `batch pos head d_model`.

"""


def in_cache(point: Point) -> str:
    """How a cache is asked for the point: the shortest key that leads to its name."""
    short = point.name.rsplit(".", 1)[-1].removeprefix("hook_")
    part = point.name.split(".")[-2] if point.name.count(".") else ""
    keys = [(short, "{l}"), (short, "{l}", part)] if point.in_layer else [(short,), (point.name,)]
    key = next((key for key in keys if get_act_name(*key) == point.name), None)
    if key is None:
        return f'cache[f"{point.name}"]'
    return f"cache[{', '.join('l' if item == '{l}' else json.dumps(item) for item in key)}]"


def row(point: Point) -> str:
    """One line of the table."""
    setter = f"`{FLAG_SETTERS[point.flag]}`" if point.flag else ""
    needs = point.needs or ""
    cells = (f"`{point.name}`", f"`{in_cache(point)}`", f"`{point.shape}`", f"`{point.meaning}`", setter, needs)
    return f"| {' | '.join(cells)} |"


def render() -> str:
    """The whole page."""
    columns = ("name", "in a cache", "shape", "meaning", "turned on by", "exists with")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *map(row, POINTS)]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
