"""Are the three lists of names consistent with each other and with what loading resolves?"""

from __future__ import annotations

from lensbridge import model_names
from lensbridge.supported_models import DEFAULT_MODEL_ALIASES, MODEL_ALIASES, OFFICIAL_MODEL_NAMES


def test_every_alias_leads_to_its_official_name() -> None:
    assert len(MODEL_ALIASES) > 200
    assert set(MODEL_ALIASES) <= set(OFFICIAL_MODEL_NAMES)
    assert all(model_names.resolve(short) == name for name, aliases in MODEL_ALIASES.items() for short in aliases)


def test_the_default_alias_is_the_first_or_the_name_itself() -> None:
    defaults = dict(zip(OFFICIAL_MODEL_NAMES, DEFAULT_MODEL_ALIASES, strict=True))
    assert defaults["gpt2"] == "gpt2-small"
    assert defaults["gpt2-xl"] == "gpt2-xl"
    assert all(defaults[name] == aliases[0] for name, aliases in MODEL_ALIASES.items())
