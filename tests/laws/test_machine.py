"""Rates are measured once for a set-up, and what is free respects the limits of the process."""

from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from flows.runs import machine
from flows.runs.estimate import UNIT_SECONDS, memory, seconds
from flows.runs.machine import Machine, known_machine, measure
from storage.records import read_record, write_record
from tasks.engine.cost import MODEL, Cost

NOW = datetime.now(UTC).isoformat()
KNOWN = Machine({"float32": 2e9, "float64": 1e9}, 5e8, 1e6, 1e8, 2e8, NOW)


def test_seconds_are_work_by_kind_over_its_rate() -> None:
    cost = Cost(
        products={MODEL: 4e9, "float64": 3e9}, eigen=1e9, logits=5e5, memory=7, disk=200_000_000
    )
    expected = UNIT_SECONDS + 4e9 / 2e9 + 3e9 / 1e9 + 1e9 / 5e8 + 0.5 + 2.0 + 1.0
    assert seconds(cost, KNOWN, "float32") == pytest.approx(expected)
    assert seconds(cost, KNOWN, "float64") == pytest.approx(expected + 4e9 / 1e9 - 4e9 / 2e9)


def test_memory_is_that_of_the_weights_in_their_dtype_and_the_rest() -> None:
    assert memory(Cost(held=100, memory=7), "float32") == 407
    assert memory(Cost(held=100, memory=7), "bfloat16") == 207


def test_all_rates_are_positive_and_nothing_is_left_behind(tmp_path: Path) -> None:
    found = measure("cpu", ["float32", "float64"], tmp_path)
    assert set(found.products) == {"float32", "float64"}
    assert min(*found.products.values(), found.eigen, found.logits, found.write, found.read) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The dtypes of every measurement that is made."""
    calls: list[list[str]] = []

    def count(device: str, dtypes: list[str], folder: Path) -> Machine:
        calls.append(sorted(dtypes))
        return replace(KNOWN, products=dict.fromkeys(dtypes, 1e9))

    monkeypatch.setattr(machine, "measure", count)
    return calls


def test_a_machine_is_measured_once(tmp_path: Path, measured: list[list[str]]) -> None:
    first = known_machine(tmp_path, "cpu", ["float32", "float64"])
    assert known_machine(tmp_path, "cpu", ["float64"]) == first
    assert measured == [["float32", "float64"]]
    (name,) = read_record(tmp_path / "machine.json")["machines"]
    assert name.startswith("cpu, ") and " threads, torch " in name


def test_it_is_measured_again_for_another_dtype_or_number_of_threads(
    tmp_path: Path, measured: list[list[str]]
) -> None:
    known_machine(tmp_path, "cpu", ["float64"])
    known_machine(tmp_path, "cpu", ["bfloat16"])
    assert measured[1:] == [["bfloat16", "float64"]]  # and what was known stays known
    known_machine(tmp_path, "cpu", ["float64"], threads=1 + torch.get_num_threads())
    assert measured[2:] == [["float64"]]
    assert len(read_record(tmp_path / "machine.json")["machines"]) == 2


@pytest.mark.parametrize("kept", ["old", "changed", "no JSON", "[]", '{"cpu": 1}'])
def test_it_is_measured_again_when_what_was_kept_is_old_or_unreadable(
    kept: str, tmp_path: Path, measured: list[list[str]]
) -> None:
    file = tmp_path / "machine.json"
    if kept in ("old", "changed"):
        known_machine(tmp_path, "cpu", ["float64"])
        fields = read_record(file)
        (name,) = fields["machines"]
        then = (datetime.now(UTC) - timedelta(days=31)).isoformat()
        fields["machines"][name] = asdict(replace(KNOWN, measured=then))
        write_record(file, fields)
        text = file.read_text()
        kept = text if kept == "old" else text.replace(then, datetime.now(UTC).isoformat())
        measured.clear()
    file.write_text(kept)
    known_machine(tmp_path, "cpu", ["float64"])
    assert len(measured) == 1 and "float64" in measured[0]
    known_machine(tmp_path, "cpu", ["float64"])
    assert len(measured) == 1
