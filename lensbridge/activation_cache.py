"""What do the activations of a run say about its residual stream?

:class:`ActivationCache` is what ``run_with_cache`` returns: a dictionary of activations
(:mod:`lensbridge._cache_lookup`) that can also take the residual stream apart, by layer, by head or by neuron, and turn
the parts into contributions to a logit. All of it follows from one fact: the residual stream is a sum, and a norm with
its scale held fixed is linear (:mod:`lensbridge._cache_norms`), so the parts can be followed one by one to the next
reader.

A *stack* has shape ``[components, *batch_and_pos, d_model]``, where ``*batch_and_pos`` is ``batch pos``, ``pos`` after
``remove_batch_dim``, and one less when ``pos_slice`` is an int. ``layer`` always means "the input of that layer":
``n_layers``, -1 and None mean the input of the unembedding.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float, Int

from lensbridge._cache_lookup import logger
from lensbridge._cache_norms import NormedReads
from lensbridge._residual_stack import (
    Stack,
    as_matrix,
    as_slice,
    centred,
    head_results,
    join,
    neuron_results,
    together,
)
from lensbridge.utilities.slice import Slice, SliceInput

#: One token for all inputs, or one for each position or each input and position.
Tokens = str | int | Int[torch.Tensor, "*batch_and_pos"]
#: One number for each part of the residual stream, at each input and position.
Attributions = Float[torch.Tensor, "components *batch_and_pos"]


class ActivationCache(NormedReads):
    """The activations of one run, and the residual stream taken apart (TransformerLens' class of the same name).

    Look up with ``cache["q", 3]`` or a full hook name; the methods below need the activations that they name, so a
    run with a narrow ``names_filter`` supports fewer of them.
    """

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """The residual stream as it stands at the input of each layer, for the logit lens.

        Entries are labelled ``0_pre``, ``1_pre``, ... and ``final_post`` at the end of the model; ``incl_mid`` adds
        ``{l}_mid`` for the layers before ``layer``, ``mlp_input`` for ``layer`` itself. With ``apply_ln`` each entry
        goes through the model's last norm with its own statistics when ``layer`` is the end of the model; for an
        earlier layer the entries are divided by that layer's cached scale.
        """
        pos, target = as_slice(pos_slice), self._target(layer)
        n_layers = self.model.cfg.n_layers
        entries: list[tuple[str, tuple[str, int]]] = []
        for at in range(min(target + 1, n_layers)):
            entries.append((f"{at}_pre", ("resid_pre", at)))
            if (incl_mid and at < target) or (mlp_input and at == target):
                entries.append((f"{at}_mid", ("resid_mid", at)))
        if target == n_layers:
            entries.append(("final_post", ("resid_post", n_layers - 1)))
        stack = join(pos.apply(self[key], dim=-2) for _, key in entries)
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack, target, mlp_input, pos_slice=pos, has_batch_dim=self.has_batch_dim, recompute_ln=True
            )
        labels = [label for label, _ in entries]
        return (stack, labels) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """The residual stream at the input of a layer as the outputs of everything before it.

        Labels are ``embed``, ``pos_embed``, then ``{l}_attn_out`` and ``{l}_mlp_out`` for each layer; ``mode`` keeps
        one kind of sublayer, ``mlp_input`` adds the attention output of ``layer`` itself. With both embeddings and mode
        "all" the sum over the stack is the residual stream.

        Raises:
            UnsupportedModelError: (a ValueError) the stream is no such sum in this model.
        """
        self._refuse_no_sum(incl_embeds)
        if mode not in ("all", "mlp", "attn"):
            warnings.warn(f'mode={mode!r} is taken as "all"; the modes are "all", "mlp" and "attn".', stacklevel=2)
        stack, labels = self._sublayer_stack(layer, mlp_input, mode, as_slice(pos_slice), incl_embeds)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    def _sublayer_stack(
        self, layer: int | None, mlp_input: bool, mode: str, pos: Slice, incl_embeds: bool
    ) -> tuple[Stack, list[str]]:
        incl_attn = mode != "mlp"
        incl_mlp = mode != "attn" and not self.model.cfg.attn_only
        target = self._target(layer, mlp_input and incl_attn)
        entries: list[tuple[str, str | tuple[str, int]]] = []
        if incl_embeds:
            entries += [(name, f"hook_{name}") for name in self._embeddings()]
        for at in range(target):
            if incl_attn:
                entries.append((f"{at}_attn_out", ("attn_out", at)))
            if incl_mlp:
                entries.append((f"{at}_mlp_out", ("mlp_out", at)))
        if mlp_input and incl_attn:
            entries.append((f"{target}_attn_out", ("attn_out", target)))
        return join(pos.apply(self[key], dim=-2) for _, key in entries), [label for label, _ in entries]

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slice | SliceInput = None,
        apply_ln: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """What each head of the layers before ``layer`` wrote to the residual stream, labelled ``L0H0``, ``L0H1``, ...

        Biases belong to no head; ``incl_remainder`` adds the rest of the stream as a last entry, ``remainder``. Where
        the run did not store ``attn.hook_result``, it is computed and stays in the cache.
        """
        if incl_remainder:
            self._refuse_no_sum(False)
        pos = as_slice(pos_slice)
        stack, labels = self._head_stack(self._target(layer), pos)
        if incl_remainder:
            remainder = self._stream(layer, pos).to(stack.device) - stack.sum(dim=0)
            stack, labels = torch.cat([stack, remainder[None]]), [*labels, "remainder"]
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=pos)
        return (stack, labels) if return_labels else stack

    def _head_stack(self, target: int, pos: Slice) -> tuple[Stack, list[str]]:
        self._fill_in_head_results(needed_below=target)
        parts = [pos.apply(self["result", at], dim=-3).movedim(-2, 0) for at in range(target)]
        if not parts:
            return self._stream(0, pos)[None][:0], []
        labels = [f"L{at}H{head}" for at, part in enumerate(parts) for head in range(part.shape[0])]
        return torch.cat(together(parts)), labels

    def compute_head_results(self) -> None:
        """Add ``attn.hook_result``, what each head writes to the residual stream, for all layers that lack it.

        Raises:
            UnknownPointError: (a KeyError) the ``attn.hook_z`` that it takes is not in the cache.
        """
        if not self._fill_in_head_results(needed_below=self.model.cfg.n_layers):
            logger.warning("Tried to compute head results when they were already cached")

    def _fill_in_head_results(self, needed_below: int) -> bool:
        """Compute what is missing; of a layer that is not needed, only if it can be. Says whether anything was."""
        computed = False
        for at in range(self.model.cfg.n_layers):
            here = f"blocks.{at}.attn."
            missing = f"{here}hook_result" not in self.cache_dict
            if missing and (at < needed_below or f"{here}hook_z" in self.cache_dict):
                self.cache_dict[f"{here}hook_result"] = head_results(self["z", at], self.model.blocks[at].attn.W_O)
                computed = True
        return computed

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> torch.Tensor:
        """One activation (a short name such as "z") of all layers before ``layer``, stacked on a new first axis."""
        return join(self[activation_name, at, sublayer_type] for at in range(self._target(layer)))

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Slice | SliceInput = None,
        pos_slice: Slice | SliceInput = None,
        project_output_onto: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What each neuron of one layer writes to the residual stream: ``[*batch_and_pos, neurons, d_model]``.

        A projection, ``[d_model]`` or ``[d_model, num_outputs]``, takes the place of the last axis: it disappears, or
        has ``num_outputs`` entries. Nothing is added to the cache.
        """
        projection, is_vector = as_matrix(project_output_onto)
        neurons = as_slice(neuron_slice)
        # Position first: it is axis -2 only as long as the neuron axis is there.
        activations = neurons.apply(as_slice(pos_slice).apply(self["post", layer], dim=-2), dim=-1)
        results = neuron_results(activations, neurons.apply(self.model.blocks[layer].mlp.W_out, dim=0), projection)
        return results.squeeze(-1) if is_vector else results

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Slice | SliceInput = None,
        neuron_slice: Slice | SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[str]]:
        """What each neuron of the layers before ``layer`` wrote to the residual stream, labelled ``L0N0`` and so on.

        One entry per neuron is a lot of memory: choose with ``neuron_slice``, or give ``project_output_onto``
        (``[d_model]`` or ``[d_model, num_outputs]``), which replaces the last axis and is applied, after the norm if
        there is one, before the neurons are expanded. ``incl_remainder`` adds the rest of the stream as a last entry.
        """
        if incl_remainder:
            self._refuse_no_sum(False)
        pos = as_slice(pos_slice)
        projection, is_vector = as_matrix(project_output_onto)
        stack, labels = self._neuron_stack(layer, pos, as_slice(neuron_slice), projection, apply_ln)
        if incl_remainder:
            stream = self._read_at(layer, self._stream(layer, pos)[None], pos, projection, apply_ln)
            stream = stream.to(stack.device)
            stack, labels = torch.cat([stack, stream - stack.sum(dim=0)]), [*labels, "remainder"]
        if is_vector:
            stack = stack.squeeze(-1)
        return (stack, labels) if return_labels else stack

    def _neuron_stack(
        self,
        layer: int | None,
        pos: Slice,
        neurons: Slice,
        projection: torch.Tensor | None,
        apply_ln: bool,
        mlp_input: bool = False,
    ) -> tuple[torch.Tensor, list[str]]:
        """Neurons as the norm at ``layer`` and the projection see them; with both, the norm is applied to W_out."""
        target, d_mlp = self._target(layer), self.model.cfg.d_mlp
        assert d_mlp is not None, "model.cfg.d_mlp must be set"
        if neurons.mode == "int":
            neurons = Slice(neurons.indices(d_mlp))  # keeps the neuron axis
        chosen = neurons.apply(torch.arange(d_mlp)).tolist()
        scale = self._scale(target, mlp_input, pos) if apply_ln and self._is_normed() else None
        parts = []
        for at in range(target):
            activations = neurons.apply(pos.apply(self["post", at], dim=-2), dim=-1)
            directions = neurons.apply(self.model.blocks[at].mlp.W_out, dim=0)
            if scale is not None:
                activations = activations / scale.to(activations.device)
                directions = centred(directions) if self._centres() else directions
            parts.append(neuron_results(activations, directions, projection).movedim(-2, 0))
        if not parts:
            return self._read_at(layer, self._stream(0, pos)[None][:0], pos, projection, False), []
        return torch.cat(together(parts)), [f"L{at}N{neuron}" for at in range(target) for neuron in chosen]

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        return_labels: bool = False,
        project_output_onto: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[str]]:
        """The residual stream at the input of a layer as single heads, neurons, embeddings and one bias.

        In this order: heads (``L0H0``), neurons (``L0N0``; whole MLPs, ``0_mlp_out``, with ``expand_neurons=False``),
        ``embed``, ``pos_embed`` and ``bias``, the sum of the biases in no other entry. The sum over the stack is the
        residual stream. ``project_output_onto`` works as in :meth:`stack_neuron_results`.
        """
        self._refuse_no_sum(True)
        pos, target = as_slice(pos_slice), self._target(layer, mlp_input)
        projection, is_vector = as_matrix(project_output_onto)
        has_mlps = not self.model.cfg.attn_only
        heads, labels = self._head_stack(target + int(mlp_input), pos)
        stacks = [heads]
        neurons: list[torch.Tensor] = []
        if has_mlps and target > 0:
            if expand_neurons:
                stack, names = self._neuron_stack(target, pos, Slice(None), projection, apply_ln, mlp_input)
                neurons = [stack]
            else:
                stack, names = self._sublayer_stack(target, False, "mlp", pos, incl_embeds=False)
                stacks.append(stack)
            labels += names
        for name in self._embeddings():
            stacks.append(pos.apply(self[f"hook_{name}"], dim=-2)[None])
            labels.append(name)
        # A whole MLP output holds its own bias.
        bias = self.model.accumulated_bias(target, mlp_input, include_mlp_biases=expand_neurons and has_mlps)
        stacks.append(bias.to(heads.device).expand(1, *heads.shape[1:]))
        labels.append("bias")
        read = [self._read_at(layer, stack, pos, projection, apply_ln, mlp_input) for stack in stacks]
        result = torch.cat(together([*read[:1], *neurons, *read[1:]]))
        if is_vector:
            result = result.squeeze(-1)
        return (result, labels) if return_labels else result

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
    ) -> Attributions:
        """How much each part of the residual stream adds to the logit of ``tokens`` (direct logit attribution).

        The last norm's scale is applied here, so the stack must not have been normed before; ``b_U`` belongs to no
        part. With ``incorrect_tokens``, of the same shape, it is the difference of the two logits. The slices are
        those of :meth:`apply_ln_to_stack`.

        Raises:
            ValueError: the two kinds of tokens differ in shape, or a token is of a type that names no token.
        """
        directions = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            shape, other = self._token_shape(tokens), self._token_shape(incorrect_tokens)
            if shape != other:
                raise ValueError(
                    "tokens and incorrect_tokens must have the same shape! "
                    f"(tokens.shape={shape}, incorrect_tokens.shape={other})"
                )
            directions = directions - self.model.tokens_to_residual_directions(incorrect_tokens)
        normed = self.apply_ln_to_stack(
            residual_stack, pos_slice=pos_slice, batch_slice=batch_slice, has_batch_dim=has_batch_dim
        )
        return (normed * directions.to(normed.device)).sum(dim=-1)

    def _token_shape(self, tokens: Any) -> tuple[int, ...]:
        if isinstance(tokens, torch.Tensor):
            return tuple(tokens.shape)
        if isinstance(tokens, str):
            self.model.to_single_token(tokens)
        elif not isinstance(tokens, int):
            raise ValueError(f"Tokens are given as a str, an int or a tensor, not as {type(tokens).__name__}.")
        return ()

    def ssm_layers(self, mixer_type: type | tuple[type, ...] | None = None) -> list[int]:
        """The layers whose mixer is a state space model: none, as all blocks of these models have attention."""
        return []

    def compute_ssm_state(self, layer: int | None = None, time_step: int | None = None) -> torch.Tensor:
        """The recurrent state of a state space layer, which these models do not have.

        Raises:
            TypeError: for a given layer, as it is no state space layer.
            RuntimeError: for all layers, as none is.
        """
        raise self._no_ssm(layer)

    def compute_ssm_effective_attention(
        self, layer: int | None = None, include_dt_scaling: bool = False, per_state_coord: bool = False
    ) -> torch.Tensor:
        """What a state space layer does written as attention, for layers that these models do not have.

        Raises:
            TypeError: for a given layer, as it is no state space layer.
            RuntimeError: for all layers, as none is.
        """
        raise self._no_ssm(layer)

    def _no_ssm(self, layer: int | None) -> TypeError | RuntimeError | IndexError:
        n_layers = self.model.cfg.n_layers
        if layer is None:
            return RuntimeError("No SSM mixer layers found: every block of this model has attention instead.")
        if not -n_layers <= layer < n_layers:
            return IndexError(f"There is no layer {layer} in a model of {n_layers}.")
        return TypeError(f"Block {layer} has no SSM mixer: every block of this model has attention instead.")

    def _embeddings(self) -> list[str]:
        return [name for name, there in (("embed", self.has_embed), ("pos_embed", self.has_pos_embed)) if there]
