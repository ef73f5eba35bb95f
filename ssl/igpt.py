"""Image-GPT: scans as sequences of tokens, each predicted from those before it, or masked ones from the others.

Source: Chen et al. 2020, "Generative Pretraining from Pixels", section 2. Differs: tokens are k-means entries of
normalised intensities (HU / 500 for CT, z-scores for MR) or of patches of them. The model: `medformer.image_gpt`.
Axes: B scans, N tokens, V entries of the codebook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import medformer
from medformer import BackboneConfig
from medformer.errors import UserError
from medformer.image_gpt import ImageGPT, ImageGPTConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["Igpt", "IgptConfig", "IgptEncoder", "igpt_loss", "random_mask"]


@dataclass(frozen=True, kw_only=True)
class IgptConfig:
    """Tokens and objective of Image-GPT; width, depth, heads and attention are the --model's."""

    colours: int = 512
    """V, entries of the codebook [512]. 2 or more."""
    patch: tuple[int, int, int] = (2, 2, 2)
    """Voxels of the view that make one token, z,y,x; 1,1,1 for single grey values [1]. Must divide
    --views.global_size."""
    order: Literal["raster", "morton"] = "raster"
    """Sequence of the tokens: row by row, or along the Z-order curve, where neighbours stay close [raster]."""
    objective: Literal["autoregressive", "bert"] = "autoregressive"
    """autoregressive: each token is predicted from those before it. bert: masked ones from all others."""
    expire_span: int = 0
    """Longest life of a token, in tokens, with Expire-Span attention in place of --model.attention; 0 turns it off."""
    span_weight: float = 0.01
    """Weight of the loss that keeps Expire-Span's spans short. 0 or more."""
    mask_share: float = 0.15
    """Share of masked tokens with objective bert [0.15]. Above 0, below 1."""
    codebook: str | None = None
    """Take the codebook of this model (image_gpt.safetensors of a run) instead of fitting one."""
    fit_steps: int = 8
    """Batches the codebook is fitted on. 1 or more."""
    probe_layer: int | None = None
    """Block whose input is read as the features of a scan, from 0; null takes the middle."""

    def __post_init__(self) -> None:
        if self.colours < 2:
            raise ValueError(f"--igpt.colours {self.colours} must be at least 2")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ValueError(f"--igpt.patch {self.patch} must be three whole numbers of 1 or more")
        if not 0 < self.mask_share < 1:
            raise ValueError(f"--igpt.mask_share {self.mask_share} must be above 0 and below 1")
        if self.expire_span < 0 or self.span_weight < 0:
            raise ValueError(
                f"--igpt.expire_span {self.expire_span} and span_weight {self.span_weight} must be 0 or more"
            )
        if self.fit_steps < 1:
            raise ValueError(f"--igpt.fit_steps {self.fit_steps} must be at least 1")


def model_config(model: Any, config: IgptConfig, size: tuple[int, int, int], scale: str) -> ImageGPTConfig:
    """The network for views of `size` voxels (zyx; the slice axis falls away for dims=2)."""
    if not isinstance(model, BackboneConfig):
        raise UserError("--network: igpt needs a causal transformer; use transformer, or dino or byol", 2)
    whole, patch = size, config.patch
    if model.dims == 2:
        if patch[0] != 1:
            raise UserError(
                f"--igpt.patch {_by(patch)}: --model.dims 2 takes patches of one slice; use 1x{_by(patch[1:])}", 2
            )
        size, patch = size[1:], patch[1:]  # type: ignore[assignment]
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise UserError(
            f"--igpt.patch {_by(config.patch)} must divide --views.global_size {_by(whole)} on every axis", 2
        )
    if config.expire_span and config.objective == "bert":
        raise UserError(f"--igpt.expire_span {config.expire_span} is causal; --igpt.objective bert needs 0", 2)
    if model.attention not in ("performer", "softmax"):
        raise UserError(f"--model.attention {model.attention}: igpt takes performer or softmax", 2)
    return ImageGPTConfig(
        vocabulary=config.colours,
        grid=tuple(n // p for n, p in zip(size, patch, strict=True)),
        patch=patch,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        attention="expire_span" if config.expire_span else model.attention,
        max_span=config.expire_span or None,
        num_features=model.num_features,
        order=config.order,
        objective=config.objective,
        scale=scale,
        seed=model.seed,
        in_channels=model.in_channels,
    )


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def igpt_loss(
    logits: Float[Tensor, "B N V"], tokens: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"] | None = None
) -> Tensor:
    """Mean negative log likelihood a token, in nats; it starts at ln V.

    ::

        autoregressive: -mean(log p(x[i] | x[0], ..., x[i - 1]) for all i)     # x in the model's order
        bert:           -mean(log p(x[i] | x without masked) for i in mask)

    Source: Chen et al. 2020, section 2, "Pre-training". Computed in float32, also under autocast.
    """
    with torch.autocast(logits.device.type, enabled=False):
        if mask is not None:
            logits, tokens = logits[mask], tokens[mask]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), tokens.reshape(-1))


def random_mask(rows: int, tokens: int, share: float, device: torch.device) -> Bool[Tensor, "rows tokens"]:
    """`share` of each row's tokens, at least one; from torch's generator."""
    ranks = torch.rand(rows, tokens, device=device).argsort(1)
    return ranks < max(1, round(share * tokens))


class IgptEncoder(nn.Module):
    """Scans to the features of a linear probe, as a backbone would give them."""

    def __init__(self, model: ImageGPT, layer: int | None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, x: Float[Tensor, "B channels *size"]) -> Float[Tensor, "B C"]:
        return self.model.features(self.model.codebook.encode(x), self.layer)


class Igpt(nn.Module):
    """Network, codebook and loss; a `methods.Method`."""

    headline = "bits"
    last_layers = ("output",)

    def __init__(self, model: ImageGPTConfig, config: IgptConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.student = ImageGPT(model)
        self.look_steps = 0 if config.codebook else config.fit_steps
        self._seen: list[Tensor] = []
        if config.codebook:
            self._take_codebook(config.codebook)

    def _take_codebook(self, path: str) -> None:
        try:
            found = medformer.load(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--igpt.codebook {path}: {error}") from error
        if not isinstance(found, ImageGPT):
            raise UserError(f"--igpt.codebook {path}: is a {type(found).__name__}, which has no codebook", 2)
        book = found.codebook
        here = self.student.codebook
        for what, a, b in (
            ("entries", len(book.centres), len(here.centres)),
            ("voxels a patch", book.patch, here.patch),
            ("channels", book.channels, here.channels),
            ("scale of voxels", book.scale, here.scale),
        ):
            if a != b:
                raise UserError(
                    f"--igpt.codebook {path}: its {what} are {a}, this model and these scans have {b}; tokens would "
                    "mean other things: fit a new one, or match the settings",
                    2,
                )
        here.centres.copy_(book.centres)

    @property
    def encoder(self) -> nn.Module:
        """What is evaluated: features of a middle layer."""
        return IgptEncoder(self.student, self.config.probe_layer)

    @property
    def summary(self) -> str:
        model = self.student.config
        shape = "x".join(map(str, model.grid))
        return f"{model.tokens} tokens a scan ({shape}); the loss starts at ln V = {math.log(model.vocabulary):.3f}"

    def schedules(self, step: int) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def look(self, views: list[Float[Tensor, "B channels *size"]]) -> None:
        """Remember patches of a micro-batch for the codebook; then call `start`."""
        patches = self.student.codebook.patches(views[0]).flatten(0, 1).float().contiguous()
        if dist.is_initialized():  # the scans of all processes, in the order in which one alone would see them
            parts = [torch.empty_like(patches) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, patches)
            patches = torch.cat(parts)
        self._seen.append(patches)

    def start(self) -> None:
        """Fit the codebook on what was seen, in the first process; the others get its copy."""
        if not self._seen:
            return
        patches, self._seen = torch.cat(self._seen), []
        patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(self.seed))[:65536]]
        problem = [""]
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                self.student.codebook.fit(patches, seed=self.seed)
            except ValueError as error:
                problem = [str(error)]
        if dist.is_initialized():
            dist.broadcast_object_list(problem, src=0)
            dist.broadcast(self.student.codebook.centres, src=0)
        if problem[0]:
            raise UserError(f"--igpt.colours {self.config.colours}: {problem[0]}; or raise --igpt.fit_steps")

    def loss(
        self, student: nn.Module, views: list[Float[Tensor, "B channels *size"]], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`views[0]`: one view of each scan."""
        tokens = self.student.codebook.encode(views[0])
        mask = None
        if self.config.objective == "bert":
            mask = random_mask(len(tokens), tokens.shape[1], self.config.mask_share, tokens.device)
            loss = igpt_loss(student(tokens, mask=mask), tokens, mask)
        else:
            loss = igpt_loss(student(tokens), tokens)
        objective = loss.detach()
        spans = self.student.span_loss()
        if spans is not None:
            loss = loss + self.config.span_weight * spans
        used = torch.bincount(tokens.flatten(), minlength=self.config.colours).float() / tokens.numel()
        # What a model that only knows how common each entry is would pay.
        parts = {"bits": objective / math.log(2), "unigram_bits": torch.special.entr(used).sum() / math.log(2)}
        return loss, parts

    def before_step(self, step: int) -> None:
        """Nothing stands still in Image-GPT."""

    def after_step(self, step: int) -> None:
        """Nothing follows the weights in Image-GPT."""

    def skip_step(self) -> None:
        """Nothing was kept of the step."""

    def watch(self, loss: float, parts: dict[str, float]) -> str | None:
        """A likelihood cannot collapse."""
        return None

    def save(self, path: Path) -> str:
        """Write the model with its codebook into the run's folder; returns the file's name."""
        medformer.save(self.student, path / "image_gpt.safetensors")
        return "image_gpt.safetensors"
