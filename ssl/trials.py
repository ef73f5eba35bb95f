"""One method on one setting and seed of a downstream evaluation at a time; what is done is kept and not done again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save as pack
from tqdm import tqdm

import medformer
import probes
import runs
import scores
import tasks
import tuning
from medformer.models import ImageGPT, Model

if TYPE_CHECKING:
    from evaluate import DownstreamConfig

__all__ = ["CLASSIFY", "SEGMENT", "Bench", "Setting", "bar"]

PROBES = ("knn", "linear")  # of frozen features
# untrained: the linear probe of fresh weights, which is what the architecture brings by itself.
CLASSIFY = (*PROBES, "attentive", "fpt", "finetune", "untrained", "scratch")
SEGMENT = ("linear", "decoder", "finetune", "untrained", "scratch")
# Far from the seeds of pretraining: scratch must not begin where the checkpoint began.
_FRESH = 7_000_003
# A learning rate is the one with the best mean score on validation over so many seeds: by one seed alone a rate that
# suits one draw of labels was taken for all (misc/LOG.md).
_RATE_SEEDS = 3


class Setting(NamedTuple):
    """How many labels a method gets."""

    key: str
    share: float
    shots: int

    def cases(self, task: tasks.Task, seed: int) -> np.ndarray:
        return tasks.few_shots(task, self.shots, seed) if self.shots else tasks.fraction(task, self.share, seed)


def bar(things: Any, what: str) -> Any:
    """Progress over `things`, where somebody watches."""
    items = things if hasattr(things, "__len__") else list(things)
    return tqdm(items, desc=what, leave=False, disable=not sys.stderr.isatty(), file=sys.stderr)


class Bench:
    """Runs one method on one setting and seed at a time; what is done lies in `cells/` and is not done again."""

    def __init__(
        self,
        task: tasks.Task,
        model: Model,
        config: DownstreamConfig,
        size: tuple[int, ...],
        device: torch.device,
        out: Path,
    ) -> None:
        self.task, self.config, self.size, self.device, self.out = task, config, size, device, out
        self.model = model.to(device).eval()
        self.metric = scores.metrics_of(task.kind)[0]
        self.dense = task.kind == "segmentation"
        self.truth = self._truth(task.where("test"))
        self.classes = len(task.names)
        self.budget = tuning.Budget(steps=config.steps or 1, batch=config.batch_size or 1)
        self.run: Callable[..., Any] = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )
        self._features: dict[int | None, probes.Frozen] = {}

    def _truth(self, index: np.ndarray) -> np.ndarray:
        # Of a segmentation the predictions already are each case's Dice.
        return np.zeros(len(index)) if self.dense else self.task.labels(index)

    def cell(self, setting: Setting, method: str, seed: int) -> dict[str, Any]:
        """Held-out predictions of one run, and what was chosen for it."""
        if method in (*PROBES, "untrained") and not self.dense:
            return self._once(f"{setting.key}-{method}-{seed}", lambda: self._probe(method, setting, seed))
        rates, seeds = self.config.lrs or [], range(min(_RATE_SEEDS, self.config.seeds or 1))

        def found(lr: float) -> float:
            return float(np.mean([self._trial(setting, method, lr, s)["validation"] for s in seeds]))

        lr = max(rates, key=found)
        edge = " (edge of those tried)" if len(rates) > 2 and lr in (min(rates), max(rates)) else ""
        return {**self._trial(setting, method, lr, seed), "chosen": f"lr {lr:g}{edge}"}

    def _once(self, name: str, result: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`result()`, or what it was when it was asked for before."""
        path = self.out / "cells" / f"{name}.npz"
        if not path.exists():
            values = result()
            runs.write_whole(path, lambda file: np.savez_compressed(file, **values))
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    def _trial(self, setting: Setting, method: str, lr: float, seed: int) -> dict[str, Any]:
        """A network trained at one rate: held-out predictions, and its score on the validation cases."""

        def result() -> dict[str, Any]:
            val, what = self.task.where("val"), f"{setting.key} {method} lr {lr:g} seed {seed}"
            network = self._trained(method, setting.cases(self.task, seed), lr, seed, what)
            score = scores.point(self.metric, self._predict(network, val), self._truth(val))
            return {"predictions": self._predict(network, self.task.where("test")), "validation": score}

        return self._once(f"{setting.key}-{method}-{lr:g}-{seed}", result)

    def _fresh(self, seed: int) -> Any:
        """The architecture with weights that know nothing; of an Image-GPT the codebook stays, for the same tokens."""
        torch.manual_seed(_FRESH + seed)
        fresh = medformer.build(self.model.config)
        if isinstance(self.model, ImageGPT):
            fresh.codebook.load_state_dict(self.model.codebook.state_dict())
        return fresh

    def _trained(self, method: str, index: np.ndarray, lr: float, seed: int, what: str) -> tuning.Network:
        backbone = self._fresh(seed)
        if method not in ("scratch", "untrained"):
            backbone.load_state_dict(self.model.state_dict())
        head = "linear" if method == "untrained" else method
        network = tuning.Network(backbone, head, self.classes, self.dense).to(self.device)
        images = [self.task.images[i] for i in index]
        targets = [self.task.targets[i] for i in index]
        progress = partial(bar, what=what)
        if self.dense:
            tuning.train_dense(network, images, targets, self.size, self.budget, lr, seed, self.run, progress)
        else:
            target = torch.stack(targets)
            tuning.train_classifier(network, images, target, self.classes, self.budget, lr, seed, self.run, progress)
        return network

    def _predict(self, network: tuning.Network, index: np.ndarray) -> np.ndarray:
        images = [self.task.images[i] for i in index]
        if not self.dense:
            return tuning.predict(network, images, self.task.kind, 2 * self.budget.batch, self.run)
        several = 2 * self.budget.batch
        guesses = [tuning.predict_dense(network, x, self.size, self.classes, several, self.run) for x in images]
        return tuning.dense_scores(guesses, [self.task.targets[i] for i in index], self.classes)

    def _probe(self, method: str, setting: Setting, seed: int) -> dict[str, Any]:
        index, val, test = setting.cases(self.task, seed), self.task.where("val"), self.task.where("test")
        whose = seed if method == "untrained" else None
        if whose not in self._features:
            model = self.model if whose is None else self._fresh(whose).to(self.device)
            progress = partial(bar, what="features")
            self._features[whose] = probes.extract(model, self.task.images, 2 * self.budget.batch, self.run, progress)
        frozen = self._features[whose]
        target = torch.stack([self.task.targets[i] for i in index])
        truth = self.task.labels(val)

        def part(where: Iterable[int]) -> probes.Frozen:
            return frozen.of(torch.as_tensor(np.asarray(where)))

        if method == "knn":
            ask = partial(probes.knn, part(index).layers[-1], target, classes=self.classes)
            asked = part(val).layers[-1]
            ks = sorted({min(k, len(index)) for k in probes.NEIGHBOURS})
            best = max(ks, key=lambda k: scores.point(self.metric, ask(asked, k=k), truth))
            return {"predictions": ask(part(test).layers[-1], k=best), "chosen": f"k {best}"}

        def better(probe: probes.LinearProbe) -> float:
            return scores.point(self.metric, probes.probabilities(probe(part(val)), self.task.kind), truth)

        probe = probes.linear_sweep(part(index), target, self.classes, self.config.probe_steps or 1, seed, better)
        if method == "linear" and seed == 0:
            self._keep(probe)
        chosen = f"last {probe.last}{' + mean' if probe.pool else ''}, lr {probe.lr:g}"
        return {"predictions": probes.probabilities(probe(part(test)), self.task.kind), "chosen": chosen}

    def _keep(self, probe: probes.LinearProbe) -> None:
        """probe.safetensors, for the page; settings run from few labels to many, so the last one stays."""
        about = {
            "task": self.task.name, "kind": self.task.kind, "names": list(self.task.names), "last": probe.last,
            "pool": probe.pool, "size": list(self.size), "width": self.model.config.width,
        }  # fmt: skip
        tensors = {"mean": probe.mean, "spread": probe.spread, "weight": probe.weight, "bias": probe.bias}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        data = pack(tensors, metadata={"medformer_probe": json.dumps(about)})
        runs.write_whole(self.out / "probe.safetensors", lambda file: file.write(data))
