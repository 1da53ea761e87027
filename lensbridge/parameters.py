"""Where in a HuggingFace model's parameters do TransformerLens' weights lie?

Each weight is a view, in TransformerLens' shape, of the parameter that holds it. Some have no parameter:
TransformerLens has a bias wherever there could be one, and stores some gains and embeddings with a constant worked in.
Those are *made* here, and say so, because an edit of them could not reach the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .architectures import Architecture

ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
#: The parts of a model that weights are read and processed by; each has the norm before it as ``ln.w`` and ``ln.b``.
BRANCHES = ("embed", "attn", "mlp", "unembed")


class Branch(NamedTuple):
    """The weights of one branch, why some of them are no parameter of the model, and what these are computed from."""

    weights: dict[str, Tensor]
    made: dict[str, str]
    sources: dict[str, Tensor]


def matrix(module: nn.Module) -> Tensor:
    """The weight of an affine module as [in, out], sharing memory."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    # transformers' Conv1D stores [in, out], nn.Linear [out, in].
    return weight if type(module).__name__ == "Conv1D" else weight.T


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of an affine module or norm, if it has one."""
    return getattr(module, "bias", None)


class Parameters:
    """A HuggingFace model's parameters as TransformerLens' weights, by branch."""

    def __init__(self, hf_model: nn.Module, architecture: Architecture, cfg: Any) -> None:
        self.hf_model = hf_model
        self.architecture = architecture
        self.cfg = cfg

    def module(self, path: str) -> Any:
        """A module of the HF model by its path."""
        return self.hf_model.get_submodule(path)

    def branch(self, branch: str, layer: int = 0) -> Branch:
        """The weights of a branch with its norm; within it they go by TransformerLens' names in its component."""
        reader = {"embed": self._embed, "unembed": self._unembed}.get(branch)
        if reader is not None:
            return reader()
        return (self._attention if branch == "attn" else self._mlp)(layer)

    # --- norms --------------------------------------------------------------------------------------------------------

    def gain(self, path: str) -> Tensor:
        """What the norm at ``path`` multiplies with, ``[d_model]``."""
        norm, offset = self.module(path), self.architecture.gain_offset
        if getattr(norm, "weight", None) is None:
            return torch.ones(self.cfg.d_model, dtype=self.cfg.dtype, device=next(self.hf_model.parameters()).device)
        return norm.weight + offset if offset else norm.weight

    def _norm(self, out: Branch, name: str, path: str) -> None:
        """Add the norm at ``path`` under ``name``."""
        norm = self.module(path)
        out.weights[f"{name}.w"] = gain = self.gain(path)
        if gain is not getattr(norm, "weight", None):
            stored = getattr(norm, "weight", None)
            if stored is None:
                out.made[f"{name}.w"] = f"{type(norm).__name__} has no gain"
            else:
                out.made[f"{name}.w"] = f"{type(norm).__name__} stores it less {self.architecture.gain_offset:g}"
                out.sources[f"{name}.w"] = stored
        if self.architecture.norm == "LN":
            self._bias(out, f"{name}.b", norm, gain.shape)

    def _bias(self, out: Branch, name: str, module: nn.Module, shape: Any) -> None:
        """Add the bias of a module in its shape; zeros where there is none."""
        bias = bias_of(module)
        if bias is not None:
            out.weights[name] = bias if bias.shape == shape else bias.unflatten(0, shape)
            return
        like: Tensor | None = getattr(module, "weight", None)
        device = next(self.hf_model.parameters()).device if like is None else like.device
        out.weights[name] = torch.zeros(shape, dtype=self.cfg.dtype, device=device)
        out.made[name] = f"{type(self.hf_model).__name__} has no such parameter"

    # --- branches -----------------------------------------------------------------------------------------------------

    def _embed(self) -> Branch:
        arch, out = self.architecture, Branch({}, {}, {})
        embed = self.module(arch.embed)
        scale = getattr(embed, arch.embed_scale) if arch.embed_scale else None
        out.weights["W_E"] = embed.weight if scale is None else embed.weight * scale
        if scale is not None:
            out.made["W_E"] = f"{type(embed).__name__} multiplies its weight by {float(scale):g}"
            out.sources["W_E"] = embed.weight
        if arch.embed_norm is not None:
            self._norm(out, "ln", arch.embed_norm)
        if arch.pos_embed is not None:
            positions = self.module(arch.pos_embed).weight
            out.weights["W_pos"] = positions[arch.pos_offset : arch.pos_offset + self.cfg.n_ctx]
        return out

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key-value head."""
        return self.cfg.n_key_value_heads is not None

    def n_heads(self, letter: str) -> int:
        """How many heads the "Q", "K" or "V" projection has."""
        return self.cfg.n_heads if letter == "Q" else self.cfg.n_key_value_heads or self.cfg.n_heads

    def projection(self, layer: int, letter: str) -> tuple[Tensor, Tensor | None]:
        """(``[d_model, head, d_head]``, ``[head, d_head]`` or None) of a "Q", "K" or "V" projection, as views."""
        block, d_head = self.architecture.block, self.cfg.d_head
        if block.qkv is None:
            module = self.module(self.architecture.in_layer(layer, letter.lower()))
            bias = bias_of(module)
            shape = (self.n_heads(letter), d_head)
            return matrix(module).unflatten(-1, shape), None if bias is None else bias.unflatten(0, shape)
        module = self.module(self.architecture.in_layer(layer, "qkv"))
        bias = bias_of(module)
        return self.slice(matrix(module), letter), None if bias is None else self.slice(bias, letter)

    def slice(self, fused: Tensor, letter: str) -> Tensor:
        """The part of "Q", "K" or "V" in a fused projection's last axis, as ``[..., head, d_head]``."""
        d_head = self.cfg.d_head
        if self.architecture.block.qkv_layout == "heads":
            return fused.unflatten(-1, (self.cfg.n_heads, 3, d_head))[..., "QKV".index(letter), :]
        sizes = [self.n_heads(each) * d_head for each in "QKV"]
        index = "QKV".index(letter)
        return fused.narrow(-1, sum(sizes[:index]), sizes[index]).unflatten(-1, (self.n_heads(letter), d_head))

    def join(self, parts: list[Tensor]) -> Tensor:
        """The fused projection's output of which `slice` makes these parts."""
        if self.architecture.block.qkv_layout == "heads":
            return torch.stack(parts, dim=-2).flatten(-3)
        return torch.cat([part.flatten(-2) for part in parts], dim=-1)

    def _attention(self, layer: int) -> Branch:
        arch, cfg, out = self.architecture, self.cfg, Branch({}, {}, {})
        if arch.block.ln1 is not None:
            self._norm(out, "ln", arch.in_layer(layer, "ln1"))
        if arch.block.ln1_post is not None:
            self._norm(out, "post", arch.in_layer(layer, "ln1_post"))
        o = self.module(arch.in_layer(layer, "o"))
        weights: dict[str, Tensor] = {}
        for letter in "QKV":
            weight, bias = self.projection(layer, letter)
            weights[f"W_{letter}"] = weight.movedim(0, 1)
            if bias is None:
                shape = (self.n_heads(letter), cfg.d_head)
                weights[f"b_{letter}"] = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
                out.made[f"b_{letter}"] = f"{type(self.hf_model).__name__} has no such parameter"
            else:
                weights[f"b_{letter}"] = bias
        weights["W_O"] = matrix(o).unflatten(0, (cfg.n_heads, cfg.d_head))
        out.weights.update((name, weights[name]) for name in ATTENTION if name in weights)
        self._bias(out, "b_O", o, (cfg.d_model,))
        for norm in ("q_norm", "k_norm"):
            if getattr(arch.block, norm) is not None:
                self._norm(out, norm, arch.in_layer(layer, norm))
        return out

    def _mlp(self, layer: int) -> Branch:
        arch, cfg, out = self.architecture, self.cfg, Branch({}, {}, {})
        if arch.block.ln2 is not None:
            self._norm(out, "ln", arch.in_layer(layer, "ln2"))
        if arch.block.ln2_post is not None:
            self._norm(out, "post", arch.in_layer(layer, "ln2_post"))
        out_of = self.module(arch.in_layer(layer, "mlp_out"))
        into = self.module(arch.in_layer(layer, "mlp_in"))
        if arch.block.gate_up:
            out.weights["W_gate"], out.weights["W_in"] = matrix(into).chunk(2, dim=-1)
        else:
            out.weights["W_in"] = matrix(into)
            if arch.block.gate is not None:
                out.weights["W_gate"] = matrix(self.module(arch.in_layer(layer, "gate")))
        self._bias(out, "b_in", into, (cfg.d_mlp,))
        out.weights["W_out"] = matrix(out_of)
        self._bias(out, "b_out", out_of, (cfg.d_model,))
        return out

    def _unembed(self) -> Branch:
        out = Branch({}, {}, {})
        head = self.module(self.architecture.unembed)
        self._norm(out, "ln", self.architecture.ln_final)
        out.weights["W_U"] = matrix(head)
        self._bias(out, "b_U", head, (self.cfg.d_vocab_out,))
        return out
