"""What does every component of a model need to know of it?

The part of a model's description that `HookedTransformerConfig` (`config.py`) and `TransformerBridgeConfig`
(`bridge_config.py`) have in common. A field that says "not set" (-1 or None) is filled in after construction; the
comment at the field tells by what.
"""

from __future__ import annotations

import inspect
import pprint
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class TransformerLensConfig:
    """The part of a model's description that every component needs (TransformerLens' class of the same name).

    Raises:
        ValueError: ``n_heads`` is not given and ``d_head`` does not divide ``d_model``.
    """

    #: Width of the residual stream.
    d_model: int
    #: Width of one attention head.
    d_head: int
    #: Number of blocks.
    n_layers: int
    #: Longest input, in tokens.
    n_ctx: int
    #: Number of query heads; -1: ``d_model // d_head``.
    n_heads: int = -1
    #: Number of neurons in an MLP; None: ``4 * d_model`` (also where there is no MLP).
    d_mlp: int | None = None
    #: Size of the input vocabulary; -1: taken from the tokenizer when the model is built.
    d_vocab: int = -1
    #: Where the weights live; None: "cuda" if there is one, else "cpu".
    device: str | None = None
    #: Whether ``attn.hook_result`` (each head's own output) exists.
    use_attn_result: bool = False
    #: Whether ``hook_q_input``, ``hook_k_input`` and ``hook_v_input`` exist.
    use_split_qkv_input: bool = False
    #: Whether a text gets a BOS token when the caller does not say.
    default_prepend_bos: bool = True
    #: "standard" (learned, added to the stream), "rotary", "alibi", "shortformer" or "relative_positional_bias".
    positional_embedding_type: str = "standard"
    #: Number of key and value heads under grouped-query attention; None: as many as query heads.
    n_key_value_heads: int | None = None
    #: Whether the blocks have no MLP.
    attn_only: bool = False
    #: Whether the MLP is ``act(x @ W_gate) * (x @ W_in)``.
    gated_mlp: bool = False
    #: Whether norms are RMS norms; ``normalization_type`` is what decides here.
    uses_rms_norm: bool = False
    #: Added to the variance in every norm.
    eps: float = 1e-5
    #: Whether norm weights were folded; ``normalization_type`` is what decides here.
    layer_norm_folding: bool = False
    #: Name of the MLP's activation function.
    act_fn: str = "relu"
    #: "LN", "RMS", "LNPre" and "RMSPre" (the same without gain and bias), or None.
    normalization_type: str | None = "LN"
    #: Number of experts in a mixture-of-experts MLP.
    num_experts: int | None = None
    #: Number of experts that each token is sent to.
    experts_per_token: int | None = None
    #: Whether the last norm is an RMS norm although the others are not.
    final_rms: bool = False
    #: Type of the weights.
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.n_heads == -1:
            if self.d_model % self.d_head != 0:
                raise ValueError(
                    f"d_model ({self.d_model}) must be divisible by d_head ({self.d_head}) when n_heads is not given."
                )
            self.n_heads = self.d_model // self.d_head
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model

    @classmethod
    def unwrap(cls, config: dict[str, Any] | TransformerLensConfig) -> TransformerLensConfig:
        """The config itself, or a :class:`TransformerLensConfig` made from a dict of fields."""
        return TransformerLensConfig.from_dict(config) if isinstance(config, dict) else config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> TransformerLensConfig:
        """A config from a dict, which may hold more than this class has fields: the rest is left out."""
        accepted = {name for each in (cls, *_passed_on(cls)) for name in inspect.signature(each).parameters}
        return cls(**{name: value for name, value in config_dict.items() if name in accepted})

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as a new dict."""
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return "TransformerLensConfig:\n" + pprint.pformat(self.to_dict())


def _passed_on(cls: type) -> list[type]:
    """The classes whose fields ``cls`` takes too, because its constructor passes unknown keywords on to theirs."""
    kinds = [parameter.kind for parameter in inspect.signature(cls).parameters.values()]
    return [TransformerLensConfig] if inspect.Parameter.VAR_KEYWORD in kinds else []
