"""Do the helpers for weights, activation functions and devices do what those of TransformerLens 3.9.0 do?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformer_lens import utilities as theirs
from transformer_lens.utilities import activation_functions as their_activations
from transformer_lens.utilities import multi_gpu as their_multi_gpu

from compat_tests.agreement import agree, outcome, same
from lensbridge import utilities as ours
from lensbridge.utilities import activation_functions, multi_gpu


@pytest.mark.parametrize("name", list(their_activations.SUPPORTED_ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activation_functions(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.cat([3 * torch.randn(2, 3, 50), torch.zeros(2, 3, 1)], dim=-1).to(dtype)
    results = []
    for module in (activation_functions, their_activations):
        leaf = values.clone().requires_grad_()
        out = module.SUPPORTED_ACTIVATIONS[name](leaf)
        out.sum().backward()
        results.append((out, leaf.grad))
    (mine, my_gradient), (other, their_gradient) = results
    # Their xIELU rounds a constant to float32.
    same(mine, other, tolerance=1e-14 if (name, dtype) == ("xielu", torch.float64) else 0.0)
    # Gradients of one value add up in the order in which the operations were written.
    same(my_gradient, their_gradient, tolerance=10 * torch.finfo(dtype).eps)
    assert list(ours.SUPPORTED_ACTIVATIONS) == list(theirs.SUPPORTED_ACTIVATIONS)


@pytest.mark.parametrize("arguments", [{}, {"alpha_p_init": 1.1, "alpha_n_init": 0.9, "beta_init": 0.3, "eps": -1e-3}])
def test_trainable_xielu(arguments: dict[str, float]) -> None:
    mine, other = activation_functions.XIELU(**arguments), their_activations.XIELU(**arguments)
    mine.load_state_dict(other.state_dict())
    fresh = activation_functions.XIELU(**arguments).state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in other.state_dict().items())
    values = torch.randn(3, 40)
    same(mine(values), other(values), tolerance=1e-6)
    for module in (mine, other):
        module(values).square().sum().backward()
    same(mine.alpha_n.grad, other.alpha_n.grad, tolerance=1e-5)
    same(mine.alpha_p.grad, other.alpha_p.grad, tolerance=1e-5)


def test_softcap() -> None:
    assert ours.SOFTCAP_DISABLED == theirs.SOFTCAP_DISABLED
    for cap in (None, -1.0, 0, 0.0, 2, 30.0):
        agree("softcap_enabled", cap)
        agree("apply_softcap", torch.randn(5), cap)


@pytest.mark.parametrize("shape", [(), (9,), (4, 9), (3, 4, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("init_xavier_uniform_", {}),
        ("init_xavier_normal_", {"gain": 2.0}),
        ("init_kaiming_uniform_", {}),
        ("init_kaiming_uniform_", {"a": 0.3, "nonlinearity": "leaky_relu", "mode": "fan_out"}),
        ("init_kaiming_normal_", {"nonlinearity": "tanh", "gain": 0.5}),
        ("init_kaiming_normal_", {"nonlinearity": "none such"}),
    ],
)
def test_initialisation(name: str, arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    def draw(module: Any) -> Any:
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.zeros(shape))
        assert getattr(module, name)(parameter, **arguments) is parameter
        return parameter.detach()

    same(outcome(draw, ours), outcome(draw, theirs), tolerance=1e-7)
    agree("calc_fan_in_and_fan_out", torch.zeros(shape))


def test_swapped_parameter() -> None:
    for module in (ours, theirs):
        parameter = nn.Parameter(torch.ones(3))
        with module.temporarily_swap_parameter(parameter, torch.zeros(3)) as yielded:
            assert yielded is parameter
            assert not parameter.any()
        with pytest.raises(KeyError), module.temporarily_swap_parameter(parameter, torch.zeros(3)):
            raise KeyError
        assert parameter.all()
        for target, value, error in (
            (torch.ones(3), torch.ones(3), TypeError),
            (parameter, parameter, TypeError),
            (parameter, 1.0, TypeError),
            (parameter, torch.ones(2), ValueError),
            (parameter, torch.ones(3).double(), ValueError),
        ):
            with pytest.raises(error), module.temporarily_swap_parameter(target, value):
                pass


@pytest.mark.parametrize("n_layers", [1, 3, 12, 62])
@pytest.mark.parametrize("n_devices", [1, 2, 5, 8])
@pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:2", torch.device("cuda", 1)], ids=str)
def test_device_of_a_block(n_layers: int, n_devices: int, device: Any) -> None:
    for own in ("cpu", "cuda", "cuda:1", None):
        cfg = SimpleNamespace(n_layers=n_layers, n_devices=n_devices, device=own)
        for index in range(n_layers):
            agree("get_device_for_block_index", index, cfg, device)


@pytest.mark.parametrize(
    "arguments",
    [(None, None, None), (1, None, "cpu"), (4, None, None), (None, "auto", None), (None, "auto", "cpu")]
    + [(None, {"": 0}, None, {0: "1GiB"}), (None, {"a": 0, "b": "cpu"}, None), (None, {"a": "disk"}, None)]
    + [(None, {"a": "CPU", "b": "cuda:1"}, None), (None, {"a": "cpu", "b": "cpu"}, None), (1, None, None, {0: 5})],
    ids=str,
)
def test_device_map(arguments: Any) -> None:
    agree("resolve_device_map", *arguments)


def test_device_map_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (100 + i, 1000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: [50, 10, 30][i])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=200))
    for arguments in ((2, None, None), (3, None, None, {0: "1GiB"}), (4, None, None)):
        agree("resolve_device_map", *arguments)
    agree("determine_available_memory_for_available_devices", 3)
    agree("sort_devices_based_on_available_memory", [(0, 5), (1, 9), (2, 9), (3, 1)])
    for n_devices in (None, 0, 1, 3):
        agree("get_best_available_cuda_device", n_devices)
    for device in ("cpu", "cuda", "cuda:2", None):
        for n_devices in (1, 3):
            agree("get_best_available_device", SimpleNamespace(device=device, n_devices=n_devices))


class Spread(nn.Module):
    """As much of a HuggingFace model with a device map as the helpers look at."""

    def __init__(self, placement: dict[str, Any] | None, embedding: str | None = "wte") -> None:
        super().__init__()
        self.wte, self.head, self.ghost = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2, device="meta")
        self.embedding = embedding
        if placement is not None:
            self.hf_device_map = placement

    def get_input_embeddings(self) -> nn.Module:
        if self.embedding is None:
            raise NotImplementedError
        return getattr(self, self.embedding)


@pytest.mark.parametrize(
    "placement",
    [
        None,
        {},
        {"": "cpu"},
        {"wte": "cpu", "head": "cpu"},
        {"wte": 1, "head": "cpu", "gone": 0},
        {"ghost": 0, "wte": 0},
    ],
    ids=str,
)
def test_spread_models(placement: Any) -> None:
    for embedding in ("wte", None):
        model = Spread(placement, embedding)
        agree("find_embedding_device", model)
        agree("count_unique_devices", model)
        assert multi_gpu.find_misplaced_modules(model) == their_multi_gpu.find_misplaced_modules(model)


def test_casting() -> None:
    quantized = [None, SimpleNamespace(quant_method="fp8"), {"quant_method": "awq"}, {}, SimpleNamespace()]
    for settings_of_model in quantized:
        dtypes = []
        for module in (multi_gpu, their_multi_gpu):
            model: Any = Spread(None)
            model.narrow = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
            model.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
            model.config = SimpleNamespace(quantization_config=settings_of_model)
            module.maybe_cast_floating_params(model, torch.float16)
            dtypes.append({name: parameter.dtype for name, parameter in model.named_parameters()})
            module.cast_floating_params_to_dtype(model, torch.bfloat16)
            assert model.wte.weight.dtype is torch.bfloat16
        assert dtypes[0] == dtypes[1]


def test_casting_what_accelerate_offloaded() -> None:
    for module in (multi_gpu, their_multi_gpu):
        model: Any = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        before = model[1].weight.detach().clone()
        accelerate.cpu_offload(model, execution_device="cpu")
        module.cast_floating_params_to_dtype(model, torch.bfloat16)
        assert model[1].weight.is_meta
        with accelerate.utils.align_module_device(model[1]):
            assert torch.equal(model[1].weight, before.bfloat16())


@pytest.mark.parametrize("target", ["cpu", torch.device("cpu"), torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_dtype", [True, False])
def test_moving(target: Any, has_dtype: bool, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for module in (ours, theirs):
        model: Any = nn.Linear(2, 2)
        model.cfg = SimpleNamespace(device="elsewhere", **({"dtype": torch.float32} if has_dtype else {}))
        assert module.move_to_and_update_config(model, target) is model
        module.move_to_and_update_config(model, target, print_details=False)
        results.append((vars(model.cfg), model.weight.dtype, capsys.readouterr().out))
    assert results[0] == results[1]


@pytest.mark.parametrize("allowed", ["1", "0", None])
def test_device_with_mps(allowed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERLENS_ALLOW_MPS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("TRANSFORMERLENS_ALLOW_MPS", allowed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    agree("get_device")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    agree("get_device")
    assert ours.get_device() == ("mps" if allowed == "1" else "cpu")
