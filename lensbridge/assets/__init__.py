"""Where the data that travels with lensbridge lies: the small trained model, and prompts to try a model on."""

from __future__ import annotations

from pathlib import Path

#: The bundled checkpoint, a directory that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load without a network.
TOY_DIRECTORY = Path(__file__).parent / "toy"

__all__ = ["TOY_DIRECTORY"]
