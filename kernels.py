"""The operations of an sgatlin layer: two primitives, each the other's backward, and a top-k.

    gather_dot(x, weight, index)     out[n, j] = <x[n], weight[index[n, j]]>
    gather_sum(coef, weight, index)  out[n]    = sum_j coef[n, j] * weight[index[n, j]]
    product_topk(scores, k)          the k largest of the n*n sums of two score lists ("product keys")

The neurons of all channels lie in one table of R rows; token n uses the J rows index[n]. Nothing of size
(N, J, D) is ever made. The gradient of a table is a gather_sum again, over the transposed index: the
(token, slot) pairs sorted by row, so that every row sums its own tokens. No atomics: same input, same bits.

Two implementations behind each name, chosen by PyTorch's dispatcher from where the tensors live:

    reference   what the operation means, in one line of PyTorch; for tests and readers
    torch       any device: F.embedding_bag is gather_sum, and its per-sample-weight gradient is gather_dot

    python kernels.py     check every implementation against the reference and time it

Letters: N tokens, D d_model, C channels, E neurons per channel, n = sqrt(E) sub-keys, k top-k,
J = C*k neurons per token, R = C*E rows, P = N*J (token, slot) pairs.
"""
import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


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

def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("sgatlin::transpose_index", mutates_args=())
def transpose_index(index: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """The pairs sorted by row: what the gradient of a table needs. One sort serves all tables of a layer.

    Args: index (N, J) int32, the row of each pair; n_rows R.
    Returns: order (P,) int32, the pair numbers n*J + j by row, then by token; offsets (R+1,) int32: the
    pairs of row r are order[offsets[r]:offsets[r+1]].
    """
    rows = index.flatten()
    if n_rows < 2**15 and index.device.type == "cpu":
        rows = rows.to(torch.int16)                             # half the passes of the radix sort
    rows, order = rows.sort(stable=True)
    bounds = torch.arange(n_rows + 1, device=rows.device, dtype=rows.dtype)
    return order.to(torch.int32), torch.searchsorted(rows, bounds, out_int32=True)


@torch.library.custom_op("sgatlin::gather_dot", mutates_args=())
def _gather_dot(x: Tensor, weight: Tensor, index: Tensor,
                order: Optional[Tensor], offsets: Optional[Tensor]) -> Tensor:
    N, J = index.shape
    dtype, wide = _dtypes(x, weight)
    bags = torch.arange(0, N * J, J, dtype=index.dtype, device=index.device)
    tokens = torch.arange(N, dtype=index.dtype, device=index.device).repeat_interleave(J)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.to(wide).contiguous(), weight.to(wide), index.flatten(), bags, tokens, 0)
    return dots.view(N, J).to(dtype)


@torch.library.custom_op("sgatlin::gather_sum", mutates_args=())
def _gather_sum(coef: Tensor, weight: Tensor, index: Tensor,
                order: Optional[Tensor], offsets: Optional[Tensor]) -> Tensor:
    dtype, wide = _dtypes(coef, weight)
    coef = coef.to(wide).contiguous()
    return F.embedding_bag(index, weight.to(wide), mode="sum", per_sample_weights=coef).to(dtype)


@torch.library.custom_op("sgatlin::table_grad", mutates_args=())
def _table_grad(coef: Tensor, x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    dtype, wide = _dtypes(coef, x)
    return F.embedding_bag(order // coef.shape[1], x.to(wide), offsets, mode="sum", include_last_offset=True,
                           per_sample_weights=coef.flatten()[order].to(wide)).to(dtype)


@torch.library.custom_op("sgatlin::product_topk", mutates_args=())
def _product_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
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


@torch.library.custom_op("sgatlin::product_topk_grad", mutates_args=())
def _product_topk_grad(grad: Tensor, ids: Tensor, n: int) -> Tensor:
    halves = torch.stack((ids // n, ids % n), dim=-2).long()    # (N, C, 2, k)
    scores = grad.new_zeros(*halves.shape[:-1], n)
    return scores.scatter_add_(-1, halves, grad.unsqueeze(-2).expand(halves.shape))


def _dtypes(a: Tensor, b: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the result of an operation on a and b, and the wider one it accumulates in."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return dtype, torch.promote_types(dtype, torch.float32)


def _descending(values: Tensor, k: int) -> Tensor:
    """Positions (..., k) int64 of the k largest of the last dimension, in order; ties: the lower position."""
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
# the public operations: shapes for torch.compile, and gradients

@transpose_index.register_fake
def _(index, n_rows):
    return index.new_empty(index.numel()), index.new_empty(n_rows + 1)


@_gather_dot.register_fake
def _(x, weight, index, order, offsets):
    return x.new_empty(index.shape, dtype=_dtypes(x, weight)[0])


@_gather_sum.register_fake
def _(coef, weight, index, order, offsets):
    return coef.new_empty(len(coef), weight.shape[1], dtype=_dtypes(coef, weight)[0])


@_table_grad.register_fake
def _(coef, x, order, offsets):
    return x.new_empty(len(offsets) - 1, x.shape[1], dtype=_dtypes(coef, x)[0])


@_product_topk.register_fake
def _(scores, k):
    shape = (*scores.shape[:-2], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int32)


@_product_topk_grad.register_fake
def _(grad, ids, n):
    return grad.new_empty(*ids.shape[:-1], 2, n)


def _save_operands(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _table_gradient(coef, x, weight, index, order, offsets):
    if order is None:
        order, offsets = transpose_index(index, len(weight))
    return _table_grad(coef, x, order, offsets).to(weight.dtype)


def _gather_dot_backward(ctx, grad):
    x, weight, index, order, offsets = ctx.saved_tensors
    grad_x = gather_sum(grad, weight, index).to(x.dtype) if ctx.needs_input_grad[0] else None
    grad_weight = (_table_gradient(grad, x, weight, index, order, offsets)
                   if ctx.needs_input_grad[1] else None)
    return grad_x, grad_weight, None, None, None


def _gather_sum_backward(ctx, grad):
    coef, weight, index, order, offsets = ctx.saved_tensors
    grad_coef = gather_dot(grad, weight, index).to(coef.dtype) if ctx.needs_input_grad[0] else None
    grad_weight = (_table_gradient(coef, grad, weight, index, order, offsets)
                   if ctx.needs_input_grad[1] else None)
    return grad_coef, grad_weight, None, None, None


def _product_topk_setup(ctx, inputs, output):
    ctx.n = inputs[0].shape[-1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _product_topk_backward(ctx, grad, _):
    return _product_topk_grad(grad, *ctx.saved_tensors, ctx.n), None


_gather_dot.register_autograd(_gather_dot_backward, setup_context=_save_operands)
_gather_sum.register_autograd(_gather_sum_backward, setup_context=_save_operands)
_product_topk.register_autograd(_product_topk_backward, setup_context=_product_topk_setup)

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
    return _product_topk(scores, k)


def backend(device: str) -> tuple[str, str]:
    """The implementation that tensors on a device ("cpu", "cuda") get, and the reason."""
    return "torch", f"the device is {device}"


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
    return dict(scores=scores, gates=gates.flatten(1), index=index, x=normal(N, D, **kind),
                w_in=normal(R, D, std=1 / n, **kind), w_out=normal(R, D, std=1 / n, **kind), dy=normal(N, D, **kind))


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
    """Prints the relative error of the layer and its gradients against the reference in float64."""
    for N, D, C, n, k in ((1, 16, 1, 3, 2), (57, 80, 2, 11, 8), (300, 128, 4, 16, 8)):
        t = random_layer(N, D, C, n, k, device=device, dtype=dtype)
        operands = [t[name] for name in ("x", "gates", "w_in", "w_out")]
        ours = gradients(lambda *a: layer(*a, t["index"]), t["dy"], *operands)
        truth = gradients(lambda *a: layer_reference(*a, t["index"]), t["dy"].double(),
                          *(o.double() for o in operands))
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, truth)]
        gates, ids = product_topk(t["scores"], k)
        sums = t["scores"].gather(-1, torch.stack((ids // n, ids % n), dim=-2).long()).unbind(-2)
        exact = torch.equal(gates, product_topk_reference(t["scores"], k)[0]) and torch.equal(gates, sum(sums))
        names = ("y", "dx", "dgates", "dw_in", "dw_out")
        print(f"  N={N:<4} D={D:<4} C={C} n={n:<3} k={k}  relative error: "
              + "  ".join(f"{name} {error:.0e}" for name, error in zip(names, errors))
              + f"  top-k {'exact' if exact else 'WRONG'}")
        if max(errors) > (1e-2 if dtype == torch.bfloat16 else 1e-6) or not exact:
            raise SystemExit("kernels: an implementation disagrees with the reference")


def median_ms(fn: Callable, device: str, budget: float = 2.0) -> float:
    """Median wall time of fn in ms over about `budget` seconds, of at least 3 runs after a warm-up."""
    times = []
    while len(times) < 4 or sum(times) < budget and len(times) < 50:
        start = time.perf_counter()
        fn()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


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


def benchmark(device: str, N: int, D: int, C: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Prints the table of one shape: the layer behind its router, and what it is to be compared with."""
    kind = dict(device=device, dtype=dtype)
    t = random_layer(N, D, C, n, k, **kind)
    R, J = len(t["w_in"]), t["index"].shape[1]
    operands = [t[name] for name in ("x", "gates", "w_in", "w_out")]
    up, gated_up = (normal(width * D, D, std=D ** -0.5, **kind) for width in (4, 8))
    down = normal(D, 4 * D, std=(4 * D) ** -0.5, **kind)

    def mlp(x, up, down):
        return F.linear(F.gelu(F.linear(x, up), approximate="tanh"), down)

    def swiglu(x, up, down):
        a, b = F.linear(x, up).chunk(2, dim=-1)
        return F.linear(F.silu(a) * b, down)

    rows = {"reference gather": (layer_reference, operands, [t["index"]]),
            backend(device)[0]: (layer, operands, [t["index"]]),
            f"GELU MLP {4 * D}": (mlp, [t["x"], up, down], []),
            f"SwiGLU {4 * D}": (swiglu, [t["x"], gated_up, down], [])}
    item = t["x"].element_size()
    source, target = torch.ones(2, 2**26 // item, device=device, dtype=dtype)
    copy = 2 * source.nbytes / median_ms(lambda: target.copy_(source), device) / 1e6
    print(f"\nN={N} D={D} C={C} E={n * n} k={k} {str(dtype)[6:]}: {R} rows of {D * item} bytes, forward gathers "
          f"2 x {N * J} of them; copying runs at {copy:.1f} GB/s")
    print(f"{'':20}{'forward':>10}{'+backward':>11}{'speed':>9}{'extra':>9}{'rows':>10}{'of copy':>9}\n"
          f"{'':20}{'ms':>10}{'ms':>11}{'':>9}{'MB':>9}{'GB/s':>10}")
    slowest = None
    for name, (fn, inputs, rest) in rows.items():
        def both():
            gradients(lambda *a: fn(*a, *rest), t["dy"], *inputs)

        with torch.no_grad():
            forward = median_ms(lambda: fn(*inputs, *rest), device)
        total = median_ms(both, device)
        slowest = slowest or total
        extra = peak_bytes(both, device) / 1e6
        line = f"{name:20}{forward:10.1f}{total:11.1f}{slowest / total:8.1f}x{extra:9.0f}"
        if rest:
            gathered = 2 * N * J * D * item / forward / 1e6
            line += f"{gathered:10.1f}{gathered / copy:9.0%}"
        print(line, flush=True)
    scores = t["scores"]
    for name, fn in (("top-k", product_topk), ("top-k of n*n sums", product_topk_reference)):
        with torch.no_grad():
            print(f"{name:20}{median_ms(lambda: fn(scores, k), device):10.1f}", flush=True)


def main() -> None:
    argparse.ArgumentParser(description="Check the kernels against the reference, then time them.").parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, reason = backend(device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; kernels: {name}, {reason}")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{name} against the reference in float64, {str(dtype)[6:]}:")
        check(device, dtype)
    benchmark(device, 4096, 256, 8, 32, 8, torch.float32)


if __name__ == "__main__":
    main()
