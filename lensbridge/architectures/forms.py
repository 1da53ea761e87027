"""Which forms do attention's softmax and a fused projection take?

Small vocabularies that the records share: data about one place each, without a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Softmax:
    """Where the attention weights are made: a call inside the attention's forward, and the softmax inside that call.

    Both are looked up by what they are called in the source (``attention_interface``, ``softmax``), not by the numbers
    that nnsight adds, which shift between versions. Without a ``call`` the softmax is in the forward itself; a
    ``module`` (below the layer) makes them where the softmax is one.
    """

    call: str | None = "attention_interface"
    operation: str = "softmax"
    module: str | None = None
    #: What masked scores are, or less, where that is not the smallest number there is.
    mask: float | None = None
    #: Where no call is given queries and keys as they meet: the call that returns both of them rotated, and the one
    #: that transposes the keys.
    queries: str | None = None
    keys: str | None = None
    #: Whether the largest score of each row has been taken from the row before.
    shifted: bool = False
    #: How often the call is made, on the same queries and keys. Points show the first time, and edits go into each.
    times: int = 1


@dataclass(frozen=True)
class Layout:
    """How the output axis of one projection holds queries, keys and values.

    The axis is cut into blocks, each of which holds its share of every letter's heads, one letter after the other in
    ``order``: one block of everything, a block for each key-value head, or a fixed number of blocks.
    """

    blocks: Literal["one", "key-value heads"] | int = "one"
    order: str = "qkv"

    def count(self, key_value_heads: int) -> int:
        """How many blocks there are."""
        return {"one": 1, "key-value heads": key_value_heads}.get(self.blocks, self.blocks)  # type: ignore


#: Queries, then keys, then values.
PARTS = Layout()
#: For each key-value head its queries, its key and its value; without grouping, the three of each head.
GROUPS = Layout("key-value heads")


class LayerRun(NamedTuple):
    """One of several times that a layer runs in a forward pass: its path, and how often it has run before.

    ``fresh`` if the stream that it is given is not just what left the layer that ran before it.
    """

    path: str
    before: int
    fresh: bool


@dataclass(frozen=True)
class Beside:
    """Experts beside the MLP that another norm reads the same stream for: that norm, and those of what the MLP and the
    experts write, before the two are added. Paths below a layer."""

    reads: str
    of_mlp: str
    of_experts: str


@dataclass(frozen=True)
class Refusal:
    """Points (their names below a layer) that layers do not have, and why not: the modules where they would be read
    are there, but what passes these does not mean what the names mean.
    """

    points: tuple[str, ...]
    reason: str
