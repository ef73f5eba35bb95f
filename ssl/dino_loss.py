"""What DINO minimises: cross entropy to centred or balanced targets, for whole views, masked patches, and KoLeo.

Masks and KoLeo serve BYOL too.

Axes: V views, T teacher (global) views, B scans, K prototypes, C width, P masked patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from peers import summed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "Centre", "DinoLoss", "block_masks", "check_share", "koleo", "masked_patch_loss", "per_view", "sinkhorn",
]  # fmt: skip


class Centre(nn.Module):
    """The moving mean of the teacher's logits, kept from the mean of its features.

    Logits are features times prototypes, so their mean is the prototypes times the mean feature: what is summed and
    sent between processes has the bottleneck's width (256) and not K (65,536).
    """

    value: Tensor

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(prototypes))
        # Sum of this step's features, with their count as the last entry: one all-reduce for both.
        self._pending: Tensor | None = None

    @torch.no_grad()
    def observe(self, features: Float[Tensor, "N D"]) -> None:
        """Count these features in the next move."""
        features = features.detach().float()
        pending = torch.cat([features.sum(0), features.new_tensor([float(len(features))])])
        self._pending = pending if self._pending is None else self._pending + pending

    @torch.no_grad()
    def update(self, prototypes: Float[Tensor, "K D"], momentum: float) -> None:
        """Move by everything seen since the last call, on all ranks; `prototypes` are those that gave the logits."""
        if self._pending is None:
            raise RuntimeError("Centre.update: no features were seen since the last update")
        pending, self._pending = self._pending, None
        if dist.is_initialized():
            dist.all_reduce(pending)
        if pending[-1] > 0:
            self.value.lerp_(prototypes.float() @ (pending[:-1] / pending[-1]), 1 - momentum)

    def discard(self) -> None:
        """Forget the features of a step that was skipped."""
        self._pending = None


@torch.no_grad()
def sinkhorn(logits: Float[Tensor, "N K"], temp: float, iterations: int = 3) -> Float[Tensor, "N K"]:
    """Targets that sum to 1 for each row and use all prototypes alike over the rows of all processes; float32.

    ::

        q = exp(logits / temp)
        repeat: each column of q is scaled to sum N / K, then each row to sum 1

    Source: Caron et al. 2020 (SwAV), section 3; facebookresearch/dinov2 uses 3 iterations.
    """
    scaled = logits.float() / temp
    top = scaled.max()
    if dist.is_initialized():
        dist.all_reduce(top, dist.ReduceOp.MAX)
    q = (scaled - top).exp()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    share = len(q) * ranks / q.shape[1]
    for _ in range(iterations):
        columns = q.sum(0)
        if dist.is_initialized():
            dist.all_reduce(columns)
        q = q * (share / columns.clamp_min(1e-30))
        q = q / q.sum(1, keepdim=True).clamp_min(1e-30)
    return q


class DinoLoss(nn.Module):
    """Cross entropy from each teacher view to every other student view.

    ::

        p = softmax((t - c) / tau_t)                  # t, p: [T, B, K]; no gradient; or p = sinkhorn(t, tau_t)
        q = log_softmax(s / tau_s)                    # s, q: [V, B, K]; the first T views are the teacher's
        loss = -mean(p[i] . q[j] for i in range(T) for j in range(V) if i != j)
        # once per optimiser step, after the loss:
        c = m * c + (1 - m) * mean(t over views, scans, micro-batches and ranks)

    Source: Caron et al. 2021, algorithm 1. Everything is computed in float32, also under autocast.
    """

    def __init__(self, student_temp: float, *, balanced: bool = False) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.balanced = balanced

    def targets(self, teacher: Float[Tensor, "*rows K"], centre: Tensor, temp: float) -> Float[Tensor, "*rows K"]:
        """The teacher's answers as probabilities, without gradient."""
        teacher = teacher.detach().float()
        if self.balanced:
            return sinkhorn(teacher.flatten(0, -2), temp).view_as(teacher)
        return F.softmax((teacher - centre) / temp, dim=-1)

    def forward(
        self,
        student: Float[Tensor, "V B K"],
        teacher: Float[Tensor, "T B K"],
        centre: Float[Tensor, " K"],
        teacher_temp: float,
        mix: tuple[Int[Tensor, " B"], Float[Tensor, " B"]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts: `teacher_entropy` H(p), `kl` (loss = H(p) + kl), `marginal_entropy`.

        `mix`: for student views of the first T that hold a part of another scan: which scan of the batch, and how
        large a share; their targets are mixed alike.
        """
        with torch.autocast(student.device.type, enabled=False):
            views, targets = student.shape[0], teacher.shape[0]
            if views < 2:
                raise ValueError(f"DinoLoss: {views} view(s) of a scan leave nothing to compare; give at least 2")
            p = self.targets(teacher, centre, teacher_temp)
            q_log = F.log_softmax(student.float() / self.student_temp, dim=-1)
            if mix is None:
                terms = -torch.einsum("tbk,vbk->tvb", p, q_log)
            else:
                partner, share = mix
                mixed = torch.lerp(p, p[:, partner], share[:, None].to(p.dtype))
                near, far = q_log[:targets], q_log[targets:]
                terms = -torch.cat(
                    [torch.einsum("tbk,vbk->tvb", mixed, near), torch.einsum("tbk,vbk->tvb", p, far)], dim=1
                )
            same = torch.eye(targets, views, dtype=torch.bool, device=terms.device)
            loss = terms.masked_fill(same[..., None], 0.0).sum() / ((targets * views - targets) * student.shape[1])
            entropy = torch.special.entr(p).sum(-1).mean()
            stats = {
                "teacher_entropy": entropy,
                "kl": loss.detach() - entropy,
                "marginal_entropy": torch.special.entr(p.mean((0, 1))).sum(),
            }
        return loss, stats


def masked_patch_loss(
    student: Float[Tensor, "P K"], targets: Float[Tensor, "P K"], mask: Bool[Tensor, "N tokens"], student_temp: float
) -> Tensor:
    """iBOT: cross entropy at the masked patches; each view counts alike, whatever its number of masked patches.

    `student` and `targets` hold the masked patches of all N views in the order of `mask`.
    Source: Zhou et al. 2022 (iBOT), eq. (3).
    """
    with torch.autocast(student.device.type, enabled=False):
        return per_view(-(targets * F.log_softmax(student.float() / student_temp, dim=-1)).sum(-1), mask)


def koleo(cls: Float[Tensor, "B C"]) -> Tensor:
    """-mean(log(distance to the nearest other row)) of the L2-normalised rows; spreads the batch out. float32.

    For class tokens before the head, one view at a time: views of one scan may be close. Neighbours are looked for
    over the rows of all processes.
    Source: Sablayrolles et al. 2019; facebookresearch/dinov2 `koleo_loss` (whose neighbours are those of one process).
    """
    with torch.autocast(cls.device.type, enabled=False):
        x = F.normalize(cls.float(), dim=-1, eps=1e-8)
        everyone, own = x, torch.arange(len(x), device=x.device)
        if dist.is_initialized():
            before, ranks = dist.get_rank() * len(x), dist.get_world_size()
            everyone = summed(F.pad(x, (0, 0, before, ranks * len(x) - len(x) - before)))
            own = own + before
        if len(everyone) < 2:
            raise ValueError(f"koleo: {len(cls)} row has no neighbour; give at least 2 scans a batch, or turn it off")
        with torch.no_grad():
            nearest = (x @ everyone.T).scatter_(1, own[:, None], -2.0).argmax(1)
        return -(torch.linalg.vector_norm(x - everyone[nearest] + 1e-8, dim=-1) + 1e-8).log().mean()


def block_masks(count: int, grid: tuple[int, ...], share: tuple[float, float], device: torch.device) -> Tensor:
    """[count, tokens] bool: every second view has a random share of its patches masked, in blocks of 2 an axis.

    Blocks, because patches overlap: a patch masked alone can be guessed from its neighbours. Draws from
    torch's generator.
    """
    coarse = [(n + 1) // 2 for n in grid]
    noise = torch.rand(count, 1, *coarse, device=device)
    noise = F.interpolate(noise, scale_factor=2.0, mode="nearest").flatten(1)
    noise = noise.view(count, *(2 * n for n in coarse))[(slice(None), *(slice(n) for n in grid))].flatten(1)
    shares = share[0] + (share[1] - share[0]) * torch.rand(count, device=device)
    wanted = (shares * noise.shape[1]).long().clamp_min(1)
    wanted[1::2] = 0
    ranks = noise.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return ranks < wanted[:, None]


def per_view(terms: Float[Tensor, " P"], mask: Bool[Tensor, "N tokens"]) -> Tensor:
    """Mean of the masked patches' terms, in the order of `mask`; each view counts alike, however many it has masked."""
    counts = mask.sum(1)
    weight = (1.0 / counts.clamp_min(1)).repeat_interleave(counts)
    return (terms * weight).sum() / (counts > 0).sum().clamp_min(1)


def check_share(method: str, share: tuple[float, float]) -> None:
    """ValueError where --METHOD.mask_share makes no sense."""
    low, high = share
    if not 0 < low <= high < 1:
        raise ValueError(f"--{method}.mask_share {low},{high} must be a lowest above 0 and a highest below 1")
