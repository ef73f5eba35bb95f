"""How the tables in kernels/medformer_kernels/configs are written."""

from __future__ import annotations

import json

__all__ = ["dump"]


def dump(tables: dict[str, dict[str, list]]) -> str:
    """JSON with an entry a line, so that a change of one tile is a change of one line."""
    parts = []
    for kernel, by_arch in tables.items():
        rows = [
            f'    "{arch}": [\n' + ",\n".join(f"      {json.dumps(entry)}" for entry in entries) + "\n    ]"
            for arch, entries in by_arch.items()
        ]
        parts.append(f'  "{kernel}": {{\n' + ",\n".join(rows) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"
