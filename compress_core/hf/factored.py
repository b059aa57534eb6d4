"""A linear layer held as two thin factors, with some columns of the dense weight kept if wanted.

It computes y = (x factor_inᵀ) weightᵀ + bias with weight (out, rank) and factor_in (rank, in). This
file needs PyTorch alone: its text is also written into the folder of every compressed model, so
that the model loads where nothing else of eigenpress is installed.
"""

import math
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn


class FactoredLinear(nn.Linear):
    """A linear layer whose weight is a product, `weight` (out, rank) @ `factor_in` (rank, in).

    With rank 0 both are empty and the product is zero. With c kept columns factor_in is
    (rank, in - c): the product stands for the other columns, and
    y = (x[rest] factor_inᵀ) weightᵀ + x[kept] columnsᵀ + bias.

    It is an `nn.Linear` so that whatever looks for linear layers (LoRA, for one) finds it. The
    out-factor is called `weight` on purpose: a class that knows nothing of factors then fails on
    its shape when it loads the checkpoint, where a name of its own would leave random numbers.

    LoRA adapters train on top but cannot be merged into it: PEFT's `merge_and_unload` raises a
    RuntimeError about sizes, because the adapter's (out, in) update has no place in (out, rank).
    Keep the adapter beside the model, or call `model.dequantize()` before training it. Of PEFT's
    other methods most raise too; MiSS does not and would merge to wrong numbers.

    Attributes:
        weight: The out-factor, (out, rank).
        factor_in: The in-factor, (rank, in - c); one and the same Parameter in layers that share.
        columns: The kept columns, (out, c), or None.
        column_index: The inputs they belong to, (c,), ascending, or None.
        bias: (out,), or None.
        column_count: c.
        transposed: Whether the dense layer kept its weight as (in, out), as GPT-2's Conv1D does.
        layer_name: Its name in the checkpoint's list of layers.
        shared_with: Name of the layer whose in-factor this one uses, or None.
        new_bias: Whether the dense layer had no bias.
    """

    columns: Any
    column_index: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        columns: int = 0,
        transposed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Linear's own constructor would allocate and draw a dense weight only to discard it.
        nn.Module.__init__(self)
        self._describe(in_features, out_features, rank, columns, transposed)
        # Not-a-number until loaded: a factor that was forgotten must not pass for a result.
        self.weight = _unset(out_features, rank, device=device, dtype=dtype)
        self.factor_in = _unset(rank, in_features - columns, device=device, dtype=dtype)
        kept = index = None
        if columns:
            kept = _unset(out_features, columns, device=device, dtype=dtype)
            # 32 bits in memory, as DistributedDataParallel cannot broadcast an int16 buffer.
            index = torch.full((columns,), -1, device=device, dtype=torch.int32)
        self.register_parameter("columns", kept)
        self.register_buffer("column_index", index)
        self.register_parameter(
            "bias", _unset(out_features, device=device, dtype=dtype) if bias else None
        )

    def _describe(
        self, in_features: int, out_features: int, rank: int, columns: int, transposed: bool
    ) -> None:
        """Set all that is no tensor."""
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.column_count = columns
        self.transposed = transposed
        self.layer_name = ""
        self.shared_with: str | None = None
        self.new_bias = False
        self._order: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out) through rank numbers, and the kept inputs beside them."""
        if not self.column_count:
            return F.linear(F.linear(input, self.factor_in), self.weight, self.bias)
        # On the CPU index_select along the last axis takes ten times as long as this gather.
        ordered = input.gather(-1, self._input_order().expand(input.shape))
        sizes = (self.in_features - self.column_count, self.column_count)
        rest, kept = ordered.split(sizes, dim=-1)
        low = F.linear(F.linear(rest, self.factor_in), self.weight, self.bias)
        return low + F.linear(kept, self.columns)

    def dense_weight(self) -> torch.Tensor:
        """What the layer stands for, (out, in): the product rounded once, kept columns exact."""
        return product(self.weight, self.factor_in, self.columns, self.column_index)

    def extra_repr(self) -> str:
        """The sizes, for printing a model."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        more = f", columns={self.column_count}" if self.column_count else ""
        more += f", factor_in={self.shared_with}" if self.shared_with else ""
        return f"{sizes}, rank={self.rank}, bias={self.bias is not None}{more}"

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        # transformers reads it from every module to know what a checkpoint may leave out.
        return {"factor_in": "factor_in"} if self.shared_with else {}

    def _input_order(self) -> torch.Tensor:
        index = self.column_index
        if torch.compiler.is_compiling() or index.is_inference():
            return input_order(index, self.in_features)
        # Another buffer is another object, and writing into one raises its version.
        cached = self._order
        if cached is None or cached[0] is not index or cached[1] != index._version:
            with torch.inference_mode(False):  # what is made inside it cannot serve training later
                cached = (index, index._version, input_order(index, self.in_features))
            self._order = cached
        return cached[2]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.column_count:
            key = f"{prefix}column_index"
            destination[key] = destination[key].to(index_dtype(self.in_features))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None}


def is_factored(module: nn.Module) -> TypeGuard[FactoredLinear]:
    """Whether a module is a FactoredLinear, of this copy of the files or of another.

    Copies in folders of format 1 know neither columns nor sharing, and lack those attributes.
    """
    name = type(module).__name__
    if name == "QuantisedLinear":
        return "codes_in" in module._buffers
    return name in ("FactoredLinear", "SparseLinear") and "factor_in" in module._parameters


def product(
    u: torch.Tensor,
    v: torch.Tensor,
    columns: torch.Tensor | None = None,
    column_index: torch.Tensor | None = None,
    sparse: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense weight (out, in) that factors, kept columns and sparse entries stand for.

    Args:
        u: The out-factor, (out, rank).
        v: The in-factor, (rank, in - c).
        columns: The kept columns, (out, c), or None.
        column_index: The inputs they belong to, (c,), ascending, or None.
        sparse: What is added to the product, (out, in), or None.

    Returns:
        The sum, computed in a wider dtype than theirs and rounded once, among the columns.
    """
    wide = torch.float64 if u.dtype.itemsize >= 4 else torch.float32
    dense = u.to(wide) @ v.to(wide)
    dense = (dense if sparse is None else dense + sparse.to(wide)).to(u.dtype)
    if columns is None or column_index is None:
        return dense
    joined = torch.cat([dense, columns], dim=1)
    place = input_order(column_index, joined.shape[1]).argsort()
    return joined.gather(1, place.expand(joined.shape))


def input_order(column_index: torch.Tensor, in_features: int) -> torch.Tensor:
    """The inputs that are not kept, then the kept ones, both ascending: (in,), int64.

    No shape depends on what the index says, so that it can be part of a compiled graph.
    """
    kept = column_index.long()
    count = kept.numel()
    rest = torch.arange(in_features - count, device=kept.device)
    before = kept - torch.arange(count, device=kept.device)  # inputs of the rest before each
    return torch.cat([rest + torch.searchsorted(before, rest, right=True), kept])


def index_dtype(in_features: int) -> torch.dtype:
    """The dtype a column_index is stored in: int16 where that is wide enough, else int32."""
    return torch.int16 if in_features <= 32767 else torch.int32


def is_column_index(index: torch.Tensor, in_features: int) -> bool:
    """Whether an index (c,) names inputs of a layer, each once and in ascending order."""
    values = index.tolist()
    return bool(values == sorted(set(values).intersection(range(in_features))))


def pays(
    out_features: int,
    in_features: int,
    rank: int,
    columns: int = 0,
    nonzeros: int = 0,
    new_bias: bool = False,
    bits: int = 16,
) -> bool:
    """Whether what a layer stores are fewer numbers than the dense weight.

    An index counts as one number, as two where it needs 32 bits; a sparse entry counts as one and
    its place as none, as in the papers. For layers that share an in-factor `out_features` is the
    sum of theirs. Factors in 8 bits count as numbers of 16, with a scale per component; they have
    no columns.
    """
    if min(rank, nonzeros) < 0 or not 0 <= columns < in_features:
        return False
    index = index_dtype(in_features).itemsize // 2
    stored = rank * (out_features + in_features - columns) + columns * (out_features + index)
    if bits == 8:
        stored = rank * (max(out_features, in_features) + 1)
    stored += nonzeros + (out_features if new_bias else 0)
    return stored < out_features * in_features


def _unset(*shape: int, device: Any, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, math.nan, device=device, dtype=dtype))
