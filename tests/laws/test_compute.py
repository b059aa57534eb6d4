"""In which dtype a model runs: by choice, by its own dtype, by what the device says of itself."""

import pytest
import torch

from compress_core import compute
from compress_core.compute import COMPUTE, HALVES, compute_dtype

STORED = ("float64", "float32", *HALVES)


def flags(monkeypatch: pytest.MonkeyPatch, *found: str) -> None:
    monkeypatch.setattr(compute, "cpu_flags", lambda: frozenset(found))


@pytest.mark.parametrize(
    ("found", "native"),
    [
        ((), ()),
        (("avx512_bf16",), ("bfloat16",)),
        (("amx_bf16",), ("bfloat16",)),
        (("amx_fp16",), ("float16",)),
        (("avx512_bf16", "amx_bf16", "amx_fp16"), HALVES),
    ],
)
def test_auto_on_a_cpu_is_the_models_dtype_where_a_flag_says_it_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, found: tuple[str, ...], native: tuple[str, ...]
) -> None:
    flags(monkeypatch, *found)
    for stored in HALVES:
        assert compute_dtype("auto", stored, "cpu") == (stored if stored in native else "float32")


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        ((6, 1), ()),
        ((7, 0), ("float16",)),
        ((7, 5), ("float16",)),
        ((8, 0), HALVES),
        ((9, 0), HALVES),
    ],
)
def test_auto_on_cuda_goes_by_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], native: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for stored in HALVES:
        wanted = stored if stored in native else "float32"
        assert compute_dtype("auto", stored, "cuda:0") == wanted


@pytest.mark.parametrize("stored", ["float32", "float64"])
def test_wide_models_keep_their_dtype_whatever_the_device(
    monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    flags(monkeypatch)
    assert compute_dtype("auto", stored, "cpu") == compute_dtype("model", stored, "cpu") == stored


@pytest.mark.parametrize("stored", STORED)
def test_a_dtype_that_is_asked_for_is_taken_and_model_is_the_models(
    monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    flags(monkeypatch)
    for choice in COMPUTE:
        if choice not in ("auto", "model"):
            assert compute_dtype(choice, stored, "cpu") == choice
    assert compute_dtype("model", stored, "cpu") == stored


def test_a_device_that_is_neither_cpu_nor_cuda_gets_float32() -> None:
    assert compute_dtype("auto", "bfloat16", "meta") == "float32"


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute is one of auto, float32.*got 'int8'"):
        compute_dtype("int8", "float32", "cpu")


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ppc64le"])
def test_a_cpu_that_is_no_x86_is_asked_nothing(
    monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setattr(compute.platform, "machine", lambda: machine)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    assert compute.cpu_flags() == frozenset()


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("_is_avx512_bf16_supported", "avx512_bf16"),
        ("_is_amx_tile_supported", "amx_bf16"),
        ("_is_amx_fp16_supported", "amx_fp16"),
    ],
)
def test_each_flag_is_what_torch_reads_from_the_cpu(
    monkeypatch: pytest.MonkeyPatch, name: str, flag: str
) -> None:
    monkeypatch.setattr(compute.platform, "machine", lambda: "x86_64")
    for other in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, other, lambda answer=other == name: answer, raising=False)
    assert compute.cpu_flags() == {flag}
