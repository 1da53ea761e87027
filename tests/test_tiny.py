"""Does every family have a tiny random model, and does each part of it show in the logits?"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    DeepseekV3Config,
    Gemma3Config,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaForCausalLM,
    MptConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lensbridge.errors import UnknownArgumentError, UnsupportedModelError
from lensbridge.tiny import (
    FAMILIES,
    UNBUILDABLE,
    layers,
    roughen,
    tiny_config,
    tiny_family,
    tiny_model,
    tiny_tokens,
)
from lensbridge.tiny.shrinking import default_config
from lensbridge.tiny.sizes import HEADS, KV_HEADS, VISIBLE, VOCABULARY, WIDTH

EVERY = pytest.mark.parametrize("key", FAMILIES)
#: No layer gives out a square of attention weights: recurrences, and models that keep theirs to themselves.
WITHOUT_PATTERNS = {"falcon_mamba", "mamba", "mamba2", "reformer", "rwkv", "xlstm"}
#: What autograd cannot follow: LSH attention wants training mode, recurrences that write their state in place.
WITHOUT_GRADIENTS = {"reformer", "rwkv", "xlstm"}
#: Weights that choose experts or positions; `test_what_chooses_acts` moves them instead.
CHOOSING = r".*(indexer\.(?!rotary)|expert_bias|e_score_correction_bias|balancing_biases).*"
#: Weights that only another input than a text reaches: an encoder's states, images, audio.
OTHER_INPUTS = r".*(encoder_attn|vision|visual|audio|image|pooler|speech|multi_?modal|embed_tokens_extend).*"
IDLE = {
    "blt": r"model\.patcher\..*|.*local_encoder\.cross_attn_layers\.0\.(q_|k_proj).*",  # a query sees one patch
    "longcat_flash": r".*mlp\.experts\.gate_up_proj",  # the last experts let their input through
    "mllama": r"model\.layers\.1\..*",  # layers of cross-attention are left out without an image
    "prophetnet": r".*cross_attn.*",
    "roc_bert": r".*(pronunciation|shape)_embed\.weight",
    "xlnet": r".*(rel_attn\.(r_s_bias|seg_embed)|mask_emb)",  # segments, masks
    "zaya": r".*mlp\.experts\..*",  # one of four for each token, and seldom the last
}


@cache
def config_of(key: str) -> PreTrainedConfig:
    """The tiny config of a family, shared likewise."""
    return tiny_config(key)


@cache
def family(key: str) -> PreTrainedModel:
    """The tiny model of a family, shared by the tests that only read it."""
    return tiny_model(config_of(key))


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config(decoder=True)


def logits(model: PreTrainedModel, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_tokens() if tokens is None else tokens).logits


def acts(key: str, name: str) -> bool:
    """Whether the logits change with one weight."""
    model, tokens = family(key), tiny_tokens(8)
    weight = dict([*model.named_parameters(), *model.named_buffers()])[name]
    before, kept = logits(model, tokens), weight.detach().clone()
    with torch.no_grad():
        weight.add_(2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        after = logits(model, tokens)
        weight.copy_(kept)
    return bool((after - before).abs().max() > 1e-3)


def test_every_entry_of_the_mapping_is_known() -> None:
    """A new release of transformers with a new family fails here."""
    built = {key.partition("@")[0] for key in FAMILIES}
    assert built | set(UNBUILDABLE) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not built & set(UNBUILDABLE)


@EVERY
def test_every_family_runs(key: str) -> None:
    model = family(key)
    found = logits(model)
    words = getattr(text_config(model.config), "unpadded_vocab_size", None) or VOCABULARY
    assert found.shape == (2, 12, words) and found.isfinite().all()
    assert found.std() > 0.03
    assert not model.training and {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert model.num_parameters() < 600_000
    assert text_config(model.config)._attn_implementation == "eager" or not model._supports_sdpa


@EVERY
def test_no_part_is_idle(key: str) -> None:
    """Each weight on the way of a text has a gradient, and each expert has; the rest is listed, and is idle."""
    model = family(key)
    if key in WITHOUT_GRADIENTS:
        idle = {name for name, _ in model.named_parameters() if not acts(key, name)}
        assert idle == ({"lm_head.bias"} if key == "reformer" else set())  # its head has a second bias
        return
    tokens = tiny_tokens(8)
    found = model(input_ids=tokens).logits
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((found * noise).sum(), list(weights.values()), allow_unused=True)
    idle = set()
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None and "experts" in name and gradient.dim() == 3:
            alive = bool((gradient.flatten(1).abs().amax(1) > 1e-7).all())
        else:
            alive = gradient is not None and gradient.abs().max() > 1e-7
        idle |= set() if alive else {name}
    listed = IDLE.get(key, "(?!)")
    excused = {name for name in weights if any(re.fullmatch(names, name) for names in (CHOOSING, OTHER_INPUTS, listed))}
    assert idle <= excused
    assert {name for name in weights if re.fullmatch(listed, name)} <= idle
    assert key not in IDLE or any(re.fullmatch(listed, name) for name in weights)


@EVERY
def test_what_chooses_acts(key: str) -> None:
    """Indexers leave positions out, and the biases of the choice of experts decide it, in so short a text."""
    model = family(key)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if re.fullmatch(CHOOSING, name)]
    assert [name for name in names if not acts(key, name)] == []


@EVERY
def test_attention_chooses(key: str) -> None:
    """In each layer that gives out its pattern, it is far from uniform, and far from a single position."""
    with torch.no_grad():
        out = family(key)(input_ids=tiny_tokens(), output_attentions=True)
    squares = [
        pattern
        for pattern in getattr(out, "attentions", None) or ()
        if isinstance(pattern, torch.Tensor) and pattern.dim() == 4 and pattern.shape[2] == 12
    ]
    assert bool(squares) != (key in WITHOUT_PATTERNS)
    for pattern in squares:
        seen = pattern > 0
        uniform = seen / seen.sum(-1, keepdim=True)
        distance = (pattern / pattern.sum(-1, keepdim=True) - uniform).abs().sum(-1)[:, :, 4:] / 2
        assert 0.15 < distance.mean() < 0.9


@EVERY
def test_each_kind_of_layer_is_there(key: str) -> None:
    """Each entry of the full-size config's lists of layers is in the tiny config's."""
    large, tiny = text_config(default_config(key)), text_config(config_of(key))
    number = large.num_hidden_layers if hasattr(large, "num_hidden_layers") else 0
    for name, value in vars(large).items():
        kinds = isinstance(value, (list, tuple)) and len(value) == number and name.endswith(("types", "type", "layers"))
        if kinds and name not in layers.NUMBERS:
            assert set(vars(tiny)[name]) == set(value), name
        if name in layers.FIRST and value:
            assert 0 < vars(tiny)[name] < tiny.num_hidden_layers
        if name in layers.NUMBERS and value:
            assert vars(tiny)[name] and (len(vars(tiny)[name]) < tiny.num_hidden_layers) == (len(value) < number)
    assert number == 0 or 2 <= tiny.num_hidden_layers <= (16 if key == "hrm_text" else 4)


#: Entries that a class never reads, and a factor whose product is normalised.
INVISIBLE = {
    ("beam", "routed_scaling_factor"),
    *((key, "scale_embedding") for key in ("blenderbot-small", "musicgen", "musicgen_melody", "whisper")),
}
MULTIPLIED = [
    (key, name) for key in FAMILIES if "@" not in key for name in VISIBLE if name in vars(text_config(config_of(key)))
]


@pytest.mark.parametrize(("key", "name"), MULTIPLIED)
def test_multipliers_are_visible(key: str, name: str) -> None:
    """A multiplier is not neutral, and the logits are others when it is."""
    config = config_of(key)
    value = vars(text_config(config))[name]
    neutral: Any = [1.0] * len(value) if isinstance(value, (list, tuple)) else type(value)(value is not True)
    assert value != neutral
    part = "decoder" if "musicgen" in key else "text_config"
    other = tiny_config(key, **{name: neutral} if name in vars(config) else {part: {name: neutral}})
    same = torch.allclose(logits(family(key)), logits(tiny_model(other)), atol=1e-3)
    assert same == ((key, name) in INVISIBLE)


@pytest.mark.parametrize("key", list(FAMILIES)[::12])
def test_a_seed_gives_the_same_model(key: str) -> None:
    """Whatever the caller's random state is, which stays as it is."""
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, other = tiny_family(key), tiny_family(key, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, weight), same, new in zip(
        family(key).named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, same), name
        assert not torch.equal(weight, new) or not weight.requires_grad, name
    assert torch.equal(logits(again), logits(family(key)))


@pytest.mark.parametrize("key", UNBUILDABLE)
def test_the_unbuildable_fail(key: str) -> None:
    """An entry that starts to work fails here, and belongs to the families."""
    if key == "gemma3n":
        if all(importlib.util.find_spec(name) for name in ("timm", "PIL")):
            pytest.skip("timm is installed")
        with pytest.raises(ImportError, match="timm"):
            tiny_family(key)
        return
    text = dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0)
    config = tiny_config(CONFIG_MAPPING[key](text_config=text))
    with pytest.raises(ValueError, match="shared_kv_states"):
        logits(tiny_model(config))


def test_norms_are_far_from_neutral() -> None:
    """Gemma stores a gain as its difference to one, Llama as it is; both spread about what they start as."""
    for key, neutral in (("gemma2", 0.0), ("llama", 1.0)):
        gains = torch.cat([weight for name, weight in family(key).named_parameters() if "norm" in name])
        assert (gains.mean() - neutral).abs() < 0.15 and 0.3 < gains.std() < 0.5


def test_queries_and_keys_are_sharp() -> None:
    """Separate or fused, they are larger than what else reads as many inputs."""
    llama, gpt2 = family("llama").model.layers[0], family("gpt2").transformer.h[0]
    for sharp, plain in (
        (llama.self_attn.k_proj, llama.self_attn.v_proj),
        (llama.self_attn.q_proj, llama.mlp.up_proj),
        (gpt2.attn.c_attn, gpt2.mlp.c_fc),
    ):
        assert 1.5 < sharp.weight.std() / plain.weight.std() < 2.1
    assert abs(gpt2.mlp.c_proj.weight.std() - 96**-0.5) < 0.01  # stored as (in, out)


def test_roughen_leaves_buffers_alone() -> None:
    """Frequencies of rotary embeddings are computed, not learned; the scalar of Gemma 4's layers is learned."""
    model = LlamaForCausalLM(tiny_config("llama"))
    before = model.model.rotary_emb.inv_freq.clone()
    roughen(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert (family("gemma4_text").model.layers[0].layer_scalar - 1).abs() > 0.01
    module = nn.BatchNorm1d(4)
    roughen(module)
    assert torch.equal(module.running_var, torch.ones(4)) and module.weight.std() > 0.1


def test_options_of_a_config_are_kept() -> None:
    config = tiny_config(LlamaConfig(attention_bias=True, hidden_act="relu", num_hidden_layers=40, rope_theta=5e5))
    assert (config.attention_bias, config.hidden_act, config.num_hidden_layers) == (True, "relu", 2)
    assert config.rope_parameters["rope_theta"] == 5e5
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (WIDTH, HEADS, KV_HEADS)
    assert tiny_config(LlamaConfig(num_attention_heads=8, num_key_value_heads=1)).num_key_value_heads == 1
    assert tiny_config(LlamaConfig(tie_word_embeddings=True)).tie_word_embeddings
    assert tiny_config(GPT2Config(resid_pdrop=0.3)).resid_pdrop == 0.0
    assert tiny_config(LlamaConfig(bos_token_id=5, eos_token_id=[128001, 7])).eos_token_id == [3, 7]
    assert tiny_config(MptConfig(attn_config={"alibi": False})).attn_config.alibi is False
    assert not hasattr(tiny_config(LlamaConfig(quantization_config={"quant_method": "fp8"})), "quantization_config")


def test_kinds_of_layers_of_a_config_are_kept() -> None:
    """Those that the config has, not those of its class's defaults."""
    kinds = ["sliding_attention"] * 9 + ["full_attention"]
    assert tiny_config(
        Gemma3Config(text_config={"layer_types": kinds, "num_hidden_layers": 10})
    ).text_config.layer_types == [
        "sliding_attention",
        "full_attention",
    ]
    experts = tiny_config(Qwen3MoeConfig(mlp_only_layers=[0, 1, 20]))
    assert experts.mlp_only_layers == [0] and experts.num_hidden_layers == 2
    assert tiny_config(Qwen3MoeConfig(decoder_sparse_step=3)).decoder_sparse_step == 2
    wide = Gemma4TextConfig(
        num_hidden_layers=4, layer_types=["full_attention"] * 4, per_layer_config={2: {"head_dim": 64}}
    )
    narrow = tiny_config(wide)
    assert [narrow.per_layer_config[i].head_dim for i in range(2)] == [16, 8]


def test_what_is_tiny_stays_as_it_is() -> None:
    for key in (
        "llama",
        "gemma3n_text",
        "qwen3_moe@dense_first",
        "gemma4_text@shared_keys",
        "hrm_text",
        "zamba2",
        "git",
    ):
        config = config_of(key)
        assert tiny_config(config).to_dict() == config.to_dict(), key


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            rope_parameters={
                **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            }
        ),
        Phi3Config(
            original_max_position_embeddings=4096,
            rope_parameters={
                **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096},
                **{"short_factor": [1.1] * 48, "long_factor": [1.5] * 48},
            },
        ),
        DeepseekV3Config(
            rope_parameters={
                **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
                **{"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096},
            }
        ),
    ],
    ids=["llama3", "longrope", "yarn"],
)
def test_rotary_embeddings_of_checkpoints(config: PreTrainedConfig) -> None:
    """Their kind is kept, and acts in a short text: the same weights do something else without it."""
    tiny = tiny_config(config)
    assert tiny.rope_parameters["rope_type"] == config.rope_parameters["rope_type"]
    plain = tiny_config(config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    assert not torch.allclose(logits(tiny_model(tiny)), logits(tiny_model(plain)), atol=1e-3)


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (LlavaConfig(), LlavaForConditionalGeneration),
        (Qwen2VLConfig(), Qwen2VLForConditionalGeneration),
        (Qwen2VLForConditionalGeneration, Qwen2VLForConditionalGeneration),
        (MllamaForCausalLM, MllamaForCausalLM),
    ],
)
def test_nested_configs(config: Any, model_class: type[PreTrainedModel]) -> None:
    """Wrappers shrink with all that is in them, and a class that takes the text's config alone gets it."""
    model = tiny_model(tiny_config(config), model_class=model_class)
    assert logits(model).shape == (2, 12, VOCABULARY)
    assert text_config(model.config).hidden_size == WIDTH and model.num_parameters() < 600_000


def test_the_class_that_a_checkpoint_names() -> None:
    """For configs that transformers has no causal language model for."""
    config = tiny_config(LlavaConfig(architectures=["LlavaForConditionalGeneration"]))
    assert type(tiny_model(config)) is LlavaForConditionalGeneration
    assert type(tiny_model(tiny_config(LlamaConfig(architectures=["LlamaModel"])))) is LlamaForCausalLM


def test_a_config_is_left_as_it_is() -> None:
    large = LlamaConfig()
    tiny = tiny_config(large)
    before = large.to_dict(), tiny.to_dict()
    tiny_model(tiny)
    assert (large.to_dict(), tiny.to_dict()) == before


def test_overrides() -> None:
    assert tiny_config("llama", num_key_value_heads=4, hidden_size=32).num_key_value_heads == 4
    assert tiny_config("gpt2", hidden_size=32).n_embd == 32  # under the name that other families have, too
    assert tiny_config("gemma3", text_config={"sliding_window": 3}).text_config.sliding_window == 3
    assert tiny_config("falcon", alibi=True).alibi
    with pytest.raises(UnknownArgumentError, match="num_key_value_heads"):
        tiny_config("llama", num_key_value_head=4)


def test_unknown_families() -> None:
    with pytest.raises(UnsupportedModelError, match="falcon@new_decoder"):
        tiny_family("falcon@new_decoders")
    with pytest.raises(UnsupportedModelError, match="llama"):
        tiny_config("lama")
    with pytest.raises(UnsupportedModelError, match="model_class"):
        tiny_model(tiny_config("vit"))


def test_layers_that_cover_all_properties() -> None:
    """Six kinds of layers; four of them have each pair of properties that can be had."""
    config = PreTrainedConfig(
        layer_types=["sliding", "sliding", "full"] * 6,
        num_kv_shared_layers=9,
        activation_sparsity_pattern=[0.95] * 6 + [0.0] * 12,
        no_layer_list=[1, 2, 3],
    )
    config.num_hidden_layers = 18
    chosen = layers.choose(config)
    kept = layers.keep(config, chosen)
    assert len(chosen) == 4 and kept["num_hidden_layers"] == 4 and 0 < kept["num_kv_shared_layers"] < 4
    assert set(kept["layer_types"]) == {"sliding", "full"} and set(kept["activation_sparsity_pattern"]) == {0.95, 0.0}
    assert "no_layer_list" not in kept
