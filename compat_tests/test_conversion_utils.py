"""Does each conversion turn a value into what TransformerLens 3.9.0 turns it into, and back?"""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compat_tests.rough_models import SUBJECT

X = torch.arange(24.0).reshape(4, 6) + 1
SIDES = (SUBJECT, "transformer_lens")


def double(x: Tensor) -> Tensor:
    return x * 2


def steps(package: str) -> Any:
    return importlib.import_module(f"{package}.conversion_utils.conversion_steps")


def operations(package: str) -> Any:
    path = f"{package}.conversion_utils.conversion_steps.arithmetic_tensor_conversion"
    return importlib.import_module(path).OperationTypes


def arithmetic(name: str, value: Any = 3, **filters: Any) -> Any:
    return lambda p: steps(p).ArithmeticTensorConversion(getattr(operations(p), name), value, **filters)


def chain(p: str) -> Any:
    parts = [steps(p).TransposeTensorConversion(), arithmetic("ADDITION")(p)]
    parts.append(arithmetic("DIVISION", input_filter=double)(p))
    return steps(p).ChainTensorConversion(parts)


CONVERSIONS: dict[str, Any] = {
    **{name: arithmetic(name) for name in ("ADDITION", "SUBTRACTION", "MULTIPLICATION", "DIVISION")},
    "a tensor": arithmetic("MULTIPLICATION", torch.arange(6.0) + 1),
    "filters": arithmetic("ADDITION", input_filter=double, output_filter=torch.neg),
    "function": lambda p: steps(p).CallableTensorConversion(lambda x, *context: x + len(context)),
    "chain": chain,
    "rearrange": lambda p: steps(p).RearrangeTensorConversion("(h d) m -> h d m", h=2),
    "rearrange, filtered": lambda p: steps(p).RearrangeTensorConversion("a b -> b a", input_filter=double),
    "repeat": lambda p: steps(p).RepeatTensorConversion("a b -> (n a) b", n=3),
    "split": lambda p: steps(p).SplitTensorConversion(1, 3, dim=1),
    "transpose": lambda p: steps(p).TransposeTensorConversion(),
    "zeros": lambda p: steps(p).ZerosLikeConversion(),
    "value or not: value": lambda p: steps(p).TernaryTensorConversion("a.b"),
    "value or not: tensor": lambda p: steps(p).TernaryTensorConversion("a.b", torch.ones(2)),
    "value or not: conversion": lambda p: steps(p).TernaryTensorConversion("a.b", chain(p)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_and_its_inverse(name: str) -> None:
    results = []
    for package in SIDES:
        conversion = CONVERSIONS[name](package)
        there = conversion.convert(X, {"a": {"b": X}}, 3)
        results.append((there, conversion.revert(there)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(2, 3, 4), "text", None])
def test_only_matrices_are_transposed(x: Any) -> None:
    for package in SIDES:
        conversion = steps(package).TransposeTensorConversion()
        assert conversion.convert(x) is x
        assert conversion.revert(x) is x


FALLBACKS: dict[str, Any] = {
    "tensor": lambda p: torch.ones(2),
    "path": lambda p: "a.b",
    "path and conversion": lambda p: ("a.b", arithmetic("ADDITION")(p)),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_takes_the_place_of_a_missing_value(name: str) -> None:
    context = ({"a": {"b": None}}, {"a": SimpleNamespace(b=X)})
    ours, theirs = (steps(p).TernaryTensorConversion(FALLBACKS[name](p)).convert(None, *context) for p in SIDES)
    assert torch.equal(ours, theirs)


def test_nothing_takes_the_place_of_a_missing_value_that_the_context_lacks() -> None:
    for package in SIDES:
        assert steps(package).TernaryTensorConversion("a").convert(None, {"a": None}) is None


def fields(package: str) -> Any:
    layer = steps(package).TensorConversionSet({"W": ("w", steps(package).TransposeTensorConversion()), "b": "b"})
    return steps(package).TensorConversionSet(
        {"embed": "wte.weight", "blocks": ("h", layer), "zero": torch.zeros(2), "one": torch.ones(2), "other": X}
    )


def model() -> Any:
    return SimpleNamespace(wte={"weight": X}, h=[{"w": X * i, "b": X[0] * i} for i in range(3)])


def test_a_set_of_conversions() -> None:
    ours, theirs = (fields(package).convert(model()) for package in SIDES)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ("embed", "zero", "one", "other"))
    for mine, yours in zip(ours["blocks"], theirs["blocks"], strict=True):
        assert torch.equal(mine["W"], yours["W"]) and torch.equal(mine["b"], yours["b"])


def test_parts_of_a_set() -> None:
    results = []
    for package in SIDES:
        conversions = steps(package).TensorConversionSet({"a": "wte.weight", "b": ("wte.weight", double)})
        kinds = [type(fields(package).get_conversion_action(name)).__name__ for name in ("embed", "blocks")]
        assert torch.equal(fields(package).get_conversion_action("embed").convert(X), X)
        found = [conversions.get_component(model(), name) for name in "ab"]
        with pytest.raises(ValueError, match="c"):
            conversions.get_component(model(), "c")
        results.append((kinds, found))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(mine, yours) for mine, yours in zip(results[0][1], results[1][1], strict=True))


def test_fields_are_shown_by_origin() -> None:
    for weights in ({"embed": "wte.weight"}, {"a": torch.zeros(2), "b": torch.ones(3), "c": X}):
        ours, theirs = (
            importlib.import_module(f"{p}.conversion_utils.hook_conversion_utils").get_weight_conversion_field_set(
                weights
            )
            for p in SIDES
        )
        assert ours == theirs


def test_a_quantized_models_fields_replace_the_others() -> None:
    merged, refused = [], []
    for package in SIDES:
        merge = importlib.import_module(f"{package}.conversion_utils.helpers").merge_quantization_fields
        new = steps(package).TensorConversionSet({"b": torch.zeros(2)})
        result = merge(fields(package), {"embed": torch.ones(1), "blocks": ("layers", new)})
        merged.append((result.fields["blocks"][0], sorted(result.fields["blocks"][1].fields), result.fields["embed"]))
        for bad in ({"unknown": X}, {"embed": ("wte", new)}, {"blocks": ("h", double)}):
            with pytest.raises(RuntimeError) as error:
                merge(fields(package), bad)
            refused.append(error.type)
    assert merged[0] == merged[1] and len(set(refused)) == 1


@pytest.mark.parametrize("source", [None, "blocks.{i}.attn.qkv", "missing"])
def test_a_conversion_of_a_named_weight(source: str | None) -> None:
    w = {"blocks.3.attn.qkv": X, "blocks.3.attn.q": X + 1}
    results = []
    for package in SIDES:
        param = importlib.import_module(f"{package}.conversion_utils.param_processing_conversion")
        step = steps(package).TernaryTensorConversion(torch.ones(1), CONVERSIONS["split"](package))
        conversion = param.ParamProcessingConversion(step, source)
        there = conversion.convert(w, "blocks.3.attn.q")
        results.append((there, conversion.revert(there)))
    assert all(torch.equal(mine, yours) for mine, yours in zip(*results, strict=True))


PATTERNS = [(2, 3, 5, 5), (2, 5, 3, 5), (2, 5, 5, 5), (2, 3, 3, 3), (2, 3, 5, 7), (2, 3, 5), (2, 5, 3, 7)]


@pytest.mark.parametrize("shape", PATTERNS)
@pytest.mark.parametrize("names", [("n_heads",), ("num_attention_heads",), ()])
def test_the_heads_of_a_pattern_are_found(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    pattern, results = torch.rand(shape), []
    for package in SIDES:
        conversion = steps(package).AttentionAutoConversion(SimpleNamespace(**dict.fromkeys(names, 3)))
        there = conversion.convert(pattern)
        info = conversion.get_conversion_info(id(pattern))
        back = conversion.revert_conversion(there, id(pattern))
        assert torch.equal(back, pattern)
        assert conversion.revert_conversion("text") == conversion.convert("text") == "text"
        conversion.clear_state(id(pattern))
        assert conversion.get_conversion_info(id(pattern)) is None
        assert conversion.revert_conversion(there, id(pattern)) is there
        conversion.convert(pattern)
        conversion.clear_state()
        results.append((there, info, repr(conversion)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


@pytest.mark.parametrize("name", ["rearrange", "MULTIPLICATION", "chain", "filters", "transpose"])
def test_a_hook_point_shows_hooks_the_converted_value(name: str) -> None:
    results = []
    for package in SIDES:
        point, seen = importlib.import_module(f"{package}.hook_points").HookPoint(), []

        def hook(x: Tensor, hook: Any, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.clone())
            return x + 1

        point.enable_reshape(CONVERSIONS[name](package))
        point.add_hook(hook)
        results.append([point(X.clone()), *seen])
    assert len(results[0]) == 2
    assert all(torch.equal(mine, yours) for mine, yours in zip(*results, strict=True))


def test_same_names_with_the_same_parameters() -> None:
    ours, theirs = (steps(package) for package in SIDES)
    assert sorted(ours.__all__) == sorted(theirs.__all__)
    for name in theirs.__all__:
        mine, yours = getattr(ours, name), getattr(theirs, name)
        for method, function in inspect.getmembers(yours, inspect.isfunction):
            if not method.startswith("__") or method == "__init__":
                wanted = [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]
                found = inspect.signature(getattr(mine, method)).parameters.values()
                assert [(p.name, p.default, p.kind) for p in found] == wanted, (name, method)


def test_the_base_leaves_the_conversion_to_others() -> None:
    for package in SIDES:
        with pytest.raises(NotImplementedError, match="Mine"):
            type("Mine", (steps(package).BaseTensorConversion,), {})().convert(X)
