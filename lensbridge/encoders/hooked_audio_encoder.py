"""`HookedAudioEncoder`: TransformerLens' HuBERT and wav2vec 2.0, on an unmodified HuggingFace model."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoFeatureExtractor

from ..config import HookedTransformerConfig
from ..errors import UnsupportedModelError
from .base import EncoderModel
from .loading import Wish, load

T = TypeVar("T", bound="HookedAudioEncoder")

Wave = Tensor | np.ndarray | list[float]
Frames = Float[Tensor, "batch pos d_model"]


class HookedAudioEncoder(EncoderModel):
    """A HuggingFace HuBERT or wav2vec 2.0 with TransformerLens' hook points, weights and methods.

    (TransformerLens' HookedAudioEncoder.) Made by `from_pretrained`, or from a config, with new weights. The points are
    those of the blocks; what makes frames from sound is HuggingFace's, in `to_frames`. ``processor`` is the feature
    extractor that prepares waveforms; a model made from ``hf_model`` has none until it is set.
    """

    hf_classes: ClassVar[tuple[str, ...]] = ("HubertModel", "Wav2Vec2Model")

    def __init__(
        self,
        cfg: HookedTransformerConfig | dict,
        move_to_device: bool = True,
        model_name: str = "facebook/hubert-base-ls960",
        **kwargs: Any,
    ) -> None:
        """A model with new weights, of the sizes in ``cfg``.

        Args:
            cfg: the config, or a dict of its fields.
            move_to_device: whether to move it to ``cfg.device``.
            model_name: where a feature extractor can be loaded from when a waveform first needs one.
            kwargs: ``hf_model``: a HF model to run instead of a new one.

        Raises:
            UnknownArgumentError: (a TypeError) for another keyword.
        """
        super().__init__(cfg, move_to_device, kwargs)
        self.model_name = model_name
        self.processor: Any = None

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: Any = None,
        device: str | None = None,
        move_to_device: bool = True,
        dtype: torch.dtype = torch.float32,
        **from_pretrained_kwargs: Any,
    ) -> Any:
        """Load a model.

        Args:
            model_name: a TransformerLens name or alias, any hub id of a HuBERT or wav2vec 2.0, or a local directory.
            checkpoint_index, checkpoint_value: refused: there are no numbered checkpoints.
            hf_model: a loaded HuggingFace model, used as it is, with its dtype, device and attention implementation.
            device: where to put the model; cuda if there is one.
            move_to_device: False leaves the loaded model on the CPU.
            dtype: a torch dtype or its name.
            from_pretrained_kwargs: for HuggingFace's ``from_pretrained`` (``revision``, ``cache_dir``, ...).

        Raises:
            ModelNotFoundError: (an OSError) the name leads to no checkpoint.
            UnsupportedModelError: (a ValueError) it is none of these models, or one whose norms stand before attention.
            UnknownArgumentError: (a TypeError) an argument that nothing would read.
        """
        checkpoint = checkpoint_index if checkpoint_value is None else checkpoint_value
        wish = Wish(model_name, hf_model, device, move_to_device, dtype, checkpoint, from_pretrained_kwargs)
        loaded, cfg = load(wish, cls.hf_classes, cls.__name__)
        assert cfg.tokenizer_name is not None
        model = cls(cfg, move_to_device=False, model_name=cfg.tokenizer_name, hf_model=loaded)
        try:
            model.processor = AutoFeatureExtractor.from_pretrained(model.model_name)
        except (OSError, ValueError, KeyError):
            logging.warning(
                "no feature extractor at %r: the model takes frames only. Set model.processor for waveforms.",
                model.model_name,
            )
        print(f"Loaded pretrained model {model_name} into {cls.__name__}")
        return model

    @property
    def hubert_model(self) -> Any:
        """The HuggingFace model, under TransformerLens' name for it."""
        return self.hf_model

    # --- running ------------------------------------------------------------------------------------------------------

    def to_frames(
        self, raw_inputs: Tensor | np.ndarray | list[Wave], sampling_rate: int = 16000, move_to_device: bool = True
    ) -> tuple[Frames, Int[Tensor, "batch pos"] | None]:
        """(frames, attention mask) of waveforms: what the convolutions and the projection behind them make of sound.

        Args:
            raw_inputs: a waveform, or a list of waveforms; channels are averaged.
            sampling_rate: samples per second.
            move_to_device: whether to move them to the model's device.

        Raises:
            TypeError: for something else than waveforms.
            UnsupportedModelError: (a ValueError) the model has no feature extractor.
        """
        if not isinstance(raw_inputs, (Tensor, np.ndarray, list)):
            raise TypeError(f"a waveform is a tensor or an array, or there is a list of them; got {type(raw_inputs)}")
        if self.processor is None:
            raise UnsupportedModelError(
                "this model has no feature extractor, so it takes frames only: set model.processor, for example to "
                "transformers.Wav2Vec2FeatureExtractor()"
            )
        waves = [_mono(wave) for wave in (raw_inputs if isinstance(raw_inputs, list) else [raw_inputs])]
        prepared = self.processor(
            waves, sampling_rate=sampling_rate, return_tensors="pt", padding=True, return_attention_mask=True
        )
        samples, mask = prepared["input_values"].to(self.cfg.dtype), prepared.get("attention_mask")
        if move_to_device:
            samples = samples.to(self.cfg.device)
            mask = None if mask is None else mask.to(self.cfg.device)
        hf_model = self.hf_model
        with torch.no_grad():
            features = hf_model.feature_extractor(samples).transpose(1, 2)
            frames = hf_model.feature_projection(features)
        if mask is not None:
            mask = hf_model._get_feature_vector_attention_mask(features.shape[1], mask).long()
        # wav2vec 2.0 returns the normed features, too.
        return frames[0] if isinstance(frames, tuple) else frames, mask

    def encoder_output(self, frames: Frames, one_zero_attention_mask: Int[Tensor, "batch pos"] | None = None) -> Frames:
        """The residual stream after the last block.

        Args:
            frames: frames.
            one_zero_attention_mask: 1 for frames to attend to, 0 for padding.
        """
        # HuggingFace sets padded frames to zero in place, which must not reach the caller's.
        inputs = {"hidden_states": frames.to(self.cfg.device)}
        if one_zero_attention_mask is not None:
            mask = one_zero_attention_mask.to(self.cfg.device).bool()
            inputs = {"hidden_states": inputs["hidden_states"].masked_fill(~mask.unsqueeze(-1), 0.0)}
            inputs["attention_mask"] = mask
        return self.run_hf("encoder", inputs).last_hidden_state

    def forward(
        self,
        inputs: Tensor | np.ndarray | list[Wave] | tuple[Tensor, Tensor],
        one_zero_attention_mask: Int[Tensor, "batch pos"] | None = None,
        sampling_rate: int = 16000,
        move_to_device: bool = True,
    ) -> Frames:
        """The residual stream after the last block.

        Args:
            inputs: a waveform, a list of waveforms, frames ``[batch, pos, d_model]``, or (frames, attention mask).
            one_zero_attention_mask: 1 for frames to attend to, 0 for padding; waveforms bring their own.
            sampling_rate: of waveforms, in samples per second.
            move_to_device: whether to move them to the model's device.
        """
        mask = None
        if isinstance(inputs, tuple):
            frames, mask = inputs
        elif isinstance(inputs, Tensor) and inputs.ndim == 3:
            frames = inputs
        else:
            frames, mask = self.to_frames(inputs, sampling_rate, move_to_device)
        return self.encoder_output(frames, mask if one_zero_attention_mask is None else one_zero_attention_mask)


def _mono(wave: Any) -> np.ndarray:
    """A waveform as ``[samples]``; the shorter axis is that of channels."""
    if not isinstance(wave, (Tensor, np.ndarray, list)):
        raise TypeError(f"a waveform is a tensor, an array or a list of floats, not a {type(wave).__name__}")
    samples = wave.detach().cpu().numpy() if isinstance(wave, Tensor) else np.asarray(wave)
    if samples.ndim > 1:
        samples = samples.mean(axis=1) if samples.shape[1] <= samples.shape[0] else samples.reshape(-1)
    return samples.astype(np.float32, copy=False)
