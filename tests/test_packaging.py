"""What is shipped: a source archive that holds every source, wheels with and without compiled kernels, their tags."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tree as it is committed, without what building leaves."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(*command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def wheel(source, folder, **environment):
    build("-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", f"--wheel-dir={folder}", str(source),
          cwd=source, **environment)  # fmt: skip
    (found,) = Path(folder).glob("*.whl")
    return found


def test_the_source_archive_builds_a_wheel_of_any_python(source, tmp_path):
    build("setup.py", "--quiet", "sdist", f"--dist-dir={tmp_path}", cwd=source, FORCE_CUDA="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    for name in ("csrc", "attnkern", "tests/data"):
        shipped = {p.relative_to(tree) for p in (tree / name).rglob("*") if p.is_file()}
        own = {p.relative_to(source) for p in (source / name).rglob("*") if p.is_file()}
        assert own <= shipped
    found = wheel(tree, tmp_path / "wheel", FORCE_CUDA="0")
    assert "-py3-none-" in found.name
    assert "any" not in found.name
    names = zipfile.ZipFile(found).namelist()
    assert "attnkern/_C.so" in names
    # Every module and every file that a module reads, but for what compiling makes.
    package = {
        f"attnkern/{p.relative_to(source / 'attnkern')}" for p in (source / "attnkern").rglob("*") if p.is_file()
    }
    assert package <= set(names)
    assert {"attnkern/py.typed", "attnkern/report.html", "attnkern/training/recipes/rectangular/family.yaml"} <= package


def test_a_wheel_without_a_compiler_runs_on_the_reference(source, tmp_path):
    found = wheel(source, tmp_path / "wheel", ATTNKERN_NO_NATIVE="1", CXX="/bin/false", CC="/bin/false")
    assert found.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(found) as file:
        assert not [name for name in file.namelist() if name.endswith(".so")]
        file.extractall(tmp_path / "site")
    code = "import torch, attnkern; print(attnkern.compatibility_pool(torch.ones(1, 2, 3, 3), torch.ones(2)).pooled)"
    done = build("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout.strip() == "tensor([[1., 1.]])"


def test_building_without_pytorch_says_what_to_do(source):
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py']; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "attnkern: building needs PyTorch 2.11 or later: install torch first, then attnkern --no-build-isolation"
    )
