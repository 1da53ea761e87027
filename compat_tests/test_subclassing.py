"""Do subclasses that were written for TransformerLens do the same on lensbridge?

What sparse autoencoder libraries do: subclass `HookedTransformer`, put a module of their own in a hook point's place,
call ``setup()``, and read the points inside that module from a cache. One source of such classes is built on each of
the two packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformer_lens

import lensbridge
from compat_tests.comparison import caches_close, close
from compat_tests.conftest import Pairs
from compat_tests.rough_models import PROCESSINGS, SHAPES, SUBJECT, config_from, random_tokens, rough_gpt2

SIZE = SHAPES["two"]
LATENTS = 17


def classes(package: ModuleType) -> SimpleNamespace:
    """A sparse coder and a model that takes coders, as subclasses of a package's classes."""

    class Coder(package.HookedRootModule):  # type: ignore[name-defined]
        """Encodes a vector as few positive numbers and back; has points of its own."""

        def __init__(self, site: str, width: int, seed: int = 0) -> None:
            super().__init__()
            self.site = site
            generator = torch.Generator().manual_seed(seed)
            self.W_enc = torch.nn.Parameter(torch.randn(width, LATENTS, generator=generator) * width**-0.5)
            self.W_dec = torch.nn.Parameter(torch.randn(LATENTS, width, generator=generator) * LATENTS**-0.5)
            self.b_enc = torch.nn.Parameter(0.3 * torch.randn(LATENTS, generator=generator))
            self.b_dec = torch.nn.Parameter(0.3 * torch.randn(width, generator=generator))
            self.keeps_error = False
            for name in ("input", "acts_pre", "acts_post", "recons", "error", "output"):
                setattr(self, f"hook_sae_{name}", package.hook_points.HookPoint())
            self.setup()

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            x = self.hook_sae_input(x.flatten(-2) if self.site.endswith("hook_z") else x)
            return self.hook_sae_acts_post(self.hook_sae_acts_pre((x - self.b_dec) @ self.W_enc + self.b_enc).relu())

        def decode(self, acts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return self.hook_sae_recons((acts @ self.W_dec + self.b_dec).reshape(like.shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.decode(self.encode(x), x)
            if self.keeps_error:
                with torch.no_grad():
                    flat = x.flatten(-2) if self.site.endswith("hook_z") else x
                    acts = ((flat - self.b_dec) @ self.W_enc + self.b_enc).relu()
                    error = self.hook_sae_error(x - (acts @ self.W_dec + self.b_dec).reshape(x.shape))
                out = out + error
            return self.hook_sae_output(out)

    class CodedTransformer(package.HookedTransformer):  # type: ignore[name-defined]
        """A model that coders can be attached to, and taken off again."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.attached: dict[str, Any] = {}
            for block in self.blocks:
                self.show_input_of(block.mlp)
            self.setup()

        @staticmethod
        def show_input_of(mlp: Any) -> None:
            mlp.hook_in, original = package.hook_points.HookPoint(), mlp.forward
            mlp.forward = lambda x: original(mlp.hook_in(x))

        def put(self, name: str, module: Any) -> None:
            parent, _, last = name.rpartition(".")
            setattr(self.mod_dict[parent] if parent else self, last, module)
            self.setup()

        def attach(self, coder: Any, keeps_error: bool = False) -> None:
            coder.keeps_error = keeps_error
            self.put(coder.site, coder)
            self.attached[coder.site] = coder

        def detach(self, site: str) -> None:
            self.put(site, package.hook_points.HookPoint())
            del self.attached[site]

        @contextmanager
        def coded(self, *coders: Any, keeps_error: bool = False) -> Iterator[Any]:
            before = dict(self.attached)
            for coder in coders:
                self.attach(coder, keeps_error)
            try:
                yield self
            finally:
                for coder in coders:
                    self.detach(coder.site)
                    if coder.site in before:
                        self.attach(before[coder.site], before[coder.site].keeps_error)

    return SimpleNamespace(Coder=Coder, CodedTransformer=CodedTransformer)


class Both:
    """The same model as a subclass of each package's, and coders with the same weights."""

    def __init__(self, tokenizer: Any, processing: str) -> None:
        packages = (transformer_lens if SUBJECT == "transformer_lens" else lensbridge, transformer_lens)
        self.classes = [classes(package) for package in packages]
        self.hf = rough_gpt2(SIZE)
        with config_from(self.hf):
            self.models = [
                one.CodedTransformer.from_pretrained(
                    "gpt2", hf_model=self.hf, tokenizer=tokenizer, **PROCESSINGS[processing]
                )
                for one in self.classes
            ]

    def coders(self, site: str, width: int = SIZE.d_model, seed: int = 0) -> list[Any]:
        return [one.Coder(site, width, seed) for one in self.classes]


@pytest.fixture(params=PROCESSINGS)
def both(request: pytest.FixtureRequest, pairs: Pairs) -> Both:
    return Both(pairs.tokenizer(), request.param)


TOKENS = random_tokens(2, 9, SIZE.vocab, 0)
SITES = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.0.attn.hook_q",
    "blocks.1.attn.hook_v",
    "blocks.0.attn.hook_z",
    "blocks.0.hook_attn_out",
    "blocks.1.hook_resid_mid",
    "blocks.0.ln2.hook_normalized",
    "blocks.0.mlp.hook_in",
    "blocks.0.mlp.hook_post",
    "blocks.0.hook_mlp_out",
    "blocks.1.hook_resid_post",
    "ln_final.hook_normalized",
]


def width_of(site: str) -> int:
    if site.endswith("hook_post"):
        return 4 * SIZE.d_model
    return SIZE.d_model // SIZE.n_heads if site.endswith(("hook_q", "hook_v")) else SIZE.d_model


@pytest.mark.parametrize("keeps_error", [False, True], ids=["reconstruction", "with its error"])
@pytest.mark.parametrize("site", SITES)
def test_a_coder_in_a_points_place(both: Both, site: str, keeps_error: bool) -> None:
    plain = both.models[0](TOKENS)
    results = []
    for model, coder in zip(both.models, both.coders(site, width_of(site)), strict=True):
        with model.coded(coder, keeps_error=keeps_error):
            assert f"{site}.hook_sae_acts_post" in model.hook_dict
            assert site not in model.hook_dict
            results.append(model.run_with_cache(TOKENS))
        assert site in model.hook_dict
    mine, theirs = results
    caches_close(mine[1], theirs[1])
    close("logits", mine[0], theirs[0])
    assert torch.allclose(plain, mine[0], atol=1e-3) == keeps_error
    close("logits", both.models[0](TOKENS), plain)


def test_names_of_the_points_inside(both: Both) -> None:
    names = []
    for model, coder in zip(both.models, both.coders("blocks.0.hook_mlp_out"), strict=True):
        with model.coded(coder, keeps_error=True):
            _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: "sae" in name)
            names.append(list(cache.keys()))
            assert list(model.run_with_cache(TOKENS, names_filter=names[0][1])[1].keys()) == [names[0][1]]
    inner = ("input", "acts_pre", "acts_post", "recons", "error", "output")
    assert names[0] == names[1] == [f"blocks.0.hook_mlp_out.hook_sae_{name}" for name in inner]


@pytest.mark.parametrize("site", ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"])
def test_an_edit_of_a_latent(both: Both, site: str) -> None:
    def boost(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[..., 3] = 5.0
        return acts

    results = []
    for model, coder in zip(both.models, both.coders(site), strict=True):
        with (
            model.coded(coder, keeps_error=True),
            model.hooks([(f"{site}.hook_sae_acts_post", boost), ("blocks.1.hook_mlp_out", boost)]),
        ):
            results.append(model.run_with_cache(TOKENS))
    caches_close(results[0][1], results[1][1])
    close("logits", results[0][0], results[1][0])


def test_several_coders_and_one_put_back_after_another(both: Both) -> None:
    results: list[list[torch.Tensor]] = []
    for model, maker in zip(both.models, both.classes, strict=True):
        resid, other, z = (
            maker.Coder(site, SIZE.d_model, seed)
            for seed, site in enumerate(["blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"])
        )
        model.attach(resid)
        outputs = [model(TOKENS)]
        with model.coded(other, z):
            outputs.append(model(TOKENS))
        outputs.append(model(TOKENS))
        model.detach(resid.site)
        outputs.append(model(TOKENS))
        results.append(outputs)
    for index, (mine, theirs) in enumerate(zip(*results, strict=True)):
        close(f"logits {index}", mine, theirs)
    assert torch.equal(results[0][0], results[0][2])
    assert not torch.allclose(results[0][0], results[0][1], atol=1e-3)


@pytest.mark.parametrize("site", ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"])
def test_training_a_coder_through_the_model(both: Both, site: str) -> None:
    gradients = []
    for model, coder in zip(both.models, both.coders(site), strict=True):
        with model.coded(coder):
            model(TOKENS, return_type="loss").backward()
        model.zero_grad()
        gradients.append({name: p.grad for name, p in coder.named_parameters()})
    for name, theirs in gradients[1].items():
        close(f"coder.{name}_grad", gradients[0][name], theirs)


def test_a_transcoder_from_the_mlps_input_to_its_output(both: Both) -> None:
    """What is read at one point takes the place of another: a permanent hook carries it over."""
    results = []
    for model, coder in zip(both.models, both.coders("blocks.0.hook_mlp_out"), strict=True):
        seen: list[torch.Tensor] = []

        class Carried(torch.nn.Module):
            def __init__(self, inner: Any, seen: list[torch.Tensor]) -> None:
                super().__init__()
                self.inner, self.seen = inner, seen

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner(self.seen.pop())

        point = model.blocks[0].mlp.hook_in
        point.add_hook(lambda x, hook, seen=seen: seen.append(x), is_permanent=True)
        model.put("blocks.0.hook_mlp_out", Carried(coder, seen))
        results.append(model.run_with_cache(TOKENS))
        model.put("blocks.0.hook_mlp_out", type(point)())
        point.remove_hooks(including_permanent=True)
        assert not seen
    caches_close(results[0][1], results[1][1])
    close("logits", results[0][0], results[1][0])


def test_the_mlps_input_can_be_edited(both: Both) -> None:
    results = []
    for model in both.models:
        with model.hooks([("blocks.0.mlp.hook_in", lambda x, hook: 0.5 * x + 0.2)]):
            results.append(model.run_with_cache(TOKENS))
    assert "blocks.0.mlp.hook_in" in results[0][1]
    caches_close(results[0][1], results[1][1])


def test_a_component_called_by_itself_shows_its_added_point(both: Both) -> None:
    x = torch.randn(1, 3, SIZE.d_model, generator=torch.Generator().manual_seed(0))
    outputs = []
    for model in both.models:
        calls: list[torch.Tensor] = []
        with model.hooks([("blocks.1.mlp.hook_in", lambda x, hook, calls=calls: calls.append(x))]):
            outputs.append(model.blocks[1].mlp(x))
        assert [torch.equal(one, x) for one in calls] == [True]
    close("mlp", *outputs)


def test_a_subclass_may_extend_forward(pairs: Pairs) -> None:
    results = []
    hf, tokenizer = rough_gpt2(SIZE), pairs.tokenizer()
    for package in (transformer_lens if SUBJECT == "transformer_lens" else lensbridge, transformer_lens):

        class Counting(package.HookedTransformer):  # type: ignore[name-defined]
            calls = 0

            def forward(self, input: Any, **kwargs: Any) -> Any:
                type(self).calls += 1
                return super().forward(input, **kwargs)

        with config_from(hf):
            model = Counting.from_pretrained("gpt2", hf_model=hf, tokenizer=tokenizer)
        assert type(model) is Counting
        outputs = [model(TOKENS), model.run_with_hooks(TOKENS, fwd_hooks=[]), model.run_with_cache(TOKENS)[0]]
        outputs.append(model("some text", return_type="loss"))
        assert Counting.calls == 4
        results.append(outputs)
    for mine, theirs in zip(*results, strict=True):
        close("output", mine, theirs)
