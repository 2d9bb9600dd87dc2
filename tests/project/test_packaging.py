"""The source archive is reproducible and complete, builds and passes tests; wheels."""

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import offline
import pytest
import torch

ROOT = Path(__file__).parents[2]
MOMENT = 1_700_000_000

#: Builds without CUDA, for one instruction set, in a third of the time.
SHORT = {"FORCE_CUDA": "0", "CFLAGS": "-DATTNKERN_BASELINE_ONLY"}


def tracked():
    """The files of the project: those in git, or those that a source archive lists."""
    if (ROOT / ".git").exists():
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    else:
        listed = ROOT / "attnkern.egg-info/SOURCES.txt"
        if not listed.exists():
            pytest.skip("neither a git checkout nor a source archive")
        names = listed.read_text(encoding="utf-8")
    made = ("attnkern.egg-info/", "PKG-INFO", "setup.cfg")
    return [name for name in names.splitlines() if not name.startswith(made) and (ROOT / name).exists()]


def without_encoding(code):
    """The calls that open, read or write a text file without naming an encoding."""
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        owner, _, name = ast.unparse(call.func).rpartition(".")
        if any(keyword.arg in ("encoding", None) for keyword in call.keywords):
            continue
        if owner and name in ("read_text", "write_text"):
            yield call
        elif name in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile"):
            if name == "open" and owner in ("Image", "os", "tarfile"):  # binary files
                continue
            place = 1 if name == "fdopen" or (name, owner) == ("open", "") else 0  # Path.open(mode)
            modes = [*call.args[place : place + 1], *(k.value for k in call.keywords if k.arg == "mode")]
            mode = ast.unparse(modes[0]) if modes else "b" if name.endswith("File") else ""
            if "b" not in mode:
                yield call


def test_every_text_file_names_its_encoding():
    """Without a name the encoding depends on the locale, and files would not be the UTF-8 that they declare."""
    assert (
        len(list(without_encoding("p.read_text(); open(f); p.open('w'); NamedTemporaryFile('r'); p.write_text(t)")))
        == 5
    )
    assert not list(without_encoding("open(f, 'rb'); p.open('wb'); p.read_text('x', encoding='utf-8'); Image.open(f)"))
    found = {
        f"{name}:{call.lineno}: {ast.unparse(call)}"
        for name in tracked()
        if name.endswith(".py")
        for call in without_encoding((ROOT / name).read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tracked files, without files of a build."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def pack(source, folder, umask=0o022):
    """The source archive, built in ``source``, where the build leaves its metadata."""
    arguments = ("setup.py", "--quiet", "sdist", "--dist-dir", str(folder))
    before = os.umask(umask)
    try:
        offline.python(*arguments, cwd=source, FORCE_CUDA="0", SOURCE_DATE_EPOCH=str(MOMENT))
    finally:
        os.umask(before)
    (archive,) = Path(folder).glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory):
    return pack(source, tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def tree(archive, tmp_path_factory):
    """The unpacked archive in a new folder."""
    folder = tmp_path_factory.mktemp("tree")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def wheel(source, folder, **environment):
    offline.python(
        "-m", "pip", "wheel", "--quiet", "--no-index", "--no-build-isolation", "--no-deps", f"--wheel-dir={folder}",
        str(source), cwd=source, **environment,
    )  # fmt: skip
    (found,) = Path(folder).glob("*.whl")
    return found


# --- the source archive ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_source_archive_holds_every_tracked_file_and_nothing_else(archive):
    with tarfile.open(archive) as tar:
        shipped = {member.name.partition("/")[2] for member in tar if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in shipped if name.startswith("attnkern.egg-info/")}
    assert made <= shipped
    assert shipped - made == set(tracked())


@pytest.mark.slow
def test_the_source_archive_names_no_machine(archive):
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    assert members == sorted(members, key=lambda member: member.name.split("/"))
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", MOMENT)}
    assert {m.name.partition("/")[2] for m in members if m.isfile() and m.mode == 0o755} >= {
        ".ci/run",
        "tests/compat.sh",
    }
    assert {m.mode for m in members} == {0o755, 0o644}


@pytest.mark.slow
def test_the_source_archive_is_the_same_bytes_again(archive, source, tmp_path):
    """Built in another folder, at another time, with other permissions, and after an earlier build."""
    other = tmp_path / "elsewhere"
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        copy = other / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o700 if path.stat().st_mode & 0o100 else 0o600)
        os.utime(copy, (1, 1))
    again = pack(other, tmp_path, umask=0o077)
    assert again.name == archive.name
    assert hashlib.sha256(again.read_bytes()).hexdigest() == hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_unpacked_archive_builds_and_passes_tests(tree):
    """Builds and passes some tests without git, network or CUDA; `make release-check` runs the kernels' tests."""
    build = "setup.py", "--quiet", "build_ext", "--inplace"
    offline.python(*build, cwd=tree, **SHORT)
    (tree / "build").rename(tree / "built")
    offline.python(*build, cwd=tree, **SHORT, CXX="/bin/false", CC="/bin/false")  # nothing is compiled again
    (tree / "built").rename(tree / "build")  # for the wheel
    environment = {"PYTHONPATH": str(tree), "ATTNKERN_TEST_BACKENDS": "native,reference"}
    found = offline.python("-c", "import attnkern; print(attnkern.__file__)", cwd="/", **environment)
    assert Path(found.strip()).parent == tree / "attnkern"
    report = offline.python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_ops.py", "tests/native/test_import.py",
        "tests/project/test_packaging.py", "tests/project/test_docs.py",
        "-k", "golden or without_both or denormal_numbers or without_pytorch or links_lead",
        cwd=tree, **environment,
    )  # fmt: skip
    assert " passed" in report
    assert " skipped" not in report


# --- wheels ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_unpacked_archive_builds_a_wheel_of_any_python(tree, source, tmp_path):
    found = wheel(tree, tmp_path / "wheel", **SHORT)
    assert "-py3-none-" in found.name
    assert "any" not in found.name
    names = zipfile.ZipFile(found).namelist()
    library = zipfile.ZipFile(found).read("attnkern/_C.so")
    for folder in (tree, Path(torch.__file__).parents[1]):  # no path of the build machine is in the wheel
        assert os.fsencode(folder) not in library
    # Every module and every file that a module reads, except the compiled libraries.
    package = {
        f"attnkern/{p.relative_to(source / 'attnkern')}" for p in (source / "attnkern").rglob("*") if p.is_file()
    }
    assert package <= set(names)
    assert {"attnkern/py.typed", "attnkern/report.html", "attnkern/training/recipes/rectangular/family.yaml"} <= package


@pytest.mark.slow
def test_a_wheel_without_a_compiler_runs_on_the_reference(source, tmp_path):
    found = wheel(source, tmp_path / "wheel", ATTNKERN_NO_NATIVE="1", CXX="/bin/false", CC="/bin/false")
    assert found.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(found) as file:
        assert not [name for name in file.namelist() if name.endswith(".so")]
        file.extractall(tmp_path / "site")
    code = "import torch, attnkern; print(attnkern.compatibility_pool(torch.ones(1, 2, 3, 3), torch.ones(2)).pooled)"
    assert offline.python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).strip() == "tensor([[1., 1.]])"


def refused(source, *arguments, code="pass", **environment):
    """The last line of the message with which setup.py refuses to build."""
    code = f"import sys, runpy; {code}; sys.argv = {['setup.py', *arguments]}; runpy.run_path('setup.py')"
    environment = os.environ | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_building_with_an_old_setuptools_says_what_to_do(source):
    """The setuptools of ``python3.11 -m venv``, which cannot build wheels."""
    code = "import setuptools; setuptools.__version__ = '65.5.0'; sys.modules['setuptools.command.bdist_wheel'] = None"
    assert refused(source, code=code) == (
        "attnkern: building needs setuptools 77 or later, this is 65.5.0: pip install --upgrade setuptools"
    )


def test_building_with_an_old_python_says_what_to_do(source):
    line = refused(source, code="sys.version_info = (3, 10, 13); sys.version = '3.10.13 (main)'")
    assert line.startswith("attnkern: needs Python 3.11 or later, this is 3.10.13: ")


def test_pip_gets_the_requirements_of_a_build_only_where_a_compiler_is(source):
    """With build isolation: a missing compiler is found before PyTorch is downloaded."""
    code = (
        "import sys; sys.modules['torch'] = None; from setuptools import build_meta;"
        "print(build_meta.get_requires_for_build_wheel())"
    )
    for compiler, native, found in ((None, None, True), ("/nowhere/c++", None, False), ("/nowhere/c++", "1", True)):
        settings = {"CXX": compiler, "ATTNKERN_NO_NATIVE": native}
        environment = {key: value for key, value in (os.environ | settings).items() if value is not None}
        done = subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)
        if found:
            assert "['torch>=2.11', 'ninja']" in done.stdout, done.stderr
        else:
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1].startswith("attnkern: building the kernels needs GCC 12 or Clang 16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler, fault",
    [
        ("/nowhere/c++", "/nowhere/c++ does not run: No such file"),
        ("false", "false does not compile C++20: exit status 1"),
    ],
)
def test_building_without_a_compiler_says_what_to_do(compiler, fault, source):
    line = refused(source, "build_ext", FORCE_CUDA="0", CXX=compiler)
    assert line.startswith(f"attnkern: building the kernels needs GCC 12 or Clang 16 or later, and {fault}")
    assert "or set ATTNKERN_NO_NATIVE=1" in line


@pytest.mark.slow
def test_what_does_not_compile_leaves_a_way_out(source, tmp_path):
    """A compiler that accepts C++20 but fails."""
    compiler = tmp_path / "c++"
    script = 'case " $* " in *" -c "*) exit 1;; *) exec c++ "$@";; esac'
    compiler.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext"]
    environment = os.environ | {"FORCE_CUDA": "0", "CXX": str(compiler)}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    shutil.rmtree(source / "build", ignore_errors=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("attnkern: the kernels could not be built, for the reason above; ")
    assert "ATTNKERN_NO_NATIVE=1" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_building_without_pytorch_says_what_to_do(source):
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py']; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "attnkern: building needs PyTorch 2.11 or later: install torch first, then attnkern --no-build-isolation"
    )
