"""Style score: how far pictures have moved from one way of drawing to another, without a neural network.

A ridge probe w is fitted on pictures of the style (target 1) and on pictures of the other way (target 0):

    w = (XᵀX + λI)⁻¹ Xᵀ y        X: standardised features of the pictures, y: centred targets

Its leave-one-out answers on the two sets, averaged, are the two ends r₁ and r₀ of the scale, and the score is

    place = clip((x·w − r₀) / (r₁ − r₀), −½, 1½)        score = clip(mean place over the pictures, 0, 1)

0: as the other way; 1: as the style; 0.5: half way. (Places may lie beyond the ends, else the spread of
good pictures around 1 would pull their mean below it.) The features (123 numbers a picture, on 64x64 pixels and
after a 3x3 mean, so that the fine noise of an image decoder says nothing) are colours and edges only, so the
score says nothing on whether the right thing was drawn. What a latent diffusion model draws is compared best
with reconstructions by its own VAE on both sides: a decoder's blur is a style too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_diffusion.errors import DataError

Array = NDArray[np.float64]
SIDE = 64  # pixels; every picture is brought to this size
PENALTY = 10.0  # λ; features are standardised, so it counts in pictures
FEWEST = 8  # pictures a side; fewer say nothing
_LUMA = np.array([0.299, 0.587, 0.114])
_STEPS = np.array([0.01, 0.02, 0.04, 0.08, 0.16, 0.32])  # edge strengths, luma per pixel


@dataclass(frozen=True)
class StyleProbe:
    """A fitted probe; `fit` makes one."""

    mean: Array  # (F,) of the features
    spread: Array  # (F,)
    weights: Array  # (F,)
    ends: tuple[float, float]  # r₀, r₁

    @classmethod
    def fit(cls, references: Sequence[Image.Image], others: Sequence[Image.Image]) -> StyleProbe:
        """`references` are of the style, `others` of the way it is told from; at least 8 each."""
        for name, pictures in (("references", references), ("others", others)):
            if len(pictures) < FEWEST:
                raise DataError(f"style probe: {len(pictures)} pictures as {name}, expected at least {FEWEST}")
        rows = style_features([*references, *others])
        share = len(references) / len(rows)
        targets = np.repeat([1 - share, -share], [len(references), len(others)])
        mean, spread = rows.mean(0), rows.std(0) + 1e-3
        x = (rows - mean) / spread
        inverse = np.linalg.inv(x.T @ x + PENALTY * np.eye(x.shape[1]))
        weights = inverse @ x.T @ targets
        leverage = np.einsum("nf,fg,ng->n", x, inverse, x)
        left_out = targets - (targets - x @ weights) / (1 - leverage)
        ends = float(left_out[len(references) :].mean()), float(left_out[: len(references)].mean())
        if ends[1] - ends[0] < 0.1:
            raise DataError("style probe: the two sets of pictures look alike, so there is no style to measure")
        return cls(mean, spread, weights, ends)

    def places(self, pictures: Sequence[Image.Image]) -> Array:
        """Each picture's place on the scale, (N,) in [-0.5, 1.5]."""
        if not pictures:
            raise DataError("style probe: no pictures to score, expected at least one")
        answers = (style_features(pictures) - self.mean) / self.spread @ self.weights
        return np.clip((answers - self.ends[0]) / (self.ends[1] - self.ends[0]), -0.5, 1.5)

    def score(self, pictures: Sequence[Image.Image]) -> float:
        """Mean place, 0 to 1."""
        return float(np.clip(self.places(pictures).mean(), 0, 1))

    def accuracy(self, references: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
        """Share of new pictures of both ways put on their own side of 0.5, each way counting half: the ceiling."""
        right = (self.places(references) > 0.5).mean() + (self.places(others) <= 0.5).mean()
        return float(right) / 2


def style_score(
    pictures: Sequence[Image.Image], references: Sequence[Image.Image], others: Sequence[Image.Image]
) -> float:
    """How far `pictures` have gone from the way of `others` (0) to that of `references` (1)."""
    return StyleProbe.fit(references, others).score(pictures)


def style_features(pictures: Sequence[Image.Image]) -> Array:
    """Colour, lightness, chroma and edge statistics, (N, 123)."""
    return np.stack([_features(picture) for picture in pictures])


def _features(picture: Image.Image) -> Array:
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    rgb = _mean_of_nine(np.asarray(small, dtype=np.float64) / 255)
    luma, chroma = rgb @ _LUMA, np.ptp(rgb, axis=2)
    level = np.minimum((rgb * 4).astype(np.int64), 3) @ np.array([16, 4, 1])
    half = luma.reshape(SIDE // 2, 2, SIDE // 2, 2).mean((1, 3))
    parts = [
        np.sqrt(np.bincount(level.ravel(), minlength=64) / level.size),  # colours, Hellinger
        _shares(luma, np.linspace(0, 1, 17)[1:-1]),
        _shares(chroma, np.linspace(0, 1, 17)[1:-1]),
        _shares(_edges(luma), _STEPS),
        _shares(_edges(half), _STEPS),
        _ink(luma),
    ]
    return np.concatenate(parts)


def _ink(luma: Array) -> Array:
    """Where the picture is not white: share, and the moments of lightness and edges there."""
    drawn = luma < 0.95
    if not drawn.any():
        return np.zeros(13)
    inside, edges = luma[drawn], _edges(luma)[drawn]
    quantiles = np.quantile(inside, [0.1, 0.3, 0.5, 0.7, 0.9]), np.quantile(edges, [0.1, 0.3, 0.5, 0.7, 0.9])
    return np.array([drawn.mean(), inside.std(), edges.std(), *quantiles[0], *quantiles[1]])


def _edges(luma: Array) -> Array:
    """Strength of the gradient, by central differences, same shape."""
    down, across = np.gradient(luma)
    return np.hypot(down, across)


def _shares(values: Array, steps: Array) -> Array:
    """Share of the values in each of the len(steps) + 1 intervals."""
    return np.bincount(np.searchsorted(steps, values.ravel()), minlength=len(steps) + 1) / values.size


def _mean_of_nine(rgb: Array) -> Array:
    padded = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
