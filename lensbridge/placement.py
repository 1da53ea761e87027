"""Which parameters does an optimiser train, in which mode does the model run, and where is it?

All three are the HuggingFace model's own; a hooked model passes them on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError
from .utilities.devices import move_to_and_update_config
from .whole import home_of, is_shared_out, refuse_to_move


def _is_quantised(hf_model: Any) -> bool:
    """Whether transformers has loaded a model with quantised layers."""
    return getattr(hf_model, "quantization_method", None) is not None


class PlacementMethods(nn.Module):
    """Parameters, training mode, device and dtype of a hooked model."""

    hf_model: Any
    cfg: Any

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """What an optimiser trains: the HF model's parameters, under HF's names, then those of modules that were added.

        `state_dict` has TransformerLens' names.
        """
        own = dict(self.hf_model.named_parameters(prefix, recurse, remove_duplicate))
        shown = dict(super().named_parameters(prefix, recurse, remove_duplicate))
        # Of a model that was made from a config, the modules are the facade's too, which has others between them.
        yield from (shown if all(shown.get(name) is own[name] for name in own) else own | shown).items()

    def train(self, mode: bool = True) -> Any:
        """Set training mode, on the HF model too (its dropout is HF's)."""
        super().train(mode)
        self.hf_model.train(mode)
        return self

    def to(self, device_or_dtype: Any, print_details: bool = True) -> Any:  # type: ignore[override]
        """Move or cast the HF model, and note it in ``cfg``.

        Raises:
            UnsupportedModelError: (a ValueError) accelerate keeps its parameters outside of it, or it is on several
                devices (or processes) and is to be moved; casting a model with quantised layers.
        """
        refuse_to_move(self.hf_model, None if isinstance(device_or_dtype, torch.dtype) else device_or_dtype)
        if _is_quantised(self.hf_model):
            return self._to_quantised(device_or_dtype, print_details)
        return move_to_and_update_config(self, device_or_dtype, print_details)

    def _to_quantised(self, device_or_dtype: Any, print_details: bool) -> Any:
        """Move a model by its own method: layers of some libraries keep more than parameters and buffers."""
        if isinstance(device_or_dtype, torch.dtype):
            raise UnsupportedModelError(
                f"a quantised model cannot be cast to {device_or_dtype}: load it with dtype={device_or_dtype}"
            )
        self.hf_model.to(device_or_dtype)
        self.cfg.device = str(torch.device(device_or_dtype))
        if print_details:
            print("Moving model to device: ", self.cfg.device)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # .cuda(), .half() and the like arrive here.
        refuse_to_move(self.hf_model, None)
        if _is_quantised(self.hf_model):
            raise UnsupportedModelError("a quantised model cannot be cast: load it with the dtype that you want")
        self.hf_model._apply(fn)
        super()._apply(fn, recurse)
        first = next(self.hf_model.parameters())
        self.cfg.device, self.cfg.dtype = str(home_of(self.hf_model)), first.dtype
        return self

    def cuda(self, device: Any = None) -> Any:
        """Move to a GPU."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def cpu(self) -> Any:
        """Move to the CPU."""
        return self.to("cpu")

    def mps(self) -> Any:
        """Move to Apple's GPU."""
        return self.to("mps")

    def move_model_modules_to_device(self) -> None:
        """Move the HF model to ``cfg.device``, unless it is spread over devices or processes."""
        if not getattr(self.hf_model, "hf_device_map", None) and not is_shared_out(self.hf_model):
            self.hf_model.to(self.cfg.device)
