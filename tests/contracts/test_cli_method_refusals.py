"""Methods, allocators and budgets that cannot be: one clear line, exit code 2, before any stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.command_words import words_of
from tests.pipeline import pico

Refuse = Callable[..., str]

BYTES = {"kept": None, "target_bytes": "1KB"}
PERPLEXITY = {"kept": None, "target_perplexity": 9}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown allocator": (
        {"allocate": "even"},
        "unknown allocator 'even'. Allocators: uniform, by_type, ",
    ),
    "unknown allocator of a variant": (
        {"method": "svd_llm@hul"},
        "unknown allocator 'hul'. Did you mean 'hull'? Allocators: uniform, by_type, importance, ",
    ),
    "no variant": ({"method": "svd_llm@"}, "'svd_llm@' is not method[@allocator][:option=value]"),
    "option of no allocator": ({"option": "probe_share=0.2"}, "has no option 'probe_share'; its"),
    "option of an allocator": (
        {"allocate": "hull", "option": "probe_share=1"},
        "probe_share is in (0, 1), got 1",
    ),
    "allocator that measures": (
        {"method": "svd", "allocate": "hull", "calibration": None},
        "method 'svd' needs calibration text: give --calibration FILE",
    ),
    "no sweeps": (
        {"method": "ada_svd", "option": "sweeps=0"},
        "sweeps must be at least 1, got 0; for adaCR alone take --method svd_llm --allocate impor",
    ),
    "no buckets": ({"method": "ada_svd", "option": "buckets=0"}, "buckets must be at least 1, got"),
    "mrr above kept": (
        {"method": "ada_svd", "option": "mrr=0.7"},
        "mrr=0.7 is above kept=0.6: no block may keep less than mrr, so the budget could not be m",
    ),
    "mrr of no kind": ({"method": "ada_svd", "option": "mrr=-1"}, "mrr, the least share a block"),
    "groups that do not divide": (
        {"method": "basis_sharing"},
        "groups of 2 blocks do not divide the model's 3 blocks; groups of 1, 3 do",
    ),
    "groups of none": ({"method": "basis_sharing:group=0"}, "group must be at least 1, got 0"),
    "word that is no choice": (
        {"method": "svd_llm", "option": "update=v"},
        "option 'update' of method 'svd_llm' must be one of none, u; got 'v'",
    ),
    "prefix that is no choice": (
        {"method": "saes_svd:prefix=model"},
        "the prefix grows by 'layer' or by 'block', got 'model'",
    ),
    "target of nothing": ({"method": "ada_svd:toward_dense=2"}, "toward_dense is in [0, 1], got 2"),
    "no probes": ({"method": "duo_svd:probe_windows=0"}, "probe_windows must be at least 1, got 0"),
    "one component is too much": (
        {"method": "duo_svd", "kept": 0.03},
        "kept=0.03 cannot hold one component of each of 21 layers; this model needs kept of at le",
    ),
    "allocator of a method that prunes": (
        {"method": "wanda", "allocate": "hull"},
        "method 'wanda' keeps the same share of every layer: leave out the allocator 'hull'",
    ),
    "pruning without text": (
        {"method": "sparsegpt", "calibration": None},
        "method 'sparsegpt' needs calibration text: give --calibration FILE",
    ),
    "pattern that is none": (
        {"method": "wanda", "option": "pattern=4:2"},
        "pattern is 'unstructured' or N:M with N of every M entries kept, such as 2:4; got '4:2'",
    ),
    "pattern at another budget": (
        {"method": "wanda:pattern=2:4"},
        "pattern=2:4 keeps 0.5 of the layers, got kept=0.6: give --kept 0.5",
    ),
    "pattern and factors at another budget": (
        {"method": "oats", "option": "pattern=2:4"},
        "pattern=2:4 with its factors keeps 0.633 of the layers, got kept=0.6: give --kept 0.633",
    ),
    "pattern that no budget pays for": (
        {"method": "hassle_free:pattern=3:4", "kept": 0.9},
        "stores more than the dense layers do",
    ),
    "pattern that does not divide": (
        {"method": "wanda:pattern=1:5", "kept": 0.2},
        "pattern=1:5 needs inputs that 5 divides; layer model.layers.0.self_attn.q_proj has 32",
    ),
    "adapter that takes everything": (
        {"method": "slim", "kept": 0.1},
        "kept=0.1 leaves layer model.layers.0.self_attn.q_proj (32x32) without a single entry "
        "beside factors of rank 3; this model needs kept of at least 0.1817",
    ),
    "no entry at all": (
        {"method": "wanda", "kept": 0.001},
        "kept=0.001 leaves layer model.layers.0.self_attn.k_proj (16x32) without a single entry;",
    ),
    "codes and a shared in-factor": (
        {"method": "basis_sharing:group=3", "bits": 4},
        "method 'basis_sharing' shares in-factors among layers: leave out bits=4",
    ),
    "bits of each layer and columns": (
        {"method": "duo_svd", "allocate": "prices"},
        "method 'duo_svd' trades ranks for columns at one price of numbers: leave out the "
        "allocator 'prices'",
    ),
    "codes and too little for places": (
        {"method": "cap", "bits": 4, "kept": 0.05, "samples": 16},
        "kept=0.05 leaves nothing beside what is in no codes (places of entries, biases), which "
        "may take 0.0",
    ),
    "codes of no width": (
        {"method": "svd_llm", "bits": 7},
        "bits are 16, or 8, 6, 5, 4, 3, 2 for codes; got 7",
    ),
    "codes without text": (
        {"method": "svd", "bits": 4, "calibration": None},
        "method 'svd' needs calibration text: give --calibration FILE",
    ),
    "codes and updates of low rank": (
        {"method": "svd_llm", "bits": 4, "recover": "lora"},
        "--recover lora makes updates that codes, which 'svd_llm' stores, cannot take in: give --r",
    ),
    "codes that the budget does not hold": (
        {"method": "gptq", "kept": 0.1},
        "kept=0.1 does not hold every number in 2 bits, which take 0.1613 of 16 bits each",
    ),
    "codes that leave no room for what corrects them": (
        {"method": "caldera", "bits": 4, "kept": 0.2},
        "kept=0.2 does not hold every number in 4 bits, which take 0.2903 of 16 bits each: ask for",
    ),
    "no budget": ({"kept": None}, "kept is missing: give one of --kept, --target-bytes and --targ"),
    "two budgets": (
        {"target_bytes": "1MB"},
        "--kept and --target-bytes are two budgets: give one of --kept, --target-bytes and ",
    ),
    "too few bytes": (BYTES, "--target-bytes 1,000 cannot be met: embeddings, norms and head, wh"),
    "bytes for less than a component": (
        BYTES | {"target_bytes": "21.5KiB"},
        "--target-bytes 22,016 cannot be met: embeddings, norms and head take 21,376 bytes, ",
    ),
    "bytes below zero": (BYTES | {"target_bytes": "-5"}, "target_bytes: "),
    "bytes of no unit": (BYTES | {"target_bytes": "1 lot"}, "target_bytes: could not interpret"),
    "perplexity of nothing": (
        PERPLEXITY | {"target_perplexity": 1},
        "--target-perplexity is a number above 1, got 1",
    ),
    "perplexity without text": (
        PERPLEXITY | {"method": "svd", "calibration": None, "eval_text": None, "tasks": "mine"},
        "--target-perplexity needs text to measure it on: give --eval-text FILE",
    ),
    "perplexity and groups": (
        PERPLEXITY | {"method": "basis_sharing"},
        "groups of 2 blocks do not",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_any_stage(
    mistake: str, inputs: pico.Inputs, refuse: Refuse, tmp_path: Path
) -> None:
    changes, expected = MISTAKES[mistake]
    assert expected in refuse(*words_of(inputs, **changes))
    assert not list(tmp_path.rglob("manifest.json"))


MISTAKES_OF_ANY_COMMAND = [
    "mrr above kept",
    "groups that do not divide",
    "no sweeps",
    "pattern that does not divide",
]


@pytest.mark.parametrize("mistake", MISTAKES_OF_ANY_COMMAND)
def test_a_sweep_and_a_plan_refuse_what_a_run_refuses(
    mistake: str, inputs: pico.Inputs, refuse: Refuse, tmp_path: Path
) -> None:
    changes, expected = MISTAKES[mistake]
    method, option = changes["method"], changes.get("option")
    wrong = f"{method}:{option}" if option else method
    methods = words_of(inputs, methods=f"svd,svd_llm,{wrong}", kept="0.8,0.6")[1:]
    assert expected in refuse("sweep", *methods)
    assert expected in refuse("plan", *methods)
    assert expected in refuse("plan", *words_of(inputs, **changes)[1:])


def test_a_plan_of_what_only_evaluating_tells(inputs: pico.Inputs, refuse: Refuse) -> None:
    words = ["plan", *words_of(inputs, **PERPLEXITY)[1:]]
    assert "is known only after evaluating: plan a --kept" in refuse(*words)


def test_a_plan_of_bytes_is_of_one_run(inputs: pico.Inputs, refuse: Refuse) -> None:
    words = words_of(inputs, kept=None, target_bytes="1MB", methods="svd,asvd")[1:]
    assert refuse("plan", *words).startswith(
        "--target-bytes is the budget of one run: no --kept, one meth"
    )
    assert "cannot be met" in refuse("plan", *words_of(inputs, **BYTES)[1:])
