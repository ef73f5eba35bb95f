"""BYOL against the definition, and each detail that implementations get wrong."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol import Byol, ByolConfig, Seen, StandardisedLinear, byol_loss, head, masked_loss
from collapse import VectorWatch
from dino_loss import koleo
from medformer import Backbone, BackboneConfig, SwitchMLP
from optim import update_average

CONFIG = ByolConfig(hidden=16, projection=8, groups=4, momentum=0.9)


class Pool(nn.Module):
    """A backbone small enough to see through, with a batch norm and a random basis."""

    basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.mix = nn.Linear(4, 6)
        self.register_buffer("basis", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.norm(x.flatten(1).unflatten(1, (4, -1)).mean(-1)))


def make(config: ByolConfig = CONFIG, steps: int = 20) -> Any:
    torch.manual_seed(0)
    return Byol(Pool(), Pool(), 6, config, steps).train()


def views_of(scans: Tensor) -> list[Tensor]:
    return [torch.cat([scans, scans * 1.3 + 0.1])]


def test_loss_is_the_sum_of_both_orders() -> None:
    q = [torch.randn(5, 8, requires_grad=True) for _ in range(2)]
    z = [torch.randn(5, 8, requires_grad=True) for _ in range(2)]
    expected = (2 - 2 * F.cosine_similarity(q[0], z[1])).mean() + (2 - 2 * F.cosine_similarity(q[1], z[0])).mean()
    loss = byol_loss(q, z)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(x.grad is None for x in z)
    assert all(x.grad is not None for x in q)


def test_loss_lies_between_0_and_8() -> None:
    x = torch.randn(4, 8)
    assert byol_loss([x, x], [x, 3 * x]).item() == pytest.approx(0, abs=1e-5)
    assert byol_loss([x, x], [-x, -2 * x]).item() == pytest.approx(8, abs=1e-5)


def test_loss_is_computed_in_float32_under_autocast() -> None:
    q, z = [torch.randn(4, 8) for _ in range(2)], [torch.randn(4, 8) for _ in range(2)]
    plain = byol_loss(q, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(byol_loss(q, z), plain)


def test_target_starts_at_weights_of_its_own() -> None:
    method = make()
    assert not torch.equal(method.target.backbone.mix.weight, method.student.backbone.mix.weight)
    assert not torch.equal(method.target.projector[0].weight, method.student.projector[0].weight)


def test_target_is_in_train_mode_without_gradient() -> None:
    method = make()
    assert method.target.training
    method.loss(method.student, views_of(torch.randn(4, 1, 4, 4, 4)), 0)[0].backward()
    assert all(p.grad is None for p in method.target.parameters())
    assert all(p.grad is not None for p in method.student.parameters())
    # Its batch norm counted both views.
    assert method.target.backbone.norm.num_batches_tracked == 2


def test_target_follows_the_new_weights_and_keeps_its_own_statistics() -> None:
    method = make()
    before, statistics = method.target.backbone.mix.weight.clone(), method.target.backbone.norm.running_mean.clone()
    with torch.no_grad():
        method.student.backbone.mix.weight.add_(1.0)
        method.student.backbone.norm.running_mean.add_(5.0)
    method.after_step(0)
    moved = method.student.backbone.mix.weight
    torch.testing.assert_close(method.target.backbone.mix.weight, 0.9 * before + 0.1 * moved)
    assert torch.equal(method.target.backbone.norm.running_mean, statistics)
    assert torch.equal(method.target.backbone.basis, method.student.backbone.basis)


def test_momentum_follows_the_published_cosine() -> None:
    method = make(steps=100)
    for k in (0, 25, 60, 100):
        assert method.momentum(k) == pytest.approx(1 - (1 - 0.9) * (math.cos(math.pi * k / 100) + 1) / 2)


def test_average_refuses_no_parameter_and_averages_norm_gains_too() -> None:
    a, b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(b.weight, 3.0)
    update_average(a, b, 0.5)
    torch.testing.assert_close(a.weight.detach(), torch.full((2,), 2.0))


def test_views_pass_alone_so_that_batch_statistics_are_of_one_view() -> None:
    method = make(ByolConfig(hidden=16, projection=8, norm="batch"))
    one, two = torch.randn(4, 1, 4, 4, 4), 5 + torch.randn(4, 1, 4, 4, 4)
    alone = method.student(one).predictions[0]
    torch.testing.assert_close(method.student(one, two).predictions[0], alone)


def test_standardised_rows_have_mean_0_and_variance_1_over_inputs() -> None:
    torch.manual_seed(0)
    layer = StandardisedLinear(50, 4)
    with torch.no_grad():
        layer.weight.mul_(7).add_(3)
        layer.bias.zero_()
    rows = layer(torch.eye(50)).T
    torch.testing.assert_close(rows.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.var(1, correction=0), torch.full((4,), 1 / 50), rtol=1e-4, atol=1e-6)


def test_group_norm_head_never_mixes_scans_and_batch_norm_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    group, batch = head(6, CONFIG), head(6, ByolConfig(hidden=16, projection=8, norm="batch"))
    torch.testing.assert_close(group(x)[:1], group(x[:1]))
    assert not torch.allclose(batch(x)[:2], batch(x[:2]))


def test_published_heads_have_one_batch_norm_between_two_linear_layers() -> None:
    config = ByolConfig(hidden=4096, projection=256, norm="batch")
    with torch.device("meta"):
        projector, predictor = head(2048, config), head(256, config)
    for made, inputs in ((projector, 2048), (predictor, 256)):
        assert [type(layer) for layer in made] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        count = (inputs + 1) * 4096 + 2 * 4096 + (4096 + 1) * 256
        assert sum(p.numel() for p in made.parameters()) == count


def test_the_loss_of_experts_is_the_mean_over_both_views() -> None:
    torch.manual_seed(0)
    shape: Any = {"patch_size": 4, "patch_stride": 4, "patch_padding": 0, "mlp": "moe", "experts": 2}
    backbones = [Backbone(BackboneConfig(width=24, depth=2, heads=2, **shape)) for _ in range(2)]
    method, found = Byol(*backbones, 24, CONFIG, 20), []
    (experts,) = (m for m in method.student.modules() if isinstance(m, SwitchMLP))
    experts.register_forward_hook(lambda module, *_: found.append(module.aux_loss))
    views = [torch.randn(4, 1, 8, 8, 8)]
    loss, _ = method.loss(method.student, views, 0)
    seen = method.student(*views[0].chunk(2))
    plain = byol_loss(seen.predictions, method.target(*views[0].chunk(2))[0])
    torch.testing.assert_close(loss, plain + (found[0] + found[1]) / 2)


def test_mixed_views_are_pulled_to_both_targets() -> None:
    q, z = [torch.randn(3, 8) for _ in range(2)], [torch.randn(3, 8) for _ in range(2)]
    partner, share = torch.tensor([1, 2, 0]), torch.full((3,), 0.25)
    whole = 0.75 * byol_loss(q, z) + 0.25 * byol_loss(q, [x[partner] for x in z])
    torch.testing.assert_close(byol_loss(q, z, (partner, share)), whole)


def test_spread_tells_a_point_from_a_cloud() -> None:
    method = make()
    _, parts = method.loss(method.student, views_of(torch.randn(8, 1, 4, 4, 4)), 0)
    assert 0 < parts["spread"] < 1
    assert 1 < parts["rank"] <= 7
    _, lone = make(ByolConfig(hidden=16, projection=8, groups=4)).loss(
        lambda *views: Seen([torch.ones(2, 8)] * 2, []), views_of(torch.ones(2, 1, 4, 4, 4)), 0
    )
    assert lone["spread"] < 1e-6


def test_collapse_is_told_once_and_by_its_kind() -> None:
    point, line, healthy = VectorWatch(), VectorWatch(), VectorWatch()
    told = [
        [w(*row) for _ in range(200)] for w, row in ((point, (1e-5, 3.0)), (line, (0.3, 1.01)), (healthy, (0.3, 4.0)))
    ]
    messages = [[m for m in column if m] for column in told]
    assert [len(m) for m in messages] == [1, 1, 0]
    assert "same vector" in messages[0][0]
    assert "one line" in messages[1][0]


def test_a_network_that_says_nothing_is_told_within_200_steps() -> None:
    method = make()
    for part in (method.student, method.target):
        torch.nn.init.zeros_(part.backbone.mix.weight)
    said = []
    for step in range(200):
        loss, parts = method.loss(method.student, views_of(torch.randn(8, 1, 4, 4, 4)), step)
        said.append(method.watch(loss.item(), {name: part.item() for name, part in parts.items()}))
    (message,) = [message for message in said if message]
    assert "same vector" in message


def test_the_masked_term_is_the_distance_at_masked_patches_and_each_view_counts_alike() -> None:
    mask = torch.tensor([[True, True, False, True], [False] * 4, [False, True, False, False]])
    guess, wanted = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    terms = 2 - 2 * F.cosine_similarity(guess, wanted)
    found = masked_loss(guess, wanted, mask)
    torch.testing.assert_close(found, (terms[:3].mean() + terms[3]) / 2)
    found.backward()
    assert wanted.grad is None


def test_what_is_masked_is_hidden_from_the_online_network_and_seen_by_the_target() -> None:
    torch.manual_seed(0)
    shape = BackboneConfig(width=24, depth=2, heads=2, patch_size=4, patch_stride=4, patch_padding=0, mask_token=True)
    config = replace(CONFIG, masked_patches=1.0, mask_share=(0.4, 0.5))
    byol: Any = Byol(Backbone(shape), Backbone(shape), 24, config, 20).train()
    near = torch.randn(4, 1, 8, 8, 8)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[[0, 2], 3] = True
    other = near.clone()
    other[:, :, :4, 4:, 4:] += 1.0  # the voxels of patch 3
    first, second = (byol.student(*views.chunk(2), mask=mask) for views in (near, other))
    torch.testing.assert_close(first.patches, second.patches)
    torch.testing.assert_close(first.predictions[0][0], second.predictions[0][0])
    assert not torch.allclose(first.predictions[0][1], second.predictions[0][1])  # a view without a mask
    (_, seen), (_, changed) = (byol.target(*views.chunk(2), mask=mask) for views in (near, other))
    assert not torch.allclose(seen, changed)
    loss, parts = byol.loss(byol.student, [near], 0)
    loss.backward()
    assert 0 < parts["patch_loss"] < 4
    assert byol.student.backbone.mask_token.grad.abs().sum() > 0


def test_koleo_is_that_of_the_backbones_vectors_view_by_view() -> None:
    views = views_of(torch.randn(5, 1, 4, 4, 4))
    plain, _ = make(CONFIG).loss((method := make(CONFIG)).student, views, 0)
    vectors = [method.student.backbone(view) for view in views[0].chunk(2)]
    expected = plain + 0.3 * (koleo(vectors[0]) + koleo(vectors[1])) / 2
    method = make(replace(CONFIG, koleo=0.3))
    loss, parts = method.loss(method.student, views, 0)
    torch.testing.assert_close(loss, expected)
    assert set(parts) == {"spread", "rank", "koleo"}


SYNC = """
import sys
sys.path[:0] = ["{root}/ssl", "{root}/kernels", "{root}"]
import torch, torch.distributed as dist
from peers import SyncBatchNorm


def check():
    rank = dist.get_rank()
    torch.manual_seed(0)
    x, weight = torch.randn(6, 5, dtype=torch.float32), torch.randn(6, 5)
    whole = torch.nn.BatchNorm1d(5)
    y = whole(full := x.clone().requires_grad_())
    (y * weight).sum().backward()
    sync = SyncBatchNorm(5)
    part = x[rank * 3 : rank * 3 + 3].clone().requires_grad_()
    z = sync(part)
    (z * weight[rank * 3 : rank * 3 + 3]).sum().backward()
    torch.testing.assert_close(z, y[rank * 3 : rank * 3 + 3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.grad, full.grad[rank * 3 : rank * 3 + 3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sync.running_mean, whole.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sync.running_var, whole.running_var, rtol=1e-4, atol=1e-5)
    bare = SyncBatchNorm(5, affine=False, track_running_stats=False).eval()
    torch.testing.assert_close(bare(part), y[rank * 3 : rank * 3 + 3], rtol=1e-4, atol=1e-5)
    print("same", rank)


dist.init_process_group("gloo")
check()
dist.destroy_process_group()  # the last that knows it: its threads end here
"""


def test_sync_batch_norm_on_two_processes_is_batch_norm_on_one(tmp_path: Path) -> None:
    script = tmp_path / "sync.py"
    script.write_text(SYNC.format(root=Path(__file__).resolve().parent.parent))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", str(script),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden": 0}, "--byol.hidden 0"),
        ({"momentum": 1.5}, "--byol.momentum 1.5"),
        ({"hidden": 20, "groups": 16}, "--byol.groups 16 must divide --byol.hidden 20"),
    ],
)
def test_impossible_settings_name_their_flag(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ByolConfig(**values)
