"""How far is each point, and are the logits, from TransformerLens 3.9.0's on the same weights?

TransformerLens runs in a process of its own, which imports nothing of lensbridge, loads the same HuggingFace model and
writes what it has at every point into a file; here that is read and compared. HuggingFace is right where the two
compute different functions: then 3.9.0's values are shown and measure nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checking.subject import Subject
from ..points import FLAG_SETTERS, template
from .children import Loading, ask, rows_of, why_no_reference
from .gaps import Gap, is_short
from .huggingface import OnTokens, Step, looks, promise_of, shown
from .known import why_otherwise
from .result import LOGITS, PROCESSED, REFERENCE, Basis, Difference, Promise

#: Why 3.9.0's values are not judged.
DEPARTS = "3.9.0's own logits are {gap:.1e} from HuggingFace's on this model, so that its values measure nothing"
SHORT = "in {dtype} the two round in different places, layer after layer, so that there is no bound to ask for"
#: What is said where 3.9.0 was asked by the model's directory.
BY_NAME = (
    " (3.9.0 knows some families only by the names in its tables: if this model is one of these, give its name with "
    "--reference-name)"
)
Opened = Callable[[str], Tensor]


class ReferenceComparison:
    """Collects the differences from TransformerLens 3.9.0.

    Args:
        bases: those in which values are compared.
        tolerance: how far apart they may be, relative to the largest.
    """

    def __init__(self, bases: Sequence[Basis], tolerance: float) -> None:
        self.bases, self.tolerance = tuple(bases), tolerance
        #: basis -> why 3.9.0 could not be asked.
        self.problems: dict[Basis, str] = {}
        self._gaps: dict[tuple[Basis, str], Gap] = {}
        self._lacking: dict[tuple[Basis, str], str] = {}
        self._departure: dict[Basis, Gap] = {}
        self._more: set[str] = set()
        self._model_type = ""
        #: Why nothing is judged in the model's dtype, if so.
        self._short = ""

    def run(
        self,
        model: Any,
        batches: Sequence[tuple[str, Tensor]],
        loading: Loading,
        folder: Path,
        step: Step = lambda what: None,
    ) -> None:
        """Ask 3.9.0 about every prompt, and compare."""
        self._model_type = model.hf_model.config.model_type
        self._short = (
            SHORT.format(dtype=str(model.cfg.dtype).removeprefix("torch.")) if is_short(model.cfg.dtype) else ""
        )
        missing = why_no_reference()
        subjects = [OnTokens(model, tokens) for _, tokens in batches]
        flags = [list(each) for each in subjects[0].flags()]
        for basis in self.bases:
            step(f"TransformerLens, {basis}")
            if missing is not None:
                self.problems[basis] = missing
                continue
            tensors = folder / f"{basis.replace(' ', '-')}.safetensors"
            answer = ask(
                loading,
                folder,
                f"activations-{basis.split()[0]}",
                task="activations",
                tool="TransformerLens",
                processing=basis == PROCESSED,
                prompts=rows_of(batches),
                flags=flags,
                all_flags=list(FLAG_SETTERS),
                tensors=str(tensors),
            )
            if "problem" in answer:
                hint = BY_NAME if loading.reference_name is None else ""
                self.problems[basis] = f"3.9.0 could not run this model: {answer['problem']}{hint}"
                continue
            # It comes with transformers.
            from safetensors import safe_open

            with safe_open(tensors, framework="pt") as file:
                self._compare(subjects, basis, file.get_tensor, list(file.keys()))
            tensors.unlink()

    def _compare(self, subjects: Sequence[OnTokens], basis: Basis, opened: Opened, keys: Sequence[str]) -> None:
        for number, subject in enumerate(subjects):
            theirs = {key.partition("|")[2]: key for key in keys if key.startswith(f"{number}|")}
            logits = opened(theirs.pop(LOGITS))
            self._note_departure(subject, basis, logits)
            seen: set[str] = set()
            with shown(subject, basis), torch.no_grad():
                self._gap(basis, LOGITS).add(subject.run(), logits)
                for _, look in looks(subject):
                    for name in [name for name in look.values if name not in seen]:
                        seen.add(name)
                        if name in theirs:
                            self._gap(basis, name).add(look[name], opened(theirs[name]))
                        else:
                            self._more.add(template(name))
            for name in theirs.keys() - seen:
                self._lacking[basis, name] = subject.model.interior.why_absent(name) or ""

    def _note_departure(self, subject: Subject, basis: Basis, logits: Tensor) -> None:
        """How far 3.9.0's own logits are from HuggingFace's; as log probabilities with processing."""
        plain = subject.plain.logits
        assert plain is not None
        mine, expected = logits.float(), plain.float().cpu()
        if basis == PROCESSED:
            mine, expected = mine.log_softmax(-1), expected.log_softmax(-1)
        self._departure.setdefault(basis, Gap()).add(mine, expected)

    def _gap(self, basis: Basis, point: str) -> Gap:
        return self._gaps.setdefault((basis, point), Gap())

    # --- what came out ------------------------------------------------------------------------------------------------

    def differences(self) -> list[Difference]:
        """One row for each point and basis, in TransformerLens' order of the points; logits come last."""
        found = []
        for (basis, point), gap in self._gaps.items():
            departure = self._departure[basis].relative
            departs = DEPARTS.format(gap=departure) if departure > self.tolerance else self._short
            excuse = departs or why_otherwise(self._model_type, template(point))
            each = Difference.of(REFERENCE, basis, point, "TransformerLens' value", gap, self.tolerance, excuse)
            found.append(each.only_shown(departs) if departs else each)
        for (basis, point), reason in self._lacking.items():
            gap = Gap()
            gap.fail(f"3.9.0 has this point, and it is not here{': ' + reason if reason else ''}")
            found.append(Difference.of(REFERENCE, basis, point, "TransformerLens' value", gap, self.tolerance, reason))
        return sorted(found, key=Difference.place)

    def promises(self) -> list[Promise]:
        """What must hold next to 3.9.0, where it could be asked."""
        differences = self.differences()
        found = []
        for basis in self.bases:
            name = f"points and logits are TransformerLens 3.9.0's, {basis}"
            if basis in self.problems:
                found.append(Promise(name, None, self.problems[basis]))
                continue
            rows = [each for each in differences if each.basis == basis]
            shown_only = next((each.reason for each in rows if each.status == "shown"), None)
            found.append(Promise(name, None, shown_only) if shown_only else promise_of(name, rows))
        return found

    def remarks(self) -> list[str]:
        """What else is to be said."""
        if not self._more:
            return []
        return [f"3.9.0 has no {', '.join(sorted(self._more))} on this model."]
