"""What every allocator promises, for all of them: a line in ``ALLOCATORS`` inherits these tests."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compress_core.allocate import ALLOCATORS, DEVICE, allocator_options, build_allocator
from compress_core.allocate.base import Curvature, Evidence, Probe
from compress_core.allocate.predict import rounded
from compress_core.allocate.spend import step_cost
from compress_core.allocate.uniform import Uniform
from compress_core.errors import BudgetError, ConfigError
from compress_core.forms.names import FACTORS, FULL, WIDTHS
from compress_core.methods import build_method
from compress_core.types import LayerRef, Share, affordable
from flows.settings.checks import check_methods
from flows.settings.config import RunConfig
from tests.made_up import SEEDS, SHAPES, evidence_for, layers_of

KEPT = st.floats(0.05, 1.0)
FORMS = st.sampled_from(FACTORS)
NOISE = st.sampled_from([0.0, 0.3])


def divided(
    name: str, layers: list[LayerRef], kept: float, seed: int, noise: float = 0.0
) -> dict[str, Share]:
    """The allocation, where the allocator does not refuse the budget."""
    allocator = build_allocator(name)
    try:
        allocator.check(layers, kept)
    except BudgetError:
        assume(False)
    return allocator.allocate(layers, kept, evidence_for(allocator, layers, kept, seed, noise))


def cost_of(layers: list[LayerRef], shares: Mapping[str, Share]) -> int:
    return sum(shares[layer.name].cost(layer) for layer in layers)


def dense_cost(layers: list[LayerRef]) -> int:
    return sum(layer.dense_cost for layer in layers)


def cheapest(name: str, layer: LayerRef) -> int:
    """Numbers of the least that a layer can store."""
    widths = (FULL, *WIDTHS) if name == "prices" else (FULL,)
    priced = [replace(layer, bits=bits) for bits in widths]
    return min(min(x.atom_cost, x.dense_cost) for x in priced)


def dearer(layer: LayerRef, share: Share) -> Iterator[Share]:
    """Shares of one component more in as many bits, or of the whole weight in more bits."""
    bits = share.bits or FULL
    if share.rank is None:
        yield from (Share(None, bits=more) for more in (FULL, *WIDTHS) if more > bits)
    elif share.rank < min(replace(layer, bits=bits).paying_rank, layer.paying_rank):
        yield replace(share, rank=share.rank + 1)


def loss_of(layer: LayerRef, share: Share, evidence: Evidence) -> float:
    """KL predicted of a layer, of what is cut and of what is rounded."""
    return rounded([layer], evidence, {layer.name: share})


class Untouchable(Mapping[Any, Any]):
    """Evidence that nobody asked for."""

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError(f"read {key!r}, which is not in `reads`")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("read what is not in `reads`")

    def __len__(self) -> int:
        raise AssertionError("read what is not in `reads`")


@pytest.mark.parametrize("name", ALLOCATORS)
class TestAllocator:
    """One allocator at its defaults."""

    @settings(max_examples=150, deadline=None)
    @given(shapes=SHAPES, form=FORMS, kept=KEPT, seed=SEEDS, noise=NOISE)
    def test_it_never_overspends_and_leaves_nothing_that_would_buy_a_component(
        self,
        name: str,
        shapes: list[tuple[int, int]],
        form: str,
        kept: float,
        seed: int,
        noise: float,
    ) -> None:
        layers = layers_of(shapes, form)
        shares = divided(name, layers, kept, seed, noise)
        left = kept * dense_cost(layers) - cost_of(layers, shares)
        assert left > -1e-6
        for layer in layers:
            rank = shares[layer.name].rank
            assert rank is None or 1 <= rank <= layer.paying_rank
            step = step_cost(layer, shares[layer.name])
            if name == "uniform":  # every layer by itself
                mine = kept * layer.dense_cost - shares[layer.name].cost(layer)
                assert -1e-6 < mine < layer.atom_cost
            elif name == "prices":
                found, read = (
                    shares[layer.name],
                    evidence_for(build_allocator(name), layers, kept, seed),
                )
                for more in dearer(layer, found):
                    worse = loss_of(layer, more, read) >= loss_of(layer, found, read)
                    assert worse or more.cost(layer) - found.cost(layer) > left
            elif step:
                assert left < step <= layer.atom_cost

    @settings(max_examples=30, deadline=None)
    @given(shapes=SHAPES, seed=SEEDS, kept=KEPT)
    def test_it_does_not_depend_on_the_order_of_layers_nor_on_the_run(
        self, name: str, shapes: list[tuple[int, int]], seed: int, kept: float
    ) -> None:
        layers = layers_of(shapes)
        shares = divided(name, layers, kept, seed)
        assert list(shares) == [layer.name for layer in layers]
        assert divided(name, layers, kept, seed) == shares
        assert divided(name, layers[::-1], kept, seed) == shares

    @settings(max_examples=80, deadline=None)
    @given(
        shapes=st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=3),
        seed=SEEDS,
        part=st.floats(0, 1),
    )
    def test_twins_do_not_make_it_depend_on_the_order_of_layers(
        self, name: str, shapes: list[tuple[int, int]], seed: int, part: float
    ) -> None:
        layers, allocator = layers_of([*shapes, *shapes]), build_allocator(name)
        least = sum(min(x.atom_cost, x.dense_cost) for x in layers) / dense_cost(layers)
        kept = least + part * (1 - least)
        try:
            allocator.check(layers, kept)
        except BudgetError:
            assume(False)
        found = evidence_for(allocator, layers, kept, seed)
        twin = {x.name: layers[i % len(shapes)].name for i, x in enumerate(layers)}
        alike = Evidence(
            losses={x: found.losses[twin[x]] for x in found.losses},
            similarity=dict.fromkeys(found.similarity, 0.5),
            divergence={x: found.divergence[twin[x]] for x in found.divergence},
            tokens=found.tokens,
            predicted={x: found.predicted[twin[x]] for x in found.predicted},
            codes={x: found.codes[twin[x]] for x in found.codes},
        )
        shares = allocator.allocate(layers, kept, alike)
        assert allocator.allocate(layers[::-1], kept, alike) == shares

    @settings(max_examples=20, deadline=None)
    @given(
        shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=7),
        less=st.sampled_from([0.0, 1e-12]),
    )
    def test_all_of_the_budget_keeps_every_layer_dense(
        self, name: str, shapes: list[tuple[int, int]], less: float
    ) -> None:
        """And so does what is all of it but for rounding, where shares are not floored singly."""
        layers, kept = layers_of(shapes), 1.0 if name == "uniform" else 1 - less
        assert set(divided(name, layers, kept, seed=0, noise=0.3).values()) == {Share(None)}

    @settings(max_examples=80, deadline=None)
    @given(shapes=SHAPES, low=KEPT, high=KEPT, seed=SEEDS)
    def test_more_budget_stores_no_less_but_for_part_of_a_component(
        self, name: str, shapes: list[tuple[int, int]], low: float, high: float, seed: int
    ) -> None:
        layers = layers_of(shapes)
        few, many = (divided(name, layers, kept, seed) for kept in sorted((low, high)))
        slack = sum(x.atom_cost for x in layers) if name == "uniform" else layers[0].atom_cost
        assert cost_of(layers, few) < cost_of(layers, many) + slack

    @settings(max_examples=80, deadline=None)
    @given(shapes=SHAPES, form=FORMS, kept=KEPT)
    def test_it_refuses_a_budget_exactly_where_it_would_have_to_overspend(
        self, name: str, shapes: list[tuple[int, int]], form: str, kept: float
    ) -> None:
        layers = layers_of(shapes, form)
        budget = affordable(kept, dense_cost(layers))
        one_each = sum(cheapest(name, x) for x in layers)
        try:
            build_allocator(name).check(layers, kept)
        except BudgetError as refusal:
            assert len(str(refusal).splitlines()) == 1
            assert f"kept={kept:g}" in str(refusal)
            of_each = [affordable(kept, x.dense_cost) < x.atom_cost for x in layers]
            assert any(of_each) if name in ("uniform", "knapsack") else one_each > budget
        else:
            assert one_each <= budget

    def test_the_least_budget_that_a_refusal_names_is_enough(self, name: str) -> None:
        layers = layers_of([(30, 30), (12, 12), (9, 40)])
        allocator = build_allocator(name)
        with pytest.raises(BudgetError, match=r"0\.\d+") as refusal:
            allocator.check(layers, 0.01)
        needed = float(str(refusal.value).rsplit("least ", 1)[-1])
        allocator.check(layers, needed)

    def test_it_reads_what_it_says_and_nothing_else(self, name: str) -> None:
        layers = layers_of([(20, 30), (30, 20), (16, 16), (24, 24)])
        allocator = build_allocator(name)
        found = evidence_for(allocator, layers, 0.5, seed=0)

        def only(what: str) -> Any:
            return getattr(found, what) if what in allocator.reads else Untouchable()

        read = Evidence(
            only("losses"),
            only("similarity"),
            only("divergence"),
            found.tokens,
            only("predicted"),
            only("codes"),
        )
        assert cost_of(layers, allocator.allocate(layers, 0.5, read)) > 0
        assert allocator.reads <= {"losses", "similarity", "divergence", "predicted", "codes"}

    def test_it_needs_kilobytes_and_no_factors(self, name: str) -> None:
        allocator = build_allocator(name)
        assert list(inspect.signature(allocator.allocate).parameters) == [
            "layers",
            "kept",
            "evidence",
        ]
        layer = LayerRef("model.layers.0.up_proj", 0, 11008, 4096, "tap")
        found = evidence_for(allocator, [layer], 0.5, seed=0)
        tables = (found.losses, found.divergence, found.predicted, found.codes)
        numbers = sum(len(x) for table in tables for x in table.values())
        assert numbers + len(found.similarity) < 2 * 4096

    def test_it_asks_for_a_probe_exactly_if_it_reads_one(self, name: str) -> None:
        allocator = build_allocator(name)
        probe = allocator.probe(0.55)
        assert isinstance(probe, Probe) == ("divergence" in allocator.reads)
        assert isinstance(probe, Curvature) == ("predicted" in allocator.reads)
        if isinstance(probe, Probe):
            assert probe.windows == 32
            assert all(0 < share <= 1 for share in probe.shares)
            assert probe.base in (None, 0.55)

    def test_it_is_data(self, name: str) -> None:
        allocator = build_allocator(name)
        assert allocator == build_allocator(name)
        assert dataclasses.is_dataclass(allocator)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(allocator, "anything", 1)  # noqa: B010
        for option in set(allocator_options(name)) - {DEVICE}:
            assert option in (inspect.getdoc(type(allocator)) or "")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hul", {}, "unknown allocator 'hul'. Did you mean 'hull'? Allocators: uniform, "),
        ("zzz", {}, "unknown allocator 'zzz'. Allocators: uniform, "),
        ("uniform", {"mrr": 0.1}, "allocator 'uniform' has no option 'mrr'; its options: device"),
        ("knapsack", {"candidates": "1"}, "no option 'candidates'; its options: probe_windows, "),
        ("importance", {"mrr": "lots"}, "option 'mrr' of allocator 'importance' must be a float"),
        ("importance", {"mrr": 0.0}, "mrr, the least share a block keeps, is in (0, 1); got 0"),
        ("importance", {"mrr": 1}, "is in (0, 1); got 1"),
        ("importance", {"mrr": float("nan")}, "nan is no number to compute with"),
        ("hull", {"probe_share": 0}, "probe_share is in (0, 1), got 0"),
        ("hull", {"probe_share": "1"}, "probe_share is in (0, 1), got 1"),
        ("hull", {"probe_windows": 0}, "probe_windows must be at least 1, got 0"),
        ("hull", {"probe_windows": 1.5}, "must be an int, got 1.5"),
        ("fisher", {"windows": -1}, "windows must be at least 0 (0 for all), got -1"),
        ("fisher", {"labels": "txt"}, "must be one of sampled, text; got 'txt'. Did you mean 'te"),
        ("fisher", {"damp": -0.1}, "damp must be at least 0, got -0.1"),
        ("knapsack", {"probe_windows": -1}, "probe_windows must be at least 1, got -1"),
        ("knapsack", {"resolution": 99}, "a resolution of at least 100"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        build_allocator(name, options)
    assert message in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_options_are_read_as_the_type_of_their_default() -> None:
    assert build_allocator("hull", {"probe_share": "0.2"}) == ALLOCATORS["hull"](probe_share=0.2)  # type: ignore[call-arg]
    assert build_allocator("importance", {"mrr": "0.2"}) == ALLOCATORS["importance"](mrr=0.2)  # type: ignore[call-arg]


def test_an_allocator_in_the_table_is_one_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There is no second list: as ``--allocate name`` and as ``method@name``."""
    monkeypatch.setitem(ALLOCATORS, "mine", type("Mine", (Uniform,), {}))
    config = RunConfig(model="m", kept=0.5, allocate="mine", calibration="t", home=tmp_path)
    (built,) = check_methods(config, ["svd_llm"], [0.5]).values()
    assert type(built.allocate) is ALLOCATORS["mine"]
    assert type(build_method("svd_llm@mine").allocate) is ALLOCATORS["mine"]
