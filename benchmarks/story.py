"""What a run of the benchmarks says: a row a family, pass and shape, ours beside the best peer; as a table and a plot.

pytest benchmarks --benchmark-only --story benchmarks/results     # story.json, story.md and story.svg there
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Measured", "Row", "rows", "table", "write"]

# They compute another function (exact attention, attention without a bias) and stand for scale.
_OTHER_FUNCTIONS = ("sdpa_exact", "xformers_exact", "without_bias")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One benchmark."""

    family: str
    direction: str
    """'forward', 'step' (forward and backward), 'memory', ..."""
    implementation: str
    shape: str
    ms: float
    share_of_floor: float | None = None
    peak_mib: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    family: str
    direction: str
    shape: str
    ms: float
    peer: str | None
    """The fastest that computes the same."""
    peer_ms: float | None
    share_of_floor: float | None
    peak_mib: float | None
    peer_mib: float | None


def _kind(implementation: str) -> tuple[str, bool]:
    """(what is computed, whether it is ours) of 'medformer', 'grid_medformer', 'buckets_transformers', ..."""
    group = next((name for name in ("buckets", "grid", "raw", "to_outer") if implementation.startswith(name)), "")
    if not group and "causal" in implementation:
        group = "causal"
    return group, "medformer" in implementation


def rows(measured: list[Measured]) -> list[Row]:
    """In the order measured; ours is the fastest of our forms, memory that of the benchmark of memory."""
    times = [m for m in measured if "memory" not in m.direction and m.implementation not in _OTHER_FUNCTIONS]
    memory = {
        (m.family, m.shape, m.implementation, m.direction.removeprefix("memory").strip() or "step"): m.peak_mib
        for m in measured
        if "memory" in m.direction
    }
    found = []
    for key in dict.fromkeys((m.family, m.direction, m.shape, _kind(m.implementation)[0]) for m in times):
        same = [m for m in times if (m.family, m.direction, m.shape, _kind(m.implementation)[0]) == key]
        ours = min((m for m in same if _kind(m.implementation)[1]), key=lambda m: m.ms, default=None)
        if ours is None:
            continue
        peer = min((m for m in same if not _kind(m.implementation)[1]), key=lambda m: m.ms, default=None)

        def mib(m: Measured | None, direction: str = key[1]) -> float | None:
            return None if m is None else memory.get((m.family, m.shape, m.implementation, direction), m.peak_mib)

        found.append(
            Row(
                family=f"{key[0]} {key[3]}".strip(), direction=key[1], shape=key[2], ms=ours.ms,
                peer=peer.implementation if peer else None, peer_ms=peer.ms if peer else None,
                share_of_floor=ours.share_of_floor, peak_mib=mib(ours), peer_mib=mib(peer),
            )
        )  # fmt: skip
    return sorted(found, key=lambda row: row.family)  # stable: within a family as measured


def table(found: list[Row]) -> str:
    """Markdown, which reads well in a terminal too."""
    header = ("family", "pass", "shape", "ours ms", "best peer", "peer ms", "ratio", "of floor", "MiB", "peer MiB")

    def number(x: float | None, form: str) -> str:
        return "" if x is None else format(x, form)

    lines = [header] + [
        (
            row.family, row.direction, row.shape, number(row.ms, ".2f"), row.peer or "", number(row.peer_ms, ".2f"),
            number(row.peer_ms / row.ms if row.peer_ms else None, ".2f") + ("x" if row.peer_ms else ""),
            number(row.share_of_floor, ".0%"), number(row.peak_mib, ".0f"), number(row.peer_mib, ".0f"),
        )
        for row in found
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def write(folder: Path, found: list[Row], machine: str) -> None:
    """story.json, story.md and, of what has a peer, story.svg."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "story.json").write_text(json.dumps({"machine": machine, "rows": [asdict(r) for r in found]}, indent=1))
    (folder / "story.md").write_text(f"{machine}\n\n{table(found)}\n")
    compared = [(row, row.peer_ms / row.ms) for row in found if row.peer_ms]
    figure = Figure(figsize=(9, 1 + 0.24 * len(compared)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([f"{row.family} {row.direction}, {row.shape}" for row, _ in compared], [x for _, x in compared])
    axes.bar_label(bars, [f"{x:.1f}x {row.peer}" for row, x in compared], padding=3, fontsize=7)
    axes.axvline(1, color="#808890", linewidth=1)
    axes.tick_params(labelsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as the best peer ({machine})", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "story.svg", metadata={"Date": None})
