"""Which architectures is the comparison made on, and how is each made?

One tiny model per family and variant, built from its HuggingFace config, with every parameter rough: norm gains and
biases far from neutral, queries and keys scaled up. The real TransformerLens reads the same config and weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
from transformer_lens import HookedTransformer as ReferenceTransformer
from transformer_lens import loading_from_pretrained as reference_loading

from compat_tests import qwen1

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
MLP = {"intermediate_size": 48}
GROUPED = {"num_key_value_heads": 2}
CONTEXT = {"max_position_embeddings": 64}
SEEING = SIZES | MLP | {"image_size": 32, "patch_size": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """A tiny model of one family: its classes, config, and the name TransformerLens takes its table entry from."""

    config_class: str
    model_class: str
    reference_name: str
    options: dict[str, Any] = field(default_factory=dict)
    #: Options that 3.9.0 looks for among the config's attributes, where transformers 4 had them.
    left_for_reference: tuple[str, ...] = ()
    #: For a model of several modalities the class of its config, and what that has besides the text's.
    around: tuple[str, dict[str, Any]] | None = None


FAMILIES = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", "meta-llama/Llama-2-7b-hf"),
    "llama grouped": Family("LlamaConfig", "LlamaForCausalLM", "meta-llama/Llama-2-7b-hf", GROUPED),
    "mistral": Family(
        "MistralConfig", "MistralForCausalLM", "mistralai/Mistral-7B-v0.1", GROUPED | {"sliding_window": 4}
    ),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", "Qwen/Qwen2-0.5B", GROUPED),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", "Qwen/Qwen3-0.6B", GROUPED | {"head_dim": 8}),
    "gemma": Family("GemmaConfig", "GemmaForCausalLM", "google/gemma-2b", {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        "google/gemma-2-2b",
        GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        "google/gemma-3-1b-it",
        GROUPED
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma3 multimodal": Family(
        "Gemma3TextConfig",
        "Gemma3ForConditionalGeneration",
        "google/gemma-3-4b-it",
        GROUPED
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            },
        },
        around=("Gemma3Config", {"vision_config": SEEING, "mm_tokens_per_image": 4}),
    ),
    "apertus": Family("ApertusConfig", "ApertusForCausalLM", "swiss-ai/Apertus-8B-2509", GROUPED),
    "gpt_neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", "EleutherAI/pythia-70m"),
    "gpt_neox sequential": Family(
        "GPTNeoXConfig", "GPTNeoXForCausalLM", "EleutherAI/pythia-70m", {"use_parallel_residual": False}
    ),
    "gptj": Family("GPTJConfig", "GPTJForCausalLM", "EleutherAI/gpt-j-6B", {"rotary_dim": 4}),
    "gpt_neo": Family(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        "EleutherAI/gpt-neo-125M",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "opt": Family("OPTConfig", "OPTForCausalLM", "facebook/opt-125m", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": Family("BloomConfig", "BloomForCausalLM", "bigscience/bloom-560m"),
    "phi": Family(
        "PhiConfig", "PhiForCausalLM", "microsoft/phi-1", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)
    ),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", "microsoft/Phi-3-mini-4k-instruct", GROUPED | {"pad_token_id": 0}),
    "olmo": Family("OlmoConfig", "OlmoForCausalLM", "allenai/OLMo-1B-hf"),
    "olmo clipped": Family("OlmoConfig", "OlmoForCausalLM", "allenai/OLMo-1B-hf", {"clip_qkv": 0.7}),
    "olmo2": Family(
        "Olmo2Config",
        "Olmo2ForCausalLM",
        "allenai/OLMo-2-0425-1B",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "mixtral": Family(
        "MixtralConfig", "MixtralForCausalLM", "mistralai/Mixtral-8x7B-v0.1", GROUPED | EXPERTS | {"sliding_window": 4}
    ),
    "olmoe": Family("OlmoeConfig", "OlmoeForCausalLM", "allenai/OLMoE-1B-7B-0924", EXPERTS),
    "olmoe rescaled": Family(
        "OlmoeConfig", "OlmoeForCausalLM", "allenai/OLMoE-1B-7B-0924", EXPERTS | {"norm_topk_prob": True}
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        "openai/gpt-oss-20b",
        GROUPED | EXPERTS | {"head_dim": 8, "sliding_window": 4},
    ),
    "qwen": Family("QWenConfig", "QWenLMHeadModel", "Qwen/Qwen-1_8B"),
    "olmo3": Family("Olmo3Config", "Olmo3ForCausalLM", "allenai/Olmo-3-7B-Instruct", GROUPED | {"sliding_window": 4}),
}
#: What another test compares, as 3.9.0 has it in another form.
APART = {
    "gpt_bigcode": Family("GPTBigCodeConfig", "GPTBigCodeForCausalLM", "bigcode/santacoder"),
}


def _class(name: str) -> Any:
    return getattr(transformers, name, None) or getattr(qwen1, name)


def rough_model(family: Family, seed: int = 0) -> Any:
    """The HuggingFace model, the same for the same family."""
    torch.manual_seed(seed)
    config_class = _class(family.config_class)
    mlp = MLP if hasattr(config_class(), "intermediate_size") else {}
    options = {**SIZES, **mlp, **CONTEXT, "tie_word_embeddings": False, **family.options}
    config = config_class(**options, attn_implementation="eager")
    if family.around is not None:
        name, others = family.around
        tied = {"tie_word_embeddings": options["tie_word_embeddings"]}
        config = getattr(transformers, name)(text_config=config, attn_implementation="eager", **tied, **others)
    config.architectures = [family.model_class]
    for name in family.left_for_reference:
        setattr(config, name, family.options[name])
    model = _class(family.model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                norm_gain = name.endswith("weight")
                neutral = 0.0 if "gemma" in family.config_class.lower() else 1.0
                parameter.copy_(neutral + 0.4 * noise if norm_gain else 0.3 * noise)
            else:
                scale = 1.8 if any(part in name for part in ("q_proj", "k_proj", "query_key_value")) else 1.0
                parameter.copy_(scale * noise * parameter.shape[-1] ** -0.5)
    return model


def _sizes(config: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """What 3.9.0 has in a table by name for some families, instead of reading it off the HF config."""
    config = config.get_text_config()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    found = {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": heads,
        "n_layers": layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
    }
    # The first Qwen's config counts both halves of its MLPs.
    if hasattr(config, "intermediate_size") and fields["d_mlp"] != config.intermediate_size // 2:
        found["d_mlp"] = config.intermediate_size
    groups = getattr(config, "num_key_value_heads", heads)
    found |= {"n_key_value_heads": groups} if groups != heads else {}
    if "rms_norm_eps" in config.to_dict():
        found["eps"] = config.rms_norm_eps
    if fields.get("positional_embedding_type") == "rotary" and fields.get("rotary_dim", 0) > d_head:
        found["rotary_dim"] = d_head
    if fields.get("attn_types") and len(fields["attn_types"]) != layers:
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
        found["attn_types"] = ["local" if kind == "sliding_attention" else "global" for kind in kinds]
    if fields.get("window_size") and getattr(config, "sliding_window", None):
        found["window_size"] = config.sliding_window
    if getattr(config, "clip_qkv", None):
        found["clip_qkv"] = config.clip_qkv
    if fields.get("attn_scale", -1) > 0 and hasattr(config, "query_pre_attn_scalar"):
        found["attn_scale"] = config.query_pre_attn_scalar**0.5
    return found


@contextmanager
def _table_for(config: Any) -> Iterator[None]:
    """While open, TransformerLens reads this config instead of asking the hub, and its tables have its sizes."""
    convert = reference_loading.convert_hf_model_config

    def converted(name: str, **kwargs: Any) -> dict[str, Any]:
        fields = convert(name, **kwargs)
        return fields | _sizes(config, fields)

    with (
        mock.patch.object(reference_loading.AutoConfig, "from_pretrained", lambda *_, **__: config),
        mock.patch.object(reference_loading, "convert_hf_model_config", converted),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def reference(model: Any, family: Family, tokenizer: Any = None, **flags: Any) -> ReferenceTransformer:
    """The real transformer_lens 3.9.0 model on these weights, through its own ``from_pretrained``."""
    with _table_for(model.config):
        return ReferenceTransformer.from_pretrained(family.reference_name, hf_model=model, tokenizer=tokenizer, **flags)
