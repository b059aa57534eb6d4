"""Which runs of a sweep are drawn: few enough to tell apart, baselines and best among them."""

import struct
from pathlib import Path
from typing import Any

from compress_core.types import LayerRef
from flows.report.series import BASELINES, MOST_SERIES, sweep_series, training_series
from tasks.tracking.plots import plot_allocation


def runs(rows: dict[str, float], kept: float = 0.4) -> list[dict[str, Any]]:
    return [
        {"method": method, "kept": kept, "metrics": {"compressed": {"perplexity": found}}}
        for method, found in rows.items()
    ]


MANY = {f"method{n}": 10.0 + n for n in range(9)}
PLAIN = {"svd": 30.0, "asvd": 25.0, "svd_llm": 20.0}


def test_a_picture_has_eight_lines_with_the_dense_one_however_many_rows() -> None:
    drawn = sweep_series(runs(MANY | PLAIN))
    assert len(drawn) + 1 == MOST_SERIES
    assert set(BASELINES) <= set(drawn)
    assert set(drawn) - set(BASELINES) == {f"method{n}" for n in range(4)}


def test_the_legend_goes_from_the_worst_line_to_the_best() -> None:
    assert sweep_series(runs(PLAIN | {"soco": 5.0})) == ["svd", "asvd", "svd_llm", "soco"]


def test_a_method_shows_its_best_row_before_another_shows_its_second() -> None:
    variants = {f"soco:steps={n}": 1.0 + n for n in range(9)}
    drawn = sweep_series(runs(PLAIN | variants | {"cap@hull": 19.0, "cap": 19.5}))
    assert {"cap@hull", "soco:steps=0", "soco:steps=1", "soco:steps=2"} < set(drawn)
    assert "cap" not in drawn


def test_recovered_baselines_are_baselines_and_their_variants_are_not() -> None:
    rows = {"svd+factors": 9.0, "svd_llm@hull": 8.0, "svd_llm:update=u": 7.0}
    assert "svd+factors" in sweep_series(runs(MANY | rows | {"svd_llm@hull": 99.0}))
    assert "svd_llm@hull" not in sweep_series(runs(MANY | rows | {"svd_llm@hull": 99.0}))


def test_a_row_that_exploded_does_not_flatten_the_others() -> None:
    assert sweep_series(runs(PLAIN | {"svd_llm_v2": 12767.0})) == list(PLAIN)


def test_the_smallest_budget_is_one_that_all_rows_have() -> None:
    wide = runs({"a": 5.0, "b": 4.0}, 0.6) + runs({"b": 90.0}, 0.2)
    assert sweep_series(wide) == ["a", "b"]


def test_trainings_are_drawn_whole_methods_at_a_time_and_only_where_their_share_moved() -> None:
    def trained(method: str, kept: float, shares: list[float]) -> dict[str, Any]:
        return {"method": method, "kept": kept, "curves": {"kept": shares}}

    budgets = (0.8, 0.6, 0.4)
    given = [trained(name, b, [1.0, b]) for name in ("x", "y", "z") for b in budgets]
    given += [trained("still", b, [b, b]) for b in budgets] + runs({"svd": 1.0})
    drawn = [(run["method"], run["kept"]) for run in training_series(given)]
    assert drawn == [(name, b) for name in ("x", "y") for b in budgets]


def test_the_picture_of_an_allocation_is_no_wider_for_a_deep_model(tmp_path: Path) -> None:
    widths = []
    for blocks in (2, 80):
        names = {f"model.h.{b}.{kind}.c_proj": b for b in range(blocks) for kind in ("a", "mlp")}
        layers = [LayerRef(name, block, 8, 8, name) for name, block in names.items()]
        file = tmp_path / f"{blocks}.png"
        plot_allocation(layers, {name: {"numbers": 32} for name in names}, file)
        widths.append(struct.unpack(">I", file.read_bytes()[16:20])[0])
    assert widths[0] == widths[1] < 1200
