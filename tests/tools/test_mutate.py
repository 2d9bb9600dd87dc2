"""The faults that mutate.py derives from the kernels' sources, and the published result of its last run."""

import ast
import json

import mutate
import pytest

FILES = mutate.kernel_files()


def test_every_mechanism_is_judged_by_its_tests():
    folder = mutate.ROOT / "attnkern/_operators"
    assert mutate.OPERATORS.keys() == {path.stem for path in folder.glob("*.py")} - {"__init__", "record"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(mutate.ROOT)))
def test_faults_of_a_file(path):
    """Each fault changes code in one place; the same seed draws the same faults."""
    text, code = path.read_text(encoding="utf-8"), mutate.code_of(path)
    assert len(code) == len(text)
    assert code.count("\n") == text.count("\n")
    faults = [fault for of_class in mutate.faults_in(path).values() for fault in of_class]
    for fault in faults:
        begin, end, new = fault["at"]
        assert code[begin:end] == text[begin:end] != new
        assert fault["line"] == text.count("\n", 0, begin) + 1
        line = text[text.rfind("\n", 0, begin) + 1 : begin] + new + text[end : text.find("\n", end)]
        assert line.strip() == fault["after"]
        if path.suffix == ".py":
            first, last = text.rfind("\n\n\n", 0, begin), text.find("\n\n\n", end)  # the definition around it
            ast.parse(text[max(first, 0) : begin] + new + text[end : last if last >= 0 else None])
    orders = [[fault["at"] for fault in mutate.drawn(path, seed)] for seed in (1, 1, 2)]
    assert len(orders[0]) == len(faults)
    assert orders[0] == orders[1] != orders[2]


def test_every_class_has_faults_in_every_language():
    for suffixes in ((".cpp", ".h"), (".cu", ".cuh"), (".py",)):
        classes = {name for path in FILES if path.suffix in suffixes for name in mutate.faults_in(path)}
        assert classes == set(mutate.FAULTS), suffixes


@pytest.mark.parametrize(
    "suffix, code",
    [(".cpp", '#define A 1\nint a = 0; // b + 1\nauto s = "c < d"; /* e * 2 */\n'),
     (".py", 'import os\n\n\n@jit(x=1)\ndef f(a=1):\n    """b + 1"""\n    return a  # c < d\n')],
)  # fmt: skip
def test_comments_strings_and_declarations_are_not_code(suffix, code, tmp_path):
    path = tmp_path / f"source{suffix}"
    path.write_text(code, encoding="utf-8")
    left = mutate.code_of(path).split()
    assert left == (["int", "a", "=", "0;", "auto", "s", "=", ";"] if suffix == ".cpp" else ["return", "a"])


def test_published_result():
    """The page matches the result, and each survivor has an explanation."""
    results = json.loads(mutate.RESULTS.read_text(encoding="utf-8"))
    assert mutate.PAGE.read_text(encoding="utf-8") == mutate.page(results), "run tests/mutate.py --page"
    assert all(m["caught"] or m.get("why") for m in results["mutants"])
