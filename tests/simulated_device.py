"""An accelerator that computes on the CPU, and minds as a real one does where tensors are.

Importing this makes a device ``sim`` for the rest of the process: tensors on it are wrappers that
keep their numbers on the CPU, and an operation that is given one together with a tensor of the CPU
raises :class:`Elsewhere`. So whatever was not moved, or moved back too early, is found without an
accelerator; what kernels of a real one compute is not.
"""

import inspect
import linecache
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"
ROOT = str(Path(__file__).resolve().parents[1])
MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}

forgetful: tuple[str, str] | None = None
"""A file of the project, and words of a line in it, which moves nothing: a mistake, planted."""


class Elsewhere(RuntimeError):
    """A tensor of another device among those of this one."""


class Simulated(Tensor):
    """A tensor on the device."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, raw: Tensor) -> "Simulated":
        with torch.inference_mode(False):  # an inference tensor could not be viewed
            made: Any = Tensor._make_wrapper_subclass(
                cls,
                raw.size(),
                strides=raw.stride(),
                storage_offset=raw.storage_offset(),
                dtype=raw.dtype,
                layout=raw.layout,
                device=torch.device(NAME, 0),
            )
        made.raw = raw
        return made

    def __init__(self, raw: Tensor) -> None:
        """All is done in ``__new__``."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if op._can_decompose():  # in inference mode what is composed comes here whole
            found = op.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return compute(op, args, kwargs or {})

    def tolist(self) -> Any:
        """As of any tensor; torch refuses subclasses."""
        return self.detach().raw.tolist()  # type: ignore[attr-defined]

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Torch's own asks a device for what this one has not."""
        return torch.tensor(data, dtype=self.dtype).to(self.device)


def compute(op: Any, args: Any, kwargs: Any) -> Any:
    """What ``op`` makes of the numbers, on the device again unless it was told to go elsewhere."""
    asked = kwargs.get("device")
    here = asked is None or torch.device(asked).type == NAME
    if op is torch.ops.aten.copy_.default:
        _raw(args[0]).copy_(_raw(args[1]))
        return args[0]
    if op is torch.ops.aten._to_copy.default and asked is not None and here and _forgotten():
        here = False
    take: Callable[[Any], Any] = _raw if op in MOVES else lambda x: _of_device(op, x)
    on_cpu = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    out = op(*tree_map(take, args), **tree_map(take, on_cpu))
    given = {id(x.raw): x for x in tree_iter((args, kwargs)) if isinstance(x, Simulated)}

    def give(x: Any) -> Any:
        if id(x) in given:
            return given[id(x)]  # changed in place
        return Simulated(x) if isinstance(x, Tensor) and here else x

    return tree_map(give, out)


def _raw(x: Any) -> Any:
    return x.raw if isinstance(x, Simulated) else x


def _of_device(op: Any, x: Any) -> Any:
    if isinstance(x, Tensor) and not isinstance(x, Simulated) and x.dim():
        raise Elsewhere(f"{op}: a tensor {tuple(x.shape)} on {x.device} among those of {NAME}")
    return _raw(x)


def _forgotten() -> bool:
    """Whether a line that asks for a move is the forgetful one."""
    if forgetful is None:
        return False
    file, words = forgetful
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == f"{ROOT}/{file}":
            return words in linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return False


def _to_copy(x: Tensor, **kwargs: Any) -> Any:
    return compute(torch.ops.aten._to_copy.default, (x,), kwargs)


def _empty(size: Any, **kwargs: Any) -> Any:
    return compute(torch.ops.aten.empty.memory_format, (size,), kwargs)


def _empty_strided(size: Any, stride: Any, **kwargs: Any) -> Any:
    return compute(torch.ops.aten.empty_strided.default, (size, stride), kwargs)


_setup_privateuseone_for_python_backend(NAME)
_ALL = torch.library.Library("_", "IMPL")
_ALL.fallback(lambda op, *args, **kwargs: compute(op, args, kwargs), "PrivateUse1")
_OWN = torch.library.Library("aten", "IMPL")
_OWN.impl("_to_copy", _to_copy, "PrivateUse1")
_OWN.impl("empty.memory_format", _empty, "PrivateUse1")
_OWN.impl("empty_strided", _empty_strided, "PrivateUse1")
