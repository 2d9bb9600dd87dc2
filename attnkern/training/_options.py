"""Messages of jsonargparse, which parses the options of ``attnkern train``, as one sentence each."""

import inspect
import pydoc
import re
from collections.abc import Iterable

from attnkern._spelling import did_you_mean


def option_error(message: str, options: Iterable[str]) -> str:
    """What is wrong with an option, and where the message says so, what was expected.

    Args:
        message: of jsonargparse's ``ArgumentError``.
        options: the options that exist, for suggestions.
    """
    unknown = re.match(r"unrecognized arguments: ([^\s=]+)", message)
    if unknown:
        kind = "option" if unknown[1].startswith("-") else "argument"
        return f"unknown {kind} {unknown[1]}{did_you_mean(unknown[1], options)}"
    in_file = re.search(r"Group '([\w.]+)' does not accept option '(\w+)'", message)
    if in_file:
        option = f"--{in_file[1]}.{in_file[2]}"
        return f"unknown option {option} in a file of settings{did_you_mean(option, options)}"
    # A message about an option of a class is nested in the message about the option that names the class.
    keys = re.findall(r'Parser key "([\w.]+)":', message)
    if not keys:
        return _squeezed(message)
    option = f"--{'.'.join(keys)}"
    refused = re.search(r"Option '(\w+)' is not accepted.*class_path='([\w.]+)'", message, re.DOTALL)
    if refused:
        found = pydoc.locate(refused[2])
        parameters = inspect.signature(found).parameters if found else ()
        return f"{option}: {refused[2]} has no option {refused[1]!r}{did_you_mean(refused[1], parameters)}"
    missing = re.search(r"module '[\w.]+' has no attribute '\w+'", message)
    if missing:
        return f"{option}: {missing[0]}"
    expected = [_kind(each) for each in re.findall(r"Expected an? (?!path)(.+?)(?:\. Got value: |$)", message, re.M)]
    given = re.search(r"(?:Given|Got) value: (.+?)(?:\. Got value: |$)", message)
    if expected and given:
        *others, last = dict.fromkeys(expected)
        choice = f"{', '.join(others)} or {last}" if others else last
        return f"{option} must be {choice}, got {given[1]!r}"
    return f"{option}: {_squeezed(message[message.rindex(keys[-1]) + len(keys[-1]) + 2 :])}"


def _kind(expected: str) -> str:
    """A type or a set of values in words: ``int`` for ``<class 'int'>``."""
    if expected.startswith("dot import path string"):
        return "the name of a class"
    found = re.fullmatch(r"<class '(?:[\w.]+\.)?(\w+)'>|typing\.Literal\[(.+)\]", expected)
    if found is None:
        return expected
    return found[2] or {"NoneType": "null", "bool": "true or false"}.get(found[1], found[1])


def _squeezed(message: str) -> str:
    return " ".join(message.split())
