"""Columns of the weight as they are, for some of the inputs; other parts read the rest of them."""

from typing import ClassVar

import torch
import torch.nn.functional as F

from compress_core.forms.part import Entry, Kind, Run, Sizes, Slot, Tensors, wider


def index_dtype(in_features: int) -> torch.dtype:
    """The dtype an index of inputs is stored in: int16 where that is wide enough, else int32."""
    return torch.int16 if in_features <= 32767 else torch.int32


def is_index(index: torch.Tensor, features: int) -> bool:
    """Whether an index (c,) names inputs or outputs, each once and in ascending order."""
    values = index.tolist()
    return bool(values == sorted(set(values).intersection(range(features))))


def input_order(index: torch.Tensor, in_features: int) -> torch.Tensor:
    """The inputs that are not in an ascending index (c,), then those that are: (in,), int64.

    No shape depends on what the index says, so that it can be part of a compiled graph.
    """
    kept = index.long()
    count = kept.numel()
    rest = torch.arange(in_features - count, device=kept.device)
    before = kept - torch.arange(count, device=kept.device)  # inputs of the rest before each
    return torch.cat([rest + torch.searchsorted(before, rest, right=True), kept])


def _narrow_index(index: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    return index.to(index_dtype(sizes.inputs))


def _wide_index(index: torch.Tensor) -> torch.Tensor:
    # 32 bits in memory, as DistributedDataParallel cannot broadcast an int16 buffer.
    return index.to(torch.int32)


class Columns(Kind):
    """y = C x[kept]: `columns` is C (out, c), `column_index` the kept inputs (c,), ascending."""

    words = "kept columns"
    keys: ClassVar = {"columns": int}
    slots: ClassVar = {
        "columns": Slot(along=0),
        "column_index": Slot(dtype=torch.int32, fill=-1, load=_wide_index, save=_narrow_index),
    }
    reads, version, paired = "taken", 2, True

    @staticmethod
    def calls(entry: Entry) -> bool:
        """Where some are kept."""
        return bool(entry.get("columns"))

    @staticmethod
    def shapes(entry: Entry, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Columns and index."""
        return {"columns": (sizes.out, sizes.taken), "column_index": (sizes.taken,)}

    @staticmethod
    def pack(columns: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of columns (out, c), of the inputs in an index (c,)."""
        return {"columns": columns, "column_index": index}

    @staticmethod
    def numbers(entry: Entry, sizes: Sizes) -> int:
        """An index counts as a number, as two where it needs 32 bits."""
        return sizes.taken * (sizes.out + index_dtype(sizes.inputs).itemsize // 2)

    @staticmethod
    def kept_bytes(entry: Entry, sizes: Sizes) -> int:
        """The order of the inputs."""
        return 8 * sizes.inputs

    @staticmethod
    def check(tensors: Tensors, sizes: Sizes) -> None:
        """The index must be one."""
        if not is_index(tensors["column_index"], sizes.inputs):
            raise ValueError("column_index is no ascending list of inputs")

    @staticmethod
    def apply(
        x: torch.Tensor, tensors: Tensors, sizes: Sizes, bias: torch.Tensor | None, run: Run
    ) -> torch.Tensor:
        """A product with the kept inputs."""
        return F.linear(x, tensors["columns"], bias)

    @staticmethod
    def pair(tensors: Tensors, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
        """Components that each pick one input."""
        return tensors["columns"], torch.eye(sizes.taken).to(tensors["columns"])

    @staticmethod
    def dense(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
        """The columns."""
        return tensors["columns"].to(wider(tensors["columns"].dtype))
