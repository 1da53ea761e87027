"""Which device does a model run on, and how is it moved there?

Apple's MPS backend has computed wrong numbers without an error in several torch releases. It is therefore chosen only
where ``TRANSFORMERLENS_ALLOW_MPS=1`` is set (TransformerLens' variable), and choosing it by hand warns once.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

#: torch releases in which ``linear`` on MPS is wrong for non-contiguous input, whatever the user has opted in to
#: (https://github.com/pytorch/pytorch/issues/161640).
_BROKEN_ON_MPS = ("2.8",)

_already_warned: set[str] = set()


def _mps_allowed() -> bool:
    return os.environ.get("TRANSFORMERLENS_ALLOW_MPS") == "1"


def _warn_once(topic: str, message: str) -> None:
    if topic not in _already_warned:
        _already_warned.add(topic)
        warnings.warn(message, UserWarning, stacklevel=3)


def get_device() -> str:
    """The best device here: ``"cuda"``, ``"mps"`` (only where allowed, see above) or ``"cpu"``."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available() and torch.backends.mps.is_built():
        if _mps_allowed():
            return "mps"
        logging.getLogger(__name__).info(
            "An MPS device is present but not chosen, because torch %s may compute wrong numbers on it. "
            "Set TRANSFORMERLENS_ALLOW_MPS=1 to choose it.",
            torch.__version__,
        )
    return "cpu"


def warn_if_mps(device: str | torch.device) -> None:
    """Warn, once per process, when ``device`` is MPS and that has not been allowed, or this torch is broken on it."""
    kind = device.type if isinstance(device, torch.device) else str(device).partition(":")[0]
    if kind != "mps":
        return
    release = ".".join(torch.__version__.split(".")[:2])
    if release in _BROKEN_ON_MPS:
        _warn_once(
            "broken",
            f"torch {torch.__version__} computes linear layers wrongly on MPS for non-contiguous tensors, without an "
            "error. Upgrade to torch 2.9 or later, or use another device.",
        )
    if not _mps_allowed():
        _warn_once(
            "unverified",
            f"torch {torch.__version__} may compute wrong numbers on MPS without an error. Use another device, or set "
            "TRANSFORMERLENS_ALLOW_MPS=1 to silence this warning.",
        )


@runtime_checkable
class ModelWithCfg(Protocol):
    """A model that has a config and can be moved."""

    cfg: Any

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The model's parameters and buffers by name."""
        ...

    def to(self, device_or_dtype: torch.device | str | torch.dtype) -> Any:
        """Move the model or change its dtype."""
        ...


def move_to_and_update_config(
    model: ModelWithCfg, device_or_dtype: torch.device | str | torch.dtype, print_details: bool = True
) -> Any:
    """Move ``model`` or change its dtype, and write the new value into ``model.cfg``; returns the model.

    For a ``torch.nn.Module`` the base class' ``to`` is called, so that a model's own ``to`` may call this function.
    """
    if isinstance(device_or_dtype, torch.dtype):
        if hasattr(model.cfg, "dtype"):
            model.cfg.dtype = device_or_dtype
        if print_details:
            print("Changing model dtype to", device_or_dtype)
    else:
        warn_if_mps(device_or_dtype)
        model.cfg.device = str(torch.device(device_or_dtype))
        if print_details:
            print("Moving model to device: ", model.cfg.device)
    return nn.Module.to(model, device_or_dtype) if isinstance(model, nn.Module) else model.to(device_or_dtype)
