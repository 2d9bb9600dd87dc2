"""The documentation: its Python runs, its links lead somewhere, every public name is in it, and the site builds."""

import ast
import importlib
import importlib.util
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import attnkern

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Pages that are made by running what takes long.
MADE_LATER = {"gallery.md", "reproduction.md"}
FENCE = re.compile(r"^(<!-- not run -->\n+)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: The names of tensors that a page speaks of.
GIVEN = {
    "README.md": """
import torch
x, rectangle, a, anchors = torch.randn(2, 3, 5, 6), torch.rand(2, 5), torch.rand(2, 5, 6), torch.linspace(0, 1, 4)
query = torch.randn(2, 3)
"""
}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder in which the tutorial's network has been trained, as far as a second goes."""
    pytest.importorskip("lightning")
    train = importlib.import_module("attnkern.training.train").train
    monkeypatch.chdir(tmp_path)
    small = {"trainer.max_epochs": 1, "data.count": 64, "model.options.width": 0.03, "trainer.logger": "false"}
    quiet = {"trainer.enable_progress_bar": "false", "trainer.limit_val_batches": 0, "trainer.limit_test_batches": 1}
    arguments = [part for key, value in (small | quiet).items() for part in (f"--{key}", str(value))]
    train("vgg_att2_concat_pc", "digits-clutter", arguments)


def needs(code):
    """Skip where a page's Python needs a package that is not installed."""
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            pytest.importorskip(name, exc_type=ImportError)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/how-to.md", "docs/tutorial.md"])
def test_python_runs(page, request, tmp_path, monkeypatch):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [
        (text[: match.start(3)].count("\n"), match[3])
        for match in FENCE.finditer(text)
        if match[2] == "python" and not match[1]
    ]
    assert blocks
    needs("\n".join(code for _, code in blocks))
    if page == "docs/tutorial.md":
        request.getfixturevalue("checkpoint")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    exec(GIVEN.get(page, ""), namespace)
    for line, code in blocks:
        exec(compile("\n" * line + code, str(ROOT / page), "exec"), namespace)


def test_only_what_needs_more_than_this_test_is_marked_as_not_run():
    marked = [m[3] for path in DOCS.glob("*.md") for m in FENCE.finditer(path.read_text(encoding="utf-8")) if m[1]]
    reasons = ("DistributedDataParallel", "torch.compile", "torch.jit", "aoti", "onnx", "register_sharding")
    assert all(any(reason in code for reason in reasons) for code in marked)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if re.match(r"\w+:", target) or (path.parent == DOCS and file in MADE_LATER):
            continue
        found = path.parent / file if file else path
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", found.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def public_names():
    names = {f"attnkern.{name}" for name in {*attnkern.__all__, *attnkern._LATE}}
    for module in ("nn", "models", "evaluation", "training", "viz"):
        listed = importlib.import_module(f"attnkern.{module}").__all__
        names |= {f"attnkern.{module}" if module == "viz" else f"attnkern.{module}.{name}" for name in listed}
    compat = importlib.import_module("attnkern.compat")
    own = [name for name, thing in vars(compat).items() if getattr(thing, "__module__", None) == compat.__name__]
    return names | {f"attnkern.compat.{name}" for name in own if not name.startswith("_")}


def test_every_public_name_is_in_the_api():
    for package in ("torchvision", "matplotlib"):
        pytest.importorskip(package)
    # That what is mentioned exists, the site's build finds out.
    mentioned = set(re.findall(r"\battnkern[\w.]*\w", (DOCS / "api.md").read_text(encoding="utf-8")))
    assert public_names() <= mentioned


class Fetched(HTMLParser):
    """What a browser loads without being asked: scripts, styles, fonts, pictures, frames."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        relations = set((attrs.get("rel") or "").split())
        if tag == "link" and relations & {"stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "manifest"}:
            self.urls.append(attrs.get("href"))
        if tag != "a":
            self.urls += [attrs[key] for key in ("src", "srcset", "data", "poster") if attrs.get(key)]


def test_the_site_builds_and_fetches_nothing(tmp_path, monkeypatch):
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; make test-all installs it")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in MADE_LATER:
        if not (DOCS / name).exists():
            (tmp_path / "docs" / name).write_text(f"# {name}\n", encoding="utf-8")
    site = tmp_path / "site"
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(tmp_path / "docs"), site_dir=str(site), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)  # raises where anything is warned of

    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.glob("*.md")))
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        for url in parser.urls:
            assert not re.match(r"(\w+:)?//", url), f"{page.name} fetches {url}"
            local = url.partition("?")[0].partition("#")[0]
            assert url.startswith("data:") or local.startswith("/") or (page.parent / local).exists(), url
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(\w+:)?//", style.read_text(encoding="utf-8")), style.name

    api = (site / "api.html").read_text(encoding="utf-8")
    assert 'id="attnkern.window_attention"' in api
    assert "the features' dtype and memory format" in api.replace("&#39;", "'")  # a field's comment
    assert not re.search(r":(func|class|meth|mod):", api)
    assert os.listdir(site / "benchmarks/results")
