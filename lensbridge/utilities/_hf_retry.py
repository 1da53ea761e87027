"""What to do when the HuggingFace Hub answers "too many requests"?

Wait as long as the answer says, or else longer each time, and try again. Only HTTP 429 is waited for; every other error
reaches the caller at once. An error is recognised by its ``response``, so any HTTP library's will do.
"""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: No pause of our own choosing is longer than this (seconds).
_LONGEST_DELAY = 120.0

_WRAPPED = "_lensbridge_retries"


def _is_rate_limit(error: Exception) -> bool:
    return getattr(getattr(error, "response", None), "status_code", None) == 429


def _delay_asked_for(error: Any) -> float | None:
    """Seconds named in the answer's Retry-After header, if it names a number."""
    try:
        return float(error.response.headers["Retry-After"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def call_hf_with_retry(
    func: Callable[..., T], *args: Any, max_attempts: int = 3, base_delay: float = 10.0, **kwargs: Any
) -> T:
    """``func(*args, **kwargs)``, tried again up to ``max_attempts`` times while the Hub refuses with HTTP 429.

    The pauses are those that the Hub asks for; where it names none, ``base_delay`` seconds, doubled each time, at most
    two minutes, give or take a fifth so that parallel jobs do not come back together.

    Raises:
        ValueError: ``max_attempts`` is less than 1.
    """
    if max_attempts < 1:
        raise ValueError(f"max_attempts must be at least 1, not {max_attempts}.")
    attempt = 1
    while True:
        try:
            return func(*args, **kwargs)
        except Exception as error:
            if attempt == max_attempts or not _is_rate_limit(error):
                raise
            delay = _delay_asked_for(error)
        if delay is None:
            delay = min(base_delay * 2 ** (attempt - 1), _LONGEST_DELAY) * random.uniform(0.8, 1.2)
        logger.warning(
            "The HuggingFace Hub limits requests; attempt %d of %d in %.1f s.", attempt + 1, max_attempts, delay
        )
        time.sleep(delay)
        attempt += 1


def enable_hf_retry() -> None:
    """Make ``from_pretrained`` of transformers' Auto classes wait and retry on HTTP 429, for the rest of the process.

    Calling it again changes nothing.
    """
    import transformers

    for name in ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor"):
        auto_class = getattr(transformers, name)
        load = auto_class.from_pretrained
        if hasattr(load, _WRAPPED):
            continue
        underlying = getattr(load, "__func__", load)

        def retrying(cls: type, /, *args: Any, _load: Callable[..., Any] = underlying, **kwargs: Any) -> Any:
            return call_hf_with_retry(_load, cls, *args, **kwargs)

        functools.update_wrapper(retrying, underlying)
        setattr(retrying, _WRAPPED, True)
        auto_class.from_pretrained = classmethod(retrying)
