"""Which record describes the models of a HuggingFace class?

The records are those of `lensbridge.architectures`. One that is registered here counts at once for loading, too:
``HookedTransformer.from_pretrained`` looks in the same table.
"""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points
from typing import Any

from ..architectures import BY_CLASS, Architecture
from ..errors import UnsupportedModelError, near_misses

#: HuggingFace class -> record.
SUPPORTED_ARCHITECTURES: dict[str, Architecture] = BY_CLASS
#: Entry points of this group are records, each under the name of its HuggingFace class.
ENTRY_POINTS = "lensbridge.architectures"


class ArchitectureAdapterFactory:
    """The table of families that can be loaded (TransformerLens' class of this name, with records for adapters)."""

    @classmethod
    def register_adapter(cls, architecture_name: str, adapter_class: Architecture) -> None:
        """Describe the models of a HuggingFace class by a record, in the place of one that is there.

        Raises:
            TypeError: if it is no `Architecture`.
        """
        if not isinstance(adapter_class, Architecture):
            raise TypeError(f"an Architecture describes a family here, not {adapter_class!r}")
        SUPPORTED_ARCHITECTURES[architecture_name] = adapter_class

    @classmethod
    def discover_entry_points(cls) -> None:
        """Register the records that installed packages declare, but for classes that have one.

        In such a package's ``pyproject.toml``::

            [project.entry-points."lensbridge.architectures"]
            MyModelForCausalLM = "my_package.records:MY_MODEL"
        """
        for entry in entry_points(group=ENTRY_POINTS):
            if entry.name in SUPPORTED_ARCHITECTURES:
                continue
            try:
                cls.register_adapter(entry.name, entry.load())
            except Exception as error:  # code of another package, which must not keep the others from loading
                warnings.warn(f"the record {entry.name!r} ({entry.value}) is left out: {error}", stacklevel=2)

    @classmethod
    def select_architecture_adapter(cls, cfg: Any) -> Architecture:
        """The record of ``cfg.architecture`` (`TransformerBridgeConfig`) or ``cfg.original_architecture``.

        Raises:
            UnsupportedModelError: (a ValueError) if the config names no class, or one without a record.
        """
        cls.discover_entry_points()
        name = getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", None)
        if name is None:
            raise UnsupportedModelError("the config names no HuggingFace class: set cfg.architecture")
        if name not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedModelError(
                f"no record of the architecture {name}.{near_misses(name, SUPPORTED_ARCHITECTURES)} "
                f"Known: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}"
            )
        return SUPPORTED_ARCHITECTURES[name]
