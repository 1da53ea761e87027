"""Does the model show its weights under TransformerLens' names, as its own parameters?"""

from __future__ import annotations

from ..points import ABSENT
from ..readonly import ReadOnlyTensor
from .outcome import Findings, Outcome
from .subject import Subject

#: What TransformerLens' models have in each layer, and the feature of a layer that each weight comes with.
LAYER_WEIGHTS = {
    "attn.W_Q": "queries",
    "attn.W_K": "keys",
    "attn.W_V": "values",
    "attn.W_O": "heads out",
    "mlp.W_in": "neurons",
    "mlp.W_gate": "gate",
    "mlp.W_out": "neurons",
}


def check_weights(subject: Subject) -> list[Outcome]:
    """Every weight is there, or absent for a reason; it is the model's own parameter, or read-only and says why."""
    findings = Findings("weights", subject.known)
    own = {parameter.untyped_storage().data_ptr() for parameter in subject.hf.parameters()}
    for name in ("embed.W_E", "unembed.W_U"):
        _check_weight(subject, findings, name, name, own)
    for layer in range(subject.n_layers):
        block = subject.block(layer)
        features = block.features
        for short, feature in LAYER_WEIGHTS.items():
            name = f"blocks.{layer}.{short}"
            stored = name.replace("attn.", "attn._")
            name = stored if stored in subject.weight_names else name
            if feature in features or name in subject.weight_names:
                _check_weight(subject, findings, short, name, own)
            else:
                lacking = "attention" if "attention" not in features and "attn." in short else feature
                findings.absent(short, ABSENT[lacking])
    return findings.outcomes()


def _check_weight(subject: Subject, findings: Findings, check: str, name: str, own: set[int]) -> None:
    findings.say(check, name in subject.weight_names, f"there is no {name}")
    if name in subject.weight_names:
        with findings.trying(check, name):
            weight = subject.model.interior.weights.get(name)
            is_own = weight.untyped_storage().data_ptr() in own
            guarded = isinstance(weight, ReadOnlyTensor) and bool(weight.why)
            findings.say(check, is_own or guarded, f"{name} is a copy that can be edited without an effect")
