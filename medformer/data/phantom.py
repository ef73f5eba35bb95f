"""A synthetic torso CT: something to train on and to test with where no real scan may be shipped.

Everything is drawn from a seed: no image of a person went into it. It is a sketch of anatomy for checking code,
not for learning anatomy.
"""

from __future__ import annotations

import itertools

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.volumes import Volume
from medformer.data.writing import write_dicom_series

__all__ = ["make_phantom", "write_dicom_series"]

_AIR, _LUNG, _FAT, _MUSCLE = -1000.0, -860.0, -105.0, 55.0


def make_phantom(
    seed: int,
    *,
    shape: tuple[int, int, int] = (64, 96, 96),
    spacing_mm: tuple[float, float, float] = (2.5, 1.5, 1.5),
) -> Volume:
    """A torso in int16 HU, fitted to the field of view, RAS+; the same seed gives the same voxels.

    Body with fat and muscle, lungs with vessels and airways, heart, aorta, spine, ribs, sternum, liver, spleen,
    kidneys, stomach and a table. Sizes, places, contrast agent and noise vary with the seed.
    """
    if len(shape) != 3 or min(shape) < 8:
        raise ScanError(f"make_phantom: shape={tuple(shape)} must be three sizes of at least 8")
    if len(spacing_mm) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing_mm):
        raise ScanError(f"make_phantom: spacing_mm={tuple(spacing_mm)} must be three positive lengths")
    rng = np.random.default_rng([seed, 20_240_117])
    hu = _Torso(rng, shape).draw()
    hu = _blur(hu)
    noise = _blur(rng.normal(0, 1, shape).astype(np.float32)) * rng.uniform(18, 40)
    hu = np.clip(np.round(hu + noise), -1024, 3071).astype(np.int16)
    affine = np.diag([spacing_mm[2], spacing_mm[1], spacing_mm[0], 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(shape[::-1], spacing_mm[::-1], strict=True)]
    return Volume(
        voxels=hu, affine=affine, modality="CT", units="HU", notes=("synthetic phantom",), source=f"phantom-{seed}"
    )


class _Torso:
    """Axes run from -1 to 1: u to the right, v to the front, w to the head."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
        self.rng = rng
        z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
        self.w, self.v, self.u = z[:, None, None], y[None, :, None], x[None, None, :]
        self.hu = np.full(shape, _AIR, dtype=np.float32)
        self.shape = shape
        self.jitter = lambda amount: 1 + rng.uniform(-amount, amount)
        self.contrast = rng.uniform(0, 1) * (rng.random() < 0.6)

    def draw(self) -> np.ndarray:
        rng, u, v, w = self.rng, self.u, self.v, self.w
        wide = rng.uniform(0.76, 0.9) * (1 + 0.05 * np.sin(2.2 * w + rng.uniform(-0.5, 0.5)))
        deep = rng.uniform(0.54, 0.66) * (1 + 0.04 * np.cos(2.0 * w + rng.uniform(-0.5, 0.5)))
        fat = rng.uniform(0.05, 0.14)
        self._table(deep)
        body = self._oval(u, v, wide, deep)
        self._fill(body <= 1, _FAT)
        skin = (body <= 1) & (body > 0.955)
        self._fill(skin, 10)
        inner_w, inner_d = wide - fat, deep - 0.8 * fat
        inner = self._oval(u, v, inner_w, inner_d)
        self._fill(inner <= 1, _MUSCLE + self._texture(25, 4))
        chest_w, chest_d = 0.87 * inner_w, 0.84 * inner_d
        chest = self._oval(u, v + 0.02, chest_w, chest_d)
        dome = self._diaphragm(chest_w)
        abdomen = (chest <= 1.0) & (w < dome) & (v > -0.62 * chest_d)
        self._fill(abdomen, _FAT + self._texture(20, 5))
        self._bowel(abdomen, chest_w, chest_d)
        self._organs(abdomen, chest_w, chest_d)
        self._lungs(chest, dome, chest_w, chest_d)
        self._heart(chest_d)
        self._bones(chest, inner, chest_w, chest_d)
        return self.hu

    def _fill(self, where: np.ndarray, value: np.ndarray | float) -> None:
        where = np.broadcast_to(where, self.shape)
        self.hu[where] = value[where] if isinstance(value, np.ndarray) else value

    @staticmethod
    def _oval(u: np.ndarray, v: np.ndarray, wide: np.ndarray, deep: np.ndarray) -> np.ndarray:
        return (np.abs(u / wide) ** 2.4 + np.abs(v / deep) ** 2.4) ** (1 / 2.4)

    def _ellipsoid(self, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        (cu, cv, cw), (ru, rv, rw) = centre, radii
        return ((self.u - cu) / ru) ** 2 + ((self.v - cv) / rv) ** 2 + ((self.w - cw) / rw) ** 2

    def _texture(self, amount: float, cells: int) -> np.ndarray:
        """A smooth random field: coarse noise, linearly interpolated."""
        field = self.rng.normal(0, amount, (cells + 1,) * 3).astype(np.float32)
        for axis, size in enumerate(self.shape):
            at = np.linspace(0, cells, size)
            low = np.minimum(at.astype(int), cells - 1)
            part = (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
            field = field.take(low, axis) * (1 - part) + field.take(low + 1, axis) * part
        return field

    def _table(self, deep: np.ndarray) -> None:
        back = -float(np.max(deep)) - 0.05
        surface = back + 0.16 * self.u**2
        under = surface - self.v
        flat = np.abs(self.u) < 0.8
        self._fill((under > 0) & (under < 0.09) & flat, -880)
        self._fill(((np.abs(under) < 0.014) | (np.abs(under - 0.09) < 0.014)) & flat, -250)

    def _diaphragm(self, chest_w: np.ndarray) -> np.ndarray:
        """Height of the two domes; the right one, over the liver, is the higher."""
        level = self.rng.uniform(-0.32, -0.16)
        rise_r, rise_l = self.rng.uniform(0.26, 0.36), self.rng.uniform(0.18, 0.28)
        side = self.u / chest_w
        right = rise_r * np.exp(-(((side - 0.45) / 0.38) ** 2) - ((self.v - 0.05) / 0.42) ** 2)
        left = rise_l * np.exp(-(((side + 0.45) / 0.38) ** 2) - ((self.v - 0.05) / 0.42) ** 2)
        return level - 0.18 + right + left + 0.1 * self.v

    def _bowel(self, abdomen: np.ndarray, chest_w: np.ndarray, chest_d: np.ndarray) -> None:
        wide, deep = float(np.mean(chest_w)), float(np.mean(chest_d))
        for _ in range(self.rng.integers(14, 24)):
            cu, cv = self.rng.uniform(-0.75, 0.75) * wide, self.rng.uniform(-0.1, 0.8) * deep
            cw, radius = self.rng.uniform(-1.1, -0.5), self.rng.uniform(0.05, 0.11)
            loop = self._ellipsoid((cu, cv, cw), (radius * self.jitter(0.4), radius, radius * 1.3 * self.jitter(0.5)))
            self._fill((loop <= 1) & abdomen, self.rng.uniform(20, 50))
            gas = self.rng.random() < 0.35
            self._fill((loop <= 0.62) & abdomen & (self.v > cv) & gas, -900)

    def _organs(self, abdomen: np.ndarray, chest_w: np.ndarray, chest_d: np.ndarray) -> None:
        rng, jitter = self.rng, self.jitter
        wide, deep = float(np.mean(chest_w)), float(np.mean(chest_d))
        agent = self.contrast
        for side in (-1, 1):
            centre = (side * 0.36 * wide * jitter(0.1), -0.42 * deep * jitter(0.08), -0.72 + rng.uniform(-0.06, 0.06))
            kidney = self._ellipsoid(centre, (0.12 * jitter(0.15), 0.12 * jitter(0.15), 0.25 * jitter(0.1)))
            self._fill((kidney <= 1) & (self.hu > -1500), 35 + 150 * agent)
            self._fill(kidney <= 0.18, -60 + 120 * agent)
        stomach = self._ellipsoid(
            (-0.42 * wide, 0.3 * deep * jitter(0.2), -0.42 + rng.uniform(-0.06, 0.06)),
            (0.26 * wide * jitter(0.2), 0.3 * deep * jitter(0.2), 0.24 * jitter(0.2)),
        )
        self._fill((stomach <= 1) & abdomen, 45)
        level = rng.uniform(0.3, 0.5) * deep
        self._fill((stomach <= 0.86) & abdomen, 15)
        self._fill((stomach <= 0.86) & abdomen & (self.v > level), -950)
        spleen = self._ellipsoid(
            (-0.68 * wide, -0.22 * deep, -0.42 + rng.uniform(-0.08, 0.08)),
            (0.2 * wide * jitter(0.2), 0.36 * deep * jitter(0.15), 0.24 * jitter(0.2)),
        )
        self._fill((spleen <= 1) & abdomen, 50 + 70 * agent + self._texture(6, 8))
        liver = self._ellipsoid(
            (0.44 * wide * jitter(0.06), 0.1 * deep, -0.42 + rng.uniform(-0.05, 0.05)),
            (0.66 * wide * jitter(0.08), 0.86 * deep * jitter(0.06), 0.46 * jitter(0.12)),
        )
        tilt = self.w > -0.95 + 0.5 * np.maximum(0, 0.35 - self.u / wide)
        inside = (liver <= 1) & abdomen & tilt
        self._fill(inside, 58 + 55 * agent + self._texture(7, 9))
        for _ in range(5):
            start = np.array([0.22 * wide, 0.0, -0.42])
            self._branch(start, self._direction((1, 0, 0.2), 1.2), 0.026, 4, inside, 62 + 110 * agent, 0.06)
        for _ in range(rng.integers(0, 3)):
            spot = rng.uniform(0.03, 0.07)
            centre = (rng.uniform(0.2, 0.7) * wide, rng.uniform(-0.3, 0.5) * deep, rng.uniform(-0.6, -0.3))
            self._fill((self._ellipsoid(centre, (spot, spot, spot)) <= 1) & inside, rng.uniform(5, 30))

    def _lungs(self, chest: np.ndarray, dome: np.ndarray, chest_w: np.ndarray, chest_d: np.ndarray) -> None:
        rng, u, v, w = self.rng, self.u, self.v, self.w
        top = rng.uniform(0.86, 1.02)
        shrink = np.sqrt(np.clip(1 - (np.clip((w - 0.25) / (top - 0.25), 0, 1)) ** 2.2, 0, 1))
        side = np.abs(u) / chest_w
        gap = 0.13 + 0.1 * np.exp(-(((v - 0.12) / 0.25) ** 2)) + 0.06 * np.clip(w - 0.4, 0, 1)
        spine = self._ellipsoid((0, -0.56 * float(np.mean(chest_d)) / 0.55, 0), (0.26, 0.24, 9))
        lung = (chest <= 0.93 * np.maximum(shrink, 1e-3)) & (w > dome) & (side > gap) & (spine > 1)
        denser = 60 * np.clip(-v / chest_d, -1, 1) + 0 * u + 0 * w
        self._fill(lung, (_LUNG + denser + self._texture(18, 10)).astype(np.float32))
        hilum_w = rng.uniform(0.1, 0.22)
        trunk = 40 + 200 * self.contrast
        for sign in (-1.0, 1.0):
            hilum = np.array([sign * 0.2 * float(np.mean(chest_w)) / 0.7, -0.02, hilum_w])
            for _ in range(9):
                aim = self._direction((sign, 0.0, 0.0), 0.9)
                self._branch(hilum, aim, 0.036, 7, lung, trunk, 0.075)
            for _ in range(rng.integers(0, 3)):
                centre = (sign * rng.uniform(0.35, 0.6), rng.uniform(-0.3, 0.3), rng.uniform(0.05, 0.6))
                size = rng.uniform(0.02, 0.05)
                self._fill((self._ellipsoid(centre, (size, size, size)) <= 1) & lung, rng.uniform(-50, 60))
        self._airways(hilum_w)

    def _airways(self, hilum_w: float) -> None:
        carina, throat = np.array([0.0, -0.08, hilum_w + 0.14]), np.array([0.0, 0.02, hilum_w + 1.14])
        everywhere = np.ones(self.shape, bool)
        self._tube([throat, carina], 0.062, everywhere, 40)
        self._tube([throat, carina], 0.048, everywhere, _AIR)
        for sign in (-1, 1):
            end = np.array([sign * 0.3, -0.1, hilum_w - 0.06])
            self._tube([carina, end], 0.042, everywhere, 20)
            self._tube([carina, end], 0.03, everywhere, _AIR)

    def _heart(self, chest_d: np.ndarray) -> None:
        rng, jitter = self.rng, self.jitter
        deep = float(np.mean(chest_d))
        blood = 42 + 230 * self.contrast
        centre = (-0.13 + rng.uniform(-0.04, 0.04), 0.2 * deep, -0.02 + rng.uniform(-0.06, 0.06))
        size = rng.uniform(0.9, 1.12)
        radii = (0.3 * size, 0.29 * size, 0.31 * size * jitter(0.08))
        heart = self._ellipsoid(centre, radii)
        self._fill((heart <= 1.12) & (self.hu < 40) & (self.w > centre[2] - 0.3), -90)
        self._fill(heart <= 1, 48 + self._texture(5, 8))
        for shift, scale in (((-0.1, 0.02, -0.03), 0.42), ((0.1, 0.07, -0.02), 0.42), ((0.03, -0.12, 0.12), 0.38)):
            place = tuple(c + s * size for c, s in zip(centre, shift, strict=True))
            chamber = self._ellipsoid(
                (place[0], place[1], place[2]), (radii[0] * scale, radii[1] * scale, radii[2] * scale)
            )
            self._fill(chamber <= 1, blood)
        everywhere = np.ones(self.shape, bool)
        arch = rng.uniform(0.42, 0.54)
        turn = np.linspace(0, np.pi, 9)
        ring = [np.array([0.05 - 0.13 * t / np.pi, -0.02 + 0.2 * np.cos(t), arch + 0.1 * np.sin(t)]) for t in turn]
        down = [np.array([-0.13, -0.26, h]) for h in (0.2, -0.3, -1.2)]
        self._tube([np.array([0.0, 0.12, 0.1]), *ring, *down], 0.07 * jitter(0.12), everywhere, blood)
        self._tube(
            [np.array([0.14, 0.1, 0.05]), np.array([0.15, 0.1, 1.2])], 0.045, everywhere, 40 + 300 * self.contrast
        )
        self._tube(
            [np.array([0.13, -0.12, 0.0]), np.array([0.13, -0.2, -1.2])], 0.06, everywhere, 42 + 90 * self.contrast
        )

    def _bones(self, chest: np.ndarray, inner: np.ndarray, chest_w: np.ndarray, chest_d: np.ndarray) -> None:
        rng, u, v, w = self.rng, self.u, self.v, self.w
        deep = float(np.mean(chest_d))
        angle = np.arctan2(v, u * 0.8)
        count = rng.uniform(5.2, 6.2)
        phase = w * count + 0.85 * count * 0.42 * (np.sin(angle) + 0.3 * np.abs(np.cos(angle)))
        ring = np.abs((phase % 1.0) - 0.5)
        shell = (chest > 0.955) & (chest < 1.05)
        front = (v > 0.72 * deep) & (np.abs(u) < 0.22)
        low = (w > -0.62 + 0.25 * (v / deep)) & ~front
        self._fill(shell & (ring < 0.21) & low, 420)
        self._fill((chest > 0.975) & (chest < 1.03) & (ring < 0.13) & low, 220)
        cartilage = shell & (ring < 0.2) & (v > 0.6 * deep) & (w > -0.4) & (w < 0.75)
        self._fill(cartilage, 150)
        sternum = (np.abs(u) < 0.09) & (np.abs(v - 0.02 - 0.99 * deep) < 0.045) & (w > -0.1) & (w < 0.8)
        self._fill(sternum & (inner < 1), 300)
        back = -0.66 * deep
        body = (u / 0.145) ** 2 + ((v - back) / 0.12) ** 2
        period = rng.uniform(4.2, 4.9)
        part = np.abs(((w * period + rng.uniform(0, 1)) % 1.0) - 0.5)
        disc = part > 0.41
        self._fill((body <= 1) & disc, 95)
        self._fill((body <= 1) & ~disc, 480)
        self._fill((body <= 0.74) & (part < 0.36), 210 + self._texture(25, 12))
        arch = (u / 0.11) ** 2 + ((v - back + 0.17) / 0.085) ** 2
        self._fill((arch <= 1) & (part < 0.44), 430)
        spinous = (np.abs(u) < 0.025) & (v < back - 0.2) & (v > back - 0.36) & (part < 0.3)
        transverse = (np.abs(v - back + 0.15 + 0.15 * np.abs(u)) < 0.03) & (np.abs(u) < 0.3) & (part < 0.2)
        self._fill((spinous | transverse) & (inner < 1), 360)
        self._fill((u / 0.06) ** 2 + ((v - back + 0.16) / 0.05) ** 2 <= 1, 30)
        for sign in (-1, 1):
            blade = np.abs(v + 0.93 * deep - 0.3 * (np.abs(u) - 0.45) - 0.02) < 0.02
            reach = (np.abs(u - sign * 0.45) < 0.19 * np.clip((w - 0.15) / 0.5, 0, 1)) & (chest > 1.06) & (inner < 0.99)
            self._fill(blade & reach, 380)

    def _direction(self, mean: tuple[float, float, float], spread: float) -> np.ndarray:
        aim = np.array(mean) + self.rng.normal(0, spread, 3)
        return aim / max(float(np.linalg.norm(aim)), 1e-6)

    def _branch(
        self,
        start: np.ndarray,
        aim: np.ndarray,
        radius: float,
        order: int,
        inside: np.ndarray,
        hu: float,
        length: float,
    ) -> None:
        """A vessel that forks in two until it is thinner than a voxel is long."""
        if order == 0 or radius < 0.35 / max(self.shape):
            return
        end = start + aim * length * self.rng.uniform(0.8, 1.4)
        if np.abs(end).max() > 1.05:
            return
        self._tube([start, end], radius, inside, hu)
        for _ in range(2 if self.rng.random() < 0.75 else 1):
            fork = aim + self.rng.normal(0, 0.42, 3)
            self._branch(end, fork / np.linalg.norm(fork), radius * 0.8, order - 1, inside, hu, length)

    def _tube(self, points: list[np.ndarray], radius: float, inside: np.ndarray, hu: float) -> None:
        """Capsules along a line of points (u, v, w); only the box around each is touched."""
        for a, b in itertools.pairwise(points):
            box = []
            for axis, grid in ((2, self.w), (1, self.v), (0, self.u)):
                line = grid.ravel()
                low = np.searchsorted(line, min(a[axis], b[axis]) - radius)
                high = np.searchsorted(line, max(a[axis], b[axis]) + radius)
                box.append(slice(int(low), max(int(high), int(low) + 1)))
            cut = tuple(box)
            w, v, u = self.w[cut[0]], self.v[:, cut[1]], self.u[:, :, cut[2]]
            d = b - a
            t = ((u - a[0]) * d[0] + (v - a[1]) * d[1] + (w - a[2]) * d[2]) / max(float(d @ d), 1e-9)
            t = np.clip(t, 0, 1)
            away = (u - a[0] - t * d[0]) ** 2 + (v - a[1] - t * d[1]) ** 2 + (w - a[2] - t * d[2]) ** 2
            block = self.hu[cut]
            block[(away <= radius**2) & inside[cut]] = hu


def _blur(volume: np.ndarray) -> np.ndarray:
    """[1 2 1] / 4 along each axis: partial volume, and noise with the grain of a reconstruction."""
    for axis in range(3):
        pad = np.pad(volume, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        size = volume.shape[axis]
        parts = [pad.take(range(i, i + size), axis) for i in range(3)]
        volume = (0.25 * parts[0] + 0.5 * parts[1] + 0.25 * parts[2]).astype(np.float32)
    return volume
