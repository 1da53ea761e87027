"""Do conversions undo what they do, and say what they are?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lensbridge.conversion_utils import TensorConversionSet
from lensbridge.conversion_utils.conversion_steps import (
    ArithmeticTensorConversion,
    CallableTensorConversion,
    ChainTensorConversion,
    RearrangeTensorConversion,
    RepeatTensorConversion,
    SplitTensorConversion,
    TernaryTensorConversion,
    TransposeTensorConversion,
    ZerosLikeConversion,
)
from lensbridge.conversion_utils.conversion_steps.arithmetic_tensor_conversion import OperationTypes
from lensbridge.conversion_utils.helpers import find_property
from lensbridge.conversion_utils.hook_conversion_utils import model_info, model_info_cfg
from lensbridge.errors import UnsupportedModelError
from lensbridge.hook_points import HookPoint

X = torch.arange(12.0).reshape(3, 4)
INVERTIBLE = [
    *(ArithmeticTensorConversion(operation, 4.0) for operation in OperationTypes),
    RearrangeTensorConversion("a (b c) -> c a b", c=2),
    TransposeTensorConversion(),
    ChainTensorConversion(
        [
            TransposeTensorConversion(),
            ArithmeticTensorConversion(OperationTypes.ADDITION, 2.0),
            ArithmeticTensorConversion(OperationTypes.MULTIPLICATION, 4.0),
        ]
    ),
]


@pytest.mark.parametrize("conversion", INVERTIBLE, ids=repr)
def test_reverting_undoes_converting(conversion: ChainTensorConversion) -> None:
    assert not (conversion.convert(X).shape == X.shape and torch.equal(conversion.convert(X), X))
    assert torch.equal(conversion.revert(conversion.convert(X)), X)


def test_what_has_no_inverse_stays() -> None:
    for conversion in (
        RepeatTensorConversion("a b -> (n a) b", n=2), SplitTensorConversion(0, 2), ZerosLikeConversion(),
        CallableTensorConversion(torch.exp), TernaryTensorConversion("x"),
    ):  # fmt: skip
        assert conversion.revert(X) is X


def test_a_conversion_shows_what_it_does() -> None:
    shown = [
        repr(RepeatTensorConversion("a -> a n", n=2)), repr(SplitTensorConversion(1, 3, dim=1)),
        repr(ZerosLikeConversion()), repr(CallableTensorConversion(torch.exp)), repr(TernaryTensorConversion("x.y")),
        *map(repr, INVERTIBLE),
    ]  # fmt: skip
    for said in (
        "a -> a n",
        "1, 3, dim=1",
        "Zeros",
        "exp",
        "x.y",
        "a (b c) -> c a b",
        "ADDITION",
        "Chain",
        "Transpose",
    ):
        assert any(said in text for text in shown), said
    nested = TensorConversionSet({"blocks": ("h", TensorConversionSet({"W": "w"})), "zero": torch.zeros(2)})
    assert '\t"blocks" -> "h", TensorConversionSet {' in repr(nested) and '"W" -> "w"' in repr(nested)
    assert "zeros of shape torch.Size([2])" in repr(nested)


def test_hooks_see_heads_apart_and_the_model_gets_them_back_together() -> None:
    point = HookPoint()
    point.enable_reshape(RearrangeTensorConversion("pos (head d) -> pos head d", head=2))

    def silence(x: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        x = x.clone()
        x[:, 1] = 0
        return x

    point.add_hook(silence)
    assert torch.equal(point(X), torch.cat([X[:, :2], torch.zeros(3, 2)], 1))


def test_paths_lead_through_dicts_and_attributes() -> None:
    assert find_property("a.b.c", {"a": SimpleNamespace(b={"c": 5})}) == 5
    with pytest.raises(KeyError):
        find_property("a.x", {"a": {}})
    with pytest.raises(AttributeError):
        find_property("x", SimpleNamespace())


def test_where_the_parts_of_a_model_lie(capsys: pytest.CaptureFixture[str]) -> None:
    model_info("toy")
    shown = capsys.readouterr().out
    assert "GPT2LMHeadModel" in shown and "transformer.wte" in shown
    assert "transformer.h.{i}.attn.c_attn" in shown and "None" not in shown
    with pytest.raises(UnsupportedModelError, match="NoSuchModel"):
        model_info_cfg(SimpleNamespace(original_architecture="NoSuchModel"))
