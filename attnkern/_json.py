"""Reading of JSON files that runs have written."""

import json
from pathlib import Path
from typing import Any


def read_json(where: str, path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        where: the function or command, for the message.
        path: the file.
        remedy: what to do with a damaged file, for the message.

    Raises:
        ValueError: the file is damaged, cut short or holds something else.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        reason = f"it holds {type(content).__name__}"
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        content, reason = None, str(error)
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {str(path)!r} is not a whole file with a JSON object ({reason}): {remedy}")
    return content
