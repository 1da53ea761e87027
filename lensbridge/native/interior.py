"""What do the parts of a facade share when the model is one of our own?

What `lensbridge.interior.Interior` is for a HuggingFace model. Here the facade's modules are the native model's
themselves, so that weights need no views, state dicts no translation, and hook points no engine to show them values.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..components import PosEmbed
from ..config import HookedTransformerConfig
from ..errors import UnsupportedModelError
from ..processing import Processing
from .body import LEARNED_POSITIONS
from .engine import NativeEngine
from .model import NativeForCausalLM
from .processing import process_weights
from .weights import NativeWeights


class NativeBasis:
    """The basis of a native model: values are in it as they are computed. The interface is that of `basis.Basis`."""

    #: A model of our own keeps keys and values only.
    hf_model: ClassVar[None] = None

    def number(self, layer: int) -> int:
        """Layers have one number only."""
        return layer

    def value_bias(self, layer: int) -> None:
        """Nothing: values are shown as they are."""

    def head_maps(self, layer: int) -> None:
        """Nothing: queries and keys are shown as they are."""


@dataclass
class NativeInterior:
    """A native model with its config, weights, basis and engine."""

    hf_model: NativeForCausalLM
    cfg: HookedTransformerConfig
    weights: NativeWeights
    basis: NativeBasis
    engine: NativeEngine
    #: Not asked: the modules of the tree are those that compute.
    rearranged: bool = False

    can_be_traced: ClassVar[bool] = False
    service: ClassVar[None] = None
    counts_from: ClassVar[int] = 0
    key_value_cache: ClassVar[str] = "new tokens"
    no_text: ClassVar[str | None] = None
    rereads: ClassVar[str | None] = None
    why_no_sum: ClassVar[str | None] = None
    norms_behind: ClassVar[bool] = False
    adds_more_than_embeddings: ClassVar[bool] = False
    points_fire: ClassVar[bool] = True

    @classmethod
    def of(cls, hf_model: NativeForCausalLM) -> NativeInterior:
        """The views of a native model."""
        return cls(hf_model, hf_model.cfg, NativeWeights(hf_model), NativeBasis(), NativeEngine(hf_model))

    @contextmanager
    def running(self, remote: bool | str | None) -> Iterator[NativeEngine]:
        """The engine for a run.

        Raises:
            UnsupportedModelError: the run is to be a job for a server.
        """
        if remote:
            raise UnsupportedModelError(
                f"remote={remote!r}: a model that was made from a config runs where it is, as servers have models of "
                "the hub"
            )
        yield self.engine

    @property
    def n_positions(self) -> int | None:
        """How many tokens a run can take; None for any number: ALiBi, and positions from a module of the user's."""
        kind = self.cfg.positional_embedding_type
        if kind not in LEARNED_POSITIONS:
            return None if kind == "alibi" else self.cfg.n_ctx
        positions = self.hf_model.pos_embed
        return len(positions.W_pos) if isinstance(positions, PosEmbed) else None

    def points(self) -> tuple[str, ...]:
        """No names: a run comes by the hook points in TransformerLens' order, so that nobody has to know it."""
        return ()

    def served(self, known: Collection[str]) -> set[str]:
        """All hook points fire, those that a user has added too."""
        return set(known)

    def why_absent(self, name: str) -> str | None:
        """Nothing is known of points that a model of our own does not have."""
        return None

    def process(self, chosen: Processing) -> None:
        """Rewrite the weights by these options (`processing.py`)."""
        before, done = self.weights.processing, process_weights(self.hf_model, chosen)
        self._note(Processing(*map(operator.or_, astuple(before), astuple(done))))

    def load(self, added: Any, state_dict: Mapping[str, Tensor], strict: bool, assign: bool) -> Any:
        """`nn.Module.load_state_dict` of the facade, whose modules are the model's."""
        return added.load_state_dict(state_dict, strict=strict, assign=assign)

    def load_and_process(self, model: Any, state_dict: Mapping[str, Tensor], chosen: Processing) -> None:
        """Take over unprocessed weights, rewritten by these options."""
        self._note(process_weights(self.hf_model, chosen, state_dict))

    def _note(self, processing: Processing) -> None:
        self.weights.processing = processing
        self.cfg.layer_norm_folding = processing.fold_ln
