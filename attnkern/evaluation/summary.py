"""The results of :func:`attnkern.evaluation.protocols.evaluate` as a table with one number per protocol."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple


class _Headline(NamedTuple):
    """How the summary shows one protocol."""

    show: Callable[[dict[str, Any]], str]  # from its results to its headline number
    meaning: str


def _number(name, value):
    return f"{name} undefined" if value is None else f"{name} {value:.3f}"


def _mean(values):
    """Mean of the values that are defined."""
    values = [value for value in values if value is not None]
    return statistics.mean(values) if values else None


def _interpretability(result):
    scores = [entry["scores"]["0.9"] for entry in result.values() if isinstance(entry, dict)]
    return _number("score", _mean(scores))


def _fooling(result):
    return _number("rate", dict(zip([round(eps * 255) for eps in result["eps"]], result["rates"], strict=True))[8])


def _anchors(result):
    return ", ".join(f"{entry['used']} of {entry['anchors']}" for entry in result.values())


#: By name of the protocol; the details are in the results.
_HEADLINES = {
    "top1": _Headline(lambda r: _number("accuracy", r["accuracy"]), "share of images classified correctly"),
    "transfer": _Headline(lambda r: _number("accuracy", r["accuracy"]), "the same on data it was not trained on"),
    "interpretability": _Headline(
        _interpretability, "share of maps that stay (cosine 0.9) when the image changes but not its class"
    ),
    "fooling": _Headline(_fooling, "share of predictions changed by one gradient step of 8/255"),
    "crossdomain": _Headline(
        lambda r: _number("accuracy", r["accuracy"]), "linear SVM on the classifier's inputs, in cross-validation"
    ),
    "localisation": _Headline(
        lambda r: _number("pointing", r["pointing"]), "share of maps whose maximum lies in the object's box"
    ),
    "orientation": _Headline(
        lambda r: _number(f"{'high' if r['sign'] == 1 else 'low'} values, pointing", r["oriented"]["pointing"]),
        "which values mark the objects on training images; localisation of the map, negated if low ones do",
    ),
    "segmentation": _Headline(
        lambda r: _number("IoU", _mean(entry["jaccard"] for entry in r.values())),
        "overlap of binarised maps and object masks, mean over the classes",
    ),
    "query": _Headline(
        lambda r: _number("change", _mean(entry["mean change"] for entry in r.values())),
        "relative change of attention with another image's query",
    ),
    "rectangles": _Headline(
        lambda r: f"centre ({r['row']['mean']:.3f}, {r['column']['mean']:.3f})",
        "mean row and column of the rectangles, 0 to 1",
    ),
    "rates": _Headline(
        lambda r: _number("fitting", r["fitting"]), "overlap (IoU) of the rectangle and the object's box"
    ),
    "equivariance": _Headline(
        lambda r: _number("centre", _mean(entry["centre"] for entry in r.values())),
        "distance from the rectangle's centre to where the transformation moves it",
    ),
    "anchors": _Headline(_anchors, "anchors that are used for at least one position"),
}


def _text(result: dict[str, Any], key: str) -> str | None:
    """The text under a key. Results by class hold no text, so that a class may be called "error"."""
    value = result.get(key)
    return value if isinstance(value, str) else None


def failures(results: dict[str, Any]) -> list[str]:
    """Names of the protocols that ended in an error."""
    return [name for name, result in results.items() if _text(result, "error") is not None]


def summary(results: dict[str, Any]) -> str:
    """A table of the protocols, each with its headline number and what it means, or with its error.

    Protocols that do not apply are named in the last line.

    Args:
        results: of :func:`attnkern.evaluation.protocols.evaluate`, after
            :func:`attnkern.evaluation.protocols.plain`.
    """
    rows = [("protocol", "result", "meaning")]
    omitted = []
    for name, result in results.items():
        error = _text(result, "error")
        if _text(result, "not applicable") is not None:
            omitted.append(name)
        elif error is not None:
            rows.append((name, "failed", error.partition("\n")[0]))
        else:
            headline = _HEADLINES[name]
            rows.append((name, headline.show(result), headline.meaning))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:{widths[0]}}  {result:{widths[1]}}  {meaning}" for name, result, meaning in rows]
    if omitted:
        lines.append(f"not applicable: {', '.join(omitted)}")
    return "\n".join(lines)
