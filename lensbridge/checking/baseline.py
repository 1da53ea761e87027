"""Do the points that a model shows exist, mean what they should, and agree with HuggingFace's own values?"""

from __future__ import annotations

import torch

from ..points import point_of, template
from .identities import Identity, identities_of
from .outcome import Findings, Outcome
from .shapes import shape_problems
from .subject import TEMPLATES, Look, Subject

#: Points that are looked for among what HuggingFace's modules are given and give back.
ARE_MODULES = (
    "blocks.{l}.hook_resid_pre",
    "blocks.{l}.hook_resid_post",
    "unembed.hook_out",
)


#: Why hook_attn_in does not exist with grouped queries.
ONE_COPY_EACH = "several query heads share a key and value; hook_q_input, hook_k_input and hook_v_input are there"


def check_points(subject: Subject) -> list[Outcome]:
    """Each kind of point of TransformerLens' table: it fires in every layer that has it, or is absent for a reason."""
    findings = Findings("points", subject.known)
    missing: dict[str, list[str]] = {}
    for flags in subject.flags():
        with subject.turned_on(flags), findings.trying("cache"):
            look = subject.look()
            for name in subject.names:
                missing.setdefault(name, [])
                if name not in look:
                    missing[name].append(f"did not fire with {', '.join(flags) or 'no flag'}")
                else:
                    missing[name] += shape_problems(subject, name, look[name])
    for point in TEMPLATES:
        for name in _instances(subject, point):
            if name in missing:
                findings.say(point, not missing[name], f"{name} {', '.join(missing[name])}")
            elif name in subject.idle:
                findings.absent(point, "none of the tokens is sent to this expert")
            elif subject.has(name):
                findings.absent(point, ONE_COPY_EACH)
            else:
                reason = subject.model.interior.why_absent(name)
                if reason is None:
                    findings.say(point, False, f"there is no {name}, and nothing says why")
                else:
                    findings.absent(point, reason)
    return findings.outcomes()


def _instances(subject: Subject, point: str) -> list[str]:
    """The names that a kind of point has, or would have, on a model."""
    layers = range(subject.n_layers) if "{l}" in point else (0,)
    experts = range(subject.model.cfg.num_experts or 1) if "{e}" in point else (0,)
    return [point.replace("{l}", str(layer)).replace("{e}", str(expert)) for layer in layers for expert in experts]


def check_identities(subject: Subject, group: str = "identities") -> list[Outcome]:
    """Every identity in a run without hooks, and whether each point is in one."""
    findings = Findings(group, subject.known)
    covered: set[str] = set()
    seen: set[str] = set()
    for flags in subject.flags():
        with subject.turned_on(flags), findings.trying("cache"):
            look = subject.look()
            seen |= set(subject.names)
            for identity in identities_of(subject):
                lacking = refused_in(subject, identity, look)
                if lacking is not None:
                    findings.absent(template(identity.point), f"{lacking} is refused, which its equation names")
                    continue
                with findings.trying(template(identity.point), identity.point), torch.no_grad():
                    compare_identity(findings, identity, look)
                    covered |= {identity.point, *identity.verifies}
    for name in subject.all_names:
        if name in seen and name not in covered and template(name) not in ARE_MODULES:
            if subject.refuses:
                findings.absent(template(name), "its equation names points that are refused")
            else:
                findings.say(template(name), False, f"{name} is in no identity")
    return findings.outcomes()


def refused_in(subject: Subject, identity: Identity, look: Look) -> str | None:
    """A point that an equation names and that the model's record refuses; None if there is none."""
    if not subject.refuses:
        return None
    try:
        with torch.no_grad():
            identity.sides(look, look[identity.point])
    except KeyError as error:
        name = str(error.args[0])
        return name if point_of(name) is not None and not subject.has(name) else None
    except Exception:
        # Whatever is wrong shows when it is compared.
        return None
    return None


def compare_identity(findings: Findings, identity: Identity, look: Look) -> bool:
    """Note how far a point's value is from what its identity gives."""
    value, expected = identity.sides(look, look[identity.point])
    return findings.compare(template(identity.point), value, expected, f"{identity.point} != {identity.equation}")


def check_against_modules(subject: Subject) -> list[Outcome]:
    """Points that are a HuggingFace module's own input or output, in a run without anything of ours."""
    findings = Findings("HuggingFace's values", subject.known)
    architecture, plain = subject.architecture, subject.plain
    with subject.turned_on(subject.flags()[0]):
        look = subject.look()
    for layer in range(subject.n_layers):
        path, prefix = architecture.layer(layer), f"blocks.{layer}"
        check = "resid_pre is the layer's input"
        with findings.trying(check, path):
            entrance, side = architecture.entrance(layer)
            calls = _calls(subject, layer)
            given = plain.input(entrance, *calls) if side == "input" else plain.output(entrance, *calls)
            given = subject.batch_first(entrance, given)
            _same_stream(findings, check, look, f"{prefix}.hook_resid_pre", given)
        check = "resid_post is the layer's output"
        with findings.trying(check, path):
            last = f"{prefix}.hook_normalized_resid_post"
            name = last if last in look else f"{prefix}.hook_resid_post"
            leaves = architecture.exit(layer)
            _same_stream(findings, check, look, name, subject.batch_first(leaves, plain.output(leaves, *calls)))
    for prefix in sorted(name.removesuffix(".hook_scale") for name in look.values if name.endswith(".hook_scale")):
        module = subject.model.mod_dict[prefix].path
        with findings.trying("norms' outputs", module):
            output = plain.output(module, *call_of_norm(subject, prefix, module))
            value, output = look.normed(prefix), subject.batch_first(module, output)
            if has_heads_first(subject, prefix):
                output = output.transpose(1, 2)
            findings.compare("norms' outputs", value.reshape(output.shape).to(output.dtype), output, module)
    with findings.trying("unembed.hook_out is the head's output"):
        value, output = look["unembed.hook_out"], plain.output(architecture.unembed)
        output = output[:, 0] if architecture.several_unembedded else output
        findings.same("unembed.hook_out is the head's output", value, output)
    return findings.outcomes()


def _same_stream(findings: Findings, check: str, look: Look, name: str, expected: torch.Tensor) -> None:
    reason = look.subject.architecture.why_refused(name)
    if reason is None:
        findings.same(check, look[name], expected, name)
    else:
        findings.absent(check, reason)


def _calls(subject: Subject, layer: int) -> tuple[int, int]:
    """Which call of a layer's modules is this layer's, and how many there are."""
    architecture = subject.architecture
    return architecture.call(layer), max(1, sum(run.path == architecture.layer(layer) for run in architecture.ran))


def call_of_norm(subject: Subject, prefix: str, module: str) -> tuple[int, int]:
    """Which call of its module a norm is, and how many there are: one may norm several things in turn."""
    architecture = subject.architecture
    if module == architecture.ln_final:
        return (architecture.final_call if prefix == "ln_final" else 0), 1 + architecture.final_call
    if architecture.ran:
        return _calls(subject, int(prefix.split(".")[1]))
    if prefix.endswith(("q_norm", "k_norm")):
        block = subject.block(int(prefix.split(".")[1]))
        if block.q_norm == block.k_norm:
            return int(prefix.endswith("k_norm")), 2
    return 0, 1


def has_heads_first(subject: Subject, prefix: str) -> bool:
    """Whether a norm of queries or keys has heads before positions."""
    of_heads = prefix.endswith(("q_norm", "k_norm"))
    return of_heads and subject.block(int(prefix.split(".")[1])).qk_norm_heads_first
