"""What store and MLflow still have of runs on record: allocations, spectra, curves."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from compress_core.forms.names import FULL
from compress_core.types import LayerRef
from flows.report.shown import Allocation, Floats, Prediction, Shown, Spectra
from flows.runs.prediction import Known, predict
from flows.settings.config import MADE_BY
from flows.settings.fields import BLOCKS
from storage.artifact import Artifact
from storage.errors import StorageError
from storage.store import Store
from tasks.stages.learn import CURVES
from tasks.stages.predict import CODES, COLUMNS, ENTRIES, PREDICTED
from tasks.stages.recover import TENSOR
from tasks.stages.recover_blocks import OF_BLOCK
from tasks.tracking.artifacts import read_file
from tasks.tracking.speaking import NoAnswerError, TrackingError

T = TypeVar("T")
NO_RECORD = "The record of this run is not in the data directory, so what it used is not known."
NO_STORE = "The store no longer has what is shown here; the same command makes it again."
NO_ALLOCATION = "The run's layers are not on record."
NO_DECOMPOSITION = "The method decomposes nothing."


class Findings:
    """Reads what runs left, every artifact once however many runs share it.

    Args:
        home: Data directory.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._store = Store(home / "store") if (home / "store").is_dir() else None
        self._losses: dict[str, Floats | None] = {}
        self._silent = ""  # why MLflow is not asked again
        self._predictions: dict[str, Prediction | str] = {}

    def of(self, fields: Mapping[str, Any]) -> Shown:
        """One run, from what is on record of it."""
        result, config = fields["result"], fields.get("config")
        if config is None or "stages" not in result:
            return Shown(result, config, "", NO_RECORD, NO_RECORD, NO_RECORD)
        stages = result["stages"]
        allocation = self._allocation(result.get("run_id", ""))
        losses = self._decomposed(stages)
        prediction: Prediction | str
        spectra: Spectra | str
        if isinstance(losses, str):
            prediction = spectra = losses
        else:
            spectra = _spectra(stages, losses)
            prediction = NO_ALLOCATION
            if isinstance(allocation, Allocation):
                prediction = self._prediction(config, result, allocation.layers, losses)
        created, curves = fields.get("created", ""), self._curves(result)
        return Shown(result, config, created, allocation, prediction, spectra, curves)

    def _prediction(
        self,
        config: Mapping[str, Any],
        result: Mapping[str, Any],
        layers: Sequence[LayerRef],
        losses: dict[str, Floats],
    ) -> Prediction | str:
        """The same for all budgets of a method that read the same, so made once."""
        read = ("decompose", "probe", "predict", "collect")
        keys = [stage["key"] for stage in result["stages"] if stage["name"] in read]
        names = ("method", "options", "allocate", "samples", "length", *MADE_BY)
        same = json.dumps([keys, *(config.get(name) for name in names)])
        if same not in self._predictions:
            known = self._tables(result["stages"], layers, losses)
            self._predictions[same] = predict(config, result, layers, known)
        return self._predictions[same]

    def _allocation(self, run_id: str) -> Allocation | str:
        if self._silent:
            return self._silent
        try:
            text = read_file(self.home, run_id, "allocation.csv")
        except NoAnswerError as error:
            self._silent = f"What every layer stores is in MLflow, and {error}."
            return self._silent
        except TrackingError as error:
            return f"MLflow no longer has the run's allocation.csv: {error}."
        layers, stored = [], {}
        for row in csv.DictReader(io.StringIO(text)):
            name, shape = row["layer"], (int(row["out"]), int(row["in"]))
            layers.append(LayerRef(name, int(row["block"]), *shape, tap=name))
            stored[name] = {
                "rank": int(row["rank"]) if row["rank"] else None,
                "columns": int(row["columns"]),
                "entries": int(row.get("entries", 0)),  # which older runs did not say
                "numbers": int(row["parameters"]),
                "bits": row.get("bits", str(FULL)),  # older runs had no others
            }
        return Allocation(layers, stored)

    def _decomposed(self, stages: Sequence[Mapping[str, Any]]) -> dict[str, Floats] | str:
        """Layer or stack to its squared error at every rank; a sentence where that is not known."""
        units = [stage for stage in stages if stage["name"] == "decompose"]
        if not units:
            return NO_DECOMPOSITION
        losses = {}
        for unit in units:
            key = unit["key"]
            if key not in self._losses:
                self._losses[key] = self._read("decompose", key, _losses)
            if (loss := self._losses[key]) is None:
                return NO_STORE
            losses[unit["unit"]] = loss
        return losses

    def _tables(
        self,
        stages: Sequence[Mapping[str, Any]],
        layers: Sequence[LayerRef],
        losses: dict[str, Floats],
    ) -> Known:
        """Cosines of blocks, and what was probed and predicted of layers, as far as there."""
        blocks = {_block_of(layer): layer.block for layer in layers}
        cosines, divergence = {}, {}
        names = (PREDICTED, CODES, ENTRIES, COLUMNS)
        curves: dict[str, dict[str, Floats]] = {name: {} for name in names}
        for stage in stages:
            if stage["name"] == "collect" and stage["unit"] in blocks:
                cosine = self._read("collect", stage["key"], lambda found: found.attrs["cosine"])
                if cosine is not None:
                    cosines[blocks[stage["unit"]]] = float(cosine)
            if stage["name"] == "probe":
                row = self._read("probe", stage["key"], lambda found: found.attrs["divergence"])
                if row is not None:
                    divergence[stage["unit"]] = list(row)
            if stage["name"] == "predict":
                for name, found in curves.items():
                    curve = self._read("predict", stage["key"], partial(_array, name))
                    if curve is not None:
                        found[stage["unit"]] = curve
        return Known(losses, cosines, divergence, *curves.values())

    def _curves(self, result: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
        """Of every training; those of the result where the store no longer has the others.

        Blocks that were trained one by one follow one another, unless something of them is gone.
        """
        found: dict[str, dict[str, list[float]]] = {}
        gone = set()
        for stage in result["stages"]:
            name = stage["name"]
            if name == "recover" or (name, stage["unit"]) == ("learn", CURVES):
                curves = self._read(name, stage["key"], _all_curves)
                gone |= {name} if curves is None else set()
                for curve, values in (curves or {}).items():
                    kind = BLOCKS if curve.startswith(OF_BLOCK) else name
                    found.setdefault(kind, {}).setdefault(curve, []).extend(values)
        if "recover" in gone:
            found.pop(BLOCKS, None)
        if "learn" not in found and result.get("curves"):
            found["learn"] = dict(result["curves"])
        return found

    def _read(self, stage: str, key: str, read: Callable[[Artifact], T]) -> T | None:
        """Something of an artifact; None where it is gone or damaged."""
        if self._store is None:
            return None
        try:
            return read(self._store.open(key, stage))
        except StorageError:
            return None


def _array(name: str, artifact: Artifact) -> Floats | None:
    return artifact.array(name) if name in artifact.names else None


def _losses(artifact: Artifact) -> Floats:
    return np.asarray(artifact.array("loss"), dtype=np.float64)


def _all_curves(artifact: Artifact) -> dict[str, list[float]]:
    names = [name for name in artifact.names if not name.startswith(TENSOR)]
    return {name: artifact.array(name).tolist() for name in names}


def _spectra(stages: Sequence[Mapping[str, Any]], losses: Mapping[str, Floats]) -> Spectra:
    keys = ",".join(stage["key"] for stage in stages if stage["name"] == "decompose")
    values = {name: np.sqrt(np.maximum(loss[:-1] - loss[1:], 0.0)) for name, loss in losses.items()}
    return Spectra(keys, values)


def _block_of(layer: LayerRef) -> str:
    """Module path of the layer's block."""
    return layer.name.partition(f".{layer.block}.")[0] + f".{layer.block}"
