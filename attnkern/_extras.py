"""Packages that parts of attnkern need and that are not installed without extras."""

import contextlib
from collections.abc import Iterator

#: Names to install where they differ from the names to import.
_PACKAGES = {"PIL": "Pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "PyYAML"}


@contextlib.contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Say in one sentence how to install an extra when an import in the block fails for lack of a package.

    Args:
        what: the part of attnkern that needs the package.
        extra: one or more of the extras in pyproject.toml: ``"train,viz"``.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "attnkern"):
            raise
        raise ModuleNotFoundError(
            f"{what} needs {_PACKAGES.get(package, package)}, which is not installed: "
            f"run `pip install --no-build-isolation '.[{extra}]'` in attnkern's source tree",
            name=error.name,
        ) from error
