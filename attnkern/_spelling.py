"""Suggestions for misspelled names in error messages."""

from collections.abc import Iterable


def did_you_mean(word: str | None, known: Iterable[str | None]) -> str:
    """``"; did you mean 'width'?"`` with the known name that resembles ``word`` most, or nothing if none does."""
    import difflib  # only errors need it

    names = [name for name in known if isinstance(name, str)]
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.75) if isinstance(word, str) else []
    return f"; did you mean {found[0]!r}?" if found else ""
