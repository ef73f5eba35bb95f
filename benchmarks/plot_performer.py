"""Time against the number of tokens, FAVOR+ and exact attention, both directions, as a picture.

    python benchmarks/plot_performer.py                     # writes benchmarks/results/performer_time.png and .json

B1 H8 D64 M256, float32 on a CPU and bfloat16 on a GPU. Each length doubles the one before; a curve ends where the next
point would take longer than `--limit` seconds a call. Medians of three calls after one to warm up.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from measuring import DEVICE, environment
from medformer_kernels import orthogonal_features, performer_attention

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
HEADS, WIDTH, FEATURES = 8, 64, 256
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def seconds(attention: Attention, tokens: int, *, backward: bool, repeats: int = 3) -> float:
    """Median time of one call."""
    q, k, v, dout = (torch.randn(1, HEADS, tokens, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(4))
    q, k, v = (x.requires_grad_(backward) for x in (q, k, v))
    times = []
    for _ in range(repeats + 1):
        for x in (q, k, v):
            x.grad = None
        start = time.perf_counter()
        out = attention(q, k, v)
        if backward:
            out.backward(dout)
        if ON_GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def curve(attention: Attention, lengths: list[int], *, backward: bool, limit: float, exponent: int) -> dict[int, float]:
    """Seconds by length, up to the first that would exceed `limit`: time grows with N^exponent."""
    found: dict[int, float] = {}
    for tokens in lengths:
        if found and found[tokens // 2] * 2**exponent > limit:
            break
        found[tokens] = seconds(attention, tokens, backward=backward)
        print(f"  {tokens:>7} tokens {found[tokens] * 1e3:10.1f} ms", flush=True)
    return found


def draw(results: dict[str, dict[str, dict[int, float]]], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), sharey=True)
    styles = {"exact": "tab:red", "FAVOR+": "tab:blue"}
    for axes, (name, curves) in zip(panels, results.items(), strict=True):
        for label, points in curves.items():
            colour = next(colour for start, colour in styles.items() if label.startswith(start))
            line = "--" if label.endswith("causal") else "-"
            axes.plot(list(points), list(points.values()), line, marker="o", markersize=4, color=colour, label=label)
        ticks = sorted({tokens for points in curves.values() for tokens in points})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{tokens // 1024}k" for tokens in ticks])
        axes.set(title=name, xlabel="tokens")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a call")
    panels[0].legend()
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=262_144 if ON_GPU else 32_768, help="tokens")
    parser.add_argument("--limit", type=float, default=2.0, help="seconds a call")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "performer_time.png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    omega = orthogonal_features(FEATURES, WIDTH, device=DEVICE)
    lengths = [1024 << step for step in range((arguments.longest // 1024).bit_length())]
    attentions: dict[str, tuple[Attention, int]] = {
        "exact": (F.scaled_dot_product_attention, 2),
        "exact, causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 2),
        "FAVOR+": (lambda q, k, v: performer_attention(q, k, v, omega), 1),
        "FAVOR+, causal": (lambda q, k, v: performer_attention(q, k, v, omega, causal=True), 1),
    }
    results = {}
    for name, backward in (("forward", False), ("forward and backward", True)):
        results[name] = {}
        for label, (attention, exponent) in attentions.items():
            print(f"{name}, {label}")
            results[name][label] = curve(
                attention, lengths, backward=backward, limit=arguments.limit, exponent=exponent
            )
    described = environment() | {"date": f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}"}
    shape = f"B1 H{HEADS} D{WIDTH} M{FEATURES} {str(DTYPE)[6:]}"
    draw(results, f"{shape}; {described['hardware']}, torch {described['torch']}, {described['date']}", arguments.out)
    arguments.out.with_suffix(".json").write_text(
        json.dumps({"shape": shape, **described, "seconds": results}, indent=1) + "\n"
    )
    print(arguments.out)


if __name__ == "__main__":
    main()
