"""`HookedTransformer`: TransformerLens' model class, on an unmodified HuggingFace model.

A facade of short methods. What they delegate to: `loading` (getting the HF model), `assembly` (its parts, or those of a
new model), `inputs` (arguments to a request), `engine` (the run), `weights` and `basis` (the two views), `tokens`
(text), `blocks` (the components).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import loading
from .activation_cache import ActivationCache
from .architectures import Architecture
from .assembly import assembled, tokenizer_for
from .blocks import Component
from .cache import TransformerLensKeyValueCache
from .config import HookedTransformerConfig
from .errors import EMBEDDINGS_ALONE, UnsupportedModelError
from .generation import GenerationMethods
from .hooked_root_module import HookedRootModule
from .inputs import Call, explaining_tokens, past_length, prepare, span_of
from .later import Later, LaterDict
from .listening import ListeningMethods
from .loading import DTYPE_FROM_STRING as DTYPE_FROM_STRING
from .placement import PlacementMethods
from .processing import Processing
from .sample_data import SampleDataMethods
from .sweeps import SweepMethods
from .tokens import PaddingSide, TokenMethods
from .tracing import TraceMethods
from .utilities.defaults_utils import USE_DEFAULT_VALUE, LocallyOverridenDefaults
from .utilities.lm_utils import lm_cross_entropy_loss
from .weight_methods import WeightMethods

SingleLoss = Float[torch.Tensor, ""]
LossPerToken = Float[torch.Tensor, "batch pos-1"]
Loss = SingleLoss | LossPerToken
T = TypeVar("T", bound="HookedTransformer")


class Output(NamedTuple):
    """What ``return_type="both"`` gives."""

    logits: Float[torch.Tensor, "batch pos d_vocab"]
    loss: Loss


class _Recording(NamedTuple):
    """A cache for the engine to fill: the points it wants, and what puts a value away."""

    names: frozenset[str]
    keep: Callable[[str, Tensor], None]
    keep_later: Callable[[str, Later], None]
    #: What is kept of a value, and what puts that away, where the two are not in one place.
    cut: Callable[[str, Tensor], Tensor]
    put: Callable[[str, Tensor], None]


class HookedTransformer(
    ListeningMethods,
    TokenMethods,
    WeightMethods,
    TraceMethods,
    GenerationMethods,
    SampleDataMethods,
    SweepMethods,
    PlacementMethods,
    HookedRootModule,
):
    """A HuggingFace language model with TransformerLens' hook points, weights and methods.

    Made by `from_pretrained`, or from a config for a model that is to be trained. ``model.hf_model`` is the HuggingFace
    model itself, unchanged; it computes everything.
    """

    embed: Any
    hook_embed: Any
    #: Learned positions only, as `hook_pos_embed`.
    pos_embed: Any
    hook_pos_embed: Any
    #: There under ``cfg.use_hook_tokens``.
    hook_tokens: Any
    #: One `TransformerBlock` per layer.
    blocks: Any
    ln_final: Any
    unembed: Any
    _cache_type = LaterDict

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict,
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: PaddingSide = None,
    ) -> None:
        """A new model of a config, with weights as ``cfg.init_mode`` and ``cfg.seed`` say (`native`).

        `from_pretrained` calls this too, for the model that it has loaded; a subclass passes these arguments on.

        Args:
            cfg: the config, or a dict of its fields.
            tokenizer: a HuggingFace tokenizer, or the name of one; None for ``cfg.tokenizer_name``, or tokens only.
            move_to_device: whether the model goes to ``cfg.device``.
            default_padding_side: "left" or "right"; None for the tokenizer's own.

        Raises:
            AssertionError: neither ``d_vocab`` nor a tokenizer is given.
            ValueError: ``cfg`` is the name of a model, or has an option that is unknown.
            UnsupportedModelError: the model is to be spread over devices, or quantized.
            ModelNotFoundError: (an OSError) the name leads to no tokenizer.
        """
        super().__init__()
        if isinstance(cfg, str):
            raise ValueError(
                "pass a HookedTransformerConfig; to load a model by name use HookedTransformer.from_pretrained"
            )
        loaded = loading.being_built()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        self.tokenizer = None
        self.dataset = None
        self._recording: _Recording | None = None
        self._goes_back = False
        tokenizer = tokenizer_for(loaded, tokenizer, self.cfg)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer, default_padding_side=default_padding_side)
        elif default_padding_side is not None:
            logging.warning("default_padding_side is ignored: the model has no tokenizer")
        self.interior, self._modules = assembled(loaded, self.cfg)
        self.training = self.hf_model.training
        if move_to_device:
            self.move_model_modules_to_device()
        self._components = [name for name, module in self.named_modules() if isinstance(module, Component)]
        self.setup()

    @property
    def hf_model(self) -> Any:
        """The HuggingFace model that does the computing."""
        return self.interior.hf_model

    # --- loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        checkpoint_label: int | None = None,
        hf_model: Any = None,
        device: str | torch.device | None = None,
        n_devices: int = 1,
        tokenizer: Any = None,
        move_to_device: bool = True,
        fold_value_biases: bool = True,
        default_prepend_bos: bool | None = None,
        default_padding_side: PaddingSide = None,
        dtype: torch.dtype | str = "float32",
        first_n_layers: int | None = None,
        n_ctx: int | None = None,
        architecture: Architecture | None = None,
        remote: bool | str | None = None,
        **from_pretrained_kwargs: Any,
    ) -> Any:
        """Load a model and show it as TransformerLens' defaults process it.

        Args:
            model_name: a TransformerLens name or alias, any hub id, a local directory, or "toy" (bundled).
            fold_ln, center_writing_weights, center_unembed, refactor_factored_attn_matrices, fold_value_biases:
                the basis in which activations and weights are shown (`processing.py`); the model itself is not changed.
            checkpoint_index, checkpoint_value, checkpoint_label: a training checkpoint by position in the list of
                steps, or by step (the last two are the same), for models that published them.
            hf_model: a loaded HuggingFace model, used as it is, with its dtype, device and attention implementation.
            device: where to put the model; cuda if there is one.
            n_devices: over how many GPUs to spread the layers (by accelerate); or pass ``device_map``.
            tokenizer: an object, a name, or None for the model's own.
            move_to_device: False leaves the loaded model on the CPU.
            default_prepend_bos: whether text gets a BOS token by default; None for the family's default.
            default_padding_side: "left" or "right"; None for the tokenizer's own.
            dtype: a torch dtype or "float32", "fp32", "float16", "fp16", "bfloat16", "bf16".
            first_n_layers: use the first layers only.
            n_ctx: a shorter context than the model's.
            architecture: a record of one's own that describes the model, in the place of its family's; a model whose
                family has none is measured otherwise (`measuring`).
            remote: load no weights, and run on a server that has the model: True for NDIF, or the address of a server
                of its kind. "local" loads the model, and runs everything as it would travel.
            from_pretrained_kwargs: for HuggingFace's ``from_pretrained`` (``revision``, ``cache_dir``, ``device_map``,
                ``attn_implementation``, ...). Attention is eager by default; with another implementation, runs that
                touch scores or pattern switch to eager for themselves.

        Raises:
            ModelNotFoundError: (an OSError) the name leads to no checkpoint.
            UnsupportedModelError: (a ValueError) the architecture, or an option on it, is not supported.
            UnknownArgumentError: (a TypeError) an argument that nothing would read.
        """
        if checkpoint_value is not None and checkpoint_label is not None:
            raise ValueError("checkpoint_value and checkpoint_label are the same thing: give one of them")
        if isinstance(dtype, str):
            if dtype not in DTYPE_FROM_STRING:
                raise KeyError(f"unknown dtype {dtype!r}: one of {', '.join(DTYPE_FROM_STRING)}, or a torch.dtype")
            dtype = DTYPE_FROM_STRING[dtype]
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype or the name of one, not {dtype!r}")
        wish = loading.Wish(
            model_name,
            hf_model=hf_model,
            dtype=dtype,
            device=device,
            n_devices=n_devices,
            move_to_device=move_to_device,
            first_n_layers=first_n_layers,
            n_ctx=n_ctx,
            default_prepend_bos=default_prepend_bos,
            checkpoint_index=checkpoint_index,
            checkpoint_value=checkpoint_value if checkpoint_label is None else checkpoint_label,
            kwargs=from_pretrained_kwargs,
            architecture=architecture,
            remote=remote,
        )
        loaded = loading.load(wish)
        found = loading.find_tokenizer(tokenizer, loaded.cfg, from_pretrained_kwargs)
        with loading.building(loaded):
            model = cls(loaded.cfg, found, move_to_device=False, default_padding_side=default_padding_side)
        chosen = Processing(
            fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices
        )
        model.set_processing(loading.at_first(chosen, loaded.cfg))
        if hf_model is not None and device is not None and move_to_device:
            model.to(device, print_details=False)
        print(f"Loaded pretrained model {model_name} into HookedTransformer")
        return model

    @classmethod
    def from_pretrained_no_processing(
        cls,
        model_name: str,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = False,
        dtype: torch.dtype | str = torch.float32,
        default_prepend_bos: bool | None = None,
        default_padding_side: PaddingSide = None,
        **from_pretrained_kwargs: Any,
    ) -> Any:
        """`from_pretrained` with every processing option off: activations and weights are HuggingFace's own."""
        return cls.from_pretrained(
            model_name,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            dtype=dtype,
            default_prepend_bos=default_prepend_bos,
            default_padding_side=default_padding_side,
            **from_pretrained_kwargs,
        )

    # --- running ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: PaddingSide = USE_DEFAULT_VALUE,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: Float[Tensor, "batch pos d_model"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
        *,
        remote: bool | str | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: a text, a list of texts, tokens ``[batch, pos]`` (or ``[pos]``), or with ``start_at_layer`` a
                residual stream ``[batch, pos, d_model]``.
            return_type: "logits" ``[batch, pos, d_vocab]``, "loss" (next-token cross entropy), "both" (an `Output`), or
                None to run up to the final norm and return nothing.
            loss_per_token: the loss as ``[batch, pos - 1]`` instead of its mean.
            prepend_bos, padding_side: override the model's and the tokenizer's defaults for this call.
            start_at_layer: run from this block on.
            tokens: with ``start_at_layer``, those that the loss is taken over, and that some models' layers read.
            shortformer_pos_embed: with ``start_at_layer``, the positional embedding of a shortformer.
            attention_mask: 1 for tokens to attend to, 0 for padding, ``[batch, pos]``.
            stop_at_layer: run up to this block, not including it, and return the residual stream there; later layers do
                not run. Negative numbers count from the end, as for ``start_at_layer``.
            past_kv_cache: keys and values of earlier tokens; grows by this call's unless frozen.
            remote: where the model runs: True for NDIF, the address of a server of its kind, or "local" to send the run
                through all of that in this process; None for where the weights are.

        Raises:
            ValueError: for another ``return_type``.
            RemoteRunError: (a RuntimeError) the run fails on a server.
            AssertionError: a loss without tokens; see also `inputs.prepare`.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type must be 'logits', 'loss', 'both' or None, not {return_type!r}")
        if shortformer_pos_embed is not None and self.cfg.positional_embedding_type != "shortformer":
            raise UnsupportedModelError("shortformer_pos_embed was given, but this model is no shortformer")
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            span = span_of(self.cfg.n_layers, start_at_layer, stop_at_layer, return_type)
            call = prepare(self, self.interior.basis, input, span, prepend_bos, tokens, attention_mask, past_kv_cache)
            if shortformer_pos_embed is not None and not span.embeds:
                call.request.inputs["shortformer_pos_embed"] = shortformer_pos_embed
            if remote is not None or self.interior.engine.elsewhere:
                with self.interior.running(remote) as engine:
                    if engine.elsewhere:
                        return self._run_elsewhere(call, return_type, loss_per_token, stop_at_layer is not None)
            with explaining_tokens(call.tokens, self.cfg.d_vocab):
                output = self.interior.engine.run(call.request, self._listeners(), self._recording)
            call.finish(self.interior.basis)
            return output if stop_at_layer is not None else self._returned(output, call, return_type, loss_per_token)

    def _run_elsewhere(self, call: Call, return_type: str | None, per_token: bool, stops: bool) -> Any:
        from .jobs import forward

        found = forward(self, call, return_type, per_token, stops, self._goes_back)
        return Output(*found) if return_type == "both" and not stops else found

    def _returned(self, logits: Any, call: Call, return_type: str | None, per_token: bool) -> Any:
        if return_type is None or return_type == "logits":
            return logits
        # What a run embeds is in its inputs, as hooks on tokens have left it.
        tokens = call.request.inputs.get("input_ids", call.tokens)
        if tokens is None:
            raise AssertionError("the loss needs the tokens: pass tokens= when starting at a layer")
        loss = self.loss_fn(logits, tokens, call.attention_mask, per_token=per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Loss:
        """Next-token cross entropy; positions that the mask excludes do not count."""
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        """(output, `ActivationCache`), or a plain dict of activations with ``return_cache_object=False``.

        Arguments as for ``forward`` and `HookedRootModule.run_with_cache` (``names_filter``, ``pos_slice``, ...).
        """
        output, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if isinstance(cache, LaterDict) and not self.interior.engine.comes_in_order:
            cache.put_in_order(self._ours)
        if not return_cache_object:
            # Hooks that stay on go on filling the very dict.
            return output, dict(cache) if kwargs.get("reset_hooks_end", True) else cache
        return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def _run_with_gradients(self, *args: Any, **kwargs: Any) -> Any:
        # Gradients cannot come back from a server, so that the backward pass is part of the run there.
        self._goes_back = True
        try:
            output = self(*args, **kwargs)
        finally:
            self._goes_back = False
        with self.interior.running(kwargs.get("remote")) as engine:
            if not engine.elsewhere:
                output.backward()
        return output

    @contextmanager
    def _caching(self, fwd_hooks: list, bwd_hooks: list, reset_hooks_end: bool, clear_contexts: bool) -> Iterator[None]:
        # Hooks are for what outlives the run, for gradients and for points that fire by themselves.
        all_of_them = bwd_hooks or not reset_hooks_end or self.interior.points_fire
        attached = fwd_hooks if all_of_them else [pair for pair in fwd_hooks if pair[0] in self._foreign]
        names = frozenset(name for name, _ in fwd_hooks) if len(attached) < len(fwd_hooks) else frozenset()
        before = self._recording
        # Hooks that an earlier run has left go with those of this one.
        hooked = attached or any(self._hook_lists)
        with self.hooks(attached, bwd_hooks, reset_hooks_end, clear_contexts) if hooked else nullcontext():
            if names:
                hook = fwd_hooks[0][1]
                self._recording = _Recording(names, hook.keep, hook.keep_later, hook.cut, hook.put)
            try:
                yield
            finally:
                self._recording = before
                if not hooked:
                    self.is_caching = False
                    if clear_contexts:
                        self.clear_contexts()

    # --- hook points --------------------------------------------------------------------------------------------------

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Turn ``attn.hook_result`` on or off: what each head adds to the residual stream."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Turn ``hook_q_input``, ``hook_k_input``, ``hook_v_input`` on or off: each head's own copy of the stream."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Turn ``hook_mlp_in`` on or off: the copy of the stream that only the MLP reads."""
        if self.cfg.attn_only:
            raise AssertionError("an attention-only model has no MLP, so no hook_mlp_in")
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Turn ``hook_attn_in`` on or off: the copy of the stream that each head reads for q, k and v alike."""
        if self.cfg.n_key_value_heads is not None:
            raise AssertionError("hook_attn_in has no meaning with grouped-query attention; use_split_qkv_input has")
        self.cfg.use_attn_in = use_attn_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Show keys and values once per query head in models with grouped-query attention."""
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention

    # --- pieces of the forward pass, as TransformerLens names them ----------------------------------------------------

    def get_pos_offset(self, past_kv_cache: TransformerLensKeyValueCache | None, batch_size: int) -> int:
        """How many tokens the key-value cache holds already."""
        return past_length(past_kv_cache, batch_size, self.cfg)

    def input_to_embed(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"],
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: PaddingSide = USE_DEFAULT_VALUE,
        attention_mask: Tensor | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Int[Tensor, "batch pos"], Tensor | None, Tensor | None]:
        """(residual stream before block 0, tokens, positional embedding of a shortformer or None, attention mask in
        force or None) for an input.
        """
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            offset = 0 if past_kv_cache is None else past_kv_cache[0].past_keys.shape[1]
            span = span_of(self.cfg.n_layers, None, None, "logits")
            call = prepare(self, self.interior.basis, input, span, prepend_bos, None, attention_mask, past_kv_cache)
            tokens = call.tokens
            assert tokens is not None
            if self.cfg.use_hook_tokens:
                tokens = self.hook_tokens(tokens)
            embed = getattr(self, "hook_embed", nn.Identity())(self.embed(tokens))
            residual, positions = self.get_residual(embed, offset, prepend_bos, call.attention_mask, tokens)
            return residual, tokens, positions, call.attention_mask

    def get_residual(
        self,
        embed: Float[Tensor, "batch pos d_model"],
        pos_offset: int,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        attention_mask: Tensor | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        return_shortformer_pos_embed: bool = True,
        device: str | torch.device | None = None,
    ) -> Any:
        """(residual stream before block 0, positional embedding of a shortformer or None) for token embeddings; the
        stream alone if told so. Rotary and ALiBi models have no positions in it.
        """
        if self.interior.adds_more_than_embeddings:
            raise UnsupportedModelError(EMBEDDINGS_ALONE)
        residual, kind = embed, self.cfg.positional_embedding_type
        positions: Any = None
        if kind in ("standard", "shortformer"):
            if tokens is None:
                tokens = torch.ones(embed.shape[:2], dtype=torch.long, device=device or embed.device)
            positions = getattr(self, "hook_pos_embed", nn.Identity())(
                self.pos_embed(tokens, pos_offset, attention_mask)
            )
        if kind == "standard":
            residual, positions = embed + positions, None
        return (residual, positions) if return_shortformer_pos_embed else residual
