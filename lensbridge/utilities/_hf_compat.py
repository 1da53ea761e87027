"""How are repositories loaded that today's transformers refuses for a formality?

Each function here knows one refusal by its message, works around exactly that one and lets every other error through.
The workarounds that change a class or a function of another package mark what they changed and never do it twice.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_TOLERANT = "_lensbridge_tolerant"

_SPECIAL_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token")


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of a loader's arguments that say which revision to read, and with what right."""
    return {key: kwargs[key] for key in ("token", "revision") if key in kwargs}


def autoconfig_with_remote_post_init_compat(model_id: str, auto_config: Any = None, **kwargs: Any) -> Any:
    """``AutoConfig.from_pretrained`` that also loads configs with code from the time of transformers 4.

    Two refusals are worked around, each by one more try: a config class whose ``__post_init__`` takes no arguments, and
    a config that names an attention implementation which cannot return attentions (the try asks for ``"eager"``).
    ``auto_config`` replaces ``transformers.AutoConfig``.
    """
    from huggingface_hub.errors import StrictDataclassError

    if auto_config is None:
        from transformers import AutoConfig

        auto_config = AutoConfig
    try:
        return auto_config.from_pretrained(model_id, **kwargs)
    except TypeError as error:
        if "__post_init__() got an unexpected keyword argument" not in str(error):
            raise
        config_class = _remote_config_class(model_id, **kwargs)
        if config_class is None:
            raise
        make_post_init_kwarg_tolerant(config_class)
        return auto_config.from_pretrained(model_id, **kwargs)
    except StrictDataclassError as error:
        if "output_attentions" not in str(error) or "attn_implementation" in kwargs:
            raise
        return auto_config.from_pretrained(model_id, attn_implementation="eager", **kwargs)


def _remote_config_class(model_id: str, **kwargs: Any) -> Any:
    """The config class that a repository brings along, or None."""
    from transformers import PretrainedConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    where = _hub_arguments(kwargs)
    stored, _ = PretrainedConfig.get_config_dict(model_id, **where)
    reference = (stored.get("auto_map") or {}).get("AutoConfig")
    return get_class_from_dynamic_module(reference, model_id, **where) if reference else None


def make_post_init_kwarg_tolerant(config_class: Any) -> None:
    """Let a config class whose ``__post_init__`` takes no arguments be given those that transformers 5 passes.

    They are first set as attributes, by the base class, since the class' own code may read them.
    """
    from transformers import PretrainedConfig

    own = config_class.__post_init__
    if hasattr(own, _TOLERANT):
        return

    @functools.wraps(own)
    def tolerant(self: Any, **extras: Any) -> None:
        PretrainedConfig.__post_init__(self, **extras)
        own(self)

    setattr(tolerant, _TOLERANT, True)
    config_class.__post_init__ = tolerant


def autotokenizer_with_special_token_compat(model_id: str, auto_tokenizer: Any = None, **kwargs: Any) -> Any:
    """``AutoTokenizer.from_pretrained`` that also loads tokenizers whose list of special tokens is refused.

    Such a repository lists tokens that its ``tokenizer.json`` already holds; that file is then loaded by itself, with a
    warning in the log. ``auto_tokenizer`` replaces ``transformers.AutoTokenizer``.
    """
    if auto_tokenizer is None:
        from transformers import AutoTokenizer

        auto_tokenizer = AutoTokenizer
    try:
        return auto_tokenizer.from_pretrained(model_id, **kwargs)
    except TypeError as error:
        if "special_tokens" not in str(error):
            raise
        tokenizer = _tokenizer_from_its_file(model_id, **kwargs)
        if tokenizer is None:
            raise
    logger.warning("The special tokens listed by %s are refused; its tokenizer.json was loaded by itself.", model_id)
    return tokenizer


def _tokenizer_from_its_file(model_id: str, **kwargs: Any) -> Any:
    """A fast tokenizer from ``tokenizer.json`` with the special tokens of the config, or None without the files."""
    from huggingface_hub import hf_hub_download
    from transformers import PreTrainedTokenizerFast

    where = _hub_arguments(kwargs)
    try:
        tokenizer_file = hf_hub_download(model_id, "tokenizer.json", **where)
        config_file = hf_hub_download(model_id, "tokenizer_config.json", **where)
    except Exception:
        # Whatever kept the files away, the caller's own error says more.
        return None
    stored = json.loads(Path(config_file).read_text(encoding="utf-8"))
    settings = {"name_or_path": model_id}
    for role in _SPECIAL_TOKEN_ROLES:
        token = stored.get(role)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            settings[role] = text
    if stored.get("model_max_length"):
        settings["model_max_length"] = stored["model_max_length"]
    settings.update({key: kwargs[key] for key in ("add_bos_token", "add_eos_token") if key in kwargs})
    return PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, **settings)


def enable_hf_numeric_tower() -> None:
    """Let a config hold an int where its class declares a float (``"rope_theta": 10000``), for the rest of the process.

    huggingface_hub checks such fields with a bare ``isinstance``. A bool is still refused. Nothing happens if the check
    is not where it used to be.
    """
    from huggingface_hub import dataclasses as hub_dataclasses

    strict = getattr(hub_dataclasses, "_validate_simple_type", None)
    if strict is None or hasattr(strict, _TOLERANT):
        return

    @functools.wraps(strict)
    def tolerant(name: str, value: Any, expected_type: type) -> None:
        if not (expected_type is float and type(value) is int):
            strict(name, value, expected_type)

    setattr(tolerant, _TOLERANT, True)
    hub_dataclasses._validate_simple_type = tolerant
