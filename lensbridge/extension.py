"""What does ``%load_ext lensbridge`` do in a notebook?

IPython looks for these two functions in the package. The alias is imported when it is asked for, so that
``python -m lensbridge.shim`` finds it new.
"""

from __future__ import annotations

from typing import Any


def load_ipython_extension(ipython: Any) -> None:
    """``import transformer_lens`` leads to lensbridge from here on (:func:`lensbridge.shim.install`).

    Raises:
        AliasError: the real transformer_lens was imported before.
    """
    from . import shim

    shim.install()


def unload_ipython_extension(ipython: Any) -> None:
    """``import transformer_lens`` leads where it led before."""
    from . import shim

    shim.uninstall()
