"""Which activation does a key mean, and what does the cache hold?

The half of the cache that is a dictionary with habits: short names and tuples lead to full hook names, the batch
dimension can be taken off or sliced, everything can be moved to another device. It asks the model for one number,
``cfg.n_layers``, and only when a key counts layers from the end. What can be computed from the values is in
:mod:`lensbridge.activation_cache`.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import TYPE_CHECKING, Any

import torch

from lensbridge.errors import UnknownPointError, near_misses
from lensbridge.utilities.components_utils import get_act_name
from lensbridge.utilities.devices import warn_if_mps
from lensbridge.utilities.slice import Slice, SliceInput

if TYPE_CHECKING:
    from typing_extensions import Self

    from lensbridge.model import HookedTransformer

logger = logging.getLogger(__name__)


class CachedActivations:
    """The activations of one run under their hook names.

    ``cache_dict`` maps full names to tensors and is used as it is, not copied. Keeping a cache keeps its ``model``
    alive; set ``cache.model = None`` when only the values are wanted.
    """

    def __init__(
        self, cache_dict: dict[str, torch.Tensor], model: HookedTransformer, has_batch_dim: bool = True
    ) -> None:
        self.cache_dict = cache_dict
        self.model = model
        self.has_batch_dim = has_batch_dim
        self.has_embed = "hook_embed" in cache_dict
        self.has_pos_embed = "hook_pos_embed" in cache_dict

    def __getitem__(self, key: str | tuple[Any, ...]) -> torch.Tensor:
        """The activation under a full name, a short name or a tuple ``(name, layer, layer_type)``.

        ``cache["blocks.3.attn.hook_q"]``, ``cache["q3"]`` and ``cache["q", 3]`` are one tensor. In a tuple the layer
        may be negative, counting from the end, and the layer type may be left out wherever the name settles it; see
        :func:`~lensbridge.utilities.components_utils.get_act_name` for the short names.

        Raises:
            UnknownPointError: (a KeyError) the cache does not hold this activation.
            TypeError: the key is neither a string nor a tuple.
        """
        if key in self.cache_dict:
            return self.cache_dict[key]
        name = self._full_name(key)
        if name not in self.cache_dict:
            raise UnknownPointError(self._explain_absence(key, name))
        return self.cache_dict[name]

    def _full_name(self, key: str | tuple[Any, ...]) -> str:
        if isinstance(key, str):
            return get_act_name(key)
        if not isinstance(key, tuple) or not key or not isinstance(key[0], str):
            raise TypeError(f"A cache key is a name or a tuple (name, layer, layer_type), not {key!r}.")
        name, *where = key
        if where and where[0] is not None:
            layer = operator.index(where[0])
            where[0] = layer + self.model.cfg.n_layers if layer < 0 else layer
        return get_act_name(name, *where)

    def _explain_absence(self, key: str | tuple[Any, ...], name: str) -> str:
        asked = f"{key!r}" if key == name else f"{key!r} (that is, {name!r})"
        if not self.cache_dict:
            return f"The cache has no {asked}: it is empty. The run's names_filter may have matched nothing."
        if name in (getattr(self.model, "hook_dict", None) or {}):
            why = (
                "The model has this hook point, but the run did not store it: names_filter may have left it out, "
                "the flag that switches it on may have been off, or the run may have ended before it."
            )
        else:
            why = "names_filter may have left it out, or the model has no such hook point."
        return f"The cache has no {asked}. {why}{near_misses(name, self.cache_dict)}"

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self.cache_dict)}"

    def keys(self) -> KeysView[str]:
        """The full names, in the order in which they fired."""
        return self.cache_dict.keys()

    def values(self) -> ValuesView[torch.Tensor]:
        """The activations, in the order in which they fired."""
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, torch.Tensor]:
        """Pairs of full name and activation."""
        return self.cache_dict.items()

    def to(self, device: torch.device | str) -> Self:
        """Move every activation to a device; the cache itself is changed and returned."""
        warn_if_mps(device)
        self.cache_dict = {name: value.to(device) for name, value in self.cache_dict.items()}
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Switch gradients on or off for all of torch, everywhere; ``torch.no_grad()`` does it for a few lines."""
        logger.warning("Changed the global state, set autodiff to %s", mode)
        torch.set_grad_enabled(mode)

    def remove_batch_dim(self) -> Self:
        """Take the batch dimension off every activation of a run on one input; the cache is changed and returned.

        Raises:
            AssertionError: the run had more than one input.
        """
        if not self.has_batch_dim:
            logger.warning("Tried removing batch dimension after already having removed it.")
            return self
        size = self._batch_size()
        if size != 1:
            raise AssertionError(
                f"Cannot remove the batch dimension of a cache with {size} inputs. "
                "Choose one of them: cache.apply_slice_to_batch_dim(0)."
            )
        for name, value in self.cache_dict.items():
            if value.ndim > 0 and value.size(0) == 1:
                self.cache_dict[name] = value[0]
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Slice | SliceInput) -> Self:
        """A new cache with some of the inputs; an int takes one input and drops the batch dimension.

        Raises:
            AssertionError: this cache has no batch dimension.
        """
        chosen = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        if not self.has_batch_dim:
            raise AssertionError("This cache has no batch dimension to slice: it was removed before.")
        size = self._batch_size()
        sliced = {
            name: chosen.apply(value, dim=0) if value.ndim > 0 and value.size(0) == size else value
            for name, value in self.cache_dict.items()
        }
        return type(self)(sliced, self.model, has_batch_dim=chosen.mode != "int")

    def _batch_size(self) -> int:
        """The commonest first dimension: a few entries are indexed by position or broadcast over the batch."""
        sizes = Counter(value.size(0) for value in self.cache_dict.values() if value.ndim > 0)
        return sizes.most_common(1)[0][0] if sizes else 1
