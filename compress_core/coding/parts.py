"""What a layer stores in codes: the costliest error first, the others fitted again after it.

Of a product the in-factor (or the pivot rows) is rounded in the metric of the layer's inputs, then
the other matrix is fitted to the layer's own output by least squares and rounded in the metric of
what the rounded one makes of the inputs. Kept columns come before the product; entries take their
nearest codes; a base is rounded whole.
"""

import torch
from torch import Tensor

from compress_core.coding.gptq import gptq
from compress_core.coding.grid import decoded, nearest
from compress_core.coding.settings import NEAREST, Coding
from compress_core.decompose import LowRank
from compress_core.forms.codes import Coded
from compress_core.layer.stored import Codes, as_parts


def code_layer(
    low: LowRank, moment: Tensor | None, coding: Coding, form: str, dtype: torch.dtype
) -> Codes:
    tensors, entry = as_parts(low, torch.float64, form)
    coded: dict[str, Coded] = {}

    def put(name: str, matrix: Tensor, metric: Tensor | None, along: int) -> Tensor:
        if min(matrix.shape) == 0:
            return matrix
        if metric is None or coding.rounding == NEAREST:
            laid = matrix if along == 1 else matrix.T.contiguous()
            found = nearest(laid, coding.bits, coding.group, dtype)
        else:
            found = gptq(matrix, metric, coding, dtype, along)
        coded[name] = found
        back = decoded(found, coding.group)
        return back if along == 1 else back.T

    if low.base is not None:
        put("base", low.base, moment, 1)
    if low.rank:
        if entry.get("pivot"):
            b, c = tensors["pivot_in"], tensors["weight"]
            target = c @ b
            b = put("pivot_in", b, moment, 1)
            inner = None
            if moment is not None and coding.rounding != NEAREST:
                inner = b @ moment @ b.T
                c = solve(target @ moment @ b.T, inner)
            put("weight", c, inner, 1)
        else:
            u, v = low.u, low.v
            target = u @ v
            basis, triangle = torch.linalg.qr(u)
            v = put("factor_in", triangle @ v, moment, 1)
            u, inner = basis, None
            if moment is not None and coding.rounding != NEAREST:
                inner = v @ moment @ v.T
                u = solve(target @ moment @ v.T, inner)
            put("weight", u, inner, 0)
    if low.sparse is not None:
        coded["sparse_values"] = nearest(low.sparse.values[None], coding.bits, coding.group, dtype)
    return Codes(coded, dict.fromkeys(coded, coding.bits), coding.group)


def solve(right: Tensor, gram: Tensor) -> Tensor:
    ridge = 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, right.T).T
