"""Is a point's value of the shape that the table of points gives?"""

from __future__ import annotations

from torch import Tensor

from ..points import point_of
from .subject import Subject

#: Points that show keys and values, of which there may be fewer heads.
KEYS_AND_VALUES = ("hook_k", "hook_v", "hook_rot_k", "hook_k_input", "hook_v_input")
VALUES = ("hook_v", "hook_z")
#: The axes whose sizes differ between queries, keys and values.
HEAD_AXES = ("head", "d_head")


def shape_problems(subject: Subject, name: str, value: Tensor) -> list[str]:
    """What is wrong with a value in itself, in words: its shape, or that it holds NaN."""
    row = point_of(name)
    assert row is not None
    problems = ["has NaN"] if value.isnan().any() else []
    axes = row.shape.split()
    if axes[0] != "..." and len(axes) == value.dim() - 1 and ".ln1." in name:
        # Where each head reads a copy of the stream, so does the norm of it.
        axes.insert(-1, "head")
    sizes = [_size(subject, name, axis) for axis in axes if axis != "..."]
    found = list(value.shape)[len(value.shape) - len(sizes) :]
    fits = axes[0] == "..." or len(axes) == value.dim()
    if not fits or any(size not in (None, there) for size, there in zip(sizes, found, strict=False)):
        expected = ["..."] * (axes[0] == "...") + [str(size or axis) for size, axis in zip(sizes, axes, strict=False)]
        problems.append(f"has shape {list(value.shape)}, not [{', '.join(expected)}] ({row.shape})")
    return problems


def _size(subject: Subject, name: str, axis: str) -> int | None:
    """The size of an axis by its name in the table; None where it is not known beforehand."""
    cfg, (batch, length) = subject.model.cfg, subject.tokens.shape
    if not name.startswith("unembed."):
        length = subject.positions
    if name.startswith("hook_"):
        embed = subject.architecture.embed
        length = subject.batch_first(embed, subject.plain.output(embed)).shape[1]
    sizes = {
        "batch": batch,
        "pos": length,
        "query_pos": length,
        "key_pos": length,
        "batch*pos": batch * length,
        "d_model": width_of(subject, name),
        "d_vocab": cfg.d_vocab_out,
        "expert": cfg.num_experts,
        "1": 1,
    }
    if axis in HEAD_AXES:
        return heads_axis(subject, name, axis)
    if axis == "d_mlp":
        weight = subject.weight(name.rpartition(".")[0] + ".W_out")
        return None if weight is None else weight.shape[0]
    return sizes.get(axis)


def width_of(subject: Subject, name: str) -> int | None:
    """The width of the stream, or of embeddings that are mapped to it, or of what a head unembeds."""
    architecture = subject.architecture
    if name == "unembed.hook_in" and architecture.head is not None:
        return subject.hf.get_submodule(architecture.unembed).weight.shape[1]
    if "embed" in name and architecture.embed_map is not None:
        return subject.hf.get_submodule(architecture.embed).weight.shape[1]
    return subject.model.cfg.d_model


def heads_axis(subject: Subject, name: str, axis: str) -> int | None:
    """How many heads a point of attention has, or of which size; None where it is not known beforehand."""
    heads, short = subject.heads(int(name.split(".")[1])), name.rpartition(".")[2]
    if axis == "head":
        # The norm is shown as the values' copies have it.
        return heads.key_values if short in KEYS_AND_VALUES else None if ".ln1." in name else heads.queries
    if "_norm." in name:
        # Over one head, or over all of them.
        return None
    return heads.value_size if short in VALUES else heads.size
