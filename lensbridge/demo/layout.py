"""Where in its tokens does an indirect-object prompt name people, and which prompts are laid out alike?

Averages over prompts by position are only meaningful where a position means the same thing in each of them. So
prompts are tokenized, checked (each name must be one token of this model, the indirect object there once, the subject
twice) and put into groups of equal length with the names in the same places.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int

from lensbridge.assets.prompts import NAMES, IoiPrompt

if TYPE_CHECKING:
    from lensbridge.model import HookedTransformer

#: What stands at the three places where a prompt names somebody, in order of appearance.
ROLES = ("1st name", "2nd name", "giver (S2)")


@dataclass(frozen=True)
class PromptGroup:
    """Prompts of one length, with names in the same places, as tokens.

    ``clean`` and ``swapped`` differ only at the giver: in ``swapped`` it is the indirect object, so that ``s``
    becomes the right answer. ``io`` and ``s`` are the answers' token ids. ``name_positions`` are the places of the
    three roles.
    """

    prompts: list[IoiPrompt]
    clean: Int[torch.Tensor, "batch pos"]
    swapped: Int[torch.Tensor, "batch pos"]
    io: Int[torch.Tensor, " batch"]
    s: Int[torch.Tensor, " batch"]
    name_positions: tuple[int, int, int]
    position_labels: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, limit: int) -> PromptGroup:
        """The group with its first ``limit`` prompts only."""
        rows = {name: getattr(self, name)[:limit] for name in ("prompts", "clean", "swapped", "io", "s")}
        return replace(self, **rows)


def name_token(model: HookedTransformer, name: str) -> int | None:
    """The id of ``name`` inside a sentence (behind a space), or None where this model needs several tokens for it."""
    before = model.to_tokens("and", prepend_bos=False)[0].tolist()
    tokens = model.to_tokens(f"and {name}", prepend_bos=False)[0].tolist()
    # Comparing with the text before it is right for every tokenizer; " Mary" alone is two tokens in some.
    return tokens[-1] if tokens[:-1] == before else None


def single_token_names(model: HookedTransformer, names: Iterable[str] = NAMES) -> dict[str, int]:
    """The names that are one token for this model, with their ids."""
    ids = {name: name_token(model, name) for name in names}
    return {name: token for name, token in ids.items() if token is not None}


def group_prompts(model: HookedTransformer, prompts: Sequence[IoiPrompt], names: dict[str, int]) -> list[PromptGroup]:
    """The usable prompts, in groups of one layout, the largest group first. ``names`` gives the tokens of the names."""
    rows: dict[tuple[int, ...], list[tuple[IoiPrompt, list[int], list[int]]]] = defaultdict(list)
    for prompt in prompts:
        clean, swapped = (model.to_tokens(text)[0].tolist() for text in (prompt.prompt, prompt.swapped))
        io, s = names[prompt.io], names[prompt.s]
        places = [position for position, token in enumerate(clean) if token in (io, s)]
        changed = [position for position, pair in enumerate(zip(clean, swapped, strict=False)) if pair[0] != pair[1]]
        named_as_meant = sorted(clean[position] for position in places) == sorted((io, s, s))
        if len(clean) == len(swapped) and named_as_meant and changed == places[2:]:
            layout = (len(clean), *places)
            rows[layout].append((prompt, clean, swapped))
    ordered = sorted(rows.items(), key=lambda item: -len(item[1]))
    return [_group(model, names, layout[1:], members) for layout, members in ordered]


def _group(
    model: HookedTransformer,
    names: dict[str, int],
    places: tuple[int, ...],
    members: list[tuple[IoiPrompt, list[int], list[int]]],
) -> PromptGroup:
    device = model.cfg.device
    prompts = [prompt for prompt, _, _ in members]
    clean = torch.tensor([row for _, row, _ in members], device=device)
    return PromptGroup(
        prompts=prompts,
        clean=clean,
        swapped=torch.tensor([row for _, _, row in members], device=device),
        io=torch.tensor([names[prompt.io] for prompt in prompts], device=device),
        s=torch.tensor([names[prompt.s] for prompt in prompts], device=device),
        name_positions=(places[0], places[1], places[2]),
        position_labels=_position_labels(model, clean, places),
    )


def _position_labels(model: HookedTransformer, rows: torch.Tensor, places: tuple[int, ...]) -> list[str]:
    """The token where all rows agree, the role where a name stands, "[noun]" where the filled-in words differ."""
    labels = []
    for position, token in enumerate(model.to_str_tokens(rows[0])):
        if position in places:
            labels.append(ROLES[places.index(position)])
        else:
            labels.append(
                token.strip() or repr(token) if bool((rows[:, position] == rows[0, position]).all()) else "[noun]"
            )
    labels[-1] = f"{labels[-1]} (END)"
    return labels
