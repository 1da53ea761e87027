"""How is a number written, so that it reads the same in sentences, tables and pictures?"""

from __future__ import annotations


def signed(value: float) -> str:
    """Two decimals with a sign, and never ``-0.00``."""
    text = f"{value:+.2f}"
    return "+0.00" if text == "-0.00" else text


def plain(value: float) -> str:
    """Two decimals, and never ``-0.00``."""
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text


def percent(value: float) -> str:
    """A part of one as whole percents, and never ``-0%``."""
    text = f"{value:.0%}"
    return "0%" if text == "-0%" else text
