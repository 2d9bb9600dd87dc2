"""Versions, the bill of materials, no network access at import, and no code loaded from files."""

import ast
import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import offline
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import attnkern

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
DEVELOPMENT = {"bench", "dev", "docs"}


def requirements(*lists):
    """Requirements other than attnkern itself, whose extras include each other."""
    found = [Requirement(text) for texts in lists for text in texts]
    return [requirement for requirement in found if requirement.name != "attnkern"]


#: what users install
USED = requirements(PROJECT["project"]["dependencies"], *(EXTRAS[name] for name in EXTRAS.keys() - DEVELOPMENT))
PINS = {
    canonicalize_name(name): pin
    for name, pin in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
}


@pytest.fixture(scope="module")
def sbom():
    pytest.importorskip("cyclonedx")
    sys.path.insert(0, str(ROOT / "release"))
    yield __import__("sbom")
    sys.path.remove(str(ROOT / "release"))


# --- versions --------------------------------------------------------------------------------------------------------


def test_the_changelog_knows_the_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1].rstrip(",")
    assert newest == attnkern.__version__


def test_every_requirement_is_pinned_within_its_range():
    for requirement in requirements(PROJECT["build-system"]["requires"], *EXTRAS.values()) + USED:
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} is not pinned"
        assert requirement.specifier.contains(pin), f"{requirement} is pinned to {pin}"


def test_users_get_a_range():
    """A lower bound and no upper one."""
    assert [str(r) for r in USED if {specifier.operator for specifier in r.specifier} != {">="}] == []


def test_every_line_of_the_constraints_is_a_pin():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len(PINS) == sum(not line.startswith("#") for line in lines)


def test_what_the_requirements_bring_is_pinned(sbom):
    """Every dependency of a dependency, so that two environments are the same; installed in the pinned version."""
    extras = set(EXTRAS) if find_spec("mkdocs") else set(EXTRAS) - {"docs"}
    brought = sbom.closure(extras).keys() - {"attnkern"}
    assert brought <= PINS.keys()
    if version("torch") == PINS["torch"]:
        assert {name: version(name) for name in brought} == {name: PINS[name] for name in brought}


def test_users_are_asked_for_what_is_imported():
    """Not only as a dependency of another package. One file imports timm, where a layer of timm is given."""
    used = {canonicalize_name(requirement.name) for requirement in USED}
    providers = packages_distributions()
    for path in (ROOT / "attnkern").rglob("*.py"):
        asked = used | ({"timm"} if path.name == "_attention_pools.py" else set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"attnkern"}:
                assert asked & {canonicalize_name(found) for found in providers.get(name, [name])}, f"{path}: {name}"


# --- the bill of materials -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bill(sbom, tmp_path_factory):
    """Written by two processes with different hash seeds."""
    texts = []
    for seed in "12":
        folder = tmp_path_factory.mktemp("bill")
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, ROOT / "release/sbom.py", folder], env=environment, check=True)
        texts.append((folder / f"attnkern-{attnkern.__version__}.cdx.json").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    return texts[0]


def test_the_bill_of_materials_is_valid(bill):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill) is None
    assert str(ROOT) not in bill


def test_the_bill_of_materials_says_what_pyproject_says(bill):
    bill = json.loads(bill)
    project = bill["metadata"]["component"]
    assert (project["name"], project["version"]) == ("attnkern", attnkern.__version__)
    assert project["licenses"] == [{"license": {"id": PROJECT["project"]["license"]}}]
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"

    parts = {part["name"]: part for part in bill["components"]}
    needs = {edge["ref"]: edge.get("dependsOn", []) for edge in bill["dependencies"]}
    asked = {canonicalize_name(requirement.name) for requirement in USED}
    assert sorted(needs[project["bom-ref"]]) == sorted(parts[name]["bom-ref"] for name in asked)
    assert parts["torch"]["scope"] == "required"
    assert parts["lightning"]["scope"] == "optional"
    assert all(part["version"] == version(name) and part["licenses"] for name, part in parts.items())
    # Every component has a place in the graph, and none is for development only.
    assert {part["bom-ref"] for part in parts.values()} == {ref for edges in needs.values() for ref in edges}
    assert not parts.keys() & {"pytest", "ruff", "mkdocs", "hypothesis"}


# --- network and files -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_asks_for_no_network(tmp_path):
    for package in ("torchvision", "lightning", "matplotlib", "triton"):
        pytest.importorskip(package)
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "attnkern").rglob("*.py")]
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files} - {"attnkern.__main__"}  # the command
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    offline.python("-c", code, *modules, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_the_network_is_watched(tmp_path):
    """Even if the code that uses the network ignores the exception."""
    code = "import socket, contextlib\nwith contextlib.suppress(OSError): socket.create_connection(('127.0.0.1', 9))"
    with pytest.raises(AssertionError, match=r"socket\.(getaddrinfo|connect)"):
        offline.python("-c", code, cwd=tmp_path)


UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {
    "__import__", "compile", "eval", "exec", "np.load", "numpy.load", "os.popen", "os.system", "torch.hub.load",
    "yaml.full_load", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip


def unsafe(code):
    """Lines of Python that may run code from a file."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found = names & UNSAFE_MODULES
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            reads = name == "torch.load" or name.endswith("load_from_checkpoint") or "ckpt_path" in given
            found = name in UNSAFE_CALLS or (reads and given.get("weights_only") != "True") or "shell" in given
        else:
            continue
        if found:
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", ["attnkern", "benchmarks", "release"])
def test_no_file_is_run_as_code(path):
    found = {
        str(file): lines
        for file in (ROOT / path).rglob("*.py")
        if (lines := list(unsafe(file.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "trainer.fit(module, ckpt_path=path)",
        "Module.load_from_checkpoint(path)",
        "eval(text)",
        "yaml.load(text, Loader)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_would_run_code_is_found(code):
    assert list(unsafe(code))


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def readers():
    from attnkern.models import create_model
    from attnkern.training.train import load_run

    yield lambda path: create_model("vgg_gap", 10, width=0.03, pretrained=path)
    yield lambda path: create_model("mobilenet_v3_large_window", 10, weights=path)
    yield load_run


@pytest.mark.parametrize("form", ["torch", "zip", "pickle"])
def test_a_checkpoint_with_code_is_refused(form, tmp_path):
    for package in ("torchvision", "lightning"):
        pytest.importorskip(package)
    path, sprung = tmp_path / "last.ckpt", tmp_path / "sprung"
    state = {"state_dict": {"network.weight": Trap(sprung)}, "hyper_parameters": Trap(sprung)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    for read in readers():
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            read(path)
    assert not sprung.exists()
    with contextlib.suppress(RuntimeError):  # after the code has run: "corrupt file?"
        torch.load(path, weights_only=False)
    assert sprung.exists(), "the trap works"
