"""Which inputs make a language model show its best-known circuits?

Two kinds. A block of random tokens that comes twice: only a model with induction heads predicts the second copy better
than the first (Olsson et al. 2022, *In-context Learning and Induction Heads*). And sentences with an indirect object,
"When Mary and John went to the store, John gave a drink to", where the right continuation is the name that was said
only once (Wang et al. 2022, *Interpretability in the Wild*). Nothing here belongs to one model: the words were chosen
to be single tokens, leading space included, in GPT-2's vocabulary as in that of the bundled model, and no name opens a
sentence, so that a prompt and its corrupted versions have the same number of tokens.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int

#: Common first names; the longer and rarer ones are left out because GPT-2 splits them.
NAMES: tuple[str, ...] = tuple(
    "Aaron Adam Alan Alex Alice Amanda Amy Andrew Anna Anthony Ben Bill Bob Brian Carl Carol Charles Chris Christine "
    "Dan Daniel David Diana Edward Elizabeth Emily Emma Eric Frank Fred George Grace Harry Helen Henry Jack Jacob "
    "James Jane Jason Jeff Jennifer Jessica Jim Joe John Jonathan Joseph Josh Julia Justin Karen Kate Kelly Ken Kevin "
    "Kyle Laura Lisa Louis Luke Margaret Maria Mark Martin Mary Matt Matthew Max Michael Michelle Mike Nancy Nathan "
    "Neil Nick Nicole Oliver Patrick Paul Peter Philip Rachel Rebecca Richard Robert Roger Rose Ruth Ryan Sam Sarah "
    "Scott Sean Sid Simon Sophie Stephen Steve Susan Thomas Tim Tom Tony Victoria Walter William".split()
)
PLACES: tuple[str, ...] = tuple(
    "store garden restaurant school hospital office house station park library market museum beach church hotel "
    "theater kitchen airport farm bank bridge castle".split()
)
#: Things that can follow "a", which is why none begins with a vowel.
OBJECTS: tuple[str, ...] = tuple(
    "ring kiss bone basketball computer necklace drink snack book letter ball key flower coin map gift cup watch "
    "phone picture bottle pen".split()
)

#: ``{first}`` and ``{second}`` are the two people, ``{giver}`` is the one who is named again.
TEMPLATES: tuple[str, ...] = (
    "When {first} and {second} went to the {place}, {giver} gave a {object} to",
    "Then, {first} and {second} went to the {place}. {giver} gave a {object} to",
    "After {first} and {second} left the {place}, {giver} gave a {object} to",
    "While {first} and {second} were working at the {place}, {giver} handed a {object} to",
    "When {first} and {second} had a good time at the {place}, {giver} offered a {object} to",
    "Last week {first} met {second} near the {place}, and {giver} sold a {object} to",
    "Soon {first} and {second} came back from the {place}. Later, {giver} sent a {object} to",
    "As {first} walked with {second} to the {place}, {giver} passed a {object} to",
    "The day {first} and {second} found the {place}, {giver} brought a {object} to",
    "Yesterday, {first} and {second} had lunch at the {place}. Then {giver} showed a {object} to",
    "Because {first} and {second} were late for the {place}, {giver} threw a {object} to",
    "People say that {first} helped {second} at the {place}, and that {giver} lent a {object} to",
    "In the {place}, {first} talked with {second} until {giver} promised a {object} to",
    "It was late at the {place}. Both {first} and {second} were tired, but {giver} still gave a {object} to",
    "Once {first} was alone in the {place} with {second}, {giver} took out a {object} and handed it to",
    "Inside the {place} sat {first} and {second}, and after lunch {giver} gave a {object} to",
)
#: Made of the same words, and kept out of the bundled model's training.
HELD_OUT_TEMPLATES: tuple[str, ...] = (
    "Later, {first} and {second} walked to the {place}, and {giver} handed a {object} to",
    "While {first} was at the {place} with {second}, {giver} sent a {object} to",
    "Last week, {first} and {second} came to the {place}. Then {giver} gave a {object} to",
    "After {first} talked with {second} near the {place}, {giver} brought a {object} to",
)

#: One pair of names in this many is kept out of the bundled model's training.
_HELD_OUT_EVERY = 5

Pairs = Literal["all", "train", "held_out"]
Order = Literal["ABBA", "BABA"]


def repeated_tokens(
    vocab: int | Sequence[int] | Int[torch.Tensor, "n_ids"],
    batch: int,
    half_length: int,
    bos: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[torch.Tensor, "batch pos"]:
    """Rows of uniformly random tokens in which the same block comes twice, after ``bos`` if there is one.

    ``vocab`` is the number of ids to draw from (``0 .. vocab - 1``) or the ids themselves; give the ids where special
    tokens should stay out. The result is on the CPU and has ``pos = 2 * half_length`` columns, one more with ``bos``.
    A token of the second copy stands ``half_length`` places after its first occurrence, so an induction head attends
    ``half_length - 1`` places back.

    Raises:
        ValueError: if ``half_length`` or the number of ids is not positive.
    """
    ids = torch.arange(vocab) if isinstance(vocab, int) else torch.as_tensor(vocab, dtype=torch.long).cpu()
    if half_length < 1 or ids.numel() < 1:
        raise ValueError(
            f"repeated_tokens needs at least one id and a block of at least one token; "
            f"it got {ids.numel()} ids and half_length={half_length}."
        )
    block = ids[torch.randint(ids.numel(), (batch, half_length), generator=generator)]
    start = torch.full((batch, 0 if bos is None else 1), bos or 0, dtype=torch.long)
    return torch.cat([start, block, block], dim=1)


@dataclass(frozen=True)
class IoiPrompt:
    """One indirect-object sentence, cut before its last word, with the two ways of corrupting it.

    ``io`` is the indirect object, the right answer; ``s`` is the subject, said twice. ``swapped`` names the indirect
    object as the giver instead, which makes ``s`` the right answer. ``unrelated`` has three other, different names in
    the places of the three, so that nothing tells which of the first two is the answer (the paper's ABC distribution).
    ``order`` is ABBA where the indirect object is named first, BABA where the subject is.
    """

    prompt: str
    io: str
    s: str
    swapped: str
    unrelated: str
    unrelated_names: tuple[str, str, str]
    order: Order
    template: str

    @property
    def answers(self) -> tuple[str, str]:
        """The two candidate next tokens with their leading space, the right one first: ``(" Mary", " John")``."""
        return f" {self.io}", f" {self.s}"


def is_held_out(name: str, other: str) -> bool:
    """Whether this pair of names, in either order, is kept out of the bundled model's indirect-object training."""
    # crc32, because hash() of a string differs from process to process.
    return zlib.crc32(" ".join(sorted((name, other))).encode()) % _HELD_OUT_EVERY == 0


def ioi_prompts(
    n: int,
    seed: int = 0,
    *,
    names: Sequence[str] = NAMES,
    templates: Sequence[str] = TEMPLATES,
    places: Sequence[str] = PLACES,
    objects: Sequence[str] = OBJECTS,
    pairs: Pairs = "all",
) -> list[IoiPrompt]:
    """``n`` random indirect-object prompts, ABBA and BABA in turn; the same arguments give the same prompts.

    For another model, pass the ``names`` that are one token there (with a leading space); prompts made from a single
    template then have one length wherever places and objects are single tokens too. ``pairs`` restricts the two names
    to those that the bundled model was trained on, or to those that it was not.

    Raises:
        ValueError: if there are fewer than five names, no template, or no pair of names in the asked part.
    """
    if len(set(names)) < 5 or not templates:
        raise ValueError(
            f"ioi_prompts needs at least five different names (two people and three unrelated ones) and one template; "
            f"it got {len(set(names))} names and {len(templates)} templates."
        )
    allowed = [
        (name, other)
        for name in names
        for other in names
        if name != other and (pairs == "all" or is_held_out(name, other) == (pairs == "held_out"))
    ]
    if not allowed:
        raise ValueError(f"None of the pairs of the {len(names)} names is in the {pairs!r} part; give more names.")
    rng = random.Random(seed)
    return [_one_prompt(rng, i, allowed, names, templates, places, objects) for i in range(n)]


def _one_prompt(
    rng: random.Random,
    index: int,
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    templates: Sequence[str],
    places: Sequence[str],
    objects: Sequence[str],
) -> IoiPrompt:
    io, s = rng.choice(pairs)
    template, place, thing = rng.choice(templates), rng.choice(places), rng.choice(objects)
    order: Order = "ABBA" if index % 2 == 0 else "BABA"
    first, second = (io, s) if order == "ABBA" else (s, io)
    others = rng.sample([name for name in dict.fromkeys(names) if name not in (io, s)], 3)

    def fill(first: str, second: str, giver: str) -> str:
        return template.format(first=first, second=second, giver=giver, place=place, object=thing)

    return IoiPrompt(
        prompt=fill(first, second, s),
        io=io,
        s=s,
        swapped=fill(first, second, io),
        unrelated=fill(*others),
        unrelated_names=(others[0], others[1], others[2]),
        order=order,
        template=template,
    )
