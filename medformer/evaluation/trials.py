"""One method on one setting and seed of a downstream evaluation at a time; what is done is kept and not done again."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save as pack
from tqdm import tqdm

import medformer
from medformer.evaluation import dense, probes, scores, tasks, tuning
from medformer.evaluation.config import DownstreamConfig
from medformer.evaluation.fitting import Budget
from medformer.files import write_whole
from medformer.models import ImageGPT, Model

__all__ = ["CLASSIFY", "PROBES", "REGRESS", "SEGMENT", "Bench", "Setting", "bar"]

PROBES = ("knn", "linear")  # of frozen features
# untrained: the linear probe of fresh weights, which is what the architecture brings by itself. unet, resnet: peers.
CLASSIFY = (*PROBES, "attentive", "fpt", "finetune", "untrained", "scratch", "resnet")
# A regression has no linear probe: its sweep is one of classes.
REGRESS = ("knn", "attentive", "fpt", "finetune", "scratch", "resnet")
SEGMENT = ("linear", "decoder", "finetune", "untrained", "scratch", "unet")
# Far from the seeds of pretraining: scratch must not begin where the checkpoint began.
_FRESH = 7_000_003
# A learning rate is the one with the best mean score on validation over so many seeds: by one seed alone a rate that
# suits one draw of labels was taken for all (misc/LOG.md).
_RATE_SEEDS = 3
_BEHIND = 0.02  # Dice


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
        self.number = task.range if task.kind == "regression" else None
        self.budget = Budget(steps=config.steps or 1, batch=config.batch_size or 1)
        self.run: Callable[..., Any] = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )
        self._features: dict[int | None, probes.Frozen] = {}
        self._held: dict[str, Any] = {}  # trained networks that may yet be chosen, by the name of their cell
        self._swept: dict[str, float] = {}

    def _truth(self, index: np.ndarray) -> np.ndarray:
        # Of a segmentation the predictions already are each case's Dice.
        return np.zeros(len(index)) if self.dense else self.task.labels(index)

    def cell(self, setting: Setting, method: str, seed: int) -> dict[str, Any]:
        """Held-out predictions of one run, and what was chosen for it."""
        if method in (*PROBES, "untrained") and not self.dense:
            return self._once(f"{setting.key}-{method}-{seed}", lambda: self._probe(method, setting, seed))
        rates = self.config.lrs or []
        lr = self._rate(setting, method)
        edge = " (edge of those tried)" if len(rates) > 2 and lr in (min(rates), max(rates)) else ""
        return {**self._trial(setting, method, lr, seed), "chosen": f"lr {lr:g}{edge}"}

    def _once(self, name: str, result: Callable[[], dict[str, Any]], needs: str = "predictions") -> dict[str, Any]:
        """`result()`, or what it was when it was asked for before; a file without `needs` is written again."""
        path = self.out / "cells" / f"{name}.npz"
        found = self._read(path)
        if needs not in found:
            found |= result()
            write_whole(path, lambda file: np.savez_compressed(file, **found))
            found = self._read(path)
        return found

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    def _rate(self, setting: Setting, method: str) -> float:
        """The rate with the best mean score on the validation cases over the first seeds.

        Rates go from the middle outwards. Of masks, one whose first seed is _BEHIND the leader's gets no more: Dice on
        the same cases differs little between seeds, AUROC of few cases differs much. Held-out cases are predicted for
        the chosen rate only; networks of the leader wait for that.
        """
        rates, seeds = self.config.lrs or [], range(min(_RATE_SEEDS, self.config.seeds or 1))
        if len(rates) == 1:
            return rates[0]
        middle = (len(rates) - 1) / 2
        firsts, means = {}, {}
        for lr in sorted(rates, key=lambda rate: abs(rates.index(rate) - middle)):
            firsts[lr] = self._validated(setting, method, lr, 0)
            if self.dense and firsts[lr] < max(firsts.values()) - _BEHIND:
                continue
            means[lr] = float(np.mean([self._validated(setting, method, lr, s) for s in seeds]))
            leader = max(means, key=lambda rate: means[rate])
            over = tuple(self._stem(setting, method, rate) for rate in firsts if rate != leader)
            self._held = {name: network for name, network in self._held.items() if not name.startswith(over)}
        return max((rate for rate in rates if rate in means), key=lambda rate: means[rate])

    @staticmethod
    def _stem(setting: Setting, method: str, lr: float) -> str:
        return f"{setting.key}-{method}-{lr:g}-"

    def _validated(self, setting: Setting, method: str, lr: float, seed: int) -> float:
        """The validation score of one rate and seed; the network is held until the rate is chosen."""
        name, val = f"{self._stem(setting, method, lr)}{seed}", self.task.where("val")

        def result() -> dict[str, Any]:
            if self.dense and method in ("linear", "untrained"):
                if name not in self._swept:
                    self._sweep(setting, method, seed)
                return {"validation": self._swept.pop(name)}
            self._held[name] = self._trained(method, setting.cases(self.task, seed), lr, seed, f"{setting.key} {name}")
            return {"validation": scores.point(self.metric, self._predict(self._held[name], val), self._truth(val))}

        return float(self._once(name, result, "validation")["validation"])

    def _trial(self, setting: Setting, method: str, lr: float, seed: int) -> dict[str, Any]:
        """Held-out predictions of a network trained at one rate."""
        name = f"{self._stem(setting, method, lr)}{seed}"

        def result() -> dict[str, Any]:
            network = self._held.pop(name, None)
            if network is None:
                network = self._trained(method, setting.cases(self.task, seed), lr, seed, f"{setting.key} {name}")
            return {"predictions": self._predict(network, self.task.where("test"))}

        return self._once(name, result)

    def _sweep(self, setting: Setting, method: str, seed: int) -> None:
        """The linear probe of masks at every rate at once: what is dear is the frozen backbone, which they share."""
        first = self._network(method, seed).to(self.device)
        networks = [first, *(copy.deepcopy(first) for _ in (self.config.lrs or [])[1:])]
        for network in networks:
            network.backbone = first.backbone
        index, rates = setting.cases(self.task, seed), self.config.lrs or []
        images, masks = ([source[i] for i in index] for source in (self.task.images, self.task.targets))
        progress = partial(bar, what=f"{setting.key} {method} seed {seed}")
        dense.train_dense_together(
            networks, images, masks, self.size, self.budget, rates, seed, self.run, progress, first.layers
        )
        val, several = self.task.where("val"), 2 * self.budget.batch
        every, channels = tuning.Together(networks), self.classes + 1
        guesses: list[list[np.ndarray]] = [[] for _ in rates]
        for i in val:
            image = self.task.images[i]
            logits = dense.blended_logits(every, image, self.size, several, self.run)
            for guess, part in zip(guesses, logits.split(channels), strict=True):
                guess.append(dense.label_map(part, image))
        for lr, network, guess in zip(rates, networks, guesses, strict=True):
            name = f"{self._stem(setting, method, lr)}{seed}"
            found = dense.dense_scores(guess, [self.task.targets[i] for i in val], self.classes)
            self._held[name], self._swept[name] = network, scores.point(self.metric, found, self._truth(val))

    def _fresh(self, seed: int) -> Any:
        """The architecture with weights that know nothing; of an Image-GPT the codebook stays, for the same tokens."""
        torch.manual_seed(_FRESH + seed)
        fresh = medformer.build(self.model.config)
        if isinstance(self.model, ImageGPT):
            fresh.codebook.load_state_dict(self.model.codebook.state_dict())
        return fresh

    def _network(self, method: str, seed: int) -> Any:
        """What a method starts from."""
        if method in tuning.PEERS:
            torch.manual_seed(_FRESH + seed)
            return tuning.peer(method, self.task.dims, self.classes, self.task.channels, self.number)
        backbone = self._fresh(seed)
        if method not in ("scratch", "untrained"):
            backbone.load_state_dict(self.model.state_dict())
        head = "linear" if method == "untrained" else method
        return tuning.Network(backbone, head, self.classes, self.dense, number=self.number, flags=self.task.flags)

    def _trained(self, method: str, index: np.ndarray, lr: float, seed: int, what: str) -> Any:
        network = self._network(method, seed).to(self.device)
        images = [self.task.images[i] for i in index]
        targets = [self.task.targets[i] for i in index]
        progress = partial(bar, what=what)
        if self.dense:
            dense.train_dense(network, images, targets, self.size, self.budget, lr, seed, self.run, progress)
        else:
            target = torch.stack(targets)
            tuning.train_classifier(network, images, target, self.classes, self.budget, lr, seed, self.run, progress)
        return network

    def _predict(self, network: Any, index: np.ndarray) -> np.ndarray:
        images = [self.task.images[i] for i in index]
        if not self.dense:
            return tuning.predict(network, images, self.task.kind, 2 * self.budget.batch, self.run)
        several = 2 * self.budget.batch
        guesses = [dense.predict_dense(network, x, self.size, self.classes, several, self.run) for x in images]
        return dense.dense_scores(guesses, [self.task.targets[i] for i in index], self.classes)

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
            self._keep(probe, probes.probabilities(probe(part(test)), self.task.kind))
        chosen = f"last {probe.last}{' + mean' if probe.pool else ''}, lr {probe.lr:g}"
        return {"predictions": probes.probabilities(probe(part(test)), self.task.kind), "chosen": chosen}

    def _keep(self, probe: probes.LinearProbe, said: np.ndarray) -> None:
        """probe.safetensors, for the page; settings run from few labels to many, so the last one stays."""
        about = {
            "task": self.task.name, "kind": self.task.kind, "names": list(self.task.names), "last": probe.last,
            "pool": probe.pool, "size": list(self.size), "width": self.model.config.width, "cases": len(said),
            "scores": {
                metric: scores.estimate(
                    metric, said[None], self.truth, self.task.groups(self.task.where("test")), self.config.resamples
                ).as_dict()
                for metric in scores.metrics_of(self.task.kind)
            },
        }  # fmt: skip
        tensors = {"mean": probe.mean, "spread": probe.spread, "weight": probe.weight, "bias": probe.bias}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        data = pack(tensors, metadata={"medformer_probe": json.dumps(about)})
        write_whole(self.out / "probe.safetensors", lambda file: file.write(data))
