"""Image-GPT: a transformer over the patches of an image or scan as a sequence of whole numbers.

Source: Chen et al. 2020, "Generative Pretraining from Pixels"; openai/image-gpt for what the paper leaves open: RMS
norms with a gain only, x sigmoid(1.702 x), no biases, learned positions, an output embedding of its own that starts at
0, residual projections that start at deviation 1 / sqrt(C L), sequences shifted right behind a learned start token.
Differs: FAVOR+ (Performer) and Expire-Span attention by choice, 3D grids, and Morton order.

Shape legend: B batch, N tokens, V vocabulary, C width, H heads, D head width, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medformer.attention import exact_attention
from medformer.checks import check, check_choice, check_whole, is_whole
from medformer.codebook import Codebook, morton_order
from medformer.expire_span import ExpireSpanAttention
from medformer.features import Features
from medformer.linear import Linear
from medformer_kernels import default_num_features, orthogonal_features, performer_attention
from medformer_kernels.performer import performer_prefill, performer_step

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["ImageGPT", "ImageGPTConfig", "image_gpt_large", "image_gpt_medium", "image_gpt_small"]


@dataclass(frozen=True, kw_only=True)
class ImageGPTConfig:
    """Everything that decides the shape of an `ImageGPT`."""

    vocabulary: int = 512
    """V: entries of the codebook."""
    grid: tuple[int, ...] = (32, 32)
    """Patches of an image along each axis, (gz, gy, gx) or (gy, gx); N is their product."""
    patch: tuple[int, ...] = (1, 1)
    """Voxels of a patch along each axis; 1 everywhere for grey values."""
    width: int = 512
    """C: channels of a token."""
    depth: int = 24
    """L: blocks."""
    heads: int = 8
    """H: attention heads; must divide width."""
    attention: Literal["performer", "softmax", "expire_span"] = "softmax"
    """performer: FAVOR+, cost linear in the tokens. softmax: exact, cost quadratic in the tokens. expire_span: exact
    over the tokens that have not expired, autoregressive only; it has biases, which Image-GPT has not."""
    max_span: int | None = None
    """Longest life of a token in tokens with expire_span; null takes the whole sequence."""
    num_features: int | None = None
    """Random features a head of performer attention; null takes D ln D rounded to a multiple of 64."""
    order: Literal["raster", "morton"] = "raster"
    """Sequence of the patches: row by row, or along the Z-order curve."""
    objective: Literal["autoregressive", "bert"] = "autoregressive"
    """autoregressive: each token is predicted from those before it. bert: masked ones from all others."""
    scale: str = ""
    """What the voxels are, for instance "HU / 500" or "z-score"; kept with the codebook."""
    seed: int = 0
    """Of the random features."""
    in_channels: int = 1
    """Channels of the scans whose patches become tokens: a patch is of all of them."""

    def __post_init__(self) -> None:
        for name in ("grid", "patch"):
            axes = getattr(self, name)
            axes = tuple(axes) if isinstance(axes, list | tuple) else ()
            check(
                self,
                len(axes) in (2, 3) and all(is_whole(n, 1) for n in axes),
                f"{name}={getattr(self, name)!r} must be 2 or 3 whole numbers of at least 1, one per axis",
            )
            object.__setattr__(self, name, axes)
        check(
            self,
            len(self.grid) == len(self.patch),
            f"grid={self.grid} and patch={self.patch} must have as many axes as each other",
        )
        check_whole(self, 2, "vocabulary")
        check_whole(self, 1, "width", "depth", "heads", "in_channels")
        check_whole(self, 0, "seed")
        check(self, self.width % self.heads == 0, f"heads={self.heads} must divide width={self.width}")
        check_choice(self, "attention", ("performer", "softmax", "expire_span"))
        check_choice(self, "order", ("raster", "morton"))
        check_choice(self, "objective", ("autoregressive", "bert"))
        check(self, isinstance(self.scale, str), f"scale={self.scale!r} must be text, such as 'HU / 500'")
        for name, owner in (("num_features", "performer"), ("max_span", "expire_span")):
            if getattr(self, name) is not None:
                check_whole(self, 1, name)
                needs = f"{name}={getattr(self, name)} needs attention='{owner}', not '{self.attention}'"
                check(self, self.attention == owner, needs)
        check(
            self,
            self.attention != "expire_span" or self.objective != "bert",
            "attention='expire_span' is causal; objective='bert' needs another",
        )

    @property
    def dims(self) -> int:
        """Axes of the grid."""
        return len(self.grid)

    @property
    def tokens(self) -> int:
        """N: length of a sequence."""
        return math.prod(self.grid)


class _Norm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) times a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.gain.shape, self.gain, eps=1e-5)


class _Attention(nn.Module):
    """Self-attention without biases, over a whole sequence or one token at a time."""

    def __init__(self, config: ImageGPTConfig, layer: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.causal = config.objective == "autoregressive"
        self.qkv = Linear(config.width, 3 * config.width, bias=False)
        self.proj = Linear(config.width, config.width, bias=False)
        self.omega: Tensor | None
        omega = None
        if config.attention == "performer":
            head_dim = config.width // config.heads
            omega = orthogonal_features(
                config.num_features or default_num_features(head_dim), head_dim, heads=config.heads,
                seed=config.seed * 1_000_003 + layer,
            )  # fmt: skip
        self.register_buffer("omega", omega)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        return self._join(self._attend(*self._split(x)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.omega is not None:
            return performer_attention(q, k, v, self.omega, causal=self.causal)
        return exact_attention(q, k, v, causal=self.causal)

    def prefill(self, x: Float[Tensor, "B S C"]) -> tuple[Tensor, Any]:
        """Output of a prompt and what has to be kept of it."""
        q, k, v = self._split(x)
        state = (k, v) if self.omega is None else performer_prefill(k, v, self.omega)
        return self._join(self._attend(q, k, v)), state

    def step(self, x: Float[Tensor, "B 1 C"], state: Any) -> tuple[Tensor, Any]:
        """Output of the next token and what has to be kept: FAVOR+ keeps M x (D + 1) numbers a head, softmax all."""
        q, k, v = self._split(x)
        if self.omega is not None:
            out, state = performer_step(state, q, k, v, self.omega)
            return self._join(out), state
        k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        return self._join(F.scaled_dot_product_attention(q, k, v)), (k, v)

    def _split(self, x: Tensor) -> list[Tensor]:
        return list(self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))

    def _join(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, config: ImageGPTConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = _Norm(config.width)
        if config.attention == "expire_span":
            self.attention: _Attention | ExpireSpanAttention = ExpireSpanAttention(
                config.width, config.heads, max_span=config.max_span or config.tokens
            )
        else:
            self.attention = _Attention(config, layer)
        self.norm2 = _Norm(config.width)
        self.fc1 = Linear(config.width, 4 * config.width, bias=False)
        self.fc2 = Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        x = x + self.attention(self.norm1(x))
        return x + self._mlp(x)

    def stateful(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """A prompt (state None) or the next token."""
        normed = self.norm1(x)
        if isinstance(self.attention, ExpireSpanAttention):
            mixed, state = self.attention.extend(normed, state)
        else:
            mixed, state = self.attention.prefill(normed) if state is None else self.attention.step(normed, state)
        x = x + mixed
        return x + self._mlp(x), state

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = self.fc1(self.norm2(x))
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class ImageGPT(nn.Module):
    """Distribution of every token of an image, given those before it or those not masked.

    Tokens are in raster order for whoever calls; the model reads them in its own `order`.

    >>> model = ImageGPT(ImageGPTConfig(vocabulary=16, grid=(4, 4), width=32, depth=1, heads=2))
    >>> model(torch.zeros(1, 16, dtype=torch.int64)).shape
    torch.Size([1, 16, 16])

    Attributes:
        codebook: turns scans into tokens and back; saved with the weights.
    """

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        width, causal = config.width, config.objective == "autoregressive"
        self.codebook = Codebook(config.vocabulary, config.patch, scale=config.scale, channels=config.in_channels)
        self.token_embed = nn.Parameter(torch.empty(config.vocabulary, width))
        self.position = nn.Parameter(torch.empty(config.tokens, width))
        self.start = nn.Parameter(torch.empty(width)) if causal else None
        self.blocks = nn.ModuleList(_Block(config, layer) for layer in range(config.depth))
        self.norm = _Norm(width)
        self.output = nn.Parameter(torch.zeros(config.vocabulary, width))
        order = morton_order(config.grid) if config.order == "morton" else torch.arange(config.tokens)
        self.sequence: Tensor
        self.places: Tensor
        self.register_buffer("sequence", order, persistent=False)
        self.register_buffer("places", order.argsort(), persistent=False)
        for name, parameter in self.named_parameters():
            if (parameter.ndim > 1 and name != "output") or name == "start":
                residual = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=1 / math.sqrt(width * config.depth) if residual else 0.02)
            elif name.endswith(".bias"):  # Expire-Span's
                nn.init.zeros_(parameter)

    def span_loss(self) -> Tensor | None:
        """Mean of the Expire-Span losses of the last call, about the mean life as a share of the longest; or None."""
        losses = [m.span_loss for m in self.modules() if isinstance(m, ExpireSpanAttention)]
        found = [loss for loss in losses if loss is not None]
        return torch.stack(found).mean() if found else None

    def forward(self, tokens: Int[Tensor, "B N"], *, mask: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, "B N V"]:
        """Logits of each token.

        Args:
            tokens: numbers of the codebook, in raster order.
            mask: with objective bert, True where a token is not shown to the model (its embedding is 0).
        """
        return F.linear(self.norm(self.hidden(tokens, mask=mask)), self.output)[:, self.places]

    def hidden(
        self, tokens: Int[Tensor, "B N"], *, mask: Bool[Tensor, "B N"] | None = None, blocks: int | None = None
    ) -> Float[Tensor, "B N C"]:
        """The stream after the first `blocks` blocks (None: all), in the model's own order, before the last norm."""
        if tokens.ndim != 2 or tokens.shape[1] != self.config.tokens:
            raise ValueError(
                f"ImageGPT: tokens of shape {tuple(tokens.shape)} must be (batch, {self.config.tokens}), one for each "
                f"patch of grid {self.config.grid}"
            )
        x = self.token_embed[tokens[:, self.sequence]]
        if mask is not None:
            if self.start is not None:
                raise ValueError("ImageGPT: a mask needs objective='bert', this model reads tokens in order")
            x = x.masked_fill(mask[:, self.sequence, None], 0.0)
        if self.start is not None:
            x = torch.cat([self.start.expand(x.shape[0], 1, -1), x[:, :-1]], dim=1)
        x = x + self.position
        for block in self.blocks[:blocks]:
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """The grid, for scans of `size` voxels (zyx); ValueError for all but those that it covers."""
        wanted = tuple(n * p for n, p in zip(self.config.grid, self.config.patch, strict=True))
        if tuple(size) != wanted:
            raise ValueError(f"ImageGPT: size={tuple(size)} must be {wanted}, the voxels of grid={self.config.grid}")
        return self.config.grid

    def forward_features(self, x: Float[Tensor, "B channels *size"]) -> Features:
        """What a classifier reads that moves all weights: the last block's stream of scans, after the last norm.

        `cls` is the mean over the sequence, `patches` the tokens in raster order; with objective autoregressive each
        has seen only the patches before its own. Source: section 2, "Fine-tuning"; `features` reads frozen weights.
        """
        grid = self.grid_of(x.shape[2:])
        tokens = self.norm(self.hidden(self.codebook.encode(x)))[:, self.places]
        return Features(cls=tokens.mean(1), registers=tokens[:, :0], patches=tokens, grid=grid)

    @torch.no_grad()
    def features(self, tokens: Int[Tensor, "B N"], layer: int | None = None) -> Float[Tensor, "B C"]:
        """What a linear probe reads: the mean over the sequence after the norm of block `layer`'s attention.

        `layer` counts from 0; None takes the middle, where probes of Image-GPT are best. Source: section 3.3.
        """
        layer = len(self.blocks) // 2 if layer is None else layer
        if not 0 <= layer < len(self.blocks):
            raise IndexError(f"ImageGPT.features: layer={layer} must be from 0 to {len(self.blocks) - 1}")
        block = self.blocks[layer]
        assert isinstance(block, _Block)
        return block.norm1(self.hidden(tokens, blocks=layer)).mean(1)

    @torch.no_grad()
    def complete(
        self,
        tokens: Int[Tensor, "B N"],
        known: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B N"]:
        """Keep the first `known` tokens of the model's order and sample the others, one after the other.

        `known` 0 samples whole images; `temperature` 0 takes the likeliest token each time. One pass over the prompt,
        then one step a token at a cost that for performer attention does not grow.
        """
        if self.start is None:
            raise ValueError("ImageGPT.complete: needs objective='autoregressive'; use fill")
        if not 0 <= known <= self.config.tokens:
            raise ValueError(f"ImageGPT.complete: known={known} must be from 0 to {self.config.tokens}")
        result = tokens[:, self.sequence].clone()
        x = torch.cat([self.start.expand(tokens.shape[0], 1, -1), self.token_embed[result[:, :known]]], dim=1)
        x = (x[:, : self.config.tokens] + self.position[: min(known + 1, self.config.tokens)]).contiguous()
        states: list[Any] = [None] * len(self.blocks)
        for at in range(known, self.config.tokens):
            for i, block in enumerate(self.blocks):
                assert isinstance(block, _Block)
                x, states[i] = block.stateful(x, states[i])
            result[:, at] = _draw(F.linear(self.norm(x[:, -1]), self.output), temperature, generator)
            if at + 1 < self.config.tokens:
                x = (self.token_embed[result[:, at]] + self.position[at + 1])[:, None]
        return result[:, self.places]

    @torch.no_grad()
    def fill(
        self,
        tokens: Int[Tensor, "B N"],
        mask: Bool[Tensor, "B N"],
        *,
        passes: int = 16,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B N"]:
        """Sample the masked tokens with a model of objective bert: each pass keeps those it is surest of.

        Source: Chang et al. 2022 (MaskGIT), section 3.2, with its cosine schedule.
        """
        if self.start is not None:
            raise ValueError("ImageGPT.fill: needs objective='bert'; use complete")
        result, left, total = tokens.clone(), mask.clone(), mask.sum(1)
        for number in range(passes):
            logits = self(result, mask=left).float()
            drawn = _draw(logits.flatten(0, 1), temperature, generator).view_as(result)
            sure = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0].masked_fill(~left, -math.inf)
            stay = (total * math.cos(math.pi / 2 * (number + 1) / passes)).long()  # masked after this pass
            ranks = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
            take = left & (ranks < (left.sum(1) - stay)[:, None])
            result, left = torch.where(take, drawn, result), left & ~take
        return torch.where(left, drawn, result)


def _draw(logits: Float[Tensor, "B V"], temperature: float, generator: torch.Generator | None) -> Int[Tensor, " B"]:
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.float() / temperature, -1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def image_gpt_small(**overrides: Any) -> ImageGPT:
    """iGPT-S: width 512, 24 blocks, 8 heads; 76.57 M parameters at 32x32 tokens of 512 colours."""
    return ImageGPT(ImageGPTConfig(**{"width": 512, "depth": 24, "heads": 8, **overrides}))


def image_gpt_medium(**overrides: Any) -> ImageGPT:
    """iGPT-M: width 1024, 36 blocks, 8 heads; 455.2 M parameters at 32x32 tokens of 512 colours."""
    return ImageGPT(ImageGPTConfig(**{"width": 1024, "depth": 36, "heads": 8, **overrides}))


def image_gpt_large(**overrides: Any) -> ImageGPT:
    """iGPT-L: width 1536, 48 blocks, 16 heads; 1.362 G parameters at 32x32 tokens of 512 colours."""
    return ImageGPT(ImageGPTConfig(**{"width": 1536, "depth": 48, "heads": 16, **overrides}))
