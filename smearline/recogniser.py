"""The recogniser: one network that names a cell's type and its characteristics.

Shapes: B images, T trained types, V characteristic values in all, C pooled features, E embedding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from smearline.errors import ModelError
from smearline.settings import Settings

PROJECTION_VERSION = "orthogonal-1"
_DROPOUT = 0.2


class Recogniser(nn.Module):
    """A timm backbone with a softmax head for the types and one for each characteristic.

    Args:
        backbone: any timm model; its features are pooled in its own way (a transformer's class token, a convolution's mean).
        types: the types that it tells apart, in the order of its outputs.
        characteristics: name to values, in the order of its outputs.
        embedding_dim: of the fixed projection that goes to logs and drift statistics.
        size_px: side of its pictures, for which a transformer's positions are made.

    Raises:
        ModelError: timm has no such model, or it takes no pictures of this size, or sees a part of them alone.
    """

    backbone: Any
    mean: Tensor
    std: Tensor
    projection: Tensor

    def __init__(
        self,
        backbone: str,
        types: Sequence[str],
        characteristics: Mapping[str, Sequence[str]],
        embedding_dim: int,
        size_px: int,
    ) -> None:
        super().__init__()
        self.types = tuple(types)
        self.characteristics = {name: tuple(values) for name, values in characteristics.items()}
        self.size_px = size_px
        self.backbone_name = backbone
        self.backbone = timm_model(backbone, size_px)
        channels = _width(self.backbone, backbone, size_px)
        self.type_head = nn.Linear(channels, len(self.types))
        self.characteristics_head = nn.Linear(channels, sum(len(v) for v in self.characteristics.values()))
        config = timm.data.resolve_model_data_config(self.backbone)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.register_buffer("projection", _projection(channels, embedding_dim))

    def forward(self, images_BCHW: Tensor, dropped_BC: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Float images in 0..1 to type logits (B x T), characteristic logits (B x V) and the pooled features (B x C).

        `dropped_BC` is what `dropout` drew; without it, as in service, nothing is dropped.
        """
        features = self.backbone((images_BCHW - self.mean) / self.std)
        pooled = features if dropped_BC is None else features * dropped_BC
        return self.type_head(pooled), self.characteristics_head(pooled), features

    def dropout(self, batch: int, generator: torch.Generator) -> Tensor:
        """Factors (B x C) for the pooled features: 0 for a fifth of them, and the others made up for it."""
        kept = torch.rand(batch, self.type_head.in_features, generator=generator) >= _DROPOUT
        return kept / (1 - _DROPOUT)

    def slices(self) -> dict[str, slice]:
        """Where each characteristic's values stand among the V logits."""
        found, start = {}, 0
        for name, values in self.characteristics.items():
            found[name] = slice(start, start + len(values))
            start += len(values)
        return found


def of_settings(params: Settings, types: Sequence[str], characteristics: Mapping[str, Sequence[str]]) -> Recogniser:
    """The network that these parameters name, without initial weights. Raises ModelError."""
    model = params.model
    return Recogniser(model.backbone, types, characteristics, model.embedding_dim, params.image.size_px)


def timm_model(name: str, size_px: int, pretrained: bool = False) -> Any:
    """timm's model for pictures of this size: images to its pooled features (B x C), without its classifier.

    The pretrained one has it: else timm leaves what its weights lack as chance made it. Raises ModelError.
    """
    if name.startswith("local-dir:"):
        raise ModelError("model.backbone: give a folder's architecture here, and its file as model.weights")
    try:
        found: Any = timm.create_model(name, num_classes=0)
        sized: dict[str, Any] = {"img_size": size_px} if found.pretrained_cfg.get("fixed_input_size") else {}
        if pretrained:
            return timm.create_model(name, pretrained=True, **sized)
        return timm.create_model(name, num_classes=0, **sized) if sized else found
    except Exception as error:  # each of timm's models raises something else
        raise ModelError(f"model.backbone: timm makes no '{name}' for pictures of {size_px} px: {error}") from error


def _width(backbone: Any, name: str, size_px: int) -> int:
    """How many features it pools: timm's `num_features` is not always that.

    Raises:
        ModelError: it takes no such picture, pools nothing, or does not see the whole of it.
    """
    try:
        with torch.no_grad():
            found = backbone.eval()(torch.zeros(1, 3, size_px, size_px))
    except (AssertionError, IndexError, RuntimeError) as error:
        raise ModelError(f"model.backbone: {name} takes no pictures of {size_px} px: {error!r}") from error
    backbone.train()
    if found.ndim != 2:
        raise ModelError(f"model.backbone: {name} pools nothing, its answer is {tuple(found.shape)}")
    patches = [
        m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3 and m.kernel_size == m.stride
    ]
    for side in (m.stride[0] for m in patches):
        if unseen := size_px % side:
            raise ModelError(
                f"model.backbone: {name} cuts pictures into patches of {side} px, and of {size_px} px it does not see the last "
                f"{unseen}; give image.size_px {size_px - unseen} or {size_px - unseen + side}"
            )
    return int(found.shape[1])


def _projection(channels: int, dim: int) -> Tensor:
    """A fixed matrix (C x E) with orthonormal columns (rows where C < E), the same on every machine."""
    gaussian = np.random.Generator(np.random.PCG64(20250912)).standard_normal((max(channels, dim), min(channels, dim)))
    basis, triangle = np.linalg.qr(gaussian)
    basis *= np.sign(np.diag(triangle))
    return torch.from_numpy((basis if channels >= dim else basis.T).astype(np.float32))


def label_set_loss(
    logits_BT: Tensor,
    allowed_BT: Tensor,
    num_labelled: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Negative log of the probability that falls on the allowed types, averaged over the labelled images.

    A label that names a parent allows all its children (a partial label; Cour et al. 2011, JMLR 12:1501). With one
    allowed type it is the cross-entropy. Rows that allow nothing are unlabelled and count for nothing.

    Args:
        logits_BT: B x T.
        allowed_BT: B x T, bool.
        num_labelled: what the sum is divided by, where this batch is one worker's part of a larger one.
        weight_B: of each image's loss in the sum.
    """
    labelled = allowed_BT.any(dim=1)
    logs = functional.log_softmax(logits_BT.float(), dim=1)
    per_image = -torch.logsumexp(logs.masked_fill(~allowed_BT, -torch.inf)[labelled], dim=1)
    if weight_B is not None:
        per_image = per_image * weight_B[labelled]
    return per_image.sum() / (labelled.sum().clamp(min=1) if num_labelled is None else num_labelled)


def characteristics_loss(
    logits_BV: Tensor,
    targets_BK: Tensor,
    slices: Sequence[slice],
    num_labelled_K: Tensor,
) -> Tensor:
    """Mean over the K characteristics of the cross-entropy over the images that have a label of it.

    Args:
        logits_BV: B x V.
        targets_BK: B x K, int64; -1 where there is no label.
        num_labelled_K: as in `label_set_loss`.
    """
    losses = []
    for column, part in enumerate(slices):
        total = functional.cross_entropy(
            logits_BV[:, part].float(), targets_BK[:, column], ignore_index=-1, reduction="sum"
        )
        losses.append(total / num_labelled_K[column])
    return torch.stack(losses).mean() if losses else logits_BV.sum() * 0.0


class Served(nn.Module):
    """What is exported: uint8 images in, probabilities and embedding out.

    A cell has no upper side: with 2 or 4 views the network also sees it mirrored, and its answers are averaged (logits and
    features). It takes as many times as long.
    """

    def __init__(self, recogniser: Recogniser, temperature: float, views: int = 1) -> None:
        super().__init__()
        self.recogniser, self.temperature, self.mirrored = recogniser, temperature, ((), (3,), (2,), (2, 3))[:views]

    def averaged(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits (B x T, B x V) and the pooled features (B x C), averaged over the views."""
        images = images_BHWC.permute(0, 3, 1, 2).float() / 255.0
        seen = [self.recogniser(images.flip(axes) if axes else images) for axes in self.mirrored]
        types, values, features = (torch.stack(part).mean(dim=0) for part in zip(*seen, strict=True))
        return types, values, features

    def forward(self, images_BHWC: Tensor) -> tuple[Tensor, ...]:
        """B x H x W x 3 uint8 to type probabilities (B x T), characteristic probabilities (B x V, each characteristic
        summing to 1) and embedding (B x E)."""
        net = self.recogniser
        type_logits, value_logits, features = self.averaged(images_BHWC)
        embedding = features @ net.projection
        values = [functional.softmax(value_logits[:, part], dim=1) for part in net.slices().values()]
        return (
            functional.softmax(type_logits / self.temperature, dim=1),
            torch.cat(values, dim=1) if values else value_logits,
            embedding,
        )


def export_onnx(recogniser: Recogniser, temperature: float, size_px: int, path: Path, views: int = 1) -> None:
    """Write the served form as ONNX with a free batch size. Raises ModelError where it has none."""
    served = Served(recogniser, temperature, views).eval()
    names = ["type_probabilities", "characteristic_probabilities", "embedding"]
    try:
        torch.onnx.export(
            served,
            (torch.zeros(2, size_px, size_px, 3, dtype=torch.uint8),),
            str(path),
            input_names=["images"],
            output_names=names,
            dynamic_axes={name: {0: "batch"} for name in ["images", *names]},
            opset_version=17,
            dynamo=False,
        )
    except RuntimeError as error:  # of which torch's own are kinds
        raise ModelError(
            f"model.backbone: {recogniser.backbone_name} has no form in ONNX, in which a model is served ({type(error).__name__}); "
            "name another"
        ) from error
