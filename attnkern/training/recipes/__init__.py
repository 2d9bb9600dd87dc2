"""The recipes: one YAML file for each row of the papers' tables, in the folder of its family.

``FAMILY/family.yaml`` contains what the rows share, ``FAMILY/NAME.yaml`` what differs in one row. Both have the same
keys: ``model``, ``data`` and ``trainer`` with settings, and ``data_sets`` with changes to these settings on a data set.
A row may also have ``published``: the top-1 errors in the paper in percent, by data set.
"""

from importlib import resources
from typing import Any

from attnkern._checks import check_kind
from attnkern._extras import needs_extra
from attnkern._spelling import did_you_mean

with needs_extra("attnkern.training.recipes", "train"):
    import yaml

_FOLDER = resources.files(__name__)
#: Data sets with the settings of another one.
_LIKE = {"digits-pairs": "digits-clutter"}


def list_recipes() -> list[str]:
    """Names of the recipes, sorted."""
    return sorted(_families())


def _families() -> dict[str, str]:
    """The family of each recipe."""
    return {
        row.name.removesuffix(".yaml"): family.name
        for family in _FOLDER.iterdir()
        if family.is_dir() and (family / "family.yaml").is_file()
        for row in family.iterdir()
        if row.name.endswith(".yaml") and row.name != "family.yaml"
    }


def _merged(base: dict, change: dict) -> dict:
    """``base`` with the changes of ``change``; a new ``class_path`` replaces the old one and its arguments."""
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        both = isinstance(value, dict) and isinstance(old, dict)
        result[key] = _merged(old, value) if both and "class_path" not in value else value
    return result


def read_recipe(name: str, data: str | None = None) -> tuple[str, dict[str, Any], dict[str, float]]:
    """The family of a recipe, its settings on a data set, and the top-1 errors that the paper published for it.

    Args:
        name: name of the recipe.
        data: name of the data set; None: the recipe's own.

    Returns:
        the family's name; the settings of ``model``, ``data`` and ``trainer``; the errors in percent, by data set.

    Raises:
        ValueError, TypeError: an unknown recipe, or an argument that is not a name.
    """
    check_kind("train", str, recipe=name)
    check_kind("train", str | None, data=data)
    families = _families()
    if name not in families:
        hint = did_you_mean(name, families)
        raise ValueError(f"train: there is no recipe {name!r}{hint or '; attnkern train lists the recipes'}")
    layers = []
    for file in ("family", name):
        layers.append(yaml.safe_load((_FOLDER / families[name] / f"{file}.yaml").read_text(encoding="utf-8")))
    settings, changes, published = {}, [], {}
    for layer in layers:
        changes.append(layer.pop("data_sets", {}))
        published = layer.pop("published", published)
        settings = _merged(settings, layer)
    if data is not None:
        settings = _merged(settings, {"data": {"name": data}})
    on = settings["data"]["name"]
    for change in changes:
        settings = _merged(settings, change.get(_LIKE.get(on, on), {}))
    return families[name], settings, published
