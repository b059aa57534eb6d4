"""A factored linear with sparse entries beside the product of its factors, or in its place.

Like `factored.py` it needs PyTorch alone and is part of the modelling file in a model folder.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from compress_core.hf.factored import FactoredLinear, _unset, product
from compress_core.sparse import PLACES, index_layout, narrow, positions, unpack, widen

CSR_COST = 6  # time of an entry in CSR, of one in a dense product; docs/benchmarks.md has the table


class SparseLinear(FactoredLinear):
    """A linear layer with the weight `weight` @ `factor_in` + S, S sparse and its mask fixed.

    How it computes follows from sizes, dtype and device alone, so that results repeat:

    * While gradients are wanted, or in a compiled graph, S is scattered from `sparse_values` anew
      and y = U (V x) + S x + b: the values train, the mask stays.
    * On the CPU, where entries are so few that it is faster (`multiplies_sparse`), S is kept in
      CSR, which shares the values' memory, and y = U (V x) + S x + b.
    * Else the whole weight U V + S is put together once and kept, and y = W x + b. That takes the
      memory of the dense weight, as S alone would, and one product instead of three.

    What is kept is made on first use, made again when its parts change, and never saved.

    Attributes:
        nonzeros: How many entries S has.
        sparse_values: The entries, row by row, (nonzeros,).
        sparse_bits: Their places as uint8 (ceil(out * in / 8),), lowest bit first; or, if smaller,
        sparse_columns: int32 (nonzeros,), int16 where it is saved, and
        sparse_counts: int32 (out,), entries in each row.
    """

    sparse_bits: Any
    sparse_columns: Any
    sparse_counts: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        nonzeros: int,
        bias: bool = True,
        *,
        transposed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, rank, bias, transposed=transposed, device=device, dtype=dtype
        )
        self.nonzeros = nonzeros
        self._kept: tuple[str, Any, torch.Tensor] | None = None
        self.sparse_values = _unset(nonzeros, device=device, dtype=dtype)
        if index_layout(out_features, in_features, nonzeros) == "bitmask":
            size = -(-out_features * in_features // 8)
            bits = torch.zeros(size, dtype=torch.uint8, device=device)
            self.register_buffer("sparse_bits", bits)
        else:
            # 32 bits in memory, as DistributedDataParallel cannot broadcast an int16 buffer.
            columns = torch.full((nonzeros,), -1, dtype=torch.int32, device=device)
            counts = torch.zeros(out_features, dtype=torch.int32, device=device)
            self.register_buffer("sparse_columns", columns)
            self.register_buffer("sparse_counts", counts)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        traced = torch.compiler.is_compiling() or input.is_meta
        if traced or self._wants_gradients(input):
            return self._beside(input, F.linear(input, self._scattered()))
        if not self.multiplies_sparse(self.sparse_values.device):
            return F.linear(input, self._keep("dense"), self.bias)
        if torch.is_autocast_enabled("cpu"):  # it would ask CSR for a product in bfloat16
            return self._beside(input, F.linear(input, self._scattered()))
        rows = input.reshape(-1, self.in_features)
        csr = self._keep("csr")
        # For one row the product with a vector takes half the time.
        out = torch.mv(csr, rows[0]) if len(rows) == 1 else (csr @ rows.T).T
        return self._beside(input, out.reshape(*input.shape[:-1], self.out_features).contiguous())

    def dense_weight(self) -> torch.Tensor:
        """What the layer stands for, (out, in): the sum rounded once."""
        return product(self.weight, self.factor_in, sparse=self._scattered())

    def multiplies_sparse(self, device: torch.device) -> bool:
        """Whether S is multiplied in CSR on `device`: where it is faster than the dense weight.

        Only the CPU's MKL is asked, which has it in 32 and 64 bits.
        """
        if device.type != "cpu" or not torch.backends.mkl.is_available():
            return False
        if self.sparse_values.dtype not in (torch.float32, torch.float64):
            return False
        factors = self.rank * (self.out_features + self.in_features)
        return factors + CSR_COST * self.nonzeros <= self.out_features * self.in_features

    def places(self) -> Mapping[str, torch.Tensor]:
        """Where the entries are, as `compress_core.sparse` packs it."""
        buffers = {name: self._buffers.get(name) for name in PLACES}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    def check_places(self) -> None:
        """Raise ValueError unless loaded places are those of as many entries; widen them."""
        unpack(self.places(), self.out_features, self.in_features, self.nonzeros)
        if "sparse_columns" in self._buffers:
            self.sparse_columns = widen(self.sparse_columns)

    def extra_repr(self) -> str:
        """The sizes, for printing a model."""
        return f"{super().extra_repr()}, nonzeros={self.nonzeros}"

    def _beside(self, input: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """The output of factors and bias added to that of S."""
        if self.rank:
            return sparse + F.linear(F.linear(input, self.factor_in), self.weight, self.bias)
        return sparse if self.bias is None else sparse + self.bias

    def _wants_gradients(self, input: torch.Tensor) -> bool:
        parameters = self.parameters(recurse=False)
        return torch.is_grad_enabled() and (
            input.requires_grad or any(parameter.requires_grad for parameter in parameters)
        )

    def _scattered(self) -> torch.Tensor:
        """S (out, in), differentiable by the values."""
        sizes = self.out_features, self.in_features
        if torch.compiler.is_compiling() or self.sparse_values.is_meta:
            where = positions(self.places(), *sizes, self.nonzeros)
        else:
            where = self._keep("positions")
        flat = self.sparse_values.new_zeros(sizes[0] * sizes[1])
        return flat.index_copy(0, where, self.sparse_values).view(sizes)

    def _keep(self, what: str) -> torch.Tensor:
        """What is derived of the parts, as kept or new."""
        parts = list(self.places().values())
        if what != "positions":
            parts += [self.sparse_values, self.weight, self.factor_in]
        if any(part.is_inference() for part in parts):  # these do not say when they change
            return self._derive(what)
        # Another tensor is another object or has other memory; writing into one raises its version.
        state = [(part, part._version, part.data_ptr()) for part in parts]
        if self._kept is None or self._kept[0] != what or not _same(self._kept[1], state):
            self._kept = None
            with torch.inference_mode(False), torch.no_grad():  # so that it can serve training
                self._kept = (what, state, self._derive(what))
        return self._kept[2]

    def _derive(self, what: str) -> torch.Tensor:
        mask = unpack(self.places(), self.out_features, self.in_features, self.nonzeros)
        values = self.sparse_values.detach()
        if what == "positions":
            return mask.flatten().nonzero().flatten()
        if what == "dense":
            sparse = values.new_zeros(mask.shape).masked_scatter_(mask, values)
            return product(self.weight, self.factor_in, sparse=sparse) if self.rank else sparse
        ends = F.pad(mask.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
        columns = self._buffers.get("sparse_columns")
        if columns is None:
            columns = mask.nonzero()[:, 1].to(torch.int32)
        with warnings.catch_warnings():
            about = "Sparse (CSR tensor support|invariant checks)"  # that it is beta, and may check
            warnings.filterwarnings("ignore", about, UserWarning)
            return torch.sparse_csr_tensor(ends, columns, values, mask.shape, check_invariants=True)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None  # moving and casting change parameters in place and leave no trace
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = f"{prefix}sparse_columns"
        if key in destination:
            destination[key] = narrow(destination[key])

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = f"{prefix}sparse_columns"
        if key in state_dict:
            state_dict[key] = widen(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}


def _same(state: Any, other: Any) -> bool:
    return len(state) == len(other) and all(
        one is two and facts == more
        for (one, *facts), (two, *more) in zip(state, other, strict=True)
    )
