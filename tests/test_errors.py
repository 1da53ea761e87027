"""Do the exceptions say what they should, and can old code still catch them?"""

from __future__ import annotations

import pickle

import pytest

from lensbridge import errors
from lensbridge.errors import LensbridgeError, near_misses

#: exception -> the types that TransformerLens 3.9.0 raises in its place.
CAUGHT_AS = {
    errors.UnknownPointError: [KeyError],
    errors.DisabledPointError: [KeyError, AssertionError],
    errors.HookError: [TypeError, RuntimeError],
    errors.ReadOnlyWeightError: [RuntimeError],
    errors.UnsupportedModelError: [ValueError],
    errors.ModelNotFoundError: [OSError, ValueError],
    errors.DatasetNotFoundError: [ConnectionError, FileNotFoundError, ValueError],
    errors.SourceNotFoundError: [RuntimeError],
    errors.UnknownArgumentError: [TypeError],
    errors.TraceError: [RuntimeError],
    errors.RemoteRunError: [RuntimeError],
    errors.AliasError: [ImportError],
    errors.MissingPackageError: [ImportError],
}


def test_every_exception_of_the_module_is_in_the_table_and_in_the_docstring() -> None:
    defined = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, LensbridgeError)} - {
        LensbridgeError
    }
    assert defined == set(CAUGHT_AS)
    assert all(one.__name__ in (errors.__doc__ or "") for one in defined)


@pytest.mark.parametrize("error", CAUGHT_AS, ids=lambda error: error.__name__)
def test_code_that_catches_the_old_type_goes_on_working(error: type[LensbridgeError]) -> None:
    for old in [*CAUGHT_AS[error], LensbridgeError]:
        with pytest.raises(old):
            raise error("why")


@pytest.mark.parametrize("error", CAUGHT_AS, ids=lambda error: error.__name__)
def test_the_message_is_shown_as_it_was_written(error: type[LensbridgeError]) -> None:
    message = "no point 'a'.\nClosest: 'b'"
    assert str(error(message)) == message
    assert str(pickle.loads(pickle.dumps(error(message)))) == message
    assert str(error()) == ""


def test_near_misses_are_the_closest_names() -> None:
    known = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.0.attn.hook_q", "ln_final.hook_scale"]
    assert near_misses("blocks.0.hook_resid_prre", known).startswith(" Closest: blocks.0.hook_resid_pre, ")
    assert near_misses("blocks.7.hook_resid_post", known).startswith(" Closest: blocks.0.hook_resid_post")
    assert near_misses("scale", known) == " Closest: ln_final.hook_scale."
    assert near_misses("", known) == ""
    assert near_misses("zzz", known) == ""
    assert near_misses("blocks.0.hook_resid_p", known, limit=1).count("blocks") == 1
