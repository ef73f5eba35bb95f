"""Whole scans to tokens: what a window and one pass mean, whatever the memory, and that the memory is kept to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medformer
from medformer.data import Volume, normalise
from medformer.embed import TokenStream, embed

SIZE = (21, 34, 30)


def model_of(**options: Any) -> medformer.Backbone:
    torch.manual_seed(0)
    small = {"width": 24, "depth": 2, "heads": 2, "registers": 1, "position_grid": 3, "layer_scale": 0.5}
    if "position" in options:
        small.pop("position_grid")
    model = medformer.Backbone(medformer.BackboneConfig(**(small | options)))
    with torch.no_grad():
        for p in model.parameters():  # larger than at the start, so that attention and positions matter
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def ct(size: tuple[int, ...] = SIZE, **fields: Any) -> Volume:
    voxels = np.random.default_rng(0).integers(-1200, 1500, size).astype(np.int16)
    affine = np.array([[0.7, 0.1, 0, 5], [-0.1, 0.8, 0, -3], [0, 0, 2.5, 9], [0, 0, 0, 1]], float)
    values: dict[str, Any] = {"modality": "CT", "units": "HU", "notes": (), "source": "ct"}
    return Volume(voxels=voxels, affine=affine, **(values | fields))


def whole(model: medformer.Backbone, volume: Volume) -> medformer.Features:
    with torch.inference_mode():
        return model.forward_features(torch.from_numpy(normalise(volume))[None, None])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "softmax", "qk_norm": True},
        {"position": "sincos", "class_token": False},
        {"position": "rotary", "width": 32, "mlp": "gated"},
        {"position": "none", "registers": 0},
        {"patch_size": (4, 6, 5), "patch_stride": (2, 5, 5), "patch_padding": (1, 0, 2), "patch_dilation": (2, 1, 1)},
    ],
)
def test_one_pass_is_the_models_own_forward(options: dict[str, Any]) -> None:
    model, volume = model_of(**options).double(), ct()
    model.train()
    least = TokenStream(model, volume, method="one_pass", result_held=True).least
    limits = [least, "1 GiB"]  # chunks of 256 tokens, and all at once
    model.eval()
    expected = whole_double(model, volume)
    for limit in limits:
        found = embed(model, volume, max_memory=limit, method="one_pass")
        assert found.grid == expected.grid
        np.testing.assert_allclose(found.tokens.reshape(-1, found.tokens.shape[-1]), expected.patches[0], atol=2e-6)
        np.testing.assert_allclose(found.cls, expected.cls[0], atol=2e-6)


def whole_double(model: medformer.Backbone, volume: Volume) -> medformer.Features:
    with torch.inference_mode():
        return model.forward_features(torch.from_numpy(normalise(volume)).double()[None, None])


def test_one_window_over_the_whole_scan_is_the_models_own_forward() -> None:
    model, volume = model_of(), ct()
    expected = whole(model, volume)
    found = embed(model, volume, window=SIZE)
    np.testing.assert_allclose(found.tokens.reshape(-1, 24), expected.patches[0], atol=1e-5)
    np.testing.assert_allclose(found.cls, expected.cls[0], atol=1e-5)


def by_hand(model: medformer.Backbone, volume: Volume, window: tuple[int, ...], overlap: float) -> np.ndarray:
    """The definition: every window alone, its tokens weighted by their distance from its edges."""
    voxels, grid, tile = normalise(volume), model.grid_of(volume.shape), model.grid_of(window)
    voxels = np.pad(voxels, [(0, 8)] * 3, mode="edge")
    total, weights = np.zeros((*grid, 24)), np.zeros((*grid, 1))
    hats = [np.minimum(np.arange(t) + 1, t - np.arange(t)) for t in tile]
    hat = np.einsum("z,y,x->zyx", *hats)[..., None]
    starts = [[*range(0, g - t, max(1, int(t * (1 - overlap)))), g - t] for g, t in zip(grid, tile, strict=True)]
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                at = tuple(slice(4 * i, 4 * i + w) for i, w in zip((z, y, x), window, strict=True))
                with torch.inference_mode():
                    tokens = model.forward_features(torch.from_numpy(voxels[at])[None, None]).patches
                part = tuple(slice(i, i + t) for i, t in zip((z, y, x), tile, strict=True))
                total[part] += tokens.reshape(*tile, 24).numpy() * hat
                weights[part] += hat
    return total / weights


@pytest.mark.parametrize(("window", "overlap"), [((16, 12, 18), 0.5), ((12, 12, 12), 0.0), ((21, 16, 99), 0.75)])
def test_windows_are_those_of_the_definition_whatever_the_memory(window: tuple[int, ...], overlap: float) -> None:
    model, volume = model_of(), ct()
    clipped = tuple(min(w, n) for w, n in zip(window, SIZE, strict=True))
    expected = by_hand(model, volume, clipped, overlap)
    found = []
    for limit in (TokenStream(model, volume, window=window, overlap=overlap).least + 24 * 8 * 8 * 6 * 4, "1 GiB"):
        found.append(embed(model, volume, max_memory=limit, window=window, overlap=overlap).tokens)
        np.testing.assert_allclose(found[-1], expected, atol=2e-5)
    np.testing.assert_allclose(found[0], found[1], atol=5e-6)


def test_padding_arrays_and_maps_are_scaled_like_scans(tmp_path: Path) -> None:
    model, volume = model_of(), ct()
    valid = np.random.default_rng(1).random(SIZE) > 0.2
    for case in (ct(valid=valid), ct(units="arbitrary", modality="MR", valid=valid), ct(units="arbitrary")):
        expected = whole(model, case).patches[0]
        np.testing.assert_allclose(embed(model, case, window=SIZE).tokens.reshape(-1, 24), expected, atol=1e-5)
    np.save(tmp_path / "ct.npy", volume.voxels)
    stored = np.load(tmp_path / "ct.npy", mmap_mode="r")
    same = embed(model, volume).tokens
    assert np.array_equal(embed(model, stored, units="HU").tokens, same)
    assert np.array_equal(embed(model, normalise(volume), units="normalised").tokens, same)


def test_centres_lie_in_the_middle_of_their_patches() -> None:
    model, volume = model_of(), ct()
    found = embed(model, volume)
    # Token (z, y, x) = (2, 3, 1): patches of 8, stride 4, padding 2 start at voxels 6, 10, 2.
    expected = volume.affine @ [2 + 3.5, 10 + 3.5, 6 + 3.5, 1]
    np.testing.assert_allclose(found.centres_mm()[2, 3, 1], expected[:3])
    np.testing.assert_allclose(found.affine @ [1, 3, 2, 1], expected)


def test_the_model_is_handed_back_in_its_mode_and_a_file_holds_the_same(tmp_path: Path) -> None:
    model, volume = model_of(drop_path=0.5), ct()
    model.train()
    held = embed(model, volume)
    assert model.training
    written = embed(model, volume, out=tmp_path / "tokens.npy")
    assert isinstance(written.tokens, np.memmap)
    assert np.array_equal(held.tokens, written.tokens)
    assert np.array_equal(held.tokens, np.load(tmp_path / "tokens.npy"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_memory": "20 MiB"}, "max_memory=20 MiB must be at least"),
        ({"max_memory": "lots"}, "max_memory='lots' must be bytes"),
        ({"overlap": 1.0}, "overlap=1.0"),
        ({"window": (8, 8)}, "window=(8, 8) must be three"),
        ({"window": (8, 4, 8)}, "smaller than the patch kernel"),
        ({"method": "tiles"}, "method='tiles'"),
        ({"units": "arbitrary"}, "units='arbitrary' with a Volume in HU"),
    ],
)
def test_a_mistake_names_its_way_out(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^(embed|PatchEmbed): ") as caught:
        embed(model_of(), ct(), **arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_streamed_is_refused() -> None:
    with pytest.raises(ValueError, match="not MLP, NystromAttention; use method='windows'"):
        embed(model_of(attention="nystrom"), ct(), method="one_pass")
    with pytest.raises(ValueError, match="units=None of an array"):
        embed(model_of(), np.zeros((9, 9, 9), np.int16))
    with pytest.raises(ValueError, match="int16 cannot be normalised"):
        embed(model_of(), np.zeros((9, 9, 9), np.int16), units="normalised")
    with pytest.raises(TypeError, match="Linear is not a Backbone, ResNet or TNT"):
        embed(torch.nn.Linear(2, 2), ct())  # type: ignore[arg-type]


def test_other_networks_go_through_windows() -> None:
    torch.manual_seed(0)
    fine, coarse = ({"width": 12, "depth": 1, "heads": 2, "kernel": k, "stride": 2} for k in (4, 2))
    tnt = medformer.TNT(medformer.TNTConfig(levels=(fine, coarse), position_grid=4)).eval()  # type: ignore[arg-type]
    resnet = medformer.ResNet(medformer.ResNetConfig(depth=10, base_width=32, output_stride=8)).eval()
    stem = model_of(stem="resnet18", stem_stages=1, patch_size=1, patch_stride=1, patch_padding=0)
    for model, first in ((tnt, 2.5), (resnet, 0.0), (stem, 0.0)):
        found, volume = embed(model, ct(), window=SIZE), ct()
        expected = model.forward_features(torch.from_numpy(normalise(volume))[None, None]).patches[0]
        np.testing.assert_allclose(found.tokens.reshape(expected.shape), expected.detach(), atol=1e-5)
        step = medformer.footprint(model).stride[0]
        np.testing.assert_allclose(found.affine @ [1, 0, 0, 1], volume.affine @ [step + first, first, first, 1])
        assert embed(model, ct(), window=(16, 16, 16)).grid == found.grid
        with pytest.raises(ValueError, match="use method='windows'"):
            embed(model, ct(), method="one_pass")
    assert embed(tnt, ct()).grid == tnt.grid_of(SIZE)
    with pytest.raises(ValueError, match="window of a ResNet must be given"):
        embed(resnet, ct())


_PEAK = """
import sys
import numpy as np, torch
import medformer
from medformer.embed import embed

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))

torch.manual_seed(0)
model = medformer.Backbone(medformer.BackboneConfig(width=48, depth=1, heads=2, patch_stride=8, patch_padding=0))
scan = np.load(sys.argv[1], mmap_mode="r")
kind = dict(method="one_pass") if sys.argv[2] == "one_pass" else dict(window=(64, 64, 64), overlap=0.25)
embed(model, np.array(scan[:64, :64, :64]), units="HU", **kind)  # imports, and kernels loaded on first use
scan.max()  # its pages count for the caller
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is now what is resident
before = status("VmRSS")
found = embed(model, scan, units="HU", max_memory=sys.argv[3], **kind)
print(status("VmHWM") - before, found.tokens.nbytes / 2**20)
"""


@pytest.mark.parametrize(("method", "limit"), [("windows", 100), ("one_pass", 120)])
def test_peak_memory_stays_below_the_limit(tmp_path: Path, method: str, limit: int) -> None:
    """61 MiB of int16; a float copy alone would be 122."""
    np.save(tmp_path / "ct.npy", np.random.default_rng(0).integers(-1000, 1000, (160, 448, 448), dtype=np.int16))
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "ct.npy"), method, f"{limit} MiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    print(f"{method}: {done.stdout.strip()} MiB")
    peak, tokens = map(float, done.stdout.split())
    assert tokens < peak < limit


def test_the_command_line_writes_tokens_and_where_they_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medformer.commands import main

    medformer.save(model_of(), tmp_path / "model.safetensors")
    ct().save(tmp_path / "ct.nii")
    out = tmp_path / "tokens.npy"
    flags = ["embed", str(tmp_path / "model.safetensors"), str(tmp_path / "ct.nii"), str(out), "--window", "16x16x16"]
    assert main([*flags, "--max-memory", "1 GiB"]) == 0
    about = json.loads(out.with_suffix(".json").read_text())
    assert np.load(out).shape == (*about["grid"], 24)
    assert len(about["cls"]) == 24
    assert np.array(about["affine"]).shape == (4, 4)
    assert main([*flags, "--max-memory", "1 MiB"]) == 2
    assert capsys.readouterr().err.startswith("error: embed: max_memory=1 MiB must be at least")
