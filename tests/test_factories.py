"""Do the factories find what a config asks for?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lensbridge import HookedTransformerConfig, TransformerBridgeConfig
from lensbridge.architectures import BY_CLASS, architecture_of
from lensbridge.errors import UnsupportedModelError
from lensbridge.factories import architecture_adapter_factory
from lensbridge.factories.activation_function_factory import ActivationFunctionFactory
from lensbridge.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from lensbridge.factories.mlp_factory import MLPFactory
from lensbridge.utilities.activation_functions import SUPPORTED_ACTIVATIONS

SIZES: dict[str, Any] = {"d_model": 12, "d_head": 4, "n_layers": 2, "n_ctx": 8}


@pytest.fixture(autouse=True)
def table_stays() -> Iterator[None]:
    before = dict(BY_CLASS)
    yield
    BY_CLASS.clear()
    BY_CLASS.update(before)


def test_activation_functions_by_name() -> None:
    for name, function in SUPPORTED_ACTIVATIONS.items():
        if name != "xielu":
            cfg = SimpleNamespace(act_fn=name)
            assert ActivationFunctionFactory.pick_activation_function(cfg) is function  # type: ignore[arg-type]
    with_parameters = ActivationFunctionFactory.pick_activation_function(SimpleNamespace(act_fn="xielu"))  # type: ignore[arg-type]
    assert isinstance(with_parameters, torch.nn.Module) and list(with_parameters.parameters())
    for unknown in ("gelo", None):
        with pytest.raises(ValueError, match="act_fn"):
            ActivationFunctionFactory.pick_activation_function(SimpleNamespace(act_fn=unknown))  # type: ignore[arg-type]


@pytest.mark.parametrize(("fields", "name"), [
    ({}, "MLP"), ({"gated_mlp": True}, "GatedMLP"), ({"num_experts": 2, "experts_per_token": 1}, "MoE"),
    ({"num_experts": 2, "experts_per_token": 1, "original_architecture": "GptOssForCausalLM"}, "GptOssMoE"),
])  # fmt: skip
def test_mlps_by_config(fields: dict[str, Any], name: str) -> None:
    assert type(MLPFactory.create_mlp(HookedTransformerConfig(**SIZES, **fields))).__name__ == name


def test_records_by_class() -> None:
    cfg = TransformerBridgeConfig(**SIZES, architecture="GPT2LMHeadModel")
    assert ArchitectureAdapterFactory.select_architecture_adapter(cfg) is BY_CLASS["GPT2LMHeadModel"]
    old = HookedTransformerConfig(**SIZES, original_architecture="LlamaForCausalLM")
    assert ArchitectureAdapterFactory.select_architecture_adapter(old) is BY_CLASS["LlamaForCausalLM"]
    with pytest.raises(UnsupportedModelError, match="Closest: GPT2LMHeadModel"):
        ArchitectureAdapterFactory.select_architecture_adapter(SimpleNamespace(architecture="GPT2LMHead"))
    with pytest.raises(UnsupportedModelError, match="names no"):
        ArchitectureAdapterFactory.select_architecture_adapter(TransformerBridgeConfig(**SIZES))


class NewName(torch.nn.Module):
    """Built like GPT-2, and of no class that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.config = GPT2Config(n_layer=1, n_head=1, n_embd=2, vocab_size=3, n_positions=4)
        self.transformer = GPT2LMHeadModel(self.config).transformer


def test_a_registered_record_counts_for_loading() -> None:
    with pytest.raises(UnsupportedModelError):
        architecture_of(NewName())
    record = replace(BY_CLASS["GPT2LMHeadModel"], hf_class="NewName")
    ArchitectureAdapterFactory.register_adapter("NewName", record)
    assert architecture_of(NewName()).hf_class == "NewName"
    with pytest.raises(TypeError, match="Architecture"):
        ArchitectureAdapterFactory.register_adapter("Other", GPT2LMHeadModel)  # type: ignore[arg-type]


def test_records_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    group = architecture_adapter_factory.ENTRY_POINTS
    value = "lensbridge.architectures.gpt2:GPT2"
    found = [EntryPoint(name, where, group) for name, where in (
        ("Declared", value), ("LlamaForCausalLM", value), ("Broken", "no_such_package:X"),
    )]  # fmt: skip
    monkeypatch.setattr(architecture_adapter_factory, "entry_points", lambda group: found)
    with pytest.warns(UserWarning, match="Broken"):
        record = ArchitectureAdapterFactory.select_architecture_adapter(SimpleNamespace(architecture="Declared"))
    assert record.hf_class == "GPT2LMHeadModel"
    assert BY_CLASS["LlamaForCausalLM"].hf_class == "LlamaForCausalLM" and "Broken" not in BY_CLASS
