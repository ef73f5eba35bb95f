"""Does an attention still learn at length? Recall between far places of a volume, by kind of attention and tokens.

    python benchmarks/quality_at_length.py --out recall.jsonl [--sides 8,16] [--kinds softmax,performer] [--seeds 3]
    python benchmarks/quality_at_length.py --table recall.jsonl [--plot recall.svg]

A volume of side^3 tokens (patches of 4^3 voxels) is empty but for `--load` pairs, each painted as a texture of one
patch: half of it names a key, the other half a value. Four times as many queries show a key and ask; each is answered
at its own token, by one of 16 values, from a pair that lies at least `--distance` of the side away. The bed counts
where exact attention answers more than 95%.

All empty places are the same token, and this network has no positions. `--distinct` therefore shows one of them, which
attention counts as often as it is there: the same answers and gradients (tests/test_quality_at_length.py) at a cost
that does not grow with the side. Only for kinds that do not look at places; its seconds say nothing. There `--read`
hides keys, to see which of them are in the way, and `--swap` asks trained softmax networks once more, by FAVOR+.

The same network (width, depth, steps, examples) for every kind; the rate is the best of `--rates` on validation
volumes of the first seed. Accuracy is on fresh volumes, seed by seed. Every finished run is one line of `--out`,
and runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import medformer
from medformer import BackboneConfig
from medformer.attention import PerformerAttention
from medformer_kernels import orthogonal_features, performer_attention

PATCH, KEYS, VALUES = 4, 1024, 16
HALF = PATCH**3 // 2  # voxels that name a key
ASKED = 4  # queries of a volume for each pair
CHANCE = 1 / VALUES
PLACED = ("state_blocks", "nystrom", "disentangled", "hopfield")  # no `--distinct`: places, or more than one read

# What differs from softmax attention, by name. Blocks are half of the side, so that there are eight.
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"attention": "softmax"},
    "softmax alike": {"attention": "softmax", "alike_start": 2.5},
    "performer 64": {"num_features": 64},
    "performer": {"num_features": 128},
    "performer 256": {"num_features": 256},
    "performer qk_norm": {"num_features": 128, "qk_norm": True},
    "performer alike": {"num_features": 128, "alike_start": 2.5},
    "performer 256 alike": {"num_features": 256, "alike_start": 2.5},
    "performer gate": {"num_features": 128, "gate": True},
    "performer alike gate": {"num_features": 128, "alike_start": 2.5, "gate": True},
    "performer alike 1.5 gate": {"num_features": 128, "alike_start": 1.5, "gate": True},
    "performer 256 alike gate": {"num_features": 256, "alike_start": 2.5, "gate": True},
    "hyperbolic alike gate": {"num_features": 128, "alike_start": 2.5, "gate": True, "feature": "hyperbolic"},
    "relu alike gate": {"num_features": 128, "alike_start": 2.5, "gate": True, "feature": "relu"},
    "blocks": {"num_features": 128, "state_blocks": "half"},
    "blocks 64": {"num_features": 64, "state_blocks": "half"},
    "blocks qk_norm": {"num_features": 128, "qk_norm": True, "state_blocks": "half"},
    "nystrom 64": {"attention": "nystrom", "num_landmarks": 64},
    "nystrom 256": {"attention": "nystrom", "num_landmarks": 256},
    "disentangled": {"attention": "disentangled", "position": "none"},
    "hopfield": {"attention": "hopfield"},
    "hopfield alike": {"attention": "hopfield", "alike_start": 2.5},
    "none": {"attention": "none"},  # a token reads nothing but itself: what no attention could answer
}


class Variant(PerformerAttention):
    """FAVOR+ with other features than those of softmax, or with keys that each weigh exp(w x + b) of their token.

    The library has neither option: they gained nothing here.
    """

    feature: str
    gate: nn.Linear | None

    def _split(self, x: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._split(x, rotary)
        return (q, k, v) if self.gate is None else (q, torch.cat([k, self.gate(x).mT.unsqueeze(-1)], -1), v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, grid: Any = None) -> Tensor:
        if self.gate is None:
            return performer_attention(q, k, v, self.omega, feature=self.feature)
        weight = (k[..., -1:] - k[..., -1:].detach().amax(2, keepdim=True)).exp()
        weighed = torch.cat([weight * v, weight], -1)
        out = performer_attention(q, k[..., :-1], weighed, self.omega, feature=self.feature)
        return out[..., :-1] / out[..., -1:].masked_fill(out[..., -1:] == 0, 1)


class Nothing(nn.Module):
    """In place of attention."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return torch.zeros_like(x)


def network(kind: str, side: int, *, width: int, depth: int, heads: int) -> nn.Module:
    """A backbone of patches of one texture each, with a classifier of the values at every token."""
    change = dict(KINDS[kind])
    if change.get("state_blocks") == "half":
        change["state_blocks"] = side // 2
    feature, gate = change.pop("feature", "softmax"), change.pop("gate", False)
    without = change.get("attention") == "none"
    if without:
        change["attention"] = "softmax"
    config = BackboneConfig(
        width=width, depth=depth, heads=heads, mlp_ratio=2, patch_size=PATCH, patch_stride=PATCH, patch_padding=0,
        registers=0, class_token=False, **{"position": "none", **change},
    )  # fmt: skip
    backbone = medformer.Backbone(config)
    if without:
        for block in backbone.blocks:
            block.attention = Nothing()
    for module in backbone.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            # The deviation 0.02 of wide networks leaves one of 64 channels with nothing to learn from for long.
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for block in backbone.blocks:
        attention: Any = block.attention
        if gate or feature != "softmax":
            attention.__class__ = Variant
            attention.feature, attention.gate = feature, None
        if gate:
            attention.gate = zero = nn.Linear(width, heads)
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)
        if config.alike_start is not None:
            attention.start_alike(config.alike_start)
    return nn.ModuleDict({"backbone": backbone, "head": nn.Linear(width, VALUES)})


class Volumes:
    """Draws volumes, the places of their queries and the values that answer them; the textures are those of seed 0."""

    def __init__(self, side: int, load: int, distance: float, distinct: bool = False, read: str = "all") -> None:
        if (1 + ASKED) * load > side**3:
            raise ValueError(f"--load {load}: {load} pairs and {ASKED} queries of each need more than {side}^3 tokens")
        if load > KEYS:
            raise ValueError(f"--load {load} must be at most {KEYS}, the keys there are")
        self.side, self.load, self.distance, self.distinct = side, load, distance, distinct
        empty = side**3 - (1 + ASKED) * load
        self.counts = torch.tensor([empty] * (empty > 0) + [1] * ((1 + ASKED) * load))  # of what `distinct` shows
        if read != "all":
            self.counts[: int(empty > 0)] = 0
        if read == "pairs":
            self.counts[-ASKED * load :] = 0
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(KEYS + VALUES + 1, HALF, generator=generator)
        self.keys, self.values, self.ask = codes[:KEYS], codes[KEYS:-1], codes[-1]

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(volumes (B, 1, Z, Y, X), tokens of the queries (B, ASKED load), values (B, ASKED load)).

        With `distinct`, a row of patches: an empty one, the pairs, the queries.
        """
        tokens, load, asked = self.side**3, self.load, ASKED * self.load
        places = torch.rand(batch, tokens, generator=generator).argsort(1)
        pairs, queries = places[:, :load], places[:, load : load + asked]
        key = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :load]
        value = torch.randint(VALUES, (batch, load), generator=generator)
        rows, about = torch.arange(batch)[:, None], self._pairs_of(pairs, queries, generator)
        axes = [self.side] * 3
        if self.distinct:
            shown = len(self.counts)
            row = torch.arange(shown).expand(batch, -1)
            pairs, queries, axes = row[:, -load - asked : -asked], row[:, -asked:], [1, 1, shown]
        # Empty is 0: the first LayerNorm would make any noise as loud as what is painted.
        texture = torch.zeros(batch, math.prod(axes), 2 * HALF)
        texture[rows, pairs] = torch.cat([self.keys[key], self.values[value]], -1)
        ask = self.ask.expand(batch, asked, -1)
        texture[rows, queries] = torch.cat([self.keys[key.gather(1, about)], ask], -1)
        grid = texture.view(batch, *axes, PATCH, PATCH, PATCH)
        volume = grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, 1, *[n * PATCH for n in axes])
        return volume, queries, value.gather(1, about)

    def _pairs_of(self, pairs: Tensor, queries: Tensor, generator: torch.Generator) -> Tensor:
        """(B, queries): the pair that each asks for, drawn from those that lie far enough, or from all if none does."""
        axes = [
            torch.stack([x // self.side**2, x // self.side % self.side, x % self.side], -1) for x in (queries, pairs)
        ]
        apart = (axes[0][:, :, None] - axes[1][:, None]).abs().amax(-1)
        far = apart >= self.distance * self.side
        weight = torch.where(far.any(-1, keepdim=True), far, True).double()
        drawn = torch.multinomial(weight.flatten(0, 1), 1, generator=generator)
        return drawn.view(*queries.shape)


def count_keys(model: nn.Module, counts: Tensor, reads: list[Any] | None = None) -> None:
    """Let every attention read token i as if it were there counts[i] times.

    Its weights A are positive and sum to 1, so that those of the longer row are A counts, made to sum to 1 again.
    `reads`: by block, what attention computes; None: what its class does, and not what an earlier call made of it.
    """
    for at, block in enumerate(model["backbone"].blocks):  # type: ignore[index,arg-type]
        if isinstance(block.attention, Nothing):
            continue
        read = type(block.attention)._attend.__get__(block.attention) if reads is None else reads[at]

        def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any, inner: Any = read) -> Tensor:
            times = counts[:, None].to(v.dtype).expand(*v.shape[:-1], 1)
            out = inner(q, k, torch.cat([times * v, times], -1), *rest)
            total = out[..., -1:]
            return out[..., :-1] / total.masked_fill(total == 0, 1)  # a query whose ReLU features are 0 reads nothing

        block.attention._attend = attend


def answered(model: nn.Module, volume: Tensor, queries: Tensor) -> Tensor:
    """Logits (B, queries, values) at the tokens of the queries."""
    patches = model["backbone"].forward_features(volume).patches  # type: ignore[index,operator]
    return model["head"](patches.gather(1, queries[..., None].expand(-1, -1, patches.shape[-1])))  # type: ignore[index,operator]


@torch.no_grad()
def accuracy(model: nn.Module, volumes: Volumes, count: int, batch: int, seed: int) -> float:
    generator, right = torch.Generator().manual_seed(seed), []
    model.eval()
    for _ in range(max(1, count // (batch * ASKED * volumes.load))):
        volume, queries, value = volumes.draw(batch, generator)
        right.append((answered(model, volume, queries).argmax(-1) == value).double().mean().item())
    model.train()
    return mean(right)


def train(kind: str, side: int, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One network, from its seed to its accuracy on validation and on test volumes."""
    torch.manual_seed(seed)
    model = network(kind, side, width=args.width, depth=args.depth, heads=args.heads)
    volumes = Volumes(side, args.load, args.distance, args.distinct, args.read)
    if args.distinct:
        count_keys(model, volumes.counts)
    generator = torch.Generator().manual_seed(1_000 + seed)
    batch = max(1, args.step_tokens // (len(volumes.counts) if args.distinct else side**3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    began, seconds, losses, right = time.perf_counter(), [], [], []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        volume, queries, value = volumes.draw(batch, generator)
        at = time.perf_counter()
        logits = answered(model, volume, queries)
        loss = F.cross_entropy(logits.flatten(0, 1), value.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - at)
        losses.append(loss.item())
        right.append((logits.argmax(-1) == value).double().mean().item())
        if args.verbose and (step + 1) % 100 == 0:
            print(f"  step {step + 1}: loss {mean(losses[-50:]):.3f}, right {mean(right[-50:]):.3f}", flush=True)
    return {
        "kind": kind, "side": side, "tokens": side**3, "rate": rate, "seed": seed, "load": args.load,
        "distance": args.distance, "steps": args.steps, "step_tokens": args.step_tokens, "distinct": args.distinct,
        "batch": batch, "width": args.width, "depth": args.depth,
        "heads": args.heads, "validation": accuracy(model, volumes, args.queries, batch, 7), "test": accuracy(
            model, volumes, args.queries, batch, 8), "loss": mean(losses[-50:]),
        "step_seconds": sorted(seconds)[len(seconds) // 2], "minutes": (time.perf_counter() - began) / 60,
        "read": args.read, "elsewhere": elsewhere(model, side, batch, args),
        "swapped": swapped(model, volumes, batch, args) if kind.startswith("softmax") else {},
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip


def elsewhere(model: nn.Module, trained: int, batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Accuracy on volumes of sides that the network has not seen, by tokens; with `--distinct`."""
    found = {}
    for side in (8, 16, 32) if args.distinct and args.read == "all" else ():
        if side != trained and side**3 >= (1 + ASKED) * args.load:
            volumes = Volumes(side, args.load, args.distance, True)
            count_keys(model, volumes.counts)
            found[str(side**3)] = accuracy(model, volumes, args.queries, batch, 8)
    return found


@torch.no_grad()
def swapped(model: nn.Module, volumes: Volumes, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """What a trained softmax network needs of FAVOR+: |q'|^2, |k'|^2 of the key most read and |q' + k'|^2, means over
    queries and heads of the first block (a feature's relative variance is about the exponential of the last), and
    accuracy by number of features in place of exact attention."""
    if not args.swap:
        return {}
    attentions, seen = [block.attention for block in model["backbone"].blocks], {}  # type: ignore[index]

    def look(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        asking = q[:, :, -ASKED * volumes.load :]
        read = (asking @ k.mT).argmax(-1, keepdim=True).expand(*asking.shape)
        read = k.gather(2, read)
        norms = [x.square().sum(-1).mean().item() * x.shape[-1] ** -0.5 for x in (asking, read, asking + read)]
        seen.update(zip(("query", "key", "sum"), norms, strict=True))
        return type(attentions[0])._attend(attentions[0], q, k, v, *rest)

    attentions[0]._attend = look
    answered(model, *volumes.draw(batch, torch.Generator().manual_seed(8))[:2])
    for features in args.swap:
        for seed, attention in enumerate(attentions):
            omega = orthogonal_features(features, attention.head_width, heads=attention.heads, seed=seed)

            def estimate(q: Tensor, k: Tensor, v: Tensor, *_: Any, omega: Tensor = omega) -> Tensor:
                return performer_attention(q, k, v, omega)

            attention._attend = estimate
        # `count_keys` finds the method of a class: wrap what was put in its place.
        count_keys(model, volumes.counts, [attention._attend for attention in attentions])
        seen[str(features)] = accuracy(model, volumes, args.queries, batch, 8)
    return seen


BED = ("load", "distance", "steps", "step_tokens", "width", "depth", "heads", "distinct", "read")
SETTING = (*BED, "kind", "side", "rate", "seed")


def read(path: Path) -> list[dict[str, Any]]:
    """Finished runs; those of before `--distinct` had all tokens."""
    return [{"distinct": False, "read": "all", **json.loads(line)} for line in path.read_text().splitlines()]


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    done = read(out) if out.exists() else []

    def one(kind: str, side: int, rate: float, seed: int) -> dict[str, Any]:
        wanted = {**vars(args), "kind": kind, "side": side, "rate": rate, "seed": seed}
        for row in done:
            if all(row[name] == wanted[name] for name in SETTING):
                return row
        row = train(kind, side, rate, seed, args)
        done.append(row)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{kind:18} {side**3:6} tokens, rate {rate:g}, seed {seed}: {row['test']:.3f} "
              f"({row['step_seconds']:.2f} s a step, {row['minutes']:.1f} min)", flush=True)  # fmt: skip
        return row

    for side in args.sides:
        for kind in args.kinds:
            tried = [one(kind, side, rate, 0) for rate in args.rates]
            best = max(tried, key=lambda row: row["validation"])["rate"]
            for seed in range(1, args.seeds):
                one(kind, side, best, seed)


def chosen(rows: list[dict[str, Any]]) -> dict[tuple[tuple, int, str], list[dict[str, Any]]]:
    """Runs at the rate that was best on validation volumes of seed 0, by (bed, tokens, kind)."""
    groups: dict[tuple[tuple, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((tuple(row[name] for name in BED), row["tokens"], row["kind"]), []).append(row)
    found = {}
    for key in sorted(groups, key=lambda key: (*key[:2], list(KINDS).index(key[2]))):
        best = max((row for row in groups[key] if row["seed"] == 0), key=lambda row: row["validation"])["rate"]
        found[key] = [row for row in groups[key] if row["rate"] == best]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    names = ("attention", "tokens", "load", "layers", "steps", "keys", "accuracy, mean (min to max of seeds)",
             "at other tokens", "seconds a step", "rate")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (_, tokens, kind), group in chosen(rows).items():
        first = group[0]
        seconds = "" if first["distinct"] else f"{mean(row['step_seconds'] for row in group):.2f}"
        size = f"{tokens:,} | {first['load']} | {first['depth']} | {first['steps']:,} | {first['read']}"
        scores = by_tokens(group)
        away = ", ".join(f"{n:,}: {spread(found)}" for n, found in scores.items() if n != tokens)
        lines.append(f"| {kind} | {size} | {spread(scores[tokens])} | {away} | {seconds} | {first['rate']:g} |")
    return "\n".join(lines)


def by_tokens(group: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Accuracy seed by seed, by the tokens of the test volumes."""
    found = {group[0]["tokens"]: [row["test"] for row in group]}
    for row in group:
        for tokens, score in row.get("elsewhere", {}).items():
            found.setdefault(int(tokens), []).append(score)
    return dict(sorted(found.items()))


def spread(scores: list[float]) -> str:
    ends = f" ({min(scores):.3f} to {max(scores):.3f} of {len(scores)})" if len(scores) > 1 else ""
    return f"{mean(scores):.3f}{ends}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Curves of the bed with the most runs that show all keys, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    found = {key: group for key, group in chosen(rows).items() if group[0]["read"] == "all"}
    sizes: dict[tuple, int] = {}
    for (bed, _, _), group in found.items():
        sizes[bed] = sizes.get(bed, 0) + len(group)
    most = max(sizes, key=lambda bed: sizes[bed])
    shown = [(kind, group) for (bed, _, kind), group in found.items() if bed == most]
    for at, (kind, group) in enumerate(shown):
        colour, apart = f"C{at}", 1.06 ** (at - len(shown) / 2)  # so that no seed hides another
        for seed, row in enumerate(group):
            curve = {tokens: scores[0] for tokens, scores in by_tokens([row]).items()}
            label = f"{kind} ({len(group)} seed{'s' * (len(group) > 1)})" if seed == 0 else None
            axes.plot([n * apart for n in curve], [*curve.values()], marker="o", color=colour, alpha=0.7, label=label)
    axes.axhline(CHANCE, color="grey", linestyle=":", linewidth=1)
    trained = ", ".join(f"{tokens:,}" for tokens in sorted({t for bed, t, _ in found if bed == most}))
    axes.set(xscale="log", xlabel=f"tokens asked about (trained with {trained})", ylabel="queries answered",
             ylim=(0, 1.02))  # fmt: skip
    ticks = sorted({tokens for (bed, _, _), group in found.items() if bed == most for tokens in by_tokens(group)})
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines, one a run")
    parser.add_argument("--table", help="print the table of a file that --out wrote, and end")
    parser.add_argument("--plot", help="with --table: write the curve as well")
    parser.add_argument(
        "--sides", type=lambda s: [int(x) for x in s.split(",")], default=[8, 16], help="tokens by axis"
    )
    parser.add_argument("--kinds", type=lambda s: s.split(","), default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--rates", type=lambda s: [float(x) for x in s.split(",")], default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--load", type=int, default=32, help="pairs of a volume, and queries")
    parser.add_argument(
        "--distance",
        type=float,
        default=0.0,
        help="least share of the side between query and pair, where a pair lies so far",
    )
    parser.add_argument("--step_tokens", type=int, default=8192, help="tokens of a step: volumes times those of one")
    parser.add_argument("--distinct", action="store_true", help="show one empty token, counted as often as it is there")
    parser.add_argument("--read", choices=("all", "painted", "pairs"), default="all", help="keys left to attention")
    parser.add_argument(
        "--swap", type=lambda s: [int(x) for x in s.split(",")], default=[], help="features, for kinds of softmax"
    )
    parser.add_argument("--queries", type=int, default=2048, help="queries of a measured accuracy")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="the loss every 100 steps")
    args = parser.parse_args()
    unknown = [kind for kind in args.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"--kinds {','.join(unknown)}: not one of {', '.join(KINDS)}")
    placed = [kind for kind in args.kinds if set(PLACED) & {*KINDS[kind], KINDS[kind].get("attention")}]
    if args.distinct and args.out and placed:
        parser.error(f"--distinct: {', '.join(placed)} look at places or read more than once; name others with --kinds")
    if (args.read != "all" or args.swap) and not args.distinct:
        parser.error("--read and --swap need --distinct")
    if args.table:
        rows = read(Path(args.table))
        print(table(rows))
        if args.plot:
            plot(rows, Path(args.plot))
    elif args.out:
        run(args)
    else:
        parser.error("--out FILE runs; --table FILE shows what was run")


if __name__ == "__main__":
    main()
