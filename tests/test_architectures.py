"""Is a model recognised, are variants picked and unsupported ones refused, and is every role where its record says?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from lensbridge.architectures import BY_CLASS, architecture_of
from lensbridge.architectures.gpt2 import GPT2
from lensbridge.architectures.record import Architecture, Block, Softmax
from lensbridge.config_reads import reads_in
from lensbridge.errors import UnsupportedModelError
from lensbridge.tiny import FAMILIES, tiny_family

#: The fields of a block that are paths of attributes that are no modules, and the one that is none.
ATTRIBUTES = {
    *("attn_factor", "mlp_factor", "attn_also_factor", "attn_in_factor", "attn_residual", "mlp_residual"),
    *("attn_skip", "mlp_skip", "attn_bias", "mlp_bias", "sinks", "o_bias"),
}
WORDS = {"extra"}
#: What transformers asks of every config, whether its class has it or not.
SHARED_OPTIONS = reads_in("transformers.masking_utils")
#: What is around the layers, as paths of modules.
AROUND = (
    *("embed", "project_in", "pos_embed", "type_embed", "embed_norm", "embed_map"),
    *("layers", "ln_final", "head", "project_out", "unembed"),
)
#: The roles of a block: the fields that are paths of modules.
ROLES = [
    field.name
    for field in dataclasses.fields(Block)
    if str(field.type).startswith("str") and field.name not in ATTRIBUTES | WORDS
]


def test_a_model_is_known_by_its_class_and_subclasses_of_it(hf: Any) -> None:
    class Mine(GPT2LMHeadModel):
        pass

    tiny = Mine(GPT2Config(n_layer=1, n_head=1, n_embd=2, vocab_size=3, n_positions=4))
    for model in (hf, tiny):
        found = architecture_of(model)
        assert dataclasses.replace(found, blocks=()) == GPT2
        assert found.blocks == (GPT2.block,) * model.config.n_layer
    assert all(record.hf_class == name for name, record in BY_CLASS.items())


def test_an_unknown_class_is_refused_by_name() -> None:
    model = GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=2, vocab_size=3, n_positions=4))
    with pytest.raises(UnsupportedModelError, match="GPT2Model has no record, and measuring one failed"):
        architecture_of(model)


def test_cross_attention_is_refused_with_its_reason(new_hf: Callable) -> None:
    with pytest.raises(
        UnsupportedModelError, match="add_cross_attention=True is not supported: its blocks add a third"
    ):
        architecture_of(new_hf(add_cross_attention=True))


def test_a_variant_of_the_config_changes_the_record(new_hf: Callable) -> None:
    upcast = architecture_of(new_hf(reorder_and_upcast_attn=True))
    assert {block.softmax for block in upcast.blocks} == {Softmax(call="_upcast_and_reordered_attn")}
    assert dataclasses.replace(upcast, block=GPT2.block, blocks=()) == GPT2 and GPT2.block.softmax == Softmax()
    assert GPT2.for_config(GPT2Config()) is GPT2


def test_paths() -> None:
    assert GPT2.layer(3) == "transformer.h.3"
    assert GPT2.in_layer(3, "qkv") == "transformer.h.3.attn.c_attn"
    with pytest.raises(AttributeError):
        GPT2.in_layer(3, "nothing")


#: Without those of models that also see, which `test_multimodal.py` has tiny models of.
OF_TEXTS = {name: record for name, record in BY_CLASS.items() if name != "MllamaForConditionalGeneration"}


@pytest.mark.parametrize("record", OF_TEXTS.values(), ids=OF_TEXTS)
def test_every_role_is_where_the_record_says(record: Architecture) -> None:
    hf = tiny_family(record.model_type)
    relatives = [key for key in FAMILIES if key.partition("@")[0] == record.model_type]
    for role in AROUND:
        path = getattr(record, role)
        some = map(tiny_family, relatives) if role in record.optional else (hf,)
        assert path is None or any(path in dict(model.named_modules()) for model in some), role
    bound = record.for_model(hf)
    for layer, block in enumerate(bound.blocks):
        fused = ("q", "k", "v") if block.qkv is not None else ()
        roles = [role for role in ROLES if role not in fused and getattr(block, role) is not None]
        assert all(hf.get_submodule(bound.in_layer(layer, role)) is not None for role in roles)
        assert all(hf.get_submodule(bound.below(layer, path)) is not None for path in block.branches if path)
        for attribute in ATTRIBUTES:
            path = getattr(block, attribute) or "training"
            if callable(path):
                assert path(hf.get_submodule(bound.layer(layer))) is not None
                continue
            owner, _, name = path.rpartition(".")
            module = hf.get_submodule(bound.layer(layer))
            assert hasattr(attrgetter(owner)(module) if owner else module, name), attribute
    conditions = [
        each.partition("=")[0].removesuffix("!").split(".")[0] for each in (*record.variants, *record.refused)
    ]
    attributes = (*record.config.values(), *record.by_layer, *conditions)
    for of_layer in map(hf.get_submodule, map(bound.layer, range(len(bound.blocks)))):
        for path in record.by_attribute:
            attrgetter(path)(of_layer)
    config = hf.config.get_text_config(decoder=True)
    for attribute in attributes:
        if attribute not in SHARED_OPTIONS:
            attrgetter(attribute)(config)


def test_roles_that_there_are_none_of() -> None:
    with pytest.raises(LookupError, match="gpt2 has no 'gate'"):
        GPT2.in_layer(0, "gate")


def test_records_are_data(hf: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPT2.embed = "elsewhere"  # type: ignore[misc]
