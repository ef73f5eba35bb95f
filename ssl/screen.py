"""What a run says: its progress, the scans it uses, and what to do next."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medformer.data.store.limit import Use, shown
from medformer.data.volumes import counted
from medformer.files import write_whole
from roots import Prepared

__all__ = ["Meter", "cache", "closing", "describe", "list_skipped", "reading"]

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
        several = f", {len(scan.there)} of {len(scan.parts)} channels" if scan.parts else ""
        say(f"  {role:9}{scan.name:34} {modality:3} {size:>11} voxels of {spacing} mm (zyx){several}")
    if len(prepared.train) > _LISTED:
        say(f"  and {len(prepared.train) - _LISTED} more to train on")
    for line in counted([s.notes for s in (*prepared.train, *prepared.held_out)], "scans"):
        say(line)
    for line in prepared.notices:
        say(line)
    if prepared.ignored:
        say(f"{prepared.ignored} other files ignored")


def cache(use: Use, prepared: Prepared, say: Callable[[str], None]) -> None:
    """What the run's scans take on the disk; the whole cache, which takes long to count, only where it has a limit."""
    scans = [*prepared.train, *prepared.held_out]
    near = [scan for scan in scans if scan.far is None]
    here = [Path(part.path).stat().st_size for scan in near for part in scan.there]
    line = f"stored: {shown(sum(here))} for these {len(near)} in {use.cache}"
    if use.limit is not None:
        size, entries = use.size()
        line += f", {shown(size)} of {shown(use.limit)} for all {entries} entries there"
    say(line)


def list_skipped(skipped: list[tuple[str, str]], run: Path, say: Callable[[str], None]) -> None:
    """Names and reasons, on the screen and in skipped.txt."""
    if not skipped:
        return
    write_whole(run / "skipped.txt", lambda file: file.write("".join(f"{n}: {r}\n" for n, r in skipped).encode()))
    say(f"{len(skipped)} skipped:")
    for name, reason in skipped[:_LISTED]:
        say(f"  {name}: {reason.removeprefix(f'{Path(name).name}: ')}")
    if len(skipped) > _LISTED:
        say(f"  and {len(skipped) - _LISTED} more, in {run / 'skipped.txt'}")


def closing(
    run: Path, steps: int, weights: str, picture: str | None, best: str | None, say: Callable[[str], None],
    channels: str = "", builtin: bool = False,
) -> None:  # fmt: skip
    """What the run left, and what to do with it. channels: flags that say what a case is."""
    own = "\n  on your own scans     medformer pretrain --data.root DIR" if builtin else ""
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
Next:{own}
  does it help          medformer evaluate {run} --task cases.csv{channels}
  teach it answers      medformer finetune {run} --task cases.csv{channels}
  what it sees          medformer report {run} {"CASE" if channels else "SCAN"}
  go on for longer      medformer pretrain --resume {run} --steps {2 * steps}
  in Python             import medformer
                        model = medformer.load("{run}/{weights}").eval()
  curves                tensorboard --logdir {run.parent}""")
