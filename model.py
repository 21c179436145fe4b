"""A GPT with sparsely gated tiny linear experts as its feedforward layers (sgatlin, 2606.07414).

The layer comes first, and works in any model:

    ffn = SparselyGatedLinear(d_model=512, n_channels=8, n_experts=1024, top_k=8, d_key=128)
    y = ffn(x)                                  # (..., 512) -> (..., 512)

Every channel c has a pool of E linear neurons of its own. A router gives each token x the ids i of
k of them, with scores g, and the layer adds up what these neurons say:

    y = sum_c sum_j  g_cj * <w_in[c, i_cj], x> * w_out[c, i_cj]

There is no nonlinearity and no softmax: given its gates g the layer is linear in x, so what it
computes can be read from the gates. Then come the four layers it is compared with, and the rest of
the GPT. Semantics, initialisation and FLOP counts follow the paper's JAX code, and test_model.py
holds them to its numbers.

Letters: B batch, T time, S time with a cache, N = B*T tokens, V vocabulary, D d_model, H heads,
Dh d_head, C channels, E neurons per channel, n = sqrt(E) sub-keys, k top_k, K d_key, F d_ff,
J = C*k neurons per token, R rows of the table of all neurons: C*E, or E if the channels share them.
"""
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

# --------------------------------------------------------------------------------------------------
# the layer

ROUTERS = {     # kind: (product keys?, one query for all channels?)
    "product_dense": (True, True),
    "product_key": (True, False),
    "dense": (False, True),
    "key": (False, False),
}


class Router(nn.Module):
    """Chooses k of E neurons for every token and channel: (N, D) -> gates, ids, (N, C, k) each.

    gates are the raw scores, signed and descending; ids are int32 in [0, E).
    dense      one query per token, shared by the channels: scores = keys @ (query @ x).
    key        a query per token, channel and part; scores are scaled by 1 / sqrt(parts * d_key).
    product_*  two parts, lists of n scores each; neuron a*n + b scores first[a] + second[b].
    product_dense is sgatlin's (its eq. 1), product_key is PEER's.
    Raises ValueError if product keys are asked for and n_experts is no square.
    """

    def __init__(self, d_model: int, n_channels: int, n_experts: int, top_k: int, d_key: int,
                 kind: str = "product_dense"):
        super().__init__()
        self.product, self.shared_query = ROUTERS[kind]
        self.top_k = top_k
        parts = 1
        n = n_experts
        if self.product:
            parts = 2
            n = math.isqrt(n_experts)
            if n * n != n_experts:
                raise ValueError(f"n_experts={n_experts} must be a square for product keys: take "
                                 f"{n * n} or {(n + 1)**2}")
        if self.shared_query:
            self.query = Linear(d_model, d_key)
            self.keys = lecun_normal(n_channels, parts, n, d_key, fan_in=d_key)
        else:
            self.query = Linear(d_model, n_channels * parts * d_key)
            keys = torch.empty(n_channels, parts, n, d_key)
            self.keys = nn.Parameter(nn.init.trunc_normal_(keys))

    def scores(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, C, parts, n): the similarities of each token's query to the (sub-)keys."""
        C, parts, n, K = self.keys.shape
        q = self.query(x)
        if self.shared_query:                                           # q (N, K)
            keys = self.keys.view(-1, K)                                # (C*parts*n, K)
            # In memory a GPU wants a score of neighbouring tokens side by side, a CPU all scores of
            # one token.
            scores = (keys @ q.T).T if x.is_cuda else F.linear(q, keys)
            return scores.view(-1, C, parts, n)
        q = q.view(-1, C, parts, K) * (parts * K) ** -0.5
        return torch.einsum("NCpK,CpnK->NCpn", q, self.keys)            # p: the part

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scores(x)
        if self.product:
            return kernels.product_topk(scores, self.top_k)
        gates, ids = scores.squeeze(2).topk(self.top_k)
        return gates, ids.to(torch.int32)

    def flops(self) -> int:
        """Of one token, forward; a multiply and an add count as two."""
        return self.query.flops() + 2 * self.keys.numel()


class SparselyGatedLinear(nn.Module):
    """y = sum_c sum_j g_cj <w_in[c, i_cj], x> w_out[c, i_cj] (arXiv 2606.07414, eq. 2).

    x (..., D) -> y (..., D), in x's dtype. router: a module that takes (N, D) and returns gates and
    int32 ids in [0, E), (N, C, k) each; None: a Router of product keys, which alone reads d_key and
    for which n_experts must be a square.

    What the ablations and PEER change: combine(gates, u) is what each w_out is multiplied by, from
    the gates and u = <w_in, x>, (N, C, k) each; shared_pool gives all channels one pool of neurons.
    """

    def __init__(self, d_model: int, n_channels: int, n_experts: int, top_k: int, d_key: int,
                 router: nn.Module | None = None,
                 combine: Callable[[Tensor, Tensor], Tensor] = torch.mul,
                 shared_pool: bool = False):
        super().__init__()
        if router is None:
            router = Router(d_model, n_channels, n_experts, top_k, d_key)
        self.router = router
        self.combine = combine
        self.n_choices = n_channels * top_k             # neurons per token
        shape = (n_experts, d_model) if shared_pool else (n_channels, n_experts, d_model)
        # Both with this variance, as in the paper's code.
        self.w_in = lecun_normal(*shape, fan_in=n_experts)
        self.w_out = lecun_normal(*shape, fan_in=n_experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])                               # (N, D)
        gates, ids = self.router(flat)                                  # (N, C, k) each
        rows = self.rows(ids)                                           # (N, J)
        w_in = as_table(self.w_in, flat)                                # (R, D)
        w_out = as_table(self.w_out, flat)                              # (R, D)
        by_row = None
        if torch.is_grad_enabled():     # the gradients of both tables need it: computed once
            by_row = kernels.sort_by_row(rows, len(w_in))

        u = kernels.gather_dot(flat, w_in, rows, by_row)                # (N, J)  <w_in, x>
        a = self.combine(gates, u.view_as(gates)).flatten(1)            # (N, J)
        y = kernels.gather_sum(a, w_out, rows, by_row)                  # (N, D)
        return y.view_as(x).to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """(N, C, k) -> (N, J): the rows of chosen neurons in the table of all pools."""
        if self.w_in.ndim == 3:
            C, E, _ = self.w_in.shape
            first = torch.arange(0, C * E, E, dtype=ids.dtype, device=ids.device)   # of a channel
            ids = ids + first[:, None]
        return ids.flatten(1)

    def flops(self) -> int:
        return self.router.flops() + 4 * self.n_choices * self.w_in.shape[-1]

    def idle_params(self) -> int:
        """How many parameters a token does not use."""
        D = self.w_in.shape[-1]
        return 2 * max(self.w_in.numel() - self.n_choices * D, 0)


def as_table(pools: Tensor, x: Tensor) -> Tensor:
    """The neurons (..., E, D) of all pools as one table (R, D), ready to be gathered for x."""
    table = pools.view(-1, pools.shape[-1])
    # In bfloat16 a GPU gathers half the bytes. A CPU adds in float32 and would only convert back.
    return table.to(x.dtype) if x.is_cuda else table


def lecun_normal(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter of variance 1 / fan_in, normal but cut at two standard deviations."""
    # The cut leaves a unit normal this standard deviation, for which the scale makes up.
    std = fan_in ** -0.5 / 0.87962566103423978
    weight = torch.empty(shape)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    return nn.Parameter(weight)


class Linear(nn.Module):
    """x @ weight.T, without bias: (..., fan_in) -> (..., fan_out)."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.weight = lecun_normal(fan_out, fan_in, fan_in=fan_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def flops(self) -> int:
        return 2 * self.weight.numel()


# --------------------------------------------------------------------------------------------------
# the layers it is compared with; each has forward (..., D) -> (..., D), and flops of one token

def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def clamped_swiglu(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """GPT-OSS's gated unit: x (..., D), w1 (2F, D), b1 (2F,), w2 (D, F), b2 (D,) -> (..., D)."""
    gate, linear = F.linear(x, w1, b1).chunk(2, dim=-1)                 # (..., F) each
    gate = gate.clamp(max=7)
    linear = linear.clamp(-7, 7)
    hidden = gate * torch.sigmoid(1.702 * gate) * (linear + 1)
    return F.linear(hidden, w2, b2)


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = lecun_normal(2 * d_ff, d_model, fan_in=d_model)
        self.b1 = nn.Parameter(torch.zeros(2 * d_ff))
        self.w2 = lecun_normal(d_model, d_ff, fan_in=d_ff)
        self.b2 = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return clamped_swiglu(x, self.w1, self.b1, self.w2, self.b2)

    def flops(self) -> int:
        return 2 * (self.w1.numel() + self.w2.numel())


class MoE(nn.Module):
    """y = sum over the k likeliest experts e of p_e swiglu_e(x), p = softmax(gate(x)), as it is.

    Each expert runs on its own tokens only. The chosen p are not renormalised, and no loss balances
    the load, as in the paper's baseline.
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.gate = Linear(d_model, n_experts)
        self.w1 = lecun_normal(n_experts, 2 * d_ff, d_model, fan_in=d_model)
        self.b1 = nn.Parameter(torch.zeros(n_experts, 2 * d_ff))
        self.w2 = lecun_normal(n_experts, d_model, d_ff, fan_in=d_ff)
        self.b2 = nn.Parameter(torch.zeros(n_experts, d_model))

    @torch.compiler.disable     # the tokens of an expert are counted on the host
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])                               # (N, D)
        logits = self.gate(flat).to(self.w1.dtype)                      # (N, E)
        probabilities = logits.softmax(dim=-1)
        p, ids = probabilities.topk(self.top_k)                         # (N, k) each
        order = ids.flatten().argsort(stable=True)                      # (token, choice) pairs
        counts = ids.flatten().bincount(minlength=len(self.w1)).tolist()
        tokens = order // self.top_k                # (N*k,) those of the first expert come first
        inputs = flat.index_select(0, tokens).split(counts)
        # unbind once: the gradient of w1[e] would be as large as all of w1, for every expert
        experts = zip(inputs, self.w1.unbind(), self.b1.unbind(), self.w2.unbind(),
                      self.b2.unbind())
        outs = [clamped_swiglu(*expert) for expert in experts]
        out = torch.cat(outs) * p.flatten()[order, None]                # (N*k, D)
        y = torch.zeros_like(flat).index_add(0, tokens, out.to(flat.dtype))
        return y.view_as(x)

    def flops(self) -> int:
        of_experts = 2 * (self.w1.numel() + self.w2.numel())
        return self.gate.flops() + self.top_k * of_experts // len(self.w1)

    def idle_params(self) -> int:
        E = len(self.w1)
        of_experts = self.w1.numel() + self.b1.numel() + self.w2.numel() + self.b2.numel()
        return of_experts * (E - self.top_k) // E


class MLP(nn.Module):
    """gelu(x @ W1) @ W2, the tanh form of gelu."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.up = Linear(d_model, d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))

    def flops(self) -> int:
        return self.up.flops() + self.down.flops()


# --------------------------------------------------------------------------------------------------
# from the settings to a layer: a new one is a function here and its name in FFN

@dataclass
class GPTConfig:
    vocab_size: int = 4096          # tokens in the vocabulary
    block_size: int = 1024          # longest context, in tokens
    n_layer: int = 4                # transformer blocks
    d_model: int = 256              # width of the residual stream; a multiple of d_head
    d_head: int = 64                # width of an attention head; even
    ffn: str = "sgatlin"            # the feedforward layer: sgatlin, peer, moe, swiglu or mlp
    d_ff: int = 0                   # hidden width of mlp, swiglu, an expert of moe; 0: 4 * d_model
    n_experts: int = 0              # neurons per channel (peer: in all), 0: 1024; moe 0: 8
    n_channels: int = 8             # independent choices of top_k per token; sgatlin, peer
    top_k: int = 0                  # neurons per token and channel, 0: 8; experts of moe, 0: 2
    d_key: int = 128                # width of the router's queries and keys; sgatlin, peer
    router: str = "product_dense"   # product_dense, product_key, dense or key, see Router; sgatlin
    activation: str = "identity"    # after the gate: identity, gelu, relu or swish; sgatlin
    softmax_gates: bool = False     # gates of a channel through softmax, as in PEER; sgatlin
    shared_pool: bool = False       # one pool of neurons for all channels, as in PEER; sgatlin
    norm: bool = True               # RMSNorm before all layers, on queries and keys, at the end

    def __post_init__(self):
        is_moe = self.ffn == "moe"
        self.d_ff = self.d_ff or 4 * self.d_model
        self.n_experts = self.n_experts or (8 if is_moe else 1024)
        self.top_k = self.top_k or (2 if is_moe else 8)


def ladder(ffn: str, scale: int) -> dict:
    """The sizes of the paper's model of a scale, 1, 2, ... (its Listing 2)."""
    d_model = 128 * scale
    d_ff = int(8 / 3 * d_model / 256) * 256
    sizes = {
        "sgatlin": dict(n_experts=(16 + 12 * scale) ** 2, n_channels=16, top_k=8, d_key=128),
        "peer": dict(n_experts=(32 + 24 * scale) ** 2, n_channels=16, top_k=8, d_key=128),
        "moe": dict(n_experts=16, top_k=2, d_ff=d_model),
        "swiglu": dict(d_ff=d_ff),
        "mlp": dict(d_ff=d_ff),
    }
    return dict(d_model=d_model, d_head=64, n_layer=2 * scale) | sizes[ffn]


ACTIVATIONS = {"identity": nn.Identity(), "gelu": gelu, "relu": F.relu, "swish": F.silu}


def sgatlin(cfg: GPTConfig) -> nn.Module:
    """The layer with the ablations of its paper's Table 1."""
    activation = ACTIVATIONS[cfg.activation]
    softmax_gates = cfg.softmax_gates

    def combine(gates: Tensor, u: Tensor) -> Tensor:
        if softmax_gates:
            gates = gates.softmax(dim=-1)
        return activation(gates * u)

    sizes = (cfg.d_model, cfg.n_channels, cfg.n_experts, cfg.top_k, cfg.d_key)
    return SparselyGatedLinear(*sizes, Router(*sizes, cfg.router), combine, cfg.shared_pool)


def peer(cfg: GPTConfig) -> nn.Module:
    """y = sum_c sum_j softmax_j(g_c) gelu(<w_in[i_cj], x>) w_out[i_cj], one pool (2407.04153)."""
    def combine(gates: Tensor, u: Tensor) -> Tensor:
        return gates.softmax(dim=-1) * gelu(u)

    sizes = (cfg.d_model, cfg.n_channels, cfg.n_experts, cfg.top_k, cfg.d_key)
    return SparselyGatedLinear(*sizes, Router(*sizes, "product_key"), combine, shared_pool=True)


FFN: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "sgatlin": sgatlin,
    "peer": peer,
    "moe": lambda cfg: MoE(cfg.d_model, cfg.d_ff, cfg.n_experts, cfg.top_k),
    "swiglu": lambda cfg: SwiGLU(cfg.d_model, cfg.d_ff),
    "mlp": lambda cfg: MLP(cfg.d_model, cfg.d_ff),
}


# --------------------------------------------------------------------------------------------------
# the rest of the GPT

class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + 1e-6) * scale, in scale's dtype (float32), then cast to autocast's."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.scale.dtype)
        y = F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)
        if torch.is_autocast_enabled(x.device.type):
            y = y.to(torch.get_autocast_dtype(x.device.type))
        return y


def make_norm(cfg: GPTConfig, width: int) -> nn.Module:
    return RMSNorm(width) if cfg.norm else nn.Identity()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary positions for x (B, H, T, Dh), by halves; rope (2, T, Dh/2): cosines and sines."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)                                           # (B, H, T, Dh/2)
    first = a * cos - b * sin
    second = b * cos + a * sin
    return torch.cat((first, second), dim=-1)


class KVCache:
    """Keys and values of the tokens that a model has seen, per layer."""

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k and v (B, H, T, Dh) and returns all keys and values so far, (B, H, S, Dh)."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k = torch.cat((old_k, k), dim=2)
            v = torch.cat((old_v, v), dim=2)
        self.layers[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Causal softmax attention with RMS-normalised queries and keys and rotary positions."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.d_head = cfg.d_head
        self.qkv = Linear(cfg.d_model, 3 * cfg.d_model)     # rows: queries, keys, values
        self.out = Linear(cfg.d_model, cfg.d_model)
        self.q_norm = make_norm(cfg, cfg.d_head)
        self.k_norm = make_norm(cfg, cfg.d_head)

    def forward(self, x: Tensor, rope: Tensor, layer: int = 0,
                cache: KVCache | None = None) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, -1, self.d_head)                # (B, T, 3, H, Dh)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, H, T, Dh) each
        q = rotate(self.q_norm(q), rope).to(v.dtype)
        k = rotate(self.k_norm(k), rope).to(v.dtype)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = cache.append(layer, k, v)                            # (B, H, S, Dh)
            S = k.shape[2]
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def flops(self, T: int) -> int:
        """Of one token among T, forward; all T positions count, as in the paper."""
        D = self.out.weight.shape[0]
        return self.qkv.flops() + self.out.flops() + 4 * T * D


class Embedding(nn.Embedding):
    """On a GPU a gather_sum of one row a token: its gradient is a sum in a fixed order, and faster
    than PyTorch's deterministic one."""

    def forward(self, idx: Tensor) -> Tensor:
        if not idx.is_cuda:
            return super().forward(idx)
        rows = idx.reshape(-1, 1).to(torch.int32)                       # (N, 1)
        ones = self.weight.new_ones(rows.shape)
        return kernels.gather_sum(ones, self.weight, rows).view(*idx.shape, -1)


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.attn_norm = make_norm(cfg, cfg.d_model)
        self.attn = Attention(cfg)
        self.ffn_norm = make_norm(cfg, cfg.d_model)
        self.ffn = FFN[cfg.ffn](cfg)

    def forward(self, x: Tensor, rope: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope, layer, cache)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        self.embedding = Embedding(cfg.vocab_size, cfg.d_model)         # also the unembedding
        nn.init.normal_(self.embedding.weight, std=cfg.d_model ** -0.5)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg, cfg.d_model)
        frequency = 10_000 ** (-torch.arange(0, cfg.d_head, 2) / cfg.d_head)        # (Dh/2,)
        angle = torch.arange(cfg.block_size)[:, None] * frequency                   # (T, Dh/2)
        rope = torch.stack((angle.cos(), angle.sin()))                              # (2, T, Dh/2)
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T) int64 -> logits (B, T, V) float32, mean cross-entropy in nats or None.

        targets (B, T): the next tokens; positions with -100 do not count. cache: the tokens before
        idx, to which idx is added. Raises ValueError if all these exceed block_size.
        """
        start = 0 if cache is None else len(cache)
        end = start + idx.shape[1]
        if end > self.cfg.block_size:
            raise ValueError(f"{end} tokens exceed block_size={self.cfg.block_size}")
        x = self.embedding(idx)                             # (B, T, D), the float32 residual stream
        for layer, block in enumerate(self.blocks):
            x = block(x, self.rope[:, start:end], layer, cache)
        with torch.autocast(x.device.type, enabled=False):
            # In float32: bfloat16 would round away differences between likely tokens.
            logits = F.linear(self.norm(x), self.embedding.weight)      # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.inference_mode()
    def generate(self, tokens: list[int], max_new_tokens: int, *, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, vocab_size: int = 0,
                 first: list[int] | None = None,
                 generator: torch.Generator | None = None) -> Iterator[int]:
        """Yields token ids that continue `tokens`, one at a time.

        temperature 0 takes the likeliest token; top_k (0: off) and top_p (1: off) cut the
        distribution; vocab_size (0: off) excludes the ids from there on, the padding of a
        vocabulary; first: the ids that the first new token may have (None: any). When the context
        is full it starts again from its last half, so positions stay within what was trained.
        """
        device, T = self.embedding.weight.device, self.cfg.block_size
        tokens = list(tokens[-T:])
        cache = KVCache()
        unseen = tokens                                     # what the cache does not hold yet
        for i in range(max_new_tokens):
            if len(cache) + len(unseen) > T:
                tokens = tokens[-max(T // 2, 1):]
                cache = KVCache()
                unseen = tokens
            logits, _ = self(torch.tensor([unseen], device=device), cache=cache)
            logits = logits[0, -1]                          # (V,)
            if vocab_size:
                logits = logits[:vocab_size]
            if i == 0 and first is not None:
                allowed = torch.full_like(logits, -math.inf)
                allowed[first] = 0.0
                logits = logits + allowed
            token = sample_token(logits, temperature, top_k, top_p, generator)
            tokens.append(token)
            unseen = [token]
            yield token

    def num_params(self) -> tuple[int, int]:
        """Total, and active per token: without the neurons or experts that a token does not use."""
        total = sum(p.numel() for p in self.parameters())
        idle = 0
        for block in self.blocks:
            if hasattr(block.ffn, "idle_params"):
                idle += block.ffn.idle_params()
        return total, total - idle

    def flops_per_sequence(self, T: int | None = None) -> int:
        """Forward FLOPs of one sequence of T tokens (default block_size), as the paper counts them:

        matmuls only, attention over all T x T pairs, without embedding, unembedding and top-k. A
        training step costs three times as much.
        """
        T = T or self.cfg.block_size
        per_token = 0
        for block in self.blocks:
            per_token += block.attn.flops(T) + block.ffn.flops()
        return T * per_token


def sample_token(logits: Tensor, temperature: float, top_k: int, top_p: float,
                 generator: torch.Generator | None) -> int:
    """One token id from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = (logits / temperature).sort(descending=True)
    if top_k:
        logits = logits[:top_k]
    p = logits.softmax(dim=-1)
    p[p.cumsum(dim=-1) - p >= top_p] = 0                    # keeps the token that crosses top_p
    return int(ids[torch.multinomial(p, 1, generator=generator)])


# --------------------------------------------------------------------------------------------------
# checkpoints

def save_checkpoint(path: Path, state: dict) -> None:
    """Writes tensors and plain types to path, which always holds the old state or the new one."""
    path = path.resolve()           # a link stays a link, to the new state
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
        os.replace(partial, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None       # a full disk, which torch's own words hide
        raise
    finally:
        partial.unlink(missing_ok=True)


def load_model(path: Path, device: str | torch.device) -> tuple[GPT, dict]:
    """The model of a checkpoint, ready to evaluate on a device, and all that the checkpoint holds.

    No code from the file runs.
    """
    if not path.exists():
        raise SystemExit(f"{path} is missing: python train.py makes it")
    state = torch.load(path, map_location="cpu", weights_only=True)
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    cfg = GPTConfig(**{name: value for name, value in state["config"].items() if name in names})
    model = GPT(cfg)
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state
