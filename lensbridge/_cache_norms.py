"""How does a layer, or the unembedding, read a part of the residual stream?

Through its norm. The scale that a norm divides by belongs to the whole stream, so a part is divided by the cached scale
of the run and not by one of its own; that keeps the reading linear, and the parts add up to what the layer saw.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from lensbridge._cache_lookup import CachedActivations
from lensbridge._residual_stack import Stack, as_slice, centred, join, one_scale_for_all_heads
from lensbridge.errors import EMBEDDINGS_ALONE, UnknownPointError, UnsupportedModelError
from lensbridge.utilities.slice import Slice, SliceInput


class NormedReads(CachedActivations):
    """The activations of a run, and its norms as maps on parts of the residual stream."""

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Stack:
        """Each part of the residual stream as the norm of a layer passes it on: centred (LayerNorm), then scaled.

        The scale is the cached one, that of the whole stream, so parts stay parts: they add up to
        ``hook_normalized``. Gain and bias of the norm are not applied. With ``recompute_ln`` at the end of the model
        each entry goes through ``model.ln_final`` instead, with statistics of its own.

        ``residual_stack`` is expected to be sliced by ``pos_slice`` already, and not by ``batch_slice``, unless it has
        no batch dimension (``has_batch_dim=False``). A model without norms returns the stack unchanged.

        Raises:
            UnknownPointError: (a KeyError) the norm's ``hook_scale`` is not in the cache.
            UnsupportedModelError: (a ValueError) norms stand in the stream, not before what reads it.
        """
        if not self._is_normed():
            return residual_stack
        if getattr(self._interior, "norms_behind", False):
            raise UnsupportedModelError(
                "parts of the residual stream cannot be read through a norm in this model: its norms stand in the "
                "stream, behind attention and MLP, and nothing that reads the stream has one before it"
            )
        target, batch = self._target(layer), as_slice(batch_slice)
        if has_batch_dim:
            residual_stack = batch.apply(residual_stack, dim=1)
        if recompute_ln and target == self.model.cfg.n_layers and hasattr(self.model, "ln_final"):
            return join(self._final_norm(entry, has_batch_dim) for entry in residual_stack)
        if self._centres():
            residual_stack = centred(residual_stack)
        return residual_stack / self._scale(target, mlp_input, as_slice(pos_slice), batch).to(residual_stack.device)

    @property
    def _interior(self) -> Any:
        """What the model's parts share; encoders, and caches whose model was taken off, have none."""
        return getattr(self.model, "interior", None)

    def _refuse_no_sum(self, embeddings: bool) -> None:
        """Refuse to take the residual stream apart where the parts would not add up to it.

        Raises:
            UnsupportedModelError: (a ValueError) with the reason.
        """
        reason = getattr(self._interior, "why_no_sum", None)
        if reason is not None:
            raise UnsupportedModelError(f"the residual stream of this model cannot be taken apart: {reason}")
        if embeddings and getattr(self._interior, "adds_more_than_embeddings", False):
            raise UnsupportedModelError(f"{EMBEDDINGS_ALONE}; in a cache it is cache['resid_pre', 0]")

    def _final_norm(self, entry: torch.Tensor, has_batch_dim: bool) -> torch.Tensor:
        """``model.ln_final`` on one entry; it wants ``[batch, pos, d_model]`` whatever was sliced away."""
        whole = entry if has_batch_dim else entry[None]
        if whole.ndim == 2:
            whole = whole[:, None]
        return self.model.ln_final(whole).reshape(entry.shape)

    def _scale(self, target: int, mlp_input: bool, pos: Slice, batch: Slice | None = None) -> torch.Tensor:
        is_final = target == self.model.cfg.n_layers
        name = "ln_final.hook_scale" if is_final else f"blocks.{target}.ln{2 if mlp_input else 1}.hook_scale"
        try:
            scale = self[name]
        except UnknownPointError as error:
            raise UnknownPointError(f"Applying a norm takes the scale that the run divided by. {error}") from None
        if scale.ndim == (4 if self.has_batch_dim else 3):
            scale = one_scale_for_all_heads(scale)
        scale = pos.apply(scale, dim=-2)
        return batch.apply(scale) if batch is not None and self.has_batch_dim else scale

    def _is_normed(self) -> bool:
        return self.model.cfg.normalization_type in ("LN", "LNPre", "RMS", "RMSPre")

    def _centres(self) -> bool:
        return self.model.cfg.normalization_type in ("LN", "LNPre")

    def _read_at(
        self,
        layer: int | None,
        stack: Stack,
        pos: Slice,
        projection: torch.Tensor | None,
        apply_ln: bool,
        mlp_input: bool = False,
    ) -> torch.Tensor:
        """A stack as it is read at a layer: through the norm if asked for, then projected if asked for."""
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice=pos)
        return stack if projection is None else stack @ projection.to(stack.device)

    def _stream(self, layer: int | None, pos: Slice) -> torch.Tensor:
        """The whole residual stream at the input of a layer."""
        target = self._target(layer)
        stream = self["resid_post", target - 1] if target > 0 else self["resid_pre", 0]
        return pos.apply(stream, dim=-2)

    def _target(self, layer: int | None, mlp_input: bool = False) -> int:
        """The layer whose input is meant, with the end of the model as ``n_layers``."""
        n_layers = self.model.cfg.n_layers
        target = n_layers if layer is None else operator.index(layer)
        if target == -1:
            target = n_layers
        if not 0 <= target <= n_layers:
            raise UnknownPointError(
                f"There is no layer {layer} in a model of {n_layers}. Give 0 to {n_layers - 1}, "
                f"or {n_layers}, -1 or None for the input of the unembedding."
            )
        if mlp_input and target == n_layers:
            raise UnknownPointError("The unembedding has no MLP input. Give a layer together with mlp_input=True.")
        return target
