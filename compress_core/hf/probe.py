"""How far a whole model moves from the dense one when the weights of a few layers are replaced.

A table of layers and candidates asks this many times, one layer at a time. So the hidden states
that enter a block are kept, with what the block's modules return, and only what follows the changed
layer is computed. Everything outside the blocks is the model's own forward, run with other modules
in place of the blocks that need not run.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress_core.errors import ConfigError, NumericsError, TextError
from compress_core.head import Halves, chunks, forward_of
from compress_core.hf.replay import BlockState, Enter, Skip
from compress_core.types import LayerRef, ModelLayout

KEPT_BYTES = 1 << 28
"""Probabilities of the dense model that a probe holds, so that its head need not run again."""


class DenseLogits:
    """A dense model's predictions on one batch, for KL divergences from it.

    Args:
        halves: The model; its head stays as it is.
        hidden: Its last hidden states (..., width), which are held.
        keep: Bytes of probabilities that may be held beside them; the others are made again of the
            hidden states whenever they are needed. It changes time, not results.

    Raises:
        NumericsError: Logits that are not finite.
    """

    def __init__(self, halves: Halves, hidden: Tensor, keep: int) -> None:
        self._halves = halves
        self._rows = hidden.flatten(0, -2)
        self._kept: dict[int, Tensor] = {}  # first row of a piece -> probabilities
        self._negative_entropy = 0.0  # sum of p log p
        for piece in halves.pieces(len(self._rows)):
            logits = _logits(halves, self._rows[piece])
            p = torch.empty_like(logits, dtype=torch.float32)
            self._negative_entropy += _probabilities(logits, p)
            keep -= p.nbytes
            if keep >= 0:
                self._kept[piece.start] = p
        if not math.isfinite(self._negative_entropy):
            raise NumericsError("probe: the dense model's logits are not finite")

    @property
    def held(self) -> int:
        """Bytes of probabilities that it holds."""
        return sum(p.nbytes for p in self._kept.values())

    def divergence_sum(self, hidden: Tensor) -> float:
        """Sum of KL(dense || changed) over all tokens, nats; below zero by rounding only.

        Args:
            hidden: The changed model's last hidden states, of the dense ones' shape.
        """
        rows = hidden.flatten(0, -2)
        cross = torch.zeros((), dtype=torch.float64, device=rows.device)
        for piece in self._halves.pieces(len(rows)):
            whole_p = self._kept.get(piece.start)
            if whole_p is None:
                dense = _logits(self._halves, self._rows[piece])
                whole_p = dense.softmax(-1, dtype=torch.float32)
                del dense  # or three pieces would be held
            logits = _logits(self._halves, rows[piece])
            for part in chunks(logits):
                log_q = logits[part].log_softmax(-1, dtype=torch.float32)
                cross += torch.linalg.vecdot(whole_p[part], log_q).sum(dtype=torch.float64)
            del logits, whole_p
        return self._negative_entropy - float(cross)


def _probabilities(logits: Tensor, out: Tensor) -> float:
    """Fills in probabilities, and sums p log p over all of them in float64."""
    total = 0.0
    for part in chunks(logits):
        log_p = logits[part].double().log_softmax(-1)
        wide = log_p.exp()
        out[part].copy_(wide)
        total += float(log_p.mul_(wide).sum())
    return total


def _logits(halves: Halves, rows: Tensor) -> Tensor:
    head = halves.model.get_output_embeddings()
    quick = _quick_head(head)
    with nullcontext() if quick is None else forward_of(head, quick):
        return halves.logits(rows)


def _quick_head(head: Any) -> Callable[[Tensor], Tensor] | None:
    """The head's forward as a convolution, where that is a faster way to the same numbers.

    The head is a large part of every measurement, and nothing of it can be reused. On CPUs torch
    leaves float32 products to MKL, which does without AVX-512 on AMD's processors, and convolutions
    of 16 images or more to oneDNN, which uses it: less than half the time.
    """
    usable = type(head) is nn.Linear and torch.backends.mkldnn.is_available()
    if not usable or head.weight.device.type != "cpu" or head.weight.dtype != torch.float32:
        return None

    def forward(x: Tensor) -> Tensor:
        rows, odd = divmod(x.numel() // x.shape[-1], 16)
        if odd:
            return functional.linear(x, head.weight, head.bias)
        images = x.reshape(16, rows, 1, -1).permute(0, 3, 1, 2)
        logits = functional.conv2d(images, head.weight[:, :, None, None], head.bias)
        return logits.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)

    return forward


class KlProbe:
    """KL divergence of changed models from a dense one, on fixed windows.

    Between two calls the model is whole and dense, as it was given.

    Memory: the dense model's last hidden states and KEPT_BYTES of its probabilities at most, a
    piece of logits of both models, and for one block the hidden states around it and what its
    modules return (for a Llama at most 8 hidden and 4 intermediate sizes per token), all on the
    device.

    Args:
        model: A whole dense causal language model on ``device``, in evaluation mode.
        layout: Its layout.
        windows: (samples, length) token ids.
        batch_size: Windows in one forward pass; it changes rounding only.
        device: Where the model is.

    Raises:
        TextError: No windows.
        NumericsError: The dense model's logits are not finite.
    """

    @torch.no_grad()
    def __init__(
        self, model: Any, layout: ModelLayout, windows: Tensor, *, batch_size: int, device: str
    ) -> None:
        if windows.ndim != 2 or 0 in windows.shape:
            raise TextError(
                f"windows have shape {tuple(windows.shape)}; expected (samples, length)"
            )
        self._model = model
        self._layout = layout
        self._refs = {layer.name: layer for layer in layout.layers}
        self._modules = {name: model.get_submodule(name) for name in self._refs}
        self._blocks = [model.get_submodule(path) for path in layout.blocks]
        container = model.get_submodule(layout.blocks[0].rpartition(".")[0])
        assert isinstance(container, nn.ModuleList)
        self._container = container
        self._skips = [
            Skip(block, [], length)
            for block, length in zip(self._blocks, layout.output_lengths, strict=True)
        ]
        self._batches = windows.to(device).split(batch_size)
        self._tokens = windows.numel()
        self._halves = Halves(model)
        self._dense: list[DenseLogits] = []
        keep = KEPT_BYTES
        for batch in self._batches:
            self._dense.append(DenseLogits(self._halves, self._halves.hidden(batch), keep))
            keep -= self._dense[-1].held
        self._base: dict[str, nn.Parameter] = {}
        self._base_kl: float | None = None
        self._block = 0
        self._states: list[BlockState] = []

    def set_base(self, weights: Mapping[str, Tensor]) -> None:
        """Sets what the other layers are; the probe is at block 0 again.

        Args:
            weights: Layer name to effective weight (out, in); layers not named are dense.

        Raises:
            ConfigError: A layer that the model does not have, or a weight of another shape.
        """
        self._base = self._parameters(weights)
        self._base_kl = None
        self._block = 0
        self._states = []

    @torch.no_grad()
    def enter(self, block: int) -> None:
        """From now on the earliest change is in ``block``.

        Goes on from the block entered last; going back starts again at the embeddings.

        Raises:
            ConfigError: No such block.
        """
        if not 0 <= block < len(self._blocks):
            raise ConfigError(f"there is no block {block} among {len(self._blocks)}")
        if self._states and block == self._block:
            return
        going_on = bool(self._states) and block > self._block
        first = self._block + 1 if going_on else 0
        given = [state.after if going_on else None for state in self._states or self._batches]
        self._states = []  # the memo is freed before another is made
        start = self._stand_in(first)
        target = start if block == first else self._stand_in(block)
        target.watched = {ref.name: self._modules[ref.name] for ref in self._layout.of_block(block)}
        through: dict[int, nn.Module] = {first: start, block: target}
        after = None
        if block + 1 < len(self._blocks):
            following = self._blocks[block + 1]
            after = Skip(following, [], self._layout.output_lengths[block + 1])
            after.notes = True
            through[block + 1] = after
        states = []
        with self._weights(self._base), self._running(first, block, through):
            for index, batch in enumerate(self._batches):
                start.hidden, given[index] = given[index], None
                self._model.base_model(input_ids=batch, use_cache=False)
                states.append(target.state)
                target.state.after = None if after is None else after.noted
        self._block, self._states = block, states

    def base_kl(self) -> float:
        """KL(dense || base), mean nats per token; computed once.

        Raises:
            NumericsError: It is not finite.
        """
        if self._base_kl is None:
            self._base_kl = self._divergence({})
        return self._base_kl

    def measure(self, changes: Mapping[str, Tensor]) -> float:
        """KL(dense || base with ``changes``), mean nats per token; the base stays as it is.

        Args:
            changes: Layer name to effective weight (out, in).

        Raises:
            ConfigError: The earliest layer is not in the entered block, a layer that the model does
                not have, or a weight of another shape.
            NumericsError: The divergence is not finite; names the layers.
        """
        if not changes:
            return self.base_kl()
        parameters = self._parameters(changes)
        earliest = min(self._refs[name].block for name in changes)
        if earliest != self._block:
            raise ConfigError(
                f"the earliest of {', '.join(changes)} is in block {earliest}, but the probe has "
                f"entered block {self._block}"
            )
        return self._divergence(parameters)

    @torch.no_grad()
    def _divergence(self, changes: Mapping[str, nn.Parameter]) -> float:
        self.enter(self._block)
        start, last = self._stand_in(self._block), len(self._blocks) - 1
        inside = [name for name in changes if self._refs[name].block == self._block]
        total = 0.0
        weights = self._weights({**self._base, **changes})
        with weights, self._running(self._block, last, {self._block: start}):
            for batch, dense, state in zip(self._batches, self._dense, self._states, strict=True):
                start.hidden = state.hidden
                with state.memo.replay(inside) if inside else nullcontext():
                    hidden = self._halves.hidden(batch)
                total += dense.divergence_sum(hidden)
        mean = total / self._tokens
        if not math.isfinite(mean):
            names = ", ".join(changes) or "the base"
            raise NumericsError(f"probe: with the weights of {names} the divergence is not finite")
        return max(mean, 0.0)  # below zero it can only be by rounding

    def _parameters(self, weights: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        return {name: self._parameter(name, weight) for name, weight in weights.items()}

    def _parameter(self, name: str, weight: Tensor) -> nn.Parameter:
        ref: LayerRef | None = self._refs.get(name)
        if ref is None:
            raise ConfigError(f"the model has no layer {name}")
        if weight.shape != (ref.out_features, ref.in_features):
            raise ConfigError(
                f"layer {name} is {ref.out_features} by {ref.in_features}, but its new weight has "
                f"shape {tuple(weight.shape)}"
            )
        stored = weight.T if ref.transposed else weight
        like = self._modules[name].weight
        value = stored.detach().to(like.device, like.dtype).contiguous()
        return nn.Parameter(value, requires_grad=False)

    @contextmanager
    def _weights(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """While it is open, the layers have these weights."""
        dense = {name: self._modules[name]._parameters["weight"] for name in parameters}
        try:
            for name, parameter in parameters.items():
                self._modules[name]._parameters["weight"] = parameter
            yield
        finally:
            for name, parameter in dense.items():
                self._modules[name]._parameters["weight"] = parameter

    def _stand_in(self, block: int) -> Enter:
        return Enter(self._blocks[block], [], self._layout.output_lengths[block])

    @contextmanager
    def _running(self, first: int, last: int, through: Mapping[int, nn.Module]) -> Iterator[None]:
        """While it is open, only the blocks ``first`` to ``last`` run, some through others."""
        skipped = {i: s for i, s in enumerate(self._skips) if not first <= i <= last}
        try:
            for index, module in {**skipped, **through}.items():
                self._container[index] = module
            yield
        finally:
            for index, block in enumerate(self._blocks):
                self._container[index] = block
