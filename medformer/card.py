"""The model card next to a checkpoint: what the file knows, and gaps for what only its author knows."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medformer.channels import channel_names

if TYPE_CHECKING:
    from medformer.models import Model

__all__ = ["card_of", "write_card"]


def write_card(model: Model, path: Path) -> Path:
    """Write `<name>.md` next to the checkpoint `path`, unless there is one, which may have been filled in."""
    card = path.with_suffix(".md")
    if not card.exists():
        card.write_text(card_of(model, path.name))
    return card


def card_of(model: Any, name: str) -> str:
    """The text: what the configuration says, how to load the file `name`, and what its author has to add."""
    config = model.config
    volume = "volumes (B, {}, Z, Y, X)" if config.dims == 3 else "images (B, {}, Y, X)"
    chosen = [
        f"| {field.name} | {getattr(config, field.name)} |"
        for field in fields(config)
        if field.default is MISSING or getattr(config, field.name) != field.default
    ]
    if names := channel_names(model):
        flags = (
            f"; after them {len(names)} flags, 1 where a channel is missing" if config.in_channels > len(names) else ""
        )
        chosen.append(f"| channels, in this order | {', '.join(names)}{flags} |")
    rows = "\n".join(chosen) or "| (all) | defaults |"
    use = "features = model.forward_features(x)  # .cls, .patches, .grid"
    if hasattr(model, "codebook"):
        use = "tokens = model.codebook.encode(x)\nfeatures = model.features(tokens)"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""---
library_name: medformer
tags: [medical-imaging, feature-extraction]
---

# {name}

A medformer {type(model).__name__} of {parameters:,} parameters for {config.dims}D {volume.format(config.in_channels)},
which it maps to {config.width} features. What differs from the defaults of {type(config).__name__}:

| field | value |
|---|---|
{rows}

```python
import medformer

model = medformer.load("{name}").eval()
{use}
```

Not a medical device. Not stated by whoever saved this file, and to be filled in before it is shared:

- Data it was trained on, their licence and consent; scanners, body parts, ages, sexes:
- Input: spacing in mm, orientation, how grey values were scaled:
- How it was trained, and for how long:
- How it was evaluated, on whom, with confidence intervals; where it fails:
- Licence of the weights:
"""
