"""Writes the bill of materials, CycloneDX JSON: attnkern, what it needs and what its extras can add. `make sbom`

Versions and licences are those of the packages installed here. What only serves development is no part of it. The same
packages make the same bytes: the time is SOURCE_DATE_EPOCH, the serial number follows from version and time.
"""

import os
import sys
import time
import uuid
from datetime import UTC, datetime
from importlib.metadata import Distribution, distribution
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "attnkern"
DEVELOPMENT = {"bench", "dev", "docs"}


def closure(extras: set[str]) -> dict[str, set[str]]:
    """The names of attnkern with ``extras`` and of every package that it needs here, and the names that each needs."""
    asked: dict[str, set[str]] = {}
    found: dict[str, set[str]] = {}
    queue = [(ROOT, {"", *extras})]
    while queue:
        name, extras = queue.pop()
        if extras <= asked.get(name, set()):
            continue
        asked[name] = asked.get(name, set()) | extras
        requirements = [Requirement(text) for text in distribution(name).requires or ()]
        needed = [
            (canonicalize_name(r.name), {"", *r.extras})
            for r in requirements
            if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in asked[name])
        ]
        found[name] = {other for other, _ in needed} - {name}
        queue += needed
    return found


def licence(package: Distribution) -> License:
    """What the package declares: an SPDX expression where it has one, else a name, else its classifiers."""
    fields = package.metadata
    name = fields.get("License", "")
    classifiers = [c.rpartition(" :: ")[2] for c in fields.get_all("Classifier", ()) if c.startswith("License ::")]
    short = name if 0 < len(name) < 60 and name != "UNKNOWN" else ", ".join(classifiers)
    return LicenseFactory().make_from_string(fields.get("License-Expression") or short or "not declared")


def component(name: str, scope: ComponentScope | None) -> Component:
    package = distribution(name)
    purl = PackageURL("pypi", name=name, version=package.version)
    return Component(
        name=name,
        version=package.version,
        type=ComponentType.LIBRARY,
        description=package.metadata["Summary"],
        licenses=[licence(package)],
        purl=purl,
        bom_ref=str(purl),
        scope=scope,
    )


def bill() -> str:
    extras = set(distribution(ROOT).metadata.get_all("Provides-Extra")) - DEVELOPMENT
    edges, required = closure(extras), closure(set())
    components = {
        name: component(name, ComponentScope.REQUIRED if name in required else ComponentScope.OPTIONAL)
        for name in edges
    }
    root = components[ROOT] = component(ROOT, None)
    moment = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    bom = Bom(
        components=[part for part in components.values() if part is not root],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{root.purl}#{moment}"),
    )
    bom.metadata.component = root
    bom.metadata.timestamp = datetime.fromtimestamp(moment, UTC)
    for name, others in edges.items():
        bom.register_dependency(components[name], [components[other] for other in others])
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1], f"{ROOT}-{distribution(ROOT).version}.cdx.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(bill(), encoding="utf-8")
    print(path)
