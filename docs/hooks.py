"""Additions to the documentation site that mkdocs.yml cannot express."""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results/"


def on_files(files, config):
    """Adds the plots of the benchmarks, which are outside the folder of the pages."""
    for plot in sorted((ROOT / RESULTS).glob("*.svg")):
        files.append(File.generated(config, RESULTS + plot.name, abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown, **_):
    return markdown.replace(f"](../{RESULTS}", f"]({RESULTS}")


def on_page_content(html, **_):
    """Turns the docstrings' Sphinx roles into links, where the API page has the name."""

    def link(match):
        name = match[2].removeprefix("~")
        short = name if name.startswith("attnkern.") else f"attnkern.{name}"
        return f'<autoref optional identifier="{short}"><code>{name}</code></autoref>'

    return re.sub(r":(func|class|meth|mod):<code>([^<]+)</code>", link, html)


class FieldComments(griffe.Extension):
    """Takes the ``#:`` comment after a field of a NamedTuple as its docstring."""

    def on_attribute_instance(self, *, node, attr, **_):
        if attr.docstring is not None or attr.lineno is None or not isinstance(attr.filepath, Path):
            return
        line = attr.lines_collection[attr.filepath][attr.lineno - 1]
        _, mark, comment = line.partition("#: ")
        if mark:
            attr.docstring = griffe.Docstring(comment.strip(), parent=attr)
