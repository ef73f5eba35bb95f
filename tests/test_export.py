"""What every network stands: another memory format, copies, empty batches, one compiled graph, export and load."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import medformer
from medformer import BackboneConfig, ImageGPTConfig, ResNetConfig, TNTConfig, TNTLevel
from medformer_kernels import _products

CUBE = {"width": 24, "depth": 1, "heads": 2, "patch_size": 4, "patch_stride": 4, "patch_padding": 0, "mlp_ratio": 2.0}
IMAGE = {**CUBE, "dims": 2, "attention": "softmax"}
FINE, COARSE = (
    TNTLevel(width=12, depth=1, heads=2, kernel=2, stride=2),
    TNTLevel(width=24, depth=1, heads=2, kernel=2, stride=2),
)
LARGE = TNTLevel(width=12, depth=1, heads=2)
MIDDLE = TNTLevel(width=16, depth=1, heads=2, kernel=2, stride=2)
HALF = TNTLevel(width=12, depth=1, heads=2, kernel=3, stride=2, padding=1)
SEQUENCE = {"vocabulary": 8, "grid": (4, 4), "width": 24, "depth": 1, "heads": 2}

CONFIGS: dict[str, Any] = {
    "performer": BackboneConfig(**IMAGE | {"attention": "performer"}, num_features=16, mask_token=True),
    "performer blocks": BackboneConfig(**IMAGE | {"attention": "performer"}, num_features=16, state_blocks=3),
    "softmax": BackboneConfig(**IMAGE, position_grid=4),
    "nystrom": BackboneConfig(**IMAGE | {"attention": "nystrom"}, num_landmarks=5, position_grid=4),
    "hopfield": BackboneConfig(**IMAGE | {"attention": "hopfield"}, position="sincos"),
    "disentangled": BackboneConfig(**IMAGE | {"attention": "disentangled"}, position="none", registers=1),
    "gated": BackboneConfig(
        **IMAGE, mlp="gated", registers=2, qk_norm=True, layer_scale=0.1, drop_path=0.1, classes=3, position="rotary"
    ),
    "moe": BackboneConfig(**IMAGE, mlp="moe", experts=3, moe_every=1, class_token=False, router_jitter=0.1),
    "transposed": BackboneConfig(
        **IMAGE | {"patch_size": 3, "patch_stride": 2, "patch_padding": 1}, patch_transposed=True, position="rotary"
    ),
    "stem": BackboneConfig(
        **IMAGE | {"patch_size": 1, "patch_stride": 1}, stem="resnet18", stem_stages=1, position_grid=4
    ),
    "resnet": ResNetConfig(dims=2, depth=10, base_width=32, stages=2),
    "tnt": TNTConfig(dims=2, levels=(FINE, MIDDLE, COARSE), attention="softmax"),
    "performer 3D": BackboneConfig(**CUBE | {"patch_size": 8, "patch_padding": 2}, num_features=16, position_grid=3),
    "softmax 3D": BackboneConfig(**CUBE, attention="softmax", position_grid=4),
    "nystrom 3D": BackboneConfig(**CUBE, attention="nystrom", position="sincos"),
    "hopfield 3D": BackboneConfig(**CUBE, attention="hopfield", position="rotary"),
    "disentangled 3D": BackboneConfig(**CUBE, attention="disentangled", position_grid=(4, 2, 4)),
    "resnet 3D": ResNetConfig(depth=10, base_width=8, norm="batch", shortcut="pad", output_stride=8, classes=3),
    "tnt 3D": TNTConfig(levels=(LARGE, COARSE), num_features=16),
    "tnt nystrom 3D": TNTConfig(levels=(LARGE, COARSE), attention="nystrom", position_grid=2, class_token=False),
    "tnt isolate": TNTConfig(dims=2, levels=(HALF, COARSE), attention="disentangled", isolate=True),
    "image gpt": ImageGPTConfig(**SEQUENCE, attention="performer", order="morton"),
    "image gpt bert": ImageGPTConfig(**SEQUENCE, objective="bert"),
    "image gpt expire": ImageGPTConfig(**SEQUENCE, attention="expire_span"),
}
# Sizes open, with every branch on a size that a network has. The rest is exported at one size.
OPEN = ("performer", "softmax", "nystrom", "disentangled", "moe", "transposed", "resnet", "tnt", "image gpt")
COMPILED = [name for name in CONFIGS if "3D" not in name or name in ("performer 3D", "resnet 3D", "tnt 3D")]
everything = pytest.mark.parametrize("name", CONFIGS)


def made(name: str) -> Any:
    torch.manual_seed(0)
    return medformer.build(CONFIGS[name])


def batch_of(name: str, batch: int, side: int = 16) -> Tensor:
    config, generator = CONFIGS[name], torch.Generator().manual_seed(1)
    if isinstance(config, ImageGPTConfig):
        return torch.randint(0, config.vocabulary, (batch, config.tokens), generator=generator)
    # No two axes alike, so that none is taken for another.
    size = [side + 8 * (axis % 2) for axis in range(config.dims)]
    return torch.randn(batch, config.in_channels, *size, generator=generator)


def learned(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input where it has one, and of every parameter that took part."""
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    out = model(x)
    out.square().sum().backward()
    gradients = [x.grad] if x.grad is not None else []
    return [out.detach(), *gradients, *(p.grad for p in model.parameters() if p.grad is not None)]


def loaded(program: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@everything
def test_channels_last_gives_the_same_outputs_and_gradients(name: str) -> None:
    x = batch_of(name, 2)
    layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
    model = made(name).eval()
    moved = copy.deepcopy(model).to(memory_format=layout)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    moved.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in moved.state_dict().items())
    there = x.contiguous(memory_format=layout) if x.ndim > 2 else x
    torch.testing.assert_close(learned(moved, there), learned(model, x), rtol=1e-4, atol=1e-4)


def test_every_table_that_is_no_convolution_moves_and_is_cast() -> None:
    model = made("nystrom 3D")
    assert model.blocks[0].attention.conv_weight.ndim == 4
    moved = copy.deepcopy(model).to(torch.float64, memory_format=torch.channels_last_3d)
    assert {p.dtype for p in moved.parameters()} == {torch.float64}
    assert model.patch_embed.conv.weight.is_contiguous()
    assert (
        moved.patch_embed.conv.weight.stride()
        == moved.patch_embed.conv.weight[:].contiguous(memory_format=torch.channels_last_3d).stride()
    )
    meta = made("softmax 3D").to("meta")
    assert meta.position.patches.shape == (4, 4, 4, 24)
    assert meta.to_empty(device="cpu").position.patches.device.type == "cpu"


@everything
def test_copies_and_pickles_after_a_step_compute_the_same(name: str) -> None:
    x, model = batch_of(name, 2), made(name).train()
    learned(model, x)
    fresh = medformer.build(CONFIGS[name])
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other.eval()(x), model.eval()(x))


@everything
def test_an_empty_batch_gives_empty_outputs(name: str) -> None:
    model, empty, full = made(name).train(), batch_of(name, 0), batch_of(name, 2)
    shape = model(full).shape
    out, *gradients = learned(model, empty)
    assert out.shape == (0, *shape[1:])
    assert all(bool((gradient == 0).all()) for gradient in gradients)
    assert model.eval()(empty).shape == (0, *shape[1:])


@pytest.mark.parametrize("name", [name for name in CONFIGS if "gpt" not in name])
def test_an_empty_batch_has_empty_features_and_maps(name: str) -> None:
    model, empty, full = made(name).eval(), batch_of(name, 0), batch_of(name, 2)
    wanted = model.forward_features(full)
    mask = torch.ones(0, wanted.patches.shape[1], dtype=torch.bool)
    for given in (None, mask):
        found = model.forward_features(empty, key_padding_mask=given)
        assert found.grid == wanted.grid
        for kind in ("cls", "registers", "patches"):
            assert getattr(found, kind).shape == (0, *getattr(wanted, kind).shape[1:])
    maps = [lambda x: model.attention_map(x, queries=[0])] if hasattr(model, "attention_map") else []
    maps += [model.rollout] if hasattr(model, "rollout") else []
    for function in maps:
        assert function(empty).shape == (0, *function(full).shape[1:])


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph_that_reads_inputs_and_state_alone(name: str) -> None:
    model, x = made(name).train(), batch_of(name, 2)
    model(x)  # what a run before the capture might leave
    graphs: list[torch.fx.GraphModule] = []
    inputs: list[Tensor] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        graphs.append(graph)
        inputs.extend(example for example in examples if isinstance(example, Tensor))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend=backend, dynamic=False)(x)
    own = {id(tensor) for tensor in (x, *model.parameters(), *model.buffers())}
    assert len(graphs) == 1
    assert [tuple(tensor.shape) for tensor in inputs if id(tensor) not in own] == []
    kept = [node.target for node in graphs[0].graph.nodes if node.op == "get_attr"]
    assert [name for name in kept if isinstance(getattr(graphs[0], str(name)), Tensor)] == []


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in OPEN])
def test_exports_saves_and_loads(name: str) -> None:
    model, x = made(name).eval(), batch_of(name, 2)
    program = loaded(torch.export.export(model, (x,)))
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPEN)
def test_a_program_with_open_sizes_serves_both_sides_of_every_threshold(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between the products of the export and those of the larger runs: eager takes oneDNN there.
    monkeypatch.setattr(_products, "_LEAST", 1 << 15)
    monkeypatch.setattr(_products, "_LEAST_OF_MANY", 1 << 15)
    model, x = made(name).eval(), batch_of(name, 2)
    open_size = torch.export.Dim.DYNAMIC
    axes = [0] if x.ndim == 2 else [0, *range(2, x.ndim)]
    program = loaded(torch.export.export(model, (x,), dynamic_shapes=(dict.fromkeys(axes, open_size),)))
    for batch, side in ((2, 16), (3, 24), (1, 40)):
        x = batch_of(name, batch, side)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


SMALL = [
    "performer",
    "performer blocks",
    "tnt nystrom 3D",
    "image gpt",
]  # the others: the matrix of misc/docs/weights.md


@pytest.mark.parametrize("name", SMALL)
def test_onnx_files_give_the_numbers_of_pytorch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX needs pip install 'medformer[export]'")
    model, x = made(name), batch_of(name, 2)
    found = medformer.export(model, tmp_path / "model.onnx", shape=x.shape, dynamic="nothing")
    assert list(found) == [tuple(x.shape)]
    assert found[tuple(x.shape)] < 1e-5
    assert model.training
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert not any("medformer" in node.domain for node in nodes_of(tmp_path / "model.onnx"))


def nodes_of(path: Path) -> Any:
    import onnx

    model = onnx.load(path)
    return [*model.graph.node, *(node for function in model.functions for node in function.node)]


def test_onnx_leaves_batch_and_size_open(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX needs pip install 'medformer[export]'")
    found = medformer.export(made("disentangled"), tmp_path / "model.onnx", size=(16, 24))
    assert list(found) == [(2, 1, 16, 24), (1, 1, 24, 36)]
    assert max(found.values()) < 1e-5


class Headed(nn.Module):
    """Two outputs, as a fine-tuned model may have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = made("softmax")
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body.forward_features(x)
        return self.head(features.cls), self.head(features.patches)


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_any_module_with_heads_is_exported(format: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="ONNX needs pip install 'medformer[export]'")
    found = medformer.export(Headed(), tmp_path / "model", shape=(2, 1, 16, 24), format=format)  # type: ignore[arg-type]
    assert list(found) == [(2, 1, 16, 24), (1, 1, 24, 36)]
    assert max(found.values()) < 1e-5


def test_exports_that_cannot_be_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"model\.bin must end in \.onnx or \.pt2"):
        medformer.export(made("softmax"), tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"Linear says no size; give shape="):
        medformer.export(nn.Linear(2, 2), tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"size=\(3, 4, 5\) must be one number or 2"):
        medformer.export(made("softmax"), tmp_path / "model.pt2", size=(3, 4, 5))
    with pytest.raises(ValueError, match="dynamic='all' must be"):
        medformer.export(made("softmax"), tmp_path / "model.pt2", dynamic="all")  # type: ignore[arg-type]

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(ValueError, match=r"the pt2 file differs from PyTorch by .*it was not kept"):
        medformer.export(Noisy(), tmp_path / "model.pt2", shape=(2, 3))
    assert not list(tmp_path.iterdir())


def test_the_command_exports_a_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medformer.commands import main

    medformer.save(made("softmax"), tmp_path / "model.safetensors")
    assert main(["export", str(tmp_path / "model.safetensors"), "--format", "pt2", "--tokens"]) == 0
    assert "model.pt2: 2x1x16x16 differs from PyTorch by" in capsys.readouterr().out
    cls, patches = torch.export.load(tmp_path / "model.pt2").module()(torch.zeros(3, 1, 20, 16))
    assert cls.shape == (3, 24)
    assert patches.shape == (3, 20, 24)
    assert main(["export", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors: no such file or folder" in capsys.readouterr().err
