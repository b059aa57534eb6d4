"""In which dtype a model runs; what is stored keeps the model's own.

Without instructions for it, a product in half precision takes several times as long as in float32.
"""

import platform
from collections.abc import Set
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch  # else only where it is asked: the settings read this file, and --help is quick

Compute = Literal["auto", "float32", "bfloat16", "float16", "model"]
COMPUTE: tuple[str, ...] = get_args(Compute)

HALVES = ("bfloat16", "float16")
TENSOR_CORES = {"bfloat16": (8, 0), "float16": (7, 0)}  # least CUDA capability that multiplies it
# Any one of these on x86. oneDNN's own answer to "is bfloat16 supported" is no help: it is yes
# wherever AVX-512 can emulate it, at a fraction of float32's speed.
CPU_FLAGS = {"bfloat16": ("avx512_bf16", "amx_bf16"), "float16": ("amx_fp16",)}


def compute_dtype(choice: str, stored: str, device: "torch.device | str") -> str:
    """The dtype in which a model runs.

    Args:
        choice: One of :data:`COMPUTE`; "auto" is the model's own dtype where the device multiplies
            it natively, else float32.
        stored: The model's own dtype, "bfloat16" for one.
        device: Where it runs.

    Returns:
        The name of a dtype, never "auto" or "model".

    Raises:
        ValueError: There is no such choice.
    """
    if choice not in COMPUTE:
        raise ValueError(f"compute is one of {', '.join(COMPUTE)}, got {choice!r}")
    if choice == "model":
        return stored
    if choice != "auto":
        return choice
    native = stored not in HALVES or multiplies_natively(stored, device)
    return stored if native else "float32"


def multiplies_natively(dtype: str, device: "torch.device | str") -> bool:
    """Whether a device has instructions for products of "bfloat16" or "float16".

    Decided by what the device says of itself, never by a measurement, so that it repeats.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= TENSOR_CORES[dtype]
    return kind == "cpu" and not cpu_flags().isdisjoint(CPU_FLAGS[dtype])


def cpu_flags() -> Set[str]:
    """Of the flags in :data:`CPU_FLAGS`, those of this CPU; none where it is no x86."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    import torch

    asked = {
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx_bf16": "_is_amx_tile_supported",
        "amx_fp16": "_is_amx_fp16_supported",
    }
    # Private functions of torch: one that a version lacks is a flag that cannot be relied on.
    return {flag for flag, name in asked.items() if getattr(torch.cpu, name, lambda: False)()}
