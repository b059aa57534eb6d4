"""GPTQ (arXiv 2210.17323): numbers are rounded column by column, the later ones making up.

With H the second moment of the inputs and F the columns from j on, an error e in column j is made
up for best by w_F −= e / [H_F⁻¹]_jj · H_F⁻¹[:, j] (optimal brain surgery, see `prune.obs`), and then
costs e² / [H_F⁻¹]_jj. A group's scale and zero are those of its numbers as they are when the sweep
arrives at them.
"""

import torch
from torch import Tensor

from compress_core.coding.grid import codes_at, grid_of, spread
from compress_core.fit import Moments
from compress_core.forms.codes import Coded
from compress_core.prune.obs import damped, inverse_factor
from compress_core.prune.wanda import second_moment

BLOCK = 128  # columns behind which updates are collected


def gptq(matrix: Tensor, moment: Tensor, coding, dtype: torch.dtype, along: int = 1) -> Coded:
    h = second_moment(Moments(prefix=moment))
    order = h.diagonal().argsort(descending=True, stable=True) if coding.order else None
    h = damped(h, coding.damping)
    weights = None
    if coding.search:
        weights = moment.diagonal()
    if order is not None:
        h = h[order][:, order]
    factor = inverse_factor(h, coding.damping)
    w = matrix.T.clone(memory_format=torch.contiguous_format)
    columns, rows = w.shape
    static = coding.order and along == 1
    group, bits = coding.group, coding.bits
    scales, zeros = torch.empty_like(w), torch.empty_like(w)
    grids = []
    if static:
        grid = grid_of(matrix, bits, group, dtype, weights)
        grids.append(grid)
        s, z = spread(grid, columns, group)
        scales, zeros = s.T[order].contiguous(), z.T[order].contiguous()
    if order is not None:
        w = w[order]
    block = max(group, BLOCK // group * group) if along == 1 else BLOCK
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    diagonal = factor.diagonal()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            if static:
                pass
            elif along == 0:
                grid = grid_of(
                    w[j][None],
                    bits,
                    group,
                    dtype,
                    torch.ones(rows, dtype=w.dtype) if coding.search else None,
                )
                grids.append(grid)
                s, z = spread(grid, rows, group)
                scales[j], zeros[j] = s[0], z[0]
            elif j % group == 0:
                part = slice(j, min(j + group, columns))
                ww = None
                if weights is not None:
                    ww = (
                        weights[part]
                        if coding.search == 1
                        else diagonal[part].square().reciprocal()
                    )
                grid = grid_of(w[part].T, bits, group, dtype, ww)
                grids.append(grid)
                s, z = spread(grid, part.stop - part.start, group)
                scales[part], zeros[part] = s.T, z.T
            found = codes_at(w[j], scales[j], zeros[j], bits)
            codes[j] = found.to(torch.uint8)
            error = (w[j] - (found - zeros[j]) * scales[j]) / diagonal[j]
            errors[j - start] = error
            w[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1.0)
        w[stop:] -= factor[start:stop, stop:].T @ errors
    if order is not None:
        back = order.argsort()
        codes = codes[back]
    if along == 0:
        if order is not None:
            grids = [grids[i] for i in back.tolist()]
        return Coded(
            torch.cat([g.scales for g in grids]), codes, torch.cat([g.zeros for g in grids])
        )
    if static:
        return Coded(grids[0].scales, codes.T.contiguous(), grids[0].zeros)
    return Coded(
        torch.cat([g.scales for g in grids], 1),
        codes.T.contiguous(),
        torch.cat([g.zeros for g in grids], 1),
    )
