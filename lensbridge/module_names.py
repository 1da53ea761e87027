"""Where is a thing found by someone who looks for it under TransformerLens' module path?

TransformerLens 3.9.0 names several modules after the class inside. Here a module is named after its question, and the
other path leads to the same module object. So do the paths that version 2 had and 3.9.0 gave up
(``past_key_value_caching`` is a file of its own, as the classes inside had other names too).
"""

from __future__ import annotations

import importlib
import sys

#: TransformerLens' path below the package -> ours.
SAME_MODULE = {
    "ActivationCache": "activation_cache",
    "FactoredMatrix": "factored_matrix",
    "HookedRootModule": "hooked_root_module",
    "SVDInterpreter": "svd_interpreter",
    "HookedTransformer": "model",
    "HookedEncoder": "encoders.hooked_encoder",
    "HookedEncoderDecoder": "encoders.hooked_encoder_decoder",
    "HookedAudioEncoder": "encoders.hooked_audio_encoder",
    "BertNextSentencePrediction": "encoders.next_sentence",
    "HookedTransformerConfig": "config",
    "config.hooked_transformer_config": "config",
    "config.transformer_bridge_config": "bridge_config",
    "config.transformer_lens_config": "base_config",
}


def register(package: str) -> None:
    """Make the paths importable; names already bound in the package (the classes) stay what they are."""
    for path, module in SAME_MODULE.items():
        sys.modules[f"{package}.{path}"] = importlib.import_module(f"{package}.{module}")
