"""DINO against the definition, and each detail that implementations get wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino import CollapseWatch, Dino, DinoConfig, DinoHead, DinoLoss, update_teacher

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


def test_loss_and_gradient_match_the_definition() -> None:
    torch.manual_seed(0)
    criterion = DinoLoss(CONFIG)
    criterion.centre.normal_(std=0.1)
    student = torch.randn(5, 3, 16, requires_grad=True)
    teacher = torch.randn(2, 3, 16)
    loss, _ = criterion(student, teacher, 0.05)
    expected = by_hand(student, teacher, criterion.centre, 0.05)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))


def test_loss_of_even_answers_is_ln_k() -> None:
    loss, parts = DinoLoss(DinoConfig(prototypes=4096))(torch.zeros(4, 2, 4096), torch.zeros(2, 2, 4096), 0.04)
    assert loss.item() == pytest.approx(8.3178, abs=1e-4)
    assert parts["entropy"].item() == pytest.approx(math.log(4096), abs=1e-4)


def test_a_view_is_never_compared_with_itself() -> None:
    teacher = torch.randn(2, 3, 16)
    student = torch.randn(2, 3, 16)
    near = student.clone()
    near[0] = teacher[0] * 100  # would make the (0, 0) term tiny
    crossed = by_hand(near, teacher, torch.zeros(16), 0.05)
    torch.testing.assert_close(DinoLoss(CONFIG)(near, teacher, 0.05)[0], crossed)


def test_entropy_and_kl_add_up_to_the_loss() -> None:
    student, teacher = torch.randn(6, 3, 16), torch.randn(2, 3, 16)
    loss, parts = DinoLoss(CONFIG)(student, teacher, 0.07)
    assert (parts["entropy"] + parts["kl"]).item() == pytest.approx(loss.item(), rel=1e-5)
    assert parts["kl"].item() > 0
    assert parts["marginal"] >= parts["entropy"]


def test_teacher_logits_get_no_gradient() -> None:
    teacher = torch.randn(2, 3, 16, requires_grad=True)
    loss, _ = DinoLoss(CONFIG)(torch.randn(4, 3, 16, requires_grad=True), teacher, 0.05)
    loss.backward()
    assert teacher.grad is None


def test_loss_is_computed_in_float32_under_autocast() -> None:
    student, teacher = torch.randn(4, 3, 16), torch.randn(2, 3, 16)
    plain, _ = DinoLoss(CONFIG)(student, teacher, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = DinoLoss(CONFIG)(student, teacher, 0.05)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_centre_moves_after_the_loss_by_the_mean_of_the_teacher() -> None:
    criterion = DinoLoss(CONFIG)
    teacher = torch.randn(2, 3, 16)
    criterion(torch.randn(4, 3, 16), teacher, 0.05)
    assert torch.equal(criterion.centre, torch.zeros(16))
    criterion.update_centre()
    torch.testing.assert_close(criterion.centre, 0.1 * teacher.mean((0, 1)))


def test_centre_moves_once_for_several_micro_batches() -> None:
    parts, whole = DinoLoss(CONFIG), DinoLoss(CONFIG)
    student, teacher = torch.randn(4, 6, 16), torch.randn(2, 6, 16)
    whole(student, teacher, 0.05)
    for half in (slice(0, 3), slice(3, 6)):
        parts(student[:, half], teacher[:, half], 0.05)
        assert not parts.centre.any()
    for criterion in (parts, whole):
        criterion.update_centre()
    torch.testing.assert_close(parts.centre, whole.centre)


def test_a_skipped_step_leaves_no_trace_in_the_centre() -> None:
    criterion = DinoLoss(CONFIG)
    criterion(torch.randn(4, 3, 16), torch.full((2, 3, 16), float("nan")), 0.05)
    criterion.discard()
    criterion(torch.randn(4, 3, 16), torch.ones(2, 3, 16), 0.05)
    criterion.update_centre()
    torch.testing.assert_close(criterion.centre, torch.full((16,), 0.1))


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


def test_head_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        head = DinoHead(384, DinoConfig(prototypes=65536, hidden=2048, bottleneck=256))
    assert sum(p.numel() for p in head.parameters()) == 22_286_592


def test_teacher_averages_parameters_and_copies_buffers() -> None:
    student, teacher = Pool(), Pool()
    old, new, basis = teacher.mix.weight.clone(), student.mix.weight.clone(), student.basis.clone()
    update_teacher(teacher, student, 0.9)
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
    torch.testing.assert_close(whole.criterion.centre, halves.criterion.centre)
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
    logits = torch.cat([method.teacher(views[0]) for views in batches])
    torch.testing.assert_close(method.criterion.centre, logits.mean(0))


def test_schedules_run_from_start_to_end() -> None:
    method = make(DinoConfig(momentum=0.9, teacher_temp_warmup=0.5), steps=20)
    assert method.momentum(0) == pytest.approx(0.9)
    assert method.momentum(20) == pytest.approx(1.0)
    assert method.teacher_temp(0) == pytest.approx(0.04)
    assert method.teacher_temp(10) == method.teacher_temp(19) == CONFIG.teacher_temp


def test_state_dict_holds_student_teacher_and_centre() -> None:
    method, other = make(), make()
    for p in method.parameters():
        p.data.normal_()
    method.criterion.centre.normal_()
    other.load_state_dict(method.state_dict())
    x = torch.randn(2, 1, 4, 4, 4)
    assert torch.equal(other.teacher(x), method.teacher(x))
    assert torch.equal(other.criterion.centre, method.criterion.centre)


def test_one_view_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        DinoLoss(CONFIG)(torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), 0.05)


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


@pytest.mark.parametrize(
    ("name", "value"), [("prototypes", 1), ("teacher_temp", 0.0), ("momentum", 1.1), ("freeze_last", -1), ("hidden", 0)]
)
def test_impossible_settings_name_their_flag(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"--dino.{name} {value}"):
        DinoConfig(**{name: value})


def test_cross_entropy_is_torch_cross_entropy_with_soft_targets() -> None:
    student, teacher = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    loss, _ = DinoLoss(CONFIG)(student, teacher, 0.05)
    one = F.cross_entropy(student[1] / 0.1, (teacher[0] / 0.05).softmax(-1))
    two = F.cross_entropy(student[0] / 0.1, (teacher[1] / 0.05).softmax(-1))
    torch.testing.assert_close(loss, (one + two) / 2)
