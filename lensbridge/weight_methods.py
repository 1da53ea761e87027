"""Which weights does the model show, and how are they stored, loaded and processed?

The properties and state-dict methods of `HookedTransformer`. Everything is a view of the HF model's parameters
(`weights.py`); processing changes the view and never a parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UnknownPointError
from .factored_matrix import FactoredMatrix
from .interior import Interior
from .native.initialisation import draw_for, is_drawn
from .native.interior import NativeInterior
from .processing import Processing
from .readonly import read_only
from .utilities.matrix import composition_scores
from .weight_processing import ProcessWeights


def _shown(read: Callable[[str], Tensor], name: str) -> Tensor:
    """A weight; where there is none, an AttributeError, so that `hasattr` can tell."""
    try:
        return read(name)
    except UnknownPointError as error:
        raise AttributeError(str(error)) from None


def _stacked(name: str, shape: str) -> Any:
    """A property that stacks one weight of all layers."""

    def get(self: Any) -> Tensor:
        return _shown(self.interior.weights.stack, name)

    get.__doc__ = f"``{name}`` of every layer, stacked: [{shape}]."
    return property(get)


class WeightMethods:
    """The weights of a hooked model under TransformerLens' names."""

    interior: Interior | NativeInterior
    cfg: Any
    setup: Any

    W_Q = _stacked("attn.W_Q", "n_layers n_heads d_model d_head")
    W_K = _stacked("attn.W_K", "n_layers n_heads d_model d_head")
    W_V = _stacked("attn.W_V", "n_layers n_heads d_model d_head")
    W_O = _stacked("attn.W_O", "n_layers n_heads d_head d_model")
    W_in = _stacked("mlp.W_in", "n_layers d_model d_mlp")
    W_out = _stacked("mlp.W_out", "n_layers d_mlp d_model")
    b_Q = _stacked("attn.b_Q", "n_layers n_heads d_head")
    b_K = _stacked("attn.b_K", "n_layers n_heads d_head")
    b_V = _stacked("attn.b_V", "n_layers n_heads d_head")
    b_O = _stacked("attn.b_O", "n_layers d_model")
    b_in = _stacked("mlp.b_in", "n_layers d_mlp")
    b_out = _stacked("mlp.b_out", "n_layers d_model")

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding matrix."""
        return self.interior.weights.get("unembed.W_U")

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """The unembedding's bias (zero, or what processing moves there)."""
        return self.interior.weights.get("unembed.b_U")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The token embedding."""
        return self.interior.weights.get("embed.W_E")

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The positional embedding."""
        return _shown(self.interior.weights.get, "pos_embed.W_pos")

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_plus_n_ctx d_model"]:
        """``W_E`` and ``W_pos`` under each other: the model's overall embedding of one-hot token and position."""
        return read_only(torch.cat([self.W_E, self.W_pos], dim=0), "W_E_pos is a copy of W_E and W_pos")

    @property
    def W_gate(self) -> Float[Tensor, "n_layers d_model d_mlp"] | None:
        """The gate of every layer's MLP, stacked; None where MLPs have none."""
        return self.interior.weights.stack("mlp.W_gate") if self.cfg.gated_mlp else None

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` of every head, [n_layers, n_heads, d_model, d_model] (Elhage et al. 2021)."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` of every head, [n_layers, n_heads, d_model, d_model] (Elhage et al. 2021)."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def n_params_total(self) -> int:
        """How many numbers TransformerLens' parameters hold (a head tied to the embedding counts twice there)."""
        return sum(self.interior.weights.shape(name).numel() for name in self.interior.weights.names())

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "d_model"]:
        """The sum of what the biases ``b_O`` and ``b_out`` write to the residual stream before ``layer``.

        Args:
            layer: in [0, n_layers].
            mlp_input: up to the MLP of ``layer``, so with that layer's ``b_O``.
            include_mlp_biases: whether ``b_out`` counts.

        Raises:
            AssertionError: ``mlp_input`` for a layer that does not exist.
            IndexError: for a layer beyond n_layers.
        """
        if layer > self.cfg.n_layers:
            raise IndexError(f"layer {layer} is out of range: this model has {self.cfg.n_layers} layers")
        if mlp_input and layer >= self.cfg.n_layers:
            raise AssertionError(f"there is no MLP in layer {layer}: this model has {self.cfg.n_layers} layers")
        attention = self.b_O[: layer + int(mlp_input)].sum(0)
        return attention + self.b_out[:layer].sum(0) if include_mlp_biases else attention

    def all_composition_scores(self, mode: str) -> Float[Tensor, "n_layers n_heads n_layers n_heads"]:
        """How much each head reads from each earlier head by Q-, K- or V-composition (Elhage et al. 2021); else 0.

        Raises:
            ValueError: for another mode than "Q", "K" or "V".
        """
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode must be one of ['Q', 'K', 'V'] not {mode}")
        right = {"Q": lambda: self.QK, "K": lambda: self.QK.T, "V": lambda: self.OV}[mode]()
        scores = composition_scores(self.OV, right, broadcast_dims=True)
        layer = torch.arange(self.cfg.n_layers, device=scores.device)
        earlier = layer[:, None, None, None] < layer[None, None, :, None]
        return torch.where(earlier, scores, torch.zeros_like(scores))

    def all_head_labels(self) -> list[str]:
        """``["L0H0", "L0H1", ...]``."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    # --- processing ---------------------------------------------------------------------------------------------------

    @property
    def processing(self) -> Processing:
        """Which processing options are in force."""
        return self.interior.weights.processing

    def set_processing(self, chosen: Processing) -> None:
        """Change the basis in which activations and weights are shown; no parameter changes, and it can be undone.

        The weights of a model that was made from a config are rewritten instead, for good. What would change the
        model's function is left out: centring the stream of a model with RMS norms, folding norms that stand behind a
        branch, centring logits that are capped.

        Raises:
            AssertionError: refactoring queries and keys that are rotated before they meet.
            ValueError: refactoring heads that share keys and values.
        """
        self.interior.process(chosen)
        self.setup()

    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Show the model as processed by these options, and with value biases folded (as in TransformerLens)."""
        self.set_processing(
            Processing(fold_ln, center_writing_weights, center_unembed, True, refactor_factored_attn_matrices)
        )

    def fold_layer_norm(
        self, state_dict: dict[str, Tensor], fold_biases: bool = True, center_weights: bool = True
    ) -> dict[str, Tensor]:
        """A state dict in TransformerLens' names with every norm folded into its readers."""
        return ProcessWeights.fold_layer_norm(state_dict, self.cfg, fold_biases, center_weights)

    def center_writing_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with everything that writes to the residual stream centred over d_model."""
        return ProcessWeights.center_writing_weights(state_dict, self.cfg)

    def center_unembed(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with the unembedding centred over the vocabulary."""
        return ProcessWeights.center_unembed(state_dict, self.cfg)

    def fold_value_biases(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with value biases carried into the output biases."""
        return ProcessWeights.fold_value_biases(state_dict, self.cfg)

    def refactor_factored_attn_matrices(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with every head's QK and OV circuits rewritten by their singular value decomposition."""
        return ProcessWeights.refactor_factored_attn_matrices(state_dict, self.cfg)

    # --- state dicts --------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The weights under TransformerLens' names and in its shapes, in the active basis.

        Without processing they share memory with the HF parameters. ``model.hf_model.state_dict()`` has HF's. Modules
        that a subclass or a user has added have theirs here too.
        """
        # Positional arguments are PyTorch's old way, and come before those by keyword.
        given: Any = (*args, *(destination, prefix, keep_vars)[len(args) :])
        destination, prefix, keep_vars = given
        out = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)  # type: ignore[misc]
        for name in self.interior.weights.names():
            weight = self.interior.weights.get(name)
            out[prefix + name] = weight if keep_vars else weight.detach()
        out |= {prefix + name: value for name, value in self.interior.weights.constants().items()}
        return out

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Write weights under TransformerLens' names into the HF model's parameters.

        Raises:
            ReadOnlyWeightError: if processing is on: the weights shown are derived then; or for a bias other than zero
                that HF has no parameter for.
            RuntimeError: missing or unexpected names (unless ``strict=False``), or another shape; nothing is written
                then.
            UnsupportedModelError: if the head is tied to the embedding and the two are given different values.
        """
        return self.interior.load(super(), state_dict, strict, assign)

    def load_and_process_state_dict(
        self,
        state_dict: dict[str, Tensor],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Write unprocessed weights into the HF model's parameters and show them processed by these options."""
        chosen = Processing(
            fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices
        )
        self.interior.load_and_process(self, state_dict, chosen)
        self.setup()

    def fill_missing_keys(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict with the model's present values where it has none; a missing weight matrix is warned of."""
        own = self.state_dict()
        missing = own.keys() - state_dict.keys()
        matrices = sorted(name for name in missing if "W_" in name)
        if matrices:
            logging.warning("missing from the state dict, kept as they are: %s", ", ".join(matrices))
        return {**state_dict, **{name: own[name] for name in own if name in missing}}

    def init_weights(self) -> None:
        """Draw every weight matrix anew by ``cfg.init_mode`` and ``cfg.initializer_range``, after ``cfg.seed`` if set.

        Raises:
            ReadOnlyWeightError: if processing is on.
            ValueError: for an unknown mode.
        """
        cfg, weights, draw = self.cfg, self.interior.weights, draw_for(self.cfg)
        if cfg.seed is not None:
            torch.manual_seed(cfg.seed)
        for name in weights.names():
            if is_drawn(name):
                value = torch.empty(weights.shape(name), dtype=cfg.dtype)
                draw(name, value)
                weights.set(name, value)
