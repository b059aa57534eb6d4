"""How a method is named with allocator and options, where each option goes, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from compress_core.allocate import ALLOCATORS
from compress_core.allocate.entries import Entries
from compress_core.allocate.hull import Hull
from compress_core.allocate.importance import Importance
from compress_core.allocate.knapsack import Knapsack
from compress_core.allocate.uniform import Uniform
from compress_core.errors import ConfigError
from compress_core.fit import Prefix
from compress_core.method import Method, Sharing
from compress_core.methods import METHODS, Variant, build_method, parse_variant
from compress_core.methods.basis_sharing import WRITERS
from compress_core.metric import ActivationScale, FisherScale
from compress_core.prune.adapter import Adapter
from compress_core.prune.alternate import HassleFree, Oats
from compress_core.prune.obs import SparseGPT
from compress_core.prune.wanda import Wanda
from compress_core.refine.columns import PreserveColumns
from compress_core.refine.cross_truncation import CrossTruncate
from compress_core.refine.least_squares import Alternate
from compress_core.types import LayerRef, Stack


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("svd", Variant("svd", None, {})),
        ("svd@hull", Variant("svd", "hull", {})),
        ("asvd:alpha=0.3", Variant("asvd", None, {"alpha": "0.3"})),
        (
            "duo_svd@uniform:refit_columns=true:search=grid",
            Variant("duo_svd", "uniform", {"refit_columns": "true", "search": "grid"}),
        ),
        ("a:b=c=d", Variant("a", None, {"b": "c=d"})),
        ("wanda:pattern=2:4", Variant("wanda", None, {"pattern": "2:4"})),
        (
            "slim:pattern=2:4:mask=sparsegpt",
            Variant("slim", None, {"pattern": "2:4", "mask": "sparsegpt"}),
        ),
    ],
)
def test_a_variant_is_read_as_method_allocator_and_options(text: str, variant: Variant) -> None:
    assert parse_variant(text) == variant


@pytest.mark.parametrize(
    "text",
    [
        "",
        "duo_svd@",
        "x:y",
        "@hull",
        "@",
        ":alpha=1",
        "asvd:",
        "asvd::alpha=1",
        "asvd:alpha=",
        "asvd:=1",
        "asvd:=",
        "duo_svd@:search=grid",
        "asvd:alpha=1:alpha=2",
        "asvd:alpha=1:",
        "wanda:pattern=2:4:8",
        "wanda:pattern=2:4x",
        "wanda:2:4",
    ],
)
def test_what_is_not_a_variant_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build_method(text)
    assert str(refusal.value) == (
        f"{text!r} is not method[@allocator][:option=value]..., "
        "for instance duo_svd@uniform:refit_columns=true"
    )


SELF_DIVIDING = {
    **{x: "learns its shares" for x in METHODS if build_method(x).learn},
    **{x: "keeps the same share of every layer" for x in METHODS if build_method(x).prunes},
    **{x: "keeps the whole weight of every layer" for x in METHODS if build_method(x).rounds},
}
UNPRICED = {
    "duo_svd": "trades ranks for columns at one price of numbers",
    "basis_sharing": "shares in-factors among layers",
}
"""Methods whose parts have no price in codes."""


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SELF_DIVIDING])
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_any_method_goes_with_any_allocator(method: str, allocator: str) -> None:
    if allocator == "prices" and method in UNPRICED:
        refused = f"{UNPRICED[method]}: leave out the allocator 'prices'"
        with pytest.raises(ConfigError, match=refused):
            build_method(f"{method}@{allocator}")
        return
    text = method
    if method == "press" and allocator != "prices":  # bits are of its own price list, or said
        for unsaid in (f"press@{allocator}", f"press@{allocator}:code_group=64"):
            with pytest.raises(ConfigError, match="this one chooses none: give bits=16, or 8, 6"):
                build_method(unsaid)
        text = "press:bits=16"
    built = build_method(text, allocate=allocator)
    assert built.allocate == ALLOCATORS[allocator]()
    assert built.name == method
    assert built == build_method(text.replace(method, f"{method}@{allocator}"))
    measured = allocator in ("importance", "hull", "fisher", "prices", "knapsack")
    assert built.needs_calibration == (build_method(method).needs_calibration or measured)


@pytest.mark.parametrize("method", SELF_DIVIDING)
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_method_that_divides_the_budget_itself_takes_no_allocator(
    method: str, allocator: str
) -> None:
    for text, beside in ((f"{method}@{allocator}", None), (method, allocator)):
        with pytest.raises(ConfigError) as refusal:
            build_method(text, allocate=beside)
        assert str(refusal.value) == (
            f"method {method!r} {SELF_DIVIDING[method]}: leave out the allocator {allocator!r}"
        )


def test_an_option_goes_to_the_method_or_to_the_allocator_that_is_named() -> None:
    built = build_method("asvd@hull:alpha=0.25:probe_share=0.2")
    assert (built.weighting, built.allocate) == (ActivationScale(alpha=0.25), Hull(probe_share=0.2))
    assert build_method("ada_svd:mrr=0.3").allocate == Importance(mrr=0.3)
    assert build_method("ada_svd@importance:mrr=0.3").allocate == Importance(mrr=0.3)
    assert build_method("duo_svd:probe_windows=8").allocate == Knapsack(probe_windows=8)
    assert build_method("duo_svd@hull:probe_windows=8").allocate == Hull(probe_windows=8)
    assert build_method("svd_llm@importance", {"mrr": 0.2}).allocate == Importance(mrr=0.2)


def test_what_the_text_says_comes_before_what_is_given_beside_it() -> None:
    built = build_method("asvd@hull:alpha=0.25", {"alpha": 0.9, "epsilon": 1e-3}, "uniform")
    assert built.weighting == ActivationScale(alpha=0.25, epsilon=1e-3)
    assert built.allocate == Hull()
    assert build_method("asvd", {"alpha": 0.9}, "uniform").allocate == Uniform()


def test_options_are_read_as_the_type_of_their_default() -> None:
    assert build_method("asvd:alpha=0.25") == build_method("asvd", {"alpha": 0.25})
    assert build_method("ada_svd", {"toward_dense": 0, "sweeps": "3"}).fit == Alternate(3, 0.0)
    for text, value in (("true", True), ("TRUE", True), ("false", False)):
        built = build_method("duo_svd", {"refit_columns": text})
        assert built == build_method("duo_svd", {"refit_columns": value})
        assert built.fit == PreserveColumns(refit=value, form="auto")


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        ("fwsvd:epsilon=0.1", "weighting", FisherScale(epsilon=0.1)),
        ("svd_llm", "fit", None),
        ("svd_llm:toward_dense=0.5", "fit", None),
        ("svd_llm:update=u", "fit", Alternate(0, 0.0)),
        ("svd_llm:update=u:toward_dense=0.5", "fit", Alternate(0, 0.5)),
        ("svd_llm:update=u:prefix=block", "prefix", Prefix("block", 0)),
        ("ada_svd", "prefix", Prefix("layer", 64)),
        ("ada_svd:buckets=4", "prefix", Prefix("layer", 4)),
        ("ada_svd:calibration=streaming:buckets=4", "prefix", Prefix("layer", 0)),
        ("ada_svd:sweeps=3", "fit", Alternate(3, 1.0)),
        ("duo_svd:search=grid:accept=0", "fit", PreserveColumns(False, "grid", 0.0, "auto")),
        ("saes_svd:alpha_least=0:alpha_most=2", "fit", CrossTruncate(0, 2)),
        ("basis_sharing:group=4", "sharing", Sharing(4, WRITERS)),
        ("basis_sharing", "fit", None),
        ("wanda:pattern=2:4", "fit", Wanda("2:4")),
        ("wanda:pattern=2:4", "allocate", Entries(pattern="2:4")),
        ("sparsegpt:damping=0.1:blocksize=64", "fit", SparseGPT(0.1, 64)),
        ("oats", "allocate", Entries(low_rank=0.25)),
        ("oats:low_rank=0.5:iterations=8", "fit", Oats(8)),
        ("oats:low_rank=0.5:pattern=2:8", "allocate", Entries(0.5, pattern="2:8")),
        ("slim", "allocate", Entries(adapter=0.1)),
        ("slim:mask=sparsegpt:damping=0.1", "fit", Adapter("sparsegpt", 0.1)),
        ("hassle_free", "allocate", Entries(low_rank=0.3)),
        ("hassle_free:iterations=5", "fit", HassleFree(5)),
        ("basis_sharing:update=u", "fit", Alternate(0, 0.0)),
    ],
)
def test_options_set_what_they_are_for(text: str, part: str, expected: Any) -> None:
    assert getattr(build_method(text), part) == expected


def test_what_a_refiner_reads_makes_a_method_read_it() -> None:
    plain = Method("mine", "", "")
    assert not (plain.needs_calibration or plain.reads_inputs or plain.sequential)
    columns = Method("mine", "", "", fit=PreserveColumns())
    assert columns.needs_calibration and columns.reads_inputs and not columns.sequential
    update = Method("mine", "", "", fit=Alternate())
    assert update.needs_calibration and update.sequential and not update.reads_inputs
    pruned = Method("mine", "", "", decompose=None, fit=Wanda())
    assert pruned.needs_calibration and pruned.sequential and not pruned.reads_inputs


def test_updates_make_a_method_sequential() -> None:
    for name in ("svd_llm", "basis_sharing"):
        assert not build_method(name).sequential
        assert build_method(f"{name}:update=u").sequential


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("svd-llm", {}, "unknown method 'svd-llm'. Did you mean 'svd_llm'? Methods: svd, fwsvd,"),
        ("zzz", {}, "unknown method 'zzz'. Methods: svd, fwsvd,"),
        ("svd@knapsac", {}, "unknown allocator 'knapsac'. Did you mean 'knapsack'? Allocators: "),
        ("svd@hull@uniform", {}, "unknown allocator 'hull@uniform'. "),
        ("asvd", {"alfa": 1}, "method 'asvd' has no option 'alfa'; its options: alpha, epsilon"),
        ("svd", {"alpha": 1}, "method 'svd' has no option 'alpha'; its options: factors"),
        ("svd@importance:alpha=1", {}, "has no option 'alpha'; its options: factors, metric, "),
        ("svd:mrr=0.1", {}, "has no option 'mrr'; its options: factors"),
        ("asvd", {"alpha": "much"}, "option 'alpha' of method 'asvd' must be a float, got 'much'"),
        ("asvd", {"alpha": True}, "must be a float, got True"),
        ("asvd", {"alpha": -1}, "asvd needs alpha >= 0 and epsilon > 0, got alpha=-1"),
        ("asvd", {"alpha": "nan"}, "is no number to compute with"),
        ("asvd", {"epsilon": 0}, "epsilon > 0, got alpha=0.5, epsilon=0"),
        ("fwsvd", {"epsilon": 0}, "fwsvd needs epsilon > 0, got 0"),
        ("fwsvd", {"epsilon": "inf"}, "is no number to compute with"),
        ("svd_llm", {"update": "v"}, "of method 'svd_llm' must be one of none, u; got 'v'"),
        ("svd_llm", {"prefix": "row"}, "the prefix grows by 'layer' or by 'block', got 'row'"),
        ("svd_llm", {"toward_dense": 2}, "toward_dense is in [0, 1], got 2"),
        ("ada_svd", {"sweeps": 0}, "sweeps must be at least 1, got 0; for adaCR alone take "),
        ("ada_svd", {"sweeps": 1.5}, "option 'sweeps' of method 'ada_svd' must be an int, got 1.5"),
        ("ada_svd", {"sweeps": "two"}, "must be an int, got 'two'"),
        ("ada_svd", {"sweeps": True}, "must be an int, got True"),
        ("ada_svd", {"buckets": 0}, "buckets must be at least 1, got 0"),
        ("ada_svd", {"calibration": "x"}, "must be one of stack_of_batch, streaming; got 'x'"),
        ("ada_svd", {"toward_dense": -0.5}, "toward_dense is in [0, 1], got -0.5"),
        ("ada_svd", {"prefix": "row"}, "the prefix grows by 'layer' or by 'block', got 'row'"),
        ("ada_svd", {"mrr": 1}, "mrr, the least share a block keeps, is in (0, 1); got 1"),
        ("ada_svd", {"mrr": "some"}, "option 'mrr' of method 'ada_svd' must be a float"),
        ("duo_svd", {"refit_columns": "yes"}, "must be a bool, got 'yes'"),
        ("duo_svd", {"refit_columns": 1}, "must be a bool, got 1"),
        ("duo_svd", {"search": "all"}, "must be one of golden, grid; got 'all'"),
        ("duo_svd", {"accept": -1}, "accept, a relative gain in error, is in [0, 1); got -1"),
        ("duo_svd", {"accept": 1}, "accept, a relative gain in error, is in [0, 1); got 1"),
        ("duo_svd", {"probe_windows": 0}, "probe_windows must be at least 1, got 0"),
        ("saes_svd", {"alpha_least": -1}, "alpha needs 0 <= alpha_least <= alpha_most, got -1"),
        ("saes_svd", {"alpha_most": 0.1}, "alpha_least <= alpha_most, got 0.25 and 0.1"),
        ("saes_svd", {"alpha_most": "inf"}, "is no number to compute with"),
        ("saes_svd", {"prefix": "row"}, "the prefix grows by 'layer' or by 'block', got 'row'"),
        ("basis_sharing", {"update": "v"}, "must be one of none, u; got 'v'"),
        ("basis_sharing", {"prefix": "row"}, "the prefix grows by 'layer' or by 'block'"),
        ("basis_sharing", {"group": "two"}, "must be an int, got 'two'"),
        ("basis_sharing", {"group": 0}, "group must be at least 1, got 0"),
        (
            "svd_llm@prices",
            {"entries": True},
            "makes no layer of entries, which allocator 'prices'",
        ),
        ("svd_llm@prices", {"columns": "true"}, "give it: leave out columns=true"),
        ("press", {"columns": "some"}, "option 'columns' of method 'press' must be a bool"),
        ("wanda", {"pattern": "4:2"}, "N:M with N of every M entries kept, such as 2:4; got '4:2'"),
        ("wanda", {"pattern": 2}, "N:M with N of every M entries kept, such as 2:4; got '2'"),
        ("wanda", {"damping": 0.1}, "has no option 'damping'; its options: pattern"),
        (
            "sparsegpt",
            {"damping": "inf"},
            "is no number to compute with",
        ),
        ("sparsegpt", {"blocksize": 0}, "blocksize must be at least 1, got 0"),
        ("oats", {"low_rank": 1}, "low_rank, the factors' part of a layer's numbers, is in [0, 1)"),
        ("oats", {"iterations": 0}, "iterations must be at least 1, got 0"),
        ("slim", {"mask": "magnitude"}, "must be one of wanda, sparsegpt; got 'magnitude'"),
        ("slim", {"rank_share": 1}, "rank_share, a part of the smaller side, is in [0, 1); got 1"),
        ("slim", {"damping": -1}, "damping, a part of the mean of H, is 0 or more; got -1"),
        ("hassle_free", {"own_damping": -1}, "own_damping is 0 or more, got -1"),
        ("hassle_free", {"low_rank": "nan"}, "is no number to compute with"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(
    text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        build_method(text, options)
    assert message in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def layers_of(blocks: int) -> list[LayerRef]:
    sizes = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.down_proj": (8, 16)}
    return [
        LayerRef(f"model.layers.{block}.{kind}", block, m, n, kind)
        for block in range(blocks)
        for kind, (m, n) in sizes.items()
    ]


@pytest.mark.parametrize("method", [name for name in METHODS if not build_method(name).sharing])
def test_other_methods_take_every_layer_by_itself(method: str) -> None:
    layers = layers_of(3)
    built = build_method(method)
    layers, stacks = [replace(layer, form=built.form) for layer in layers], built.stacks(layers)
    assert stacks == [Stack((layer,)) for layer in layers]
    assert [stack.as_layer for stack in stacks] == layers


@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_like_layers_of_adjacent_blocks_share_and_writers_do_not(group: int) -> None:
    layers = layers_of(6)
    stacks = build_method("basis_sharing", {"group": group}, factors="plain").stacks(layers)
    members = [layer for stack in stacks for layer in stack.members]
    assert sorted(members, key=layers.index) == layers
    for stack in stacks:
        kinds = {layer.name.split(".", 3)[3] for layer in stack.members}
        assert len(kinds) == 1
        blocks = [layer.block for layer in stack.members]
        first = blocks[0] if kinds == {"mlp.down_proj"} else blocks[0] // group * group
        size = 1 if kinds == {"mlp.down_proj"} else group
        assert blocks == list(range(first, first + size))
    places = [layers.index(stack.members[0]) for stack in stacks]
    assert places == sorted(places)


def test_layers_of_unlike_size_do_not_share() -> None:
    layers = [LayerRef(f"h.{b}.fc1", b, 8 + 4 * (b == 1), 8, "x") for b in range(4)]
    stacks = build_method("basis_sharing").stacks(layers)
    assert [[layer.block for layer in stack.members] for stack in stacks] == [[0], [1], [2, 3]]


@pytest.mark.parametrize(
    ("group", "blocks", "fitting"),
    [(4, 6, "1, 2, 3, 6"), (2, 5, "1, 5"), (12, 6, "1, 2, 3, 6")],
)
def test_groups_that_do_not_divide_are_refused_with_those_that_do(
    group: int, blocks: int, fitting: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        build_method("basis_sharing", {"group": group}).stacks(layers_of(blocks))
    assert str(refusal.value) == (
        f"groups of {group} blocks do not divide the model's {blocks} blocks; "
        f"groups of {fitting} do"
    )


@pytest.mark.parametrize("text", ["ada_svd@uniform:mrr=0.3", "duo_svd@hull:sweeps=2:mrr=1"])
def test_an_option_of_a_replaced_allocator_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"which 'uniform' replaces|no option 'sweeps'"):
        build_method(text)


def test_other_options_go_with_another_allocator() -> None:
    assert build_method("ada_svd@uniform:sweeps=3").allocate == build_method("svd").allocate
