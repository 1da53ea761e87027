"""What is a model under check, and what do its runs give?

One hooked model with the tokens it runs on, the plain HuggingFace run that everything is compared with, and full
caches of its own runs. Each is made once, when a check first asks for it; hooks and flags of the model are as before
when a check is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..architectures.record import Block
from ..errors import UnknownPointError
from ..parameters import Heads, factor_of
from ..points import FLAG_SETTERS, POINTS, point_of, template
from ..processing import Processing
from .capture import Captured, called_with, capturing, given_to
from .outcome import Known

#: The options of `from_pretrained`.
DEFAULT_PROCESSING = Processing(fold_ln=True, center_writing_weights=True, center_unembed=True, fold_value_biases=True)
LENGTH = 9

Hooks = Sequence[tuple[str, Any]]


class Look:
    """The values of one run by the names of their points, with the weights of the basis that they are in.

    Args:
        given: what modules were given in this run that no point shows, by path.
        further: what MLPs with experts were called with behind their first argument, by path.
    """

    def __init__(
        self,
        subject: Subject,
        values: Mapping[str, Tensor],
        logits: Tensor,
        given: Mapping[str, Tensor],
        further: Mapping[str, tuple[tuple, dict[str, Any]]],
    ) -> None:
        self.further = further
        self.subject = subject
        self.values = values
        self.logits = logits
        self.given = given

    def first(self, points: Iterable[str], path: str) -> Tensor:
        """The value of the first of these points that there is; where there is none, what a module was given."""
        found = next((self.values[name] for name in points if name in self.values), None)
        return self.given[path] if found is None else found

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def weight(self, name: str) -> Tensor | None:
        """One weight in the active basis, by its name in the state dict; None if the model has none."""
        return self.subject.weight(name)

    def normed(self, prefix: str) -> Tensor:
        """What the norm at ``prefix`` returns: its normalised input with gain and bias, where these are not folded."""
        return self.affine(prefix, self[f"{prefix}.hook_normalized"])

    def affine(self, prefix: str, normalized: Tensor) -> Tensor:
        """What the norm at ``prefix`` returns for a normalised input."""
        gain, bias = self.weight(f"{prefix}.w"), self.weight(f"{prefix}.b")
        if gain is None:
            # Norms compute in float32; what is folded behind them is in the model's dtype.
            path = self.subject.norm(prefix).path
            normalized = normalized.to(self.subject.model.interior.weights.parameters.gain(path).dtype)
            return normalized if bias is None else normalized + bias
        # Where there is a gain for each head, the norm's points lack the axis of heads.
        value = normalized if gain.dim() == 1 else normalized.reshape(-1, *gain.shape)
        value = value * gain if bias is None else value * gain + bias
        return value.reshape(normalized.shape)


class Subject:
    """A hooked model under check.

    Args:
        model: a `HookedTransformer` on a HuggingFace model.
        known: what is known not to hold on this family, and why.
    """

    def __init__(self, model: Any, known: Known | None = None) -> None:
        self.model = model
        self.hf: Any = model.hf_model
        self.architecture: Any = model.interior.architecture
        self.n_layers: int = model.cfg.n_layers
        self.known: Known = known or {}
        self._weights: dict[str, Tensor | None] = {}
        self._looks: dict[frozenset[str], Look] = {}
        #: layer -> what is added to its scores (`scores.position_bias`).
        self.biases: dict[int, Tensor] = {}

    # --- what there is ------------------------------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> Tensor:
        """Two rows of tokens, none of them special."""
        return self.draw(2, LENGTH)

    def draw(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Random tokens, special ones left out, ``[rows, length]``."""
        config = self.hf.config.get_text_config(decoder=True).to_dict() | self.hf.config.to_dict()
        special = {v for name, v in config.items() if name.endswith("token_id") and isinstance(v, int)}
        usable = torch.tensor([t for t in range(min(self.model.cfg.d_vocab, 4096)) if t not in special])
        generator = torch.Generator().manual_seed(seed)
        return usable[torch.randint(len(usable) // 20, len(usable), (rows, length), generator=generator)].to(
            self.model.cfg.device
        )

    def block(self, layer: int) -> Block:
        """What the record says of one layer."""
        return self.architecture.blocks[layer]

    def factor(self, layer: int, role: str) -> Any:
        """The factor between what a branch's module returns and what is added to the stream; None if there is none."""
        value = factor_of(self.hf.get_submodule(self.architecture.layer(layer)), getattr(self.block(layer), role))
        return value.detach() if isinstance(value, Tensor) else value

    def heads(self, layer: int) -> Heads:
        """How many heads a layer has, and of which size."""
        return self.model.interior.weights.parameters.heads(layer)

    def norm(self, prefix: str) -> Any:
        """The engine's norm that TransformerLens calls ``prefix``."""
        return self.model.interior.engine.norms[self.model.mod_dict[prefix].path]

    def reaching(self, prefix: str, normed: Tensor) -> Tensor:
        """What readers get of a norm's output: not a mean that an edit has brought in, where they are centred.

        TransformerLens centres all of them but the gate of a gated MLP.
        """
        norm, basis = self.norm(prefix), self.model.interior.basis
        folded = norm.centred and norm.folds and basis.processing.fold_ln
        return normed - normed.mean(-1, keepdim=True) if folded else normed

    def behind_norm(self, layer: int, role: str, normed: Tensor) -> Tensor:
        """What a norm's reader is given: what the norm returns, or what HuggingFace's gate around it makes of that."""
        path = getattr(self.block(layer), role)
        if not self.block(layer).gated_norms or "." not in path:
            return normed
        inner, around = (
            self.hf.get_submodule(self.architecture.below(layer, each)) for each in (path, path.rpartition(".")[0])
        )
        handle = inner.register_forward_hook(lambda module, args, output: normed)
        try:
            return around(normed)
        finally:
            handle.remove()

    def through(self, layer: int, role: str, value: Callable[[Look], Tensor]) -> Callable[[Look], Tensor]:
        """What HuggingFace's module in a role makes of a value."""
        module = self.hf.get_submodule(self.architecture.in_layer(layer, role))
        return lambda look: module(value(look)).detach()

    def norm_behind(self, layer: int, branch: str) -> str | None:
        """TransformerLens' name of the norm of what attention ("attn") or the MLP ("mlp") writes, if there is one."""
        block = self.block(layer)
        role, name = block.post_norms[branch == "mlp"]
        return None if block.post_norm or getattr(block, role) is None else f"blocks.{layer}.{name}"

    def transformed(self, x: Tensor) -> Tensor:
        """What the head makes of the last stream before it unembeds it."""
        head, unembed = self.architecture.head, self.architecture.unembed
        with capturing(self.hf) as captured:
            output = self.hf.get_submodule(head)(x)
        return captured.input(unembed) if f"{unembed}.".startswith(f"{head}.") else output

    @property
    def names(self) -> list[str]:
        """The points that fire on the tokens, in TransformerLens' order."""
        return [name for name in self.all_names if self.model._is_on(name) and name not in self.idle]

    @cached_property
    def idle(self) -> frozenset[str]:
        """The points of experts that none of the tokens is sent to, so that they do not fire; or none with a weight."""
        indices = [name for name in self.all_names if name.endswith("hook_expert_indices")]
        wanted = [*indices, *(name.replace("indices", "weights") for name in indices)]
        with torch.no_grad():
            _, found = self.model.run_with_cache(self.tokens, names_filter=wanted, return_cache_object=False)
        busy = {
            f"{name.rpartition('.')[0]}.experts.{expert}"
            for name in indices
            for expert in found[name].unique().tolist()
            if found[name.replace("indices", "weights")][:, expert].any()
        }
        return frozenset(name for name in self.all_names if ".experts." in name and name.rpartition(".")[0] not in busy)

    @cached_property
    def all_names(self) -> tuple[str, ...]:
        """All points, those that a flag turns on among them."""
        return tuple(self.model.interior.points())

    def has(self, name: str) -> bool:
        """Whether the model has a point of this name, on or not."""
        return name in self._have

    @cached_property
    def refuses(self) -> bool:
        """Whether the record refuses points that its other entries would give the model."""
        return bool(self.architecture.lacks) or any(block.refusals for block in self.architecture.blocks)

    @cached_property
    def _have(self) -> frozenset[str]:
        return frozenset(self.all_names)

    @cached_property
    def kinds(self) -> dict[int, frozenset[str]]:
        """The first layer of each kind, with the points that layers of this kind have."""
        found: dict[frozenset[str], int] = {}
        for layer in range(self.n_layers):
            prefix = f"blocks.{layer}."
            points = frozenset(template(name) for name in self.all_names if name.startswith(prefix))
            found.setdefault(points, layer)
        return {layer: points for points, layer in found.items()}

    @cached_property
    def weight_names(self) -> frozenset[str]:
        """The state dict's names of the weights there are in the active basis."""
        return frozenset(self.model.interior.weights.names())

    def weight(self, name: str) -> Tensor | None:
        """One weight in the active basis, as a plain tensor; None if there is none."""
        if name not in self._weights:
            found = None
            if name in self.weight_names:
                try:
                    found = self.model.interior.weights.get(name).detach().as_subclass(Tensor)
                except UnknownPointError:
                    found = None
            self._weights[name] = found
        return self._weights[name]

    @cached_property
    def unshown(self) -> list[str]:
        """The paths of modules whose input no point shows, for want of one residual stream or of plain keys."""
        found: list[str] = []
        for layer in range(self.n_layers):
            block = self.block(layer)
            if block.k_norm is not None and not self.has(f"blocks.{layer}.attn.hook_k"):
                found.append(self.architecture.in_layer(layer, "k_norm"))
            if not self.has(f"blocks.{layer}.hook_resid_pre"):
                roles = (*(("ln1",) if block.ln1 else ("q", "k", "v")), "ln2" if block.ln2 else "mlp")
                found += [self.architecture.in_layer(layer, role) for role in roles if getattr(block, role)]
        if self.architecture.ln_final and not self.has(f"blocks.{self.n_layers - 1}.hook_resid_post"):
            found.append(self.architecture.ln_final)
        return found

    @cached_property
    def mixtures(self) -> list[str]:
        """The paths of the MLPs with experts."""
        layers = (layer for layer in range(self.n_layers) if self.block(layer).experts is not None)
        return [self.architecture.below(n, p) for n in layers for p in (self.block(n).mlp, self.block(n).mlp_also) if p]

    @cached_property
    def chooses_keys(self) -> bool:
        """Whether attention chooses the keys that a query meets, by an indexer."""
        return any(path.endswith("indexer") for path, _ in self.hf.named_modules())

    # --- runs ---------------------------------------------------------------------------------------------------------

    @cached_property
    def plain(self) -> Captured:
        """The HuggingFace model's own run on the tokens."""
        with torch.no_grad(), capturing(self.hf) as found:
            found.logits = self.hf(input_ids=self.tokens).logits
        return found

    @cached_property
    def positions(self) -> int:
        """How many positions the layers run on: some models put some of their own before a text."""
        if not self.has("blocks.0.hook_resid_pre"):
            return self.tokens.shape[1]
        first = self.architecture.layer(0)
        calls = max(1, sum(run.path == first for run in self.architecture.ran))
        return self.batch_first(first, self.plain.input(first, 0, calls)).shape[1]

    def batch_first(self, path: str, value: Tensor) -> Tensor:
        """A module's value as points show it, where positions come before the batch."""
        turned = self.architecture.positions_first
        return value.transpose(0, 1) if turned is not None and path.startswith(f"{turned}.") else value

    def run(self, hooks: Hooks = (), tokens: Tensor | None = None, **arguments: Any) -> Tensor:
        """Logits of a run with these hooks."""
        with torch.no_grad(), self.model.hooks(fwd_hooks=list(hooks)):
            return self.model(self.tokens if tokens is None else tokens, **arguments)

    def look(self, hooks: Hooks = ()) -> Look:
        """A run with these hooks and a full cache; the one without hooks is made once."""
        if not hooks:
            on = frozenset(self.names)
            if on not in self._looks:
                self._looks[on] = self._look(())
            return self._looks[on]
        return self._look(hooks)

    def _look(self, hooks: Hooks) -> Look:
        unshown = given_to(self.hf, self.unshown), called_with(self.hf, self.mixtures)
        with torch.no_grad(), self.model.hooks(fwd_hooks=list(hooks)), unshown[0] as given, unshown[1] as further:
            logits, cache = self.model.run_with_cache(self.tokens, return_cache_object=False)
        return Look(self, dict(cache.items()), logits, given, further)

    # --- switches -----------------------------------------------------------------------------------------------------

    def flags(self) -> list[tuple[str, ...]]:
        """The flags to turn on together so that every point is on once: those that change nothing, then the others."""
        there = {p.flag for p in map(point_of, self.all_names) if p is not None and p.flag}
        if self.model.cfg.n_key_value_heads is not None:
            # TransformerLens has no such copies where several query heads share a key and value.
            there.discard("use_attn_in")
        first = tuple(flag for flag in ("use_attn_result", "use_hook_mlp_in") if flag in there)
        return [first, *((flag,) for flag in FLAG_SETTERS if flag in there and flag not in first)]

    @contextmanager
    def turned_on(self, flags: Sequence[str]) -> Iterator[None]:
        """The time in which these flags, and no others, are on."""
        before = {flag: getattr(self.model.cfg, flag) for flag in FLAG_SETTERS}
        try:
            for flag in FLAG_SETTERS:
                setattr(self.model.cfg, flag, flag in flags)
            yield
        finally:
            for flag, value in before.items():
                setattr(self.model.cfg, flag, value)

    @contextmanager
    def processed(self, processing: Processing) -> Iterator[None]:
        """The time in which the model is shown in another basis."""
        before = self.model.interior.weights.processing
        self._forget()
        try:
            self.model.set_processing(processing)
            yield
        finally:
            self.model.set_processing(before)
            self._forget()

    def _forget(self) -> None:
        self._weights, self._looks = {}, {}
        self.__dict__.pop("weight_names", None)


#: Every template of a point in TransformerLens' order.
TEMPLATES = tuple(dict.fromkeys(point.name for point in POINTS))
