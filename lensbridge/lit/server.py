"""How are models and datasets brought onto LIT's page?"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from . import _nlp
from .constants import SERVER_CONFIG
from .dataset import LITDatasetWrapper, wrap_for_lit
from .model import HookedTransformerLIT

logger = logging.getLogger(__name__)


def _wrapped(datasets: dict[str, Any]) -> dict[str, Any]:
    """Datasets of this package as they are now; others as they are."""
    ours = {name: hasattr(d, "_examples") and not isinstance(d, LITDatasetWrapper) for name, d in datasets.items()}
    return {name: wrap_for_lit(dataset) if ours[name] else dataset for name, dataset in datasets.items()}


def _model(model: Any) -> Any:
    return HookedTransformerLIT(model) if hasattr(model, "cfg") and hasattr(model, "run_with_cache") else model


def serve(
    models: dict[str, Any] | Any,
    datasets: dict[str, Any] | Any,
    port: int = SERVER_CONFIG.DEFAULT_PORT,
    host: str = SERVER_CONFIG.DEFAULT_HOST,
    page_title: str = SERVER_CONFIG.DEFAULT_TITLE,
    **kwargs: Any,
) -> None:
    """Start LIT's server, and return when it is stopped.

    Args:
        models: models by name, or one; each a HookedTransformer or a model for LIT.
        datasets: datasets by name, or one.
        port: where the page is to be found.
        host: as above.
        page_title: what the page is called.
        **kwargs: for ``lit_nlp.dev_server.Server``.

    Raises:
        ImportError: if LIT is not installed.
    """
    _nlp.require()
    dev_server = importlib.import_module("lit_nlp.dev_server")
    layout = importlib.import_module("lit_nlp.api.layout")
    named = models if isinstance(models, dict) else {"model": models}
    # LIT comes with the page, built.
    page = Path(str(importlib.import_module("lit_nlp").__file__)).parent / "client" / "build" / "default"
    options = {"layouts": layout.DEFAULT_LAYOUTS, "default_layout": "default", "client_root": str(page)} | kwargs
    server = dev_server.Server(
        {name: _model(model) for name, model in named.items()},
        _wrapped(datasets if isinstance(datasets, dict) else {"dataset": datasets}),
        port=port,
        host=host,
        page_title=page_title,
        **options,
    )
    logger.info("LIT is at http://%s:%s", host, port)
    server.serve()


class LITWidget:
    """LIT's page in a notebook (TransformerLens' class of the same name).

    Args:
        models: models by name.
        datasets: datasets by name.
        height: of the page, in pixels.
        **kwargs: for ``lit_nlp.notebook.LitWidget``.

    Raises:
        ImportError: if LIT is not installed.
    """

    def __init__(self, models: dict[str, Any], datasets: dict[str, Any], height: int = 800, **kwargs: Any) -> None:
        _nlp.require()
        notebook = importlib.import_module("lit_nlp.notebook")
        kwargs.pop("default_layout", None)
        models = {name: _model(model) for name, model in models.items()}
        self._widget = notebook.LitWidget(models, _wrapped(datasets), height=height, render=False, **kwargs)

    @property
    def url(self) -> str:
        """Where the page is, for a browser of its own."""
        return f"http://localhost:{self._widget._server.port}"

    def render(self, open_in_new_tab: bool = False, **kwargs: Any) -> None:
        """Show the page here, or in a new tab."""
        self._widget.render(open_in_new_tab=open_in_new_tab, **kwargs)

    def stop(self) -> None:
        """End the page's server."""
        self._widget.stop()
