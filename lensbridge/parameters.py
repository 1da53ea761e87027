"""Where in a HuggingFace model's parameters do TransformerLens' weights lie?

Each weight is a view, in TransformerLens' shape, of the parameter that holds it. Some have no parameter:
TransformerLens has a bias wherever there could be one, and stores some gains and embeddings with a constant worked in.
Those are *made* here, and say so, because an edit of them could not reach the model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters import inside
from .affine import bias_of, computed, matrix, stored_in, widths
from .architectures import Architecture
from .architectures.block import Factor
from .computed import Computed, outlined
from .experts import Experts
from .slices import by_head, grouped
from .whole import device_of, is_fetched, is_spread, reading, stand_in

ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
#: The parts of a model that weights are read and processed by; each has the norm before it as ``ln.w`` and ``ln.b``.
#: An expert is one of its own, "expert 3", with the norm before the MLP.
BRANCHES = ("embed", "attn", "mlp", "expert", "unembed")


#: What the parameters of an affine module are called.
WORDS = ("weight", "bias")


class Branch(NamedTuple):
    """The weights of one branch, why some of them are no parameter of the model, and what these are computed from:
    tensors, and whatever else there is (`Computed.state`)."""

    weights: dict[str, Tensor]
    made: dict[str, str]
    sources: dict[str, Tensor]
    state: dict[str, Hashable]

    @classmethod
    def empty(cls) -> Branch:
        """A branch to be filled."""
        return cls({}, {}, {}, {})


class Heads(NamedTuple):
    """How many heads a layer's queries have, and its keys and values; and their sizes."""

    queries: int
    key_values: int
    size: int
    value_size: int

    def number(self, letter: str) -> int:
        """The number of heads of "Q", "K" or "V"."""
        return self.queries if letter == "Q" else self.key_values


def is_centred(norm: nn.Module, architecture: Architecture) -> bool:
    """Whether a norm takes the mean out of its input: torch's own does, another as the record says."""
    return isinstance(inside(norm), nn.LayerNorm) or architecture.norm == "LN"


def factor_of(module: nn.Module, path: Factor | None, power: float = 1.0) -> Any:
    """The factor in the attribute at ``path`` below a module, to a power; None if there is no path, or it is 1."""
    factor = None if path is None else path(module) if callable(path) else attrgetter(path)(module)
    factor = factor if power == 1 or factor is None else factor**power
    return None if isinstance(factor, (int, float)) and factor == 1 else factor


def _shown(factor: Any) -> str:
    """A factor in a message; on the meta device it has no value."""
    if isinstance(factor, Tensor) and factor.numel() > 1:
        return "a factor for each coordinate"
    if isinstance(factor, Tensor):
        return "a factor" if factor.is_meta else f"{factor.item():g}"
    return f"{float(factor):g}"


def _shares(view: Tensor, stored: Tensor) -> bool:
    """Whether a weight is a view of what a module keeps."""
    return view.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


def position_rows(module: Any) -> Tensor:
    """The table of positions; where it is computed and not learned, transformers keeps it in a buffer."""
    return module.weight if hasattr(module, "weight") else module.weights


def first_position(hf_model: nn.Module, architecture: Architecture) -> int:
    """The row of position 0 in the table of positions."""
    if not architecture.pos_after_padding or architecture.pos_embed is None:
        return architecture.pos_offset
    padding: int = hf_model.get_submodule(architecture.pos_embed).padding_idx  # type: ignore[assignment]
    return padding + 1


class Parameters:
    """A HuggingFace model's parameters as TransformerLens' weights, by branch."""

    def __init__(self, hf_model: nn.Module, architecture: Architecture, cfg: Any) -> None:
        self.hf_model = hf_model
        self.architecture = architecture
        self.cfg = cfg
        self._heads: dict[int, Heads] = {}

    def module(self, path: str) -> Any:
        """A module of the HF model by its path, with parameters that are whole wherever their values are (`whole`).

        Where peft has put a copy in its place, that one.
        """
        module = inside(self.hf_model.get_submodule(path))
        return stand_in(module) if is_spread(self.hf_model) else module

    def branch(self, branch: str, layer: int = 0) -> Branch:
        """The weights of a branch with its norm; within it they go by TransformerLens' names in its component."""
        if not is_spread(self.hf_model):
            return self._branch(branch, layer)
        self.bring([(branch, layer)])
        with reading() as now:
            out = self._branch(branch, layer)
            now.note_copies(out.weights, out.made, out.sources)
        return out

    def bring(self, branches: Iterable[tuple[str, int]]) -> None:
        """Where weights are fetched from another machine, fetch those of some branches together."""
        if is_fetched(self.hf_model):
            with reading(shapes_only=True) as looked:
                looked.bring([self._branch(*each) for each in branches])

    def shapes(self, branch: str, layer: int = 0) -> dict[str, Tensor]:
        """The weights of a branch, of which nothing is to be looked at but names and shapes."""
        with outlined():
            if not is_spread(self.hf_model):
                return self._branch(branch, layer).weights
            with reading(shapes_only=True):
                return self._branch(branch, layer).weights

    def _branch(self, branch: str, layer: int) -> Branch:
        reader = {"embed": self._embed, "unembed": self._unembed}.get(branch)
        if reader is not None:
            return reader()
        kind, _, expert = branch.partition(" ")
        if kind == "expert":
            return self._expert(layer, int(expert))
        return (self._attention if branch == "attn" else self._mlp)(layer)

    # --- norms --------------------------------------------------------------------------------------------------------

    def gain(self, path: str) -> Tensor:
        """What the norm at ``path`` multiplies with, ``[d_model]``."""
        norm, offset = self.module(path), self.architecture.gain_offset
        weight = getattr(norm, "weight", None)
        if weight is None and hasattr(norm, "norms"):
            # One norm for each head.
            weight = torch.stack([each.weight for each in norm.norms])
        if weight is None:
            size = self.cfg.d_head if path in self._head_norms else self.cfg.d_model
            return torch.ones(size, dtype=self.cfg.dtype, device=device_of(self.hf_model))
        return weight + offset if offset else weight

    @cached_property
    def _head_norms(self) -> frozenset[str]:
        """The paths of the norms over single heads."""
        arch, found = self.architecture, set()
        for layer, block in enumerate(arch.blocks):
            if block.qk_norm_over == "head":
                found |= {arch.below(layer, path) for path in (block.q_norm, block.k_norm) if path is not None}
        return frozenset(found)

    def _norm(self, out: Branch, name: str, path: str) -> None:
        """Add the norm at ``path`` under ``name``."""
        norm = self.module(path)
        out.weights[f"{name}.w"] = gain = self.gain(path)
        if gain is not getattr(norm, "weight", None):
            stored = getattr(norm, "weight", None)
            if hasattr(norm, "norms"):
                out.made[f"{name}.w"] = f"{norm.__class__.__name__} stores it in pieces, one for each head"
                out.sources.update((f"{name}.w.{head}", each.weight) for head, each in enumerate(norm.norms))
            elif stored is None:
                out.made[f"{name}.w"] = f"{norm.__class__.__name__} has no such parameter"
            else:
                out.made[f"{name}.w"] = f"{norm.__class__.__name__} stores it less {self.architecture.gain_offset:g}"
                out.sources[f"{name}.w"] = stored
        if is_centred(norm, self.architecture):
            self._bias(out, f"{name}.b", norm, gain.shape)

    def _bias(self, out: Branch, name: str, module: nn.Module, shape: Any) -> None:
        """Add the bias of a module in its shape; zeros where there is none."""
        bias = bias_of(module, self.cfg.dtype)
        if bias is not None:
            out.weights[name] = bias if bias.shape == shape else bias.unflatten(0, shape)
            return
        like = getattr(module, "weight", None)
        device = like.device if isinstance(like, Tensor) else device_of(self.hf_model)
        out.weights[name] = torch.zeros(shape, dtype=self.cfg.dtype, device=device)
        out.made[name] = f"{type(self.hf_model).__name__} has no such parameter"

    # --- branches -----------------------------------------------------------------------------------------------------

    def _embed(self) -> Branch:
        arch, out = self.architecture, Branch.empty()
        embed = self.module(arch.embed)
        scale = factor_of(self.hf_model, arch.embed_factor, arch.embed_factor_power)
        scale = factor_of(embed, arch.embed_scale) if arch.embed_scale else scale
        found = computed(embed, self.cfg.dtype)
        rows = stored_in(embed) if found is None else found.weight
        out.weights["W_E"] = rows if scale is None else rows * scale
        if scale is not None:
            out.made["W_E"] = f"{type(self.hf_model).__name__} multiplies its embedding by {_shown(scale)}"
            self._comes_from(out, "W_E", embed)
        if arch.project_in is not None:
            self._map(out, "W_E", embed, arch.project_in)
        self._note(out, embed, "W_E")
        if arch.embed_norm is not None:
            self._norm(out, "ln", arch.embed_norm)
        if arch.pos_embed is not None:
            first = first_position(self.hf_model, arch)
            out.weights["W_pos"] = position_rows(self.module(arch.pos_embed))[first : first + self.cfg.n_ctx]
        return out

    def _map(self, out: Branch, name: str, module: nn.Module, path: str) -> None:
        """Work the linear map at ``path`` into a weight: behind the embedding, before the unembedding."""
        found, by = out.weights[name], matrix(self.module(path), self.cfg.dtype)
        out.weights[name] = found @ by if name == "W_E" else by @ found
        out.made[name] = f"{type(self.hf_model).__name__} stores two matrices whose product it is"
        self._comes_from(out, name, module)
        self._comes_from(out, f"{name}, map", self.module(path))

    def _comes_from(self, out: Branch, name: str, module: nn.Module) -> None:
        """Say what a weight is computed from: what a module keeps."""
        found = computed(module, self.cfg.dtype)
        if found is None:
            out.sources[name] = stored_in(module)
        else:
            out.sources.update((f"{name}, {number}", source) for number, source in enumerate(found.sources))
            out.state[name] = found.state

    def _note(self, out: Branch, module: nn.Module, *names: str) -> None:
        """Say of the weights that come from a module that they are computed, if it keeps no matrix."""
        found = computed(module, self.cfg.dtype)
        for name in names:
            if found is not None and (found.made_bias or not name.startswith("b_")) and name in out.weights:
                out.made.setdefault(name, found.why)
                self._comes_from(out, name, module)

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key-value head."""
        return self.cfg.n_key_value_heads is not None

    def heads(self, layer: int) -> Heads:
        """How many heads a layer has, and of which size: as its projections are."""
        if layer not in self._heads:
            self._heads[layer] = self._measured_heads(layer)
        return self._heads[layer]

    def _measured_heads(self, layer: int) -> Heads:
        block, cfg = self.architecture.blocks[layer], self.cfg
        attention = self.hf_model.get_submodule(self.architecture.in_layer(layer, "attn"))
        sizes = (getattr(attention, name, None) for name in ("qk_head_dim", "head_dim"))
        size = next((size for size in sizes if size), cfg.d_head)
        queries, key_values = cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads
        if block.q is not None and block.qkv is None:
            queries = self._widths(layer, "q")[1] // size // (2 if block.q_gate else 1)
        if block.k is not None and block.qkv is None:
            key_values = self._widths(layer, "k")[1] // size
        elif block.qkv is None and getattr(attention, "num_key_value_groups", None):
            key_values = queries // attention.num_key_value_groups
        value_size = size if block.o is None else self._widths(layer, "o")[0]
        return Heads(queries, key_values, size, size if block.o is None else value_size // queries)

    def _widths(self, layer: int, role: str) -> tuple[int, int]:
        """The sizes of what a role's layer is given and gives, which need no values."""
        return widths(self.hf_model.get_submodule(self.architecture.in_layer(layer, role)))

    def projection(self, layer: int, letter: str) -> tuple[Tensor, Tensor | None]:
        """(``[d_model, head, d_head]``, ``[head, d_head]`` or None) of a "Q", "K" or "V" projection, as views.

        Where queries lie in groups with their keys and values, they are copies.
        """
        weight = self.slice(matrix(self._projecting(layer, letter), self.cfg.dtype), letter, layer)
        before, behind = self._factors(layer, letter.lower())
        weight = weight if before is None else weight * before
        return weight if behind is None else weight * behind, self.projection_bias(layer, letter)

    def projection_bias(self, layer: int, letter: str) -> Tensor | None:
        """The second of `projection`, for which the first is not fetched or put together."""
        bias, behind = bias_of(self._projecting(layer, letter), self.cfg.dtype), self._factors(layer, letter.lower())[1]
        offset = None if bias is None else self.slice(bias, letter, layer)
        return offset if offset is None or behind is None else offset * behind

    def computed_projection(self, layer: int, letter: str) -> Computed | None:
        """What the layer of a "Q", "K" or "V" projection multiplies with, if that has to be computed."""
        return computed(self._projecting(layer, letter), self.cfg.dtype)

    def _projecting(self, layer: int, letter: str) -> Any:
        """The module of a "Q", "K" or "V" projection."""
        fused = self.architecture.blocks[layer].qkv is not None
        return self.module(self.architecture.in_layer(layer, "qkv" if fused else letter.lower()))

    def _factors(self, layer: int, role: str) -> tuple[Any, Any]:
        """What stands before and behind the module in a role; None where nothing does."""
        block, owner = self.architecture.blocks[layer], self.module(self.architecture.layer(layer))
        before = block.attn_in_factor if role in "qkv" else None
        return factor_of(owner, before), factor_of(owner, block.factors.get(role))

    def slice(self, whole: Tensor, letter: str, layer: int) -> Tensor:
        """The part of "Q", "K" or "V" in the last axis of the projection that holds it, ``[..., head, d_head]``."""
        return self.slicer(letter, layer)(whole)

    def slicer(self, letter: str, layer: int) -> Callable[[Tensor], Tensor]:
        """`slice` as a function of the whole, which knows nothing of the model."""
        block, heads = self.architecture.blocks[layer], self.heads(layer)
        if block.qkv is None:
            gated = letter == "Q" and block.q_gate
            return partial(by_head, heads=heads.number(letter), size=heads.size if gated else None)
        blocks = block.qkv_layout.count(heads.key_values)
        start = 0
        for each in block.qkv_layout.order:
            if each.upper() == letter:
                break
            start += heads.number(each.upper()) // blocks * heads.size
        return partial(grouped, blocks=blocks, start=start, share=heads.number(letter) // blocks, size=heads.size)

    def join(self, parts: list[Tensor], layer: int) -> Tensor:
        """The fused projection's output of which `slice` makes these parts of "Q", "K" and "V"."""
        layout, heads = self.architecture.blocks[layer].qkv_layout, self.heads(layer)
        blocks, by_letter = layout.count(heads.key_values), dict(zip("qkv", parts, strict=True))
        split = [by_letter[letter].unflatten(-2, (blocks, -1)).flatten(-2) for letter in layout.order]
        return torch.cat(split, dim=-1).flatten(-2)

    def _attention(self, layer: int) -> Branch:
        arch, block, out = self.architecture, self.architecture.blocks[layer], Branch.empty()
        if block.ln1 is not None:
            self._norm(out, "ln", arch.in_layer(layer, "ln1"))
        if block.ln1_post is not None:
            self._norm(out, "post", arch.in_layer(layer, "ln1_post"))
        if block.attn is None:
            return out
        letters = "QKV" if block.qkv is not None else [each for each in "QKV" if getattr(block, each.lower())]
        for letter in letters:
            self._projection(out, layer, letter)
        if block.o is not None:
            o, heads = self.module(arch.in_layer(layer, "o")), self.heads(layer)
            out.weights["W_O"] = matrix(o, self.cfg.dtype).unflatten(0, (heads.queries, heads.value_size))
            bias = factor_of(self.module(arch.layer(layer)), block.o_bias)
            if bias is None:
                self._bias(out, "b_O", o, (self.cfg.d_model,))
            else:
                out.weights["b_O"] = bias
            self._note(out, o, "W_O", "b_O")
        in_order = {name: out.weights.pop(name) for name in ATTENTION if name in out.weights}
        out.weights.update(in_order)
        if block.sinks is not None:
            out.weights["sinks"] = attrgetter(block.sinks)(self.module(arch.layer(layer)))
        for norm in ("q_norm", "k_norm"):
            if getattr(block, norm) is not None:
                self._norm(out, norm, arch.in_layer(layer, norm))
        return out

    def _projection(self, out: Branch, layer: int, letter: str) -> None:
        """Add the weight and bias of queries, keys or values."""
        weight, bias = self.projection(layer, letter)
        out.weights[f"W_{letter}"] = weight.movedim(0, 1)
        module = self._projecting(layer, letter)
        self._note(out, module, f"W_{letter}")
        if f"W_{letter}" not in out.made and not _shares(weight, stored_in(module)):
            self._made_of(out, f"W_{letter}", stored_in(module))
        if bias is None:
            shape = weight.shape[1:]
            out.weights[f"b_{letter}"] = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            out.made[f"b_{letter}"] = f"{type(self.hf_model).__name__} has no such parameter"
            return
        out.weights[f"b_{letter}"] = bias
        self._note(out, module, f"b_{letter}")
        stored = bias_of(module)
        if stored is not None and f"b_{letter}" not in out.made and not _shares(bias, stored):
            self._made_of(out, f"b_{letter}", stored)

    def _made_of(self, out: Branch, name: str, stored: Tensor) -> None:
        out.made[name] = f"{type(self.hf_model).__name__} stores it in pieces, or without a factor"
        out.sources[name] = stored

    def _mlp(self, layer: int) -> Branch:
        arch, block, cfg, out = self.architecture, self.architecture.blocks[layer], self.cfg, Branch.empty()
        if block.ln2 is not None:
            self._norm(out, "ln", arch.in_layer(layer, "ln2"))
        if block.ln2_post is not None:
            self._norm(out, "post", arch.in_layer(layer, "ln2_post"))
        if block.expert_form.shown and block.router is not None:
            router = self.module(arch.in_layer(layer, "router"))
            stored = {w: v for w in WORDS if (v := getattr(router, w, None)) is not None}
            found = computed(router, cfg.dtype)
            self._affine(out, "W_gate", stored if found is None else stored | {"weight": found.weight})
            self._note(out, router, "W_gate.weight")
        if block.mlp_out is None or block.mlp_in is None:
            return out
        out_of = self.module(arch.in_layer(layer, "mlp_out"))
        into = self.module(arch.in_layer(layer, "mlp_in"))
        if block.gate_up:
            out.weights["W_gate"], out.weights["W_in"] = matrix(into, cfg.dtype).chunk(2, dim=-1)
            both = bias_of(into, cfg.dtype)
            if both is not None:
                out.weights["b_gate"], out.weights["b_in"] = both.chunk(2)
            self._note(out, into, "W_gate", "W_in", "b_gate", "b_in")
        else:
            out.weights["W_in"] = matrix(into, cfg.dtype)
            if block.gate is not None:
                self._gate(out, layer)
                self._scale(out, layer, "gate", ("W_gate", "b_gate"))
        if "b_in" not in out.weights:
            self._bias(out, "b_in", into, out.weights["W_in"].shape[-1:])
        self._note(out, into, "W_in", "b_in")
        out.weights["W_out"] = matrix(out_of, cfg.dtype)
        self._bias(out, "b_out", out_of, (cfg.d_model,))
        self._note(out, out_of, "W_out", "b_out")
        self._scale(out, layer, "mlp_out", ("W_out", "b_out"))
        if block.neuron_norm is not None:
            self._norm(out, "neurons", arch.in_layer(layer, "neuron_norm"))
        if block.act is not None:
            self._activation(out, self.module(arch.in_layer(layer, "act")))
        return out

    def _gate(self, out: Branch, layer: int) -> None:
        """Add the weight of the gate, and its bias if it has one or a norm's may be folded into it."""
        block, gate = self.architecture.blocks[layer], self.module(self.architecture.in_layer(layer, "gate"))
        out.weights["W_gate"] = matrix(gate, self.cfg.dtype)
        norm = None if block.ln2 is None else self.module(self.architecture.in_layer(layer, "ln2"))
        if bias_of(gate) is not None or (norm is not None and bias_of(norm) is not None):
            self._bias(out, "b_gate", gate, out.weights["W_gate"].shape[-1:])
        self._note(out, gate, "W_gate", "b_gate")

    def _scale(self, out: Branch, layer: int, role: str, names: tuple[str, ...]) -> None:
        """Work the factor behind the module in a role into its weights."""
        factor = self._factors(layer, role)[1]
        for name in names if factor is not None else ():
            if name in out.weights and (name not in out.made or name in out.state):
                if name not in out.state:
                    out.sources[name] = out.weights[name]
                out.weights[name] = out.weights[name] * factor
                out.made[name] = f"{type(self.hf_model).__name__} multiplies what it gives by {_shown(factor)}"

    def _activation(self, out: Branch, module: nn.Module) -> None:
        """Add what an activation function has learned, as scalars, and its constants."""
        for name, parameter in module.named_parameters():
            out.weights[f"act_fn.{name}"] = parameter.squeeze()
        for name, buffer in module.named_buffers():
            out.weights[f"act_fn.{name}"] = buffer
            out.made[f"act_fn.{name}"] = f"{module.__class__.__name__} has it as a constant"

    def _expert(self, layer: int, expert: int) -> Branch:
        arch, out = self.architecture, Branch.empty()
        block = arch.blocks[layer]
        before = block.ln2 if block.beside is None else block.beside.reads
        if before is not None:
            self._norm(out, "ln", arch.below(layer, before))
        stored = Experts(self.module(arch.in_layer(layer, "experts"))).weights(expert)
        for name in dict.fromkeys(name.partition(".")[0] for name in stored):
            self._affine(out, name, {word: stored[f"{name}.{word}"] for word in WORDS if f"{name}.{word}" in stored})
        return out

    def _affine(self, out: Branch, name: str, stored: dict[str, Tensor]) -> None:
        """Add the weight of a projection in a mixture of experts, ``[out, in]`` as an ``nn.Linear``'s.

        And its bias, if it has one or a norm's may be folded into it.
        """
        out.weights.update({f"{name}.{word}": weight for word, weight in stored.items()})
        if "bias" not in stored and "ln.b" in out.weights and "ln.b" not in out.made:
            out.weights[f"{name}.bias"] = stored["weight"].new_zeros(stored["weight"].shape[0])
            out.made[f"{name}.bias"] = f"{type(self.hf_model).__name__} has no such parameter"

    def _unembed(self) -> Branch:
        out = Branch.empty()
        arch, head = self.architecture, self.module(self.architecture.unembed)
        if arch.ln_final is not None:
            self._norm(out, "ln" if arch.head is None else "apart", arch.ln_final)
        out.weights["W_U"] = matrix(head, self.cfg.dtype)
        divisor = factor_of(self.hf_model, arch.unembed_divisor)
        if divisor is not None:
            out.weights["W_U"] = out.weights["W_U"] / divisor
            self._comes_from(out, "W_U", head)
            out.made["W_U"] = f"{type(self.hf_model).__name__} divides by {float(divisor):g} before it"
        if arch.project_out is not None:
            self._map(out, "W_U", head, arch.project_out)
        self._bias(out, "b_U", head, (self.cfg.d_vocab_out,))
        self._note(out, head, "W_U", "b_U")
        return out
