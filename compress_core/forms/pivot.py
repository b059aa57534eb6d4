"""A product of low rank held by some of its own rows, and what makes the other rows of these."""

from typing import ClassVar

import torch
import torch.nn.functional as F

from compress_core.forms.part import Entry, Kind, Run, Sizes, Slot, Tensors, wider
from compress_core.sparse import pack_bits, unpack_bits

LARGEST = 1.05  # entry of C that is not made smaller
MOST_SWAPS = 4  # for each row


class Pivot(Kind):
    """y[I] = B x, y[J] = C y[I]: the pivot form of PIFA (arXiv 2501.19090), without loss.

    A weight of rank r has r independent rows I. `pivot_in` is B (r, in), these rows; `weight` is
    C (out - r, r), which makes the others of them; `pivot_rows` has a bit for every row, lowest
    first, set where it is one of I, in whole 16-bit words. That is r (out + in - r) numbers where
    plain factors are r (out + in), and but for the bits every rank below the smaller side is fewer
    than the dense weight.
    """

    words = "factors in pivot form"
    keys: ClassVar = {"rank": int, "pivot": bool}
    slots: ClassVar = {
        "weight": Slot(along=1),  # so that codes of every rank take more room than of one less
        "pivot_in": Slot(inward=True, along=1),
        "pivot_rows": Slot(halves=1, dtype=torch.uint8, fill=0),
    }
    version, paired = 4, True

    @staticmethod
    def calls(entry: Entry) -> bool:
        """Where it says so."""
        return bool(entry.get("pivot"))

    @staticmethod
    def shapes(entry: Entry, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """C, B and the bits."""
        rank = entry["rank"]
        return {
            "weight": (sizes.out - rank, rank),
            "pivot_in": (rank, sizes.rest),
            "pivot_rows": (2 * _words(sizes),),
        }

    @staticmethod
    def pack(u: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors that stand for a product of U (out, rank) and V (rank, in).

        Args:
            u: Of rank out at most.
            v: As long as ``u`` is wide.
            dtype: In which the numbers will be stored; what is made here is float64.
        """
        basis, triangle = torch.linalg.qr(u.to(torch.float64))
        rows, _, c = pivot_rows(basis)
        b = basis[rows] @ (triangle @ v.to(torch.float64))
        flags = torch.zeros(len(u), dtype=torch.bool, device=u.device)
        flags[rows] = True
        bits = pack_bits(flags)
        whole = bits.new_zeros(2 * _words(Sizes(len(u), v.shape[1])))
        whole[: len(bits)] = bits
        return {"weight": c, "pivot_in": b, "pivot_rows": whole}

    @staticmethod
    def numbers(entry: Entry, sizes: Sizes) -> int:
        """16 bits of the rows count as one."""
        rank = int(entry["rank"])
        return rank * (sizes.out + sizes.rest - rank) + _words(sizes)

    @staticmethod
    def kept_bytes(entry: Entry, sizes: Sizes) -> int:
        """Where each row's output is."""
        return 8 * sizes.out

    @staticmethod
    def check(tensors: Tensors, sizes: Sizes) -> None:
        """As many rows must be named as there are."""
        named = int(unpack_bits(tensors["pivot_rows"], len(tensors["pivot_rows"]) * 8).sum())
        inside = int(unpack_bits(tensors["pivot_rows"], sizes.out).sum())
        if (named, inside) != (len(tensors["pivot_in"]),) * 2:
            raise ValueError(f"pivot_rows names {inside} rows of {len(tensors['pivot_in'])}")

    @staticmethod
    def apply(
        x: torch.Tensor, tensors: Tensors, sizes: Sizes, bias: torch.Tensor | None, run: Run
    ) -> torch.Tensor:
        """The pivots' outputs, the others' of these, and each in its place."""
        bits = tensors["pivot_rows"]
        place = run.keep("places of rows", [bits], lambda: _places(tensors, sizes))
        pivots = F.linear(x, tensors["pivot_in"])
        out = torch.cat([pivots, F.linear(pivots, tensors["weight"])], dim=-1)
        out = out.gather(-1, place.expand(out.shape))
        return out if bias is None else out + bias.to(out.dtype)

    @staticmethod
    def pair(tensors: Tensors, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
        """Every row in terms of the pivots, and these."""
        c, b = tensors["weight"], tensors["pivot_in"]
        return torch.cat([torch.eye(len(b)).to(c), c])[_places(tensors, sizes)], b

    @staticmethod
    def dense(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
        """The rows, and those made of them."""
        b, c = tensors["pivot_in"], tensors["weight"]
        b, c = b.to(wider(b.dtype)), c.to(wider(c.dtype))
        return torch.cat([b, c @ b])[_places(tensors, sizes)]


def _words(sizes: Sizes) -> int:
    return -(-sizes.out // 16)


def _places(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
    """Where every row is among the pivots and then the others, both ascending: (out,), int64.

    No shape depends on what the bits say, so that it can be part of a compiled graph.
    """
    flags = unpack_bits(tensors["pivot_rows"], sizes.out)
    rank = len(tensors["pivot_in"])
    return torch.where(flags, flags.cumsum(0) - 1, rank - 1 + (~flags).cumsum(0))


def pivot_rows(basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of a basis that make the others with small numbers.

    Gaussian elimination with partial pivoting names the first; then a row takes another's place
    as long as a number is above ``LARGEST`` (the maximum-volume rule of Goreinov et al. 2010),
    each of which makes the rows' volume larger by that number.

    Args:
        basis: (out, r), of independent columns, float64.

    Returns:
        The r rows I and the other rows J, both ascending, and C = basis[J] basis[I]⁻¹.
    """
    out, rank = basis.shape
    if rank == 0 or rank == out:
        rows = torch.arange(out, device=basis.device)
        return rows[:rank], rows[rank:], basis.new_zeros(out - rank, rank)
    factor, pivots = torch.linalg.lu_factor(basis)
    order = list(range(out))
    for step, pivot in enumerate(pivots.tolist()):
        order[step], order[pivot - 1] = order[pivot - 1], order[step]
    rows, others = torch.tensor(order, device=basis.device).split([rank, out - rank])
    c = torch.linalg.solve_triangular(
        factor[:rank], factor[rank:], upper=False, left=False, unitriangular=True
    )
    for _ in range(MOST_SWAPS * rank):
        row = int(torch.maximum(c.amax(dim=1), -c.amin(dim=1)).argmax())
        column = int(c[row].abs().argmax())
        pivot = c[row, column].clone()
        if abs(float(pivot)) <= LARGEST:
            break
        # Row J[row] and pivot I[column] change places: a change of rank one.
        of_column, of_row = c[:, column].clone(), c[row].clone()
        of_column[row] += 1
        of_row[column] -= 1
        c.addr_(of_column / pivot, of_row, alpha=-1)
        rows, others = rows.clone(), others.clone()
        rows[column], others[row] = others[row].clone(), rows[column].clone()
    rows, others = rows.sort().values, others.sort().values
    return rows, others, _made_of(basis, rows, others)


def _made_of(basis: torch.Tensor, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(basis[rows], basis[others], left=False)
