"""How is a data set got from the hub, and what is said when it cannot be?

HuggingFace's datasets is an optional package, imported only when a data set is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import DatasetNotFoundError


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """``datasets.load_dataset``, with an error that says what to do where there is no data set to be had.

    Raises:
        ImportError: datasets is not installed.
        DatasetNotFoundError: neither the cache nor the hub gave the data set.
    """
    try:
        from datasets import load_dataset as load
    except ImportError as error:
        raise ImportError("data sets from the hub need HuggingFace's datasets: pip install datasets") from error
    with explaining_absence(" ".join(str(arg) for arg in args)):
        return load(*args, **kwargs)


@contextmanager
def explaining_absence(name: str, instead: str = "pass data of your own") -> Iterator[None]:
    """Turn the several ways of not finding a data set into one error."""
    try:
        yield
    except OSError as error:
        raise DatasetNotFoundError(
            f"cannot load the data set {name!r}: neither HuggingFace's cache nor the hub gave it. If this machine is "
            f"offline, download it elsewhere and set HF_DATASETS_CACHE, or {instead}. HuggingFace said: {error}"
        ) from error
