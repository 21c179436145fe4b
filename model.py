"""A GPT whose feedforward layers are sparsely gated tiny linear experts (sgatlin, arXiv 2606.07414).

Every channel c has its own pool of E linear neurons. A router gives each token k of them, with scores g:

    y = sum_c sum_j  g_cj * <w_in[c, i_cj], x> * w_out[c, i_cj]

There is no nonlinearity and no softmax: given the gates the layer is linear in x, so its circuit can be read
from the gates alone. The four baselines of the paper (peer, moe, swiglu, mlp) stand beside it. Semantics,
initialisation and FLOP counts follow the paper's JAX code; test_model.py holds them to its numbers.

The output of a Router is (gates, ids). A forward hook on it records the routing, and a hook that returns
other gates intervenes on it.

Letters: B batch, T time, N = B*T tokens, V vocabulary, L layers, D d_model, H heads, Dh d_head,
C channels, E neurons per channel, n = sqrt(E) sub-keys, k top_k, K d_key, F d_ff.
"""
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels


@dataclass
class GPTConfig:
    vocab_size: int = 8192    # tokens in the vocabulary
    block_size: int = 1024    # longest context, in tokens
    n_layer: int = 4          # transformer blocks
    d_model: int = 256        # width of the residual stream; a multiple of d_head
    d_head: int = 64          # width of an attention head; even
    ffn: Literal["sgatlin", "peer", "moe", "swiglu", "mlp"] = "sgatlin"  # the feedforward layer
    d_ff: int = 0             # hidden width of mlp, swiglu and each expert of moe; 0: 4 * d_model
    n_experts: int = 0        # neurons per channel (sgatlin), in all (peer), experts (moe); 0: 1024, moe 8
    n_channels: int = 8       # independent choices of top_k per token; sgatlin, peer
    top_k: int = 0            # neurons per token and channel, or experts per token (moe); 0: 8, moe 2
    d_key: int = 128          # width of the router's queries and keys
    router: Literal["product_dense", "product_key", "dense", "key"] = "product_dense"  # sgatlin; see Router
    activation: Literal["identity", "gelu", "relu", "swish"] = "identity"  # after the gate; sgatlin
    softmax_gates: bool = False  # gates of a channel through softmax, as in PEER; sgatlin
    shared_pool: bool = False    # one pool of neurons for all channels, as in PEER; sgatlin
    norm: bool = True         # RMSNorm before every layer, on queries and keys, and at the end

    def __post_init__(self):
        moe = self.ffn == "moe"
        self.d_ff = self.d_ff or 4 * self.d_model
        self.n_experts = self.n_experts or (8 if moe else 1024)
        self.top_k = self.top_k or (2 if moe else 8)
        for name, value in vars(self).items():
            if name in GPTConfig.__annotations__ and type(value) is int and value < 1:
                raise ValueError(f"{name}={value} must be positive")
        for name, choices in (("ffn", FFN), ("router", ROUTERS), ("activation", ACTIVATION)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(choices)}")
        if self.d_head % 2 or self.d_model % self.d_head:
            raise ValueError(f"d_head={self.d_head} must be even and divide d_model={self.d_model}")
        if self.ffn != "sgatlin" and (self.softmax_gates or self.shared_pool):
            raise ValueError(f"softmax_gates and shared_pool are for ffn=sgatlin, not for ffn={self.ffn}")
        if self.ffn in ("sgatlin", "peer"):
            product = self.ffn == "peer" or self.router.startswith("product")
            n = math.isqrt(self.n_experts)
            if product and n * n != self.n_experts:
                raise ValueError(f"n_experts={self.n_experts} must be a square for product keys: "
                                 f"take {n * n} or {(n + 1) ** 2}")
            if self.top_k >= (n if product else self.n_experts):
                keys = f"{n} sub-keys" if product else f"{self.n_experts} keys"
                raise ValueError(f"top_k={self.top_k} must be less than the {keys} of "
                                 f"n_experts={self.n_experts}: lower top_k")
        if moe and self.top_k > self.n_experts:
            raise ValueError(f"top_k={self.top_k} must not exceed n_experts={self.n_experts}")

    @classmethod
    def ladder(cls, ffn: str, scale: int, **overrides) -> "GPTConfig":
        """The paper's model of one scale (1, 2, ...): d_model 128 s, 2 s layers (its Listing 2)."""
        d_model = 128 * scale
        sizes = {
            "sgatlin": dict(n_experts=(16 + 12 * scale) ** 2, n_channels=16, top_k=8, d_key=128),
            "peer": dict(n_experts=(32 + 24 * scale) ** 2, n_channels=16, top_k=8, d_key=128),
            "moe": dict(n_experts=16, top_k=2, d_ff=d_model),
            "swiglu": dict(d_ff=int(8 / 3 * d_model / 256) * 256),
            "mlp": dict(d_ff=int(8 / 3 * d_model / 256) * 256),
        }
        if ffn not in sizes or scale < 1:
            raise ValueError(f"the ladder has no ffn={ffn!r} at scale={scale}: scales are 1, 2, ...")
        return cls(**(dict(vocab_size=50258, ffn=ffn, d_model=d_model, d_head=64, n_layer=2 * scale)
                      | sizes[ffn] | overrides))


# -----------------------------------------------------------------------------------------------------------
# building blocks

def lecun_normal(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter of variance 1 / fan_in, from a normal distribution cut at two standard deviations."""
    std = fan_in ** -0.5 / 0.87962566103423978  # the standard deviation that the cut leaves of a unit normal
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std))


class Linear(nn.Module):
    """x @ weight.T, without bias: (..., fan_in) -> (..., fan_out)."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.weight = lecun_normal(fan_out, fan_in, fan_in=fan_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def flops(self) -> int:
        """Of one token, forward; a multiply and an add count as two."""
        return 2 * self.weight.numel()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + 1e-6) * scale, in the dtype of scale (float32); the output has autocast's dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.to(self.scale.dtype), self.scale.shape, self.scale, eps=1e-6)
        kind = x.device.type
        return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y


def make_norm(cfg: GPTConfig, width: int) -> nn.Module:
    return RMSNorm(width) if cfg.norm else nn.Identity()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary position embedding of x (B, H, T, Dh) by rope (2, T, Dh/2), cosines and sines; by halves."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)                                   # (B, H, T, Dh/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """Keys and values of the tokens a model has seen, per layer."""

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k and v (B, H, T, Dh) and returns all keys and values so far, (B, H, S, Dh)."""
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Causal softmax attention with RMS-normalised queries and keys and rotary positions."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.d_head = cfg.d_head
        self.qkv = Linear(cfg.d_model, 3 * cfg.d_model)         # rows: all queries, all keys, all values
        self.out = Linear(cfg.d_model, cfg.d_model)
        self.q_norm = make_norm(cfg, cfg.d_head)
        self.k_norm = make_norm(cfg, cfg.d_head)

    def forward(self, x: Tensor, rope: Tensor, layer: int = 0, cache: KVCache | None = None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, -1, self.d_head).permute(2, 0, 3, 1, 4)   # 3 of (B, H, T, Dh)
        q = rotate(self.q_norm(q), rope).to(v.dtype)
        k = rotate(self.k_norm(k), rope).to(v.dtype)
        mask = None
        if cache is not None:
            k, v = cache.append(layer, k, v)                    # (B, H, S, Dh)
            mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def flops(self, T: int) -> int:
        """Of one token among T, forward; all T positions count, as in the paper."""
        return self.qkv.flops() + self.out.flops() + 4 * T * self.out.weight.shape[0]


# -----------------------------------------------------------------------------------------------------------
# feedforward layers: (B, T, D) -> (B, T, D), and flops() of one token, forward matmuls only

ROUTERS = ("product_dense", "product_key", "dense", "key")
ACTIVATION = {"identity": lambda a: a, "gelu": lambda a: F.gelu(a, approximate="tanh"), "relu": F.relu,
              "swish": F.silu}


class Router(nn.Module):
    """Chooses k of E neurons for every token and channel: (N, D) -> gates (N, C, k), ids (N, C, k) int32.

    gates are the raw scores, signed and descending; ids lie in [0, E).
    dense   one query per token, shared by the channels: scores = keys @ (query @ x).
    key     one query per token and channel (and half), scores scaled by 1 / sqrt(width).
    product_*  two lists of n scores instead of one of E; neuron a*n + b scores first[a] + second[b].
    product_dense is sgatlin's (its eq. 1), product_key is PEER's.
    """

    def __init__(self, cfg: GPTConfig, kind: str):
        super().__init__()
        self.product = kind.startswith("product")
        self.shared = kind.endswith("dense")
        self.top_k = cfg.top_k
        C, K, parts = cfg.n_channels, cfg.d_key, 2 if self.product else 1
        n = math.isqrt(cfg.n_experts) if self.product else cfg.n_experts
        if self.shared:
            self.query = Linear(cfg.d_model, K)
            self.keys = lecun_normal(C, parts, n, K, fan_in=K)
        else:
            self.query = Linear(cfg.d_model, C * parts * K)
            self.keys = nn.Parameter(nn.init.trunc_normal_(torch.empty(C, parts, n, K)))

    def scores(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, C, parts, n): the similarities of each token's query to the (sub-)keys."""
        C, parts, n, K = self.keys.shape
        q = self.query(x)
        if self.shared:
            return F.linear(q, self.keys.view(-1, K)).view(-1, C, parts, n)
        q = q.view(-1, C, parts, K) * (parts * K) ** -0.5
        return torch.einsum("ncpk,cpmk->ncpm", q, self.keys)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scores(x)
        if self.product:
            return kernels.product_topk(scores, self.top_k)
        gates, ids = scores.squeeze(2).topk(self.top_k)
        return gates, ids.to(torch.int32)

    def flops(self) -> int:
        return self.query.flops() + 2 * self.keys.numel()


def selected_neurons(x: Tensor, ids: Tensor, w_in: Tensor, w_out: Tensor,
                     act: Callable[[Tensor], Tensor]) -> Tensor:
    """y[n] = sum_j a[n, j] * w_out[ids[n, j]], a = act(u), u[n, j] = <w_in[ids[n, j]], x[n]>.

    x (N, D), ids (N, J) int32, tables (R, D), act (N, J) -> (N, J); returns (N, D).
    """
    if x.is_cuda:  # in bf16 a GPU gathers half the bytes; a CPU adds in float32 and would only convert back
        w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
    by_row = kernels.transpose_index(ids, len(w_in)) if torch.is_grad_enabled() else None
    u = kernels.gather_dot(x, w_in, ids, by_row)
    return kernels.gather_sum(act(u), w_out, ids, by_row)


class SparselyGatedLinear(nn.Module):
    """y = sum_c sum_j g_cj <w_in[c, i_cj], x> w_out[c, i_cj] (arXiv 2606.07414, eq. 2).

    Ablations: an activation other than identity (its Table 1) is applied to g * <w_in, x>; softmax_gates and
    shared_pool undo two of its changes to PEER.
    """

    settings = ("n_channels", "n_experts", "top_k", "d_key", "router", "activation", "softmax_gates",
                "shared_pool")

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.act = ACTIVATION[cfg.activation]
        self.softmax = cfg.softmax_gates
        self.router = Router(cfg, cfg.router)
        shape = 1 if cfg.shared_pool else cfg.n_channels, cfg.n_experts, cfg.d_model
        self.w_in = lecun_normal(*shape, fan_in=cfg.n_experts)
        self.w_out = lecun_normal(*shape, fan_in=cfg.n_experts)

    def forward(self, x: Tensor) -> Tensor:
        P, E, D = self.w_in.shape                                           # P = C pools, or one
        flat = x.reshape(-1, D)                                             # (N, D)
        gates, ids = self.router(flat)                                      # (N, C, k)
        if self.softmax:
            gates = gates.softmax(dim=-1)
        first = torch.arange(0, P * E, E, dtype=ids.dtype, device=ids.device)   # first row of each pool
        rows = (ids + first[:, None]).flatten(1)                            # (N, C*k)
        y = selected_neurons(flat, rows, self.w_in.view(-1, D), self.w_out.view(-1, D),
                             lambda u: self.act(gates.flatten(1) * u))
        return y.view_as(x)

    def flops(self) -> int:
        C, D = self.router.keys.shape[0], self.w_in.shape[2]
        return self.router.flops() + 4 * C * self.router.top_k * D


class PEER(nn.Module):
    """y = sum_c sum_j softmax_j(g_c) gelu(<w_in[i_cj], x>) w_out[i_cj], one pool (arXiv 2407.04153)."""

    settings = "n_channels", "n_experts", "top_k", "d_key"

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.router = Router(cfg, "product_key")
        self.w_in = lecun_normal(cfg.n_experts, cfg.d_model, fan_in=cfg.n_experts)
        self.w_out = lecun_normal(cfg.n_experts, cfg.d_model, fan_in=cfg.n_experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])                                   # (N, D)
        gates, ids = self.router(flat)                                      # (N, C, k)
        weights = gates.softmax(dim=-1).flatten(1)                          # (N, C*k)
        y = selected_neurons(flat, ids.flatten(1), self.w_in, self.w_out,
                             lambda u: weights * F.gelu(u, approximate="tanh"))
        return y.view_as(x)

    def flops(self) -> int:
        C, D = self.router.keys.shape[0], self.w_in.shape[1]
        return self.router.flops() + 4 * C * self.router.top_k * D


def clamped_swiglu(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """GPT-OSS's gated unit: (..., D), (2F, D), (2F,), (D, F), (D,) -> (..., D); in w1 the gate is first."""
    gate, linear = F.linear(x, w1, b1).chunk(2, dim=-1)         # (..., F) each
    gate, linear = gate.clamp(max=7), linear.clamp(-7, 7)
    return F.linear(gate * torch.sigmoid(1.702 * gate) * (linear + 1), w2, b2)


class SwiGLU(nn.Module):
    settings = ("d_ff",)

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        D, F_ = cfg.d_model, cfg.d_ff
        self.w1, self.b1 = lecun_normal(2 * F_, D, fan_in=D), nn.Parameter(torch.zeros(2 * F_))
        self.w2, self.b2 = lecun_normal(D, F_, fan_in=F_), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return clamped_swiglu(x, self.w1, self.b1, self.w2, self.b2)

    def flops(self) -> int:
        return 2 * (self.w1.numel() + self.w2.numel())


class MoE(nn.Module):
    """y = sum over the k likeliest experts of p_e * swiglu_e(x), p = softmax(gate(x)), not renormalised.

    Each expert runs on its own tokens only. No load-balancing loss, as in the paper's baseline.
    """

    settings = "n_experts", "top_k", "d_ff"

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        E, D, F_ = cfg.n_experts, cfg.d_model, cfg.d_ff
        self.top_k = cfg.top_k
        self.gate = Linear(D, E)
        self.w1, self.b1 = lecun_normal(E, 2 * F_, D, fan_in=D), nn.Parameter(torch.zeros(E, 2 * F_))
        self.w2, self.b2 = lecun_normal(E, D, F_, fan_in=F_), nn.Parameter(torch.zeros(E, D))

    @torch.compiler.disable  # the tokens of an expert are counted on the host
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])                                   # (N, D)
        p, ids = self.gate(flat).to(self.w1.dtype).softmax(dim=-1).topk(self.top_k)     # (N, k)
        order = ids.flatten().argsort(stable=True)                          # (token, choice) pairs by expert
        counts = ids.flatten().bincount(minlength=len(self.w1)).tolist()
        y = torch.zeros_like(flat)
        experts = zip(*(w.unbind(0) for w in (self.w1, self.b1, self.w2, self.b2)))
        for pairs, expert in zip(order.split(counts), experts):
            tokens = pairs // self.top_k
            out = clamped_swiglu(flat.index_select(0, tokens), *expert) * p.flatten()[pairs, None]
            y = y.index_add(0, tokens, out.to(y.dtype))
        return y.view_as(x)

    def flops(self) -> int:
        return self.gate.flops() + self.top_k * 2 * (self.w1[0].numel() + self.w2[0].numel())


class MLP(nn.Module):
    """gelu(x @ W1) @ W2, the tanh form of gelu."""

    settings = ("d_ff",)

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.up = Linear(cfg.d_model, cfg.d_ff)
        self.down = Linear(cfg.d_ff, cfg.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def flops(self) -> int:
        return self.up.flops() + self.down.flops()


FFN = {"sgatlin": SparselyGatedLinear, "peer": PEER, "moe": MoE, "swiglu": SwiGLU, "mlp": MLP}


# -----------------------------------------------------------------------------------------------------------
# the model

class Block(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.attn_norm, self.attn = make_norm(cfg, cfg.d_model), Attention(cfg)
        self.ffn_norm, self.ffn = make_norm(cfg, cfg.d_model), FFN[cfg.ffn](cfg)

    def forward(self, x: Tensor, rope: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope, layer, cache)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)      # also the unembedding
        nn.init.normal_(self.embedding.weight, std=cfg.d_model ** -0.5)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg, cfg.d_model)
        frequency = 10_000 ** (-torch.arange(0, cfg.d_head, 2) / cfg.d_head)            # (Dh/2,)
        angle = torch.arange(cfg.block_size)[:, None] * frequency                       # (T, Dh/2)
        self.register_buffer("rope", torch.stack((angle.cos(), angle.sin())), persistent=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T) int64 -> logits (B, T, V) float32, mean cross-entropy in nats (None without targets).

        targets (B, T): the next tokens; positions with -100 do not count. cache: the tokens before idx, to
        which idx is added. Raises ValueError when T, or T and the cache, exceed block_size.
        """
        start = 0 if cache is None else len(cache)
        end = start + idx.shape[1]
        if end > self.cfg.block_size:
            raise ValueError(f"{end} tokens exceed block_size={self.cfg.block_size}")
        x = self.embedding(idx)                                 # (B, T, D), the float32 residual stream
        for layer, block in enumerate(self.blocks):
            x = block(x, self.rope[:, start:end], layer, cache)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(self.norm(x).to(x.dtype), self.embedding.weight)      # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.inference_mode()
    def generate(self, tokens: list[int], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, vocab_size: int = 0, first: list[int] | None = None,
                 generator: torch.Generator | None = None) -> Iterator[int]:
        """Yields token ids that continue `tokens`, one at a time.

        temperature 0 takes the likeliest token; top_k (0: off) and top_p (1: off) cut the distribution;
        vocab_size (0: off) excludes the ids from there on, the padding of a vocabulary; first, if given, are
        the ids that the first new token may have. When the context is full it starts again from its last
        half, so positions stay within what the model was trained on.
        """
        device, T = self.embedding.weight.device, self.cfg.block_size
        tokens = list(tokens[-T:])
        cache, feed = KVCache(), tokens
        for _ in range(max_new_tokens):
            if len(cache) + len(feed) > T:
                tokens = tokens[-max(T // 2, 1):]
                cache, feed = KVCache(), tokens
            logits, _ = self(torch.tensor([feed], device=device), cache=cache)
            logits = logits[0, -1, :vocab_size or None]                                 # (V,)
            if first is not None:
                excluded = torch.ones_like(logits, dtype=torch.bool)
                excluded[first], first = False, None
                logits = logits.masked_fill(excluded, -math.inf)
            token = sample(logits, temperature, top_k, top_p, generator)
            tokens.append(token)
            feed = [token]
            yield token

    def num_params(self) -> tuple[int, int]:
        """Total, and active per token: without the neurons or experts that the router does not choose."""
        total = sum(p.numel() for p in self.parameters())
        idle = 0
        for block in self.blocks:
            ffn, cfg = block.ffn, self.cfg
            if cfg.ffn in ("sgatlin", "peer"):
                used = cfg.n_channels * cfg.top_k * cfg.d_model
                idle += 2 * max(ffn.w_in.numel() - used, 0)
            elif cfg.ffn == "moe":
                experts = sum(w.numel() for w in (ffn.w1, ffn.b1, ffn.w2, ffn.b2))
                idle += experts - experts * cfg.top_k // cfg.n_experts
        return total, total - idle

    def flops_per_sequence(self, T: int | None = None) -> int:
        """Forward FLOPs of one sequence of T tokens (default block_size), counted as the paper counts them:

        matmuls only, attention over all T x T pairs, without embedding, unembedding and top-k. A training
        step costs three times as much.
        """
        T = T or self.cfg.block_size
        return T * sum(block.attn.flops(T) + block.ffn.flops() for block in self.blocks)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator | None) -> int:
    """One token id from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = (logits / temperature).sort(descending=True)
    if top_k:
        logits = logits[:top_k]
    p = logits.softmax(dim=-1)
    p[p.cumsum(dim=-1) - p >= top_p] = 0                        # keeps the token that crosses top_p
    return int(ids[torch.multinomial(p, 1, generator=generator)])


# -----------------------------------------------------------------------------------------------------------
# checkpoints

def save_checkpoint(path: Path, state: dict) -> None:
    """Writes tensors and plain types to path, which holds the old state or the new one at any time."""
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote, on the CPU; no code from the file runs. Raises ValueError for others."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"model", "config", "tokenizer"} <= state.keys():
            raise KeyError
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: python train.py makes it") from None
    except Exception:   # torch.load has many ways to fail on a file of another kind
        raise ValueError(f"{path} is not a checkpoint of train.py") from None
    return state
