"""The public names as type checkers and help() see them."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import attnkern
import attnkern.nn

HERE = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_strict_types_of_the_public_face(tmp_path):
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    done = subprocess.run(
        [*command, "tests/typed/public_face.py"], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_says_that_it_is_typed():
    assert (Path(attnkern.__file__).parent / "py.typed").exists()


NAMES = [*attnkern.__all__, "accelerate", "insert", *(f"nn.{name}" for name in attnkern.nn.__all__)]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_every_public_name_is_documented_and_annotated(name):
    thing = attnkern
    for part in name.split("."):
        thing = getattr(thing, part)
    assert inspect.getdoc(thing)
    function = thing if inspect.isfunction(thing) else None
    if function is not None:
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
        assert name == "decompositions" or "Raises:" in function.__doc__
