"""Commands without a network."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path


@functools.cache
def _namespace() -> tuple[str, ...]:
    """What starts a command in a network namespace of its own, where that is allowed: it holds compilers, too."""
    try:
        allowed = subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return ("unshare", "-rn") if allowed else ()


def python(*arguments, cwd, **environment) -> str:
    """Standard output of Python with ``arguments``; fails if it, or a Python that it starts, asks for the network."""
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
