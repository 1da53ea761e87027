"""What is a model made of, as one run on a few tokens shows it?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .ends import NoStream, read_end, read_start
from .findings import Findings
from .layers import LayerReader
from .norms import NormFact
from .recording import record
from .scores import cap_among, settings
from .stream import Trace, find_layers

BATCH = 2
#: How many tokens are run, unless a size of the model is the same: no two axes are to be taken for each other.
LENGTHS = (13, 11, 17, 7, 19)


@dataclass
class Facts:
    """What was found, without the run that it was found in."""

    model_type: str
    hf_class: str
    #: Around the layers; one entry per layer; and what there is no such points for.
    whole: Findings
    layers: list[Findings]
    #: The modules and parameters in each layer, by their paths below it.
    modules: list[frozenset[str]]
    norms: dict[str, NormFact] = field(default_factory=dict)
    #: What TransformerLens' config says of the model: field -> value.
    values: dict[str, Any] = field(default_factory=dict)


def measure(hf_model: Any) -> Facts:
    """Run a model on a few tokens, and establish what it is made of.

    The model is left as it was. Errors of its own forward pass are raised as they are.

    Raises:
        UnsupportedModelError: if it has no residual stream, from an embedding through a list of layers to a head.
    """
    trace = Trace.of(record(hf_model, some_tokens(hf_model)))
    found = find_layers(trace)
    if isinstance(found, str):
        raise _no_stream(hf_model, found)
    path, calls = found
    try:
        whole = read_start(trace, calls[0])
        whole.add(read_end(trace, calls[-1]))
    except NoStream as error:
        raise _no_stream(hf_model, str(error)) from error
    for before, after in zip(calls, calls[1:], strict=False):
        if not trace.flow.same(before.output, after.input):
            raise _no_stream(hf_model, f"what {before.path!r} returns is not what {after.path!r} is given")
    whole.fields["layers"] = path
    readers = [LayerReader(trace, call) for call in calls]
    layers = [reader.read() for reader in readers]
    modules = [_parts(hf_model.get_submodule(call.path)) for call in calls]
    facts = Facts(
        getattr(hf_model.config, "model_type", "") or "", type(hf_model).__name__, whole, layers, modules, trace.norms
    )
    facts.values = _values(trace, readers, layers)
    return facts


def _parts(layer: Any) -> frozenset[str]:
    """The modules and parameters of a layer, by their paths."""
    return frozenset(path for named in (layer.named_modules(), layer.named_parameters()) for path, _ in named if path)


def _no_stream(hf_model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(hf_model).__name__} has no record, and none could be measured: {reason}. A record can be written by "
        "hand and passed as architecture= (see CONTRIBUTING.md)."
    )


def some_tokens(hf_model: Any) -> Tensor:
    """Different tokens without the special ones, (batch, pos).

    Raises:
        UnsupportedModelError: the model has no single table that tokens are looked up in.
    """
    config = hf_model.config.get_text_config(decoder=True)
    numbers = {name: value for name, value in vars(config).items() if isinstance(value, int)}
    length = next(each for each in LENGTHS if each not in numbers.values())
    table = getattr(hf_model.get_input_embeddings(), "weight", None)
    if table is None:
        raise _no_stream(hf_model, "its input embeddings are not one table of tokens")
    rows = table.shape[0]
    special = {value for name, value in numbers.items() if name.endswith(("token_id", "token_index"))}
    ids = [index for index in range(rows) if index not in special]
    # The first and the last are often special, too.
    inner = ids[5:-5] if len(ids) > BATCH * length + 10 else ids
    chosen = torch.tensor(inner)[torch.linspace(0, len(inner) - 1, BATCH * length).long()]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    return chosen[order].view(BATCH, length).to(next(hf_model.parameters()).device)


# --- what TransformerLens' config says --------------------------------------------------------------------------------


def _values(trace: Trace, readers: list[LayerReader], layers: list[Findings]) -> dict[str, Any]:
    """The config fields that are neither sizes of modules nor roles."""
    found: dict[str, Any] = {}
    activation = next((reader.activation for reader in readers if reader.activation is not None), None)
    if activation is not None:
        found["act_fn"] = _function(activation, trace.recording.model)
    for layer in layers:
        for name in ("n_heads", "d_head", "attn_scores_soft_cap", "rotary_adjacent_pairs"):
            if name in layer.values:
                found.setdefault(name, layer.values[name])
    scorings = [(index, *layer.values["scoring"]) for index, layer in enumerate(layers) if "scoring" in layer.values]
    found |= settings(scorings)
    found["output_logits_soft_cap"] = _cap(trace)
    return {name: value for name, value in found.items() if value is not None}


def _function(activation: tuple[Tensor, Tensor | None, Tensor], model: Any) -> str | None:
    """The name of an activation function by what it makes of its input, the config's names first."""
    from transformers.activations import ACT2FN

    before, factor, after = activation
    config = model.config.get_text_config(decoder=True)
    named = [value for value in vars(config).values() if isinstance(value, str) and value in ACT2FN]
    for name in dict.fromkeys((*named, *ACT2FN)):
        try:
            with torch.no_grad():
                y = ACT2FN[name](before)
        except Exception:
            # Some need more than their input.
            continue
        y = y if factor is None else y * factor
        if y.shape == after.shape and torch.allclose(y, after, rtol=1e-4, atol=1e-5 * float(1 + after.abs().max())):
            return name
    return None


def _cap(trace: Trace) -> float | None:
    """What a tanh behind the head keeps the logits below."""
    start = max(call.end for call in trace.recording.calls)
    return cap_among(trace.recording.ops[start:])
