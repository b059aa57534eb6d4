"""Two factors in 8 bits: symmetric codes with one scale per component.

Of the longer factor as many rows as the shorter one has are codes, like all of the shorter one,
and what is left of it stays in the model's dtype. So a component takes the bytes of max(out, in)
numbers of 16 bits, not of out + in (Dobi-SVD's "remapping", arXiv 2502.02723), and one more for its
scale.

This file needs PyTorch alone: its text is also written into the folder of a model that has such
layers, so that the model loads where nothing else of eigenpress is installed.
"""

from dataclasses import dataclass

import torch

LARGEST = 127  # code; -128 is left out, so that both signs reach as far
CODE_UNIT = 128  # a power of two, so that a code in units of it is exact in every dtype


@dataclass(frozen=True)
class Codes:
    """A product U V, U (out, rank) and V (rank, in), with s = min(out, in).

    Component i is scale_i times a column times a row, both within [-1, 1].

    Attributes:
        scale: (rank,), in the model's dtype, above 0.
        codes_out: First rows of U, int8 (s, rank); a code stands for code / 128.
        codes_in: First columns of V, int8 (rank, s).
        rest_out: The other rows of U, (out - s, rank), in the scale's dtype; None where out <= in.
        rest_in: The other columns of V, (rank, in - s); None where in <= out.
    """

    scale: torch.Tensor
    codes_out: torch.Tensor
    codes_in: torch.Tensor
    rest_out: torch.Tensor | None = None
    rest_in: torch.Tensor | None = None

    @property
    def numbers(self) -> int:
        """16-bit numbers that take the same room: two codes count as one."""
        rests = sum(rest.numel() for rest in (self.rest_out, self.rest_in) if rest is not None)
        return (self.codes_out.numel() + self.codes_in.numel()) // 2 + rests + self.scale.numel()

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """U (out, rank) and V (rank, in) with the scale in V, in a floating dtype."""
        u, v = widen_codes(self.codes_out, dtype), widen_codes(self.codes_in, dtype)
        if self.rest_out is not None:
            u = torch.cat([u, self.rest_out.to(dtype)])
        if self.rest_in is not None:
            v = torch.cat([v, self.rest_in.to(dtype)], dim=1)
        return u, v * self.scale.to(dtype)[:, None]


def quantise(u: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> Codes:
    """The codes of a product.

    The scale is rounded to ``dtype`` before V is coded in units of it, so that its rounding costs
    nothing. A code is then off by at most 1/254 of the largest value of its column or row (for a
    row by eps more: the scale is rounded up), a rest by its rounding to ``dtype``.

    Args:
        u: The out-factor, (out, rank), finite.
        v: The in-factor, (rank, in), finite.
        dtype: Of scale and rest.
    """
    columns, rows = u.to(torch.float64), v.to(torch.float64)
    size = min(len(columns), rows.shape[1])
    reach_out, reach_in = _reach(columns, 0), _reach(rows, 1)
    info = torch.finfo(dtype)
    scale = (reach_out * reach_in * (1 + info.eps)).clamp(info.tiny, info.max).to(dtype)
    columns = columns / reach_out
    rows = rows * (reach_out / scale.to(torch.float64))[:, None]
    return Codes(
        scale,
        _coded(columns[:size]),
        _coded(rows[:, :size]),
        columns[size:].to(dtype) if len(columns) > size else None,
        rows[:, size:].to(dtype).contiguous() if rows.shape[1] > size else None,
    )


def widen_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes as what they stand for, in a floating dtype, exactly."""
    return codes.to(dtype).div_(CODE_UNIT)


def _reach(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """What a code of 128 would stand for, so that the largest value has 127; 1 for no values."""
    reach = vectors.abs().amax(dim) * (CODE_UNIT / LARGEST)
    return torch.where(reach > 0, reach, 1.0)


def _coded(values: torch.Tensor) -> torch.Tensor:
    codes = (values * CODE_UNIT).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8).contiguous()
