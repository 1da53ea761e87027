"""Are quantised models shown as they are: HuggingFace's activations, and the matrices that their layers multiply with?

What a layer multiplies with is measured by giving it the unit vectors, which every kind here passes on exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    TorchAoConfig,
)

from lensbridge import HookedTransformer
from lensbridge.affine import computed
from lensbridge.computed import outlined
from lensbridge.errors import ReadOnlyWeightError, UnsupportedModelError
from lensbridge.readonly import ReadOnlyTensor
from lensbridge.tiny.rough import roughen

#: Every processing option off.
RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
WIDTH = 64
SIZES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=32, attention_bias=True, attn_implementation="eager",
    ),
    "gpt2": GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False, attn_implementation="eager",
    ),
}  # fmt: skip
#: The HF modules of a layer: attention's output projection, the MLP's, and the layer; and those of the projections.
PATHS = {
    "llama": ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("transformer.h.{}", "attn.c_proj", "mlp.c_proj"),
}


def rough(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(SIZES[family])).eval()
    roughen(model, 0)
    return model


def layers_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, name, projection) of everything in the blocks that is to be quantised."""
    for path, module in [*model.named_modules()]:
        if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in path:
            parent, _, name = path.rpartition(".")
            yield model.get_submodule(parent), name, module


# --- one way of quantising each --------------------------------------------------------------------------------------


def by_loading(quantization_config: Any) -> Callable[[str, Path], Any]:
    def quantise(family: str, place: Path) -> Any:
        rough(family).save_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(
            place, quantization_config=quantization_config, dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval()

    return quantise


def in_place(change: Callable[[nn.Module], Any]) -> Callable[[str, Path], Any]:
    def quantise(family: str, place: Path) -> Any:
        model = rough(family)
        return change(model) or model

    return quantise


def replaced(layer: Callable[[Tensor, Tensor | None], nn.Module]) -> Callable[[str, Path], Any]:
    """Every projection by a layer that is made of its ``[out, in]`` matrix and bias."""

    def quantise(family: str, place: Path) -> Any:
        model = rough(family)
        with torch.no_grad():
            for parent, name, module in layers_of(model):
                weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
                setattr(parent, name, layer(weight.clone(), module.bias))
        return model

    return quantise


def torchao(name: str, **options: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, name)(**options))

    return change


def dynamic(model: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


class Packed(nn.Module):
    """A layer as GPTQ's libraries keep it: 4-bit codes and zeros in words, scales by group, groups by input."""

    bits = 4

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.groups = self._groups(self.in_features)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("scales", torch.zeros(int(self.groups.max()) + 1, self.out_features))
        self.zeros = torch.zeros(self.scales.shape, dtype=torch.long)
        self.codes = torch.zeros(self.in_features, self.out_features, dtype=torch.long)
        self._code(weight.T)
        self._pack()

    @staticmethod
    def _groups(size: int) -> Tensor:
        return (torch.arange(size) // 32)[torch.randperm(size)]

    def _code(self, weight: Tensor) -> None:
        for group in range(len(self.scales)):
            rows = self.groups == group
            low, high = weight[rows].amin(0), weight[rows].amax(0)
            self.scales[group] = (high - low) / 14
            self.zeros[group] = (-low / self.scales[group]).round().clamp(1, 15)
            self.codes[rows] = (weight[rows] / self.scales[group] + self.zeros[group]).round().clamp(0, 15).long()

    def _pack(self) -> None:
        self.register_buffer("g_idx", self.groups.int())
        self.register_buffer("qweight", words(self.codes.T).T.contiguous())
        self.register_buffer("qzeros", words(self.zeros - 1))

    def forward(self, x: Tensor) -> Tensor:
        codes = unpacked_one_by_one(self.qweight.T).T
        rows = [self.scales[group] * (code - self.zeros[group]) for group, code in zip(self.groups, codes, strict=True)]
        out = x @ torch.stack(rows)
        return out if self.bias is None else out + self.bias


class PackedInTurn(Packed):
    """The same as AWQ's libraries keep it: all packed along the output, groups in order, columns of a word shuffled."""

    w_bit = 4
    #: Which of eight columns is in which place of a word, from the lowest bits.
    places = (0, 2, 4, 6, 1, 3, 5, 7)

    @staticmethod
    def _groups(size: int) -> Tensor:
        return torch.arange(size) // 32

    def _pack(self) -> None:
        shuffled = [whole.unflatten(1, (-1, 8))[..., self.places].flatten(1) for whole in (self.codes, self.zeros)]
        self.register_buffer("qweight", words(shuffled[0]))
        self.register_buffer("qzeros", words(shuffled[1]))

    def forward(self, x: Tensor) -> Tensor:
        shuffled, codes = unpacked_one_by_one(self.qweight), torch.zeros_like(self.codes)
        for column in range(self.out_features):
            word, place = divmod(column, 8)
            codes[:, word * 8 + self.places[place]] = shuffled[:, column]
        rows = [self.scales[group] * (code - self.zeros[group]) for group, code in zip(self.groups, codes, strict=True)]
        out = x @ torch.stack(rows)
        return out if self.bias is None else out + self.bias


def words(codes: Tensor) -> Tensor:
    """Eight codes of a row to a word, the first in the lowest bits."""
    total = sum(codes[:, place::8] << (4 * place) for place in range(8))
    return torch.where(total >= 2**31, total - 2**32, total).int()


def unpacked_one_by_one(packed: Tensor) -> Tensor:
    rows = [[(int(word) % 2**32) // 16**place % 16 for word in row for place in range(8)] for row in packed]
    return torch.tensor(rows)


def ternary(online: bool) -> Callable[[Tensor, Tensor | None], nn.Module]:
    def layer(weight: Tensor, bias: Tensor | None) -> nn.Module:
        from transformers.integrations.bitnet import AutoBitLinear

        out = AutoBitLinear(weight.shape[1], weight.shape[0], bias is not None, online_quant=online)
        with torch.no_grad():
            out.weight.copy_(weight if online else weight.sign())
            if bias is not None:
                out.bias.copy_(bias)
            if not online:
                out.weight_scale.fill_(0.21)
        return out

    return layer


NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
#: Those that multiply what they are given, as it is, with their matrix; and those that round it first.
EXACT: dict[str, Callable[[str, Path], Any]] = {
    "torchao int8": in_place(torchao("Int8WeightOnlyConfig")),
    "torchao intx": in_place(torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4)),
    "GPTQ": replaced(Packed),
    "AWQ": replaced(PackedInTurn),
}
ROUNDING: dict[str, Callable[[str, Path], Any]] = {
    "bitsandbytes fp4": by_loading(BitsAndBytesConfig(load_in_4bit=True)),
    "bitsandbytes nf4": by_loading(BitsAndBytesConfig(load_in_4bit=True, **NF4)),
    "bitsandbytes int8": by_loading(BitsAndBytesConfig(load_in_8bit=True)),
    "torch.ao dynamic": in_place(dynamic),
    "BitNet online": replaced(ternary(online=True)),
    "BitNet": replaced(ternary(online=False)),
}
WAYS = EXACT | ROUNDING
#: How exactly layers give what they have computed, relative to the largest: in half precision.
RESULTS = {"bitsandbytes int8": 1e-4, "bitsandbytes nf4": 8e-3}
CASES = [(way, family) for way in WAYS for family in SIZES]


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled() -> Iterator[None]:
    """transformers compiles the rounding of BitNet, which takes a C++ compiler and a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """The quantised HF model of a way and a family."""
    kept: dict[tuple[str, str], Any] = {}

    def make(way: str, family: str) -> Any:
        if (way, family) not in kept:
            kept[way, family] = WAYS[way](family, tmp_path_factory.mktemp("model"))
            with torch.no_grad():
                # Some layers settle in their first run.
                kept[way, family](tokens())
        return kept[way, family]

    return make


def tokens() -> Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def lens_of(hf: Any, **options: bool) -> HookedTransformer:
    return HookedTransformer.from_pretrained("quantised", hf_model=hf, **options)


def measured(layer: Any) -> tuple[Tensor, Tensor]:
    """What a layer multiplies with, ``[in, out]``, by what it makes of the unit vectors; and what it adds to that."""
    with torch.no_grad():
        size = layer.in_features
        added = layer(torch.zeros(1, size))[0]
        if isinstance(layer.bias, Tensor):
            layer = copy.deepcopy(layer)
            layer.bias = None
            return layer(torch.eye(size)), added
        return layer(torch.eye(size)) - added, added


def twin_of(hf: Any, family: str) -> Any:
    """A model of plain layers that multiply with the matrices that were measured."""
    twin = rough(family)
    quantised = dict(hf.named_modules())
    with torch.no_grad():
        for path, module in twin.named_modules():
            if computed(quantised[path]) is not None:
                matrix, added = measured(quantised[path])
                module.weight.copy_(matrix if type(module).__name__ == "Conv1D" else matrix.T)
                if module.bias is not None:
                    module.bias.copy_(added)
    return twin


# --- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "family"), CASES)
def test_logits_are_huggingfaces_bit_by_bit(made: Any, way: str, family: str) -> None:
    hf = made(way, family)
    lens = lens_of(hf, **RAW)
    with torch.no_grad():
        expected = hf(tokens()).logits
        assert torch.equal(lens(tokens()), expected)
        logits, cache = lens.run_with_cache(tokens())
        assert torch.equal(logits, expected)
        looked = lens.run_with_hooks(tokens(), fwd_hooks=[(name, lambda value, hook: None) for name in cache])
        assert torch.equal(looked, expected)


@pytest.mark.parametrize(("way", "family"), CASES)
def test_activations_are_what_the_modules_were_given(made: Any, way: str, family: str) -> None:
    hf = made(way, family)
    lens, seen, handles = lens_of(hf, **RAW), {}, []
    layer, attention, mlp = PATHS[family]
    for index in range(2):
        where = {"hook_resid_pre": "", "attn.hook_z": f".{attention}", "mlp.hook_post": f".{mlp}"}
        for name, path in where.items():
            module = hf.get_submodule(layer.format(index) + path)

            def keep(module: Any, args: Any, key: str = f"blocks.{index}.{name}") -> None:
                seen[key] = args[0]

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        hf(tokens())
        for handle in handles:
            handle.remove()
        _, cache = lens.run_with_cache(tokens())
    for name, value in seen.items():
        assert torch.equal(cache[name].flatten(2), value), name


@pytest.mark.parametrize(("way", "family"), CASES)
def test_processing_leaves_the_function(made: Any, way: str, family: str) -> None:
    hf = made(way, family)
    with torch.no_grad():
        expected = hf(tokens()).logits.log_softmax(-1)
        shown, cache = lens_of(hf).run_with_cache(tokens())
    assert torch.allclose(shown.log_softmax(-1), expected, atol=1e-4)
    assert torch.isfinite(cache["blocks.1.attn.hook_v"]).all()


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "family"), CASES)
@pytest.mark.parametrize("processed", [False, True])
def test_weights_are_what_the_layers_multiply_with(made: Any, way: str, family: str, processed: bool) -> None:
    """Each is that of a model of plain layers with the measured matrices."""
    hf = made(way, family)
    options = {} if processed else RAW
    shown, expected = lens_of(hf, **options).state_dict(), lens_of(twin_of(hf, family), **options).state_dict()
    assert list(shown) == list(expected)
    for name in [name for name in expected if not name.endswith((".mask", ".IGNORE"))]:
        weight = expected[name]
        off = float((shown[name] - weight).abs().max())
        assert off <= RESULTS.get(way, 2e-6) * max(1.0, float(weight.abs().max())), (name, off)
    assert float(shown["blocks.0.attn.W_Q"].abs().max()) > 0.05


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("family", SIZES)
def test_points_that_are_made_of_weights(made: Any, way: str, family: str) -> None:
    """Results of heads, inputs of single projections, and what is made of the cache with weights."""
    hf = made(way, family)
    ours, theirs = lens_of(hf), lens_of(twin_of(hf, family))
    found = []
    for lens in (ours, theirs):
        lens.set_use_attn_result(True)
        lens.set_use_split_qkv_input(True)
        with torch.no_grad():
            _, cache = lens.run_with_cache(tokens())
            edited = lens.run_with_hooks(
                tokens(),
                fwd_hooks=[
                    ("blocks.0.attn.hook_result", lambda value, hook: value * torch.tensor([0.0, 1, 2, 1])[:, None]),
                    ("blocks.1.hook_q_input", lambda value, hook: value + 0.3),
                    ("blocks.0.attn.hook_pattern", lambda value, hook: value * 0.5),
                ],
            )
            alone = lens.blocks[1].mlp(cache["blocks.0.hook_resid_mid"])
        found.append((cache["blocks.1.attn.hook_result"], edited, cache.stack_head_results(), alone, lens.OV.S))
    for mine, other in zip(*found, strict=True):
        assert torch.allclose(mine, other, atol=2e-4 * float(other.abs().max()))
    _, cache = ours.run_with_cache(tokens())
    total = cache["blocks.1.attn.hook_result"].sum(-2) + ours.b_O[1]
    assert torch.allclose(total, cache["blocks.1.hook_attn_out"], atol=2e-5 * float(total.abs().max()))


@pytest.mark.parametrize("way", WAYS)
def test_computed_weights_cannot_be_edited(made: Any, way: str) -> None:
    lens = lens_of(made(way, "llama"), **RAW)
    weight = lens.blocks[1].mlp.W_in
    assert isinstance(weight, ReadOnlyTensor)
    with pytest.raises(ReadOnlyWeightError, match="keeps it quantised"):
        weight[0] = 0.0
    with pytest.raises(ReadOnlyWeightError, match="cannot be set"):
        lens.blocks[1].mlp.W_in = torch.zeros_like(weight).as_subclass(Tensor)
    # Norms, and the embedding, are the model's own.
    lens.blocks[1].ln1.w.data[0] = 2.0
    assert float(lens.hf_model.model.layers[1].input_layernorm.weight.flatten()[0]) == 2.0


@pytest.mark.parametrize("way", [way for way in WAYS if way != "torch.ao dynamic"])
def test_what_is_kept_is_made_anew_when_codes_change(made: Any, way: str) -> None:
    family = "llama" if way.startswith("torch") else "gpt2"
    hf = copy.deepcopy(made(way, family))
    lens = lens_of(hf)
    before = lens.blocks[0].attn.W_V.clone()
    layer = hf.transformer.h[0].attn.c_attn if family == "gpt2" else hf.model.layers[0].self_attn.v_proj
    found = computed(layer)
    with torch.no_grad():
        codes = found.sources[0]
        codes.copy_(codes.roll(1, 0))
    assert not torch.allclose(lens.blocks[0].attn.W_V, before)
    with torch.no_grad():
        expected = hf(tokens()).logits.log_softmax(-1)
        assert torch.allclose(lens(tokens()).log_softmax(-1), expected, atol=1e-4)
        assert torch.allclose(lens.run_with_cache(tokens())[0].log_softmax(-1), expected, atol=1e-4)


def test_names_and_shapes_need_no_matrix(made: Any) -> None:
    """A large model's are asked for often, and its matrices together may not fit."""
    layer = made("GPTQ", "llama").model.layers[0].mlp.up_proj
    with outlined():
        outline = computed(layer).weight
    assert outline.shape == (128, WIDTH) and outline.untyped_storage().nbytes() <= 8


# --- what is said and what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_only_four_bits_of_bitsandbytes_are_load_in_4bit(made: Any, way: str) -> None:
    assert lens_of(made(way, "llama")).cfg.load_in_4bit == (way in ("bitsandbytes fp4", "bitsandbytes nf4"))


class Vectors(nn.Module):
    """A layer whose codes nobody here can read."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.linear = [weight]
        self.register_buffer("indices", torch.zeros(4, 4, dtype=torch.int32))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear[0], self.bias)


def test_unknown_codes_are_refused_and_activations_are_not() -> None:
    hf = replaced(Vectors)("llama", Path())
    lens = lens_of(hf)
    with torch.no_grad():
        logits, _ = lens.run_with_cache(tokens())
        assert torch.allclose(logits.log_softmax(-1), hf(tokens()).logits.log_softmax(-1), atol=1e-4)
        assert torch.equal(lens_of(hf, **RAW)(tokens()), hf(tokens()).logits)
    with pytest.raises(UnsupportedModelError, match=r"Vectors.*laid out in a way that is not known.*dequantised"):
        _ = lens.W_Q
    assert "blocks.0.attn.W_Q" in lens.interior.weights.names()


def test_a_repacked_layer_is_refused() -> None:
    """Kernels for GPUs lay codes out in their own way, under the same names."""
    hf = replaced(Packed)("llama", Path())
    for _, _, module in [(None, None, each) for each in hf.modules() if isinstance(each, Packed)]:
        module.qweight = module.qweight.flatten().view(-1, 16)
    with pytest.raises(UnsupportedModelError, match="GPTQ"):
        _ = lens_of(hf).W_in


def test_casting_a_quantised_model_is_refused(made: Any) -> None:
    lens = lens_of(made("bitsandbytes nf4", "llama"))
    with pytest.raises(ValueError, match="dtype"):
        lens.to(torch.float16)
    with pytest.raises(ValueError, match="dtype"):
        lens.half()
    assert lens.to("cpu", print_details=False) is lens and lens.cfg.device == "cpu"
    assert lens.cfg.dtype == torch.float32


def test_loading_by_name_with_a_quantization_config(tmp_path: Path) -> None:
    rough("llama").save_pretrained(tmp_path)
    from torchao.quantization import Int8WeightOnlyConfig

    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    lens = HookedTransformer.from_pretrained_no_processing(str(tmp_path), **options)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager", **options)
    with torch.no_grad():
        assert torch.equal(lens(tokens()), hf(tokens()).logits)
    assert torch.equal(lens.blocks[0].attn.W_O.flatten(0, 1), measured(hf.model.layers[0].self_attn.o_proj)[0])
    assert isinstance(lens.blocks[0].attn.W_O, ReadOnlyTensor)
