"""FAVOR+'s features against those of FAVOR#, at equal cost: relative error of the output against exact attention.

    python benchmarks/favor_sharp.py

Source: Likhosherstov et al. 2023, "FAVOR#: Sharp Attention Kernel Approximations via New Classes of Positive Random
Features"; what stands here is derived anew. With x, y = q', k', any G and any symmetric A < I / 8,

    exp(x y) = E phi(G x) phi(G^-T y)  over  w ~ N(0, I)
    phi(x) = det(I - 4A)^(1/4) exp(w A w + w (I - 4A)^(1/2) x - |x|^2 / 2)

and the mean of log E phi(x)^2 phi(y)^2 over pairs is least where A has the eigenvectors of E (x + y)(x + y)^T and, for
an eigenvalue s of it, the eigenvalue (1 - 2s - sqrt((2s + 1)^2 + 8s)) / 16. A = 0 are FAVOR+'s features, A = a I the
optimal positive ones, any A "symmetric dense"; G diagonal or dense that gives x and y equal moments "asymmetric".
"Positive in its basis" are FAVOR+'s features with that dense G and A = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medformer_kernels import orthogonal_features

__all__ = ["KINDS", "attention", "fitted", "inputs", "log_features", "second_moment"]

KINDS = (
    "positive", "optimal positive", "symmetric dense", "asymmetric, diagonal", "positive in its basis",
    "asymmetric, dense",
)  # fmt: skip


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(1e-12) ** exponent) @ vectors.mT


def fitted(kind: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(G, A), each (D, D), for queries x (N, D) and keys y (S, D), both scaled by D^(-1/4)."""
    width = x.shape[-1]
    identity = torch.eye(width, dtype=x.dtype)
    moment_x, moment_y = x.mT @ x / len(x), y.mT @ y / len(y)
    scale = identity
    if kind == "asymmetric, diagonal":
        scale = torch.diag((moment_y.diagonal() / moment_x.diagonal()) ** 0.25)
    if kind in ("positive in its basis", "asymmetric, dense"):
        half, inverse = _power(moment_x, 0.5), _power(moment_x, -0.5)
        scale = _power(inverse @ _power(half @ moment_y @ half, 0.5) @ inverse, 0.5)
    x, y = x @ scale.mT, y @ torch.linalg.inv(scale)
    cross = torch.outer(x.mean(0), y.mean(0))
    spread = x.mT @ x / len(x) + y.mT @ y / len(y) + cross + cross.mT
    if kind.startswith("positive"):
        return scale, 0 * identity
    values, vectors = torch.linalg.eigh(spread)
    if kind in ("optimal positive", "asymmetric, diagonal"):
        values = values.mean().expand(width)
    values = values.clamp_min(0)
    best = (1 - 2 * values - ((2 * values + 1) ** 2 + 8 * values).sqrt()) / 16
    return scale, (vectors * best) @ vectors.mT


def log_features(x: Tensor, omega: Tensor, a: Tensor) -> Tensor:
    """log phi(x) (N, M), without the 1 / sqrt(M)."""
    inner = torch.eye(len(a), dtype=a.dtype) - 4 * a
    own = torch.einsum("md,de,me->m", omega, a, omega)
    return x @ _power(inner, 0.5) @ omega.mT + own + torch.logdet(inner) / 4 - x.square().sum(-1, keepdim=True) / 2


def second_moment(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """Mean over pairs of log E phi(x)^2 phi(y)^2, in closed form."""
    identity = torch.eye(len(a), dtype=a.dtype)
    inner, outer = identity - 4 * a, identity - 8 * a
    pairs = x[:, None] + y[None]
    weighted = _power(inner, 0.5) @ torch.linalg.inv(outer) @ _power(inner, 0.5)
    exponent = 2 * torch.einsum("ijd,de,ije->ij", pairs, weighted, pairs)
    exponent = exponent - x.square().sum(-1)[:, None] - y.square().sum(-1)[None]
    return torch.logdet(inner) - torch.logdet(outer) / 2 + exponent.mean()


def attention(kind: str, q: Tensor, k: Tensor, v: Tensor, omega: Tensor) -> Tensor:
    """Attention of one head, q (N, D), k (S, D), v (S, Dv), through features of this kind fitted to q and k."""
    x, y = (tensor * q.shape[-1] ** -0.25 for tensor in (q, k))
    scale, a = fitted(kind, x, y)
    log_q = log_features(x @ scale.mT, omega, a)
    log_k = log_features(y @ torch.linalg.inv(scale), omega, a)
    top = log_k.amax(0)
    values = (log_k - top).exp().mT @ torch.cat([v, torch.ones_like(v[:, :1])], -1)
    out = torch.softmax(log_q + top, -1) @ values
    return out[:, :-1] / out[:, -1:]


def inputs(name: str, std: float, tokens: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries and keys of mean square `std`^2: 'alike' on every axis; 'few axes': variances 1/l along drawn axes;
    'unlike': so, and the queries long where the keys are short."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = normal(tokens, width), normal(tokens, width)
    if name == "alike":
        return q * std, k * std
    axes = torch.linalg.qr(normal(width, width))[0]
    variance = 1 / torch.arange(1, width + 1, dtype=torch.float64)
    tilt = torch.ones_like(variance)
    if name == "unlike":
        tilt = torch.logspace(-1, 1, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    spreads = (variance * tilt).sqrt(), (variance / tilt).sqrt()
    q, k = (
        (x * spread / spread.square().mean().sqrt()) @ axes.mT * std for x, spread in zip((q, k), spreads, strict=True)
    )
    return q, k


def main() -> None:
    tokens, width = 1024, 64
    print("| q, k | std | M | " + " | ".join(KINDS) + " |")
    print("|---" * (3 + len(KINDS)) + "|")
    for name in ("alike", "few axes", "unlike"):
        for std in (0.25, 0.5, 0.75, 1.0):
            for features in (256, 1024) if std == 0.5 else (256,):
                errors = torch.zeros(len(KINDS), dtype=torch.float64)
                for seed in range(4):
                    generator = torch.Generator().manual_seed(seed)
                    q, k = inputs(name, std, tokens, width, generator)
                    v = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
                    exact = torch.softmax(q @ k.mT * width**-0.5, -1) @ v
                    omega = orthogonal_features(features, width, seed=seed, dtype=torch.float64)
                    outs = [attention(kind, q, k, v, omega) for kind in KINDS]
                    errors += torch.stack([(out - exact).norm() / exact.norm() for out in outs]) / 4
                print(f"| {name} | {std} | {features} | " + " | ".join(f"{x:.3f}" for x in errors.tolist()) + " |")


if __name__ == "__main__":
    main()
