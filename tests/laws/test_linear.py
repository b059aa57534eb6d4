"""A module counts as a linear layer by what it computes, whatever its class is called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, weight_norm
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from compress_core.hf.linear import is_linear


class Named(nn.Linear):
    """Another name, another constructor."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2 * width, bias=False)


class Added(nn.Linear):
    """The bias by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return input.matmul(self.weight.t()) + (0 if self.bias is None else self.bias)


class Scaled(nn.Linear):
    scale = 0.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class Shifted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight + 1, self.bias)


class Clipped(nn.Linear):
    """As Gemma 4 clips what some layers read: only large numbers tell."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-1e4, 1e4))


class Rounded(nn.Linear):
    """As BitNet rounds what a layer reads."""

    def forward(self, input: Tensor) -> Tensor:
        scale = 127 / input.abs().amax(dim=-1, keepdim=True)
        return super().forward((input * scale).round() / scale)


class Dropping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), 0.5, self.training)


class Wider(nn.Linear):
    """As LoRA's layers: more tensors."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.down = nn.Parameter(torch.zeros(1, width))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Counting(nn.Linear):
    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.register_buffer("calls", torch.zeros(()))


class Turned(nn.Linear):
    """Stores its weight the other way round."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.weight = nn.Parameter(torch.zeros(width, out))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


class Two(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), self.bias


def hooked() -> nn.Module:
    module = nn.Linear(8, 6)
    module.register_forward_hook(lambda _, __, output: output * 2)
    return module


def patched() -> nn.Module:
    module = nn.Linear(8, 6)
    module.forward = lambda input: input  # type: ignore[method-assign]
    return module


SAME: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 6),
    "without bias": lambda: nn.Linear(8, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 8),
    "falcon": lambda: FalconLinear(8, 6),
    "falcon without bias": lambda: FalconLinear(8, 6, bias=False),
    "another constructor": lambda: Named(8),
    "bias by itself": lambda: Added(8, 6),
}
OTHER: dict[str, Callable[[], nn.Module]] = {
    "scaled": lambda: Scaled(8, 6),
    "shifted": lambda: Shifted(8, 6),
    "clipped": lambda: Clipped(8, 6),
    "rounded": lambda: Rounded(8, 6),
    "dropping": lambda: Dropping(8, 6),
    "more parameters": lambda: Wider(8, 6),
    "a buffer": lambda: Counting(8, 6),
    "turned": lambda: Turned(8, 6),
    "two outputs": lambda: Two(8, 6),
    "hooked": hooked,
    "patched": patched,
    "weight norm": lambda: weight_norm(nn.Linear(8, 6)),
    "parametrised": lambda: parametrizations.orthogonal(nn.Linear(8, 6)),
    "bilinear": lambda: nn.Bilinear(8, 8, 6),
    "embedding": lambda: nn.Embedding(8, 6),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_what_computes_a_linear_layer_is_one_and_nothing_else(name: str, fake: bool) -> None:
    if not fake:
        assert is_linear((SAME | OTHER)[name]()) == (name in SAME)
    elif name != "parametrised":  # its constructor needs numbers
        with FakeTensorMode():
            assert is_linear((SAME | OTHER)[name]()) == (name in SAME)


def test_the_module_stays_as_it_was() -> None:
    module = FalconLinear(8, 6)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    assert is_linear(module) and is_linear(module)
    assert module.training and (module.in_features, module.out_features) == (8, 6)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
