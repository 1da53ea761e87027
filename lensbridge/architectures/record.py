"""What has to be known of a model family to serve TransformerLens' points on it?

Where the roles live in the HuggingFace module tree, how the query, key and value projections are laid out, and what the
config calls things. A record is data: nothing here or in the family files runs a model. Layers of one model can be of
several kinds (dense or mixture of experts, attention or a recurrence); which kind a layer is shows in the modules it
has, so a record says what the presence of a module changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal

from ..errors import UnsupportedModelError
from .block import LLAMA_KINDS as LLAMA_KINDS
from .block import Block as Block
from .block import instead_of_attention as instead_of_attention
from .block import mixture as mixture
from .block import with_experts
from .block import without_mlp as without_mlp
from .forms import PARTS as PARTS
from .forms import LayerRun as LayerRun
from .forms import Layout as Layout
from .forms import Refusal as Refusal
from .forms import Softmax as Softmax


def _reason(refusals: tuple[Refusal, ...], point: str) -> str | None:
    """The reason of the first refusal of a point."""
    return next((refusal.reason for refusal in refusals if point in refusal.points), None)


def asked(hf_config: Any, condition: str) -> Any:
    """The attribute of a HF config that a condition is about (``attribute``, ``attribute=value``, or
    ``attribute!=attribute`` where both have to be the same)."""
    for name in condition.partition("=")[0].removesuffix("!").split("."):
        hf_config = getattr(hf_config, name, None)
    return hf_config


def holds(hf_config: Any, condition: str) -> bool:
    """Whether the attribute is true, or has the value, or not that of the other."""
    value, (name, given, expected) = asked(hf_config, condition), condition.partition("=")
    if name.endswith("!"):
        return value != asked(hf_config, expected)
    return str(value) == expected if given else bool(value)


@dataclass(frozen=True)
class Architecture:
    """One family: paths from the root of the HF model, and how its config fills a HookedTransformerConfig."""

    model_type: str
    hf_class: str
    #: Other model types whose models are of this class.
    also: tuple[str, ...] = ()
    embed: str = "model.embed_tokens"
    #: The learned positions that are added to the token embedding, and how many of their rows come before position 0.
    pos_embed: str | None = None
    pos_offset: int = 0
    #: Whether that is the row after the padding token's, and positions are counted from it by who calls the model.
    pos_after_padding: bool = False
    #: The attribute of the embedding that holds a factor on what it returns.
    embed_scale: str | None = None
    #: An attribute, by its path from the root, that holds a factor between what the embedding returns and the stream.
    embed_factor: str | None = None
    #: To which power that attribute is taken.
    embed_factor_power: float = 1.0
    #: A linear map of what the embedding returns.
    project_in: str | None = None
    #: The embedding of token types (sentences, Devlin et al. 2019), which is added as well.
    type_embed: str | None = None
    #: A norm between the embedding and the first layer; and whether it norms the sum of all embeddings.
    embed_norm: str | None = None
    embed_norm_of_sum: bool = False
    #: A linear map of all that, to the width of the stream.
    embed_map: str | None = None
    #: What else is added to the embeddings or done to them, in words.
    embed_extra: str | None = None
    layers: str = "model.layers"
    #: Where layers run several times in each forward pass: these runs, which count as layers, by the HF config.
    runs: Callable[[Any], tuple[LayerRun, ...]] | None = None
    ln_final: str | None = "model.norm"
    #: What stands between the last layer (and its norm) and the unembedding, if that is more than a linear map; or the
    #: linear map.
    head: str | None = None
    project_out: str | None = None
    unembed: str = "lm_head"
    #: An attribute, by its path from the root, that the final norm's output is divided by before the head.
    unembed_divisor: str | None = None
    #: Whether the last layer returns several streams that are unembedded, one after the other; the first gives logits.
    several_unembedded: bool = False
    #: HF config attribute with how many rows of tokens make one text.
    rows: str | None = None
    #: Below this module, positions come before the batch.
    positions_first: str | None = None
    #: Why no text can be written by asking for one token after the other, in words.
    no_text: str | None = None
    #: What the model is given with a key-value cache; "none" where it has no such cache as transformers' usual one.
    key_value_cache: Literal["new tokens", "whole text", "none"] = "new tokens"
    #: Those of these fields whose modules some models of the family do without.
    optional: tuple[str, ...] = ()
    #: What a layer is made of, and what it changes that a module or parameter (by its path below the layer) is there.
    block: Block = Block()
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: HF config attribute that lists something for each layer -> entry of the list -> what it changes in a layer.
    by_layer: Mapping[str, Mapping[Any, Mapping[str, Any]]] = field(default_factory=dict)
    #: Attribute of a layer, by its path below it -> its value -> what that changes in the layer.
    by_attribute: Mapping[str, Mapping[Any, Mapping[str, Any]]] = field(default_factory=dict)
    #: What the model does with what its head returns before these are logits: a factor, a cap (no linear map), or it
    #: stacks them with what its other heads return, or cuts off those of no token.
    after_unembed: Literal["factor", "cap", "stack", "cut"] | None = None
    #: The formula of the norms that are no torch.nn.LayerNorm.
    norm: Literal["LN", "RMS"] = "RMS"
    #: The norms' epsilon, where it is written in their code instead of an attribute.
    norm_eps: float | None = None
    #: What is added to the gain of a norm as it is stored.
    gain_offset: float = 0.0
    #: TransformerLens config field -> attribute of the HF config.
    config: Mapping[str, str] = field(default_factory=dict)
    #: TransformerLens config field -> value that all models of the family share.
    constants: Mapping[str, Any] = field(default_factory=dict)
    #: HF config attribute that is true, or ``attribute=value`` -> changes it brings, to ``block`` or to fields of the
    #: record.
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: The same -> why such a model is refused.
    refused: Mapping[str, str] = field(default_factory=dict)
    #: HF config attribute -> value that a checkpoint is loaded with, because what it sets otherwise is refused and
    #: makes no difference to the function.
    loaded_with: Mapping[str, Any] = field(default_factory=dict)
    #: What layers read besides the residual stream and positions, in words: a run that begins at a layer takes the
    #: tokens, too.
    rereads: str | None = None
    #: Points that the model does not have in any layer, or around them; by their names in the table (`points.py`).
    lacks: tuple[Refusal, ...] = ()
    #: The module of layers that a text by itself does not pass, so that they are not counted.
    unused_with: str | None = None
    #: What each layer of one model is made of (`for_model`), and its number in the HF model.
    blocks: tuple[Block, ...] = ()
    numbers: tuple[int, ...] = ()
    #: The runs of one model's layers, if they run several times.
    ran: tuple[LayerRun, ...] = ()

    def for_config(self, hf_config: Any) -> Architecture:
        """The record with the variants that ``hf_config`` selects.

        Raises:
            UnsupportedModelError: if the config sets an attribute that the record refuses.
        """
        hf_config = hf_config.get_text_config(decoder=True)
        for condition, reason in self.refused.items():
            if holds(hf_config, condition):
                found = f"{condition.partition('=')[0].removesuffix('!')}={asked(hf_config, condition)!r}"
                raise UnsupportedModelError(f"{self.model_type} with {found} is not supported: {reason}")
        changes: dict[str, Any] = {}
        for condition, change in self.variants.items():
            if holds(hf_config, condition):
                changes |= change
        own = {name: changes.pop(name) for name in [*changes] if name in self.__dataclass_fields__}
        chosen = replace(self, **own, block=replace(self.block, **changes)) if own or changes else self
        # Where the cap is an option, it is off if the config has no value for it.
        cap = self.config.get("output_logits_soft_cap")
        uncapped = self.after_unembed == "cap" and cap is not None and not getattr(hf_config, cap)
        return replace(chosen, after_unembed=None) if uncapped else chosen

    def for_model(self, hf_model: Any) -> Architecture:
        """The record of one model: with its config's variants, and with what each of its layers is made of.

        Raises:
            UnsupportedModelError: see `for_config`.
        """
        chosen = self.for_config(hf_model.config)
        hf_config, layers = hf_model.config.get_text_config(decoder=True), hf_model.get_submodule(self.layers)
        ran = () if self.runs is None else self.runs(hf_config)
        layers = [hf_model.get_submodule(run.path) for run in ran] or layers
        unused, there = self.unused_with, {path for path, _ in hf_model.named_modules()}
        numbers = tuple(i for i, layer in enumerate(layers) if unused is None or not hasattr(layer, unused))
        blocks: Iterable[Block] = (replace(chosen.block_of(layers[i]), **chosen._listed(hf_config, i)) for i in numbers)
        if len(chosen.blocks) == len(numbers):
            blocks = map(with_experts, chosen.blocks, (layers[i] for i in numbers))
        absent: dict[str, Any] = {role: None for role in self.optional if getattr(chosen, role) not in there}
        return replace(chosen, blocks=tuple(blocks), numbers=() if unused is None else numbers, ran=ran, **absent)

    def _listed(self, hf_config: Any, layer: int) -> dict[str, Any]:
        """What the config's lists change in a layer."""
        changes: dict[str, Any] = {}
        for attribute, of_entry in self.by_layer.items():
            changes |= of_entry.get(getattr(hf_config, attribute)[layer], {})
        return changes

    def block_of(self, layer: Any) -> Block:
        """What a layer is made of, by its modules and their attributes."""
        there = {path for named in (layer.named_modules(), layer.named_parameters()) for path, _ in named}
        changes = dict[str, Any]()
        for path, of_value in self.by_attribute.items():
            changes |= of_value.get(attrgetter(path)(layer), {})
        return with_experts(replace(self.block_with(there), **changes), layer)

    def block_with(self, there: Collection[str]) -> Block:
        """What a layer with these modules and parameters is made of, apart from the form of its experts."""
        changes = dict[str, Any]()
        for path, change in {**LLAMA_KINDS, **self.kinds}.items():
            if path in there:
                changes |= change
        return replace(self.block, **changes) if changes else self.block

    def within(self, model_type: str, hf_class: str, path: str = "model.language_model") -> Architecture:
        """The record of a model of several modalities, which has a model of this family at ``path`` and a head."""
        moved = {name: getattr(self, name) for name in ("embed", "layers", "ln_final", "embed_norm", "embed_factor")}
        paths: dict[str, Any] = {
            name: value.replace("model.", f"{path}.", 1) for name, value in moved.items() if isinstance(value, str)
        }
        return replace(self, model_type=model_type, hf_class=hf_class, **paths)

    @property
    def behind_layers(self) -> str:
        """The path of what reads the residual stream after the last layer."""
        return self.ln_final or self.unembeds_from

    @property
    def unembeds_from(self) -> str:
        """The path of what turns the last stream, normed or not, into logits: the head, or a linear map."""
        return self.head or self.project_out or self.unembed

    @property
    def reads_embedding_only(self) -> bool:
        """Whether the stream before the first layer is the token embedding plus that of positions, if there is one."""
        return not (self.type_embed or self.embed_norm_of_sum or self.embed_map or self.embed_extra)

    @property
    def why_no_sum(self) -> str | None:
        """Why the residual stream is not the sum of the first one and what attention and MLPs write; None if it is."""
        for block in self.blocks:
            if block.post_norm:
                return "norms stand in the stream, behind attention and MLP, and norm what earlier layers have added"
            if block.attn_skip or block.mlp_skip:
                return "attention and MLP add to what their norm returns, so that the stream before it does not go on"
            if block.attn_residual or block.mlp_residual:
                return "the stream is multiplied by a factor before attention's or the MLP's output is added to it"
            if block.extra is not None:
                return f"layers do more than to add what attention and MLP write: {block.extra}"
        if any(run.fresh for run in self.ran[1:]):
            return "some layers begin with another stream than what left the layer before"
        return None

    @property
    def final_call(self) -> int:
        """Which call of the final norm's module is the final norm: the embedding may go through it, too."""
        if self.ran:
            return self.ran[-1].before
        return int(self.ln_final is not None and self.ln_final == self.embed_norm)

    def layer(self, index: int) -> str:
        """The path of one layer."""
        if self.ran:
            return self.ran[index].path
        return f"{self.layers}.{self.number(index)}"

    def call(self, index: int) -> int:
        """How often a layer's module has run before it is this layer."""
        return self.ran[index].before if index < len(self.ran) else 0

    def number(self, index: int) -> int:
        """The number of a layer in the HF model."""
        return self.numbers[index] if self.numbers else index

    def entrance(self, index: int) -> tuple[str, Literal["input", "output"]]:
        """The path of a module whose input or output is the residual stream before a layer, or behind the last one."""
        if index >= len(self.blocks) and self.several_unembedded:
            return self.exit(len(self.blocks) - 1), "output"
        if index >= len(self.blocks):
            return self.behind_layers, "input"
        enters = self.blocks[index].enters
        return (self.layer(index), "input") if enters is None else (self.below(index, enters), "output")

    def why_refused(self, point: str) -> str | None:
        """Why a hook point (by its full name) that the layers' modules would give is not offered; None if it is."""
        parts = point.split(".", 2)
        if parts[0] != "blocks":
            return _reason(self.lacks, point)
        if int(parts[1]) >= len(self.blocks):
            return None
        everywhere = _reason(self.lacks, f"blocks.{{l}}.{parts[2]}")
        return everywhere or _reason(self.blocks[int(parts[1])].refusals, parts[2])

    def exit(self, index: int) -> str:
        """The path of the module whose output is the residual stream behind a layer."""
        return self.below(index, self.blocks[index].leaves or "")

    def below(self, index: int, path: str) -> str:
        """The path of what is at ``path`` below a layer."""
        if "{l}" in path:
            return path.replace("{l}", str(self.number(index)))
        return f"{self.layer(index)}.{path}" if path else self.layer(index)

    def in_layer(self, index: int, role: str) -> str:
        """The path of a role of `Block` in one layer.

        Raises:
            LookupError: if the layer has no such role.
        """
        path = getattr(self.blocks[index] if self.blocks else self.block, role)
        if path is None:
            raise LookupError(f"{self.model_type} has no {role!r} in layer {index}")
        return self.below(index, path)

    @property
    def n_experts(self) -> int:
        """How many experts a layer with experts has."""
        return max((block.expert_form.count for block in self.blocks), default=0)

    @property
    def features(self) -> frozenset[str]:
        """What the table of hook points (`points.py`) asks of what is around the layers."""
        found = {
            "embedding norm": self.embed_norm is not None and not self.embed_norm_of_sum,
            "learned positions": self.pos_embed is not None,
            "token types": self.type_embed is not None,
            "norm of the embeddings": self.embed_norm is not None and self.embed_norm_of_sum,
            "final norm": self.ln_final is not None,
        }
        return frozenset(name for name, there in found.items() if there)

    def any_layer(self, feature: str) -> bool:
        """Whether some layer has one of `Block.features`."""
        return any(feature in block.features for block in self.blocks)
