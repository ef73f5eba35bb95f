"""Exchange the exact attention of models that others wrote for FAVOR+, keeping their weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from medformer.attention import PerformerAttention
from medformer_kernels import default_num_features, orthogonal_features, performer_attention

__all__ = ["swap_attention"]


def swap_attention(model: nn.Module, *, num_features: int | None = None, seed: int = 0) -> nn.Module:
    """Exchange, in place, every attention of a timm ViT and every `torch.nn.MultiheadAttention` for FAVOR+.

        model = swap_attention(timm.create_model("vit_base_patch16_224", pretrained=True))

    Weights and their names stay; each layer gains the buffer `omega`. The outputs change, since FAVOR+ estimates what
    was exact: one warning says so. Measure with `medformer_kernels.approximation_error`, and fine-tune.
    A timm attention is known by its parts (`qkv`, `proj`, `num_heads`, `head_dim`), whichever timm wrote it.

    Args:
        num_features: random features per head; None takes D ln D rounded to a multiple of 64.
        seed: of the first layer's features; the others count on from it.

    Returns:
        `model`, for use in one line.

    Raises:
        ValueError: no attention was found, or one has a part that FAVOR+ has no place for.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.MultiheadAttention) or _is_timm(child)
    ]
    if not found:
        raise ValueError(f"swap_attention: {type(model).__name__} holds no timm or torch.nn attention")
    swapped: list[_Multihead | _Timm] = []
    for layer, (_, _, child) in enumerate(found):
        if isinstance(child, nn.MultiheadAttention):
            swapped.append(_Multihead(child, num_features, seed + layer))
        else:
            swapped.append(_Timm(child, num_features, seed + layer))
    for (parent, name, _), attention in zip(found, swapped, strict=True):
        setattr(parent, name, attention)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # it would call torch's exact attention
    features = sorted({attention.omega.shape[-2] for attention in swapped})
    warnings.warn(
        f"swap_attention: {len(swapped)} attention layers now estimate softmax with {features} random features and "
        "without dropout of weights; outputs change: measure them (approximation_error) and fine-tune",
        stacklevel=2,
    )
    return model


def _is_timm(module: nn.Module) -> bool:
    parts = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("qkv", "proj"))
    return parts and hasattr(module, "num_heads") and hasattr(module, "head_dim")


class _Timm(PerformerAttention):
    """FAVOR+ with the parts, and the call, of a timm ViT's attention."""

    norm: nn.Module
    proj_drop: nn.Module

    def __init__(self, attention: Any, num_features: int | None, seed: int) -> None:
        qkv: nn.Linear = attention.qkv
        heads, head_dim = int(attention.num_heads), int(attention.head_dim)
        if qkv.in_features != heads * head_dim or qkv.out_features != 3 * qkv.in_features:
            raise ValueError(
                f"swap_attention: qkv maps {qkv.in_features} to {qkv.out_features} channels; FAVOR+ takes W to 3 W"
            )
        if getattr(attention, "gate", None) is not None:
            raise ValueError("swap_attention: a gated timm attention has no place for FAVOR+")
        if abs(float(getattr(attention, "scale", head_dim**-0.5)) * head_dim**0.5 - 1) > 1e-6:
            raise ValueError(f"swap_attention: scale={attention.scale} must be 1/sqrt(head_dim)")
        super().__init__(qkv.in_features, heads, num_features=num_features, seed=seed)
        self.to(qkv.weight.device, qkv.weight.dtype)
        self.train(attention.training)
        self.qkv, self.proj = qkv, attention.proj
        for name in ("q_norm", "k_norm", "norm", "proj_drop"):
            setattr(self, name, getattr(attention, name, nn.Identity()))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        mask = None
        if attn_mask is not None:
            if attn_mask.dtype != torch.bool or attn_mask.ndim != 4 or attn_mask.shape[1:3] != (1, 1):
                raise ValueError(
                    f"swap_attention: attn_mask is {attn_mask.dtype} of shape {tuple(attn_mask.shape)}; FAVOR+ takes "
                    "a bool mask of keys, (B, 1, 1, N)"
                )
            mask = attn_mask[:, 0, 0].expand(x.shape[0], -1)
        q, k, v = self._split(x)
        out = performer_attention(q, k, v, self.omega, causal=is_causal, key_padding_mask=mask)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


class _Multihead(nn.MultiheadAttention):
    """FAVOR+ with the weights, and the call, of `torch.nn.MultiheadAttention`; the weights returned are None."""

    def __init__(self, attention: nn.MultiheadAttention, num_features: int | None, seed: int) -> None:
        if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "swap_attention: torch.nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn has no "
                "counterpart in FAVOR+"
            )
        weight = attention.in_proj_weight
        super().__init__(
            attention.embed_dim, attention.num_heads, bias=attention.in_proj_bias is not None,
            batch_first=attention.batch_first, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        self.in_proj_weight, self.in_proj_bias, self.out_proj = weight, attention.in_proj_bias, attention.out_proj
        self.train(attention.training)
        self._qkv_same_embed_dim = False  # else torch.nn.TransformerEncoderLayer calls its own exact attention
        num_features = num_features or default_num_features(self.head_dim)
        omega = orthogonal_features(num_features, self.head_dim, heads=self.num_heads, seed=seed)
        self.omega: Tensor
        self.register_buffer("omega", omega.to(weight.device, weight.dtype))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As torch's, whose `key_padding_mask` is True (or -inf) where a key is ignored."""
        if attn_mask is not None and not is_causal:
            raise ValueError("swap_attention: FAVOR+ takes no attn_mask but a causal one (is_causal=True)")
        if key_padding_mask is not None:
            ignored = key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask == -torch.inf
            key_padding_mask = ~ignored
        if query.ndim == 2:
            mask = None if key_padding_mask is None else key_padding_mask[None]
            return self._mix(query[None], key[None], value[None], mask, is_causal)[0], None
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out = self._mix(query, key, value, key_padding_mask, is_causal)
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, causal: bool) -> Tensor:
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        out = performer_attention(q, k, v, self.omega, causal=causal, key_padding_mask=key_padding_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))
