"""Does the stand-in for NDIF do for nnsight's own client what a server does, and does it see what it is there to see?

The client builds its model on meta tensors, so every number comes from the server. lensbridge is not used here.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import nnsight
import pytest
import torch
from cloudpickle import cloudpickle as by_value_modules
from nnsight.intervention.backends.display import StatusDisplay
from nnsight.intervention.backends.remote import RemoteError
from nnsight.modeling import huggingface
from nnsight.schema.config import CONFIG
from nnsight.schema.response import Status
from transformers import AutoModelForCausalLM

from compat_tests.ndif.stand_in import StandIn, serving
from compat_tests.rough_models import TOY_DIR
from lensbridge.points import template

TOKENS = torch.arange(2, 11)[None]


def client(directory: Path | str = TOY_DIR, **options: Any) -> Any:
    """nnsight's model of a directory, without weights."""
    return nnsight.TransformersModel(str(directory), task="text-generation", **options)


@pytest.fixture(scope="module")
def local() -> Any:
    """The same model, here."""
    return AutoModelForCausalLM.from_pretrained(TOY_DIR, attn_implementation="sdpa").eval()


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Status, str]]:
    """All updates that the client is sent from here on."""
    seen: list[tuple[Status, str]] = []
    monkeypatch.setattr(StatusDisplay, "update", lambda self, one: seen.append((one.status, one.description)))
    return seen


@torch.no_grad()
def test_a_trace_returns_what_was_saved_and_nothing_else(ndif: StandIn, local: Any, updates: list[Any]) -> None:
    model = client()
    with model.trace(TOKENS, remote=True):
        hidden = model.transformer.h[1].output
        print("first\nsecond")
        kept = nnsight.save(hidden[:, -1])
        logits = nnsight.save(model.lm_head.output)
    expected = local(TOKENS, output_hidden_states=True)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(kept, expected.hidden_states[2][:, -1])
    assert "hidden" not in locals()
    assert next(model.parameters()).device.type == "meta"
    sent = [status for status, _ in updates]
    assert sent[0] is Status.RECEIVED
    assert [status for status in sent[1:] if status is not Status.LOG] == [
        Status.QUEUED,
        Status.DISPATCHED,
        Status.RUNNING,
        Status.COMPLETED,
    ]
    assert [text for status, text in updates if status is Status.LOG] == ["first", "second"]


def test_jobs_and_bytes_are_counted(ndif: StandIn) -> None:
    model, noise = client(), torch.randn(5000)
    for size in (10, 5000):
        part = noise[:size].clone()
        with model.trace(TOKENS, remote=True):
            nnsight.save(model.transformer.h[1].output + part.sum())
            twice = nnsight.save(part * 2)
    assert torch.equal(twice, noise * 2)
    small, large = ndif.stats()["requests"]
    assert ndif.jobs == 2
    assert {small["status"], large["status"]} == {"COMPLETED"}
    # Noise cannot be compressed; both ways it travels, with the same rest.
    for key in ("payload_raw_bytes", "result_raw_bytes"):
        assert abs(large[key] - small[key] - 4 * 4990) < 200
    for key in ("payload_bytes", "result_bytes"):
        assert 0.8 * 4 * 4990 < large[key] - small[key] < 4 * 4990 + 200
        assert small[key] < 3000
    assert small["inline"] and small["env"] == {"attn_implementation": "sdpa"}
    assert "torch._utils" in small["named"]
    ndif.reset()
    assert ndif.jobs == 0


@torch.no_grad()
def test_edits_in_two_invokes(ndif: StandIn, local: Any) -> None:
    model = client()
    with model.trace(remote=True) as tracer:
        with tracer.invoke(TOKENS):
            model.transformer.h[0].output[:] = 0
            edited = nnsight.save(model.lm_head.output)
        with tracer.invoke(TOKENS.flip(-1)):
            plain = nnsight.save(model.lm_head.output)
    handle = local.transformer.h[0].register_forward_hook(lambda module, given, output: torch.zeros_like(output))
    expected = local(TOKENS).logits
    handle.remove()
    assert torch.allclose(edited, expected, atol=1e-4, rtol=0) and not torch.allclose(edited, local(TOKENS).logits)
    assert torch.allclose(plain, local(TOKENS.flip(-1)).logits, atol=1e-4, rtol=0)
    assert ndif.jobs == 1


@torch.no_grad()
def test_a_session_is_one_job(ndif: StandIn, local: Any) -> None:
    model = client()
    with model.session(remote=True):
        found = nnsight.save([])
        with model.trace(TOKENS):
            clean = model.transformer.h[2].output
        for position in (1, 4):
            with model.trace(TOKENS.flip(-1)):
                model.transformer.h[2].output[:, position] = clean[:, position]
                found.append(model.lm_head.output[0, -1])
        weight = nnsight.save(model.transformer.wte.weight)
    assert ndif.jobs == 1
    assert torch.equal(weight, local.transformer.wte.weight)
    clean = local(TOKENS, output_hidden_states=True).hidden_states[3]
    for logits, position in zip(found, (1, 4), strict=True):

        def patch(module: Any, given: Any, output: torch.Tensor, position: int = position) -> None:
            output[:, position] = clean[:, position]

        handle = local.transformer.h[2].register_forward_hook(patch)
        assert torch.equal(logits, local(TOKENS.flip(-1)).logits[0, -1])
        handle.remove()


@torch.no_grad()
def test_generate_with_a_look_at_every_step(ndif: StandIn, local: Any) -> None:
    model = client()
    with model.generate(max_new_tokens=4, do_sample=False, remote=True) as tracer:
        with tracer.invoke(TOKENS):
            steps = nnsight.save([])
            for _ in tracer.iter[:4]:
                steps.append(model.lm_head.output[:, -1])
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    expected = local.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, expected)
    assert torch.equal(torch.stack(steps, 1).argmax(-1), expected[:, -4:])


@torch.no_grad()
def test_source_of_the_attention_that_the_client_has(ndif: StandIn) -> None:
    """The server loads with sdpa; a client whose model is eager gets that, and the next that is not gets sdpa again."""
    model = client(attn_implementation="eager")
    with model.trace(TOKENS, remote=True):
        call = model.transformer.h[0].attn.source.attention_interface_1.source.nn_functional_softmax_0
        pattern = nnsight.save(call.output.clone())
        call.output = torch.zeros_like(call.output)
        logits = nnsight.save(model.lm_head.output)
    eager = AutoModelForCausalLM.from_pretrained(TOY_DIR, attn_implementation="eager").eval()
    expected = eager(TOKENS, output_attentions=True)
    assert torch.equal(pattern, expected.attentions[0])
    assert not torch.allclose(logits, expected.logits)
    model = client()
    with model.trace(TOKENS, remote=True):
        logits = nnsight.save(model.lm_head.output)
    assert [one["env"]["attn_implementation"] for one in ndif.stats()["requests"]] == ["eager", "sdpa"]
    assert torch.allclose(logits, expected.logits, atol=1e-4, rtol=0)


def test_gradients_in_the_block(ndif: StandIn, local: Any) -> None:
    model = client()
    with model.trace(TOKENS, remote=True):
        hidden = model.transformer.h[1].output
        gradient = nnsight.save(torch.autograd.grad(model.lm_head.output[0, -1, 5], hidden)[0])
    outputs = local(TOKENS, output_hidden_states=True)
    assert torch.equal(gradient, torch.autograd.grad(outputs.logits[0, -1, 5], outputs.hidden_states[2])[0])


def fails(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.ones(3, 3)  # the line that is wrong


def test_an_error_is_the_text_of_its_traceback(ndif: StandIn) -> None:
    model = client()
    with pytest.raises(RemoteError) as caught:  # noqa: SIM117
        with model.trace(TOKENS, remote=True):
            fails(model.transformer.h[1].output)
    text = str(caught.value)
    assert text.startswith("Traceback (most recent call last)")
    assert "x @ torch.ones(3, 3)" in text and "fails(model.transformer.h[1].output)" in text
    assert text.splitlines()[-1].startswith("RuntimeError: mat1 and mat2")
    assert "job.py" not in text and "interleaver.py" not in text
    assert ndif.last["status"] == "ERROR"
    with model.trace(TOKENS, remote=True):  # the server goes on
        nnsight.save(model.lm_head.output)
    assert ndif.last["status"] == "COMPLETED"


def test_a_job_that_nobody_waits_for(ndif: StandIn, local: Any) -> None:
    model = client()
    with model.trace(TOKENS, remote=True, blocking=False) as tracer:
        time.sleep(0.3)
        logits = nnsight.save(model.lm_head.output)
    assert "logits" not in locals()
    seen, found = [tracer.backend.status], None
    while found is None:
        found = tracer.backend()
        seen.append(tracer.backend.status)
        time.sleep(0.02)
    assert torch.equal(found["logits"], local(TOKENS).logits)
    assert seen[0] is Status.RECEIVED and Status.RUNNING in seen and seen[-1] is Status.COMPLETED
    assert ndif.last["inline"] is False and ndif.last["downloads"] == 1


@torch.no_grad()
def test_a_large_result_is_downloaded(ndif: StandIn, local: Any) -> None:
    ndif.reset(inline_limit=1000)
    model = client()
    with model.trace(TOKENS, remote=True):
        logits = nnsight.save(model.lm_head.output)
    assert torch.equal(logits, local(TOKENS).logits)
    assert ndif.last["inline"] is False and ndif.last["downloads"] == 1
    with model.trace(TOKENS, remote=True):
        one = nnsight.save(model.lm_head.output[0, -1, 0].clone())  # a view would travel with all it is a view of
    assert torch.equal(one, logits[0, -1, 0])
    assert ndif.last["inline"] is True


@pytest.mark.parametrize("name", "lensbridge jaxtyping transformer_lens compat_tests".split())
def test_the_server_has_nothing_of_the_client(ndif: StandIn, name: str) -> None:
    assert importlib.util.find_spec(name)
    model = client()
    with pytest.raises(RemoteError, match=f"No module named '{name}'"):  # noqa: SIM117
        with model.trace(TOKENS, remote=True):
            nnsight.save(model.lm_head.output)
            __import__(name)
    assert name in ndif.last["named"]


@pytest.mark.parametrize("by_value", [False, True])
def test_code_of_the_package_travels_only_if_it_is_registered(
    ndif: StandIn, monkeypatch: pytest.MonkeyPatch, by_value: bool
) -> None:
    """As for those who have it installed; other modules of the working tree, like this one, always travel."""
    registered = by_value_modules._PICKLE_BY_VALUE_MODULES
    assert __name__.partition(".")[0] in registered
    chosen = registered | {"lensbridge"} if by_value else registered - {"lensbridge"}
    monkeypatch.setattr(by_value_modules, "_PICKLE_BY_VALUE_MODULES", chosen)
    model = client()
    expected = nullcontext() if by_value else pytest.raises(RemoteError, match="No module named 'lensbridge'")
    with expected:
        with model.session(remote=True):
            found = nnsight.save([template("blocks.3.hook_resid_pre")])
        assert found == [template("blocks.3.hook_resid_pre")]


def change_config(model: Any) -> None:
    model._module.config._attn_implementation = "eager"


def change_weight(model: Any) -> None:
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] += 1


def leave_gradients(model: Any) -> None:
    model.transformer.wte.weight.grad = torch.zeros_like(model.transformer.wte.weight)


def leave_a_hook(model: Any) -> None:
    model.transformer.h[1]._module.register_forward_hook(lambda *_: None)


def train(model: Any) -> None:
    model._module.train()


def pad_elsewhere(model: Any) -> None:
    model.tokenizer.padding_side = "right"


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (change_config, "attention implementation"),
        (change_weight, "logits"),
        (change_weight, "parameter transformer.wte.weight"),
        (leave_gradients, "gradient of parameter transformer.wte.weight"),
        (leave_a_hook, "forward hooks of transformer.h.1"),
        (train, "training mode of transformer.h.3.mlp"),
        (pad_elsewhere, "tokenizer"),
    ],
)
@torch.no_grad()
def test_what_a_job_leaves_behind_is_seen_and_undone(ndif: StandIn, local: Any, spoil: Any, what: str) -> None:
    model = client()
    with model.session(remote=True):
        spoil(model)
    assert what in ndif.last["left_behind"]
    assert ndif.left_behind
    with model.trace(TOKENS, remote=True):
        logits = nnsight.save(model.lm_head.output)
    assert ndif.last["left_behind"] == []
    assert torch.equal(logits, local(TOKENS).logits)
    ndif.reset()


def test_what_is_deployed(ndif: StandIn) -> None:
    assert set(nnsight.status()) == {"stand-in/gpt2", "stand-in/llama"}
    assert nnsight.ndif.get_remote_env(force_refresh=True)["packages"]["torch"]
    llama = client(ndif.directories["stand-in/llama"])
    with llama.trace(TOKENS, remote=True):
        llama.model.layers[0].mlp.output[:] = 0
        nnsight.save(llama.lm_head.output)
    assert '"stand-in/llama"' in ndif.last["model_key"]


@mock.patch.dict(huggingface._ID_CACHE, {str(TOY_DIR): "somebody/else"})
def test_a_model_that_is_not_there(ndif: StandIn) -> None:
    model = client()
    with pytest.raises(RemoteError, match="somebody/else.* is not deployed. Deployed: .*stand-in/gpt2"):  # noqa: SIM117
        with model.trace(TOKENS, remote=True):
            nnsight.save(model.lm_head.output)


@pytest.fixture(scope="module")
def hard_server() -> Iterator[StandIn]:
    options = "--strict --frozen --dtype=bfloat16 --attn=eager --api-key=right".split()
    with serving({"stand-in/gpt2": TOY_DIR}, *options) as server:
        yield server


@pytest.fixture
def hard(hard_server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A server that asks for a key and refuses what is not of its list, with a frozen model in bfloat16."""
    monkeypatch.setattr(CONFIG.API, "APIKEY", "right")
    hard_server.reset()
    with hard_server.pointed():
        yield hard_server


def test_a_key_is_asked_for(hard: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nnsight.ndif.whoami()["email"]
    monkeypatch.setattr(CONFIG.API, "APIKEY", "wrong")
    model = client()
    with pytest.raises(RemoteError, match="Missing or invalid API key"):  # noqa: SIM117
        with model.trace(TOKENS, remote=True, blocking=False):
            nnsight.save(model.lm_head.output)


def test_a_strict_server_lets_in_what_is_of_its_list(hard: StandIn) -> None:
    model = client()
    with model.trace(TOKENS, remote=True):
        import math

        logits = nnsight.save(model.lm_head.output * math.pi)
        free = nnsight.save(model.transformer.wte.weight.requires_grad)
    assert logits.dtype is torch.bfloat16 and free is False
    assert "math" in hard.last["named"]


def asks_the_system(x: torch.Tensor) -> torch.Tensor:
    import os

    return x * len(os.sep)


def test_a_strict_server_refuses_the_rest(hard: StandIn) -> None:
    model, path = client(), Path("somewhere")
    with pytest.raises(RemoteError, match="Module 'pathlib.*' is not allowed"):  # noqa: SIM117
        with model.trace(TOKENS, remote=True):
            nnsight.save(model.lm_head.output * len(str(path)))
    with pytest.raises(RemoteError, match="Module 'os' is not allowed"):  # noqa: SIM117
        with model.trace(TOKENS, remote=True):
            nnsight.save(asks_the_system(model.lm_head.output))
    with pytest.raises(RemoteError, match="Module 'copy' is not allowed"):  # noqa: SIM117
        with model.trace(TOKENS, remote=True):
            import copy

            nnsight.save(copy.copy(model.lm_head.output))
