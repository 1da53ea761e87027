"""How does one forward pass after another make a text longer?

A `Decoding` holds the text so far and HuggingFace's own key-value cache, which stays in HF's layout from step to step:
nothing is converted unless somebody listens. Which token comes next and when to stop are two small rules beside it,
TransformerLens' `sample_logits` and its treatment of rows that have finished.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .engine import Request
from .engine.memory import Memory
from .errors import EMBEDDINGS_ALONE, UnsupportedModelError
from .generation_cache import GenerationRecording
from .hook_points import HookPoint
from .inputs import refuse_too_long, span_of
from .tokens import as_batch
from .utilities.logits_utils import sample_logits
from .utilities.tensors import get_offset_position_ids
from .utilities.tokenize_utils import get_attention_mask

#: The points that show the logits, or what they are made of, at every position.
LOGIT_POINTS = "unembed."


@dataclass
class Prompt:
    """What a generation starts from: tokens or embeddings (the other is None), and 0 in ``mask`` where padding is."""

    tokens: Int[Tensor, "batch pos"] | None
    embeds: Float[Tensor, "batch pos d_model"] | None = None
    mask: Int[Tensor, "batch pos"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, pos)."""
        given = self.tokens if self.tokens is not None else self.embeds
        assert given is not None
        return given.shape[0], given.shape[1]


def prompt_of(model: Any, input: Any) -> Prompt:
    """The prompt that an input of ``generate`` stands for; BOS default and padding side are already the model's.

    Raises:
        AssertionError: text without a tokenizer.
        IndexError: a tensor of another rank than 2 (tokens) or 3 (embeddings), or without a position.
    """
    side = None if model.tokenizer is None else model.tokenizer.padding_side
    if isinstance(input, Tensor):
        if input.dim() == 3:
            prompt = Prompt(None, input.to(model.cfg.device))
        elif input.dim() == 2:
            prompt = Prompt(as_batch(input).to(model.cfg.device))
        else:
            raise IndexError(
                "generation starts from tokens [batch, pos] or embeddings [batch, pos, d_model], not from a tensor of "
                f"shape {tuple(input.shape)}; one text of tokens is tokens[None]"
            )
    else:
        if isinstance(input, list) and not input:
            raise IndexError("the list of prompts is empty: generation starts from a text or a list of texts")
        # What is generated stands at the end, so a batch of texts is padded at the beginning.
        if isinstance(input, list) and len(input) > 1:
            side = "left"
        prompt = Prompt(model.to_tokens(input, padding_side=side))
    if not prompt.shape[1]:
        raise IndexError("the prompt has no token to go on from: give some text, or prepend_bos=True")
    if prompt.tokens is not None and model.tokenizer is not None:
        prompt.mask = _padding_mask(model.tokenizer, prompt.tokens, model.cfg.default_prepend_bos, side)
    return prompt


def _padding_mask(tokenizer: Any, tokens: Tensor, prepend_bos: bool, side: str | None) -> Tensor | None:
    """0 for padding and 1 for text; None if there is no padding."""
    mask = get_attention_mask(tokenizer, tokens, prepend_bos, side)
    # Padding makes rows as long as the longest, so where all of them end in the pad token, it is text: an EOS, or BOS.
    if side == "left":
        mask[:, -1] = 1
    elif not mask[:, -1].any():
        return None
    return None if mask.all() else mask


def _no_tokens(prompt: Prompt) -> Int[Tensor, "batch 0"]:
    assert prompt.embeds is not None
    return torch.empty(prompt.shape[0], 0, dtype=torch.long, device=prompt.embeds.device)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, as `sample_logits` names it; greedily without ``do_sample``."""

    do_sample: bool
    top_k: int | None
    top_p: float | None
    temperature: float
    freq_penalty: float

    def draw(self, logits: Float[Tensor, "batch d_vocab"], text: Tensor | None) -> Int[Tensor, " batch"]:
        """The next token of each row; ``text`` is what the frequency penalty counts."""
        if not self.do_sample:
            return logits.argmax(-1)
        return sample_logits(
            logits,
            top_k=self.top_k,
            top_p=self.top_p,
            temperature=self.temperature,
            freq_penalty=self.freq_penalty if text is not None else 0.0,
            tokens=text,
        )


class Ending:
    """When a generation stops: as soon as every row has come to a stop token. Rows that wait are filled up."""

    def __init__(self, stop_tokens: Sequence[int], filler: int, batch: int, device: Any) -> None:
        self.stop_tokens = torch.tensor(list(stop_tokens), dtype=torch.long, device=device)
        self.filler = filler
        self.finished: Bool[Tensor, " batch"] = torch.zeros(batch, dtype=torch.bool, device=device)

    @classmethod
    def of(cls, model: Any, stop_at_eos: bool, eos_token_id: int | Sequence[int] | None, batch: int) -> Ending | None:
        """TransformerLens' rule, or None to go on to ``max_new_tokens``.

        Raises:
            AssertionError: no EOS token is known.
        """
        if not stop_at_eos:
            return None
        own = None if model.tokenizer is None else model.tokenizer.eos_token_id
        given = own if eos_token_id is None else eos_token_id
        if isinstance(given, str):
            raise TypeError(f"eos_token_id takes token ids, not a text: pass model.to_single_token({given!r})")
        if given is None:
            raise AssertionError(
                "stop_at_eos needs to know the EOS token, and the model has no tokenizer with one: pass eos_token_id="
                " or stop_at_eos=False"
            )
        if isinstance(given, int):
            return cls([given], given, batch, model.cfg.device)
        return cls(given, given[0] if own is None else own, batch, model.cfg.device)

    def to(self, device: torch.device) -> None:
        """Go on on a device."""
        self.stop_tokens, self.finished = self.stop_tokens.to(device), self.finished.to(device)

    def fill(self, new: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The new tokens, with the filler in rows that had finished; notes the rows that finish now."""
        new = torch.where(self.finished, self.filler, new)
        self.finished |= torch.isin(new, self.stop_tokens)
        return new

    @property
    def reached(self) -> bool:
        """Whether every row has finished."""
        return bool(self.finished.all())


class Decoding:
    """The text so far, and the forward pass that says how it may go on."""

    def __init__(
        self, model: Any, prompt: Prompt, use_past_kv_cache: bool, recording: GenerationRecording | None = None
    ) -> None:
        if model.interior.no_text is not None:
            raise UnsupportedModelError(f"no text can be generated with this model: {model.interior.no_text}")
        if prompt.tokens is None and model.interior.adds_more_than_embeddings:
            raise UnsupportedModelError(EMBEDDINGS_ALONE)
        self.model = model
        self.prompt = prompt
        self.recording = recording
        #: The new tokens, [batch, 1] each.
        self.new: list[Tensor] = []
        #: Prompt and new tokens, or new tokens only where the prompt is embeddings.
        self.text = prompt.tokens if prompt.tokens is not None else _no_tokens(prompt)
        self._mask = prompt.mask
        self._memory = Memory(model.hf_model, use_past_kv_cache and model.interior.key_value_cache != "none")
        self._span = span_of(model.cfg.n_layers, None, None, "logits")
        parameters = inspect.signature(model.hf_model.forward).parameters
        self._can_keep_last = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters

    def to(self, device: torch.device) -> None:
        """Go on on a device."""
        self.text = self.text.to(device)
        self._mask = None if self._mask is None else self._mask.to(device)

    @property
    def length(self) -> int:
        """How many positions the text has so far."""
        return self.prompt.shape[1] + len(self.new)

    def append(self, new: Int[Tensor, " batch"]) -> None:
        """Make the text one token longer."""
        new = new.unsqueeze(-1)
        self.new.append(new)
        self.text = torch.cat([self.text, new], dim=1)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(new)], dim=1)

    def embeds(self) -> Float[Tensor, "batch pos d_model"]:
        """The text so far as embeddings."""
        if self.prompt.embeds is None:
            return self.model.embed(self.text)
        return torch.cat([self.prompt.embeds, *(self.model.embed(new) for new in self.new)], dim=1)

    def next_logits(self) -> Float[Tensor, "batch d_vocab"]:
        """Run the positions that have not been run (all of them without key-value cache); the last one's logits.

        Raises:
            IndexError: the text is longer than the context.
        """
        past = self.length - 1 if self._memory.name is not None and self.new else 0
        inputs = self._memory.inputs()
        if self._mask is not None and self._memory.sees_mask(past):
            counted = get_offset_position_ids(past, self._mask)
            inputs |= {"attention_mask": self._mask, "position_ids": counted + self.model.interior.counts_from}
            refuse_too_long(self.length, counted, self.model.interior.n_positions)
        else:
            if past and self._takes_positions:
                # As HF's generate does: where layer 0 has no keys, the model may count from there and miss the past.
                inputs["position_ids"] = torch.full((self.prompt.shape[0], 1), past, device=self.text.device)
            refuse_too_long(self.length, None, self.model.interior.n_positions)
        with self.model._turn(), self._announced(past), self._memory.kept():
            listeners = self.model._listeners()
            if self._only_last_logits_matter(listeners):
                inputs["logits_to_keep"] = 1
            request = self._request(inputs, past, listeners)
            return self.model.interior.engine.run(request, listeners, self.recording)[:, -1]

    def _request(self, inputs: dict[str, Any], past: int, listeners: Mapping[str, nn.Module]) -> Request:
        if past or self.prompt.embeds is None:
            new_only = past and self.model.interior.key_value_cache == "new tokens"
            inputs["input_ids"] = self.text[:, -1:] if new_only else self.text
            return Request(inputs, self._span)
        residual = self._shown("hook_embed", self.embeds(), listeners)
        kind = self.model.cfg.positional_embedding_type
        if kind in ("standard", "shortformer"):
            tokens = torch.zeros(residual.shape[:2], dtype=torch.long, device=residual.device)
            positions = self._shown("hook_pos_embed", self.model.pos_embed(tokens), listeners)
            if kind == "standard":
                residual = residual + positions
            else:
                inputs["shortformer_pos_embed"] = positions
        inputs["inputs_embeds"] = residual
        return Request(inputs, span_of(self.model.cfg.n_layers, 0, None, "logits"), residual)

    def _shown(self, name: str, value: Tensor, listeners: Mapping[str, nn.Module]) -> Tensor:
        """What the hooks at a point before the blocks make of a value that does not come from the HF model."""
        if name in listeners:
            value = listeners[name](value.clone())
        if self.recording is not None and name in self.recording.names:
            self.recording.keep(name, value)
        return value

    def _only_last_logits_matter(self, listeners: Mapping[str, nn.Module]) -> bool:
        recorded = () if self.recording is None else self.recording.names
        return self._can_keep_last and not any(name.startswith(LOGIT_POINTS) for name in (*listeners, *recorded))

    @contextmanager
    def _announced(self, past: int) -> Iterator[None]:
        """While open, the model, and the cache to fill, know which step this is and which positions it runs."""
        model = self.model
        before = model.generation_step, model.generation_positions
        model.generation_step, model.generation_positions = len(self.new), range(past, self.length)
        if self.recording is not None:
            self.recording.begin(self.length - 1 if self.new else 0, self.length)
        try:
            yield
        finally:
            model.generation_step, model.generation_positions = before


@contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; modules that were in training mode are again afterwards."""
    found = (module for root in roots for module in root.modules() if not isinstance(module, HookPoint))
    training = [module for module in found if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
