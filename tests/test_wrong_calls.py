"""Does a wrong call end in an error that names the mistake and the way out, and is the next run as in a fresh process?

Each row is a call that a newcomer makes, the error that TransformerLens' users would catch, and words that the message
must have: what was wrong, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import FactoredMatrix, HookedTransformer, HookedTransformerConfig, patching

OUT = "blocks.0.hook_resid_post"
TEXT = "When Mary and John went to the store, John gave a drink to"
Call = Callable[[Any], Any]


@pytest.fixture(scope="module")
def model() -> Any:
    return HookedTransformer.from_pretrained("toy")


@pytest.fixture(scope="module")
def fresh(model: Any) -> Tensor:
    """What a run gives that nothing has gone before."""
    with torch.no_grad():
        return HookedTransformer.from_pretrained("toy")(TEXT)


def hooked(name: str, hook: Any, **options: Any) -> Call:
    return lambda model: model.run_with_hooks(TEXT, fwd_hooks=[(name, hook)], **options)


def cached(**options: Any) -> Call:
    return lambda model: model.run_with_cache(TEXT, **options)


def same(value: Tensor, hook: Any) -> Tensor:
    return value


def failing(value: Tensor, hook: Any) -> Tensor:
    raise ZeroDivisionError("the user's own")


def interrupted(value: Tensor, hook: Any) -> Tensor:
    raise KeyboardInterrupt


def failing_backwards(model: Any) -> None:
    with model.hooks(bwd_hooks=[(OUT, failing)]):
        model(TEXT, return_type="loss").backward()


def failing_metric(logits: Tensor) -> Tensor:
    raise ZeroDivisionError("the user's own")


def interrupting(logits: Tensor) -> Tensor:
    raise KeyboardInterrupt


def sweep_with(metric: Any) -> Call:
    def call(model: Any) -> Any:
        tokens = model.to_tokens(TEXT)
        _, cache = model.run_with_cache(tokens)
        return patching.get_act_patch_resid_pre(model, tokens, cache, metric)

    return call


def config(**options: Any) -> Call:
    base = {"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_head": 4, "n_heads": 2, "d_vocab": 11, "act_fn": "relu"}
    return lambda model: HookedTransformer(HookedTransformerConfig(**{**base, **options}))


MANY = torch.zeros(1, 1000, dtype=torch.long)

#: what is wrong -> (the call, what is raised, what the message has to say).
WRONG: dict[str, tuple[Call, Any, str]] = {
    # --- names of hook points
    "a misspelt point": (hooked("blocks.0.hook_resid_pots", same), KeyError, "Closest: blocks.0.hook_resid_post"),
    "a layer out of range": (hooked("blocks.9.hook_resid_post", same), KeyError, "layers are 0 to 3"),
    "a negative layer": (hooked("blocks.-1.hook_resid_post", same), KeyError, "layers are 0 to 3"),
    "a short name": (hooked(("resid_post", 0), same), TypeError, "a name or to a predicate"),
    "a point whose flag is off": (hooked("blocks.0.attn.hook_result", same), AssertionError, "set_use_attn_result"),
    "a misspelt point to add to": (lambda m: m.add_hook("hook_embd", same), KeyError, "Closest: hook_embed"),
    "a direction": (lambda m: m.add_hook("hook_embed", same, dir="forward"), ValueError, "'fwd' or to 'bwd'"),
    "a misspelt filter": (cached(names_filter="hook_embd"), KeyError, "Closest: hook_embed"),
    "a misspelt filter in a list": (cached(names_filter=["hook_embed", "hook_embd"]), KeyError, "hook_embed"),
    "a filter of numbers": (cached(names_filter=5), ValueError, "a predicate on names"),
    "a cache's misspelt key": (lambda m: m.run_with_cache(TEXT)[1]["pattren", 0], KeyError, "hook_pattern"),
    "a cache's layer": (lambda m: m.run_with_cache(TEXT)[1]["pattern", 17], KeyError, "blocks.17.attn.hook_pattern"),
    "what a filter left out": (
        lambda m: m.run_with_cache(TEXT, names_filter="hook_embed")[1]["pattern", 0],
        KeyError,
        "the run did not store it: names_filter",
    ),
    "a misspelt stack": (lambda m: m.run_with_cache(TEXT)[1].stack_activation("patern"), KeyError, "hook_pattern"),
    "a layer of the stream": (lambda m: m.run_with_cache(TEXT)[1].accumulated_resid(99), KeyError, "Give 0 to 3"),
    "a value outside of a trace": (lambda m: m.blocks[0].hook_resid_post.value, RuntimeError, "run_with_cache keeps"),
    # --- hooks
    "a hook that is no function": (hooked(OUT, 3), TypeError, "(name, function) pairs"),
    "a pair turned round": (hooked(same, OUT), TypeError, "(name, function) pairs"),
    "no pairs": (lambda m: m.run_with_hooks(TEXT, fwd_hooks=[OUT, same]), ValueError, "(name, function) pairs"),
    "one pair": (lambda m: m.run_with_hooks(TEXT, fwd_hooks=(OUT, same)), ValueError, "put it into a list"),
    "a hook of one argument": (hooked(OUT, lambda value: value), TypeError, "called as fn(value, hook=point)"),
    "a hook of three": (hooked(OUT, lambda value, hook, more: value), TypeError, "functools.partial"),
    "an argument of another name": (hooked(OUT, lambda value, point: value), TypeError, "has to be called hook"),
    "a hook that returns text": (hooked(OUT, lambda value, hook: "x"), TypeError, "return a tensor"),
    "a hook that returns a pair": (hooked(OUT, lambda value, hook: (value, value)), TypeError, "returned tuple"),
    "a hook that returns numpy": (hooked(OUT, lambda value, hook: value.detach().numpy()), TypeError, "ndarray"),
    "a hook that drops an axis": (hooked(OUT, lambda value, hook: value[:, -1]), RuntimeError, "is [1, 15, 128]"),
    "a hook of another width": (hooked(OUT, lambda value, hook: value[..., :5]), RuntimeError, "[1, 15, 5]"),
    "a hook of another dtype": (hooked(OUT, lambda value, hook: value.half()), RuntimeError, "float16"),
    "a hook of whole numbers": (hooked(OUT, lambda value, hook: value.long()), RuntimeError, "int64"),
    "a hook of another device": (hooked(OUT, lambda value, hook: value.to("meta")), RuntimeError, "on meta"),
    "a hook with a slip": (hooked("blocks.0.attn.hook_z", lambda z, hook: z[:, :, 99]), IndexError, "99"),
    "a hook that raises": (hooked(OUT, failing), ZeroDivisionError, "the user's own"),
    "a backward hook that raises": (failing_backwards, ZeroDivisionError, "the user's own"),
    "Ctrl-C in a hook": (hooked(OUT, interrupted), KeyboardInterrupt, ""),
    "Ctrl-C in a sweep": (sweep_with(interrupting), KeyboardInterrupt, ""),
    # --- inputs
    "no text": (lambda m: m([]), IndexError, "the list is empty"),
    "no tokens": (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), RuntimeError, "one token at least"),
    "nothing": (lambda m: m(None), TypeError, "not NoneType"),
    "a number": (lambda m: m(7), TypeError, "not int"),
    "a list of numbers": (lambda m: m([1, 2, 3]), ValueError, "torch.tensor"),
    "floats as tokens": (lambda m: m(torch.rand(1, 5)), TypeError, "start_at_layer"),
    "tokens of three axes": (lambda m: m(torch.zeros(1, 2, 3, dtype=torch.long)), TypeError, "[batch, pos]"),
    "tokens of another vocabulary": (lambda m: m(torch.tensor([[999999]])), IndexError, "0 to 1048"),
    "negative tokens": (lambda m: m(torch.tensor([[-3]])), IndexError, "0 to 1048"),
    "a prompt beyond the context": (lambda m: m(MANY), IndexError, "context 128"),
    "a mask of another shape": (
        lambda m: m(m.to_tokens(TEXT), attention_mask=torch.ones(1, 3)),
        AssertionError,
        "(1, 3)",
    ),
    "text as a residual stream": (lambda m: m(TEXT, start_at_layer=1), AssertionError, "[batch, pos, 128]"),
    "a stream of another width": (lambda m: m(torch.zeros(1, 4, 5), start_at_layer=1), AssertionError, "[1, 4, 5]"),
    "a kind of result": (lambda m: m(TEXT, return_type="logit"), ValueError, "'logits', 'loss', 'both' or None"),
    "a side of padding": (lambda m: m.to_tokens(TEXT, padding_side="middle"), AssertionError, "'left', 'right'"),
    "several tokens as one": (lambda m: m.to_single_token("two words here"), AssertionError, "not a single token"),
    "no tokens to generate": (lambda m: m.generate(TEXT, max_new_tokens=-2), ValueError, "at least 1"),
    "top_k": (lambda m: m.generate(TEXT, top_k=0, max_new_tokens=1, verbose=False), AssertionError, "greater than 0"),
    # --- loading and configs
    "a misspelt model": (lambda m: HookedTransformer.from_pretrained("gtp2-small"), OSError, "gpt2-small"),
    "no such path": (
        lambda m: HookedTransformer.from_pretrained("/nowhere/at/all"),
        OSError,
        "no such local directory",
    ),
    "a model that is not here": (
        lambda m: HookedTransformer.from_pretrained("EleutherAI/pythia-70m"),
        OSError,
        "If this machine is offline",
    ),
    "a misspelt option": (
        lambda m: HookedTransformer.from_pretrained("toy", fold_layernorm=True),
        TypeError,
        "no argument 'fold_layernorm'",
    ),
    "a dtype": (lambda m: HookedTransformer.from_pretrained("toy", dtype="float33"), KeyError, "bfloat16"),
    "a device": (lambda m: HookedTransformer.from_pretrained("toy", device="gpu"), RuntimeError, "cuda"),
    "a name as hf_model": (
        lambda m: HookedTransformer.from_pretrained("toy", hf_model="gpt2"),
        AssertionError,
        "must be a HuggingFace model",
    ),
    "a name as config": (lambda m: HookedTransformer("gpt2"), ValueError, "HookedTransformer.from_pretrained"),
    "a checkpoint": (
        lambda m: HookedTransformer.from_pretrained("toy", checkpoint_index=3),
        ValueError,
        "no numbered checkpoints",
    ),
    "an activation function": (config(act_fn="rleu"), AssertionError, "'relu'"),
    "a kind of norm": (config(normalization_type="layer"), ValueError, "'LNPre'"),
    "no vocabulary": (config(d_vocab=-1), AssertionError, "d_vocab is not set"),
    "text without a tokenizer": (lambda m: config()(m)("a"), AssertionError, "set_tokenizer"),
    # --- weights
    "a processed weight": (lambda m: m.blocks[0].mlp.W_in.add_(1), RuntimeError, "would not reach the model"),
    "a processed weight, set": (
        lambda m: setattr(m.blocks[0].mlp, "W_in", m.blocks[0].mlp.W_in + 1),
        RuntimeError,
        "from_pretrained_no_processing",
    ),
    "a weight that is not there": (lambda m: m.blocks[0].mlp.W_gate, AttributeError, "Closest: blocks.0.mlp.W_"),
    "a weight's name": (lambda m: m.W_Qs, AttributeError, "W_Qs"),
    "matrices that do not fit": (
        lambda m: FactoredMatrix(torch.rand(3, 4), torch.rand(5, 6)),
        AssertionError,
        "inner dimensions are 4 and 5",
    ),
    # --- patching
    "a metric's name": (sweep_with("logits"), TypeError, "a function of logits"),
    "a metric of many numbers": (sweep_with(lambda logits: logits[0, -1]), RuntimeError, "[1049]"),
    "a metric of none": (sweep_with(lambda logits: None), TypeError, "it gave None"),
    "a metric that raises": (sweep_with(failing_metric), ZeroDivisionError, "the user's own"),
}


def test_there_are_many() -> None:
    assert len(WRONG) >= 60


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call(what: str, model: Any, fresh: Tensor) -> None:
    call, error, words = WRONG[what]
    with pytest.raises(error) as caught:
        call(model)
    assert words in str(caught.value)
    assert not any(point.has_hooks() for point in model.hook_points()) and model.context_level == 0
    with torch.no_grad():
        assert torch.equal(model(TEXT), fresh), "the next run is another one"
