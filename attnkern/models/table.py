"""The table of networks of ``attnkern models`` and docs/models.md."""

import torch

from attnkern.models.registry import create_model, list_models, map_names


def table(num_classes: int = 10) -> str:
    """Markdown table: parameters of each network at full width, trained parameters, names of the attention maps."""
    lines = ["| network | parameters | trained parameters | attention maps |", "|---|---|---|---|"]
    for name in list_models():
        with torch.device("meta"):
            network = create_model(name, num_classes)
        counts = [
            sum(p.numel() for p in network.parameters() if p.requires_grad or not trained) for trained in (False, True)
        ]
        maps = ", ".join(f"`{map}`" for map in map_names(network)) or "none"
        lines.append(f"| `{name}` | {counts[0]:,} | {counts[1]:,} | {maps} |")
    return "\n".join(lines) + "\n"
