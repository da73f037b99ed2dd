"""Augmentation on the device, a batch at a time: geometry by one resampling, stain in optical density.

The random numbers of a batch are drawn on the CPU from (seed, step) for the whole global batch and then cut by rank,
so that they do not depend on the number of workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Draws:
    """Random numbers for B images, uniform in 0..1 or standard normal."""

    geometry: Tensor  # B x 6: angle, flip, scale, aspect, shift x, shift y; uniform
    stain: Tensor  # B x 3 x 4: OD gain of each channel, mixing of the channels; normal
    light: Tensor  # B x 8: brightness, contrast, white point R G B; normal; blur, noise; uniform

    @classmethod
    def of(cls, batch: int, seed: int, step: int) -> Draws:
        generator = torch.Generator().manual_seed((seed << 32) + step)
        return cls(
            torch.rand(batch, 6, generator=generator),
            torch.randn(batch, 3, 4, generator=generator),
            torch.cat([torch.randn(batch, 6, generator=generator), torch.rand(batch, 2, generator=generator)], dim=1),
        )

    def cut(self, rank: int, workers: int, device: torch.device) -> Draws:
        """This rank's part: every `workers`-th image."""
        return Draws(*(getattr(self, f.name)[rank::workers].to(device, non_blocking=True) for f in fields(self)))


def augment(images_BHWC: Tensor, draws: Draws, out_px: int, margin: float, stain_jitter: float) -> Tensor:
    """uint8 crops with a margin to float B x 3 x out_px x out_px in 0..1.

    Args:
        images_BHWC: B x S x S x 3, uint8; a field `margin` times as wide as the network's.
        stain_jitter: standard deviation of the change of each channel's optical density, relative.
    """
    images = images_BHWC.permute(0, 3, 1, 2).float() / 255.0
    images = _resample(images, draws.geometry, out_px, margin)
    density = -torch.log(images.clamp(min=1 / 255))
    gain = torch.exp(stain_jitter * draws.stain[:, :, 0])[:, :, None, None]
    mixing = torch.eye(3, device=images.device) + 0.25 * stain_jitter * draws.stain[:, :, 1:]
    density = torch.einsum("bij,bjhw->bihw", mixing, density * gain)
    white = 0.06 * draws.light[:, 2:5] + 0.05 * draws.light[:, :1]
    images = torch.exp(-density.clamp(min=-0.1) + white[:, :, None, None])
    contrast = torch.exp(0.1 * draws.light[:, 1])[:, None, None, None]
    centre = images.mean(dim=(1, 2, 3), keepdim=True)
    images = _blur((images - centre) * contrast + centre, draws.light[:, 6])
    return images.clamp(0.0, 1.0)


def _resample(images: Tensor, geometry: Tensor, out_px: int, margin: float) -> Tensor:
    angle = 2 * math.pi * geometry[:, 0]
    flip = torch.where(geometry[:, 1] < 0.5, -1.0, 1.0)
    scale = torch.exp((geometry[:, 2] - 0.5) * 0.3) / margin
    aspect = torch.exp((geometry[:, 3] - 0.5) * 0.12)
    shift = (geometry[:, 4:6] - 0.5) * 0.12
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [
        torch.stack([cos * flip * aspect, -sin / aspect, shift[:, 0]], 1),
        torch.stack([sin * flip * aspect, cos / aspect, shift[:, 1]], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), [len(images), 3, out_px, out_px], align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _blur(images: Tensor, amount: Tensor) -> Tensor:
    """A third of the images loses sharpness: a blend with their 3 x 3 mean."""
    weight = ((amount - 0.67).clamp(min=0) * 3.0)[:, None, None, None]
    return images + weight * (functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False) - images)
