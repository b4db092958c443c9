"""What to test against: AdaLoRA's arithmetic in NumPy and float64, from the documentation of the C interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adalora import BFloat16, Triplets

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def values(array: Any) -> np.ndarray:
    """The elements of an array of any type, in float64."""
    return (array.to_float32() if isinstance(array, BFloat16) else array).astype(np.float64)


def philox(counter: Sequence[Any], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x32-10 on arrays of counters."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, np.uint64) for word in counter]
    k = list(key)
    for _ in range(10):
        first, second = c[0] * np.uint64(PHILOX_MULTIPLIERS[0]), c[2] * np.uint64(PHILOX_MULTIPLIERS[1])
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            second & low,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            first & low,
        ]
        k = [(word + increment) & 0xFFFFFFFF for word, increment in zip(k, PHILOX_INCREMENTS, strict=True)]
    return c


def dropout_multiplier(
    shape: tuple[int, int], p: float, seed: int, offset: int, *, token0: int = 0, in_begin: int = 0
) -> np.ndarray:
    """What dropout multiplies each element of x by: 0 or `1 / (1 - p)`."""
    if p == 0:
        return np.ones(shape)
    tokens, columns = np.meshgrid(token0 + np.arange(shape[0]), in_begin + np.arange(shape[1]), indexing="ij")
    words = philox((columns // 4, tokens, offset & 0xFFFFFFFF, offset >> 32), (seed & 0xFFFFFFFF, seed >> 32))
    word = np.choose(columns % 4, [np.broadcast_to(w, shape) for w in words])
    return np.where(word < np.uint64(round(p * 2**32)), 0.0, 1 / (1 - p))


def forward(x: np.ndarray, params: Triplets, scaling: float) -> np.ndarray:
    """What the adapter adds to y."""
    A, E, B = map(values, params)
    return scaling * ((x @ A.T) * E.reshape(-1)) @ B.T


def backward(x: np.ndarray, dy: np.ndarray, params: Triplets, scaling: float) -> tuple[Triplets, np.ndarray]:
    """Gradients of A, E and B, and the adapter's part of dx, all before dropout."""
    A, E, B = map(values, params)
    E = E.reshape(-1)
    g, h = scaling * dy @ B, x @ A.T
    return Triplets(E[:, None] * (g.T @ x), (g * h).sum(axis=0), scaling * dy.T @ (h * E)), (g * E) @ A


def orthogonality(params: Sequence[Triplets], weight: float) -> tuple[float, list[Triplets]]:
    """The penalty, and its gradients for A and B (that for E is zero)."""
    n, total, gradients = 2 * len(params), 0.0, []
    for triplets in params:
        A, E, B = map(values, triplets)
        sides = []
        for rows in (A, B.T):
            excess = rows @ rows.T - np.eye(len(rows))
            norm = np.linalg.norm(excess)
            total += norm
            sides.append(2 * excess @ rows / norm if norm > 0 else np.zeros_like(rows))
        gradients.append(Triplets(weight / n * sides[0], np.zeros_like(E), weight / n * sides[1].T))
    return weight / n * total, gradients


@dataclass
class Element:
    """What belongs to one A, E or B during training."""

    p: np.ndarray
    m: np.ndarray
    v: np.ndarray
    ipt: np.ndarray
    unc: np.ndarray

    @classmethod
    def fresh(cls, p: np.ndarray) -> Element:
        """Moments and averages of zero."""
        return cls(p, *(np.zeros(p.shape) for _ in range(4)))


class Trainer:
    """AdamW, importance, schedule and selection of one run."""

    def __init__(self, params: Sequence[Triplets], schedule: dict[str, Any], hyper: dict[str, Any]) -> None:
        self.schedule, self.hyper = schedule, hyper
        self.end = schedule["total_step"] - schedule["tfinal"]
        self.layers = [
            {
                name: Element(values(array), *(np.zeros(array.shape) for _ in range(4)))
                for name, array in q._asdict().items()
            }
            for q in params
        ]
        self.clocks = [0] * len(params)
        self.ranks = [len(q.E) for q in params]
        costs = [q.A.shape[1] + q.B.shape[0] + 1 for q in params]
        if schedule.get("budget_unit", "triplets") == "triplets":
            costs = [1] * len(params)
        self.cost = np.repeat(costs, self.ranks)
        self.initial, self.target = int(self.cost.sum()), schedule["target_r"] * sum(costs)
        self.kept: np.ndarray | None = None
        self.final = False

    def budget(self, step: int) -> tuple[int, bool]:
        """Budget of a step, and whether a mask falls on it."""
        s = self.schedule
        if step <= s["tinit"]:
            return self.initial, False
        if step > self.end:
            return self.target, True
        left = 1 - (step - s["tinit"]) / (self.end - s["tinit"])
        return int((self.initial - self.target) * left**3 + self.target), step % s["deltaT"] == 0

    def update(self, step: int, grads: Sequence[Triplets], factor: float = 1.0, has_grad: Sequence[bool] = ()) -> None:
        """AdamW and importance."""
        h, s = self.hyper, self.schedule
        for k, layer in enumerate(self.layers):
            live = not has_grad or has_grad[k]
            self.clocks[k] += live
            for name, e in layer.items():
                g = values(getattr(grads[k], name)) * factor
                if live:
                    e.p *= 1 - h["lr"] * h["weight_decay"]
                    e.m[...] = h["betas"][0] * e.m + (1 - h["betas"][0]) * g
                    e.v[...] = h["betas"][1] * e.v + (1 - h["betas"][1]) * g * g
                    correction = np.sqrt(1 - h["betas"][1] ** self.clocks[k])
                    e.p -= (
                        h["lr"] / (1 - h["betas"][0] ** self.clocks[k]) * e.m / (np.sqrt(e.v) / correction + h["eps"])
                    )
                if step < self.end and not self.final:
                    sensitivity = np.abs(e.p * g) * live
                    e.ipt[...] = s["beta1"] * e.ipt + (1 - s["beta1"]) * sensitivity
                    e.unc[...] = s["beta2"] * e.unc + (1 - s["beta2"]) * np.abs(sensitivity - e.ipt)

    def scores(self) -> np.ndarray:
        """Importance of all triplets."""
        of = [{name: e.ipt * e.unc for name, e in layer.items()} for layer in self.layers]
        return np.concatenate([s["E"] + s["A"].mean(axis=1) + s["B"].mean(axis=0) for s in of])

    def select(self, step: int) -> None:
        """What the schedule says for the step."""
        budget, masks = self.budget(step)
        if not self.final and (masks or step >= self.end):
            scores = self.scores()
            order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
            self.kept = np.zeros(len(self.cost), bool)
            for i in order:
                if budget < self.cost[i]:
                    break
                budget -= self.cost[i]
                self.kept[i] = True
        if not self.final and step >= self.end:
            self.final = True
            for layer in self.layers:
                for e in layer.values():
                    e.ipt[...] = e.unc[...] = 0
        if self.kept is not None and (masks or self.final):
            for layer, kept in zip(self.layers, np.split(self.kept, np.cumsum(self.ranks)[:-1]), strict=True):
                layer["E"].p[~kept] = 0
