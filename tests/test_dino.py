"""DINO against the definition, and each detail that implementations get wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse import CollapseWatch
from dino import Dino, DinoConfig, DinoHead, agreement
from dino_loss import Centre, DinoLoss, block_masks, koleo, masked_patch_loss, sinkhorn
from medformer import Backbone, BackboneConfig, SwitchMLP
from optim import update_average

CONFIG = DinoConfig(prototypes=16, hidden=12, bottleneck=8, freeze_last=2, centre_momentum=0.9)


class Pool(nn.Module):
    """A backbone small enough to see through: the mean of each of four parts, mixed."""

    basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 6)
        self.register_buffer("basis", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.flatten(1).unflatten(1, (4, -1)).mean(-1))


def make(config: DinoConfig = CONFIG, steps: int = 20) -> Any:
    torch.manual_seed(0)
    return Dino(Pool(), 6, config, steps)


def views_of(scans: Tensor) -> list[Tensor]:
    """Two global and three local views of each scan, view by view."""
    grow = [1.0, 1.3, 0.7, 0.9, 1.2]
    return [torch.cat([scans * g for g in grow[:2]]), torch.cat([scans[..., :2, :2, :2] * g for g in grow[2:]])]


def by_hand(student: Tensor, teacher: Tensor, centre: Tensor, teacher_temp: float) -> Tensor:
    """Algorithm 1 of Caron et al. 2021, with its two loops."""
    total, terms = torch.zeros((), dtype=student.dtype), 0
    for t in range(len(teacher)):
        p = ((teacher[t] - centre) / teacher_temp).softmax(-1)
        for v in range(len(student)):
            if v != t:
                total = total - (p * (student[v] / 0.1).log_softmax(-1)).sum(-1).mean()
                terms += 1
    return total / terms


ZERO = torch.zeros(16)


def test_loss_and_gradient_match_the_definition() -> None:
    torch.manual_seed(0)
    centre = torch.randn(16) * 0.1
    student = torch.randn(5, 3, 16, requires_grad=True)
    teacher = torch.randn(2, 3, 16)
    loss, _ = DinoLoss(0.1)(student, teacher, centre, 0.05)
    expected = by_hand(student, teacher, centre, 0.05)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))


# Equal terms of a float32 sum all round the same way: of 65,536 by 0.002.
@pytest.mark.parametrize(("prototypes", "expected", "within"), [(4096, 8.3178, 1e-4), (65_536, 11.0904, 3e-3)])
def test_loss_of_even_answers_is_ln_k(prototypes: int, expected: float, within: float) -> None:
    zero = torch.zeros(prototypes)
    loss, parts = DinoLoss(0.1)(torch.zeros(4, 2, prototypes), torch.zeros(2, 2, prototypes), zero, 0.04)
    assert loss.item() == pytest.approx(expected, abs=within)
    assert parts["teacher_entropy"].item() == pytest.approx(math.log(prototypes), abs=1e-4)


def test_a_view_is_never_compared_with_itself() -> None:
    teacher = torch.randn(2, 3, 16)
    student = torch.randn(2, 3, 16)
    near = student.clone()
    near[0] = teacher[0] * 100  # would make the (0, 0) term tiny
    crossed = by_hand(near, teacher, ZERO, 0.05)
    torch.testing.assert_close(DinoLoss(0.1)(near, teacher, ZERO, 0.05)[0], crossed)


def test_entropy_and_kl_add_up_to_the_loss() -> None:
    student, teacher = torch.randn(6, 3, 16), torch.randn(2, 3, 16)
    loss, parts = DinoLoss(0.1)(student, teacher, ZERO, 0.07)
    assert (parts["teacher_entropy"] + parts["kl"]).item() == pytest.approx(loss.item(), rel=1e-5)
    assert parts["kl"].item() > 0
    assert parts["marginal_entropy"] >= parts["teacher_entropy"]


def test_teacher_logits_get_no_gradient() -> None:
    teacher = torch.randn(2, 3, 16, requires_grad=True)
    loss, _ = DinoLoss(0.1)(torch.randn(4, 3, 16, requires_grad=True), teacher, ZERO, 0.05)
    loss.backward()
    assert teacher.grad is None


def test_loss_is_computed_in_float32_under_autocast() -> None:
    student, teacher = torch.randn(4, 3, 16), torch.randn(2, 3, 16)
    plain, _ = DinoLoss(0.1)(student, teacher, ZERO, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = DinoLoss(0.1)(student, teacher, ZERO, 0.05)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_centre_is_the_mean_of_the_logits_without_the_logits() -> None:
    method = make()
    scans = views_of(torch.randn(3, 1, 4, 4, 4))
    method.loss(method.student, scans, 0)
    assert torch.equal(method.centre.value, torch.zeros(16))  # moves after the loss
    logits = method.teacher(scans[0]).logits
    method.after_step(0)
    torch.testing.assert_close(method.centre.value, 0.1 * logits.mean(0))


def test_centre_moves_once_for_several_micro_batches() -> None:
    parts, whole = Centre(16), Centre(16)
    features, prototypes = torch.randn(12, 8), torch.randn(16, 8)
    whole.observe(features)
    for half in features.chunk(2):
        parts.observe(half)
        assert not parts.value.any()
    for centre in (parts, whole):
        centre.update(prototypes, 0.9)
    torch.testing.assert_close(parts.value, whole.value)


def test_a_skipped_step_leaves_no_trace_in_the_centre() -> None:
    centre = Centre(16)
    centre.observe(torch.full((2, 8), float("nan")))
    centre.discard()
    centre.observe(torch.ones(2, 8))
    centre.update(torch.ones(16, 8) / 8, 0.9)
    torch.testing.assert_close(centre.value, torch.full((16,), 0.1))


def test_sinkhorn_matches_its_definition_and_balances_the_prototypes() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 5, dtype=torch.float64) / 4
    q = (logits / 0.1).exp()
    for _ in range(3):
        q = q / q.sum(0) * (12 / 5)
        q = q / q.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits, 0.1).double(), q, atol=1e-5, rtol=1e-4)
    balanced = sinkhorn(logits, 0.1, iterations=50)
    torch.testing.assert_close(balanced.sum(1), torch.ones(12))
    torch.testing.assert_close(balanced.sum(0), torch.full((5,), 12 / 5), rtol=1e-3, atol=1e-3)
    assert sinkhorn(torch.full((4, 3), 1e4), 0.04).isfinite().all()


def test_koleo_matches_its_definition() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    unit = x / x.norm(dim=1, keepdim=True)
    gaps = [min(float((unit.detach()[i] - unit.detach()[j]).norm()) for j in range(6) if j != i) for i in range(6)]
    assert koleo(x).item() == pytest.approx(-sum(math.log(g) for g in gaps) / 6, rel=1e-4)
    close = torch.ones(3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(koleo(close), close)
    assert gradient.isfinite().all()  # also for rows that are the same
    with pytest.raises(ValueError, match="no neighbour"):
        koleo(x[:1])


def test_koleo_is_that_of_the_tokens_before_the_head_view_by_view() -> None:
    method, views = make(replace(CONFIG, koleo=0.3)), views_of(torch.randn(5, 1, 4, 4, 4))
    plain, _ = make().loss(method.student, views, 0)
    loss, parts = method.loss(method.student, views, 0)
    first, second = method.student.backbone(views[0]).chunk(2)
    torch.testing.assert_close(parts["koleo"], ((koleo(first) + koleo(second)) / 2).detach())
    torch.testing.assert_close(loss, plain + 0.3 * parts["koleo"])


def test_koleo_and_sinkhorn_compute_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    x = torch.tensor([[1.0, 0.0], [1.0, 0.02], [1.0, 0.03]])  # whose cosines are all 1 in bfloat16
    logits = torch.randn(6, 5).bfloat16()
    plain, balanced = koleo(x), sinkhorn(logits.float(), 0.04)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo(x), plain)
        assert torch.equal(sinkhorn(logits, 0.04), balanced)


def test_the_student_sees_all_views_at_their_own_size_and_the_teacher_the_global_ones() -> None:
    method, seen = make(), {"student": [], "teacher": []}
    for name in seen:
        getattr(method, name).backbone.register_forward_hook(
            lambda _module, inputs, _output, name=name: seen[name].append(tuple(inputs[0].shape))
        )
    method.loss(method.student, views_of(torch.randn(3, 1, 4, 4, 4)), 0)
    assert seen == {"student": [(6, 1, 4, 4, 4), (9, 1, 2, 2, 2)], "teacher": [(6, 1, 4, 4, 4)]}


def test_masked_patch_loss_counts_each_view_alike() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    student, p = torch.randn(4, 16), torch.randn(4, 16).softmax(-1)
    terms = -(p * (student / 0.1).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(masked_patch_loss(student, p, mask, 0.1), (terms[:3].mean() + terms[3]) / 2)
    assert masked_patch_loss(student[:0], p[:0], mask & False, 0.1) == 0


def test_half_of_the_views_are_masked_in_blocks_within_the_share() -> None:
    torch.manual_seed(0)
    mask = block_masks(8, (6, 6, 5), (0.2, 0.4), torch.device("cpu"))
    shares = mask.float().mean(1)
    assert mask.shape == (8, 180)
    assert (shares[1::2] == 0).all()
    assert ((shares[::2] > 0.18) & (shares[::2] <= 0.4)).all()
    grid = mask[0].view(6, 6, 5)
    pairs = grid[0::2] == grid[1::2]
    assert pairs.float().mean() > 0.9  # both halves of a block go together


def test_the_student_tells_masked_patches_it_does_not_see() -> None:
    torch.manual_seed(0)
    config = DinoConfig(prototypes=16, hidden=12, bottleneck=8, masked_patches=1.0, koleo=0.1, freeze_last=0)
    backbone = Backbone(
        BackboneConfig(width=24, depth=1, heads=2, patch_size=4, patch_stride=4, patch_padding=0, mask_token=True)
    )
    method = Dino(backbone, 24, config, 20)
    views = [torch.randn(4, 1, 8, 8, 8), torch.randn(2, 1, 4, 4, 4)]
    loss, parts = method.loss(method.student, views, 0)
    loss.backward()
    assert {"patch_loss", "koleo"} <= parts.keys()
    assert parts["patch_loss"] > 0
    total = parts["teacher_entropy"] + parts["kl"] + parts["patch_loss"] + 0.1 * parts["koleo"]
    torch.testing.assert_close(loss.detach(), total)
    assert backbone.mask_token is not None
    assert backbone.mask_token.grad is not None
    assert backbone.mask_token.grad.any()
    method.after_step(0)
    assert method.patch_centre is not None
    assert method.patch_centre.value.any()


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_experts_is_the_mean_over_all_passes(masked: bool) -> None:
    torch.manual_seed(0)
    shape: Any = {"patch_size": 4, "patch_stride": 4, "patch_padding": 0, "mlp": "moe", "experts": 2}
    backbone = Backbone(BackboneConfig(width=24, depth=2, heads=2, mask_token=True, **shape))
    config = DinoConfig(prototypes=16, hidden=12, bottleneck=8, masked_patches=float(masked))
    method = Dino(backbone, 24, config, 20)
    found: list[Tensor] = []
    (experts,) = (m for m in method.student.modules() if isinstance(m, SwitchMLP))
    experts.register_forward_hook(lambda module, *_: found.append(module.aux_loss.detach()))
    loss, parts = method.loss(method.student, [torch.randn(4, 1, 8, 8, 8), torch.randn(2, 1, 4, 4, 4)], 0)
    assert len(found) == 2
    rest = parts["teacher_entropy"] + parts["kl"] + parts.get("patch_loss", 0.0)
    torch.testing.assert_close(loss.detach(), rest + (found[0] + found[1]) / 2)


def test_sinkhorn_targets_replace_the_centre() -> None:
    method = make(DinoConfig(prototypes=16, hidden=12, bottleneck=8, balance="sinkhorn"))
    scans = views_of(torch.randn(4, 1, 4, 4, 4))
    _, parts = method.loss(method.student, scans, 0)
    logits = method.teacher(scans[0]).logits
    p = sinkhorn(logits, method.teacher_temp(0))
    torch.testing.assert_close(parts["teacher_entropy"], torch.special.entr(p).sum(-1).mean())


def test_mixed_targets_are_the_mean_of_both_scans_targets() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 2, 16), torch.randn(2, 2, 16)
    partner, share = torch.tensor([1, 0]), torch.tensor([0.25, 0.25])
    mixed, _ = DinoLoss(0.1)(student, teacher, ZERO, 0.05, (partner, share))
    p = (teacher / 0.05).softmax(-1)
    q = (student / 0.1).log_softmax(-1)
    blend = 0.75 * p + 0.25 * p[:, [1, 0]]
    pairs = [(blend[0], q[1]), (blend[1], q[0]), (p[0], q[2]), (p[1], q[2])]
    expected = torch.stack([-(a * b).sum(-1).mean() for a, b in pairs]).mean()
    torch.testing.assert_close(mixed, expected)


def test_head_answers_with_cosines_and_has_no_batch_norm() -> None:
    head = DinoHead(6, CONFIG)
    logits = head(torch.randn(50, 6) * 100)
    assert logits.abs().max() <= 1 + 1e-5
    scaled = DinoHead(6, CONFIG)
    scaled.load_state_dict(head.state_dict())
    with torch.no_grad():
        scaled.prototypes.mul_(7.0)
    x = torch.randn(5, 6)
    torch.testing.assert_close(scaled(x), head(x))  # the gain is fixed at 1
    torch.testing.assert_close(head(x)[:2], head(x[:2]))  # no statistics over the batch


def test_agreement_is_the_share_that_two_views_have_in_common() -> None:
    torch.manual_seed(0)
    common, one, two = torch.randn(3, 4000, 8)
    assert agreement(common, common).item() == pytest.approx(1)
    assert agreement(one + 5, two + 5).item() == pytest.approx(0, abs=0.03)  # the middle of all does not count
    assert agreement(common + one, common + two).item() == pytest.approx(0.5, abs=0.03)


def test_batch_norm_in_the_head_spreads_what_hardly_differs() -> None:
    torch.manual_seed(0)
    alike = torch.randn(6) + 1e-3 * torch.randn(50, 6)

    def cosine_of_two(norm: Any) -> float:
        head = DinoHead(6, replace(CONFIG, norm=norm)).eval()  # as the teacher's: evaluation mode changes nothing
        gram = head.features(alike) @ head.features(alike).T
        return gram[~torch.eye(50, dtype=torch.bool)].mean().item()

    assert cosine_of_two("none") > 0.9
    assert abs(cosine_of_two("batch")) < 0.05


def test_batch_norm_counts_views_of_each_size_for_themselves() -> None:
    torch.manual_seed(0)
    dino = make(replace(CONFIG, norm="batch"))
    views = views_of(torch.randn(4, 1, 4, 4, 4))
    logits = dino.student(*views).logits
    torch.testing.assert_close(logits[:8], dino.student(views[0]).logits)
    torch.testing.assert_close(logits[8:], dino.student(views[1]).logits)


def test_head_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        head = DinoHead(384, DinoConfig(prototypes=65536, hidden=2048, bottleneck=256))
    assert sum(p.numel() for p in head.parameters()) == 22_286_592


def test_teacher_averages_parameters_and_copies_buffers() -> None:
    student, teacher = Pool(), Pool()
    old, new, basis = teacher.mix.weight.clone(), student.mix.weight.clone(), student.basis.clone()
    update_average(teacher, student, 0.9)
    torch.testing.assert_close(teacher.mix.weight, 0.9 * old + 0.1 * new)
    assert torch.equal(teacher.basis, basis)
    assert torch.equal(student.mix.weight, new)


def test_teacher_follows_the_weights_after_the_optimiser_step() -> None:
    method = make()
    optimiser = torch.optim.SGD(method.student.parameters(), lr=1.0)
    before = method.teacher.backbone.mix.weight.clone()
    loss, _ = method.loss(method.student, views_of(torch.randn(3, 1, 4, 4, 4)), 0)
    loss.backward()
    optimiser.step()
    method.after_step(0)
    moved = method.student.backbone.mix.weight
    torch.testing.assert_close(method.teacher.backbone.mix.weight, before.lerp(moved, 1 - method.momentum(0)))


def test_teacher_never_trains() -> None:
    method = make().train()
    assert method.student.training
    assert not method.teacher.training
    loss, _ = method.loss(method.student, views_of(torch.randn(3, 1, 4, 4, 4)), 0)
    loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.student.parameters())


def test_views_of_one_scan_meet_each_other_and_no_other_scan() -> None:
    method = make()
    scans = torch.randn(3, 1, 4, 4, 4)
    together, _ = method.loss(method.student, views_of(scans), 0)
    alone = [method.loss(method.student, views_of(scan[None]), 0)[0] for scan in scans]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_accumulated_halves_equal_the_whole_batch() -> None:
    scans = torch.randn(8, 1, 4, 4, 4)
    methods = make(), make()
    for method, parts in zip(methods, (1, 2), strict=True):
        for chunk in scans.chunk(parts):
            loss, _ = method.loss(method.student, views_of(chunk), 5)
            (loss / parts).backward()
        method.after_step(5)
    whole, halves = methods
    torch.testing.assert_close(whole.centre.value, halves.centre.value)
    for a, b in zip(whole.student.parameters(), halves.student.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_prototypes_stand_still_at_the_start_despite_weight_decay() -> None:
    method = make()
    optimiser = torch.optim.AdamW(method.student.parameters(), lr=0.1, weight_decay=0.5)
    start, seen = method.student.head.prototypes.clone(), []
    for step in range(3):
        method.loss(method.student, views_of(torch.randn(3, 1, 4, 4, 4)), step)[0].backward()
        method.before_step(step)
        optimiser.step()
        optimiser.zero_grad()
        seen.append(torch.equal(method.student.head.prototypes, start))
    assert seen == [True, True, False]


def test_centre_starts_where_the_teacher_is() -> None:
    method = make()
    batches = [views_of(torch.randn(3, 1, 4, 4, 4)) for _ in range(2)]
    for views in batches:
        method.look(views)
    method.start()
    logits = torch.cat([method.teacher(views[0]).logits for views in batches])
    torch.testing.assert_close(method.centre.value, logits.mean(0))


def test_schedules_run_from_start_to_end() -> None:
    method = make(DinoConfig(momentum=0.9, teacher_temp=0.07, teacher_temp_warmup=0.5), steps=20)
    assert method.momentum(0) == pytest.approx(0.9)
    assert method.momentum(20) == pytest.approx(1.0)
    assert [method.teacher_temp(step) for step in (0, 5, 10, 19)] == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_state_dict_holds_student_teacher_and_centre() -> None:
    method, other = make(), make()
    for p in method.parameters():
        p.data.normal_()
    method.centre.value.normal_()
    other.load_state_dict(method.state_dict())
    x = torch.randn(2, 1, 4, 4, 4)
    assert torch.equal(other.teacher(x).logits, method.teacher(x).logits)
    assert torch.equal(other.centre.value, method.centre.value)


def test_one_view_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        DinoLoss(0.1)(torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), ZERO, 0.05)


def said(watch: CollapseWatch, loss: float, entropy: float, marginal: float) -> list[str]:
    return [message for _ in range(200) if (message := watch(loss, entropy, marginal))]


def test_collapse_is_told_once_and_by_its_kind() -> None:
    top = math.log(4096)
    uniform, single = said(CollapseWatch(4096), top, top, top), said(CollapseWatch(4096), 0.02, 0.01, 0.01)
    assert len(uniform) == len(single) == 1
    assert "evenly" in uniform[0]
    assert "8.3178" in uniform[0]
    assert "same prototype" in single[0]


def test_healthy_training_is_no_collapse() -> None:
    # Sharp answers that differ from scan to scan have a low entropy too, but not in the mean over scans.
    assert not said(CollapseWatch(4096), 5.0, 4.0, 6.0)
    assert not said(CollapseWatch(4096), 1.0, 0.1, 2.0)
    top = math.log(4096)  # a loss at ln K alone is where every run begins
    assert not said(CollapseWatch(4096), top, 0.8 * top, top)


def collapse_of(steps: int, **settings: Any) -> str:
    """What is said within 200 steps of real training that is made to collapse."""
    torch.manual_seed(0)
    method = make(DinoConfig(**{"prototypes": 16, "hidden": 12, "bottleneck": 8, "freeze_last": 0, **settings}), steps)
    optimiser = torch.optim.AdamW(method.student.parameters(), lr=5e-3)
    scans = torch.randn(16, 1, 4, 4, 4)
    for step in range(steps):
        views = views_of(scans[torch.randperm(16)[:8]])
        loss, parts = method.loss(method.student, views, step)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        method.after_step(step)
        said = method.watch(loss.item(), {name: part.item() for name, part in parts.items()})
        if said:
            return said
    return ""


def test_collapse_to_one_prototype_is_told_within_200_steps() -> None:
    # A centre that never moves.
    assert "same prototype" in collapse_of(200, centre_momentum=1.0, teacher_temp=0.02, teacher_temp_start=0.02)


def test_collapse_to_even_answers_is_told_within_200_steps() -> None:
    # A teacher too soft to say anything.
    assert "evenly" in collapse_of(200, teacher_temp=20.0, teacher_temp_start=20.0, student_temp=1.0)


@pytest.mark.parametrize(
    ("name", "value"), [("prototypes", 1), ("teacher_temp", 0.0), ("momentum", 1.1), ("freeze_last", -1), ("hidden", 0)]
)
def test_impossible_settings_name_their_flag(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"--dino.{name} {value}"):
        DinoConfig(**{name: value})


def test_cross_entropy_is_torch_cross_entropy_with_soft_targets() -> None:
    student, teacher = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    loss, _ = DinoLoss(0.1)(student, teacher, ZERO, 0.05)
    one = F.cross_entropy(student[1] / 0.1, (teacher[0] / 0.05).softmax(-1))
    two = F.cross_entropy(student[0] / 0.1, (teacher[1] / 0.05).softmax(-1))
    torch.testing.assert_close(loss, (one + two) / 2)


def test_the_centre_moves_by_the_prototypes_that_gave_the_logits() -> None:
    """Not by those of the student, which has just stepped, and not by those that the teacher then takes from it."""
    method = make()
    views = views_of(torch.randn(3, 1, 4, 4, 4))
    method.loss(method.student, views, 0)
    logits, before = method.teacher(views[0]).logits, method.centre.value.clone()
    with torch.no_grad():
        method.student.head.prototypes.normal_()
    method.after_step(0)
    torch.testing.assert_close(method.centre.value, 0.9 * before + 0.1 * logits.mean(0))
