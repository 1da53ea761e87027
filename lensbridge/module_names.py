"""Where is a thing found by someone who looks for it under TransformerLens' names?

TransformerLens 3.9.0 names several modules after the class inside. Here a module is named after its question, and the
other path leads to the same module object. So do the paths that version 2 had and 3.9.0 gave up
(``past_key_value_caching`` is a file of its own, as the classes inside had other names too).

The tables are what `lensbridge.shim` and ``lensbridge port`` answer from.
"""

from __future__ import annotations

import importlib
import sys

#: The release whose interface this package has.
EMULATED_VERSION = "3.9.0"

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
    # As versions 2.0 to 2.3 had them.
    "components.gated_mlp": "components.mlps.gated_mlp",
    "components.mlp": "components.mlps.mlp",
    "components.moe": "components.mlps.moe",
}

#: Names of the package in versions 1 and 2 -> ours.
OLD_NAMES = {
    "EasyTransformer": "HookedTransformer",
    "EasyTransformerConfig": "HookedTransformerConfig",
    "EasyTransformerKeyValueCache": "TransformerLensKeyValueCache",
    "EasyTransformerKeyValueCacheEntry": "TransformerLensKeyValueCacheEntry",
    "HookedTransformerKeyValueCache": "TransformerLensKeyValueCache",
    "HookedTransformerKeyValueCacheEntry": "TransformerLensKeyValueCacheEntry",
}

#: Paths of TransformerLens, with everything below them, that lead nowhere here -> why, and what there is instead.
NOT_OFFERED = {
    "model_bridge": "it serves TransformerBridge; HookedTransformer here runs the HuggingFace model itself",
    "benchmarks": "it measures TransformerBridge",
    "pretrained": "it converts HuggingFace's weights, and here nothing is converted: model.hf_model is what runs",
    "remote_module_loading": "it serves TransformerBridge",
    "tools.analysis": "it takes a TransformerBridge; direct_logit_attribution and direct_path_patching are here",
    "tools.model_registry": "this part of it collects and verifies models; tools.model_registry.api answers here",
    "components.mlps.gated_mlp_4bit": "quantised weights stay in HuggingFace's own modules",
    "utilities.aliases": "it serves TransformerBridge",
    "utilities.architectures": "it serves TransformerBridge; lensbridge.architectures has the families",
    "utilities.bridge_components": "it serves TransformerBridge",
    "utilities.heterogeneous_config": "it serves TransformerBridge",
    "utilities.quantization": "quantised weights stay in HuggingFace's own modules",
    "utilities.tracr": "it serves models made with tracr",
    "HookedSAE": "SAELens (sae_lens) has had it since TransformerLens 2.0",
    "HookedSAEConfig": "SAELens (sae_lens) has had it since TransformerLens 2.0",
    "HookedSAETransformer": "SAELens (sae_lens) has had it since TransformerLens 2.0",
}


def register(package: str) -> None:
    """Make the paths importable; names already bound in the package (the classes) stay what they are."""
    for path, module in SAME_MODULE.items():
        sys.modules[f"{package}.{path}"] = importlib.import_module(f"{package}.{module}")


def why_not(path: str) -> str | None:
    """Why a path below the package is not offered, or None if nothing is known of it."""
    parts = path.split(".")
    heads = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((NOT_OFFERED[head] for head in heads if head in NOT_OFFERED), None)
