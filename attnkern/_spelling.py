"""Suggestions for misspelled names in error messages."""

from collections.abc import Iterable


def did_you_mean(word: str | None, known: Iterable[str | None]) -> str:
    """``"; did you mean 'width'?"`` with the known names that resemble ``word`` most, or nothing if none does."""
    import difflib  # only errors need it

    names = [name for name in known if isinstance(name, str)]
    found = difflib.get_close_matches(word, names, n=2, cutoff=0.7) if isinstance(word, str) else []
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
