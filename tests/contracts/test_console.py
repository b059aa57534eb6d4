"""What people are shown fits the width there is, and nobody waits long for a line."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.commands import plan as plan_command
from flows.commands.methods import list_methods
from flows.report import console as console_module
from flows.report import lines as lines_module
from flows.report.console import EVERY, NEXT, Reporter
from flows.report.lines import duration, size
from flows.report.tables import Column, aligned, fitted_tables, number, wrap_name
from flows.runs.estimate import Estimate
from flows.runs.forecast import Planned
from flows.runs.workspace import LIBRARIES
from flows.settings.config import DEFAULT_METHOD, RunConfig, build_config
from tasks.engine.cost import Cost
from tasks.engine.peak_memory import Peak
from tasks.engine.units import Outcome

LONG = "cap:init=activation:lambda_scale=0.1:refit=prefix"
METHODS = (LONG, "svd", "saes_svd:prefix=block+columns:refit_columns=true@knapsack")
TEXTS = ("test.txt", "a-text-with-a-name-of-many-words-and-one-long-word.jsonl")
HEADINGS = "method kept perplexity KL text million parameters MB on disk in memory s reused"


@pytest.fixture(params=[80, 60])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(lines_module, "WIDTH", request.param)
    return int(request.param)


def result(method: str, kept: float, texts: int, factor: float) -> dict[str, Any]:
    def measures(perplexity: float) -> dict[str, Any]:
        text = {"perplexity": perplexity, "kl": 0.12345, "windows": 20, "length": 512}
        tasks = {"local_arc_easy": {"acc": 0.4321, "acc_stderr": 0.01}}
        return {"texts": dict.fromkeys(TEXTS[:texts], text), "tasks": tasks}

    sizes = {"dense": 538_060_032, "compressed": 452_881_152}
    return {
        "method": method,
        "kept": kept,
        "metrics": {"dense": measures(36.2), "compressed": measures(36.2 * factor)},
        "parameters": sizes
        | {"compressible_dense": 106_168_320, "compressible_compressed": 84_873_600},
        "bytes": sizes,
        "memory": sizes,
        "compute": "float32",
        "seconds": 1234.5,
        "stages": [{"state": "cached"}] * 690 + [{"state": "computed"}] * 6,
        "model_dir": "/home/somebody/.eigenpress/models/smollm2-svd_llm-0.8-9340a6b4",
        "registered": {"name": "smollm2", "version": 1},
    }


def results(texts: int) -> list[dict[str, Any]]:
    factors = iter((1.0, 3.6, 8.1e5, 25.0, 4e12, 1.01))
    return [result(method, kept, texts, next(factors)) for method in METHODS for kept in (0.8, 0.2)]


def test_what_was_kept_is_said_with_the_parts_that_are_entries_and_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = next(iter(results(1))) | {"of": "compressible"}
    for parts, said in (
        ({}, "0.799 of the layers: "),
        ({"entries": 0.251}, "0.799 of the layers, 25.1 % of that in entries: "),
        (
            {"entries": 0.5, "columns": 0.0312},
            "of the layers, 50.0 % of that in entries, 3.1 % of that in columns: ",
        ),
    ):
        Reporter().summary(run | parts)
        assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("texts", [1, 2])
def test_a_sweeps_table_fits_and_breaks_no_heading(
    texts: int, width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = results(texts)
    Reporter().table(runs)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert too_long(lines, width) == []
    assert set(HEADINGS.split()) - ({"text"} if texts == 1 else set()) <= set(printed.split())
    assert "local_arc_easy" in printed.split()
    assert "".join(LONG.split()) in re.sub(r"\s", "", _method_column(lines))
    assert printed.index("perplexity") < printed.index("parameters")
    assert all(label in printed for label in TEXTS[:texts])


def too_long(lines: list[str], width: int) -> list[str]:
    """Lines that could have been broken: a path or a name of a file stays whole."""
    return [line for line in lines if len(line) > width and len(line.split()) > 1]


def _method_column(lines: list[str]) -> str:
    """The first column of the first table, as far as its name goes on without a number."""
    begin = next(i for i, line in enumerate(lines) if line.startswith("cap:"))
    end = next(i for i in range(begin + 1, len(lines)) if lines[i].startswith(("cap:", "svd")))
    return "".join(line.split("  ")[0] for line in lines[begin:end])


def test_numbers_of_a_column_stand_point_below_point(
    width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    Reporter().table(results(1)[:2])
    lines = capsys.readouterr().out.splitlines()
    (first,) = (line.index(".20") for line in lines if " 36.20 " in line)
    (second,) = (line.index(".3 ") for line in lines if " 130.3 " in line)
    assert first == second


def test_numbers_are_padded_to_one_point() -> None:
    assert aligned(["36.2", "1,234", "4.0e+12", "5.125"]) == [
        "36.2  ",
        "1,234    ",
        "4.0e+12",
        "5.125",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (36.2, "36.20"),
        (298.07, "298.1"),
        (999.96, "1,000"),
        (3011000.0, "3,011,000"),
        (4e12, "4.000e+12"),
        (0.5, "0.5000"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_name_breaks_behind_its_signs_and_loses_nothing() -> None:
    wrapped = wrap_name(LONG, 24).splitlines()
    assert wrapped == ["cap:init=activation:", "lambda_scale=0.1:", "refit=prefix"]
    narrow = wrap_name(LONG, 7).splitlines()
    assert max(map(len, narrow)) <= 7 and "".join(narrow) == LONG


def test_columns_that_do_not_fit_go_to_a_further_table_under_the_same_keys() -> None:
    keys = [Column("key", ["a"], name=True)]
    columns = [Column(f"c{i}", ["x" * 10]) for i in range(5)]
    tables = fitted_tables(keys, columns, 30)
    headings = [[str(column.header) for column in table.columns] for table in tables]
    assert headings == [["key", "c0", "c1"], ["key", "c2", "c3"], ["key", "c4"]]


def test_the_summary_fits_but_for_a_path(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    run = results(2)[1]
    reporter = Reporter()
    reporter.summary(run)
    reporter.note("a text whose words go on and on " * 5)
    lines = capsys.readouterr().out.splitlines()
    assert too_long(lines, width) == []
    assert sum(run["model_dir"] in line for line in lines) == 1
    heads = {line.split()[0] for line in lines if line[0] != " "}
    assert heads == {"kept", "perplexity", "local_arc_easy", "model", "registered", "note"}


def test_methods_fit_and_all_are_there(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    list_methods(False, print)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert {"svd", "cap", "Allocators:", "hull", "probe_windows=32", "Pruned:", "Learned:"} <= set(
        printed.split()
    )


def test_the_demonstration_ends_with_words_places_and_a_next_command(
    width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"dense": "goes on\n    and on " * 6, "svd kept 0.4": "on on on"}
    Reporter().demonstration("    def f(", words, Path("/reports/demo"), results(1))
    lines = capsys.readouterr().out.splitlines()
    assert too_long(lines, width) == []
    text = " ".join(" ".join(lines).split())
    assert 'After "def f(" the models write: dense goes on and on goes on' in text
    assert "/reports/demo/perplexity.png" in text and "smollm2 versions 1 to 1" in text
    assert lines[-len(NEXT) :] == list(NEXT)


def test_the_next_command_is_one_that_the_command_line_takes() -> None:
    words = " ".join(NEXT).replace("\\", " ").split()
    assert words[:2] == ["eigenpress", "run"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    values = {name.removeprefix("--"): value for name, value in given.items()}
    assert build_config(RunConfig, values, None).method == DEFAULT_METHOD


def estimated(**changes: Any) -> Estimate:
    return replace(
        Estimate(
            seconds=130.0,
            workers=1,
            alone=130.0,
            stages={"collect": 130.0},
            memory=1_100_000_000,
            largest=Planned("collect", "a", "run", "", None, Cost(memory=1_100_000_000)),
            together=1_900_000_000,
            disk=1_620_000_000,
            models=[400_000_000, 450_000_000],
            free_memory=22_000_000_000,
            free_disk=76_000_000_000,
            computes_in="float32",
            not_counted=["dense on task arc"],
        ),
        **changes,
    )


def test_a_plan_fits(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    units = [
        Planned("decompose", name, "run", "seed 3 → 4, code of compress_core.metric", None, Cost())
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.29.mlp.down_proj")
    ]
    plan_command._print(units, estimated(), ["a note that is long enough to be broken " * 2])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    words = " ".join(printed.split())
    assert "about 2 min 10 s, if the machine does nothing else" in words
    assert "400.0 to 450.0 MB on disk" in words and "will not do" not in words


@pytest.mark.parametrize("more", [0, 1])
def test_memory_is_short_only_where_more_than_is_free_is_needed_beside_libraries(more: int) -> None:
    free = 1_900_000_000 - LIBRARIES
    assert bool(estimated(free_memory=free - more).shortages) == bool(more)


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_plan_says_what_will_not_fit(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan_command._print(
        [Planned("collect", "a", "run", "", None, Cost())],
        estimated(**{f"free_{what}": 1_000_000_000}),
        [],
    )
    words = " ".join(capsys.readouterr().out.split())
    assert f"note {what} will not do: " in words and words.count("will not do") == 1


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Waits until both streams together hold some text, however slow the machine is."""
    held = {"out": "", "err": ""}

    def wait_for(text: str, stream: str) -> str:
        while text not in held[stream]:
            time.sleep(0.005)
            for name, more in zip(held, capsys.readouterr(), strict=True):
                held[name] += more
        return held[stream]

    yield wait_for


def outcome(state: str) -> Outcome:
    return Outcome("decompose", "layer", "0", state, 0.0)


@pytest.mark.parametrize(("stderr", "stream"), [(False, "out"), (True, "err")])
def test_lines_come_while_one_unit_computes(stderr: bool, stream: str, printed: Any) -> None:
    reporter = Reporter(stderr=stderr, every=0.01)
    with reporter.stage("decompose", 30):
        printed("0 of 30; 0 s so far, time left not known yet", stream)
        reporter.advance([outcome("computed")] * 12)
        reporter.group(7)
        reporter.inside("decompose block 12", 3, 7)
        text = printed("12 of 30, block 12  3/7; ", stream)
    assert "decompose    12 of 30" in text
    assert "12 computed" in printed("12 computed", stream)


def test_a_stages_line_has_the_memory_that_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    reporter, peaks = Reporter(), []
    for megabytes in (300, 0):
        with reporter.stage("decompose", 1):
            taken = bytearray(b"x") * (megabytes * 1_000_000)
            time.sleep(0.5)
            del taken  # before the stage ends
        told = capsys.readouterr().out.split(" s  peak ")[1].strip()
        number, unit = told.split()
        peaks.append(float(number) * {"MB": 1, "GB": 1000}[unit])
    assert 250 < peaks[0] - peaks[1] < 350  # of the second stage, not of the process


def test_of_a_stage_that_others_compute_the_line_has_what_the_largest_of_them_took(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told() -> str:
        return " ".join(capsys.readouterr().out.split())

    reporter = Reporter()
    with reporter.stage("decompose", 2):
        reporter.elsewhere(Peak(3_000_000_000, 20_000_000))
        reporter.elsewhere(Peak(2_000_000_000, 40_000_000))
    assert told().endswith(" s peak 3.00 GB, GPU 40 MB a worker")
    with reporter.stage("realise", 2):
        reporter.elsewhere(Peak(1_000_000_000))
    assert told().endswith(" s peak 1.00 GB a worker")
    with reporter.stage("register", 1):
        pass
    assert "a worker" not in told()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(812.4e6, "812 MB"), (999.6e6, "1.00 GB"), (12.34e9, "12.3 GB"), (140e9, "140 GB")],
)
def test_sizes_have_three_digits(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_a_line_comes_at_least_every_thirty_seconds() -> None:
    assert Reporter(stderr=True).every == EVERY <= 30


def test_lines_end_with_the_stage_even_if_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(every=0.001)
    with pytest.raises(ZeroDivisionError), reporter.stage("collect", 3):
        raise ZeroDivisionError
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_time_left_leaves_out_what_was_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(console_module, "perf_counter", lambda: clock[0])
    reporter = Reporter()
    reporter._begin("decompose", 30)
    reporter.advance([outcome("cached")] * 10 + [outcome("computed")] * 2)
    reporter.group(4)
    reporter.inside("decompose block 3", 1, 2)  # two of its four units
    clock[0] += 60
    told = "12 of 30, block 3  1/2; 1 min so far, 4 min left"
    assert reporter.standing() == told  # four in a minute, sixteen to go


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (59.4, "59 s"),
        (200, "3 min 20 s"),
        (840.0, "14 min"),
        (895.0, "14 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
