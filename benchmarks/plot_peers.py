"""How many times as fast as its peer each kernel family is on a CPU, as a picture for README.md.

    python benchmarks/plot_peers.py     # benchmarks/results/peers.json to peers.svg; measures nothing

Each row of the JSON file names the shape, the versions, the date and the command that measured it (misc/docs has the
whole tables). Grey text on no background reads on light and on dark pages.
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
GREY, COLOURS = "#808890", {"forward": "#2f81f7", "forward and backward": "#bc6c25"}


def main() -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "peers", "font.family": "sans-serif"}
    measured = json.loads((RESULTS / "peers.json").read_text())
    rows = measured["rows"]
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for shift, (what, colour) in zip((-0.19, 0.19), COLOURS.items(), strict=True):
        ratios = [row[what][1] / row[what][0] for row in rows]
        bars = axes.barh([i + shift for i in range(len(rows))], ratios, 0.36, color=colour, label=what)
        axes.bar_label(bars, [f"{ratio:.1f}x" for ratio in ratios], padding=3, fontsize=8, color=GREY)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['what']}\nagainst {row['peer']}" for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast ({measured['hardware']}, torch {measured['torch']})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY, loc="lower right")
    figure.savefig(RESULTS / "peers.svg", transparent=True, metadata={"Date": None})
    print(RESULTS / "peers.svg")


if __name__ == "__main__":
    main()
