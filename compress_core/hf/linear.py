"""Which modules are linear layers that we know how to replace: decided by what they compute."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.pytorch_utils import Conv1D

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_SIZES = 3, 5  # in and out of what a subclass is tried with
_SCALES = 1e-6, 1.0, 1e6  # one that clips or rounds shows at one of them


def is_linear(module: nn.Module) -> bool:
    """Whether a module is y = x Wᵀ + b and nothing more, so that factors can take its place.

    A subclass of `nn.Linear` counts if it computes what that computes (Falcon's does): tried on a
    few numbers, in its own forward, with a weight of ours. One with more tensors, with hooks, with
    a parametrised weight or with another product does not.
    """
    plain = type(module) in (nn.Linear, Conv1D)
    if not plain and not isinstance(module, nn.Linear):
        return False
    tensors = {name for name, value in module._parameters.items() if value is not None}
    tensors |= {name for name, value in module._buffers.items() if value is not None}
    others = tensors - {"weight", "bias"} or module._modules
    if "weight" not in tensors or others or any(getattr(module, hooks) for hooks in _HOOKS):
        return False
    return (plain and "forward" not in vars(module)) or _computes_linear(module)


def _computes_linear(module: Any) -> bool:
    in_features, out_features = _SIZES
    if tuple(module.weight.shape) != (module.out_features, module.in_features):
        return False
    with unset_fake_temporarily(), torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        trial = copy.copy(module)
        trial.__dict__ = dict(vars(module))
        trial._parameters = {
            name: None
            if value is None
            else nn.Parameter(_numbers(draw, *[out_features, in_features][: value.ndim]))
            for name, value in module._parameters.items()
        }
        trial.in_features, trial.out_features = in_features, out_features
        inputs = torch.cat([scale * _numbers(draw, 1, 4, in_features) for scale in _SCALES])
        expected = F.linear(inputs, trial.weight, trial.bias)
        try:
            return all(_agrees(trial, inputs, expected, training) for training in (False, True))
        except Exception:  # whatever another kind of layer makes of these numbers: it is another
            return False


def _agrees(trial: Any, inputs: torch.Tensor, expected: torch.Tensor, training: bool) -> bool:
    trial.training = training
    found = trial(inputs.clone())
    return isinstance(found, torch.Tensor) and torch.allclose(found, expected, 1e-12, 1e-18)


def _numbers(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)
