"""The three operations of an sgatlin layer: two gathers, each the other's backward, and a top-k.

    gather_dot(x, weight, index)     out[n, j] = <x[n], weight[index[n, j]]>
    gather_sum(coef, weight, index)  out[n]    = sum_j coef[n, j] * weight[index[n, j]]
    product_topk(scores, k)          the k largest of the n*n sums of two lists of n scores

The neurons of all channels lie in one table of R rows; token n uses the J rows index[n]. Nothing of
size (N, J, D) is ever made. The gradient of a table is a gather_sum again, over the index sorted by
row, so that every row sums its own tokens. The kernels have no atomics: the same input gives the
same bits.

A section for each operation: what it promises, with a one-line reference; the PyTorch form, for any
device; the Triton kernel, for a GPU; what torch.compile and autograd are told. Then
`python kernels.py`, which checks all this on the machine it runs on, and times it.

Letters: N tokens, D d_model, C channels, E neurons per channel, n = sqrt(E) sub-keys, k top-k,
J = C*k neurons per token, R rows, P = N*J (token, slot) pairs; pair p = token*J + slot.
"""
import functools
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

try:
    import triton
    import triton.language as tl
    from triton import jit
except Exception:       # none for Windows and macOS, or one that does not load: no kernel runs then
    triton = None
    tl = types.SimpleNamespace(constexpr=None)

    def jit(kernel: Callable) -> Callable:
        return kernel


# ------------------------------------------------------------------------------------------------
# what all operations share
#
# Floats are float64, float32, bfloat16 or float16, and may differ; the result has the wider dtype,
# and is summed in float32 at least. index is int32, in [0, R), which nothing checks.
#
# A custom_op is opaque to torch.compile: it learns the shapes of the results from the function
# registered as fake, and the gradients from the one registered for autograd. A backward function
# reads saved_tensors only once, because activation checkpointing forbids a second time.

ByRow = tuple[Tensor, Tensor]       # what sort_by_row returns


@functools.cache
def runs_triton(device: str, dtype: torch.dtype) -> bool:
    """Whether tensors of a device ("cpu", "cuda") and dtype get the Triton form, or PyTorch's.

    There are kernels for float32 and bfloat16. They compile for compute capability 7.5 and up and
    for AMD's gfx942 and gfx1100.
    """
    if device != "cuda" or triton is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    is_amd = torch.version.hip is not None      # "cuda" too, with capabilities of its own
    return is_amd or torch.cuda.get_device_capability() >= (7, 5)


def result_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


def sum_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(result_dtype(a, b), torch.float32)


def launch(kernel: Callable, grid: tuple[int, ...], *args) -> None:
    """One warp per program, on the first argument's device, which need not be the current one."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, num_warps=1, enable_fp_fusion=True)     # a * b + c in one instruction


@torch.library.custom_op("sgatlin::sort_by_row", mutates_args=())
def sort_by_row(index: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """The pairs of index (N, J) sorted by row. One sort serves all tables of a layer.

    Returns order (P,) int32, the pairs by row and then by token, and offsets (R+1,) int32: those
    of row r are order[offsets[r]:offsets[r+1]]. Raises ValueError if P overflows int32.
    """
    P = index.numel()
    if P + SPLIT >= 2**31:          # table_grad_triton adds SPLIT to the number of a pair
        raise ValueError(f"N*J = {P} pairs overflow 32 bits: pass fewer tokens at a time")
    rows = index.flatten()
    if n_rows < 2**15:
        rows = rows.to(torch.int16)                             # half the passes of the radix sort
    rows, order = rows.sort(stable=True)
    bounds = torch.arange(n_rows + 1, device=rows.device, dtype=rows.dtype)
    return order.to(torch.int32), torch.searchsorted(rows, bounds, out_int32=True)


@sort_by_row.register_fake
def _(index, n_rows):
    order = index.new_empty(index.numel(), dtype=torch.int32)
    offsets = index.new_empty(n_rows + 1, dtype=torch.int32)
    return order, offsets


def save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


# ------------------------------------------------------------------------------------------------
# gather_dot

def gather_dot(x: Tensor, weight: Tensor, index: Tensor, by_row: Optional[ByRow] = None) -> Tensor:
    """out[n, j] = <x[n], weight[index[n, j]]>: (N, D), (R, D), (N, J) -> (N, J).

    by_row is sort_by_row(index, R), for the gradient of weight; if None, that computes it.
    """
    order, offsets = by_row or (None, None)
    return gather_dot_op(x, weight, index, order, offsets)


def gather_dot_reference(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return torch.einsum("nd,njd->nj", x, weight[index])


# torch warns at the first such tensor that they are in beta: that one is made here, in silence.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], check_invariants=False)


def gather_dot_torch(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """A product of two matrices at the places that a sparse tensor has."""
    N, J = index.shape
    wide = sum_dtype(x, weight)
    out_dtype = result_dtype(x, weight)
    x = x.to(wide).contiguous()
    weight = weight.to(wide)
    starts = torch.arange(0, N * J + 1, J, dtype=index.dtype, device=index.device)      # (N+1,)
    columns = index.flatten()
    if x.device.type == "cpu" and len(weight) >= J:     # with fewer rows it raises
        wanted = torch.sparse_csr_tensor(starts, columns, x.new_ones(N * J), (N, len(weight)),
                                         check_invariants=False)    # a row may name one twice
        dots = torch.sparse.sampled_addmm(wanted, x, weight.T, beta=0).values()
    else:
        # The gradient of embedding_bag's per-sample weights; the operator has no public name.
        tokens = torch.arange(N, dtype=index.dtype, device=index.device)
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x, weight, columns, offsets=starts[:-1], offset2bag=tokens.repeat_interleave(J), mode=0)
    return dots.view(N, J).to(out_dtype)


DOT_SLOTS, DOT_COLS = 8, 256    # a tile: slots x columns that a warp asks for at once


@jit
def gather_dot_kernel(x, weight, index, out, J, D: tl.constexpr, SLOTS: tl.constexpr,
                      COLS: tl.constexpr):
    """out[n, j] = <x[n], weight[index[n, j]]>
    PyTorch: (x[:, None] * weight[index]).sum(-1)

    One program owns one token and SLOTS slots. Tokens run fastest in the grid, so the GPU works
    through the table slot by slot, that is channel by channel, and the rows of one channel (E*D
    numbers) stay in L2. Moves P rows of D, P/SLOTS rows of x, P ids and results.
    """
    # Which rows.
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(index + n * J + j, j < J, 0).to(tl.int64)                             # (SLOTS,)

    # Products, COLS columns at a time. They are added across columns only once, after the loop.
    acc = tl.zeros((SLOTS, COLS), tl.float32)
    for start in tl.static_range(0, D, COLS):
        d = start + tl.arange(0, COLS)
        token = tl.load(x + n * D + d, d < D, 0).to(tl.float32)                         # (COLS,)
        rows = tl.load(weight + row[:, None] * D + d[None, :], (d < D)[None, :], 0)
        acc += token[None, :] * rows.to(tl.float32)                             # (SLOTS, COLS)
    dots = tl.sum(acc, 1)                                                               # (SLOTS,)
    tl.store(out + n * J + j, dots.to(out.dtype.element_ty), j < J)


def gather_dot_triton(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    N, D = x.shape
    J = index.shape[1]
    cols = min(DOT_COLS, triton.next_power_of_2(D))
    out = x.new_empty(N, J, dtype=result_dtype(x, weight))
    launch(gather_dot_kernel, (N, triton.cdiv(J, DOT_SLOTS)), x.contiguous(), weight.contiguous(),
           index.contiguous(), out, J, D, DOT_SLOTS, cols)
    return out


@torch.library.custom_op("sgatlin::gather_dot", mutates_args=())
def gather_dot_op(x: Tensor, weight: Tensor, index: Tensor, order: Optional[Tensor],
                  offsets: Optional[Tensor]) -> Tensor:
    if runs_triton(x.device.type, result_dtype(x, weight)):
        return gather_dot_triton(x, weight, index)
    return gather_dot_torch(x, weight, index)


@gather_dot_op.register_fake
def _(x, weight, index, order, offsets):
    return x.new_empty(index.shape, dtype=result_dtype(x, weight))


def gather_dot_backward(ctx, grad):                             # (N, J)
    x, weight, index, order, offsets = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = gather_sum(grad, weight, index).to(x.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = table_grad(grad, x, index, len(weight), order, offsets).to(weight.dtype)
    return grad_x, grad_weight, None, None, None


gather_dot_op.register_autograd(gather_dot_backward, setup_context=save_inputs)


# ------------------------------------------------------------------------------------------------
# gather_sum, and the gradient of a table, which is a gather_sum too

def gather_sum(coef: Tensor, weight: Tensor, index: Tensor,
               by_row: Optional[ByRow] = None) -> Tensor:
    """out[n] = sum_j coef[n, j] * weight[index[n, j]]: (N, J), (R, D), (N, J) -> (N, D).

    by_row as in gather_dot.
    """
    order, offsets = by_row or (None, None)
    return gather_sum_op(coef, weight, index, order, offsets)


def gather_sum_reference(coef: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return torch.einsum("nj,njd->nd", coef, weight[index])


def gather_sum_torch(coef: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    wide = sum_dtype(coef, weight)
    out = F.embedding_bag(index, weight.to(wide), mode="sum",
                          per_sample_weights=coef.to(wide).contiguous())
    return out.to(result_dtype(coef, weight))


def table_grad_torch(coef: Tensor, x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """(N, J), (N, D), by_row -> (R, D): row r sums coef[n, j] * x[n] over its pairs."""
    wide = sum_dtype(coef, x)
    tokens = order // coef.shape[1]                             # (P,)
    coefs = coef.flatten()[order]                               # (P,)
    out = F.embedding_bag(tokens, x.to(wide), offsets, mode="sum", include_last_offset=True,
                          per_sample_weights=coefs.to(wide))
    return out.to(result_dtype(coef, x))


SUM_TOKENS, SUM_COLS = 16, 64   # a tile: tokens x columns; 64 columns of a table fit in L2


@jit
def gather_sum_kernel(coef, weight, index, out, N, J, D: tl.constexpr, TOKENS: tl.constexpr,
                      COLS: tl.constexpr):
    """out[n] = sum over j of coef[n, j] * weight[index[n, j]]
    PyTorch: F.embedding_bag(index, weight, mode="sum", per_sample_weights=coef)

    One program owns TOKENS tokens and COLS columns, and walks through the slots, that is through
    the channels: rows that several tokens choose come from the nearest cache. Tokens run fastest in
    the grid, so the GPU works through the table one slice of columns at a time, and a slice (R*COLS
    numbers) stays in L2. Moves P rows of D, P*D/COLS ids and coefficients, and the results.
    """
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at = tl.minimum(t, N - 1).to(tl.int64) * J                  # past the end: the last token again
    acc = tl.zeros((TOKENS, COLS), tl.float32)
    for j in tl.range(0, J, loop_unroll_factor=8):              # asks for 8 rows at a time
        row = tl.load(index + at + j).to(tl.int64)                                    # (TOKENS,)
        scale = tl.load(coef + at + j).to(tl.float32)                                 # (TOKENS,)
        rows = tl.load(weight + row[:, None] * D + d[None, :], (d < D)[None, :], 0)
        acc += scale[:, None] * rows.to(tl.float32)                             # (TOKENS, COLS)
    here = t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out + here, acc.to(out.dtype.element_ty), (t < N)[:, None] & (d < D)[None, :])


def gather_sum_triton(coef: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    N, J = index.shape
    D = weight.shape[1]
    out = coef.new_empty(N, D, dtype=result_dtype(coef, weight))
    launch(gather_sum_kernel, (triton.cdiv(N, SUM_TOKENS), triton.cdiv(D, SUM_COLS)),
           coef.contiguous(), weight.contiguous(), index.contiguous(), out, N, J, D, SUM_TOKENS,
           SUM_COLS)
    return out


GRAD_PAIRS = 16                 # a tile of a table's gradient: pairs x SUM_COLS columns
SPLIT = 1024                    # no program of it sums more pairs than this


@jit
def sum_rows(coef, index, table, count, d, D: tl.constexpr, PAIRS: tl.constexpr):
    """The sum of coef[q] * table[index[q], d] over 0 <= q < count, PAIRS at a time.

    Without coef every factor is 1; without index, row q is the q-th.
    """
    acc = tl.zeros((PAIRS, d.shape[0]), tl.float32)
    for first in tl.range(0, count, PAIRS, num_stages=3):   # loads the next ones meanwhile
        q = first + tl.arange(0, PAIRS)
        live = q < count
        q = tl.minimum(q, count - 1)                            # past the end: the last, times 0
        if index is None:
            row = q.to(tl.int64)
        else:
            row = tl.load(index + q).to(tl.int64)                                       # (PAIRS,)
        if coef is None:
            scale = tl.where(live, 1.0, 0.0)
        else:
            scale = tl.where(live, tl.load(coef + q).to(tl.float32), 0.0)               # (PAIRS,)
        rows = tl.load(table + row[:, None] * D + d[None, :], (d < D)[None, :], 0)
        acc += scale[:, None] * rows.to(tl.float32)                             # (PAIRS, COLS)
    return tl.sum(acc, 0)                                                               # (COLS,)


@jit
def segment_sum_kernel(coef, index, table, starts, ends, partial, out, D: tl.constexpr,
                       SPLIT: tl.constexpr, PAIRS: tl.constexpr, COLS: tl.constexpr):
    """out[s] = sum of coef[q] * table[index[q]] over starts[s] <= q < ends[s]
    PyTorch: F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=coef)

    A segment is all pairs of a row, and the table holds the tokens. One program owns one segment
    and COLS columns, and writes once; an empty segment gets 0. Segments run fastest in the grid, so
    the GPU works through the tokens one slice of columns at a time. Moves P rows of D, P*D/COLS ids
    and coefficients, and the results.

    A popular row has a hundred times the pairs of others: one program would still be at work when
    all others are done. So the pairs, sorted by row, are cut at the borders, multiples of SPLIT:

        pair            0         border 1  border 2  border 3  border 4
                        |         |         |         |         |
        of row          aaabbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbccccccccdd
        first launch              [partial 0[partial 1[ 2 ]     [3]
        second launch   [ ][     ]                         [   ]   []

    The first launch sums, for each border inside a row, from there to the next border or the row's
    end: partial[0] is that of border 1. The second sums each row up to its first border, and adds
    the partials of the borders inside: to b's, 0, 1 and 2. All in a fixed order: the same bits.
    """
    # The segment, and its columns.
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    start = tl.load(starts + s).to(tl.int64)
    end = tl.load(ends + s).to(tl.int64)

    # Its pairs, all of them or up to the first border.
    border = start // SPLIT + 1
    stop = end
    if partial is not None:
        stop = tl.minimum(end, border * SPLIT)
    count = (stop - start).to(tl.int32)
    total = sum_rows(coef + start, index + start, table, count, d, D, PAIRS)            # (COLS,)

    # The partial sums of the borders inside.
    if partial is not None:
        last = (end - 1) // SPLIT
        count = (last - border + 1).to(tl.int32)
        total += sum_rows(None, None, partial + (border - 1) * D, count, d, D, PAIRS)
    tl.store(out + s * D + d, total.to(out.dtype.element_ty), d < D)


def segment_sum(coef: Tensor, index: Tensor, table: Tensor, starts: Tensor, ends: Tensor,
                dtype: torch.dtype, partial: Optional[Tensor] = None) -> Tensor:
    D = table.shape[1]
    out = table.new_empty(len(starts), D, dtype=dtype)
    launch(segment_sum_kernel, (len(starts), triton.cdiv(D, SUM_COLS)), coef.contiguous(),
           index.contiguous(), table.contiguous(), starts, ends, partial, out,
           D, SPLIT, GRAD_PAIRS, SUM_COLS)
    return out


def table_grad_triton(coef: Tensor, x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    tokens = order // coef.shape[1]                             # (P,)
    coefs = coef.flatten().index_select(0, order)               # (P,) once for all columns
    borders = torch.arange(SPLIT, max(len(order), SPLIT), SPLIT, dtype=torch.int32, device=x.device)
    # Where the row ends whose pairs a border divides.
    row_end = offsets[torch.searchsorted(offsets, borders)]
    stops = torch.minimum(borders + SPLIT, row_end)
    partial = segment_sum(coefs, tokens, x, borders, stops, torch.float32)
    return segment_sum(coefs, tokens, x, offsets[:-1], offsets[1:], result_dtype(coef, x), partial)


@torch.library.custom_op("sgatlin::gather_sum", mutates_args=())
def gather_sum_op(coef: Tensor, weight: Tensor, index: Tensor, order: Optional[Tensor],
                  offsets: Optional[Tensor]) -> Tensor:
    if runs_triton(coef.device.type, result_dtype(coef, weight)):
        return gather_sum_triton(coef, weight, index)
    return gather_sum_torch(coef, weight, index)


@gather_sum_op.register_fake
def _(coef, weight, index, order, offsets):
    return coef.new_empty(len(coef), weight.shape[1], dtype=result_dtype(coef, weight))


@torch.library.custom_op("sgatlin::table_grad", mutates_args=())
def table_grad(coef: Tensor, x: Tensor, index: Tensor, n_rows: int, order: Optional[Tensor],
               offsets: Optional[Tensor]) -> Tensor:
    """(N, J), (N, D), (N, J) -> (R, D): row r sums coef[n, j] * x[n] where index[n, j] is r."""
    if order is None:
        order, offsets = sort_by_row(index, n_rows)
    if runs_triton(coef.device.type, result_dtype(coef, x)):
        return table_grad_triton(coef, x, order, offsets)
    return table_grad_torch(coef, x, order, offsets)


@table_grad.register_fake
def _(coef, x, index, n_rows, order, offsets):
    return x.new_empty(n_rows, x.shape[1], dtype=result_dtype(coef, x))


def gather_sum_backward(ctx, grad):                             # (N, D)
    coef, weight, index, order, offsets = ctx.saved_tensors
    grad_coef = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_coef = gather_dot(grad, weight, index).to(coef.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = table_grad(coef, grad, index, len(weight), order, offsets).to(weight.dtype)
    return grad_coef, grad_weight, None, None, None


gather_sum_op.register_autograd(gather_sum_backward, setup_context=save_inputs)


# ------------------------------------------------------------------------------------------------
# product_topk

def product_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the n*n sums scores[..., 0, a] + scores[..., 1, b], not all of them formed.

    scores (N, C, 2, n): the similarities to the first and to the second sub-keys.
    Returns gates (N, C, k), the sums in descending order, and ids (N, C, k) int32, a*n + b. Ties go
    to the lower rank of a, then of b. ids are different and in range even when scores are NaN.
    Raises ValueError if k > n. Product keys: Lample et al., arXiv 1907.05242.
    """
    if k > scores.shape[-1]:
        raise ValueError(f"k={k} exceeds the {scores.shape[-1]} sub-keys")
    return product_topk_op(scores, k)


def product_topk_reference(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sums = scores[..., 0, :, None] + scores[..., 1, None, :]    # (N, C, n, n)
    return sums.flatten(-2).topk(k)


def product_topk_torch(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n = scores.shape[-1]
    best = top_labels(scores, torch.arange(n, device=scores.device), k)     # (N, C, 2, k)
    values = scores.gather(-1, best)                                        # (N, C, 2, k)
    # The sum of ranks i and j is at most those of the (i+1)*(j+1) - 1 pairs of better ranks, so it
    # can be among the k best only if (i+1)*(j+1) <= k.
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    i, j = torch.tensor(pairs, device=scores.device).T                      # (S,) each
    first, second = values.unbind(-2)                                       # (N, C, k) each
    shape = (*first.shape[:-1], len(pairs))
    sums = first.gather(-1, i.expand(shape)) + second.gather(-1, j.expand(shape))
    label = top_labels(sums, i << 16 | j, k)                                # (N, C, k)
    i = label >> 16
    j = label & 0xffff
    a, b = best.to(torch.int32).unbind(-2)                                  # (N, C, k) each
    gates = first.gather(-1, i) + second.gather(-1, j)
    return gates, a.gather(-1, i) * n + b.gather(-1, j)


def product_topk_grad_torch(grad: Tensor, ids: Tensor, n: int) -> Tensor:
    a = ids // n
    halves = torch.stack((a, ids - a * n), dim=-2).long()       # (N, C, 2, k)
    scores = grad.new_zeros(*halves.shape[:-1], n)
    return scores.scatter_add_(-1, halves, grad.unsqueeze(-2).expand(halves.shape))


def top_labels(values: Tensor, labels: Tensor, k: int) -> Tensor:
    """The labels (..., k) of the k largest of values (..., n), in order; of equals the lower first.

    labels (n,) are rising int64, in [0, 2**31). On a CPU, except in float64, -0.0 is less than 0.0.
    """
    if values.device.type != "cpu" or values.dtype == torch.float64:
        return labels[values.sort(dim=-1, descending=True, stable=True).indices[..., :k]]
    # The same by numpy's vectorised sort of integers, which makes product_topk of 32 + 32 scores 3
    # times as fast as torch.topk would, and 5 times as fast as the line above. The bits of a float,
    # those of a negative one flipped but for the sign, order as the floats do. In place, for every
    # temporary costs as much as the arithmetic.
    bits = values.float().contiguous().view(torch.int32)
    rising = bits >> 31                                         # all ones where negative
    rising &= 0x7fffffff
    rising ^= bits
    keys = rising.long()
    keys.neg_()                                                 # the largest comes first
    keys <<= 32
    keys |= labels                                              # then the lowest label
    rows = keys.view(-1, keys.shape[-1]).numpy()
    threads = torch.get_num_threads()
    if threads == 1:
        rows.sort()
    else:
        list(sorters(threads).map(np.ndarray.sort, np.array_split(rows, threads)))
    return keys[..., :k] & 0xffffffff


@functools.cache
def sorters(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)      # numpy lets go of Python's lock while it sorts


TOPK_TOKENS = 32        # of a program: a lane has a token


@jit
def flip(bits):
    """The bits of a float such that they order as floats do: those of a negative one turned but for
    its sign. Twice, it is the bits again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def to_key(x, i):
    """An integer that is larger for a larger x and, between equals, for a lower i (16 bits)."""
    bits = flip(x.to(tl.float32).to(tl.int32, bitcast=True))
    if x.dtype == tl.bfloat16:
        high = bits & -0x10000              # the lower half of a bfloat16's bits says nothing
    else:
        high = bits.to(tl.int64) << 16
    return high | (0xFFFF - i)


@jit
def from_key(key):
    """The x, in float32, and the i of a key."""
    if key.dtype == tl.int32:
        bits = flip(key & -0x10000) & -0x10000
    else:
        bits = flip((key >> 16).to(tl.int32))
    return bits.to(tl.float32, bitcast=True), 0xFFFF - (key & 0xFFFF).to(tl.int32)


@jit
def repeat(x, K: tl.constexpr):
    xs = ()
    for _ in tl.static_range(K):
        xs = xs + (x,)
    return xs


@jit
def insert(top, key):
    """The largest len(top) of key and the keys in the tuple top, in descending order, as top is."""
    new = ()
    for rank in tl.static_range(len(top)):
        new = new + (tl.maximum(top[rank], key),)
        key = tl.minimum(top[rank], key)
    return new


@jit
def product_topk_kernel(scores, gates, ids, by_token, by_channel, by_half, by_key, N, C, n,
                        K: tl.constexpr, TOKENS: tl.constexpr):
    """The K largest of the n*n sums scores[t, c, 0, i] + scores[t, c, 1, j] and their ids i*n + j
    PyTorch: (scores[..., 0, :, None] + scores[..., 1, None, :]).flatten(-2).topk(K)

    One lane owns one token and channel, and keeps the K best of what it has seen in registers;
    by_token, by_channel, ... are the strides of scores. All keys of a lane are different, so the
    ids are, and in range, whatever the scores. Moves N*C*2n scores, P gates and ids.
    """
    dtype: tl.constexpr = scores.dtype.element_ty
    KEY: tl.constexpr = tl.int32 if dtype == tl.bfloat16 else tl.int64
    LOWEST: tl.constexpr = -(1 << 31) if dtype == tl.bfloat16 else -(1 << 62)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1)
    read = tl.minimum(t, N - 1).to(tl.int64)                    # past the end: the last token again
    first = scores + read * by_token + c.to(tl.int64) * by_channel                    # (TOKENS,)
    second = first + by_half

    # The K best of each half.
    rows = repeat(tl.full((TOKENS,), LOWEST, KEY), K)
    cols = repeat(tl.full((TOKENS,), LOWEST, KEY), K)
    for i in range(n):
        rows = insert(rows, to_key(tl.load(first), i))
        cols = insert(cols, to_key(tl.load(second), i))
        first += by_key
        second += by_key

    # The K best sums of these. Of ranks (i, j), only those with (i + 1) * (j + 1) <= K can win. A
    # key has the sum in its upper 32 bits, then the ranks, for ties, and in its lower 24 the id.
    best = repeat(tl.full((TOKENS,), -(1 << 63), tl.int64), K)
    for i in tl.static_range(K):
        a, row = from_key(rows[i])
        for j in tl.static_range(K // (i + 1)):
            b, col = from_key(cols[j])
            total = (a + b).to(dtype).to(tl.float32)
            high = flip(total.to(tl.int32, bitcast=True)).to(tl.int64) << 32
            ranks = (0xFF - (i * K + j)) << 24
            best = insert(best, high + ranks + (row * n + col).to(tl.int64))

    out = (t.to(tl.int64) * C + c) * K
    for rank in tl.static_range(K):
        gate = flip((best[rank] >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        tl.store(gates + out + rank, gate.to(dtype), t < N)
        tl.store(ids + out + rank, (best[rank] & 0xFFFFFF).to(tl.int32), t < N)


@jit
def product_topk_grad_kernel(grad, ids, out, N, C, n, K: tl.constexpr, TOKENS: tl.constexpr):
    """out[c, 0, i, t] = sum of grad[t, c, s] where ids[t, c, s] // n is i; out[c, 1, j, t]: % n, j
    PyTorch: zeros(N, C, n).scatter_add_(-1, ids // n, grad), and the same with ids % n

    One lane owns one token and channel. Moves P ids and gradients, N*C*2n results.
    """
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1)
    at = (tl.minimum(t, N - 1).to(tl.int64) * C + c) * K
    rows = ()
    cols = ()
    grads = ()
    for s in tl.static_range(K):
        id = tl.load(ids + at + s)
        rows = rows + (id // n,)
        cols = cols + (id % n,)
        grads = grads + (tl.load(grad + at + s).to(tl.float32),)
    first = out + c.to(tl.int64) * 2 * n * N + t
    second = first + n.to(tl.int64) * N
    for i in range(n):
        row_sum = tl.zeros((TOKENS,), tl.float32)
        col_sum = tl.zeros((TOKENS,), tl.float32)
        for s in tl.static_range(K):
            row_sum += tl.where(rows[s] == i, grads[s], 0.0)
            col_sum += tl.where(cols[s] == i, grads[s], 0.0)
        tl.store(first, row_sum.to(out.dtype.element_ty), t < N)
        tl.store(second, col_sum.to(out.dtype.element_ty), t < N)
        first += N
        second += N


def product_topk_triton(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    N, C, _, n = scores.shape
    if k > 16 or n > 2**12:             # the registers and the bits of a key hold no more
        return product_topk_torch(scores, k)
    gates = scores.new_empty(N, C, k)
    ids = scores.new_empty(N, C, k, dtype=torch.int32)
    launch(product_topk_kernel, (triton.cdiv(N, TOPK_TOKENS), C), scores, gates, ids,
           *scores.stride(), N, C, n, k, TOPK_TOKENS)
    return gates, ids


def product_topk_grad_triton(grad: Tensor, ids: Tensor, n: int) -> Tensor:
    N, C, k = ids.shape
    out = empty_scores(grad, N, C, n)
    launch(product_topk_grad_kernel, (triton.cdiv(N, TOPK_TOKENS), C), grad.contiguous(),
           ids.contiguous(), out, N, C, n, k, TOPK_TOKENS)
    return out


def empty_scores(like: Tensor, N: int, C: int, n: int) -> Tensor:
    """(N, C, 2, n), in which what lies side by side in memory is that of neighbouring tokens."""
    return like.new_empty(C, 2, n, N).permute(3, 0, 1, 2)


@torch.library.custom_op("sgatlin::product_topk", mutates_args=())
def product_topk_op(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if runs_triton(scores.device.type, scores.dtype):
        return product_topk_triton(scores, k)
    return product_topk_torch(scores, k)


@product_topk_op.register_fake
def _(scores, k):
    gates = scores.new_empty(*scores.shape[:-2], k)
    return gates, gates.new_empty(gates.shape, dtype=torch.int32)


@torch.library.custom_op("sgatlin::product_topk_grad", mutates_args=())
def product_topk_grad(grad: Tensor, ids: Tensor, n: int) -> Tensor:
    if runs_triton(grad.device.type, grad.dtype):
        return product_topk_grad_triton(grad, ids, n)
    return product_topk_grad_torch(grad, ids, n)


@product_topk_grad.register_fake
def _(grad, ids, n):
    N, C, _ = ids.shape
    if runs_triton(grad.device.type, grad.dtype):
        return empty_scores(grad, N, C, n)
    return grad.new_empty(N, C, 2, n)


def save_ids(ctx, inputs, output):
    ctx.n = inputs[0].shape[-1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def product_topk_backward(ctx, grad, _):
    ids, = ctx.saved_tensors
    return product_topk_grad(grad, ids, ctx.n), None


product_topk_op.register_autograd(product_topk_backward, setup_context=save_ids)


# ------------------------------------------------------------------------------------------------
# python kernels.py

def random_layer(N: int, D: int, C: int, n: int, k: int,
                 **kind) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """scores, index, [x, gates, w_in, w_out] as at initialisation, and dy; kind: device, dtype."""
    scores = torch.randn(N, C, 2, n, **kind)
    gates, ids = product_topk(scores, k)
    R = C * n * n
    first = torch.arange(0, R, n * n, dtype=torch.int32, device=ids.device)     # of each channel
    index = (ids + first[:, None]).flatten(1)                                   # (N, J)
    x = torch.randn(N, D, **kind)
    w_in = torch.randn(R, D, **kind) / n
    w_out = torch.randn(R, D, **kind) / n
    dy = torch.randn(N, D, **kind)
    return scores, index, [x, gates.flatten(1), w_in, w_out], dy


def layer(x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, index: Tensor) -> Tensor:
    """The layer behind its router, as in model.py."""
    by_row = sort_by_row(index, len(w_in)) if torch.is_grad_enabled() else None
    u = gather_dot(x, w_in, index, by_row)
    return gather_sum(gates * u, w_out, index, by_row)


def layer_reference(x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, index: Tensor) -> Tensor:
    u = gather_dot_reference(x, w_in, index)
    return gather_sum_reference(gates * u, w_out, index)


def topk_gates(scores: Tensor, k: int) -> Tensor:
    gates, _ = product_topk(scores, k)
    return gates


def topk_gates_reference(scores: Tensor, k: int) -> Tensor:
    gates, _ = product_topk_reference(scores, k)
    return gates


def sums_at(scores: Tensor, ids: Tensor) -> Tensor:
    """The sums that ids name: what product_topk is when its choice is taken as given."""
    n = scores.shape[-1]
    halves = torch.stack((ids // n, ids % n), dim=-2).long()    # (N, C, 2, k)
    return scores.gather(-1, halves).sum(-2)


def gradients(fn: Callable, dy: Tensor, inputs: list[Tensor], *rest) -> list[Tensor]:
    """[y, the gradient of <y, dy> for each of inputs], where y = fn(*inputs, *rest)."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = fn(*inputs, *rest)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def check(N: int, D: int, C: int, n: int, k: int, **kind) -> None:
    """Compares a layer, its top-k and their gradients with the reference in float64."""
    scores, index, inputs, dy = random_layer(N, D, C, n, k, **kind)
    wide = [tensor.double() for tensor in inputs]
    ours = gradients(layer, dy, inputs, index)
    truth = gradients(layer_reference, dy.double(), wide, index)

    gates, ids = product_topk(scores, k)
    assert torch.equal(gates, topk_gates_reference(scores, k))
    assert torch.equal(gates, sums_at(scores, ids))
    ours += gradients(topk_gates, gates, [scores], k)
    truth += gradients(sums_at, gates.double(), [scores.double()], ids)

    worst = 0.0
    for a, b in zip(ours, truth):
        error = (a.double() - b).norm() / b.norm()
        worst = max(worst, error.item())
    print(f"N={N} D={D} C={C} n={n} k={k} {scores.dtype}: errors of {worst:.0e} at most")
    assert worst < (1e-2 if scores.dtype == torch.bfloat16 else 1e-6)


def median_ms(fn: Callable, *args) -> float:
    """Median wall time of fn in ms, after a warm-up."""
    timer = Timer("fn(*args)", globals=dict(fn=fn, args=args), num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=0.5).median


def time_both(name: str, fn: Callable, dy: Tensor, inputs: list[Tensor], *rest) -> None:
    """Prints how long fn takes, and how long with its gradients."""
    try:
        with torch.no_grad():
            forward = median_ms(fn, *inputs, *rest)
        both = median_ms(gradients, fn, dy, inputs, *rest)
        print(f"{name:20}{forward:10.2f}{both:15.2f}", flush=True)
    except torch.OutOfMemoryError:
        print(f"{name:20}out of memory", flush=True)


def swiglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a, b = F.linear(x, up).chunk(2, dim=-1)
    return F.linear(F.silu(a) * b, down)


def time_swiglu(x: Tensor, dy: Tensor, d_ff: int) -> None:
    D = x.shape[1]
    up = x.new_ones(2 * d_ff, D)
    down = x.new_ones(D, d_ff)
    time_both(f"SwiGLU {d_ff}", swiglu, dy, [x, up, down])


def benchmark(N: int, D: int, C: int, n: int, k: int, d_ff: int, **kind) -> None:
    """Times a layer behind its router, its top-k, their references, and a SwiGLU of d_ff."""
    scores, index, inputs, dy = random_layer(N, D, C, n, k, **kind)
    dgates = torch.randn(N, C, k, **kind)
    print(f"\nN={N} D={D} C={C} E={n * n} k={k} {dy.dtype}\n"
          "                    forward ms   +backward ms")
    time_both("reference", layer_reference, dy, inputs, index)
    time_both("layer", layer, dy, inputs, index)
    time_both("top-k reference", topk_gates_reference, dgates, [scores], k)
    time_both("top-k", topk_gates, dgates, [scores], k)
    time_swiglu(inputs[0], dy, d_ff)


def growth(N: int, D: int, C: int, k: int, d_ff: int, **kind) -> None:
    """Times what grows with the pools, beside a SwiGLU of d_ff: the layer behind its router, its
    top-k, and AdamW's step over the tables of all neurons."""
    dgates = torch.randn(N, C, k, **kind)
    print(f"\nN={N} D={D} C={C} k={k}: as the pools grow\n"
          "                    forward ms   +backward ms")
    time_swiglu(torch.randn(N, D, **kind), torch.randn(N, D, **kind), d_ff)
    for n in (32, 64, 128, 256):
        scores, index, inputs, dy = random_layer(N, D, C, n, k, **kind)
        time_both(f"layer, E={n * n}", layer, dy, inputs, index)
        time_both(f"top-k, E={n * n}", topk_gates, dgates, [scores], k)
        tables = inputs[2:]
        for table in tables:
            table.grad = torch.zeros_like(table)
        step = median_ms(torch.optim.AdamW(tables, fused=True).step)
        size = sum(table.nbytes for table in tables)
        print(f"AdamW, {size / 1e6:.0f} MB".ljust(20) + f"{step:10.2f}", flush=True)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    used = "Triton" if runs_triton(device, torch.float32) else "PyTorch"
    print(f"torch {torch.__version__}, {device}; the operations run in their {used} form")
    for dtype in (torch.float32, torch.bfloat16):
        check(57, 80, 2, 11, 8, device=device, dtype=dtype)
        check(300, 520, 3, 110, 8, device=device, dtype=dtype)
        check(1300, 64, 1, 2, 2, device=device, dtype=dtype)
    if device == "cpu":
        benchmark(4096, 256, 8, 32, 8, 512, device=device, dtype=torch.float32)
        growth(2048, 128, 8, 8, 512, device=device, dtype=torch.float32)
        return
    for scale in (2, 4, 6):             # of the paper's ladder, with the SwiGLU beside it
        D = 128 * scale
        d_ff = int(8 / 3 * D / 256) * 256
        benchmark(131072, D, 16, 16 + 12 * scale, 8, d_ff, device=device, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
