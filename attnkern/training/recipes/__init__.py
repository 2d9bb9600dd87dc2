"""The recipes: one YAML file a row of the papers' tables, in the folder of its family.

``FAMILY/family.yaml`` holds what the rows share, ``FAMILY/NAME.yaml`` what is special about one. Both say the same
things: settings of the model, the data and the trainer, and under ``data_sets`` what changes on a data set. A row may
hold ``published``: the papers' top-1 errors in percent, by data set.
"""

from importlib import resources
from typing import Any

import yaml

from attnkern._checks import check_kind, describe

_FOLDER = resources.files(__name__)


def list_recipes() -> list[str]:
    """Names of the recipes, sorted."""
    return sorted(_rows())


def _rows():
    return {
        row.name.removesuffix(".yaml"): family.name
        for family in _FOLDER.iterdir()
        if family.is_dir() and (family / "family.yaml").is_file()
        for row in family.iterdir()
        if row.name.endswith(".yaml") and row.name != "family.yaml"
    }


def _merged(base: dict, change: dict) -> dict:
    """``base`` with the entries of ``change``, dicts merged in turn; a class given anew takes its arguments anew."""
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        both = isinstance(value, dict) and isinstance(old, dict)
        result[key] = _merged(old, value) if both and "class_path" not in value else value
    return result


def read_recipe(name: str, data: str | None = None) -> tuple[str, dict[str, Any], dict[str, float]]:
    """The family of a recipe, its settings on the data set ``data`` (by default the recipe's own), and what the paper
    published for it: top-1 errors in percent, by data set.

    Raises:
        ValueError, TypeError: an unknown recipe, or a data set that is no name.
    """
    rows = _rows()
    if not isinstance(name, str) or name not in rows:
        raise ValueError(f"train: recipe must be one of {', '.join(list_recipes())}; got {describe(name)}")
    check_kind("train", str | None, data=data)
    layers = []
    for file in ("family", name):
        layers.append(yaml.safe_load((_FOLDER / rows[name] / f"{file}.yaml").read_text(encoding="utf-8")))
    settings, changes, published = {}, [], {}
    for layer in layers:
        changes.append(layer.pop("data_sets", {}))
        published = layer.pop("published", published)
        settings = _merged(settings, layer)
    if data is not None:
        settings = _merged(settings, {"data": {"name": data}})
    for change in changes:
        settings = _merged(settings, change.get(settings["data"]["name"], {}))
    return rows[name], settings, published
