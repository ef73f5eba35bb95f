"""Where loaded weights come from, as `load_pretrained` says it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Origin"]


@dataclass(frozen=True)
class Origin:
    """What was recognised and taken: `print(model.origin)`."""

    layout: str
    """Name of the layout, which `load_pretrained(..., layout=)` takes."""
    compared_with: str
    """The code whose outputs ours were compared with."""
    prefix: str = ""
    """What stood in front of the encoder's names."""
    left_out: tuple[str, ...] = ()
    """Tensors of the file that are not in the model: heads, students, decoders."""
    settings: dict[str, str] = field(default_factory=dict)
    """What no shape says, and where it comes from: heads, norm_eps, activation, rotary periods."""
    axes: str = ""
    """Order of the axes of the input."""
    input: str = ""
    """How its authors scale grey values."""

    def __str__(self) -> str:
        lines = [f"layout {self.layout}, compared with {self.compared_with}"]
        if self.prefix:
            lines.append(f"names without {self.prefix}")
        lines += [f"{name}: {value}" for name, value in self.settings.items()]
        if self.axes:
            lines.append(f"axes of the input: {self.axes}")
        if self.input:
            lines.append(f"input: {self.input}")
        if self.left_out:
            parts = Counter(name.rsplit(".", 1)[0].split(".blocks.")[0] for name in self.left_out)
            shown = ", ".join(f"{part} ({count})" for part, count in list(parts.items())[:12])
            lines.append(f"left out, {len(self.left_out)} tensors: {shown}{', ...' if len(parts) > 12 else ''}")
        return "\n".join(lines)
