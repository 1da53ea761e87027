"""What do the parts of a hooked model share?

One plain object that every component holds: the HF model and the views of it. It is no nn.Module, so that the HF model
does not become a submodule of its own facade. A model of our own has another one, `native.interior`, with the same
methods.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .architectures import Architecture
from .basis import Basis
from .config import HookedTransformerConfig
from .engine import Engine
from .errors import ReadOnlyWeightError, UnsupportedModelError
from .hook_points import HookPoint
from .parameters import first_position
from .points import added_names, names, why_absent
from .processing import Processing
from .weights import WeightViews


@dataclass
class Interior:
    """A HuggingFace model with its record, config, weights, basis and engine."""

    hf_model: Any
    architecture: Architecture
    cfg: HookedTransformerConfig
    weights: WeightViews
    basis: Basis
    engine: Engine
    #: Whether a module was put into the tree since it was last looked at (`splicing`).
    rearranged: bool = False

    #: Who has the weights, if they are elsewhere.
    service: Any = None
    _jobs: Engine | None = None

    #: Whether points fire when their modules are called, whoever calls them.
    points_fire: ClassVar[bool] = False

    @classmethod
    def of(
        cls, hf_model: Any, architecture: Architecture, cfg: HookedTransformerConfig, service: Any = None
    ) -> Interior:
        """The views of a loaded HF model, or of one that a `Service` has the weights of."""
        weights = WeightViews(hf_model, architecture, cfg)
        basis = Basis(weights)
        if service is None:
            return cls(hf_model, architecture, cfg, weights, basis, Engine(hf_model, architecture, basis, cfg))
        from .engine.remote.client import RemoteEngine

        engine = RemoteEngine(hf_model, architecture, basis, cfg, service)
        engine.lend_weights()
        return cls(hf_model, architecture, cfg, weights, basis, engine, service=service)

    @property
    def can_be_traced(self) -> bool:
        """Whether nnsight's traces can be opened on the model."""
        return self.service is None

    @contextmanager
    def running(self, remote: bool | str | None) -> Iterator[Engine]:
        """The engine for a run; within the context it is the model's.

        Args:
            remote: True or an address for a server, "local" for a job in this process, None for where the weights are.

        Raises:
            UnsupportedModelError: the weights are not there.
        """
        before = self.engine
        if self.service is not None and remote is False:
            raise UnsupportedModelError("this model's weights are elsewhere (from_pretrained(remote=...)): no run here")
        if self.service is None and remote and remote != "local":
            raise UnsupportedModelError(
                f"remote={remote!r}: this model's weights are here. Load it with from_pretrained(name, remote=True), "
                'which loads no weights; remote="local" tries in this process how a run would travel'
            )
        if self.service is not None and remote not in (None, True, self.service.where):
            raise UnsupportedModelError(f"remote={remote!r}: this model was loaded with remote={self.service.where!r}")
        if self.service is not None or not remote or before.elsewhere:
            yield before
            return
        # The engine is the model's and not a thread's.
        with before.turns:
            self.engine = self._jobs = self._jobs or self._job_engine()
            try:
                yield self.engine
            finally:
                self.engine = before

    def _job_engine(self) -> Engine:
        from .engine.remote.client import RemoteEngine
        from .engine.remote.service import Service

        service = Service(self.hf_model, "local")
        return RemoteEngine(self.hf_model, self.architecture, self.basis, self.cfg, service)

    def module(self, path: str) -> Any:
        """A module of the HF model."""
        return self.hf_model.get_submodule(path)

    # --- hook points --------------------------------------------------------------------------------------------------

    @cached_property
    def own_points(self) -> frozenset[str]:
        """The names of all hook points."""
        return frozenset(self.points())

    def points(self) -> tuple[str, ...]:
        """The names of TransformerLens' hook points, in the order in which they fire there."""
        layers, architecture = [block.features for block in self.architecture.blocks], self.architecture
        named = names(layers, architecture.features, architecture.n_experts)
        return tuple(name for name in named if architecture.why_refused(name) is None)

    def why_absent(self, name: str) -> str | None:
        """Why there is no hook point ``name``, where other models have one; None if none has."""
        layers = [block.features for block in self.architecture.blocks]
        return self.architecture.why_refused(name) or why_absent(name, layers, self.architecture.features)

    def served(self, known: Collection[str]) -> set[str]:
        """The hook points that the engine shows values to; ``known`` are those that the model has."""
        return {*self.points(), *added_names(self.cfg.n_layers)}

    def replaceable(self, component: str) -> bool:
        """Whether a module can be put in the place of a component, by its name: of MLPs, and of the unembedding."""
        kind, architecture = component.rpartition(".")[2], self.architecture
        if kind == "mlp":
            return architecture.blocks[int(component.split(".")[1])].replaceable_mlp
        plain = architecture.head is None and architecture.unembed_divisor is None
        return kind == "unembed" and plain and architecture.after_unembed in (None, "cap")

    @cached_property
    def counts_from(self) -> int:
        """What the HF model calls the first position, where it is told positions."""
        return first_position(self.hf_model, self.architecture) if self.architecture.pos_after_padding else 0

    @property
    def why_no_sum(self) -> str | None:
        """Why the residual stream is not the sum of the first one and what layers write; None if it is."""
        return self.architecture.why_no_sum

    @property
    def norms_behind(self) -> bool:
        """Whether norms stand in the residual stream instead of before what reads it."""
        return self.architecture.any_layer("norms behind")

    @property
    def rereads(self) -> str | None:
        """What layers read besides the residual stream and positions, in words; None if nothing."""
        return self.architecture.rereads

    @property
    def n_positions(self) -> int | None:
        """How many tokens a run can take."""
        return self.cfg.n_ctx

    @property
    def no_text(self) -> str | None:
        """Why no text can be written by asking for one token after the other; None if it can."""
        return self.architecture.no_text

    @property
    def adds_more_than_embeddings(self) -> bool:
        """Whether more goes into the stream before the first layer than the embeddings of tokens and positions."""
        return not self.architecture.reads_embedding_only

    @property
    def key_value_cache(self) -> str:
        """What the HF model is given with a key-value cache ("new tokens", "whole text"), or "none" if it has none."""
        return self.architecture.key_value_cache

    # --- processing ---------------------------------------------------------------------------------------------------

    def process(self, chosen: Processing) -> None:
        """Show everything in the basis of these options; see `WeightMethods.set_processing`."""
        chosen = self._allowed(chosen)
        self.weights.processing = chosen
        self.cfg.normalization_type = self.architecture.norm + ("Pre" if chosen.fold_ln else "")
        self.cfg.layer_norm_folding = chosen.fold_ln

    def _allowed(self, chosen: Processing) -> Processing:
        architecture, cfg = self.architecture, self.cfg
        if chosen.refactor_factored_attn_matrices:
            if architecture.any_layer("rotary"):
                raise AssertionError("queries and keys cannot be refactored where they are rotated before they meet")
            if cfg.n_key_value_heads is not None:
                raise ValueError("attention cannot be refactored where several query heads share a key and value")
        left_out: dict[str, str | None] = {}
        if architecture.norm != "LN" or architecture.any_layer("norms behind"):
            left_out["center_writing_weights"] = None
        elif any(block.attn_skip or block.mlp_skip for block in architecture.blocks):
            left_out["center_writing_weights"] = "its residual stream is what norms return, and has a mean"
        if not any(block.folds_ln1 or block.folds_ln2 for block in architecture.blocks):
            left_out["fold_ln"] = "nothing linear reads its norms, which stand behind attention and MLP"
        if architecture.after_unembed == "cap":
            left_out["center_unembed"] = "its logits are capped, which centring would change"
        if architecture.after_unembed == "cut":
            left_out["center_unembed"] = "some of what is unembedded is no logit, and counts in no mean of these"
        if not all(block.moves_value_bias for block in architecture.blocks if block.attn is not None):
            left_out["fold_value_biases"] = "what a bias of its values adds to attention's output is no constant"
        for option, why in left_out.items():
            if why is not None and getattr(chosen, option):
                logging.warning("%s is left out for this model: %s", option, why)
        return replace(chosen, **dict.fromkeys(left_out, False))

    # --- state dicts --------------------------------------------------------------------------------------------------

    def load(self, added: Any, state_dict: Mapping[str, Tensor], strict: bool, assign: bool) -> Any:
        """Write weights into the HF model's parameters; see `WeightMethods.load_state_dict`.

        Args:
            added: what loads and gives the state dict of the modules that were added to the facade.
        """
        if self.weights.processing.any:
            raise ReadOnlyWeightError(
                "this model shows processed weights, which its parameters cannot take over. Call "
                "load_and_process_state_dict, or load the model with from_pretrained_no_processing first."
            )
        weights, own = self.weights, added.state_dict()
        names = weights.names()
        shapes = {name: weights.shape(name) for name in names} | {name: w.shape for name, w in own.items()}
        given = {name: value for name, value in state_dict.items() if not name.endswith((".mask", ".IGNORE"))}
        missing, unexpected = [n for n in shapes if n not in given], [n for n in given if n not in shapes]
        wrong = [
            f"{name}: {tuple(given[name].shape)} instead of {tuple(shape)}"
            for name, shape in shapes.items()
            if name in given and given[name].shape != shape
        ]
        if (strict and (missing or unexpected)) or wrong:
            raise RuntimeError(
                f"cannot load the state dict: missing {missing}, unexpected {unexpected}, shapes {wrong}"
            )
        self._refuse_untying(given)
        taken = [name for name in names if name in given]
        for name in taken:
            weights.check(name, given[name])
        for name in taken:
            weights.set(name, given[name])
        added.load_state_dict({name: given[name] for name in own if name in given}, strict=False)
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _refuse_untying(self, given: Mapping[str, Tensor]) -> None:
        tied = (given["embed.W_E"], given["unembed.W_U"]) if {"embed.W_E", "unembed.W_U"} <= given.keys() else None
        if self.weights.tied and tied and not torch.equal(tied[0], tied[1].T.to(tied[0].device)):
            raise UnsupportedModelError(
                "unembed.W_U is tied to embed.W_E in this HF model, and the state dict has different values for "
                "them. Load the HF model with tie_word_embeddings=False."
            )

    def load_and_process(self, model: Any, state_dict: Mapping[str, Tensor], chosen: Processing) -> None:
        """Write unprocessed weights and show them processed; see `WeightMethods.load_and_process_state_dict`."""
        before = self.weights.processing
        self.process(Processing())
        try:
            model.load_state_dict(model.fill_missing_keys(state_dict), strict=False)
        except Exception:
            self.process(before)
            raise
        self.process(chosen)


def listening(points: Mapping[str, HookPoint]) -> dict[str, nn.Module]:
    """The points among ``points`` that have hooks (PyTorch's own module hooks count)."""
    found: dict[str, nn.Module] = {}
    for name, point in points.items():
        # Every run asks this of every point, and nn.Module's attributes cost three times what a dict's do.
        state = point.__dict__
        if state["fwd_hooks"] or state["bwd_hooks"] or state["_forward_hooks"]:
            found[name] = point
    return found
