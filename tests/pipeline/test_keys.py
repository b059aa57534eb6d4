"""What decides a unit's numbers is in its key, found one by one where it once was not."""

import shutil
from pathlib import Path

from compress_core.methods import build_method
from storage.digests import DigestCache
from tasks.engine.code import fingerprint
from tasks.engine.dense_model import DenseModel
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.stages.collect import collect_groups
from tasks.stages.decompose import decompose_groups
from tasks.stages.tokenise import Text, calibration_group
from tasks.stages.weigh import weigh_groups
from tests.contracts.more_families import any_model
from tests.pipeline import pico


def make_job(folder: Path, method: str, home: Path) -> Job:
    model = DenseModel(folder, DigestCache(home / "digests.json"))
    return Job(
        model,
        build_method(method),
        0.6,
        samples=1,
        length=32,
        batch_size=1,
        products="float64",
        seed=0,
    )


def test_the_format_of_a_text_is_part_of_its_key(inputs: pico.Inputs, tmp_path: Path) -> None:
    model = DenseModel(inputs.model, DigestCache(tmp_path / "digests.json"))
    units = []
    for name in ("same.txt", "same.jsonl"):
        shutil.copyfile(inputs.calibration, tmp_path / name)
        text = Text(str(tmp_path / name))
        digests = DigestCache(tmp_path / "digests.json")
        group = calibration_group(model, text, digests, samples=2, length=16, seed=0, bos=False)
        units.append(group.units[0])
    assert units[0].sources == units[1].sources
    assert units[0].settings != units[1].settings


def test_stored_buffers_are_part_of_the_activations_key(tmp_path: Path) -> None:
    model = any_model("gemma4")
    sources = []
    for scale in (1.0, 3.0):
        for layer in model.model.layers:
            layer.layer_scalar.fill_(scale)
        folder = tmp_path / f"scale {scale}"
        model.save_pretrained(folder)
        tokens = Unit("tokenise", "calibration", settings={})
        groups = collect_groups(make_job(folder, "svd_llm", tmp_path), tokens)
        sources.append([unit.sources for group in groups for unit in group.units])
    assert all(one != other for one, other in zip(*sources, strict=True))


def test_the_metric_that_is_used_is_the_weightings(inputs: pico.Inputs, tmp_path: Path) -> None:
    """Its code and its fields are in the key of what it decides."""
    job = make_job(inputs.model, "svd_llm", tmp_path)
    taps = {layer.tap: Unit("collect", layer.tap, settings={}) for layer in job.model.layout.layers}
    weighed = weigh_groups(job.model, job.method.weighting, taps)
    by_tap = {unit.name: unit for group in weighed for unit in group.units}
    for group in decompose_groups(job, taps, by_tap, {}, {}):
        for unit in group.units:
            assert "compress_core.metric.OutputError" in fingerprint(unit.code)
            assert unit.settings["weighting"] == {"kind": "OutputError"}


def test_the_modelling_file_is_code_of_the_folder_and_of_nothing_before_it(
    inputs: pico.Inputs, tmp_path: Path
) -> None:
    pipeline, *_ = pico.build(inputs.settings(tmp_path / "home"))
    codes: dict[str, set[str]] = {}
    for group in pipeline.groups:
        for unit in group.units:
            codes.setdefault(unit.stage, set()).update(fingerprint(unit.code))
    assert "compress_core.folder.swap.swap_from_config" in codes["materialise"]
    for stage in ("collect", "weigh", "decompose", "allocate", "realise"):
        assert not {name for name in codes[stage] if "folder" in name or "quantizer" in name}
