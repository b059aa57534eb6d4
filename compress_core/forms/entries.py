"""Single entries of the weight, in fixed places, added to whatever the other parts make."""

import math
import warnings
from typing import ClassVar

import torch
import torch.nn.functional as F

from compress_core.forms.part import Entry, Kind, Run, Sizes, Slot, Tensors, wider
from compress_core.sparse import PLACES, index_layout, narrow, pack, positions, unpack, widen

CSR_COST = 6  # time of an entry in CSR, of one in a dense product; docs/benchmarks.md has the table


def _narrow_columns(columns: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    return narrow(columns)


class Entries(Kind):
    """y = S x, S sparse.

    Attributes of a layer that has them: `sparse_values`, row by row, (nonzeros,), and their places,
    either `sparse_bits`, uint8 (ceil(out * in / 8),), lowest bit first; or, if smaller,
    `sparse_columns`, (nonzeros,), int16 in its file, and `sparse_counts`, (out,), entries in each
    row.
    """

    words = "sparse entries"
    keys: ClassVar = {"nonzeros": int}
    slots: ClassVar = {
        "sparse_values": Slot(along=0),
        "sparse_bits": Slot(halves=0, dtype=torch.uint8, fill=0),
        # 32 bits in memory, as DistributedDataParallel cannot broadcast an int16 buffer.
        "sparse_columns": Slot(
            halves=0, dtype=torch.int32, fill=-1, load=widen, save=_narrow_columns
        ),
        "sparse_counts": Slot(halves=0, dtype=torch.int32, fill=0),
    }
    reads, scattered, version = "all", True, 3

    @staticmethod
    def calls(entry: Entry) -> bool:
        """Where there are some."""
        return bool(entry.get("nonzeros"))

    @staticmethod
    def shapes(entry: Entry, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Values, and places in the smaller layout."""
        count = entry["nonzeros"]
        values: dict[str, tuple[int, ...]] = {"sparse_values": (count,)}
        if index_layout(sizes.out, sizes.inputs, count) == "bitmask":
            return values | {"sparse_bits": (-(-sizes.dense // 8),)}
        return values | {"sparse_columns": (count,), "sparse_counts": (sizes.out,)}

    @staticmethod
    def pack(mask: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of entries where a mask (out, in) says, with values row by row."""
        return {"sparse_values": values, **pack(mask)}

    @staticmethod
    def numbers(entry: Entry, sizes: Sizes) -> int:
        """An entry counts as one and its place as none, as in the papers."""
        return int(entry["nonzeros"])

    @classmethod
    def work(cls, entry: Entry, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
        """Only the CPU's MKL multiplies sparse matrices fast, in 32 and 64 bits."""
        if device.type != "cpu" or not torch.backends.mkl.is_available():
            return math.inf
        if dtype not in (torch.float32, torch.float64):
            return math.inf
        return CSR_COST * int(entry["nonzeros"])

    @staticmethod
    def kept_bytes(entry: Entry, sizes: Sizes) -> int:
        """What CSR needs beside the values, whose memory is the parameter's own."""
        layout = index_layout(sizes.out, sizes.inputs, entry["nonzeros"])
        columns = 0 if layout == "csr" else 4 * entry["nonzeros"]
        return 4 * (sizes.out + 1) + columns

    @staticmethod
    def masks(tensors: Tensors, sizes: Sizes) -> dict[str, torch.Tensor]:
        """The values'."""
        return {"sparse_values": _mask(tensors, sizes)}

    @staticmethod
    def check(tensors: Tensors, sizes: Sizes) -> None:
        """Places must be those of as many entries."""
        try:
            _mask(tensors, sizes)
        except ValueError as error:
            raise ValueError(f"sparse_values: {error}") from error

    @staticmethod
    def apply(
        x: torch.Tensor, tensors: Tensors, sizes: Sizes, bias: torch.Tensor | None, run: Run
    ) -> torch.Tensor:
        """In CSR, or scattered anew where that cannot be: the values train, the places stay."""
        # Under autocast CSR would be asked for a product in bfloat16.
        if run.traced or torch.is_autocast_enabled("cpu"):
            return F.linear(x, _scattered(tensors, sizes, run), bias)
        parts = [*places_of(tensors).values(), tensors["sparse_values"]]
        csr = run.keep("entries", parts, lambda: _csr(tensors, sizes))
        rows = x.reshape(-1, sizes.inputs)
        # For one row the product with a vector takes half the time.
        out = torch.mv(csr, rows[0]) if len(rows) == 1 else (csr @ rows.T).T
        out = out.reshape(*x.shape[:-1], sizes.out).contiguous()
        return out if bias is None else out + bias.to(out.dtype)

    @staticmethod
    def dense(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
        """The matrix S."""
        mask = _mask(tensors, sizes)
        values = tensors["sparse_values"]
        values = values.to(wider(values.dtype))
        return values.new_zeros(mask.shape).masked_scatter(mask, values)


def places_of(tensors: Tensors) -> Tensors:
    """Where entries are, as `compress_core.sparse` packs it."""
    return {name: tensors[name] for name in PLACES if name in tensors}


def _mask(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
    """Where entries are, (out, in); an error where these are not as many as the values."""
    return unpack(tensors, sizes.out, sizes.inputs, tensors["sparse_values"].numel())


def _scattered(tensors: Tensors, sizes: Sizes, run: Run) -> torch.Tensor:
    """S (out, in), differentiable by the values."""
    places, values = places_of(tensors), tensors["sparse_values"]

    def find() -> torch.Tensor:
        if torch.compiler.is_compiling() or values.is_meta:
            return positions(places, sizes.out, sizes.inputs, values.numel())
        return _mask(tensors, sizes).flatten().nonzero().flatten()

    where = run.keep("entries", list(places.values()), find)
    flat = values.new_zeros(sizes.dense)
    return flat.index_copy(0, where, values).view(sizes.out, sizes.inputs)


def _csr(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
    mask = _mask(tensors, sizes)
    ends = F.pad(mask.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
    columns = tensors.get("sparse_columns")
    if columns is None:
        columns = mask.nonzero()[:, 1].to(torch.int32)
    with warnings.catch_warnings():
        about = "Sparse (CSR tensor support|invariant checks)"  # that it is beta, and may check
        warnings.filterwarnings("ignore", about, UserWarning)
        return torch.sparse_csr_tensor(
            ends, columns, tensors["sparse_values"].detach(), mask.shape, check_invariants=True
        )
