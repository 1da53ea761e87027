"""How does a model write text, with its hooks acting on every token, and how is that kept in one cache?

`generate` and `generate_stream` take TransformerLens' arguments and give its results; the loop of forward passes below
them is `decoding`, and `generation_cache` makes one cache of all passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .activation_cache import ActivationCache
from .decoding import Decoding, Ending, Sampling, evaluating, prompt_of
from .errors import UnknownArgumentError
from .generation_cache import GenerationRecording
from .hook_points import NamesFilter
from .hooked_root_module import CachingHook, NamedHook
from .tokens import PaddingSide
from .utilities.defaults_utils import USE_DEFAULT_VALUE, LocallyOverridenDefaults
from .utilities.slice import Slice, SliceInput

RETURN_TYPES = ("input", "str", "tokens", "embeds")
#: The keyword arguments of HuggingFace's ``generate`` that ours knows.
HF_ARGUMENTS = ("output_logits", "return_dict_in_generate")


class GenerationMethods:
    """Writing text, as methods of a model that can run, be hooked, and turn text into tokens."""

    cfg: Any
    hf_model: Any
    interior: Any
    required_tokenizer: Any
    hooks: Any
    get_caching_hooks: Any
    _foreign: Any

    #: While a generation runs the model: which step this is, 0 for the prompt and then 1, 2, ...; otherwise None.
    generation_step: int | None = None
    #: While a generation runs the model: the positions of the text that this step runs; otherwise None.
    generation_positions: range | None = None

    @torch.no_grad()
    def generate(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"] | Float[Tensor, "batch pos hidden_size"] = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: PaddingSide = USE_DEFAULT_VALUE,
        return_type: str | None = "input",
        verbose: bool = True,
        *,
        fwd_hooks: Sequence[NamedHook] = (),
        return_cache: bool = False,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        pos_slice: Slice | SliceInput | None = None,
        remote: bool | str | None = None,
        **generation_kwargs: Any,
    ) -> Any:
        """Go on from a prompt, token by token, with the model's hooks acting on each forward pass.

        The first pass runs the prompt and each later one the newest token (with ``use_past_kv_cache=False``: the whole
        text). Hooks can read ``model.generation_step`` and ``model.generation_positions`` to know where they are.

        Args:
            input: a text, several texts (padded on the left), tokens ``[batch, pos]``, or token embeddings ``[batch,
                pos, d_model]``, to which the model adds positions.
            max_new_tokens: stop after this many tokens.
            stop_at_eos: stop earlier if every row has come to an EOS token; rows that wait are filled with it.
            eos_token_id: the token or tokens to stop at; None for the tokenizer's.
            do_sample: draw tokens from the distribution; False takes the most probable token.
            top_k, top_p, temperature, freq_penalty: as for `sample_logits`. Embeddings know no frequencies.
            use_past_kv_cache: keep keys and values, so that no position is run twice.
            prepend_bos, padding_side: override the model's and the tokenizer's defaults for this call. ``padding_side``
                says where tokens that are given are padded.
            return_type: "str" (without special tokens), "tokens", "embeds", or "input" for the kind of the input.
            verbose: show a progress bar.
            fwd_hooks: pairs of (name or predicate on names, hook), attached for this generation.
            return_cache: return (result, cache): an `ActivationCache` of every position that was run, which are all but
                the last token. It is what `run_with_cache` gives on these tokens, as far as hooks did the same at each
                step; a position's activations are those of the step that ran it first.
            names_filter, device, pos_slice: as for `run_with_cache`, with ``return_cache``.
            remote: as for ``forward``; all of the text is one job.
            generation_kwargs: ``output_logits=True`` returns HuggingFace's ``GenerateDecoderOnlyOutput`` with
                ``sequences`` and ``logits``, one ``[batch, d_vocab]`` per new token. ``return_dict_in_generate``
                changes nothing, anything else is ignored with a warning.

        Returns:
            The prompt and what follows; of an embedded prompt, tokens and text are the new ones only. One text is a
            string, several are a list.

        Raises:
            AssertionError: an input, ``return_type`` or sampling argument of a wrong kind; text without a tokenizer; no
                EOS token to stop at.
            IndexError: an empty prompt, a tensor of another rank, or a text that outgrows the context.
            ValueError: ``max_new_tokens`` is less than 1.
            UnknownArgumentError: (a TypeError) an argument for the cache without ``return_cache``.
        """
        given = {"names_filter": names_filter, "device": device, "pos_slice": pos_slice}
        _refuse_unread({} if return_cache else given, "return_cache=True")
        return_type = _kind_of_result(input, return_type)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        output_logits = _read_hf_arguments(generation_kwargs)
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            prompt = prompt_of(self, input)
            if prompt.tokens is None and freq_penalty:
                warnings.warn("freq_penalty has no effect on a prompt of embeddings", stacklevel=3)
            sampling = Sampling(do_sample, top_k, top_p, temperature, freq_penalty)
            ending = Ending.of(self, stop_at_eos, eos_token_id, prompt.shape[0])
            recording = self._recording_of(names_filter, device) if return_cache else None
            decoding = Decoding(self, prompt, use_past_kv_cache, recording)
            attached = [*fwd_hooks, *self._hooks_of(recording)]
            hooks = self.hooks(attached) if attached or return_cache else nullcontext()
            with self.interior.running(remote) as engine, hooks:
                if engine.elsewhere:
                    from .jobs import generate

                    steps = generate(self, decoding, sampling, ending, max_new_tokens, output_logits)
                else:
                    steps = list(self._steps(decoding, sampling, ending, max_new_tokens, verbose, output_logits))
        result = self._result(decoding, return_type)
        if output_logits:
            result = GenerateDecoderOnlyOutput(sequences=decoding.text, logits=tuple(steps))  # type: ignore[arg-type]
        if recording is None:
            return result
        cached = CachingHook({}, None, False, None if pos_slice is None else Slice.unwrap(pos_slice))
        recording.joined(cached.keep)
        model: Any = self
        return result, ActivationCache(cached.cache, model)

    @torch.no_grad()
    def generate_stream(
        self,
        input: str | Int[Tensor, "batch pos"] = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: PaddingSide = USE_DEFAULT_VALUE,
        return_type: str | None = "input",
        verbose: bool = True,
    ) -> Iterator[Int[Tensor, "batch new_pos"]]:
        """`generate`, handing over tokens while it goes on.

        Yields tokens ``[batch, new_pos]``, whatever ``return_type`` says: as soon as there are ``max_tokens_per_yield``
        of them since the last time, and what is left at the end. The first ones include the prompt, which counts.
        Arguments are those of `generate`, but for several texts and embeddings.

        Raises:
            AssertionError: the input is neither a text nor a tensor; further as `generate`.
            ValueError: the input is a tensor of another rank than 2.
        """
        if not isinstance(input, (str, Tensor)):
            raise AssertionError(f"generate_stream takes a text or tokens, not {type(input).__name__}")
        if isinstance(input, Tensor) and input.dim() != 2:
            raise ValueError(f"generate_stream takes tokens of shape [batch, pos], not {tuple(input.shape)}")
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            prompt = prompt_of(self, input)
        sampling = Sampling(do_sample, top_k, top_p, temperature, freq_penalty)
        ending = Ending.of(self, stop_at_eos, eos_token_id, prompt.shape[0])
        decoding = Decoding(self, prompt, use_past_kv_cache)
        handed_over = 0
        for _ in self._steps(decoding, sampling, ending, max_new_tokens, verbose):
            if decoding.length - handed_over >= max_tokens_per_yield:
                yield decoding.text[:, handed_over:]
                handed_over = decoding.length
        if decoding.new and handed_over < decoding.length:
            yield decoding.text[:, handed_over:]

    def _steps(
        self,
        decoding: Decoding,
        sampling: Sampling,
        ending: Ending | None,
        max_new_tokens: int,
        verbose: bool,
        with_logits: bool = False,
    ) -> Iterator[Float[Tensor, "batch d_vocab"] | None]:
        """Make the text longer, one token per item; an item is the logits behind it, if they are asked for."""
        counts = decoding.prompt.tokens is not None
        with evaluating(self, self.hf_model):  # type: ignore[arg-type]
            for _ in tqdm(range(max_new_tokens), disable=not verbose):
                logits = decoding.next_logits()
                new = sampling.draw(logits, decoding.text if counts else None).to(self.cfg.device)
                decoding.append(new if ending is None else ending.fill(new))
                # A clone, because a slice would keep the logits of the whole prompt.
                yield logits.clone() if with_logits else None
                if ending is not None and ending.reached:
                    break

    def _result(self, decoding: Decoding, return_type: str) -> Any:
        if return_type == "embeds":
            return decoding.embeds()
        if return_type == "tokens":
            return decoding.text
        tokenizer = self.required_tokenizer()
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in decoding.text]
        return texts[0] if len(texts) == 1 else texts

    def _recording_of(self, names_filter: NamesFilter, device: torch.device | str | None) -> GenerationRecording:
        _, chosen, _ = self.get_caching_hooks(names_filter)
        return GenerationRecording((name for name, _ in chosen), device)

    def _hooks_of(self, recording: GenerationRecording | None) -> list[NamedHook]:
        """Hooks for the points to be cached that are in modules of the user's, which the engine does not see."""
        names = () if recording is None else recording.names
        return [(name, recording) for name in names if name in self._foreign and recording is not None]


def _kind_of_result(input: Any, return_type: str | None) -> str:
    """ "str", "tokens" or "embeds".

    Raises:
        AssertionError: for another ``return_type``, or input of a wrong kind.
    """
    texts = isinstance(input, list) and all(isinstance(text, str) for text in input)
    if not (texts or isinstance(input, (str, Tensor))):
        raise AssertionError(f"generate takes a text, a list of texts or a tensor, not {type(input).__name__}")
    if return_type not in RETURN_TYPES:
        raise AssertionError(f"return_type must be one of {', '.join(RETURN_TYPES)}, not {return_type!r}")
    if return_type != "input":
        return return_type
    if not isinstance(input, Tensor):
        return "str"
    return "tokens" if input.dim() == 2 else "embeds"


def _read_hf_arguments(given: dict[str, Any]) -> bool:
    """Whether logits are asked for; warns of arguments that nothing reads."""
    unknown = [name for name in given if name not in HF_ARGUMENTS]
    if unknown:
        warnings.warn(f"generate ignores {', '.join(unknown)}: TransformerLens has no such argument", stacklevel=4)
    return bool(given.get("output_logits", False))


def _refuse_unread(given: dict[str, Any], reader: str) -> None:
    unread = [name for name, value in given.items() if value is not None]
    if unread:
        raise UnknownArgumentError(f"{', '.join(unread)}: nothing reads this without {reader}")
