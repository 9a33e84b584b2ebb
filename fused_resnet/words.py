"""Words of errors."""

import difflib
from collections.abc import Iterable


def meant(text: str, known: Iterable[str]) -> str:
    """The end of an error for a word that is nearly a known one: "; did you mean resnet50?". Empty for any other word."""
    close = difflib.get_close_matches(text.lower(), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
