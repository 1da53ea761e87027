"""What do a HuggingFace model's parameters look like as TransformerLens weights?

Every weight is a view: in TransformerLens' shape it shares memory with the HF parameter (so an edit of it is an edit of
the model); with processing on it is computed from the parameters, kept until they change, and read-only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .affine import computed, stored_in
from .architectures import Architecture
from .computed import outlined
from .errors import ReadOnlyWeightError, UnknownPointError, near_misses
from .parameters import Branch, Parameters
from .processing import (
    Processing,
    Weights,
    process_attention,
    process_embedding,
    process_expert,
    process_mlp,
    process_unembed,
)
from .readonly import read_only
from .shared import SharedWeight
from .whole import is_offloaded

Processor = Callable[[Weights, Processing], Weights]

_PROCESSORS: dict[str, Processor] = {
    "embed": process_embedding,
    "attn": process_attention,
    "mlp": process_mlp,
    "expert": process_expert,
    "unembed": process_unembed,
}


def _processor(branch: str) -> Processor:
    return _PROCESSORS[branch.partition(" ")[0]]


#: Elements of a parameter that are looked at to notice edits through ``.data``, which leave its version counter alone.
_SAMPLE = 16384


#: branch -> where its weights and its norms stand in a state dict.
_PLACES = {
    "embed": {"": "embed.", "ln": "embed.ln.", "W_pos": "pos_embed."},
    "attn": {"": "blocks.{l}.attn.", "ln": "blocks.{l}.ln1.", "post": "blocks.{l}.{post}."},
    "mlp": {
        "": "blocks.{l}.mlp.",
        "ln": "blocks.{l}.ln2.",
        "post": "blocks.{l}.{post}.",
        "neurons": "blocks.{l}.mlp.ln.",
    },
    "expert": {"": "blocks.{l}.mlp.experts.{e}."},
    "unembed": {"": "unembed.", "ln": "ln_final.", "apart": "ln_final."},
}
#: With grouped queries these are stored once per key-value head, and their names begin with an underscore.
_GROUPED = ("W_K", "W_V", "b_K", "b_V")


class WeightViews:
    """TransformerLens' view of the parameters of one HF model.

    Names are those of TransformerLens' state dict: ``embed.W_E``, ``blocks.3.attn.W_Q``, ``blocks.3.ln1.w``, ...
    """

    def __init__(self, hf_model: nn.Module, architecture: Architecture, cfg: Any) -> None:
        self.parameters = Parameters(hf_model, architecture, cfg)
        self.hf_model = hf_model
        self.architecture = architecture
        self.cfg = cfg
        self._processing = Processing()
        self._kept: dict[tuple[str, int], tuple[Any, Weights]] = {}

    @property
    def processing(self) -> Processing:
        """The options that say in which basis the weights are shown."""
        return self._processing

    @processing.setter
    def processing(self, chosen: Processing) -> None:
        self._processing = chosen
        # Weights may have been edited while they were the model's own.
        self._kept.clear()

    # --- names --------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every weight of the model in the active basis, in TransformerLens' order."""
        return [name for name, at in self._table.items() if not self._folded(*at)]

    def constants(self) -> dict[str, Tensor]:
        """What TransformerLens' state dict has besides weights; the masks are empty here."""
        out: dict[str, Tensor] = {}
        attending = [layer for layer, block in enumerate(self.architecture.blocks) if block.attn is not None]
        for layer in attending:
            attention = f"blocks.{layer}.attn."
            out[attention + "mask"] = torch.empty(0, 0, dtype=torch.bool, device=self.cfg.device)
            out[attention + "IGNORE"] = torch.tensor(-torch.inf, device=self.cfg.device)
        return out

    def _folded(self, branch: str, layer: int, short: str) -> bool:
        if not self.processing.fold_ln or not short.startswith("ln.") or branch == "embed":
            return False
        if branch == "unembed":
            return True
        block = self.architecture.blocks[layer]
        return block.folds_ln1 if branch == "attn" else block.folds_ln2

    @cached_property
    def _table(self) -> dict[str, tuple[str, int, str]]:
        """state-dict name -> (branch, layer, name within the branch), of every weight there is."""
        out = self._names_of("embed", 0)
        for layer in range(self.cfg.n_layers):
            block = self._names_of("attn", layer) | self._names_of("mlp", layer)
            for expert in range(self.architecture.blocks[layer].expert_form.shown):
                block |= self._names_of(f"expert {expert}", layer)
            # TransformerLens' blocks have their norms before attention and MLP.
            out |= {name: at for name, at in block.items() if at[2].startswith(("ln.", "post."))} | block
        return out | self._names_of("unembed", 0)

    def _names_of(self, branch: str, layer: int) -> dict[str, tuple[str, int, str]]:
        kind, _, expert = branch.partition(" ")
        places, out = _PLACES[kind], {}
        posts = self.architecture.blocks[layer].post_norms if branch in ("attn", "mlp") else None
        post = "" if posts is None else posts[branch == "mlp"][1]
        for short in self.parameters.shapes(branch, layer):
            head, dot, rest = short.partition(".")
            if head == "ln" and head not in places:
                # An expert's norm is the MLP's.
                continue
            if dot and head in places:
                name = places[head] + rest
            else:
                grouped = self.parameters.grouped and short in _GROUPED
                name = places.get(short, places[""]) + ("_" if grouped else "") + short
            name = name.replace("{l}", str(layer)).replace("{e}", expert).replace("{post}", post)
            out[name] = (branch, layer, short)
        return out

    def _locate(self, name: str) -> tuple[str, int, str]:
        """(branch, layer, name within the branch) of a state-dict name."""
        found = self._table.get(name)
        if found is None:
            raise UnknownPointError(f"this model has no weight {name!r}.{near_misses(name, self.names())}")
        return found

    # --- the model's own parameters -----------------------------------------------------------------------------------

    def module(self, path: str) -> Any:
        """A module of the HF model by its path."""
        return self.parameters.module(path)

    def raw_branch(self, branch: str, layer: int = 0) -> dict[str, Tensor]:
        """The weights of a branch with its norm (``ln.w``, ``ln.b``), as views of the HF parameters."""
        return self.parameters.branch(branch, layer).weights

    # --- in the active basis ------------------------------------------------------------------------------------------

    def get(self, name: str) -> Tensor:
        """One weight in TransformerLens' shape and the active basis.

        Without processing it shares memory with the HF parameter, and its ``.grad`` with the parameter's; with
        processing it is a read-only tensor through which gradients reach the parameters.

        Raises:
            UnknownPointError: if the model has no such weight in this basis.
        """
        stored = name.replace("attn.", "attn._")
        if name not in self._table and stored in self._table:
            heads = self.parameters.heads(int(name.split(".")[1]))
            times = heads.queries // heads.key_values
            return read_only(
                self.get(stored).as_subclass(Tensor).repeat_interleave(times, dim=0),
                f"{name!r} repeats the weight of each key-value head for its query heads; that weight is {stored!r}",
            )
        branch, layer, short = self._locate(name)
        if self._folded(branch, layer, short):
            raise UnknownPointError(
                f"{name!r} is folded into the weights that read it (fold_ln); "
                "load with fold_ln=False, or with from_pretrained_no_processing, to have it by itself"
            )
        if not self.processing.any:
            raw, made, *_ = self.parameters.branch(branch, layer)
            if short in made:
                return read_only(raw[short], f"{name!r} is no parameter of the model: {made[short]}")
            weight = raw[short]
            return weight if isinstance(weight, nn.Parameter) else weight.as_subclass(SharedWeight)
        why = f"{name!r} is computed from the model's parameters by weight processing"
        kept = self.branch(branch, layer)[short]
        if torch.is_grad_enabled() and self._trained(branch, layer):
            every = self.raw_branch(branch, layer)
            raw = {each: weight for each, weight in every.items() if each == short or not _is_apart(each)}
            kept = _Derived.apply(kept, short, _processor(branch), self.processing, tuple(raw), *raw.values())
        return read_only(kept.view_as(kept), why)

    def branch(self, branch: str, layer: int = 0) -> Weights:
        """The processed weights of a branch without graph, kept until a parameter changes; not to be edited."""
        outline = self._outline(branch, layer)
        owners = {id(owner): owner for owner in map(_owner, _stored(outline))}
        prints = tuple(fingerprint(owner) for owner in owners.values())
        state = (self.processing, prints, tuple(outline.state.items()))
        kept = self._kept.get((branch, layer))
        if kept is None or kept[0] != (state, _versions(kept[1])):
            # Whatever mode the caller is in, what is kept has to serve a later call that needs gradients.
            with torch.inference_mode(False), torch.no_grad():
                detached = {short: weight.detach() for short, weight in self.raw_branch(branch, layer).items()}
                processed = _process(_processor(branch), detached, self.processing)
            kept = self._kept[(branch, layer)] = ((state, _versions(processed)), processed)
        return kept[1]

    def _outline(self, branch: str, layer: int) -> Branch:
        """A branch without the matrices that would have to be computed: of these, the shapes."""
        with outlined():
            return self.parameters.branch(branch, layer)

    def _trained(self, branch: str, layer: int) -> bool:
        """Whether gradients go to something that a branch's weights are made of."""
        outline = self._outline(branch, layer)
        return any(tensor.requires_grad for tensor in (*outline.weights.values(), *outline.sources.values()))

    def attention_output(self, layer: int) -> Weights:
        """``W_O`` and ``b_O`` of one layer as plain tensors, on the graph."""
        return {name: self.get(f"blocks.{layer}.attn.{name}").as_subclass(Tensor) for name in ("W_O", "b_O")}

    def stack(self, name: str) -> Tensor:
        """One weight of every layer, stacked along a new first axis (read-only: it is a copy)."""
        names = [f"blocks.{layer}.{name}" for layer in range(self.cfg.n_layers)]
        self.parameters.bring([self._table[each][:2] for each in names if each in self._table])
        layers = [self.get(each) for each in names]
        stacked = torch.stack([each.to(layers[0].device) for each in layers])
        return read_only(stacked, f"the stacked {name.split('.')[-1]} is a copy of every layer's own")

    def set(self, name: str, value: Tensor) -> None:
        """Overwrite one weight of the model by TransformerLens' name.

        Raises:
            ReadOnlyWeightError, TypeError, ValueError: see `check`.
        """
        self.check(name, value)
        branch, layer, short = self._locate(name)
        weights, made, *_ = self._outline(branch, layer)
        if short not in made:
            with torch.no_grad():
                weights[short].copy_(value)

    def check(self, name: str, value: Tensor) -> None:
        """Refuse a value that the model cannot take for one weight.

        Raises:
            ReadOnlyWeightError: if the weight is derived (processing is on, or HF has no such parameter).
            TypeError: if the value is no tensor.
            ValueError: if the shape differs.
        """
        branch, layer, short = self._locate(name)
        if self.processing.any:
            raise ReadOnlyWeightError(
                f"{name!r} is computed from the model's parameters by weight processing and cannot be set. Load with "
                "from_pretrained_no_processing, or call process_weights_ with all options off, to edit weights."
            )
        shape = tuple(self.shape(name))
        if not isinstance(value, Tensor):
            raise TypeError(f"{name!r} is set to a tensor of its shape {shape}, not to a {type(value).__name__}")
        if value.shape != shape:
            raise ValueError(f"{name!r} has shape {shape}, got {tuple(value.shape)}")
        made = self._outline(branch, layer).made
        if short in made and not torch.equal(value, self.raw_branch(branch, layer)[short].to(value)):
            raise ReadOnlyWeightError(f"{name!r} cannot be set: {made[short]}, so it stays as it is")

    def shape(self, name: str) -> torch.Size:
        """The shape of one weight."""
        branch, layer, short = self._locate(name)
        return self.parameters.shapes(branch, layer)[short].shape

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding's own parameter."""
        embed, head = map(self.hf_model.get_submodule, (self.architecture.embed, self.architecture.unembed))
        if computed(embed) is not None or computed(head) is not None:
            return False
        stored = stored_in(embed), stored_in(head)
        if is_offloaded(self.hf_model) and any(weight.is_meta for weight in stored):
            return bool(getattr(self.hf_model.config, "tie_word_embeddings", False))
        return stored[0] is stored[1]


def _is_apart(short: str) -> bool:
    """Whether a weight goes into no other one: it is of a norm whose output no matrix reads."""
    return "." in short and short.partition(".")[0] in ("post", "neurons", "q_norm", "k_norm", "apart")


def _owner(weight: Tensor) -> Tensor:
    """The parameter that a weight is a view of, or what stands for it."""
    return weight if weight._base is None or hasattr(weight, "stands_for") else weight._base


def _stored(branch: Branch) -> list[Tensor]:
    """What a branch's weights are, or are computed from."""
    return [*branch.sources.values(), *(w for short, w in branch.weights.items() if short not in branch.made)]


def fingerprint(parameter: Tensor) -> tuple:
    """Something that changes when the parameter does: place, version, and a weighted sum over a sample of it."""
    size = parameter.numel()
    if not size or not parameter.dim():
        value = float(parameter) if size else 0.0
        return parameter.data_ptr(), _version(parameter), value, parameter.device, parameter.dtype
    step = max(1, size // _SAMPLE)
    # A step that shared a factor with the row length would leave out whole columns.
    while math.gcd(step, parameter.shape[-1]) > 1:
        step -= 1
    count = -(-size // step)
    sample = parameter.detach().as_strided((count,), (step,)).double()
    total = float((sample * _ranks(count, sample.device)).sum())
    original = getattr(parameter, "stands_for", None)
    place = parameter.data_ptr() if original is None else id(original)
    version = _version(parameter if original is None else original)
    return place, version, total, parameter.device, parameter.dtype


def _versions(weights: Weights) -> tuple[int | None, ...]:
    """The version counters of kept weights, which tell of an edit that the read-only guard did not see coming."""
    return tuple(_version(weight) for weight in weights.values())


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@lru_cache(maxsize=32)
def _ranks(count: int, device: torch.device) -> Tensor:
    """Different factors for the places of a sample, so that exchanged entries are noticed."""
    with torch.inference_mode(False):
        return torch.linspace(1, 2, count, dtype=torch.float64, device=device)


def processed(branch: str, raw: Mapping[str, Tensor], processing: Processing) -> Weights:
    """The weights of a branch in the basis of some options."""
    return _process(_processor(branch), raw, processing)


def _process(processor: Processor, raw: Mapping[str, Tensor], processing: Processing) -> Weights:
    """Process in float32 at least, as TransformerLens does, and return to the weights' dtype.

    What is folded may be on another device than what it is folded into.
    """
    dtype, there = next(iter(raw.values())).dtype, max(raw.values(), key=Tensor.numel).device
    narrow = dtype in (torch.float16, torch.bfloat16)
    wide = {short: (w.float() if narrow else w).to(there) for short, w in raw.items()}
    return {short: w.to(dtype) for short, w in processor(wide, processing).items()}


class _Derived(torch.autograd.Function):
    """A kept processed weight, with the gradient it would have had, had it been computed now."""

    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, short: str, processor: Processor, processing: Processing, names: tuple, *raw: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*raw)
        ctx.recipe = (short, processor, processing, names)
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        short, processor, processing, names = ctx.recipe
        with torch.enable_grad():
            raw = [weight.detach().requires_grad_() for weight in ctx.saved_tensors]
            value = _process(processor, dict(zip(names, raw, strict=True)), processing)[short]
            # A bias that processing has moved elsewhere is a constant zero.
            constant = not value.requires_grad
            found = [None] * len(raw) if constant else torch.autograd.grad(value, raw, gradients[0], allow_unused=True)
        return (None, None, None, None, None, *found)
