"""What a run shows: its progress, the scans it uses, a picture of where the model looks, and what to do next."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from medformer import Backbone
from prepare import Prepared, Stored, load
from runs import write_whole

__all__ = ["Meter", "attention_picture", "closing", "describe", "reading"]

_EVERY_S = 5.0  # between lines where there is no terminal
_LISTED = 12  # scans named before "and N more"


class Meter:
    """A progress bar in a terminal; elsewhere a line every few seconds."""

    def __init__(
        self, total: int, done: int, scans_per_step: int, tty: bool | None = None, figure: str = "teacher entropy"
    ) -> None:
        """`figure` names the second number that is shown."""
        self.figure = figure
        self.total, self.done, self.scans = total, done, scans_per_step
        self.before = self.spoke = time.monotonic()
        self.loss = self.second = self.step_s = math.nan
        tty = sys.stdout.isatty() if tty is None else tty
        layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}, {remaining} left]"
        self.bar = tqdm(total=total, initial=done, desc="step", bar_format=layout, **_terminal()) if tty else None

    def __call__(self, loss: float, second: float) -> None:
        """One step is done."""
        self.done += 1
        now = time.monotonic()
        self.loss, self.second = _smooth(self.loss, loss, 0.1), _smooth(self.second, second, 0.1)
        self.step_s = _smooth(self.step_s, max(now - self.before, 1e-9), 0.05)
        self.before = now
        figures = f"loss {self.loss:.3f}, {self.figure} {self.second:.2f}, {self.scans / self.step_s:.1f} scans/s"
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update()
        elif now - self.spoke >= _EVERY_S or self.done == self.total:
            self.spoke = now
            left = duration((self.total - self.done) * self.step_s)
            print(f"step {self.done}/{self.total}: {figures}, {left} left", flush=True)

    def say(self, line: str) -> None:
        """A line that does not break the bar."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _terminal() -> dict[str, Any]:
    # Measured here and not by tqdm, which shows nothing in a terminal that claims to have no rows (containers).
    columns, rows = shutil.get_terminal_size()
    return {"file": sys.stdout, "ncols": min(columns, 140), "nrows": rows}


def _smooth(old: float, new: float, share: float) -> float:
    return new if math.isnan(old) else old + share * (new - old)


def reading(scans: list[Any]) -> Iterable[Any]:
    """Progress over scans being read."""
    if sys.stdout.isatty():
        return tqdm(scans, desc="reading", unit="scan", leave=False, **_terminal())
    return _spoken(scans)


def _spoken(scans: list[Any]) -> Iterator[Any]:
    spoke = time.monotonic()
    for number, scan in enumerate(scans):
        if time.monotonic() - spoke >= _EVERY_S:
            spoke = time.monotonic()
            print(f"read {number}/{len(scans)} scans", flush=True)
        yield scan


def duration(seconds: float) -> str:
    """75 -> "1:15"."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def describe(prepared: Prepared, builtin: bool, say: Callable[[str], None]) -> None:
    """Which scans are used, which are held out, and how many were skipped."""
    count = len(prepared.train) + len(prepared.held_out)
    made = sum(scan.name.startswith("synthetic/") for scan in (*prepared.train, *prepared.held_out)) if builtin else 0
    if builtin:
        say(f"{count} scans: {count - made} real, from nibabel and pydicom; {made} synthetic CT phantoms")
    else:
        say(f"{count} scans")
    rows = [("train", s) for s in prepared.train[:_LISTED]] + [("held out", s) for s in prepared.held_out[:_LISTED]]
    for role, scan in rows:
        size = "x".join(map(str, scan.shape))
        spacing = "x".join(f"{mm:.3g}" for mm in scan.spacing_mm)
        modality = "" if scan.modality == "unknown" else scan.modality
        say(f"  {role:9}{scan.name:34} {modality:3} {size:>11} voxels of {spacing} mm (zyx)")
    if len(prepared.train) > _LISTED:
        say(f"  and {len(prepared.train) - _LISTED} more to train on")
    if prepared.skipped:
        say(f"{len(prepared.skipped)} skipped, listed at the end")
    if prepared.ignored:
        say(f"{prepared.ignored} other files ignored")


def list_skipped(skipped: list[tuple[str, str]], run: Path, say: Callable[[str], None]) -> None:
    """Names and reasons, on the screen and in skipped.txt."""
    if not skipped:
        return
    write_whole(run / "skipped.txt", lambda file: file.write("".join(f"{n}: {r}\n" for n, r in skipped).encode()))
    say(f"Skipped {len(skipped)}:")
    for name, reason in skipped[:_LISTED]:
        say(f"  {name}: {reason.removeprefix(f'{Path(name).name}: ')}")
    if len(skipped) > _LISTED:
        say(f"  and {len(skipped) - _LISTED} more, in {run / 'skipped.txt'}")


def closing(
    run: Path, steps: int, weights: str, picture: str | None, best: str | None, say: Callable[[str], None]
) -> None:
    """What the run left, and what to do with it."""
    backbone = weights == "backbone.safetensors"
    what = "weights of the backbone" if backbone else "weights and codebook"
    shows = "where the class token looks in a scan" if backbone else "scans, the half that was shown, completions"
    look = f"\n  {picture:21} {shows}" if picture else ""
    look += f"\n  best/                 {best}" if best else ""
    say(f"""\
{run}/
  {weights:21} {what}{look}
  config.yaml           every setting, ready for --config
  metrics.jsonl         one line a step; tensorboard/ has the same
  checkpoints/          the newest, to go on from
Next:
  on your own scans     python ssl/train.py --data.root DIR
  go on for longer      python ssl/train.py --resume {run} --steps {2 * steps}
  in Python             import medformer
                        model = medformer.load("{run}/{weights}").eval()
  curves                tensorboard --logdir {run.parent}""")


@torch.no_grad()
def attention_picture(
    backbone: Backbone, scan: Stored, path: Path, *, caption: str, limit: tuple[int, int, int]
) -> None:
    """Axial, coronal and sagittal slices of a scan, plain and with the class token's attention over them.

    Radiological layout: the patient's right is on the left of the picture. Each plane goes through the middle of the
    tissue; pixels are as wide as they are in the patient. A scan above `limit` voxels is cropped around that middle.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    whole, points = load(scan.path), load(scan.points_path)
    middle = np.median(points, axis=0) if len(points) else np.array(whole.shape) / 2
    size = np.minimum(whole.shape, limit)
    start = np.clip(np.round(middle - size / 2), 0, np.array(whole.shape) - size).astype(int)
    voxels = np.asarray(whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))], dtype=np.float32)
    at = np.clip(np.round(middle - start), 0, size - 1).astype(int)

    device = next(backbone.parameters()).device
    x = torch.from_numpy(voxels)[None, None].to(device)
    kernel = getattr(backbone.config, "kernel", x.shape[2:])  # a TNT takes what is larger than its views
    least = [max(n, k) for n, k in zip(x.shape[2:], kernel, strict=True)]
    if least != list(x.shape[2:]):
        pad = [p for n, k in zip(reversed(x.shape[2:]), reversed(least), strict=True) for p in (0, k - n)]
        x = F.pad(x, pad, mode="replicate")
    weights = backbone.attention_map(x)[0].float().mean(0)  # over the heads
    weights = weights / weights.mean()
    weights = F.interpolate(weights[None, None], size=x.shape[2:], mode="trilinear", align_corners=False)[0, 0]
    attention = weights[tuple(slice(0, n) for n in voxels.shape)].cpu().numpy()

    dark, bright = np.percentile(voxels, (1, 99.5))
    top = max(float(np.percentile(attention, 99.8)), 1.2)
    z_mm, y_mm, x_mm = (float(n * mm) for n, mm in zip(voxels.shape, scan.spacing_mm, strict=True))
    planes = [
        (0, "axial", "RLAP", x_mm, y_mm),
        (1, "coronal", "RLSI", x_mm, z_mm),
        (2, "sagittal", "APSI", y_mm, z_mm),
    ]
    # Laid out in millimetres, so that all planes have one scale: left edges, bottoms of the two rows, margins.
    gap = 0.09 * max(x_mm, y_mm, z_mm)
    row_mm = max(y_mm, z_mm)
    width = 2 * x_mm + y_mm + 7.9 * gap
    height = 2 * row_mm + 5.6 * gap
    inches = 11.5 / max(width, height)
    figure = Figure(figsize=(width * inches, height * inches), facecolor="black")
    FigureCanvasAgg(figure)
    shown = None
    left = gap
    for axis, title, letters, across, up in planes:
        picture = np.take(voxels, at[axis], axis)[:, ::-1]  # x and y run to the right and the front: shown reversed
        heat = np.take(attention, at[axis], axis)[:, ::-1]
        for row, bottom in enumerate((2 * gap + row_mm, gap)):
            bottom += (row_mm - up) / 2
            axes = figure.add_axes((left / width, bottom / height, across / width, up / height))
            axes.set_axis_off()
            layout: dict[str, Any] = {"origin": "lower", "extent": (0.0, across, 0.0, up), "aspect": "auto"}
            axes.imshow(picture, cmap="gray", vmin=dark, vmax=bright, interpolation="bicubic", **layout)
            if row:
                alpha = 0.7 * np.clip((heat - 1) / (top - 1), 0, 1) ** 0.7
                shown = axes.imshow(heat, cmap="inferno", vmin=1, vmax=top, alpha=alpha, **layout)
            sides = ((-0.25 * gap, up / 2), (across + 0.25 * gap, up / 2), (across / 2, up), (across / 2, 0.0))
            for letter, (u, v), va in zip(letters, sides, ("center", "center", "bottom", "top"), strict=True):
                axes.text(u, v, letter, ha="center", va=va, color="#8ecbff", fontsize=9)
        middle_mm = (left + across / 2) / width
        figure.text(middle_mm, (2.7 * gap + 2 * row_mm) / height, title, color="white", ha="center", fontsize=11)
        left += across + 1.1 * gap
    assert shown is not None
    bar_mm = 10.0 * max(1, round(0.2 * x_mm / 10))
    rule = figure.add_axes((gap / width, 0.45 * gap / height, bar_mm / width, 0.08 * gap / height), facecolor="white")
    rule.set_xticks([])
    rule.set_yticks([])
    figure.text((1.3 * gap + bar_mm) / width, 0.33 * gap / height, f"{bar_mm / 10:.0f} cm", color="white", fontsize=9)
    bar = figure.colorbar(shown, cax=figure.add_axes((left / width, gap / height, 0.35 * gap / width, row_mm / height)))
    bar.set_label("attention, times its mean (clear at 1)", color="white")
    bar.ax.tick_params(colors="white")
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.ax.yaxis.set_major_formatter("{x:.2f}")
    shape, spacing = "x".join(map(str, whole.shape)), " x ".join(f"{mm:.3g}" for mm in scan.spacing_mm)
    cropped = "" if voxels.shape == whole.shape else f", middle {'x'.join(map(str, voxels.shape))} shown"
    modality = "" if scan.modality == "unknown" else f"{scan.modality}, "
    figure.text(0.5, 1 - 0.75 * gap / height, f"{caption}: {scan.name}", color="white", ha="center", fontsize=13)
    figure.text(
        0.5, 1 - 1.4 * gap / height, f"{modality}{shape} voxels of {spacing} mm (zyx){cropped}; below: attention of "
        "the class token, last block, mean of heads", color="#bbbbbb", ha="center", fontsize=9,
    )  # fmt: skip
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110, facecolor="black"))


if __name__ == "__main__":  # python ssl/report.py CHECKPOINT SCAN...
    import page

    sys.exit(page.main())
