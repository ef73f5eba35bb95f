"""What `--size`, the method and the dimension change of the default settings."""

from __future__ import annotations

from typing import Any

__all__ = ["METHODS", "SIZES", "defaults_of"]

# What differs from the defaults, first by method, then by --size; a file given with --config and flags win over both.
METHODS: dict[str, dict[str, Any]] = {
    "dino": {},
    # AdamW: LARS at the paper's rates collapsed these transformers within 25 steps of 8 scans (misc/LOG.md).
    "byol": {"views.local_views": 0, "optim.final_weight_decay": 0.04},
    "igpt": {
        # Grey values must mean the same in every view: nothing but the place, the zoom and the side is random.
        "views.global_views": 1, "views.local_views": 0, "views.global_size": (12, 20, 20), "batch_size": 8,
        "views.global_scale": (1.5, 2.5), "views.through_plane_scale": (1.0, 1.5), "views.contrast": 0.0,
        "views.gamma": 0.0, "views.noise": 0.0, "views.blur": 0.0, "optim.lr": 2e-3, "optim.weight_decay": 0.01,
        "optim.final_weight_decay": 0.01, "optim.beta2": 0.95,
    },
}  # fmt: skip
_WIDTHS = {
    "tiny": {"model.width": 192, "model.depth": 6, "model.heads": 3},
    "small": {"model.width": 384, "model.depth": 12, "model.heads": 6},
    "base": {"model.width": 768, "model.depth": 12, "model.heads": 12},
}
_SCHEDULES: dict[str, dict[str, Any]] = {
    "tiny": {"steps": 10_000, "batch_size": 16, "dino.prototypes": 4096, "dino.momentum": 0.996, "byol.momentum": 0.99},
    "small": {
        "steps": 50_000, "batch_size": 32, "precision": "bf16", "dino.prototypes": 16_384, "dino.hidden": 2048,
        "dino.momentum": 0.998, "byol.momentum": 0.996, "byol.hidden": 4096, "byol.projection": 256,
    },
    "base": {
        "steps": 125_000, "batch_size": 64, "precision": "bf16", "dino.prototypes": 65_536, "dino.hidden": 2048,
        "dino.momentum": 0.9985, "byol.momentum": 0.996, "byol.hidden": 4096, "byol.projection": 256,
    },
}  # fmt: skip
_STRETCH = {"dino.centre_momentum": 0.9, "dino.teacher_temp": 0.07, "dino.freeze_last": 500, "save_every": 1000}
_PATCHES = {3: {"model.patch_size": 8, "model.patch_stride": 4, "model.patch_padding": 2},
            2: {"model.patch_size": 16, "model.patch_stride": 8, "model.patch_padding": 4}}  # fmt: skip
_CROPS: dict[int, dict[str, dict[str, Any]]] = {
    3: {
        # Tokens every 4 voxels, for structures of a few millimetres; two views and no local ones, and 16 scans a step,
        # which batch norm and Sinkhorn want.
        "mini": {"views.global_size": (24, 24, 24), "views.local_views": 0, "model.patch_size": 8,
                 "model.patch_stride": 4, "model.patch_padding": 2, "batch_size": 16, "optim.lr": 1e-3},
        "tiny": {"views.global_size": (48, 48, 48), "views.local_size": (24, 24, 24), "views.local_views": 4},
        "small": {"views.global_size": (64, 64, 64), "views.local_size": (32, 32, 32), "views.local_views": 6},
        "base": {"views.global_size": (96, 96, 96), "views.local_size": (48, 48, 48), "views.local_views": 8},
    },
    2: {
        # A stem of convolutions: without it kNN gained nothing in the minutes that a CPU has (misc/LOG.md).
        "mini": {"views.global_size": (1, 48, 48), "views.local_size": (1, 24, 24), "model.attention": "softmax",
                 "model.stem": "resnet18", "model.patch_size": 1, "model.patch_stride": 1, "model.patch_padding": 0,
                 "batch_size": 32, "steps": 300, "optim.lr": 1e-3},
        "tiny": {"views.global_size": (1, 96, 96), "views.local_size": (1, 48, 48), "views.local_views": 4},
        "small": {"views.global_size": (1, 224, 224), "views.local_size": (1, 96, 96), "views.local_views": 6},
        "base": {"views.global_size": (1, 224, 224), "views.local_size": (1, 96, 96), "views.local_views": 8},
    },
}  # fmt: skip
# Scans: as for images below, batch norm, KoLeo and Sinkhorn keep few scans from even answers; masked patches teach the
# tokens, which is what segmentation reads; milder grey values, no noise and no blur (misc/LOG.md).
_SCANS: dict[str, dict[str, Any]] = {
    "dino": {"dino.norm": "batch", "dino.balance": "sinkhorn", "dino.koleo": 0.1},
    "byol": {"byol.koleo": 0.1},
    "igpt": {},
}
# Not at small and base, whose logits of masked patches would be gigabytes.
_MASKED: dict[str, dict[str, Any]] = {
    "dino": {"dino.masked_patches": 1.0, "model.mask_token": True},
    "byol": {},  # has the term too, as --byol.masked_patches; no run of some length has tried it
    "igpt": {},
}
_SCAN_VIEWS: dict[str, Any] = {"views.contrast": 0.2, "views.gamma": 0.2, "views.noise": 0.0, "views.blur": 0.0}
# Images, of any size: a zoom is a share of the image, and views differ in grey values by less than scans' do, whose
# untrained features they would swamp; texture tells images apart, so neither noise nor blur (misc/LOG.md). Batch norm
# in the head and KoLeo are what keeps small sets from collapsing; with a centre DINO ends at five prototypes of 1024.
_IMAGES: dict[str, dict[str, Any]] = {
    "dino": {
        "dino.norm": "batch",
        "dino.balance": "sinkhorn",
        "dino.koleo": 0.1,
        "dino.momentum": 0.996,
        "views.local_views": 0,
    },
    "byol": {"byol.norm": "sync", "byol.koleo": 0.1, "byol.momentum": 0.996},
    "igpt": {"igpt.patch": (1, 3, 3)},
}
_IMAGE_VIEWS: dict[str, Any] = {
    "views.global_scale": (1.2, 2.0), "views.local_scale": (1.2, 2.0), "views.contrast": 0.2, "views.gamma": 0.2,
    "views.noise": 0.0, "views.blur": 0.0, "model.class_token": False,
}  # fmt: skip
# Tokens that are few enough for Image-GPT: 32^3 / 2^3 = 4096, 64^2 / 2^2 = 1024, and 48^2 / 3^2 = 256 in minutes.
_SEQUENCES: dict[int, dict[str, Any]] = {
    3: {"views.global_size": (32, 32, 32), "views.local_views": 0},
    2: {"views.global_size": (1, 64, 64), "views.local_views": 0, "igpt.patch": (1, 2, 2)},
}
# Maps that are not too coarse for the crops: one place for every 8 or 16 voxels.
_RESNETS: dict[str, dict[str, Any]] = {
    "mini": {"model.depth": 10, "model.base_width": 32, "model.output_stride": 8},
    "tiny": {"model.depth": 18, "model.output_stride": 16},
    "small": {"model.depth": 50, "model.output_stride": 16},
    "base": {"model.depth": 101, "model.output_stride": 16},
}
# Width and heads of the inner and of the outer tokens, and blocks of both: small and base are TNT-S and TNT-B.
_TNTS = {
    "mini": (24, 2, 96, 3, 4),
    "tiny": (24, 4, 192, 3, 6),
    "small": (24, 4, 384, 6, 12),
    "base": (40, 4, 640, 10, 12),
}
SIZES = ("mini", "tiny", "small", "base")


def _tnt(size: str, dims: int) -> dict[str, Any]:
    """Tokens of 8 voxels (3D) or 16 pixels (2D) a side, of 4 in a mini, that hold tokens of 2 or 4."""
    inner, inner_heads, width, heads, depth = _TNTS[size]
    fine: dict[str, Any] = {
        "width": inner,
        "heads": inner_heads,
        "depth": depth,
        "kernel": 4,
        "stride": 2,
        "padding": 1,
    }
    if dims == 2 and size != "mini":
        fine |= {"kernel": 7, "stride": 4, "padding": 3}
    step = 2 if size == "mini" else 4
    coarse = {"width": width, "heads": heads, "depth": depth, "kernel": step, "stride": step}
    return {"model.levels": [fine, coarse], "model.attention": "performer" if dims == 3 else "softmax"}


def defaults_of(method: str, size: str, dims: int, network: str = "transformer") -> dict[str, Any]:
    """Settings by dotted name that these change; ValueError for an unknown method or size."""
    if method not in METHODS or size not in SIZES:
        raise ValueError(f"--size {size}, method {method}: must be of {', '.join(SIZES)} and {', '.join(METHODS)}")
    values: dict[str, Any] = {}
    if size != "mini":
        values |= _WIDTHS[size] | _SCHEDULES[size] | _STRETCH | _PATCHES[dims]
    values |= _CROPS[dims].get(size, {})
    if dims == 2:
        values |= _IMAGE_VIEWS | _IMAGES[method]
    else:
        values |= _SCAN_VIEWS | _SCANS[method] | (_MASKED[method] if size in ("mini", "tiny") else {})
    for name, value in METHODS[method].items():
        # A size's crops and batch win over the method's, but the number of views and what is done to them do not.
        if name not in ("views.global_size", "batch_size") or (dims == 3 and size == "mini"):
            values[name] = value
    if method == "igpt" and size != "mini":
        values |= _SEQUENCES[dims]
    if dims == 2:
        values["views.image_side"] = 2 * values["views.global_size"][1]
    if network != "transformer":
        values = {name: value for name, value in values.items() if not name.startswith("model.")}
        values.pop("dino.masked_patches", None)  # needs a mask token, which only a transformer has
        values |= _RESNETS[size] if network == "resnet" else _tnt(size, dims)
    return values
