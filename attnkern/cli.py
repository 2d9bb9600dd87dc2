"""The ``attnkern`` command, also ``python -m attnkern``."""

import argparse
import platform
from importlib import metadata

import torch

import attnkern
from attnkern import _backend, _ops


def info() -> str:
    """Versions, what is available here, and for each backend that is not, why and how to get it."""

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    lines = [
        f"attnkern {attnkern.__version__} (schemas {_ops.HASH})",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {version('triton')}, "
        f"CUDA of torch {torch.version.cuda or 'none'}, {platform.machine()} {platform.system()}",
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index} {properties.name}, compute capability {properties.major}.{properties.minor}")
    lines.append("")
    lines += [
        f"{name:9} on {device:6} {'available' if missing is None else 'not available: ' + missing}"
        for name, device, missing in _backend.status()
    ]
    chosen = _backend.current()
    lines += ["", f"chosen: {chosen or 'automatically: native, then triton, then reference'}"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="attnkern", description="Fused kernels for spatial attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, available backends, and why the others are not")
    parser.parse_args(arguments)
    print(info())
    return 0
