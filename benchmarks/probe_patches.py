"""What features see, in seconds: kNN and a ridge classifier against fresh weights, so that recipes can be compared.

    python benchmarks/probe_patches.py CHECKPOINT ... --task segmentation.csv [--size 32,32,32] [--cases 12]
    python benchmarks/probe_patches.py RUN/checkpoints/*.pt --task classes.csv [--size 32,32,32]

A checkpoint is a run, a file of weights, or a file of a run's checkpoints (by steps: keep them with pretrain's --keep).

Of masks, the tissue in the middle of each token, before any decoder: tokens of labelled training cases answer for
tokens of the validation cases. Scores are macro Dice over the classes without background, at tokens. Of classes, whole
scans at --size (class token and mean patch; of an Image-GPT its middle block): macro AUROC over training and validation
cases, a fifth of the patients answered for by the others, mean of REPEATS cuts. `rank`: effective dimensions of what is
answered for; `the scan`: what the grey values say without any network, averaged in cells. With --few also the
linear probe of `medformer evaluate` from few labels, asked about the other training patients. The test split does not
enter.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import medformer
from medformer.evaluation import probes
from medformer.evaluation.dense import padded
from medformer.evaluation.scores import point
from medformer.evaluation.tasks import Task, fraction, read_task
from medformer.footprint import footprint

NEIGHBOURS = 20
MOST = 20_000  # training tokens that kNN looks among
RIDGE = 1e-2  # of the mean eigenvalue
REPEATS, FOLDS = 20, 5
CELL = 4  # voxels a side
DRAWS, PROBE_STEPS = 5, 300


@torch.no_grad()
def tokens_of(model: Any, task: Task, index: np.ndarray, size: tuple[int, ...], layer: int) -> tuple[Tensor, Tensor]:
    """[n, C] features and [n] classes of all tokens of these cases, tile by tile without overlap."""
    seen, features, labels = footprint(model), [], []
    model.eval()
    for i in index:
        image, mask = padded(task.images[i], size, -2.0), padded(task.targets[i][None], size, 0)[0]
        starts = [range(0, n - s + 1, s) for n, s in zip(mask.shape, size, strict=True)]
        for corner in product(*starts):
            at = tuple(slice(a, a + s) for a, s in zip(corner, size, strict=True))
            found = model.get_intermediate_layers(image[(slice(None), *at)][None].float(), [layer])[0]
            middles = [
                (torch.arange(n) * s - p + (r - 1) // 2).clamp(0, top - 1)
                for n, s, p, r, top in zip(found.grid, seen.stride, seen.padding, seen.reach, size, strict=True)
            ]
            features.append(found.patches[0].float())
            labels.append(mask[at][torch.meshgrid(*middles, indexing="ij")].flatten().long())
    return torch.cat(features), torch.cat(labels)


def token_dice(guess: Tensor, truth: Tensor, classes: int) -> float:
    both = [2 * ((guess == c) & (truth == c)).sum() / ((guess == c).sum() + (truth == c).sum()).clamp(min=1)
            for c in range(1, classes + 1)]  # fmt: skip
    return float(torch.stack(both).mean())


def ridge(train: Tensor, labels: Tensor, held: Tensor, classes: int, decay: float = RIDGE) -> Tensor:
    """[n, classes] scores of `held` by least squares on one-hot targets, all classes weighted alike."""
    hot = F.one_hot(labels, classes).double()
    weight = (1 / hot.sum(0).clamp(min=1))[labels][:, None]
    x = torch.cat([train.double(), torch.ones(len(train), 1, dtype=torch.float64)], 1)
    gram = x.T @ (weight * x)
    gram += decay * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solved = torch.linalg.solve(gram, x.T @ (weight * hot))
    return torch.cat([held.double(), torch.ones(len(held), 1, dtype=torch.float64)], 1) @ solved


def near(train: Tensor, labels: Tensor, held: Tensor, classes: int) -> Tensor:
    """[n, classes] shares of the nearest of at most MOST training rows, cosine."""
    pick = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:MOST]
    train, labels = F.normalize(train[pick], dim=1), labels[pick]
    rows = []
    for part in F.normalize(held, dim=1).split(2048):
        index = (part @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1).indices
        rows.append(F.one_hot(labels[index], classes).float().mean(1))
    return torch.cat(rows)


def rank(features: Tensor) -> float:
    power = torch.linalg.svdvals(features - features.mean(0)).square()
    return float(power.sum().square() / power.square().sum())


def standard(train: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    middle, spread = train.mean(0), train.std(0).clamp(min=1e-6)
    return (train - middle) / spread, (held - middle) / spread


def folds(groups: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """A fold for each case, patients whole, about as many of each class in each: left-out cases of a class that is
    therefore rarer among the others would score below chance."""
    rng, fold = np.random.default_rng(seed), np.zeros(groups.max() + 1, int)
    own = np.array([labels[groups == g][0] for g in range(groups.max() + 1)])
    for c in np.unique(own):
        members = rng.permutation(np.flatnonzero(own == c))
        fold[members] = (np.arange(len(members)) + rng.integers(FOLDS)) % FOLDS
    return fold[groups]


@torch.no_grad()
def case_scores(model: Any, task: Task) -> dict[str, float]:
    """kNN and ridge AUROC of whole cases, patients kept together, and the effective rank. Without a model: of the scans
    themselves, averaged in cells."""
    index, classes = np.concatenate([task.where("train"), task.where("val")]), len(task.names)
    if model is None:
        images = torch.stack([task.images[i].float() for i in index])
        features = F.avg_pool3d(images, CELL).flatten(1) if task.dims == 3 else F.avg_pool2d(images, CELL).flatten(1)
    elif isinstance(model, medformer.ImageGPT):
        # Where evaluation reads it: the middle block.
        features = probes.extract(model, [task.images[i] for i in index], 8, torch.no_grad, list).layers[-1]
    else:
        model.eval()
        found = [model.forward_features(task.images[i][None].float()) for i in index]
        features = torch.cat([torch.cat([f.cls, f.patches.mean(1)], 1).float() for f in found])
    labels, groups = torch.as_tensor(task.labels(index)), task.groups(index)
    sums: dict[str, list[float]] = {"knn": [], "ridge": []}
    for repeat in range(REPEATS):
        fold = folds(groups, labels.numpy(), repeat)
        answers = {name: np.zeros((len(index), classes)) for name in sums}
        for part in range(FOLDS):
            train, held = (torch.as_tensor(np.flatnonzero(where)) for where in (fold != part, fold == part))
            known, asked = standard(features[train], features[held])
            answers["knn"][held] = near(known, labels[train], asked, classes)
            # Fewer cases than features: far more decay than for tokens.
            answers["ridge"][held] = ridge(known, labels[train], asked, classes, decay=1.0)
        for name, answer in answers.items():
            sums[name].append(point("auroc", answer, labels.numpy()))
    return {**{name: float(np.mean(values)) for name, values in sums.items()}, "rank": rank(features)}


def few_score(model: Any, task: Task, cases: int) -> float:
    """AUROC of the linear probe of `medformer evaluate` from so many labelled training cases, on the training cases of
    all other patients; mean of DRAWS draws. The validation cases choose its rate and layers, as there."""
    train, val, answers = task.where("train"), task.where("val"), []
    frozen = probes.extract(model, [task.images[i] for i in np.concatenate([train, val])], 8, torch.no_grad, list)
    groups, labels = task.groups(train), torch.as_tensor(task.labels(train))
    judges, truth = frozen.of(torch.arange(len(train), len(train) + len(val))), task.labels(val)

    def said(probe: probes.LinearProbe, asked: probes.Frozen) -> np.ndarray:
        return probes.probabilities(probe(asked), task.kind)

    for seed in range(DRAWS):
        known = np.flatnonzero(np.isin(train, fraction(task, min(1.0, cases / len(train)), seed)))
        others = np.flatnonzero(~np.isin(groups, groups[known]))
        probe = probes.linear_sweep(
            frozen.of(torch.as_tensor(known)), labels[known], len(task.names), PROBE_STEPS, seed,
            lambda probe: point("auroc", said(probe, judges), truth),
        )  # fmt: skip
        answers.append(point("auroc", said(probe, frozen.of(torch.as_tensor(others))), labels[others].numpy()))
    return float(np.mean(answers))


def scores(model: Any, task: Task, cases: int, size: tuple[int, ...], layer: int) -> dict[str, float]:
    """kNN and ridge Dice at tokens and the effective rank."""
    classes = len(task.names) + 1
    labelled = fraction(task, min(1.0, cases / len(task.where("train"))), 0)
    train, labels = tokens_of(model, task, labelled, size, layer)
    held, truth = tokens_of(model, task, task.where("val"), size, layer)
    train, held = standard(train, held)
    return {
        "knn": token_dice(near(train, labels, held, classes).argmax(1), truth, classes - 1),
        "ridge": token_dice(ridge(train, labels, held, classes).argmax(1), truth, classes - 1),
        "rank": rank(held),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="of one architecture")
    parser.add_argument("--task", type=Path, required=True, help=".csv of scans and masks or labels")
    parser.add_argument("--size", default="32,32,32", help="voxels (zyx) of a tile")
    parser.add_argument("--cases", type=int, default=12, help="labelled training cases")
    parser.add_argument("--few", type=int, help="of classes: the linear probe from so many labelled cases, too")
    parser.add_argument("--layer", type=int, default=-1, help="block whose tokens are read")
    parser.add_argument("--seeds", type=int, default=2, help="fresh weights to compare with")
    args = parser.parse_args()
    size = tuple(int(n) for n in args.size.split(","))
    loaded = [probes.load_model(path)[:2] for path in args.checkpoints]
    model = loaded[0][0]
    if other := [file for one, file in loaded if one.config != model.config]:
        parser.error(f"{other[0]}: another architecture than {args.checkpoints[0]}; probe it by itself")
    with open(args.task) as table:
        masks = "mask" in table.readline().strip().split(",")
    if masks and args.few:
        parser.error(f"--few {args.few} is of classes; --task {args.task} has masks, use --cases")
    dims = len(model.config.grid) if isinstance(model, medformer.ImageGPT) else model.config.dims
    task = read_task(args.task, dims, None if masks else size, 0, list)
    models: dict[str, Any] = {} if masks else {f"the scan in cells of {CELL} voxels": None}
    models |= {str(file if file.suffix == ".pt" else file.parent): one for one, file in loaded}
    for seed in range(args.seeds):
        torch.manual_seed(7_000_003 + seed)
        models[f"fresh {seed}"] = fresh = medformer.build(model.config)
        if isinstance(model, medformer.ImageGPT):
            fresh.codebook.load_state_dict(model.codebook.state_dict())  # the same tokens
    for name, one in models.items():
        found = scores(one, task, args.cases, size, args.layer) if masks else case_scores(one, task)
        if args.few and one is not None:
            found |= {f"linear from {args.few}": few_score(one, task, args.few)}
        print(f"{name[-30:]:30}", "  ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
