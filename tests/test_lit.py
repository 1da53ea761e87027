"""Is LIT given what it needs, and is its absence said?"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lensbridge import HookedTransformer, lit
from lensbridge.lit import _nlp, server, utils


class Types:
    """Stands for ``lit_nlp.api.types``."""

    def __getattr__(self, name: str) -> Any:
        return lambda **arguments: (name, arguments)


class Server:
    """Stands for LIT's server and widget, and takes notes."""

    made: list[Server] = []

    def __init__(self, models: Any, datasets: Any, **options: Any) -> None:
        self.models, self.datasets, self.options, self.calls = models, datasets, options, []
        self._server = SimpleNamespace(port=1234)
        self.made.append(self)

    def serve(self) -> None:
        self.calls.append("serve")

    def render(self, **options: Any) -> None:
        self.calls.append(options)

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    package = ModuleType("lit_nlp")
    package.__file__ = "/site/lit_nlp/__init__.py"
    modules = {
        "lit_nlp": package,
        "lit_nlp.dev_server": SimpleNamespace(Server=Server),
        "lit_nlp.notebook": SimpleNamespace(LitWidget=Server),
        "lit_nlp.api.layout": SimpleNamespace(DEFAULT_LAYOUTS={"default": 1}),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_nlp, "_types", Types())
    monkeypatch.setattr(Server, "made", [])
    return Server.made


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained("toy")


def test_without_lit_everything_says_so(monkeypatch: pytest.MonkeyPatch, model: HookedTransformer) -> None:
    monkeypatch.setattr(_nlp, "_types", None)
    for use in (
        lambda: lit.HookedTransformerLIT(model), lambda: lit.HookedTransformerLITBatched(model),
        lambda: lit.HookedTransformerLIT.init_spec(), lambda: lit.SimpleTextDataset.from_strings(["x"]),
        lambda: lit.IOIDataset.generate(1), lambda: lit.serve(model, []), lambda: lit.LITWidget({}, {}),
        lambda: lit.wrap_for_lit(SimpleNamespace(examples=[], spec=dict, description=str)),
    ):  # fmt: skip
        with pytest.raises(ImportError, match="pip install lit-nlp"):
            use()


def test_a_model_and_a_dataset_are_served(installed: list[Server], model: HookedTransformer) -> None:
    dataset = lit.SimpleTextDataset.from_strings(["x"])
    lit.serve(model, dataset, port=99, default_layout="mine")
    (made,) = installed
    assert made.calls == ["serve"]
    assert isinstance(made.models["model"], lit.HookedTransformerLIT) and made.models["model"].model is model
    assert made.datasets["dataset"].examples == [{"text": "x"}] and made.datasets["dataset"] is not dataset
    assert made.options["port"] == 99 and made.options["host"] == "localhost"
    assert made.options["default_layout"] == "mine" and made.options["layouts"] == {"default": 1}
    assert made.options["client_root"].endswith("lit_nlp/client/build/default")


def test_named_models_and_datasets_are_served(installed: list[Server], model: HookedTransformer) -> None:
    wrapped, foreign = lit.HookedTransformerLITBatched(model), object()
    lit.serve({"a": wrapped, "b": model}, {"d": foreign, "e": lit.wrap_for_lit(lit.IOIDataset.generate(2))})
    (made,) = installed
    assert made.models["a"] is wrapped and isinstance(made.models["b"], lit.HookedTransformerLIT)
    assert made.datasets["d"] is foreign and len(made.datasets["e"]) == 2


def test_a_widget(installed: list[Server], model: HookedTransformer) -> None:
    widget = lit.LITWidget({"m": model}, {"d": lit.SimpleTextDataset()}, height=5, default_layout="x", other=1)
    assert widget.url == "http://localhost:1234"
    widget.render(open_in_new_tab=True)
    widget.stop()
    (made,) = installed
    assert made.calls == [{"open_in_new_tab": True}, "stop"]
    assert made.options == {"height": 5, "render": False, "other": 1}


def test_gradients_are_those_of_the_embedding(model: HookedTransformer) -> None:
    """By finite differences along one direction."""
    tokens, ids = utils.get_tokens_from_model(model, "When Mary and John went")
    gradient, embedded = utils.embedding_gradients(model, ids, -1)
    assert len(tokens) == len(ids) == len(gradient)
    direction, step = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0)), 1e-3

    def logit(size: float) -> float:
        hook = ("hook_embed", lambda value, hook: embedded[None] + size * direction)
        return model.run_with_hooks(ids[None], fwd_hooks=[hook])[0, -2, ids[-1]].item()

    assert (logit(step) - logit(-step)) / (2 * step) == pytest.approx((gradient * direction).sum().item(), abs=0.01)
    # The last token itself is not read by its own prediction.
    assert not gradient[-1].any() and gradient[:-1].abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not utils.embedding_gradients(model, ids[:1], -1)[0].any()


def test_token_gradients_as_two_numbers_each(model: HookedTransformer) -> None:
    text = "When Mary and John went"
    norms, products, tokens = utils.compute_token_gradients(model, text)
    gradient, embedded = utils.embedding_gradients(model, model.to_tokens(text)[0], -1)
    assert norms is not None and products is not None
    assert np.allclose(norms, gradient.norm(dim=-1)) and np.allclose(products, (gradient * embedded).sum(-1))
    assert len(tokens) == len(norms)
    earlier, _, _ = utils.compute_token_gradients(model, text, target_idx=1)
    assert earlier is not None and earlier[:2].any() and not earlier[2:].any()


def test_batches_and_configs(installed: list[Server], model: HookedTransformer) -> None:
    config = lit.HookedTransformerLITConfig(output_embeddings=False, output_attention=False, top_k=2)
    batched = lit.HookedTransformerLITBatched(model, config)
    outputs = batched.predict_minibatch([{"text": "Mary and"}, {"text": "John"}])
    assert [len(output["tokens"]) for output in outputs] == [len(output["top_k_tokens"]) for output in outputs]
    assert outputs[0].keys() == batched.output_spec().keys() and batched.input_spec()
    # Gradients brought embeddings with them; the config that was given is left alone.
    assert batched.config.output_embeddings and not config.output_embeddings
    assert batched.max_minibatch_size() == 8 and "4L" in batched.description() and batched.init_spec()
    loaded = lit.HookedTransformerLIT.from_pretrained("toy", config)
    assert type(lit.HookedTransformerLITBatched.from_pretrained("toy")) is lit.HookedTransformerLITBatched
    assert loaded.config.top_k == 2


def test_a_model_without_a_tokenizer_is_refused_when_it_is_asked(installed: list[Server]) -> None:
    bare = HookedTransformer.from_pretrained("toy")
    bare.tokenizer = None
    wrapped = lit.HookedTransformerLIT(bare)
    with pytest.raises(ValueError, match="tokenizer"):
        next(wrapped.predict([{"text": "x"}]))
    with pytest.raises(ValueError, match="tokenizer"):
        utils.get_tokens_from_model(bare, "x")
    names, table = wrapped.get_embedding_table()
    assert names[:2] == ["<0>", "<1>"] and len(names) == len(table)


def test_bfloat16_becomes_float32() -> None:
    assert utils.tensor_to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32  # type: ignore[union-attr]


def test_what_is_wrapped_stays_wrapped(installed: list[Server]) -> None:
    wrapped = lit.wrap_for_lit(lit.IOIDataset.generate(1))
    assert server._wrapped({"d": wrapped})["d"] is wrapped and wrapped.init_spec() is None
