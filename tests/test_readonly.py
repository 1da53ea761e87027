"""Does every in-place edit of a derived weight raise, and is everything computed from it an ordinary tensor?"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lensbridge.errors import ReadOnlyWeightError
from lensbridge.readonly import ReadOnlyTensor, read_only

WHY = "'blocks.0.attn.W_Q' is computed"


def values() -> Tensor:
    return torch.arange(24.0).reshape(4, 6) - 11.5


@pytest.fixture
def weight() -> ReadOnlyTensor:
    return read_only(values(), WHY)


def assign(target: Any, name: str, value: Any) -> None:
    setattr(target, name, value)


#: Known by what they are called, so that nothing is changed before the error.
REFUSED: dict[str, Callable[[Any], Any]] = {
    "w[0] = 0": lambda w: w.__setitem__(0, 0.0),
    "w[mask] = 0": lambda w: w.__setitem__(w > 3, 0.0),
    "w += 1": lambda w: w.__iadd__(1),
    "w -= 1": lambda w: w.__isub__(1),
    "w *= 2": lambda w: w.__imul__(2),
    "w /= 2": lambda w: w.__itruediv__(2),
    "w //= 2": lambda w: w.__ifloordiv__(2),
    "w %= 2": lambda w: w.__imod__(2),
    "w **= 2": lambda w: w.__ipow__(2),
    "w.add_": lambda w: w.add_(1),
    "w.zero_": lambda w: w.zero_(),
    "w.fill_": lambda w: w.fill_(1),
    "w.copy_": lambda w: w.copy_(torch.zeros(4, 6)),
    "w.normal_": lambda w: w.normal_(),
    "w.clamp_": lambda w: w.clamp_(0, 1),
    "w.masked_fill_": lambda w: w.masked_fill_(w > 0, 0.0),
    "w.index_put_": lambda w: w.index_put_((torch.tensor([0]),), torch.tensor(0.0)),
    "w.scatter_": lambda w: w.scatter_(0, torch.zeros(1, 6, dtype=torch.long), 0.0),
    "w.resize_": lambda w: w.resize_(2, 2),
    "w.t_": lambda w: w.t_(),
    "w.unsqueeze_": lambda w: w.unsqueeze_(0),
    "w.data = x": lambda w: assign(w, "data", torch.zeros(4, 6)),
    "w[0].data = x": lambda w: assign(w[0], "data", torch.zeros(6)),
    "torch.zero_(w)": lambda w: torch.zero_(w),
    "torch.relu_(w)": lambda w: torch.relu_(w),
    "Tensor.copy_(w)": lambda w: Tensor.copy_(w, torch.zeros(4, 6)),
    "nn.init.zeros_(w)": lambda w: nn.init.zeros_(w),
    "out=w": lambda w: torch.add(torch.ones(4, 6), 1, out=w),
    "out=w[0]": lambda w: torch.add(torch.ones(6), 1, out=w[0]),
    "out=(w, ...)": lambda w: torch.max(torch.ones(4, 6), 1, out=(w[:, 0], torch.zeros(4, dtype=torch.long))),
}

VIEWS: dict[str, Callable[[Any], Any]] = {
    "slice": lambda w: w[1:3],
    "row": lambda w: w[0],
    "slice of a slice": lambda w: w[1:][0][2:],
    "element": lambda w: w[0, 0],
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "view": lambda w: w.view(-1),
    "reshape": lambda w: w.reshape(2, 12),
    "flatten": lambda w: w.flatten(),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "expand": lambda w: w.expand(2, 4, 6)[0],
    "diagonal": lambda w: w.diagonal(),
    "unbind": lambda w: w.unbind()[1],
    "split": lambda w: w.split(2)[0],
    "chunk": lambda w: torch.chunk(w, 2)[1],
    "iteration": lambda w: next(iter(w)),
    "to the same place": lambda w: w.to("cpu"),
    "to the same dtype": lambda w: w.float(),
    "contiguous": lambda w: w.contiguous(),
    "as_strided": lambda w: w.as_strided((2,), (1,)),
    "einops": lambda w: einops.rearrange(w, "a (b c) -> c a b", b=2),
    "einsum": lambda w: torch.einsum("ab->ba", w),
    "as_tensor": lambda w: torch.as_tensor(w),
    "broadcast": lambda w: torch.broadcast_tensors(w, torch.zeros(1, 6))[0],
    "Parameter": lambda w: nn.Parameter(w).data,
}

#: Found out only by the version counter, after the fact.
NOTICED: dict[str, Callable[[Any], Any]] = {
    "relu(inplace)": lambda w: functional.relu(w, inplace=True),
    "silu(inplace)": lambda w: functional.silu(w, inplace=True),
    "dropout(inplace)": lambda w: functional.dropout(w, inplace=True),
    "hardtanh(inplace)": lambda w: functional.hardtanh(w, inplace=True),
    "nn.ReLU(inplace)": lambda w: nn.ReLU(inplace=True)(w),
    "nn.init.normal_": lambda w: nn.init.normal_(w),
    "nn.init.xavier_uniform_": lambda w: nn.init.xavier_uniform_(w),
    "_foreach_zero_": lambda w: torch._foreach_zero_([w]),
    "zero_ by keyword": lambda w: torch.zero_(input=w),
    "torch.ops": lambda w: torch.ops.aten.add_.Tensor(w, torch.ones(4, 6)),
}


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED.keys())
def test_an_edit_raises_and_changes_nothing(weight: ReadOnlyTensor, edit: Callable) -> None:
    memory = weight.as_subclass(Tensor)
    with pytest.raises(ReadOnlyWeightError, match="cannot edit this tensor in place: 'blocks.0.attn.W_Q' is computed"):
        edit(weight)
    assert torch.equal(memory, values()) and weight.shape == (4, 6)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_are_read_only_too(weight: ReadOnlyTensor, view: Callable) -> None:
    memory = weight.as_subclass(Tensor)
    shown = view(weight)
    assert isinstance(shown, ReadOnlyTensor)
    for edit in (lambda: shown.zero_(), lambda: shown.__setitem__(..., 0.0), lambda: shown.__iadd__(1)):
        with pytest.raises(ReadOnlyWeightError, match=WHY):
            edit()
    assert torch.equal(memory, values())


@pytest.mark.parametrize("edit", NOTICED.values(), ids=NOTICED.keys())
def test_an_edit_under_another_name_raises_as_well(weight: ReadOnlyTensor, edit: Callable) -> None:
    with pytest.raises(ReadOnlyWeightError, match=WHY):
        edit(weight)


@pytest.mark.parametrize(
    "array", [lambda w: w.numpy(), lambda w: w.detach().numpy(), np.asarray, lambda w: w[1:].numpy()]
)
def test_numpy_gets_a_read_only_array(weight: ReadOnlyTensor, array: Callable) -> None:
    shown = array(weight)
    assert np.array_equal(shown, values().numpy()[-len(shown) :])
    with pytest.raises(ValueError, match="read-only"):
        shown[0] = 0
    assert torch.equal(weight, values())


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "clone": lambda w: w.clone(),
    "sum": lambda w: w.sum(),
    "w + 1": lambda w: w + 1,
    "1 - w": lambda w: 1 - w,
    "~mask": lambda w: ~(w > 0),
    "matmul": lambda w: w @ w.T,
    "x @ w": lambda w: torch.ones(2, 4) @ w,
    "einsum": lambda w: torch.einsum("ab,cb->ac", w, w),
    "einops": lambda w: einops.reduce(w, "a b -> a", "sum"),
    "advanced indexing": lambda w: w[torch.tensor([0, 1])],
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w, torch.zeros(4, 6)]),
    "svd": lambda w: torch.linalg.svd(w)[0],
    "max": lambda w: w.max(dim=0).values,
    "double": lambda w: w.double(),
    "reshaped copy": lambda w: w.T.reshape(-1),
    "layer_norm": lambda w: functional.layer_norm(w, (6,)),
    "embedding": lambda w: functional.embedding(torch.tensor([0]), w),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED.keys())
def test_what_is_computed_is_an_ordinary_tensor(weight: ReadOnlyTensor, compute: Callable) -> None:
    result = compute(weight)
    assert type(result) is Tensor
    assert torch.equal(result, compute(values()))
    result.zero_()
    assert torch.equal(weight, values())


def test_a_plain_tensor_can_take_values_from_it(weight: ReadOnlyTensor) -> None:
    target = torch.zeros(4, 6)
    target.add_(weight)
    target[0] = weight[0]
    torch.mul(weight, 2, out=target)
    assert type(target) is Tensor and torch.equal(target, values() * 2)


def test_results_with_names_keep_them(weight: ReadOnlyTensor) -> None:
    found = weight.max(dim=1)
    assert torch.equal(found.values, values().max(1).values) and found.indices.tolist() == [5, 5, 5, 5]


def test_numbers_and_iteration_work_as_usual(weight: ReadOnlyTensor) -> None:
    assert float(weight[0, 1]) == -10.5 and int(weight[0, 1]) == -10 and weight[0, 1].item() == -10.5
    assert [float(row.sum()) for row in weight] == values().sum(1).tolist()
    assert weight.tolist() == values().tolist() and len(weight) == 4 and bool((weight[0, 0] < 0).item())
    assert [1, 2, 3][read_only(torch.tensor(1), WHY)] == 2
    assert "-11.5" in repr(weight)


def test_saving_and_loading_gives_ordinary_tensors(weight: ReadOnlyTensor) -> None:
    file = io.BytesIO()
    torch.save({"w": weight}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["w"]
    assert type(loaded) is Tensor and torch.equal(loaded, values())


def test_saving_a_slice_stores_the_slice_only(weight: ReadOnlyTensor) -> None:
    assert len(pickle.loads(pickle.dumps(weight[0])).untyped_storage()) == 6 * 4


def test_it_passes_for_a_tensor(weight: ReadOnlyTensor) -> None:
    assert isinstance(weight, Tensor) and isinstance(weight, Float[Tensor, "four six"])
    assert not isinstance(weight, Float[Tensor, "a a"])


def test_gradients_flow_through_it() -> None:
    leaf = values().requires_grad_()
    weight = read_only(leaf * 2, WHY)
    (weight[1] ** 2).sum().backward()
    assert torch.equal(leaf.grad[1], 8 * values()[1]) and leaf.grad[0].abs().sum() == 0
    assert torch.equal(torch.autograd.grad((read_only(leaf * 3, WHY) * 1).sum(), leaf)[0], torch.full((4, 6), 3.0))


def test_what_is_no_edit_is_allowed(weight: ReadOnlyTensor) -> None:
    weight.grad = torch.ones(4, 6)
    weight.requires_grad_()
    assert weight.requires_grad and weight.grad is not None
    with torch.no_grad(), pytest.raises(ReadOnlyWeightError):
        weight.sub_(weight.grad)


def test_it_works_in_inference_mode() -> None:
    with torch.inference_mode():
        weight = read_only(values(), WHY)
        assert type(weight + 1) is Tensor and torch.equal(weight[0], values()[0])
        for edit in (lambda: weight.zero_(), lambda: weight[1:].__setitem__(0, 0.0)):
            with pytest.raises(ReadOnlyWeightError):
                edit()


def test_an_optimizer_cannot_train_it(weight: ReadOnlyTensor) -> None:
    parameter = nn.Parameter(weight)
    (parameter**2).sum().backward()
    with pytest.raises(ReadOnlyWeightError):
        torch.optim.SGD([parameter], lr=0.1).step()
