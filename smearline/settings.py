"""params.yaml as one typed, frozen model."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smearline.errors import SettingsError, nearest


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_SEED = Field(ge=0, lt=2**31)


class DataSettings(_Section):
    folder: Path


class SplitSettings(_Section):
    seed: int = _SEED
    val: float = Field(ge=0, lt=1)
    test: float = Field(ge=0, lt=1)
    fold: int = Field(default=0, ge=0)
    train_sites: tuple[str, ...] = ()
    test_only_sites: tuple[str, ...] = ()
    near_duplicate_correlation: float = Field(gt=0.5, lt=1)

    def model_post_init(self, _: Any) -> None:
        if self.val + self.test >= 1:
            raise ValueError(f"val {self.val} and test {self.test} leave nothing to train on")
        folds = round(1 / self.test) if self.test else 1
        if self.fold and (self.fold >= folds or abs(folds * self.test - 1) > 1e-6):
            raise ValueError(
                f"fold {self.fold}: folds are 0 to K - 1 with test 1 / K ({1 / folds:.7f}), not {self.test}"
            )


class ImageSettings(_Section):
    field_um: float = Field(gt=2, lt=200)
    size_px: int = Field(ge=32, le=1024)
    margin: float = Field(ge=1, le=2)


class ModelSettings(_Section):
    backbone: str
    weights: str
    frozen_batch_norm: bool
    embedding_dim: int = Field(ge=8, le=512)
    views: Literal[1, 2, 4]


class TrainSettings(_Section):
    seed: int = _SEED
    workers: int = Field(ge=1)
    threads_per_worker: int = Field(ge=1)
    gpus_per_worker: float = Field(ge=0)
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    accumulate: int = Field(ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup: float = Field(ge=0, lt=1)
    balance: float = Field(ge=0, le=1)
    characteristics_weight: float = Field(ge=0)
    stain_jitter: float = Field(ge=0, le=3)
    compile: bool
    checkpoint_steps: int = Field(ge=0)
    max_failures: int = Field(ge=0)

    def model_post_init(self, _: Any) -> None:
        if self.batch_size % (self.workers * self.accumulate):
            parts = f"workers {self.workers} times accumulate {self.accumulate}"
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of {parts}")
        if self.workers > 1 and 0 < self.gpus_per_worker < 1:
            raise ValueError(
                f"{self.workers} workers cannot share a GPU: gpus_per_worker is 0 or 1, not {self.gpus_per_worker}"
            )


class TuneSettings(_Section):
    trials: int = Field(ge=0)
    epochs: int = Field(ge=1)
    parallel: int = Field(ge=1)
    workers: int = Field(ge=1)
    unpruned: int = Field(ge=1)
    seed: int = _SEED


class AdaptSettings(_Section):
    seed: int = _SEED
    strength: float = Field(gt=0)
    home_cells: int = Field(ge=1)
    held_out: float = Field(ge=0, lt=1)


class ConfidenceSettings(_Section):
    natural_mix: float = Field(ge=0, le=1)
    coverage: float = Field(gt=0.5, lt=1)
    max_error: float = Field(gt=0, lt=0.5)
    typical: float = Field(gt=0.5, le=1)
    blast_ppv: float = Field(gt=0, le=1)


class EvaluateSettings(_Section):
    seed: int = _SEED
    num_errors_shown: int = Field(ge=0, le=400)


class DiagnosisSettings(_Section):
    seed: int = _SEED
    parts: tuple[Literal["differential", "characteristics", "embedding", "cbc"], ...] = Field(min_length=1)
    strength: float = Field(gt=0)
    min_cells: int = Field(ge=1)
    min_probability: float = Field(ge=0, le=1)
    min_patients: int = Field(ge=3)
    repeats: int = Field(ge=1)


class GateSettings(_Section):
    margin: float = Field(gt=0, lt=0.5)
    diagnosis_margin: float = Field(ge=0, lt=1)
    seed: int = _SEED


class Settings(_Section):
    """All parameters of the pipeline."""

    data: DataSettings
    split: SplitSettings
    image: ImageSettings
    model: ModelSettings
    train: TrainSettings
    confidence: ConfidenceSettings
    adapt: AdaptSettings
    tune: TuneSettings
    evaluate: EvaluateSettings
    diagnosis: DiagnosisSettings
    gate: GateSettings


def overlaid(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `overlay` put over it, section by section."""
    merged = dict(base)
    for name, value in overlay.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = overlaid(merged[name], value) if both else value
    return merged


def load(path: Path = Path("params.yaml"), overlay: Path | None = None) -> Settings:
    """Read and check the parameters, with those of `overlay` (such as the tune stage writes) over them.

    Raises:
        SettingsError: a file is missing, a key is unknown (the message names the nearest), or a value is out of range.
    """
    raw: dict[str, Any] = {}
    for file in filter(None, (path, overlay)):
        if not file.is_file():
            raise SettingsError(f"there is no {file} in {Path.cwd()}; run inside a workspace")
        try:
            given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise SettingsError(f"{file} is no valid YAML: {error}") from error
        if not isinstance(given, dict):
            raise SettingsError(f"{file} holds a {type(given).__name__}, not sections of parameters")
        raw = overlaid(raw, given)
    return check(raw, str(path))


def check(raw: dict[str, Any], where: str) -> Settings:
    """Settings from plain data. Raises SettingsError as `load`."""
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError("\n".join([f"{where}:", *(f"  {_explain(e)}" for e in error.errors())])) from error


def _explain(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{place}: {problem['msg']} (given: {problem['input']!r})"
    *section, key = problem["loc"]
    known: Any = Settings.model_fields[section[0]].annotation if section else Settings
    return f"unknown key {place}; nearest: {nearest(str(key), known.model_fields)}"
