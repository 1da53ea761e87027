"""Can a test suite that imports ``transformer_lens`` be run on lensbridge, unchanged?

``pytest --lensbridge-shim``, or ``lensbridge_shim = true`` in its ini file, installs the alias before the first
conftest is imported, in the processes of pytest-xdist too. A module beside the package, because pytest imports it in
every run of an environment that has lensbridge: nothing is imported here that was not asked for.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--lensbridge-shim`` and the ini option of the same meaning."""
    help_text = "import lensbridge wherever transformer_lens is imported"
    parser.getgroup("lensbridge").addoption("--lensbridge-shim", action="store_true", default=False, help=help_text)
    parser.addini("lensbridge_shim", help_text, type="bool", default=False)


def _is_wanted(config: pytest.Config) -> bool:
    return bool(config.known_args_namespace.lensbridge_shim or config.getini("lensbridge_shim"))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Install the alias before anything of the test suite is imported."""
    if _is_wanted(early_config):
        from lensbridge import shim
        from lensbridge.errors import AliasError

        try:
            shim.install()
        except AliasError as error:
            raise pytest.UsageError(f"--lensbridge-shim: {error}") from error


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say in the header what ``transformer_lens`` is."""
    if not _is_wanted(config):
        return []
    import lensbridge
    from lensbridge.module_names import EMULATED_VERSION

    return [f"transformer_lens: lensbridge {lensbridge.__version__} in the place of {EMULATED_VERSION}"]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave the process as it was, for those who call ``pytest.main`` and go on."""
    if _is_wanted(config):
        from lensbridge import shim

        shim.uninstall()
