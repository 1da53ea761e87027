"""Is a native model a model of transformers: does it save, load, generate and train, with its hook points firing?"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from lensbridge import HookedTransformerConfig, HookPoint, TransformerLensKeyValueCache
from lensbridge.errors import UnsupportedModelError
from lensbridge.native import NativeConfig, NativeForCausalLM
from lensbridge.native.initialisation import MODES

KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "rotary, groups, gated": {
        "positional_embedding_type": "rotary",
        "n_key_value_heads": 1,
        "gated_mlp": True,
        "normalization_type": "RMS",
    },
    "alibi, attention only": {"positional_embedding_type": "alibi", "attn_only": True, "normalization_type": None},
    "shortformer, experts": {"positional_embedding_type": "shortformer", "num_experts": 2, "experts_per_token": 1},
}


def new_cfg(**options: Any) -> HookedTransformerConfig:
    fields = {"d_model": 12, "d_head": 4, "n_layers": 2, "n_ctx": 16, "d_vocab": 19, "act_fn": "gelu", "device": "cpu"}
    return HookedTransformerConfig(**fields | {"initializer_range": 0.6} | options)


def new_model(**options: Any) -> NativeForCausalLM:
    return NativeForCausalLM.from_cfg(new_cfg(seed=1, **options)).eval()


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> NativeForCausalLM:
    return new_model(**KINDS[request.param])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(0))


def hook_points(model: torch.nn.Module) -> dict[str, HookPoint]:
    return {name: module for name, module in model.named_modules() if isinstance(module, HookPoint)}


def values(model: NativeForCausalLM, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """What passes the hook points in one run."""
    seen: dict[str, torch.Tensor] = {}
    for name, point in hook_points(model).items():
        point.add_hook(lambda tensor, hook, name=name: seen.update({name: tensor.detach()}))
    with torch.no_grad():
        model(*args, **kwargs)
    for point in hook_points(model).values():
        point.remove_hooks()
    return seen


# --- config -----------------------------------------------------------------------------------------------------------


def test_every_field_survives() -> None:
    options = {
        "seed": 4,
        "rotary_dim": 2,
        "positional_embedding_type": "rotary",
        "use_yarn_rope": True,
        "attn_types": ["local", "global"],
        "use_local_attn": True,
        "window_size": 3,
        "decoder_start_token_id": 5,
        "tie_word_embeddings": True,
        "dtype": torch.float64,
        "init_mode": "muP",
    }
    cfg = new_cfg(**options)
    there = NativeConfig.from_dict(NativeConfig.from_cfg(cfg).to_dict())
    assert dataclasses.asdict(there.to_cfg()) == dataclasses.asdict(cfg)


def test_making_a_cfg_of_a_config_sets_no_seed() -> None:
    config = NativeConfig.from_cfg(new_cfg(seed=4))
    before = torch.get_rng_state()
    assert config.to_cfg().seed == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_names_that_transformers_asks_for() -> None:
    config = NativeConfig.from_cfg(new_cfg(n_heads=2, d_mlp=9))
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (12, 2, 2)
    assert (config.head_dim, config.intermediate_size, config.vocab_size) == (4, 9, 19)
    assert (config.max_position_embeddings, config.num_key_value_heads) == (16, 2)
    assert NativeConfig.from_cfg(new_cfg(n_key_value_heads=1)).num_key_value_heads == 1
    with pytest.raises(AttributeError, match="num_of_things"):
        _ = config.num_of_things


def test_a_config_without_fields_is_a_model_too() -> None:
    assert NativeForCausalLM(NativeConfig())(torch.zeros(1, 2, dtype=torch.long)).logits.shape == (1, 2, 8)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_modules_share_the_cfg() -> None:
    cfg = new_cfg()
    model = NativeForCausalLM.from_cfg(cfg)
    assert all(module.cfg is cfg for module in model.modules() if hasattr(module, "cfg"))


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_gives_the_same_weights(mode: str) -> None:
    one, other = (NativeForCausalLM.from_cfg(new_cfg(seed=3, init_mode=mode)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    drawn = {name for name in one if "W_" in name}
    assert all(one[name].std() > 0 for name in drawn)
    assert all(one[name].unique().numel() == 1 for name in one.keys() - drawn if one[name].numel())


def test_weights_that_are_not_drawn_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    NativeForCausalLM.from_cfg(new_cfg(init_weights=False))
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match="init_mode='he'.*'xavier_uniform'"):
        NativeForCausalLM.from_cfg(new_cfg(init_mode="he"))
    with pytest.raises(ValueError, match="positional_embedding_type='sinusoidal'.*'rotary'"):
        NativeForCausalLM.from_cfg(new_cfg(positional_embedding_type="sinusoidal"))
    with pytest.raises(ValueError, match="normalization_type 'BN'"):
        NativeForCausalLM.from_cfg(new_cfg(normalization_type="BN"))
    with pytest.raises(AssertionError, match="d_vocab"):
        NativeForCausalLM.from_cfg(new_cfg(d_vocab=-1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positional_embedding_type": "rotary", "rotary_dim": 3}, "rotary_dim=3.*pairs"),
        ({"positional_embedding_type": "rotary", "d_head": 3}, "rotary_dim=3.*pairs"),
        ({"positional_embedding_type": "rotary", "rotary_dim": 64}, "rotary_dim=64.*in a head"),
        ({"n_heads": 4, "n_key_value_heads": 3}, "n_key_value_heads=3.*n_heads=4"),
        ({"n_heads": 4, "n_key_value_heads": 0}, "n_key_value_heads=0"),
        ({"use_local_attn": True, "window_size": 3, "attn_types": ["local"], "n_layers": 2}, "names 1 layers"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        NativeForCausalLM.from_cfg(new_cfg(**fields))


def test_save_and_load(model: NativeForCausalLM, ids: torch.Tensor, tmp_path: Path) -> None:
    model.cfg.use_attn_result = True
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is NativeForCausalLM
    assert dataclasses.asdict(loaded.cfg) == dataclasses.asdict(model.cfg)
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), NativeConfig)


def test_another_vocabulary_is_refused(model: NativeForCausalLM) -> None:
    with pytest.raises(UnsupportedModelError, match="d_vocab"):
        model.resize_token_embeddings(40)


def tied_head(model: NativeForCausalLM) -> None:
    model.unembed.W_U = torch.nn.Parameter(model.embed.W_E.data.T)


def tied_layers(model: NativeForCausalLM) -> None:
    model.blocks[1] = model.blocks[0]


@pytest.mark.parametrize("tie", [tied_head, tied_layers])
def test_weights_that_were_tied_by_hand_are_saved(tie: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    model = new_model()
    tie(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert len({p.data_ptr() for p in loaded.parameters()}) == len(dict(new_model().named_parameters()))


def test_what_is_computed_from_the_config_is_not_saved(tmp_path: Path) -> None:
    model = new_model(positional_embedding_type="rotary")
    model.save_pretrained(tmp_path)
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert saved == {name for name, _ in model.named_parameters()}


def test_missing_weights_are_made_as_in_a_new_model(tmp_path: Path) -> None:
    model = new_model(init_mode="xavier_uniform", initializer_range=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in ("blocks.0.attn.b_Q", "blocks.1.ln1.w", "blocks.1.mlp.W_in"):
        del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = NativeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.blocks[0].attn.b_Q, torch.zeros(3, 4))
    assert torch.equal(loaded.blocks[1].ln1.w, torch.ones(12))
    bound = (6 / (12 + 48)) ** 0.5
    assert 0 < loaded.blocks[1].mlp.W_in.abs().max() <= bound
    assert torch.equal(loaded.blocks[1].mlp.W_out, model.blocks[1].mlp.W_out)


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.double()], ids=["bfloat16", "float64"])
def test_another_dtype(convert: Any, model: NativeForCausalLM, ids: torch.Tensor, tmp_path: Path) -> None:
    expected = model(ids).logits
    converted = convert(copy.deepcopy(model))
    dtype = converted.embed.W_E.dtype
    assert converted.cfg.dtype == dtype != model.cfg.dtype
    logits = converted(ids).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    converted.save_pretrained(tmp_path)
    assert NativeForCausalLM.from_pretrained(tmp_path).cfg.dtype == dtype
    assert NativeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits.dtype == torch.float32


def test_copies_are_independent_and_pickles_work(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    logits = model(ids).logits
    other = copy.deepcopy(model)
    assert other.cfg is other.blocks[0].attn.cfg is not model.cfg
    with torch.no_grad():
        other.embed.W_E.zero_()
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, logits)


# --- running ----------------------------------------------------------------------------------------------------------


def test_loss(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    labels = ids.clone()
    labels[0, 3] = -100
    output = model(ids, labels=labels)
    log_probs = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(output.loss, -log_probs[counted].mean())


def test_other_outputs(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    seen = values(model, ids)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    for layer in range(2):
        assert torch.equal(output.hidden_states[layer], seen[f"blocks.{layer}.hook_resid_pre"])
    assert torch.equal(output.hidden_states[2], seen["unembed.hook_in"])
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)
    assert output.past_key_values is None


def test_embeddings_in_place_of_tokens(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    assert torch.equal(model(inputs_embeds=model.embed(ids)).logits, model(ids).logits)
    assert model.get_input_embeddings() is model.embed
    assert model.get_output_embeddings() is model.unembed


@pytest.mark.parametrize("pieces", [(3, 4), (1, 1, 5)])
def test_caches_of_both_kinds(model: NativeForCausalLM, ids: torch.Tensor, pieces: tuple[int, ...]) -> None:
    expected = model(ids).logits
    for cache in (DynamicCache(config=model.config), TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)):
        found, start = [], 0
        for length in pieces:
            found.append(model(ids[:, start : start + length], past_key_values=cache).logits)
            start += length
        torch.testing.assert_close(torch.cat(found, dim=1), expected)
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 7


def test_padding_on_the_left_changes_nothing(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    padded = torch.cat((torch.zeros(2, 2, dtype=torch.long), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 2:], model(ids).logits)


@pytest.mark.parametrize("padded", [False, True])
def test_generation(model: NativeForCausalLM, ids: torch.Tensor, padded: bool) -> None:
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    expected, whole = ids, mask
    for _ in range(5):
        logits = model(expected, attention_mask=whole).logits
        expected = torch.cat((expected, logits[:, -1:].argmax(-1)), dim=1)
        whole = torch.cat((whole, torch.ones(2, 1, dtype=torch.long)), dim=1)
    for use_cache in (True, False):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=use_cache)
        assert torch.equal(found, expected)


def test_positions(ids: torch.Tensor) -> None:
    own = torch.arange(7).expand(2, 7)
    for kind in KINDS.values():
        model = new_model(**kind)
        assert torch.equal(model(ids, position_ids=own).logits, model(ids).logits)
    learned, rotary = new_model(), new_model(positional_embedding_type="rotary")
    seen = values(learned, ids, position_ids=own + 3)
    assert torch.equal(seen["hook_pos_embed"], learned.pos_embed.W_pos[3:10].expand(2, -1, -1))
    with pytest.raises(ValueError, match="rotary positions has no place"):
        rotary(ids, position_ids=own + 3)


def test_what_cannot_be_run_says_why(ids: torch.Tensor) -> None:
    model = new_model()
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": model.embed(ids)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**arguments)
    with pytest.raises(ValueError, match=r"\[batch, pos\], not \[1, 1, 7, 7\]"):
        model(ids, attention_mask=torch.ones(1, 1, 7, 7))
    with pytest.raises(ValueError, match="StaticCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=9))
    for kind in ("standard", "rotary"):
        with pytest.raises(IndexError, match="17 tokens long"):
            new_model(positional_embedding_type=kind)(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_run_in_two_parts(model: NativeForCausalLM, ids: torch.Tensor, start: int) -> None:
    residual, pos_embed = model.embedded(ids)
    middle = model.through_blocks(residual, 0, start, pos_embed)
    rest = model.through_blocks(middle, start, None, pos_embed)
    assert torch.equal(model.logits(model.normed(rest)), model(ids).logits)
    first = model.through_blocks(residual, stop=-1, shortformer_pos_embed=pos_embed)
    assert torch.equal(first, model.blocks[0](residual, pos_embed))


# --- hook points and training -----------------------------------------------------------------------------------------


def test_values_mean_what_their_names_say(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    model.cfg.use_attn_result = True
    seen = values(model, ids)
    for layer, block in enumerate(model.blocks):
        at = {name.split(".", 2)[2]: value for name, value in seen.items() if name.startswith(f"blocks.{layer}.")}
        result = at["attn.hook_result"].sum(2) + block.attn.b_O
        torch.testing.assert_close(result, at["hook_attn_out"])
        after = at["hook_resid_pre"] + at["hook_attn_out"]
        torch.testing.assert_close(after + at.get("hook_mlp_out", 0), at["hook_resid_post"])
        torch.testing.assert_close(at["attn.hook_pattern"].sum(-1), torch.ones(2, 3, 7))
        torch.testing.assert_close(at["attn.hook_attn_scores"].softmax(-1), at["attn.hook_pattern"])
    logits = seen["unembed.hook_in"] @ model.unembed.W_U + model.unembed.b_U
    torch.testing.assert_close(logits, seen["unembed.hook_out"])


def test_a_hook_acts_in_every_kind_of_run(ids: torch.Tensor) -> None:
    model = new_model()
    plain = model(ids).logits
    model.blocks[1].hook_resid_pre.add_hook(lambda tensor, hook: torch.zeros_like(tensor))
    changed = model(ids).logits
    assert not torch.equal(changed, plain)
    found = model.generate(ids, max_new_tokens=1, do_sample=False)
    assert torch.equal(found[:, -1], changed[:, -1].argmax(-1))


def test_looking_changes_no_bit(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(plain, model(ids).logits)
        for point in hook_points(model).values():
            point.add_hook(lambda tensor, hook: None)
        assert torch.equal(plain, model(ids).logits)


def test_training(model: NativeForCausalLM, ids: torch.Tensor) -> None:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # A run under inference mode must leave nothing behind that training cannot use.
    with torch.inference_mode():
        model(ids)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
