"""What every method promises, for all of them: a new file in ``methods`` inherits these tests."""

import dataclasses
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch

import compress_core.methods
from compress_core.allocate.base import Evidence, Probe
from compress_core.coding.parts import CodedParts
from compress_core.decompose import LowRank, Prepared
from compress_core.fit import PREFIX
from compress_core.forms.names import FULL
from compress_core.method import Method
from compress_core.methods import METHODS, build_method
from compress_core.sparse import Sparse
from compress_core.types import LayerRef, Share, Stack, affordable
from tests.by_hand import Seen, evidence_of, make, numbers_of, output_error, prepare
from tests.families import tiny_model, token_batch
from tests.learning import few_turns, prepare_lesson, same, shortened
from tests.made_up import divergence_of, weight_and_inputs

KINDS = {"self_attn.q_proj": (24, 40), "mlp.down_proj": (40, 24), "mlp.up_proj": (32, 32)}
LAYERS = [
    LayerRef(f"model.layers.{block}.{kind}", block, m, n, f"model.layers.{block}.{kind}")
    for block in range(2)
    for kind, (m, n) in KINDS.items()
]
SHARING = [name for name in METHODS if build_method(name).learn is None]  # shares are not trained
PRUNING = [name for name in SHARING if build_method(name).prunes]
LEARNING = [name for name in METHODS if name not in SHARING]


@cache
def seen_by(layer: LayerRef) -> Seen:
    """A weight of rank 2 with some noise, and eight columns that are worth keeping."""
    shape, seed = (
        (layer.out_features, layer.in_features),
        [x.name for x in LAYERS].index(layer.name),
    )
    noise, dense, behind = weight_and_inputs(shape, 200, seed)
    u, s, v = torch.linalg.svd(noise, full_matrices=False)
    weight = (u[:, :2] * s[:2]) @ v[:2] + 0.1 * noise
    weight[:, 8:16] += 2 * noise[:, :8]
    fisher = torch.linspace(0.1, 2, layer.in_features, dtype=torch.float64)
    return Seen(weight, dense, behind, fisher)


@dataclass(frozen=True)
class Result:
    """One stack of layers, compressed."""

    stack: Stack
    share: Share
    stored: list[LowRank | CodedParts]  # none where it stays dense

    @property
    def members(self) -> list[LowRank]:
        return [made.low if isinstance(made, CodedParts) else made for made in self.stored]

    @property
    def numbers(self) -> int:
        layer = self.stack.as_layer
        return numbers_of(self.stored, layer.form) if self.stored else layer.dense_cost


@cache
def decomposed(method: Method) -> dict[str, tuple[Stack, list[Seen], Prepared | None]]:
    """Stacks and decompositions; None for a method that starts from the weight each time."""
    found = {}
    for stack in method.stacks(LAYERS):
        layer, seen = stack.as_layer, [seen_by(member) for member in stack.members]
        prepared = prepare(method, seen, layer.paying_rank) if method.decompose else None
        found[layer.name] = (stack, seen, prepared)
    return found


@cache
def compress(method: Method, kept: float) -> list[Result]:
    parts = decomposed(method)
    layers = [stack.as_layer for stack, _, _ in parts.values()]
    probe = method.allocate.probe(kept)
    shares_probed = probe.shares if isinstance(probe, Probe) else ()
    curves = {
        name: evidence_of(method, seen[0], prepared)
        for name, (_, seen, prepared) in parts.items()
        if method.allocate.reads & {"predicted", "codes"}
    }
    evidence = Evidence(
        losses={name: prepared.loss for name, (_, _, prepared) in parts.items() if prepared},
        similarity={0: 0.9, 1: 0.7},
        divergence={layer.name: divergence_of(layer, shares_probed, 0) for layer in layers},
        tokens=200,
        predicted={name: curve["predicted"] for name, curve in curves.items()},
        codes={name: curve["codes"] for name, curve in curves.items()},
        entries={name: curve["entries"] for name, curve in curves.items()},
        columns={name: curve["columns"] for name, curve in curves.items()},
    )
    method.allocate.check(layers, kept)
    shares = method.allocate.allocate(layers, kept, evidence)
    return [
        Result(
            stack,
            shares[name],
            make(method, seen, prepared, shares[name]) if is_made(shares[name]) else [],
        )
        for name, (stack, seen, prepared) in parts.items()
    ]


def is_made(share: Share) -> bool:
    """Whether a layer stores anything but its weight as it was."""
    return share.rank is not None or share.bits not in (None, FULL)


def pairs(results: list[Result]) -> Iterator[tuple[LayerRef, LowRank]]:
    """The layers that do not stay dense."""
    for result in results:
        if result.stored:
            yield from zip(result.stack.members, result.members, strict=True)


def errors_of(method: str, kept: float = 0.5) -> dict[str, float]:
    """Output error of every layer that does not stay dense."""
    results = compress(build_method(method), kept)
    return {layer.name: output_error(seen_by(layer), low) for layer, low in pairs(results)}


def test_every_file_of_methods_is_in_the_table() -> None:
    files = {module.name for module in pkgutil.iter_modules(compress_core.methods.__path__)}
    assert files == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_has_a_default_that_can_be_given_and_is_explained(name: str) -> None:
    parameters = inspect.signature(METHODS[name]).parameters
    for option in parameters:
        assert f"    {option}: " in (METHODS[name].__doc__ or "")
    defaults = {x: parameter.default for x, parameter in parameters.items()}
    assert inspect.Parameter.empty not in defaults.values()
    given = {x: default for x, default in defaults.items() if default is not None}
    assert build_method(name, given) == build_method(name)


@pytest.mark.parametrize("name", LEARNING)
def test_a_method_that_learns_keeps_the_budget_and_is_deterministic_to_the_bit(name: str) -> None:
    """Exact resume is a fact of the loop and of each learner's own tests."""
    method = build_method(shortened(name))
    assert method.name.partition(":")[0] == name and method == build_method(shortened(name))
    assert method.learn is not None and method.decompose is not None
    school = prepare_lesson(lambda: tiny_model("llama"), method.decompose, token_batch(5, 8, 16))
    learned = school.learn(method.learn, 0.5)
    assert {layer.name for layer in school.layout.layers} == set(learned.chosen)
    assert school.cost(learned) <= affordable(0.5, school.dense_cost)
    assert same(learned, school.learn(method.learn, 0.5))


@pytest.mark.parametrize("name", SHARING)
class TestMethod:
    """One method, at its defaults but for `few_turns`; learners have their own tests."""

    def test_it_carries_its_own_name_and_is_data(self, name: str) -> None:
        method = build_method(name)
        assert method.name == name
        assert method == build_method(name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.name = "other"  # type: ignore[misc]
        for part in (method.weighting, method.allocate, method.fit, method.prefix):
            if part is not None:
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(part, "anything", 1)  # noqa: B010

    def test_what_it_says_it_reads_follows_from_its_parts(self, name: str) -> None:
        method = build_method(name)
        needs = method.weighting.needs
        reads = method.fit.reads if method.fit is not None else frozenset()
        assert method.sequential == (PREFIX in reads)
        assert method.needs_calibration or not (needs or reads)
        assert method.needs_calibration >= method.reads_inputs

    @pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
    def test_it_fits_the_budget_and_no_layer_takes_more_than_its_share(
        self, name: str, kept: float
    ) -> None:
        results = compress(build_method(few_turns(name)), kept)
        names = {layer.name for x in results for layer in x.stack.members}
        assert names == {layer.name for layer in LAYERS}
        for result in results:
            assert result.numbers <= result.share.cost(result.stack.as_layer)
        total = sum(layer.dense_cost for layer in LAYERS)
        assert sum(result.numbers for result in results) <= affordable(kept, total)

    def test_factors_have_the_shape_of_their_layer(self, name: str) -> None:
        for layer, low in pairs(compress(build_method(few_turns(name)), 0.5)):
            assert low.dense().shape == (layer.out_features, layer.in_features)
            assert low.dense().isfinite().all()
            assert low.u.dtype is low.v.dtype is torch.float64

    def test_more_budget_never_costs_quality_in_its_own_metric(self, name: str) -> None:
        for _, _, prepared in decomposed(build_method(few_turns(name))).values():
            if prepared is not None:
                assert (prepared.loss >= 0).all()
                assert (prepared.loss.diff() <= 0).all()

    def test_more_budget_lowers_the_output_error(self, name: str) -> None:
        # What press stores at the next budget may be of another kind, fitted to other inputs.
        # duo_svd divides by what the whole model's outputs say, not by these errors.
        others = {"press": "press:correct=false", "duo_svd": "duo_svd@uniform"}
        alone = others.get(name, few_turns(name))
        errors = [sum(errors_of(alone, kept).values()) for kept in (0.2, 0.4, 0.6, 0.8)]
        assert errors == sorted(errors, reverse=True)

    def test_it_is_deterministic_to_the_bit(self, name: str) -> None:
        one = compress(build_method(few_turns(name)), 0.6)
        for cached in (seen_by, decomposed, compress):
            cached.cache_clear()
        other = compress(build_method(few_turns(name)), 0.6)
        for mine, its in zip(one, other, strict=True):
            assert mine.share == its.share
            for low, again in zip(mine.members, its.members, strict=True):
                assert torch.equal(low.dense(), again.dense())

    def test_it_beats_a_random_projection(self, name: str) -> None:
        results = compress(build_method(few_turns(name)), 0.5)
        rank_of = {layer: x.share.rank for x in results for layer in x.stack.members}
        for layer, low in pairs(results):
            seen, generator = seen_by(layer), torch.Generator().manual_seed(9)
            shape = (layer.out_features, rank_of[layer] or 0)
            random = torch.randn(shape, generator=generator, dtype=torch.float64)
            basis = torch.linalg.qr(random)[0]
            worse = LowRank(basis, basis.T @ seen.weight)
            assert output_error(seen, low) < output_error(seen, worse)

    def test_its_entries_are_exactly_as_many_as_its_share_and_better_than_any(
        self, name: str
    ) -> None:
        for result in compress(build_method(few_turns(name)), 0.5):
            if not result.share.nonzeros:
                assert name not in PRUNING and all(low.sparse is None for low in result.members)
                continue
            (layer,), (low,) = result.stack.members, result.members
            assert low.sparse is not None
            assert (low.rank, low.sparse.nonzeros) == (result.share.rank, result.share.nonzeros)
            numbers = affordable(0.5, layer.dense_cost) if name in PRUNING else low.sparse.nonzeros
            assert result.numbers == result.share.cost(layer)
            seen, generator = seen_by(layer), torch.Generator().manual_seed(9)
            order = torch.randperm(layer.dense_cost, generator=generator)
            mask = (order < numbers).view(seen.weight.shape)
            u, v = low.u[:, :0], low.v[:0]
            worse = LowRank(u, v, sparse=Sparse.of(seen.weight, mask))
            assert output_error(seen, low) < output_error(seen, worse)


@pytest.mark.parametrize("other", ["svd", "fwsvd", "asvd", "saes_svd", "svd_llm:update=u"])
def test_svd_llm_has_the_least_output_error_of_all_at_the_same_ranks(other: str) -> None:
    """Of methods that keep no columns; on the inputs that it was measured on."""
    best, others = errors_of("svd_llm"), errors_of(other)
    assert set(best) == set(others) == {layer.name for layer in LAYERS}
    assert all(best[layer] <= others[layer] * (1 + 1e-6) for layer in best)
    assert sum(best.values()) < 0.999 * sum(others.values())


def test_kept_columns_have_less_output_error_than_svd_llm_at_the_same_budget() -> None:
    plain, kept, refitted = (
        errors_of(name)
        for name in ("svd_llm", "duo_svd@uniform", "duo_svd@uniform:refit_columns=true")
    )
    assert all(kept[layer] <= plain[layer] * (1 + 1e-9) for layer in plain)
    assert sum(refitted.values()) < sum(kept.values()) < 0.95 * sum(plain.values())


def test_asvd_without_scaling_is_svd() -> None:
    assert errors_of("asvd:alpha=0") == pytest.approx(errors_of("svd"), rel=1e-4)


def test_svd_llm_v2_at_uniform_shares_is_svd_llm() -> None:
    assert errors_of("svd_llm_v2@uniform") == errors_of("svd_llm") != errors_of("svd_llm_v2")


def test_basis_sharing_in_groups_of_one_is_svd_llm() -> None:
    alone = compress(build_method("basis_sharing:group=1"), 0.5)
    plain = compress(build_method("svd_llm"), 0.5)
    assert [x.stack for x in alone] == [x.stack for x in plain]
    for one, other in zip(alone, plain, strict=True):
        assert one.share == other.share
        assert torch.equal(one.members[0].dense(), other.members[0].dense())


def test_layers_that_share_a_basis_have_one_in_factor_and_those_of_writers_do_not() -> None:
    results = compress(build_method("basis_sharing"), 0.5)
    assert [len(result.stack.members) for result in results] == [2, 1, 2, 1]
    for result in results:
        assert all(torch.equal(low.v, result.members[0].v) for low in result.members)
