"""The operations of an sgatlin layer: two primitives, each the other's backward, and a top-k.

    gather_dot(x, weight, index)     out[n, j] = <x[n], weight[index[n, j]]>
    gather_sum(coef, weight, index)  out[n]    = sum_j coef[n, j] * weight[index[n, j]]
    product_topk(scores, k)          the k largest of the n*n sums of two score lists ("product keys")

The neurons of all channels lie in one table of R rows; token n uses the J rows index[n]. Nothing of size
(N, J, D) is ever made. The gradient of a table is a gather_sum again, over the transposed index: the
(token, slot) pairs sorted by row, so that every row sums its own tokens. No atomics: same input, same bits.

Three implementations behind each name; backend() says which one tensors get, by their device and dtype:

    reference   what the operation means, in one line of PyTorch; for tests and readers
    torch       any device: F.embedding_bag is gather_sum, and its per-sample-weight gradient is gather_dot
    triton      CUDA, float32 and bfloat16: own kernels (on CPU tensors only in tests, by TRITON_INTERPRET=1)

    python kernels.py       check them against the reference and time them

Letters: N tokens, D d_model, C channels, E neurons per channel, n = sqrt(E) sub-keys, k top-k,
J = C*k neurons per token, R = C*E rows, P = N*J (token, slot) pairs; pair p = token*J + slot.
"""
import argparse
import functools
import itertools
import math
import sys
import types
from collections.abc import Callable
from typing import Optional
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:     # Windows, macOS: the kernels are defined, and never launched
    triton, tl, jit = None, types.SimpleNamespace(constexpr=None), lambda kernel: kernel


# -----------------------------------------------------------------------------------------------------------
# reference: what the operations mean

def gather_dot_reference(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """(N, D), (R, D), (N, J) -> (N, J)."""
    return torch.einsum("nd,njd->nj", x, weight[index])


def gather_sum_reference(coef: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """(N, J), (R, D), (N, J) -> (N, D)."""
    return torch.einsum("nj,njd->nd", coef, weight[index])


def product_topk_reference(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(..., 2, n) -> values and flat ids, both (..., k), from the full list of n*n sums."""
    sums = scores[..., 0, :, None] + scores[..., 1, None, :]    # (..., n, n)
    return sums.flatten(-2).topk(k)


# -----------------------------------------------------------------------------------------------------------
# torch: the same on any device, nothing of size (N, J, D)

def _dtypes(a: Tensor, b: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the result of an operation on a and b, and the wider one it accumulates in."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return dtype, torch.promote_types(dtype, torch.float32)


def gather_dot_torch(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    N, J = index.shape
    dtype, wide = _dtypes(x, weight)
    bags = torch.arange(0, N * J, J, dtype=index.dtype, device=index.device)
    tokens = torch.arange(N, dtype=index.dtype, device=index.device).repeat_interleave(J)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.to(wide).contiguous(), weight.to(wide), index.flatten(), bags, tokens, 0)
    return dots.view(N, J).to(dtype)


def gather_sum_torch(coef: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    dtype, wide = _dtypes(coef, weight)
    coef = coef.to(wide).contiguous()
    return F.embedding_bag(index, weight.to(wide), mode="sum", per_sample_weights=coef).to(dtype)


def table_grad_torch(coef: Tensor, x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    dtype, wide = _dtypes(coef, x)
    return F.embedding_bag(order // coef.shape[1], x.to(wide), offsets, mode="sum", include_last_offset=True,
                           per_sample_weights=coef.flatten()[order].to(wide)).to(dtype)


def product_topk_torch(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = _descending(scores, k)                                # (N, C, 2, k) positions of the best sub-keys
    first, second = scores.gather(-1, top).unbind(-2)           # (N, C, k) each
    a, b = top.to(torch.int32).unbind(-2)
    a = a * scores.shape[-1]
    # The pair of ranks (i, j) loses to (i+1)*(j+1) - 1 pairs above it: only these can be among the k best.
    pairs = [(slice(i, i + 1), slice(k // (i + 1))) for i in range(k)]
    sums = torch.cat([first[..., i] + second[..., j] for i, j in pairs], dim=-1)
    ids = torch.cat([a[..., i] + b[..., j] for i, j in pairs], dim=-1)
    win = _descending(sums, k)
    return sums.gather(-1, win), ids.gather(-1, win)


def product_topk_grad_torch(grad: Tensor, ids: Tensor, n: int) -> Tensor:
    halves = torch.stack((ids // n, ids % n), dim=-2).long()    # (N, C, 2, k)
    scores = grad.new_zeros(*halves.shape[:-1], n)
    return scores.scatter_add_(-1, halves, grad.unsqueeze(-2).expand(halves.shape))


def _descending(values: Tensor, k: int) -> Tensor:
    """Positions (..., k) int64 of the k largest of the last dimension, in order; ties: the lower first."""
    if values.device.type != "cpu" or values.dtype == torch.float64:
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # numpy's vectorised integer sort is faster than torch.topk on short rows. Sort 64-bit keys that hold the
    # value, mapped to an int that falls as the float rises, above its position.
    bits = values.float().view(torch.int32)
    falling = bits >> 31
    falling &= 0x7fffffff
    falling ^= bits
    falling ^= -1
    keys = falling.long()
    keys <<= 32
    keys |= torch.arange(values.shape[-1])
    keys.numpy().sort(axis=-1)
    return keys[..., :k] & 0xffffffff


# -----------------------------------------------------------------------------------------------------------
# triton: a program is one warp and sums in float32 (loads are cast: the interpreter cannot add bfloat16)

DOT_SLOTS, DOT_COLS = 8, 256    # tile of gather_dot: slots x columns that a warp asks for at once
SUM_PAIRS, SUM_COLS = 16, 64    # tile of the sums: pairs x columns; 64 columns of a table should fit in L2
SPLIT = 1024                    # no program of the table gradient sums more pairs than this


@jit
def gather_dot_kernel(x, weight, index, out, J, D: tl.constexpr, SLOTS: tl.constexpr, COLS: tl.constexpr):
    """out[n, j] = <x[n], weight[index[n, j]]>            PyTorch: (x[:, None] * weight[index]).sum(-1)

    One program owns one token and SLOTS slots. Tokens run fastest in the grid, so the GPU works through the
    table slot by slot, that is channel by channel, and the rows of one channel (E*D numbers) stay in L2.
    Moves P rows of D, P/SLOTS rows of x, P ids and results.
    """
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(index + n * J + j, j < J, 0).to(tl.int64)                                 # (SLOTS,)
    acc = tl.zeros((SLOTS, COLS), tl.float32)
    for start in tl.static_range(0, D, COLS):
        d = start + tl.arange(0, COLS)
        token = tl.load(x + n * D + d, d < D, 0).to(tl.float32)                             # (COLS,)
        rows = tl.load(weight + row[:, None] * D + d[None, :], (d < D)[None, :], 0).to(tl.float32)
        acc += token[None, :] * rows                                                        # (SLOTS, COLS)
    tl.store(out + n * J + j, tl.sum(acc, 1).to(out.dtype.element_ty), j < J)


@jit
def sum_rows(coef, index, table, count, d, D: tl.constexpr, PAIRS: tl.constexpr):
    """Sum of coef[q] * table[index[q], d] over 0 <= q < count. No coef means 1, no index means row q."""
    acc = tl.zeros((PAIRS, d.shape[0]), tl.float32)
    for first in tl.range(0, count, PAIRS, num_stages=3):       # the next rows are under way during this sum
        q = first + tl.arange(0, PAIRS)
        live = q < count
        q = tl.minimum(q, count - 1)                            # past the end: the last pair again, times 0
        row = (q if index is None else tl.load(index + q)).to(tl.int64)                     # (PAIRS,)
        scale = 1.0 if coef is None else tl.load(coef + q).to(tl.float32)
        rows = tl.load(table + row[:, None] * D + d[None, :], (d < D)[None, :], 0).to(tl.float32)
        acc += tl.where(live, scale, 0.0)[:, None] * rows                                   # (PAIRS, COLS)
    return tl.sum(acc, 0)                                                                   # (COLS,)


@jit
def segment_sum_kernel(coef, index, table, starts, ends, partial, out, D: tl.constexpr, SPLIT: tl.constexpr,
                       PAIRS: tl.constexpr, COLS: tl.constexpr):
    """out[s] = sum of coef[q] * table[index[q]] over starts[s] <= q < ends[s]
    PyTorch: F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=coef)

    One program owns one segment and COLS columns, and writes once; an empty segment gets 0. A segment is the
    picks of a token (gather_sum), or of a table row (its gradient). Segments run fastest in the grid, so the
    GPU works through the table one slice of columns after the other: a slice (R*COLS numbers) stays in L2.
    A row may have many picks. With partial, its program goes only to the first border, a multiple of SPLIT,
    and adds partial[b] of each border (b + 1) * SPLIT inside: the sum from there to the next one or the end.
    Moves P rows of D, P*D/COLS ids and coefficients, and the results.
    """
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    start, end = tl.load(starts + s).to(tl.int64), tl.load(ends + s).to(tl.int64)
    border = start // SPLIT + 1
    stop = end if partial is None else tl.minimum(end, border * SPLIT)
    total = sum_rows(coef + start, index + start, table, (stop - start).to(tl.int32), d, D, PAIRS)
    if partial is not None:
        inside = ((end - 1) // SPLIT - border + 1).to(tl.int32)
        total += sum_rows(None, None, partial + (border - 1) * D, inside, d, D, PAIRS)
    tl.store(out + s * D + d, total.to(out.dtype.element_ty), d < D)


@jit
def pack(x, position):
    """One integer per score that is larger for a larger score and, between equals, for a lower position: the
    bits of the float, those of negatives flipped, which order as the floats do, then 16 bits of position."""
    FLIP: tl.constexpr = 0x7FFFFFFF if x.dtype == tl.float32 else 0x7FFF0000    # bfloat16: the upper half
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & FLIP
    return ((bits.to(tl.int64) << 16) if x.dtype == tl.float32 else bits) | (0xFFFF - position)


@jit
def unpack(key, dtype: tl.constexpr):
    """The score and the position that pack put into the key."""
    FLIP: tl.constexpr = 0x7FFFFFFF if dtype == tl.float32 else 0x7FFF0000
    bits = (key >> 16).to(tl.int32) if dtype == tl.float32 else key & -0x10000
    bits ^= (bits >> 31) & FLIP
    return bits.to(tl.float32, bitcast=True).to(dtype), 0xFFFF - (key & 0xFFFF).to(tl.int32)


@jit
def largest(key, K: tl.constexpr, KP: tl.constexpr, LOWEST: tl.constexpr):
    """The K largest of key (M,), all different, in descending order, padded with LOWEST to (KP,)."""
    top = tl.full((KP,), LOWEST, key.dtype)
    for rank in tl.static_range(K):
        best = tl.max(key, 0)
        top = tl.where(tl.arange(0, KP) == rank, best, top)
        key = tl.where(key == best, LOWEST, key)
    return top


@jit
def product_topk_kernel(scores, gates, ids, n, K: tl.constexpr, KP: tl.constexpr, NP: tl.constexpr):
    """The K largest of the n*n sums scores[m, 0, i] + scores[m, 1, j] and their ids i*n + j, largest first.
    PyTorch: (scores[..., 0, :, None] + scores[..., 1, None, :]).flatten(-2).topk(K)

    One program owns one token and channel m: the top K of each half, then the top K of the sums of these, of
    which only (i + 1) * (j + 1) <= K can win. Between equals the lower position wins, in all three. Keys are
    all different, so ids are too, and in range, whatever the scores. Moves N*C*2n scores, P gates and ids.
    """
    dtype: tl.constexpr = scores.dtype.element_ty
    LOWEST: tl.constexpr = -(1 << 62) if dtype == tl.float32 else -(1 << 31)
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)
    half = scores + m * (2 * n) + i
    first = tl.where(i < n, pack(tl.load(half, i < n, 0), i), LOWEST)                       # (NP,)
    second = tl.where(i < n, pack(tl.load(half + n, i < n, 0), i), LOWEST)
    a, row = unpack(largest(first, K, KP, LOWEST), dtype)                                   # (KP,)
    b, col = unpack(largest(second, K, KP, LOWEST), dtype)

    s = tl.arange(0, KP)
    total = (a.to(tl.float32)[:, None] + b.to(tl.float32)[None, :]).to(dtype)               # (KP, KP)
    can_win = (s[:, None] + 1) * (s[None, :] + 1) <= K
    key = tl.where(can_win, pack(total, s[:, None] * KP + s[None, :]), LOWEST)
    gate, place = unpack(largest(tl.reshape(key, (KP * KP,)), K, KP, LOWEST), dtype)        # (KP,)
    pick = tl.gather(row, (place // KP) % KP, 0) * n + tl.gather(col, place % KP, 0)
    tl.store(gates + m * K + s, gate, s < K)
    tl.store(ids + m * K + s, pick, s < K)


@jit
def product_topk_grad_kernel(grad, ids, out, n, K: tl.constexpr, NP: tl.constexpr):
    """out[m, 0, i] = sum of grad[m, s] where ids[m, s] // n == i; out[m, 1, j] where ids[m, s] % n == j.
    PyTorch: zeros(N, C, n).scatter_add_(-1, ids // n, grad), and the same with ids % n

    One program owns one token and channel m. Moves P ids and gradients, N*C*2n results.
    """
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)
    first, second = tl.zeros((NP,), tl.float32), tl.zeros((NP,), tl.float32)
    for s in tl.static_range(K):
        g = tl.load(grad + m * K + s).to(tl.float32)
        pick = tl.load(ids + m * K + s)
        first += tl.where(i == pick // n, g, 0.0)
        second += tl.where(i == pick % n, g, 0.0)
    half = out + m * (2 * n) + i
    tl.store(half, first.to(out.dtype.element_ty), i < n)
    tl.store(half + n, second.to(out.dtype.element_ty), i < n)


def launch(kernel, grid: tuple[int, ...], *args) -> None:
    """One warp per program, on the device of the first argument, which need not be the current one."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, num_warps=1, enable_fp_fusion=True)     # a * b + c in one instruction


def gather_dot_triton(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    (N, D), J = x.shape, index.shape[1]
    out = x.new_empty(N, J, dtype=_dtypes(x, weight)[0])
    launch(gather_dot_kernel, (N, triton.cdiv(J, DOT_SLOTS)), x.contiguous(), weight.contiguous(),
           index.contiguous(), out, J, D, DOT_SLOTS, min(DOT_COLS, triton.next_power_of_2(D)))
    return out


def segment_sum(coef: Tensor, index: Tensor, table: Tensor, starts: Tensor, ends: Tensor,
                dtype: torch.dtype, partial: Optional[Tensor] = None) -> Tensor:
    D, cols = table.shape[1], min(SUM_COLS, triton.next_power_of_2(table.shape[1]))
    out = table.new_empty(len(starts), D, dtype=dtype)
    launch(segment_sum_kernel, (len(starts), triton.cdiv(D, cols)), coef.contiguous(), index.contiguous(),
           table.contiguous(), starts, ends, partial, out, D, SPLIT, SUM_PAIRS, cols)
    return out


def gather_sum_triton(coef: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    bounds = torch.arange(0, index.numel() + 1, index.shape[1], device=index.device)       # (N+1,)
    return segment_sum(coef, index, weight, bounds[:-1], bounds[1:], _dtypes(coef, weight)[0])


def table_grad_triton(coef: Tensor, x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    # permuted once: all slices of columns read them
    token, coef, dtype = order // coef.shape[1], coef.flatten().index_select(0, order), _dtypes(coef, x)[0]
    borders = torch.arange(SPLIT, max(len(order), SPLIT), SPLIT, dtype=torch.int32, device=x.device)
    row_end = offsets[torch.searchsorted(offsets, borders)]     # of the row of the pair before the border
    partial = segment_sum(coef, token, x, borders, torch.minimum(borders + SPLIT, row_end), torch.float32)
    return segment_sum(coef, token, x, offsets[:-1], offsets[1:], dtype, partial)


def product_topk_triton(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    *shape, _, n = scores.shape
    gates, ids = scores.new_empty(*shape, k), scores.new_empty(*shape, k, dtype=torch.int32)
    launch(product_topk_kernel, (math.prod(shape),), scores.contiguous(), gates, ids, n, k,
           max(2, triton.next_power_of_2(k)), triton.next_power_of_2(n))
    return gates, ids


def product_topk_grad_triton(grad: Tensor, ids: Tensor, n: int) -> Tensor:
    *shape, k = ids.shape
    out = grad.new_empty(*shape, 2, n)
    launch(product_topk_grad_kernel, (math.prod(shape),), grad.contiguous(), ids.contiguous(), out, n, k,
           triton.next_power_of_2(n))
    return out


# -----------------------------------------------------------------------------------------------------------
# the operations: an implementation by device and dtype, shapes for torch.compile, gradients

def backend(device: str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The implementation that tensors of a device ("cpu", "cuda") and dtype get, and the reason."""
    if device != "cuda":
        return "torch", f"the device is {device}"
    if triton is None:
        return "torch", "triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (7, 5):
        return "torch", f"{torch.cuda.get_device_name()} is older than compute capability 7.5"
    if dtype not in (torch.float32, torch.bfloat16):
        return "torch", f"the Triton kernels take float32 and bfloat16, not {str(dtype)[6:]}"
    return "triton", f"{torch.cuda.get_device_name()}, triton {triton.__version__}"


@functools.cache
def _runs_triton(device: str, dtype: torch.dtype) -> bool:
    name, reason = backend(device, dtype)
    if name != backend(device)[0]:      # known only now: the dtype is to blame
        print(f"kernels: {name}, {reason}", flush=True)
    return name == "triton"


def _pick(in_torch: Callable, in_triton: Callable, *tensors: Tensor) -> Callable:
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return in_triton if _runs_triton(tensors[0].device.type, dtype) else in_torch


def _op(empty: Callable) -> Callable:
    """Makes an operation opaque to torch.compile, which learns from `empty` what the results look like."""
    def register(fn):
        op = torch.library.custom_op(f"sgatlin::{fn.__name__.strip('_')}", fn, mutates_args=())
        op.register_fake(empty)
        return op
    return register


@_op(lambda index, n_rows: tuple(index.new_empty(m, dtype=torch.int32) for m in (index.numel(), n_rows + 1)))
def transpose_index(index: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """The pairs sorted by row: what the gradient of a table needs. One sort serves all tables of a layer.

    Args: index (N, J) int32, the row of each pair; n_rows R.
    Returns: order (P,) int32, the pairs by row, then by token; offsets (R+1,) int32: the pairs of row r are
    order[offsets[r]:offsets[r+1]].
    """
    if index.numel() + SPLIT >= 2**31:
        raise ValueError(f"N*J = {index.numel()} pairs overflow 32 bits: pass fewer tokens at a time")
    rows = index.flatten()
    if n_rows < 2**15:
        rows = rows.to(torch.int16)                             # half the passes of the radix sort
    rows, order = rows.sort(stable=True)
    bounds = torch.arange(n_rows + 1, device=rows.device, dtype=rows.dtype)
    return order.to(torch.int32), torch.searchsorted(rows, bounds, out_int32=True)


@_op(lambda x, weight, index, order, offsets: x.new_empty(index.shape, dtype=_dtypes(x, weight)[0]))
def _gather_dot(x: Tensor, weight: Tensor, index: Tensor,
                order: Optional[Tensor], offsets: Optional[Tensor]) -> Tensor:
    return _pick(gather_dot_torch, gather_dot_triton, x, weight)(x, weight, index)


@_op(lambda coef, weight, *_: coef.new_empty(len(coef), weight.shape[1], dtype=_dtypes(coef, weight)[0]))
def _gather_sum(coef: Tensor, weight: Tensor, index: Tensor,
                order: Optional[Tensor], offsets: Optional[Tensor]) -> Tensor:
    return _pick(gather_sum_torch, gather_sum_triton, coef, weight)(coef, weight, index)


@_op(lambda coef, x, _, offsets: x.new_empty(len(offsets) - 1, x.shape[1], dtype=_dtypes(coef, x)[0]))
def _table_grad(coef: Tensor, x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    return _pick(table_grad_torch, table_grad_triton, coef, x)(coef, x, order, offsets)


@_op(lambda s, k: tuple(s.new_empty(*s.shape[:-2], k, dtype=dtype) for dtype in (s.dtype, torch.int32)))
def _product_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _pick(product_topk_torch, product_topk_triton, scores)(scores, k)


@_op(lambda grad, ids, n: grad.new_empty(*ids.shape[:-1], 2, n))
def _product_topk_grad(grad: Tensor, ids: Tensor, n: int) -> Tensor:
    return _pick(product_topk_grad_torch, product_topk_grad_triton, grad)(grad, ids, n)


def _save_operands(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad, other):
    """The gradients of one primitive; the other one takes them to the first operand."""
    first, weight, index, *by_row = ctx.saved_tensors   # read once: checkpointing forbids a second time
    coef, x = (first, grad) if other is gather_dot else (grad, first)
    grad_first = other(grad, weight, index).to(first.dtype) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        order, offsets = transpose_index(index, len(weight)) if by_row[0] is None else by_row
        grad_weight = _table_grad(coef, x, order, offsets).to(weight.dtype)
    return grad_first, grad_weight, None, None, None


def _product_topk_setup(ctx, inputs, output):
    ctx.n = inputs[0].shape[-1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _product_topk_backward(ctx, grad, _):
    return _product_topk_grad(grad, *ctx.saved_tensors, ctx.n), None


ByRow = tuple[Tensor, Tensor]


def gather_dot(x: Tensor, weight: Tensor, index: Tensor, by_row: Optional[ByRow] = None) -> Tensor:
    """out[n, j] = <x[n], weight[index[n, j]]>: (N, D), (R, D), (N, J) int32 in [0, R) -> (N, J).

    float64, float32 or bfloat16, accumulated in at least float32; the result has the promoted dtype.
    by_row: transpose_index(index, R), for the gradient of weight; computed there when absent.
    """
    return _gather_dot(x, weight, index, *(by_row or (None, None)))


def gather_sum(coef: Tensor, weight: Tensor, index: Tensor, by_row: Optional[ByRow] = None) -> Tensor:
    """out[n] = sum_j coef[n, j] * weight[index[n, j]]: (N, J), (R, D), (N, J) int32 -> (N, D).

    Dtypes and by_row as in gather_dot.
    """
    return _gather_sum(coef, weight, index, *(by_row or (None, None)))


def product_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the n*n sums scores[..., 0, a] + scores[..., 1, b], without forming them all.

    Args: scores (N, C, 2, n), the similarities to the first and second sub-keys; k <= n.
    Returns: gates (N, C, k), the sums, descending; ids (N, C, k) int32, a*n + b. Ties go to the lower rank
    of a, then of b. Product keys: Lample et al., arXiv 1907.05242.
    """
    if k > scores.shape[-1]:
        raise ValueError(f"k={k} exceeds the {scores.shape[-1]} sub-keys")
    return _product_topk(scores, k)


_gather_dot.register_autograd(functools.partial(_backward, other=gather_sum), setup_context=_save_operands)
_gather_sum.register_autograd(functools.partial(_backward, other=gather_dot), setup_context=_save_operands)
_product_topk.register_autograd(_product_topk_backward, setup_context=_product_topk_setup)


# -----------------------------------------------------------------------------------------------------------
# python kernels.py

def normal(*shape: int, std: float = 1.0, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device).mul_(std).to(dtype)


def random_layer(N: int, D: int, C: int, n: int, k: int, **kind) -> dict[str, Tensor]:
    """Inputs of one layer as at initialisation: scores, gates, index, x, the two tables, and dy."""
    R = C * n * n
    scores = normal(N, C, 2, n, **kind)
    gates, ids = product_topk(scores, k)
    index = (ids + torch.arange(0, R, n * n, dtype=torch.int32, device=ids.device)[:, None]).flatten(1)
    x, dy, w_in, w_out = (normal(*shape, **kind) for shape in ((N, D), (N, D), (R, D), (R, D)))
    gates, w_in, w_out = gates.flatten(1), w_in / n, w_out / n
    return dict(scores=scores, gates=gates, index=index, x=x, w_in=w_in, w_out=w_out, dy=dy)


def layer(x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, index: Tensor) -> Tensor:
    by_row = transpose_index(index, len(w_in)) if torch.is_grad_enabled() else None
    return gather_sum(gates * gather_dot(x, w_in, index, by_row), w_out, index, by_row)


def layer_reference(x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, index: Tensor) -> Tensor:
    return gather_sum_reference(gates * gather_dot_reference(x, w_in, index), w_out, index)


def gradients(fn: Callable, dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    """[y, the gradient of <y, dy> for each input]."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = fn(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def check(device: str, dtype: torch.dtype) -> None:
    """Prints errors of the layer, the top-k and their gradients, relative to the reference in float64."""
    shapes = [(7, 16, 1, 3, 2), (57, 80, 2, 11, 8), (300, 128, 4, 16, 8), (1300, 64, 1, 2, 2)]
    for N, D, C, n, k in shapes + [(1000, 768, 16, 88, 8)] * (device == "cuda"):
        t = random_layer(N, D, C, n, k, device=device, dtype=dtype)
        operands = [t[name] for name in ("x", "gates", "w_in", "w_out")]
        ours = gradients(lambda *a: layer(*a, t["index"]), t["dy"], *operands)
        truth = gradients(lambda *a: layer_reference(*a, t["index"]), t["dy"].double(),
                          *(o.double() for o in operands))
        gates, ids = product_topk(t["scores"], k)
        halves, dgates = torch.stack((ids // n, ids % n), dim=-2).long(), torch.randn_like(gates)
        exact = (torch.equal(gates, product_topk_reference(t["scores"], k)[0])
                 and torch.equal(gates, sum(t["scores"].gather(-1, halves).unbind(-2)))
                 and ids.sort(-1).values.diff(dim=-1).all())
        ours += gradients(lambda s: product_topk(s, k)[0], dgates, t["scores"])[1:]
        truth += gradients(lambda s: s.gather(-1, halves).sum(-2), dgates.double(), t["scores"].double())[1:]
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, truth)]
        named = zip(("y", "dx", "dgates", "dw_in", "dw_out", "dscores"), errors)
        print(f"  N={N:<4} D={D:<3} C={C:<2} n={n:<2} k={k} ", *(f"{name} {e:.0e}" for name, e in named),
              f"top-k {'exact' if exact else 'WRONG'}", flush=True)
        if not (max(errors) < (1e-2 if dtype == torch.bfloat16 else 1e-6) and exact):
            raise SystemExit("kernels: an implementation disagrees with the reference")


def median_ms(fn: Callable) -> float:
    """Median wall time of fn in ms, over about a second and after a warm-up."""
    return 1e3 * Timer("fn()", globals=dict(fn=fn), num_threads=torch.get_num_threads()).blocked_autorange(
        min_run_time=1.0).median


def peak_bytes(fn: Callable, device: str) -> int:
    """The most memory that fn holds at a time beyond what was there before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def measure(fn: Callable, dy: Tensor, *inputs: Tensor) -> tuple[float, float, float, str]:
    """ms forward, ms forward and backward, extra bytes; or nan thrice, and why it does not run."""
    try:
        with torch.no_grad():
            forward = median_ms(lambda: fn(*inputs))
        both = functools.partial(gradients, fn, dy, *inputs)
        return forward, median_ms(both), peak_bytes(both, dy.device.type), ""
    except RuntimeError as error:       # out of memory, or no compiler
        return math.nan, math.nan, math.nan, str(error).splitlines()[0][:85]


def benchmark(N: int, D: int, C: int, n: int, k: int, width: int, copy: float, **kind) -> None:
    """Prints the table of one shape: the layer behind its router, and what it is to be compared with.

    width: of the hidden layer of the dense layers; copy: GB/s of copying; kind: device and dtype.
    """
    def mlp(x, up, down):
        return F.linear(F.gelu(F.linear(x, up), approximate="tanh"), down)

    def swiglu(x, up, down):
        a, b = F.linear(x, up).chunk(2, dim=-1)
        return F.linear(F.silu(a) * b, down)

    t = random_layer(N, D, C, n, k, **kind)
    index, dy, operands = t["index"], t["dy"], [t[name] for name in ("x", "gates", "w_in", "w_out")]
    up, gated_up = (normal(m * width, D, std=D ** -0.5, **kind) for m in (1, 2))
    down = normal(D, width, std=width ** -0.5, **kind)
    layers, own = {"reference gather": layer_reference, "torch": layer}, backend(**kind)[0] == "triton"
    if own:
        torch.compiler.reset()
        layers |= {"reference compiled": torch.compile(layer_reference, dynamic=False), "triton": layer}
    rows = {name: (lambda *a, fn=fn: fn(*a, index), dy, *operands) for name, fn in layers.items()}
    rows[f"GELU MLP {width}"] = mlp, dy, t["x"], up, down
    rows[f"SwiGLU {width}"] = swiglu, dy, t["x"], gated_up, down
    for name, fn in (("reference top-k", product_topk_reference), ("top-k", product_topk)):
        rows[name] = lambda s, fn=fn: fn(s, k)[0], t["gates"].view(N, C, k), t["scores"]
    baseline = math.nan
    print(f"\nN={N} D={D} C={C} E={n * n} k={k} {str(dy.dtype)[6:]}: forward gathers 2 x {index.numel()} of "
          f"{len(t['w_in'])} rows of {dy[0].nbytes} bytes\n"
          f"{'':20}  forward  +backward    speed    extra   peak/     rows   of\n"
          f"{'':20}       ms         ms                MB  needed     GB/s copy")
    for name, (fn, dy, *inputs) in rows.items():
        with mock.patch(f"{__name__}._runs_triton", lambda *key: own and name != "torch"):
            forward, total, extra, trouble = measure(fn, dy, *inputs)
        baseline = total if name in ("reference gather", "reference top-k") else baseline
        if trouble:
            print(f"{name:20}  {trouble}", flush=True)
            continue
        results = sum(t.nbytes for t in (dy, *inputs))          # the output, and a gradient for every input
        given = results + (index.nbytes if name in layers else 0)
        line = (f"{name:20}{forward:9.2f}{total:11.2f}{baseline / total:8.1f}x{extra / 1e6:9.0f}"
                f"{(given + extra) / (given + results):8.2f}")
        if name in layers:
            speed = 2 * index.numel() * dy[0].nbytes / forward / 1e6
            line += f"{speed:9.0f}{speed / copy:5.0%}"
        print(line, flush=True)


def gather_bandwidth(device: str) -> None:
    """M1: does a table that fits into the L2 cache pay? Rows of 1536 bytes, drawn at random."""
    kind, N, J, D = dict(device=device, dtype=torch.bfloat16), 2**15, 64, 768
    coef, x = normal(N, J, **kind), normal(N, D, **kind)
    print(f"\nrandom rows of {2 * D} bytes, GB/s\n{'table MB':>10}{'gather_sum':>12}{'gather_dot':>12}")
    for size in (6, 12, 24, 48, 96, 190, 381):
        weight = normal(size * 10**6 // (2 * D), D, **kind)
        index = torch.randint(len(weight), (N, J), dtype=torch.int32, device=device)
        speeds = [2 * N * J * D / 1e6 / median_ms(lambda: fn(a, weight, index))
                  for fn, a in ((gather_sum, coef), (gather_dot, x))]
        print(f"{size:10}{speeds[0]:12.0f}{speeds[1]:12.0f}", flush=True)


def main() -> None:
    argparse.ArgumentParser(description="Check the kernels against the reference, then time them.").parse_args()
    sys.modules["kernels"] = sys.modules[__name__]      # model.py imports this file, which runs already
    from model import GPTConfig
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, reason = backend(device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads; kernels: {name}, {reason}")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{name} against the reference in float64, {str(dtype)[6:]}:")
        check(device, dtype)
    source, target = torch.ones(2, 2**28 if device == "cuda" else 2**24, device=device)
    copy = 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6
    del source, target
    print(f"copying runs at {copy:.0f} GB/s")
    if device == "cuda":
        kind = dict(device=device, dtype=torch.bfloat16)
        benchmark(262144, 256, 8, 32, 8, 1024, copy, **kind)
        for scale in (2, 4, 6):
            cfg, dense = GPTConfig.ladder("sgatlin", scale), GPTConfig.ladder("swiglu", scale)
            n = math.isqrt(cfg.n_experts)
            benchmark(131072, cfg.d_model, cfg.n_channels, n, cfg.top_k, dense.d_ff, copy, **kind)
        gather_bandwidth(device)
    else:
        benchmark(4096, 256, 8, 32, 8, 1024, copy, device=device, dtype=torch.float32)
        print("skipped, for torch sees no CUDA device: the full-size tables and the gather bandwidth")


if __name__ == "__main__":
    main()
