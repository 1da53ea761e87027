"""What are ``model.blocks[3].attn``, ``model.ln_final``, ``model.unembed`` and the like?

Components carry the hook points, show the weights of their part under TransformerLens' names, and can be called by
themselves, in the active basis, with their hook points firing. What they compute is the HF module's own forward; only
norms, embeddings and the unembedding, which are one formula each, are written out.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .affine import bias_of
from .engine.parts import run_attention, run_mlp
from .errors import UnknownPointError, UnsupportedModelError
from .experts import Experts
from .factored_matrix import FactoredMatrix
from .hook_points import HookPoint
from .interior import Interior, listening
from .utilities.activation_functions import SUPPORTED_ACTIVATIONS
from .utilities.tensors import get_offset_position_ids

Resid = Float[Tensor, "batch pos d_model"]


def components_of(interior: Interior) -> dict[str, nn.Module | None]:
    """The components of a whole model by name, in TransformerLens' order."""
    architecture, layers = interior.architecture, range(interior.cfg.n_layers)
    parts: dict[str, nn.Module | None] = {"embed": Embed(interior, "embed")} | _point(interior, "hook_embed")
    if architecture.pos_embed is not None:
        parts |= {"pos_embed": PosEmbed(interior, "pos_embed")} | _point(interior, "hook_pos_embed")
    if architecture.type_embed is not None:
        parts |= _point(interior, "hook_token_type_embed")
    parts["blocks"] = nn.ModuleList(TransformerBlock(interior, layer) for layer in layers)
    if architecture.ln_final is not None:
        parts["ln_final"] = Norm(interior, "ln_final", architecture.ln_final)
    return parts | {"unembed": Unembed(interior)}


def _point(interior: Interior, name: str) -> dict[str, nn.Module | None]:
    """A hook point beside the components, if the model has it."""
    return {name: HookPoint()} if name in interior.own_points else {}


class Component(nn.Module):
    """A part of the model: hook points as children, weights as attributes."""

    #: The weights it shows.
    weight_names: tuple[str, ...] = ()

    def __init__(self, interior: Interior, prefix: str, points: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.__dict__.update(interior=interior, prefix=prefix)
        self.add_points(points)

    def add_points(self, names: tuple[str, ...]) -> None:
        """Give the component those of these hook points that the model has; in this order they are listed."""
        there = self.interior.own_points
        self._modules.update((name, HookPoint()) for name in names if f"{self.prefix}.{name}" in there)

    @property
    def cfg(self) -> Any:
        """The model's config."""
        return self.interior.cfg

    def __getattr__(self, name: str) -> Any:
        if name in type(self).weight_names:
            try:
                return self.interior.weights.get(f"{self.prefix}.{name}")
            except UnknownPointError as error:
                raise AttributeError(str(error)) from None
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).weight_names:
            self.interior.weights.set(f"{self.prefix}.{name}", value)
            return
        if isinstance(value, nn.Module):
            self.interior.rearranged = True
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *type(self).weight_names]

    def listeners(self, points: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
        """The listened-to points below this component, by full name."""
        own = {
            f"{self.prefix}.{name}": module
            for name, module in self.named_modules()
            if isinstance(module, HookPoint) and (points is None or name in points)
        }
        return listening(own)


class Embed(Component):
    """``tokens -> W_E[tokens]``, and the norm after it, if there is one (``ln`` may be that of a sum, instead)."""

    weight_names = ("W_E",)

    def __init__(self, interior: Interior, prefix: str) -> None:
        super().__init__(interior, prefix)
        architecture = interior.architecture
        if architecture.embed_norm is not None:
            self.ln = Norm(interior, f"{prefix}.ln", architecture.embed_norm)
        self.normed = "embedding norm" in architecture.features

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Resid:
        weight = self.interior.weights.raw_branch("embed")["W_E"]
        embedded = torch.nn.functional.embedding(tokens, weight)
        return _centred(self.interior, self.ln(embedded) if self.normed else embedded)


class PosEmbed(Component):
    """The learned embedding of each token's position."""

    weight_names = ("W_pos",)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Resid:
        weight = self.interior.weights.raw_branch("embed")["W_pos"]
        batch, length = tokens.shape
        if attention_mask is None:
            rows = weight[past_kv_pos_offset : past_kv_pos_offset + length].expand(batch, -1, -1)
            return _centred(self.interior, rows)
        positions = get_offset_position_ids(past_kv_pos_offset, attention_mask)
        real = attention_mask[:, past_kv_pos_offset : past_kv_pos_offset + length].bool()
        return _centred(self.interior, weight[positions]) * real.unsqueeze(-1)


class Norm(Component):
    """Layer normalisation: LayerNorm, or LayerNormPre where gain and bias are folded into the readers."""

    weight_names = ("w", "b")

    def __init__(self, interior: Interior, prefix: str, path: str) -> None:
        super().__init__(interior, prefix, ("hook_scale", "hook_normalized"))
        self.path = path

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        norm = self.interior.engine.norms[self.path]
        centred, scale = norm.split(x)
        scale = self.hook_scale(scale)
        normalized = self.hook_normalized(centred / scale)
        return self.interior.basis.norm_output(normalized, norm).to(x.dtype)


class Attention(Component):
    """One layer's attention; its input is ln1's output in the active basis."""

    weight_names = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "_W_K", "_W_V", "_b_K", "_b_V", "sinks")
    point_names = (
        "hook_k",
        "hook_q",
        "hook_v",
        "hook_z",
        "hook_attn_scores",
        "hook_pattern",
        "hook_result",
        "hook_rot_k",
        "hook_rot_q",
    )

    def __init__(self, interior: Interior, layer: int) -> None:
        super().__init__(interior, f"blocks.{layer}.attn")
        self.layer_id = layer
        architecture = interior.architecture
        for role in ("q_norm", "k_norm"):
            if getattr(architecture.blocks[layer], role) is not None:
                setattr(self, role, Norm(interior, f"{self.prefix}.{role}", architecture.in_layer(layer, role)))
        self.add_points(self.point_names)

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` per head, [head, d_model, d_model] (Elhage et al. 2021)."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` per head, [head, d_model, d_model], destination on the left (Elhage et al. 2021)."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-1, -2))

    @property
    def attn_type(self) -> str:
        """ "global", or "local" in a layer with a sliding window."""
        kinds = self.cfg.attn_types
        return "global" if kinds is None else kinds[self.layer_id]

    @property
    def mask(self) -> Bool[Tensor, "n_ctx n_ctx"]:
        """Where a query (row) attends to a key, in TransformerLens' words: HuggingFace makes a mask for each run."""
        size = self.cfg.n_ctx
        attended = torch.ones(size, size, dtype=torch.bool, device=self.cfg.device)
        if self.cfg.attention_dir == "causal":
            attended = attended.tril()
        return attended.triu(1 - self.cfg.window_size) if self.attn_type == "local" else attended

    @mask.setter
    def mask(self, value: Tensor) -> None:
        # Libraries share one mask among layers.
        if not torch.equal(value.to(self.cfg.device), self.mask):
            raise UnsupportedModelError(
                f"{self.prefix}.mask cannot be changed: HuggingFace makes the mask of each run. Hook "
                f"{self.prefix}.hook_attn_scores, and set scores to -inf."
            )

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch pos *head d_model"] | None = None,
        value_input: Float[Tensor, "batch pos *head d_model"] | None = None,
        past_kv_cache_entry: Any = None,
        additive_attention_mask: Float[Tensor, "batch 1 1 kv_pos"] | None = None,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Resid:
        """Attention's output, ``[batch, pos, d_model]``, from what queries, keys and values read (one by default)."""
        inputs = {
            "q": query_input,
            "k": query_input if key_input is None else key_input,
            "v": query_input if value_input is None else value_input,
        }
        return run_attention(
            self.interior.engine,
            self.layer_id,
            inputs,
            self.listeners(),
            past_kv_cache_entry,
            additive_attention_mask,
            attention_mask,
        )


class MLP(Component):
    """One layer's MLP; its input is ln2's output in the active basis."""

    weight_names: tuple[str, ...] = ("W_gate", "b_gate", "W_in", "b_in", "W_out", "b_out")

    def __init__(self, interior: Interior, layer: int) -> None:
        super().__init__(interior, f"blocks.{layer}.mlp")
        self.layer_id = layer
        block = interior.architecture.blocks[layer]
        if block.act is not None:
            self.act_fn = Activation(interior, f"{self.prefix}.act_fn", interior.architecture.in_layer(layer, "act"))
        if block.neuron_norm is not None:
            self.ln = Norm(interior, f"{self.prefix}.ln", interior.architecture.in_layer(layer, "neuron_norm"))
        self.add_points(("hook_pre", "hook_pre_linear", "hook_mid", "hook_post"))

    def forward(self, x: Resid) -> Resid:
        """The MLP's output, ``[batch, pos, d_model]``."""
        if self.interior.architecture.blocks[self.layer_id].mlp == "":
            return self._of_projections(x)
        return run_mlp(self.interior.engine, self.layer_id, x, self.listeners())

    def _of_projections(self, x: Resid) -> Resid:
        """The same, where the projections are the layer's own and no module holds them."""
        interior, architecture = self.interior, self.interior.architecture
        if architecture.blocks[self.layer_id].ln2 is not None and not architecture.blocks[self.layer_id].post_norm:
            x = interior.basis.norm_output_as_hf(x, interior.engine.norms[architecture.in_layer(self.layer_id, "ln2")])
        first, last = (interior.module(architecture.in_layer(self.layer_id, role)) for role in ("mlp_in", "mlp_out"))
        post = self.hook_post(SUPPORTED_ACTIVATIONS[self.cfg.act_fn](self.hook_pre(first(x))))
        return _centred(interior, last(post))


class Activation(Component):
    """An activation function with weights of its own, xIELU's (Huang and Schlag 2024)."""

    weight_names = ("alpha_p", "alpha_n", "beta", "eps")

    def __init__(self, interior: Interior, prefix: str, path: str) -> None:
        super().__init__(interior, prefix)
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        return self.interior.module(self.path)(x)


class Affine:
    """A projection inside a mixture of experts; its weight lies ``[out, in]``, as that of an ``nn.Linear``."""

    interior: Interior
    prefix: str

    def __init__(self, interior: Interior, prefix: str) -> None:
        self.__dict__.update(interior=interior, prefix=prefix)

    @property
    def weight(self) -> Tensor:
        """The matrix, in the active basis."""
        return self.interior.weights.get(f"{self.prefix}.weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias; None if there is none."""
        try:
            return self.interior.weights.get(f"{self.prefix}.bias")
        except UnknownPointError:
            return None

    def __setattr__(self, name: str, value: Any) -> None:
        self.interior.weights.set(f"{self.prefix}.{name}", value)

    def __call__(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return torch.nn.functional.linear(x, self.weight, self.bias)


class MoE(MLP):
    """One layer's mixture of experts; its input is ln2's output in the active basis."""

    weight_names = ()

    def __init__(self, interior: Interior, layer: int) -> None:
        super().__init__(interior, layer)
        self.add_points(("hook_expert_weights", "hook_expert_indices"))
        count = interior.architecture.blocks[layer].expert_form.shown
        self.experts = nn.ModuleList(Expert(interior, layer, expert) for expert in range(count))

    @property
    def W_gate(self) -> Affine:
        """The router."""
        return Affine(self.interior, f"{self.prefix}.W_gate")


class Expert(Component):
    """One expert of a layer: ``W_out(act(W_gate(x)) * W_in(x))``, or what its family has instead of the product."""

    def __init__(self, interior: Interior, layer: int, expert: int) -> None:
        points = ("hook_gate", "hook_pre", "hook_post")
        super().__init__(interior, f"blocks.{layer}.mlp.experts.{expert}", points)
        self.path = interior.architecture.in_layer(layer, "experts")

    @property
    def W_gate(self) -> Affine:
        """The projection that goes through the activation function."""
        return Affine(self.interior, f"{self.prefix}.W_gate")

    @property
    def W_in(self) -> Affine:
        """The projection that it is multiplied with."""
        return Affine(self.interior, f"{self.prefix}.W_in")

    @property
    def W_out(self) -> Affine:
        """The projection to the residual stream."""
        return Affine(self.interior, f"{self.prefix}.W_out")

    def forward(self, x: Float[Tensor, "routed d_model"]) -> Float[Tensor, "routed d_model"]:
        """What the expert makes of the normed tokens that are sent to it, before that is weighted."""
        experts = Experts(self.interior.module(self.path))
        gate = self.hook_gate(self.W_gate(x)) if experts.form.gated else None
        return self.W_out(self.hook_post(experts.activations(gate, self.hook_pre(self.W_in(x)))))


class TransformerBlock(Component):
    """One layer: attention and MLP with their norms, and the residual stream around them."""

    def __init__(self, interior: Interior, layer: int) -> None:
        super().__init__(interior, f"blocks.{layer}")
        self.layer_id = layer
        arch = interior.architecture
        block = arch.blocks[layer]
        for role, name in (("ln1", "ln1"), ("ln2", "ln2"), *block.post_norms):
            if getattr(block, role) is not None:
                setattr(self, name, Norm(interior, f"{self.prefix}.{name}", arch.in_layer(layer, role)))
        if block.attn is not None:
            self.attn = Attention(interior, layer)
        if block.mlp is not None:
            self.mlp = (MLP if block.experts is None else MoE)(interior, layer)
        self.add_points(
            (
                *("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in"),
                *("hook_attn_out", "hook_mlp_out"),
                *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_normalized_resid_post"),
            )
        )

    def forward(self, resid_pre: Resid, attention_mask: Int[Tensor, "batch pos"] | None = None) -> Resid:
        """resid_post for resid_pre."""
        return self.interior.engine.run_block(self.layer_id, resid_pre, self.listeners(), attention_mask)


class Unembed(Component):
    """The final norm's output -> logits (with TransformerLens' b_U, which GPT-2's head has only through folding)."""

    weight_names = ("W_U", "b_U")

    def __init__(self, interior: Interior) -> None:
        super().__init__(interior, "unembed", ("hook_in", "hook_out"))

    def forward(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        interior = self.interior
        hidden, architecture = self.hook_in(residual), interior.architecture
        if architecture.ln_final is not None:
            hidden = interior.basis.norm_output_as_hf(hidden, interior.engine.norms[architecture.ln_final])
        head, matrix = interior.weights.module(architecture.unembed), interior.weights.raw_branch("unembed")["W_U"].T
        logits = torch.nn.functional.linear(hidden.to(matrix.device), matrix, bias_of(head))
        return self.hook_out(interior.basis.logits(logits))


def _centred(interior: Interior, x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) if interior.basis.centres_stream else x
