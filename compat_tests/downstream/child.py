"""What does one case compute in this process, on the real TransformerLens or under the alias?

    python -m compat_tests.downstream.child CASE FILE [--alias]

writes the tensors to FILE.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch


def old_names() -> None:
    """Give the real 3.9.0 the names of version 2 that older libraries import: the classes are the same."""
    import transformer_lens

    module = ModuleType("transformer_lens.past_key_value_caching")
    for kind in ("", "Entry"):
        cls = getattr(transformer_lens, f"TransformerLensKeyValueCache{kind}")
        for place in (transformer_lens, module):
            setattr(place, f"HookedTransformerKeyValueCache{kind}", cls)
    sys.modules[module.__name__] = module


def old_constants() -> None:
    """Give huggingface_hub the constant of its versions before 1 that circuit-tracer imports: off, as by default."""
    from huggingface_hub import constants

    constants.HF_HUB_ENABLE_HF_TRANSFER = getattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", False)


def main() -> None:
    """Run the case that is named on the command line."""
    case, path, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    old_constants()
    if rest == ["--alias"]:
        from lensbridge import shim

        shim.install()
    else:
        old_names()
    found = importlib.import_module(f"compat_tests.downstream.cases.{case}").run()
    torch.save({name: value.detach().clone() for name, value in found.items()}, path)


if __name__ == "__main__":
    main()
