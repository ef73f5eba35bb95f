"""Disentangled self-attention over tokens [B, N, C]: content and position of each side, in volumes and sequences.

Axes: B batch, H heads, N tokens, D head width, C model width, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from medformer.attention import SelfAttention
from medformer_kernels import disentangled_attention, disentangled_maps
from medformer_kernels.disentangled import DEFAULT_TERMS, Maps, axis_expansion, axis_rows, log_buckets
from medformer_kernels.disentangled.terms import Weights, check_terms

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["DisentangledAttention"]


class DisentangledAttention(SelfAttention):
    """softmax attention whose score is a sum of terms 'query side' 2 'key side', each side content, position or both.

    Source: He et al. 2021 (DeBERTa, DeBERTa-v2/v3), for c2c, c2p and p2c along a sequence. Differs: more terms; tables
    by axis over a grid, in tokens or millimetres; learned offsets for class and register tokens.

    Args:
        width: channels of a token.
        heads: number of heads.
        terms: any of c2c, c2p, p2c, p2p, cp2c, c2cp, cp2cp, cp2p, p2cp.
        relative: 'grid' (a learned table for each axis of the call's grid), 'sequence' (one for DeBERTa-v2's buckets of
            the distance along the tokens) or None.
        absolute: whether calls give an absolute `position` of every token, which is added to the relative one.
        dims: axes of the grid, 3 or 2.
        max_distance: largest distance with a row of its own, in tokens, or in `unit_mm`; one, or one for each axis.
        num_buckets: rows a side, the second half of them on a logarithmic scale; None: one a unit.
        unit_mm: distances are in millimetres, a row this many; calls then give `spacing_mm`.
        prefix_tokens: class and register tokens in front of the grid.
        share_projections: project positions as content is projected (share_att_key); else with weights of their own.
        head_width: channels of a head; None: `width / heads`.
        qkv_bias: whether queries, keys and values have a bias.
        causal: a token reads those up to itself only.
        dropout: share of the weights dropped in training.
        backend: of the kernel, 'auto', 'triton' or 'torch'.
    """

    _rows_alone = False  # a query's place follows from its index

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        terms: Sequence[str] = DEFAULT_TERMS,
        relative: Literal["grid", "sequence"] | None = "grid",
        absolute: bool = False,
        dims: int = 3,
        max_distance: int | Sequence[int] = 32,
        num_buckets: int | None = None,
        unit_mm: float | None = None,
        prefix_tokens: int = 0,
        share_projections: bool = True,
        head_width: int | None = None,
        qkv_bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(width, heads, head_width=head_width, qkv_bias=qkv_bias)
        self.terms = check_terms("DisentangledAttention", terms)
        weights = Weights.of(self.terms)
        if relative not in ("grid", "sequence", None):
            raise ValueError(f"DisentangledAttention: relative={relative!r} must be 'grid', 'sequence' or None")
        if dims not in (2, 3):
            raise ValueError(
                f"DisentangledAttention: dims={dims} must be 2 or 3; for one axis take relative='sequence'"
            )
        if (weights.query_position or weights.key_position) and relative is None and not absolute:
            raise ValueError(f"DisentangledAttention: terms={self.terms} need a position; set relative or absolute")
        if unit_mm is not None and relative != "grid":
            raise ValueError(f"DisentangledAttention: unit_mm={unit_mm} needs relative='grid', not {relative!r}")
        if prefix_tokens < 0 or (prefix_tokens and relative != "grid"):
            raise ValueError(f"DisentangledAttention: prefix_tokens={prefix_tokens} needs relative='grid'")
        axes = dims if relative == "grid" else 1
        distances = (max_distance,) * axes if isinstance(max_distance, int) else tuple(max_distance)
        if len(distances) != axes or min(distances) < 1:
            raise ValueError(f"DisentangledAttention: max_distance={max_distance} must be at least 1 for {axes} axes")
        self.relative = relative
        self.absolute = absolute
        self.max_distance = distances
        self.num_buckets = num_buckets
        self.unit_mm = unit_mm
        self.prefix_tokens = prefix_tokens
        self.causal = causal
        self.dropout = dropout
        self.backend = backend
        inner = heads * self.head_width
        separate = not share_projections
        self.position_q = nn.Linear(width, inner) if separate and weights.query_position else None
        self.position_k = nn.Linear(width, inner) if separate and weights.key_position else None
        self.uses_q, self.uses_k = weights.query_position, weights.key_position
        rows: list[int] = []
        if relative == "grid" and (self.uses_q or self.uses_k):
            for distance in distances:
                axis_expansion(1, max_distance=distance, num_buckets=num_buckets)  # says what does not fit
                rows.append(axis_rows(distance, num_buckets))
        elif relative == "sequence" and (self.uses_q or self.uses_k):
            log_buckets(1, num_buckets=num_buckets or 0, max_distance=distances[0])
            rows.append(2 * (num_buckets or distances[0]))
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(count, width)) for count in rows)
        self.prefix = nn.Parameter(torch.empty(2, prefix_tokens, width)) if prefix_tokens and rows else None
        for parameter in [*self.tables, *([] if self.prefix is None else [self.prefix])]:
            nn.init.normal_(parameter, std=0.02)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "B N C"],
        *,
        rotary: None = None,
        grid: Sequence[int] | Sequence[Sequence[int]] | None = None,
        spacing_mm: Sequence[float] | None = None,
        position: Float[Tensor, "N C"] | Float[Tensor, "B N C"] | None = None,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
        cu_seqlens: Int[Tensor, " docs+1"] | Sequence[int] | None = None,
        seed: int | Tensor | None = None,
    ) -> Float[Tensor, "B N C"]:
        """Mix the tokens.

        Args:
            x: tokens, those of the prefix first.
            rotary: only None: the places are in the terms.
            grid: tokens by axis, zyx, behind the prefix, or a list of grids laid end to end; for relative='grid'.
            spacing_mm: distance between neighbouring tokens by axis, with `unit_mm`.
            position: absolute position of every token, for `absolute`.
            key_padding_mask: True where a token is real; False tokens are never read.
            cu_seqlens: boundaries of sequences laid end to end, for relative='sequence'.
            seed: of the dropout; None: drawn from torch's.
        """
        q, k, v = self._split(x)
        out = disentangled_attention(
            q, k, v, **self._arguments(x, grid, spacing_mm, position), key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens, dropout=self.dropout if self.training else 0.0, seed=seed, backend=self.backend,
        )  # fmt: skip
        return self.proj(out.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def maps(
        self,
        x: Float[Tensor, "B N C"],
        queries: Int[Tensor, " Q"],
        *,
        grid: Sequence[int] | None = None,
        spacing_mm: Sequence[float] | None = None,
        position: Float[Tensor, "N C"] | Float[Tensor, "B N C"] | None = None,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> Maps:
        """Attention weights of chosen query tokens, and what each term adds to their scores."""
        q, k, _ = self._split(x)
        arguments = self._arguments(x, grid, spacing_mm, position)
        return disentangled_maps(q, k, queries=queries, key_padding_mask=key_padding_mask, **arguments)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, grid: Sequence[int] | None
    ) -> Tensor:
        """For the maps of `SelfAttention`: relative positions, no dropout, in the dtype of `q`."""
        arguments = self._arguments(q[:, 0], grid, None, None)
        for name, value in arguments.items():
            if name.startswith(("rel_", "prefix_k", "prefix_q")):
                exact = [t.to(q.dtype) for t in value] if isinstance(value, list) else value.to(q.dtype)
                arguments[name] = exact
        return disentangled_attention(q, k, v, **arguments, key_padding_mask=key_padding_mask, backend=self.backend)

    def _projected(self, positions: Tensor, side: Literal["q", "k"]) -> Tensor:
        """(..., rows, C) to (..., H, rows, D), as content or with weights of its own."""
        own = self.position_q if side == "q" else self.position_k
        if own is not None:
            vectors = own(positions)
        else:
            weight, bias, number = self.qkv.weight, self.qkv.bias, "qk".index(side)
            weight = weight.chunk(3)[number]
            vectors = nn.functional.linear(positions, weight, None if bias is None else bias.chunk(3)[number])
        return vectors.unflatten(-1, (self.heads, self.head_width)).transpose(-3, -2)

    def _arguments(
        self,
        x: Tensor,
        grid: Sequence[int] | Sequence[Sequence[int]] | None,
        spacing_mm: Sequence[float] | None,
        position: Tensor | None,
    ) -> dict:
        """What the kernel gets of positions."""
        arguments: dict = {"terms": self.terms, "causal": self.causal, "prefix_tokens": self.prefix_tokens}
        sides: list[Literal["q", "k"]] = [side for side, used in (("q", self.uses_q), ("k", self.uses_k)) if used]  # type: ignore[misc]
        if (position is not None) != self.absolute:
            raise ValueError(
                f"DisentangledAttention: absolute={self.absolute} but position is {'not ' * (position is None)}given; "
                "they go together"
            )
        if position is not None:
            arguments |= {f"pos_{side}": self._projected(position, side) for side in sides}
        if self.relative == "sequence" and sides:
            arguments |= {f"rel_{side}": self._projected(self.tables[0], side) for side in sides}
            arguments["buckets"] = log_buckets(
                x.shape[1], num_buckets=self.num_buckets or 0, max_distance=self.max_distance[0]
            ).to(x.device)
        if self.relative == "grid":
            arguments |= self._on_grid(x, grid, spacing_mm, sides)
        return arguments

    def _on_grid(
        self,
        x: Tensor,
        grid: Sequence[int] | Sequence[Sequence[int]] | None,
        spacing_mm: Sequence[float] | None,
        sides: list[Literal["q", "k"]],
    ) -> dict:
        dims = len(self.max_distance)
        if grid is None:
            raise ValueError("DisentangledAttention: relative='grid' needs grid, the tokens by axis")
        several = [g for g in grid if isinstance(g, Sequence)]
        if any(len(g) != dims for g in several or [grid]):
            raise ValueError(f"DisentangledAttention: grid={grid} must have dims={dims} axes")
        sizes = [max(axis) for axis in zip(*several, strict=True)] if several else list(grid)
        if (spacing_mm is None) != (self.unit_mm is None):
            raise ValueError(
                f"DisentangledAttention: unit_mm={self.unit_mm} but spacing_mm={spacing_mm}; distances are in "
                "millimetres with both, in tokens with neither"
            )
        spacing = (1.0,) * dims if spacing_mm is None else tuple(float(s) for s in spacing_mm)
        if len(spacing) != dims:
            raise ValueError(f"DisentangledAttention: spacing_mm={spacing_mm} must hold one for each of {dims} axes")
        arguments: dict = {"grid": grid}
        for table, size, distance, mm in zip(self.tables, sizes, self.max_distance, spacing, strict=False):
            expansion = axis_expansion(
                cast(int, size),
                max_distance=distance,
                num_buckets=self.num_buckets,
                spacing=mm,
                unit=self.unit_mm or 1.0,
            ).to(table)
            for side in sides:
                arguments.setdefault(f"rel_{side}", []).append(expansion @ self._projected(table, side))
        if self.prefix is not None:
            arguments |= {f"prefix_{side}": self._projected(self.prefix, side).transpose(0, 1) for side in sides}
        return arguments

    @classmethod
    def from_transformers(
        cls,
        state: Mapping[str, Tensor],
        rel_embeddings: Tensor,
        *,
        heads: int,
        pos_att_type: Sequence[str],
        share_att_key: bool,
        position_buckets: int,
        max_relative_positions: int,
    ) -> DisentangledAttention:
        """Read `DebertaV2Attention.state_dict()` of transformers (its residual and LayerNorm are not part of it).

        Args:
            state: weights, of the whole attention or of its `self` alone.
            rel_embeddings: what its encoder hands to each layer, `DebertaV2Encoder.get_rel_embedding()`.
            heads: number of heads.
            pos_att_type: c2p, p2c or both.
            share_att_key: as in the configuration.
            position_buckets: as in the configuration; -1 for none.
            max_relative_positions: as in the configuration, or max_position_embeddings where that is -1.

        Raises:
            ValueError: a weight is missing, or the embeddings have another number of rows.
        """
        state = {name.removeprefix("self."): x for name, x in state.items()}
        names = ["query_proj", "key_proj", "value_proj"]
        own = [] if share_att_key else [f"pos_{side}_proj" for side in ("key", "query") if side in _sides(pos_att_type)]
        missing = [f"{n}.{kind}" for n in names + own for kind in ("weight", "bias") if f"{n}.{kind}" not in state]
        if missing:
            raise ValueError(
                f"DisentangledAttention.from_transformers: the state has no {', '.join(missing)}; it holds "
                f"{sorted(state)}"
            )
        weight = torch.cat([state[f"{name}.weight"] for name in names])
        inner = weight.shape[0] // 3
        buckets = position_buckets if position_buckets > 0 else None
        module = cls(
            weight.shape[1], heads, terms=("c2c", *pos_att_type), relative="sequence", num_buckets=buckets,
            max_distance=max_relative_positions, share_projections=share_att_key, head_width=inner // heads,
        ).to(weight)  # fmt: skip
        weights = {"qkv.weight": weight, "qkv.bias": torch.cat([state[f"{name}.bias"] for name in names])}
        for name in own:
            side = "q" if "query" in name else "k"
            weights |= {f"position_{side}.{kind}": state[f"{name}.{kind}"] for kind in ("weight", "bias")}
        if len(rel_embeddings) < len(module.tables[0]):
            raise ValueError(
                f"DisentangledAttention.from_transformers: rel_embeddings has {len(rel_embeddings)} rows; the "
                f"configuration needs {len(module.tables[0])}"
            )
        weights["tables.0"] = rel_embeddings[: len(module.tables[0])]
        if "output.dense.weight" in state:
            weights |= {"proj.weight": state["output.dense.weight"], "proj.bias": state["output.dense.bias"]}
        else:  # `self` alone ends before any projection
            weights |= {"proj.weight": torch.eye(inner).to(weight), "proj.bias": torch.zeros(inner).to(weight)}
        module.load_state_dict(weights)
        return module


def _sides(pos_att_type: Sequence[str]) -> set[str]:
    """Which position projections transformers has: c2p meets a key position, p2c a query position."""
    return {"key" for term in pos_att_type if term == "c2p"} | {"query" for term in pos_att_type if term == "p2c"}
