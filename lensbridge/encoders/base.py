"""What do the hooked encoders have in common?

Hook points over a HF model that runs itself, its weights under TransformerLens' names, flags, caches, and moving it
about. No weight processing: 3.9.0 has none for encoders, so values are HuggingFace's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..activation_cache import ActivationCache
from ..config import HookedTransformerConfig
from ..engine.encoders import EncoderEngine
from ..engine.turns import turn
from ..errors import DisabledPointError, UnknownArgumentError, UnknownPointError, UnsupportedModelError
from ..factored_matrix import FactoredMatrix
from ..hook_points import HookPoint
from ..hooked_root_module import HookedRootModule
from ..interior import listening
from ..placement import PlacementMethods
from .layout import attentions_of, flags_of, sites_of
from .loading import build_hf_model, family_of
from .parts import Inside, build_parts
from .weights import EncoderWeights


def stacked(name: str, shape: str) -> Any:
    """A property that stacks one weight of all layers, those of the encoder first where there is a decoder."""

    def get(self: Any) -> Tensor:
        return self.inside.weights.stack([f"{layer}.{name}" for layer in self.layers()])

    get.__doc__ = f"``{name}`` of every layer, stacked: [{shape}]."
    return property(get)


def one_weight(name: str, meaning: str) -> Any:
    """A property that shows one weight."""

    def get(self: Any) -> Tensor:
        try:
            return self.inside.weights.get(name)
        except UnknownPointError as error:
            # nn.Module would take an AttributeError for its own.
            raise UnsupportedModelError(str(error)) from None

    get.__doc__ = meaning
    return property(get)


def as_cache_object(cache: dict[str, Tensor], model: Any, remove_batch_dim: bool) -> ActivationCache:
    """The activations of a run of ``model``; the methods for a single residual stream suit a single stack of layers."""
    return ActivationCache(cache, model, has_batch_dim=not remove_batch_dim)


class EncoderModel(PlacementMethods, HookedRootModule):
    """A HuggingFace encoder with TransformerLens' hook points and weights; ``hf_model`` computes everything."""

    #: The HF classes that it runs on, the fullest first.
    hf_classes: ClassVar[tuple[str, ...]] = ()
    #: What TransformerLens raises when asked for several devices.
    several_devices: ClassVar[type[Exception]] = AssertionError

    inside: Inside

    W_Q = stacked("attn.W_Q", "n_layers n_heads d_model d_head")
    W_K = stacked("attn.W_K", "n_layers n_heads d_model d_head")
    W_V = stacked("attn.W_V", "n_layers n_heads d_model d_head")
    W_O = stacked("attn.W_O", "n_layers n_heads d_head d_model")
    W_in = stacked("mlp.W_in", "n_layers d_model d_mlp")
    W_out = stacked("mlp.W_out", "n_layers d_mlp d_model")
    b_Q = stacked("attn.b_Q", "n_layers n_heads d_head")
    b_K = stacked("attn.b_K", "n_layers n_heads d_head")
    b_V = stacked("attn.b_V", "n_layers n_heads d_head")
    b_O = stacked("attn.b_O", "n_layers d_model")
    b_in = stacked("mlp.b_in", "n_layers d_mlp")
    b_out = stacked("mlp.b_out", "n_layers d_model")

    def __init__(self, cfg: HookedTransformerConfig | dict, move_to_device: bool, options: dict[str, Any]) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(cfg, str):
            raise ValueError(f"pass a HookedTransformerConfig; to load a model by name use {name}.from_pretrained")
        cfg = HookedTransformerConfig.unwrap(cfg)
        if cfg.n_devices != 1:
            raise self.several_devices(f"{name} runs on one device, not on n_devices={cfg.n_devices}")
        hf_model = options.pop("hf_model", None)
        if options:
            raise UnknownArgumentError(f"{name} has no argument {', '.join(sorted(options))}; it has hf_model")
        if hf_model is None:
            hf_model = build_hf_model(cfg, self.hf_classes[0])
        self.cfg = cfg
        family = family_of(hf_model, self.hf_classes, name)
        weights = EncoderWeights(hf_model, family, cfg)
        attentions, sample = attentions_of(family, hf_model), family.sample(hf_model.config)
        engine = EncoderEngine(hf_model, cfg, sites_of(family, hf_model), attentions, sample)
        self.__dict__["inside"] = Inside(hf_model, family, cfg, weights, engine)
        self._flags = flags_of(family, hf_model)
        self.training = hf_model.training
        build_parts(self, self.inside)
        if move_to_device:
            if cfg.device is None:
                raise ValueError("cannot move to cfg.device when it is None")
            hf_model.to(cfg.device)
        self.setup()

    @property
    def hf_model(self) -> Any:
        """The HuggingFace model that does the computing."""
        return self.inside.hf_model

    def layers(self) -> list[str]:
        """The names of all layers, stack by stack."""
        hf_model = self.hf_model
        return [
            f"{stack.name}.{layer}"
            for stack in self.inside.family.stacks
            for layer in range(len(hf_model.get_submodule(stack.path)))
        ]

    # --- running ------------------------------------------------------------------------------------------------------

    def _turn(self) -> AbstractContextManager:
        return turn(self.hf_model)

    def run_hf(self, path: str, inputs: Mapping[str, Any], fires: Callable[[str], bool] = lambda name: True) -> Any:
        """What the HF module at ``path`` (empty: the whole model) returns, with the points that ``fires`` accepts."""
        with self._turn():
            found = {name: point for name, point in listening(self.hook_dict).items() if fires(name)}
            for name in found:
                self._refuse_if_off(name)
            return self.inside.engine.run(path, (), inputs, found)

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        """(output, `ActivationCache`), or a plain dict of activations with ``return_cache_object=False``.

        Arguments as for ``forward`` and `HookedRootModule.run_with_cache` (``names_filter``, ``device``, ...).
        """
        with self._turn():
            output, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        self.sort_cache(cache)
        return output, as_cache_object(cache, self, remove_batch_dim) if return_cache_object else cache

    def sort_cache(self, cache: dict[str, Tensor]) -> None:
        """Put a cache's entries into TransformerLens' order, which is not in every place that of HF's forward."""
        order = {name: index for index, name in enumerate(n for site in self.inside.engine.sites for n in site.names)}
        for name in sorted(cache, key=lambda name: order.get(name.removesuffix("_grad"), -1)):
            cache[name] = cache.pop(name)

    # --- hook points that are off -------------------------------------------------------------------------------------

    def check_hooks_to_add(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: Any,
        dir: Any = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Refuse a hook on a point that its flag turns off, or that never fires.

        Raises:
            DisabledPointError: (a KeyError and an AssertionError) saying what to do.
        """
        self._refuse_if_off(hook_point_name)

    def _refuse_if_off(self, name: str) -> None:
        if name in self.inside.family.silent:
            raise DisabledPointError(f"{name!r} never fires: {self.inside.family.silent[name]}")
        if not self._is_on(name):
            flag = self._flags[name]
            raise DisabledPointError(
                f"{name!r} is off, so a hook there would never fire: set model.cfg.{flag} = True first"
            )

    def _is_on(self, name: str) -> bool:
        flag = self._flags.get(name)
        return name not in self.inside.family.silent and (flag is None or bool(getattr(self.cfg, flag)))

    # --- weights ------------------------------------------------------------------------------------------------------

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` of every head, [n_layers, n_heads, d_model, d_model] (Elhage et al. 2021)."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` of every head, [n_layers, n_heads, d_model, d_model] (Elhage et al. 2021)."""
        return FactoredMatrix(self.W_V, self.W_O)

    def all_head_labels(self) -> list[str]:
        """``["L0H0", "L0H1", ...]``."""
        layers = [name.rpartition(".")[2] for name in self.layers()]
        return [f"L{layer}H{head}" for layer in layers for head in range(self.cfg.n_heads)]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The weights under TransformerLens' names and in its shapes, sharing memory with the HF parameters."""
        # Positional arguments are PyTorch's old way, and come before those by keyword.
        given: Any = (*args, *(destination, prefix, keep_vars)[len(args) :])
        destination, prefix, keep_vars = given
        out = OrderedDict() if destination is None else destination
        for name in self.inside.weights.names():
            weight = self.inside.weights.get(name)
            out[prefix + name] = weight if keep_vars else weight.detach()
        for name in [name for name in out if name.endswith(".W_Q")]:
            attention = name.removesuffix("W_Q")
            out[attention + "mask"] = torch.empty(0, 0, dtype=torch.bool, device=self.cfg.device)
            out[attention + "IGNORE"] = torch.tensor(-torch.inf, device=self.cfg.device)
        return out

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Write weights under TransformerLens' names into the HF model's parameters.

        Raises:
            RuntimeError: missing or unexpected names, unless ``strict=False``.
            ReadOnlyWeightError, ValueError: a weight that the model cannot take; nothing is written then.
        """
        given = {name: value for name, value in state_dict.items() if not name.endswith((".mask", ".IGNORE"))}
        names = self.inside.weights.names()
        missing, unexpected = [n for n in names if n not in given], [n for n in given if n not in names]
        if strict and (missing or unexpected):
            raise RuntimeError(f"cannot load the state dict: missing {missing}, unexpected {unexpected}")
        taken = [name for name in names if name in given]
        for name in taken:
            self.inside.weights.check(name, given[name])
        self.inside.weights.check_ties({name: given[name] for name in taken})
        for name in taken:
            self.inside.weights.set(name, given[name])
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)
