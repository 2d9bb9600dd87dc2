"""Which combinations of a test's parameters run: conftest.py."""

import collections
import itertools
from types import SimpleNamespace

from conftest import _pairs

FACTORS = [list("abcde"), ["contiguous", "channels_last"], ["float64", "float32"], list("xyz")]


class Item:
    """What pytest collects of a test with some parameters."""

    nodeid = "test.py::test_it[ids]"

    def __init__(self, ids, backend, marks):
        self.callspec, self.marks = SimpleNamespace(params={"backend": backend}, _idlist=ids), marks

    def get_closest_marker(self, name):
        return name if name in self.marks else None


def collected(backend, *marks):
    return [Item(ids, backend, marks) for ids in itertools.product(*FACTORS)]


def test_any_two_values_meet_in_a_test():
    """For each backend, equally often, and in as few tests as the two longest parameters need."""
    both = list(_pairs(collected("native", "pairs") + collected("reference", "pairs")))
    for backend in ("native", "reference"):
        chosen = [item.callspec._idlist for item in both if item.callspec.params["backend"] == backend]
        assert len(chosen) == 5 * 3
        for i, j in itertools.combinations(range(4), 2):
            met = collections.Counter((ids[i], ids[j]) for ids in chosen)
            assert met.keys() == set(itertools.product(FACTORS[i], FACTORS[j]))
            assert max(met.values()) - min(met.values()) <= 1


def test_other_tests_run_for_every_combination():
    items = collected("native", "large")
    assert list(_pairs(items)) == items
