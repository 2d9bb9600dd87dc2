"""Runs commands without access to the network."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path


@functools.cache
def _namespace() -> tuple[str, ...]:
    """The prefix that runs a command and its children in an empty network namespace, if this is allowed here."""
    try:
        allowed = subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return ("unshare", "-rn") if allowed else ()


def python(*arguments, cwd, **environment) -> str:
    """Run Python and return its output; fails if it or a Python that it starts tries to use the network."""
    path = [str(Path(__file__).parent), environment.pop("PYTHONPATH", "")]
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as asked:
        environment |= {"ATTNKERN_TEST_NETWORK": asked.name, "PYTHONPATH": os.pathsep.join(filter(None, path))}
        done = subprocess.run(
            [*_namespace(), sys.executable, *arguments],
            cwd=cwd, env=os.environ | environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        attempts = asked.read()
    assert not attempts, attempts
    return done.stdout
