"""Recognition with a packaged recogniser: ONNX Runtime alone, no torch.

A model folder holds recogniser.onnx, model.json (what the outputs mean, how images are prepared, where it comes from)
and trained_on.parquet (which cells and patients it has seen, so that nobody is judged on them unawares).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel

from smearline import dataset, images, plain_json, sites, staining, vocabulary
from smearline.confidence import Confidence
from smearline.errors import DataError, ImageError, ModelError
from smearline.reader import prepare

CONTRACT = "recogniser-3"
ONNX_FILE, CARD_FILE, SEEN_FILE = "recogniser.onnx", "model.json", "trained_on.parquet"
_BATCH = 32


class ModelCard(BaseModel, frozen=True, extra="forbid"):
    """model.json: what a recogniser's outputs mean and where it comes from."""

    contract: str
    vocabulary: str
    types: tuple[str, ...]
    characteristics: dict[str, tuple[str, ...]]
    field_um: float
    size_px: int
    embedding: str
    """Version of the fixed projection."""
    temperature: float
    views: int = 1
    """Mirrored pictures over which an answer is averaged."""
    origin: str
    sites: tuple[str, ...]
    num_cells: int
    data_digest: str
    parameters: dict[str, Any]
    intended_use: str = "research use only"
    confidence: Confidence | None = None
    """None where there were no labelled validation cells to learn it from."""


class RecognitionModel:
    """A packaged recogniser.

    Raises:
        ModelError: the folder lacks a file, or is of another contract.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        for name in (ONNX_FILE, CARD_FILE, SEEN_FILE):
            if not (folder / name).is_file():
                inside = (
                    f"did you mean {folder / 'recogniser'}?"
                    if (folder / "recogniser").is_dir()
                    else "make one: dvc repro"
                )
                raise ModelError(f"{folder} is no model folder: it has no {name}; {inside}")
        self.folder = folder
        try:
            card = plain_json.read(folder / CARD_FILE)
            if isinstance(card, dict) and (kept := card.get("contract", CONTRACT)) != CONTRACT:
                raise ModelError(
                    f"{folder} keeps the contract '{kept}'; this version reads '{CONTRACT}': make it anew, dvc repro"
                )
            self.card = ModelCard.model_validate(card)
        except ValueError as error:
            raise ModelError(f"{folder / CARD_FILE} is no model card: {error}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # In float32 on a GPU too: TF32 moves answers by some thousandths.
        options_of = {"CUDAExecutionProvider": {"use_tf32": "0"}, "CPUExecutionProvider": {}}
        providers = [(p, o) for p, o in options_of.items() if p in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(str(folder / ONNX_FILE), options, providers=providers)
        except Exception as error:  # onnxruntime's own errors share no base class
            raise ModelError(f"{folder / ONNX_FILE} cannot be loaded: {error}") from error

    @cached_property
    def seen(self) -> pd.DataFrame:
        """The cells it was trained on: sha256, site, patient, true_type and characteristics."""
        return pd.read_parquet(self.folder / SEEN_FILE)

    @cached_property
    def embedding_version(self) -> str:
        """Of the projection and of the network under it: embeddings of two versions are never compared."""
        return f"{self.card.embedding}/{hashlib.sha256((self.folder / ONNX_FILE).read_bytes()).hexdigest()[:12]}"

    @cached_property
    def version(self) -> str:
        """Of everything that an answer hangs on: the network and the card."""
        files = (self.folder / name for name in (ONNX_FILE, CARD_FILE))
        return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()[:16]

    @cached_property
    def recipe(self) -> str:
        return recipe_of(self.card.parameters, self.seen)

    def prepare(self, data: bytes, microns_per_px: float) -> NDArray[np.uint8]:
        """Image bytes to the network's input (size_px x size_px x 3, uint8). Raises ImageError."""
        return prepare(data, microns_per_px, self.card.field_um, self.card.size_px)

    def run(self, images_BHWC: NDArray[np.uint8], *outputs: str) -> list[NDArray[np.float32]]:
        """The outputs named: type_probabilities (B x T), characteristic_probabilities (B x V), embedding (B x E)."""
        return list(self._session.run(list(outputs), {"images": images_BHWC}))


def recipe_of(parameters: Mapping[str, Any], seen: pd.DataFrame) -> str:
    """SHA-256 of what makes a recogniser: its parameters, and the cells that are not for the test (sha256, true_type)."""
    shaping = {name: parameters.get(name) for name in ("image", "model", "train", "confidence")}
    cells = seen.sort_values("sha256")
    told = cells["sha256"] + " " + cells["true_type"].astype(object).where(cells["true_type"].notna(), "")
    return hashlib.sha256("\n".join([json.dumps(shaping, sort_keys=True), *told]).encode()).hexdigest()


def scale_of(site: str, microns_per_px: float | None) -> tuple[float, bool]:
    """(um/px, whether it is assumed) of an image.

    Raises:
        SiteError: the scale is unknown and the site has no file that states a fallback.
    """
    if microns_per_px is not None and not np.isnan(microns_per_px):
        return float(microns_per_px), False
    file = _site(site)
    if file.microns_per_px is not None:  # it has become known since the import
        return file.microns_per_px, False
    assert file.assumed_microns_per_px is not None, "Site holds one of the two"
    return file.assumed_microns_per_px, True


@lru_cache(maxsize=64)
def _site(name: str) -> sites.Site:
    return sites.load(name)


def recognise(
    model: RecognitionModel,
    directory: Path,
    *,
    keep: set[str] | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> tuple[pd.DataFrame, NDArray[np.float16]]:
    """Recognise the cells of a data set, in their stored order.

    Args:
        keep: only these sha256; None for all.
        progress: called with (images done, images in all).

    Returns:
        The predictions (columns as of `table_of`) and the embeddings (N x E, float16).

    Raises:
        DataError: no image is left; or an image of the data set cannot be decoded.
    """
    total = len(dataset.index(directory, ["sha256"])) if keep is None else len(keep)
    tables, done = list[pa.Table](), 0
    for table in recognised(model, directory, keep=keep):
        tables.append(table)
        done += len(table)
        progress(done, total)
    if not tables:
        raise DataError(f"no image to recognise in {directory}")
    return split(pa.concat_tables(tables))


def recognised(
    model: RecognitionModel,
    directory: Path,
    *,
    shards: Sequence[Path] | None = None,
    keep: set[str] | None = None,
    threads: int = 2,
) -> Iterator[pa.Table]:
    """Tables of `table_of`, a batch at a time, so that memory is that of a batch; `shards`: of these alone. As `recognise`."""
    columns = ["sha256", "site", "patient", "smear", "microns_per_px", "image"]
    with ThreadPoolExecutor(threads) as pool:
        for block in dataset.iter_rows(directory, columns, batch=8 * _BATCH, only=shards):
            wanted = [i for i, s in enumerate(block["sha256"]) if keep is None or s in keep]
            metadata = []
            for i in wanted:
                scale, assumed = scale_of(block["site"][i], block["microns_per_px"][i])
                metadata.append({c: block[c][i] for c in columns[:4]} | {"scale": scale, "scale_assumed": assumed})

            def crop(i: int, scale: float, block: dict[str, list[Any]] = block) -> images.UInt8Array:
                try:
                    return model.prepare(block["image"][i], scale)
                except ImageError as error:
                    raise DataError(f"image {block['sha256'][i]} of {directory} cannot be decoded: {error}") from error

            crops = list(pool.map(crop, wanted, [m["scale"] for m in metadata]))
            for start in range(0, len(wanted), _BATCH):
                batch, about = np.stack(crops[start : start + _BATCH]), metadata[start : start + _BATCH]
                outputs = model.run(batch, "type_probabilities", "characteristic_probabilities", "embedding")
                yield table_of(model.card, about, batch, *outputs)


def table_of(
    card: ModelCard,
    metadata: list[dict[str, Any]],
    crops: NDArray[np.uint8],
    types: NDArray[np.float32],
    values: NDArray[np.float32],
    embedding: NDArray[np.float32],
) -> pa.Table:
    """One row a cell: the answer in the vocabulary's terms, and what its crop says of the staining and the optics.

    `type_untempered` and `probability_untempered` are the network's own answer, comparable from site to site. With a
    `confidence` in the card the probabilities p_ are calibrated by site, and there are type_set (types, by spaces), unlike
    (a distance; beyond 1 the cell is unlike what was trained on) and named (False: unidentified, whatever predicted_type
    suggests).

    Arrow, since a pandas frame of so many columns takes longer to make for one cell than the network takes.

    Args:
        metadata: sha256, site, patient, smear and scale_assumed of each cell.
        crops: what the network saw, B x S x S x 3 uint8.
        types, values, embedding: the outputs type_probabilities, characteristic_probabilities and embedding.
    """
    text = pa.string()
    found = {name: pa.array([r[name] for r in metadata], text) for name in ("sha256", "site", "patient", "smear")}
    own: dict[str, pa.Array] = {
        "probability_untempered": pa.array(types.max(axis=1)),
        "type_untempered": pa.array([card.types[i] for i in types.argmax(axis=1)], text),
    }
    if card.confidence:
        types, in_set, distance, named = card.confidence.judge(types, embedding, [r["site"] for r in metadata])
        sets = [" ".join(t for t, inside in zip(card.types, row, strict=True) if inside) for row in in_set]
        own |= {"type_set": pa.array(sets, text), "unlike": pa.array(distance), "named": pa.array(named)}
    best = types.argmax(axis=1)
    found["predicted_type"] = pa.array([card.types[i] for i in best], text)
    for code in vocabulary.load().types:
        known = types[:, card.types.index(code)] if code in card.types else np.zeros(len(types), np.float32)
        found[f"p_{code}"] = pa.array(known)
    start = 0
    for name, of_name in card.characteristics.items():
        part = values[:, start : start + len(of_name)]
        found[f"c_{name}"] = pa.array([of_name[i] for i in part.argmax(axis=1)], text)
        found |= {f"p_{name}_{value}": pa.array(part[:, i]) for i, value in enumerate(of_name)}
        start += len(of_name)
    found["scale_assumed"] = pa.array([r["scale_assumed"] for r in metadata], pa.bool_())
    found |= own
    # What cannot be measured on a crop is null.
    measured = staining.measure(crops, card.field_um / card.size_px)
    found |= {name: pa.array(column, from_pandas=True) for name, column in measured.items()}
    ends = np.arange(len(embedding) + 1, dtype=np.int32) * embedding.shape[1]
    found["embedding"] = pa.ListArray.from_arrays(ends, np.ascontiguousarray(embedding).reshape(-1))
    return pa.table(found)


def nothing(card: ModelCard) -> pa.Table:
    """A table of `table_of` without a row."""
    crops = np.empty((0, card.size_px, card.size_px, 3), np.uint8)
    widths = (len(card.types), sum(map(len, card.characteristics.values())), 1)
    return table_of(card, [], crops, *(np.empty((0, width), np.float32) for width in widths))


def split(table: pa.Table) -> tuple[pd.DataFrame, NDArray[np.float16]]:
    """A table of `table_of` as a frame without the embedding, and the embeddings (N x E)."""
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1).astype(np.float16)
    strings = {pa.string(): pd.StringDtype()}.get
    return table.drop_columns("embedding").to_pandas(types_mapper=strings), vectors
