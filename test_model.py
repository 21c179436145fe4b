"""python -m pytest -q test_model.py

What the tests compare with: numbers of the paper's own JAX code (golden), one-line references in
float64, finite differences, other libraries (tiktoken's own trainer), and the program run again in
another way. They hold on any processor with any number of threads: results are compared bit for bit
only where the same operations run in the same order, and nothing depends on speed.
"""
import argparse
import base64
import collections
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
from tiktoken._educational import bpe_train
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and __name__ != "__main__":  # Triton reads it where kernels are defined
    os.environ["TRITON_INTERPRET"] = "1"

import analyze
import kernels
import prepare_data
import sample
import train
from model import (
    FFN,
    GPT,
    ROUTERS,
    GPTConfig,
    MoE,
    Router,
    SparselyGatedLinear,
    ladder,
    load_model,
    save_checkpoint,
)
from sample import encode_prompt, printable, stream

ROOT = Path(train.__file__).parent
FP32, BF16 = torch.float32, torch.bfloat16

# --------------------------------------------------------------------------------------------------
# golden numbers: outputs and gradients of the paper's JAX code on weights from a formula


def fill(shape, tag, scale, offset=0.0):
    """The weights behind the golden numbers: a hash of (tag, place), uniform in offset +- scale."""
    start = (tag * 2246822519 + 374761393) % 2**32
    h = np.arange(math.prod(shape), dtype=np.uint64) * 2654435761 + start
    h &= 0xFFFFFFFF
    h ^= h >> 15
    h = h * 2246822519 & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 3266489917 & 0xFFFFFFFF
    h ^= h >> 16
    values = offset + scale * (2 * (h / 2**32) - 1)
    return torch.from_numpy(values.astype(np.float32)).view(shape)


def golden_weights(kind, cfg, tags):
    """The weights of a part of the model, by our names. Each has the next of the tags, in the order
    of the names in the JAX code, and is drawn as it is there: inputs first, outputs last."""
    D = cfg.d_model
    E = cfg.n_experts
    C = cfg.n_channels
    K = cfg.d_key
    hidden = cfg.d_ff

    def draw(*shape, inputs):
        return fill(shape, next(tags), (3 / inputs)**0.5)

    def bias(size):
        return fill((size,), next(tags), 0.5)

    def scale(size):
        return fill((size,), next(tags), 0.3, 1.0)

    if kind == "norm":
        return {"scale": scale(D)}
    if kind == "embedding":
        return {"weight": draw(cfg.vocab_size, D, inputs=D)}
    if kind == "attention":
        k_norm = scale(cfg.d_head)
        k = draw(D, D, inputs=D)
        out = draw(D, D, inputs=D)
        q_norm = scale(cfg.d_head)
        q = draw(D, D, inputs=D)
        v = draw(D, D, inputs=D)
        return {"q_norm.scale": q_norm, "k_norm.scale": k_norm, "out.weight": out.T,
                "qkv.weight": torch.cat((q, k, v), dim=1).T}
    if kind == "mlp":
        up = draw(D, hidden, inputs=D)
        down = draw(hidden, D, inputs=hidden)
        return {"up.weight": up.T, "down.weight": down.T}
    if kind == "swiglu":
        b1 = bias(2 * hidden)
        w1 = draw(D, 2 * hidden, inputs=D)
        b2 = bias(D)
        w2 = draw(hidden, D, inputs=hidden)
        return {"w1": w1.T, "b1": b1, "w2": w2.T, "b2": b2}
    if kind == "moe":
        experts = [golden_weights("swiglu", cfg, tags) for _ in range(E)]
        ours = {"gate.weight": draw(D, E, inputs=D).T}
        for name in experts[0]:
            ours[name] = torch.stack([expert[name] for expert in experts])
        return ours

    if kind == "sgatlin":
        neurons = draw(2, C, E, D, inputs=D)
    router = "product_key" if kind == "peer" else cfg.router
    parts = 1
    n = E
    if router.startswith("product"):
        parts = 2
        n = math.isqrt(E)
    if router.endswith("dense"):
        keys = draw(K, parts, C, n, inputs=K).permute(2, 1, 3, 0)
        query = draw(D, K, inputs=D).T
    else:
        keys = draw(parts, C, n, K, inputs=1).transpose(0, 1)
        query = draw(parts, C, D, K, inputs=D).permute(1, 0, 3, 2).reshape(-1, D)
    if kind == "peer":
        neurons = draw(2, E, D, inputs=D)
    return {"w_in": neurons[0], "w_out": neurons[1], "router.keys": keys,
            "router.query.weight": query}


TINY = dict(vocab_size=50, block_size=12, n_layer=2, d_model=32, d_head=8, d_key=8, n_channels=2)


def tiny(ffn="sgatlin", **sizes):
    torch.manual_seed(0)
    own = dict(n_experts=25, top_k=3, d_ff=48)
    if ffn == "moe":
        own = dict(n_experts=4, top_k=2, d_ff=24)
    return GPT(GPTConfig(**(TINY | own | sizes), ffn=ffn))


# x (1, 2, 4) is drawn with the tag and v with the next; y is the output, dx the gradient of <y, v>,
# and grad_squares are the sums of the squares of its gradients of all weights whose names begin so.
GOLDEN_LAYERS = {
    "product_dense": dict(
        tag=90000, settings=dict(router="product_dense"),
        y=[-0.294311, 0.30198, -0.311896, -1.072253, -0.277016, -0.202955, 0.295437, -0.075653],
        dx=[-2.738605, -1.336467, 1.358569, -1.853941, 0.307275, -1.18371, -0.222052, -0.052052],
        grad_squares={"w": 55.5657, "router.keys": 7.27125, "router.query": 7.75653}),
    "product_key": dict(
        tag=90100, settings=dict(router="product_key"),
        y=[-3.28751, -3.287164, -0.736103, 1.757361, 2.820555, 1.293435, -0.958215, 0.678659],
        dx=[-1.264097, 0.518145, 1.170355, -0.303943, 1.624513, -1.570318, 0.882962, 1.237403],
        grad_squares={"w": 33.5391, "router.keys": 1.23088, "router.query": 10.2929}),
    "dense": dict(
        tag=90200, settings=dict(router="dense"),
        y=[0.496283, 0.08361, 0.498689, 0.170996, 0.976489, -1.413761, 1.340808, -1.15758],
        dx=[-0.530396, 0.345885, 0.456237, 0.466177, 1.107042, -0.492181, -0.844847, -0.459648],
        grad_squares={"w": 17.8899, "router.keys": 1.76149, "router.query": 1.40054}),
    "key": dict(
        tag=90300, settings=dict(router="key"),
        y=[1.063564, -1.327406, -2.232626, 0.329793, -1.241663, 2.248841, 0.849364, -0.840998],
        dx=[1.163394, -2.661235, 2.140954, -0.252513, -0.240143, -0.27692, 0.567139, 0.608874],
        grad_squares={"w": 37.096, "router.keys": 3.56375, "router.query": 4.66427}),
    "gelu": dict(
        tag=90400, settings=dict(activation="gelu"),
        y=[-0.208831, -0.334475, -0.576881, 1.92923, -0.104317, -0.694331, 0.636616, -0.431913],
        dx=[-2.153166, 0.149069, -2.892196, -0.201818, -0.195727, 0.403882, 0.156362, 0.101055],
        grad_squares={"w": 47.1422, "router.keys": 3.62995, "router.query": 6.66064}),
    "relu": dict(
        tag=90500, settings=dict(activation="relu"),
        y=[-1.003399, -0.044689, -0.725974, 0.831655, 0.86533, 2.005757, 1.964373, 0.632376],
        dx=[2.749801, -0.966421, 0.167419, 1.102588, -0.203176, 0.958063, 0.121254, 0.604234],
        grad_squares={"w": 14.1635, "router.keys": 7.75822, "router.query": 20.5815}),
    "swish": dict(
        tag=90600, settings=dict(activation="swish"),
        y=[0.679664, -1.588424, 1.268511, -0.699926, 0.05552, 0.088514, -0.106061, -0.037175],
        dx=[-0.140062, -0.361162, -1.015192, -0.884645, -0.13521, -0.043903, -0.076828, -0.05264],
        grad_squares={"w": 9.50837, "router.keys": 1.51693, "router.query": 2.58928}),
    "peer": dict(
        tag=90700, settings=dict(ffn="peer"),
        y=[-0.09211, -0.232086, 0.17015, -0.061817, -0.725824, 0.655233, 0.95034, 0.092449],
        dx=[-0.079443, 0.013129, -0.033522, -0.005281, 0.144864, 0.092422, -0.334939, 0.25261],
        grad_squares={"w": 5.7463, "router.keys": 0.0516613, "router.query": 0.15627}),
    "clamped": dict(
        tag=91000, settings=dict(ffn="swiglu"),
        y=[16.323347, -19.821892, -50.955185, 16.007441, 1.646773, -13.784221, -26.149363,
           14.829702],
        dx=[-1.034835, 1.627049, 0.000794, 0.275663, -7.206256, -6.853174, 0.545523, 3.96128],
        grad_squares={"b1": 118.661, "w1": 13594.4, "b2": 2.58033, "w2": 6768.06}),
    "moe": dict(
        tag=91100, settings=dict(ffn="moe", n_experts=3),
        y=[-0.315246, 0.206225, 0.308578, 0.436561, 0.166925, -0.054806, -0.116833, 0.061344],
        dx=[-0.475455, 0.642914, 0.162505, -0.129861, 0.981839, 0.153854, -0.000426, -0.687999],
        grad_squares={"b1": 1.55634, "w1": 7.55592, "b2": 3.29849, "w2": 1.39578,
                      "gate": 0.0502254}),
}


@pytest.mark.parametrize("case", GOLDEN_LAYERS)
def test_layer_is_that_of_the_paper(case):
    golden = GOLDEN_LAYERS[case]
    sizes = dict(d_model=4, n_experts=9, d_key=3, top_k=2, n_channels=2, d_ff=5)
    cfg = GPTConfig(**sizes | golden["settings"])
    layer = FFN[cfg.ffn](cfg)
    layer.load_state_dict(golden_weights(cfg.ffn, cfg, itertools.count(golden["tag"] + 2)))
    x = fill((1, 2, 4), golden["tag"], 12.0 if case == "clamped" else 1.5).requires_grad_()
    y = layer(x)
    (y * fill((1, 2, 4), golden["tag"] + 1, 1.0)).sum().backward()
    assert y.flatten().tolist() == pytest.approx(golden["y"], abs=2e-5)
    assert x.grad.flatten().tolist() == pytest.approx(golden["dx"], abs=2e-5)
    for prefix, square in golden["grad_squares"].items():
        ours = 0.0
        for name, p in layer.named_parameters():
            if name.startswith(prefix):
                ours += p.grad.double().square().sum().item()
        assert ours == pytest.approx(square, rel=2e-5), prefix


# tag of the first parameter; loss; sum of squares of the logits and of all gradients
GOLDEN_MODELS = {
    "sgatlin": (4201002, 4.0249467, 557.26825, 24.577230),
    "peer": (24202002, 4.0927649, 526.74256, 23.199296),
    "mlp": (203002, 3.5270715, 515.54066, 14.972819),
    "swiglu": (204002, 3.7853584, 511.34184, 40.166757),
    "moe": (1205002, 4.3607874, 498.09925, 25.519319),
}


@pytest.mark.parametrize("ffn", GOLDEN_MODELS)
def test_model_is_that_of_the_paper(ffn):
    """In float64, where no rounding can tip a router to another neuron than the paper's."""
    tag, golden_loss, logit_squares, grad_squares = GOLDEN_MODELS[ffn]
    model = tiny(ffn, vocab_size=32, block_size=8, d_key=6)
    parts = []
    for block in model.blocks:
        parts += [("attention", block.attn), ("norm", block.attn_norm), ("norm", block.ffn_norm),
                  (ffn, block.ffn)]
    parts += [("embedding", model.embedding), ("norm", model.norm)]
    tags = itertools.count(tag)
    for kind, part in parts:
        part.load_state_dict(golden_weights(kind, model.cfg, tags))
    model.double()
    tokens = torch.tensor([[28, 2, 3, 12, 10, 27, 0, 0], [18, 30, 21, 1, 18, 2, 20, 19]])
    inputs = torch.cat((torch.ones(2, 1, dtype=torch.long), tokens[:, :-1]), dim=1)
    logits, loss = model(inputs, tokens.masked_fill(tokens == 0, -100))
    loss.backward()
    assert loss.item() == pytest.approx(golden_loss, abs=2e-6)
    assert logits.square().sum().item() == pytest.approx(logit_squares, rel=1e-6)
    squares = sum(p.grad.square().sum().item() for p in model.parameters())
    assert squares == pytest.approx(grad_squares, rel=1e-5)


# parameters at the paper's vocabulary of 50258; forward FLOPs of 1024 and of 2048 tokens
GOLDEN_LADDER = [
    ("mlp", 1, 6696064, 1610612736, 5368709120),
    ("mlp", 9, 280895616, 543581798400, 1261109772288),
    ("swiglu", 1, 6762880, 1744830464, 5637144576),
    ("swiglu", 9, 344727936, 674041430016, 1522029035520),
    ("moe", 1, 8154240, 1753219072, 5653921792),
    ("moe", 9, 1301438592, 576876183552, 1327698542592),
    ("peer", 1, 9677952, 4563402752, 11274289152),
    ("peer", 9, 2807406720, 504927092736, 1183800360960),
    ("sgatlin", 1, 13249664, 2013265920, 6174015488),
    ("sgatlin", 9, 10368065664, 317693362176, 809332899840),
]


def on_meta(cfg):
    with torch.device("meta"):
        return GPT(cfg)


@pytest.mark.parametrize("ffn, scale, params, flops_1024, flops_2048", GOLDEN_LADDER)
def test_ladder_has_the_sizes_of_the_paper(ffn, scale, params, flops_1024, flops_2048):
    model = on_meta(GPTConfig(**ladder(ffn, scale), ffn=ffn, vocab_size=50258))
    assert model.num_params()[0] == params
    assert model.flops_per_sequence(1024) == flops_1024
    assert model.flops_per_sequence(2048) == flops_2048


@pytest.mark.parametrize("ffn, scale, flops, batch_size, block_size, steps", [
    ("moe", 1, 1e18, 128, 2048, 460594), ("sgatlin", 1, 1e17, 64, 1024, 258700)])
def test_budget_buys_the_steps_of_the_paper(ffn, scale, flops, batch_size, block_size, steps):
    """Those that the paper's code makes of the budgets of its isoflop runs."""
    given = dict(ffn=ffn, scale=scale, batch_size=batch_size, vocab_size=8, block_size=block_size)
    assert train.steps_for(flops, train.new_config(given)) == steps


@pytest.mark.parametrize("router, params, flops", [
    ("product_dense", 2356233984, 112742891520), ("product_key", 2392803072, 187636383744),
    ("dense", 2542225152, 493652803584), ("key", 2559919872, None)])
def test_routers_have_the_sizes_of_the_paper(router, params, flops):
    model = on_meta(GPTConfig(**ladder("sgatlin", 6), router=router, vocab_size=50258))
    assert model.num_params()[0] == params
    if flops is not None:           # the paper's code does not count those of key
        assert model.flops_per_sequence(1024) == flops


@pytest.mark.parametrize("ffn", ["sgatlin", "moe", "swiglu", "mlp"])
def test_commands_of_the_papers_budget_build_what_their_table_says(ffn):
    """Both are in .github/results.md."""
    text = (ROOT / ".github/results.md").read_text(encoding="utf-8")
    shared = shlex.split(re.search('PAPER="(.*)"', text)[1])
    command = re.search(rf"python train.py \$PAPER(.*) --out_dir=runs/1e17-{ffn}\n", text)[1]
    given = train.parse_args(shared + command.split())
    cfg = train.new_config(given | dict(vocab_size=50258, device="cuda"))
    params, _ = on_meta(cfg).num_params()
    steps = train.steps_for(given["flops"], cfg)
    row = f"| {ffn} | {params / 1e6:.1f} M | {steps:,} | {steps * 65536 / 1e9:.2f} B |"
    assert row in text


def test_active_parameters():
    cfg = GPTConfig(n_layer=1, d_model=64, n_experts=256, n_channels=3, top_k=5)
    total, active = on_meta(cfg).num_params()
    assert total - active == 2 * 3 * (256 - 5) * 64
    moe = on_meta(GPTConfig(n_layer=1, d_model=64, d_ff=32, ffn="moe", n_experts=4, top_k=1))
    total, active = moe.num_params()
    assert total - active == 3 * (64 * 64 + 64 + 32 * 64 + 64)      # w1, b1, w2, b2 of an expert


@pytest.mark.parametrize("ffn, tensor, std, largest", [
    ("sgatlin", "w_in", 1024**-0.5, 0.07106), ("sgatlin", "router.keys", 128**-0.5, 0.20097),
    ("sgatlin", "router.query.weight", 256**-0.5, 0.14211), ("peer", "router.keys", 0.8796, 2.0),
    ("peer", "w_out", 1024**-0.5, 0.07106), ("mlp", "down.weight", 1024**-0.5, 0.07106),
    ("moe", "w1", 256**-0.5, 0.14211), ("swiglu", "w2", 1024**-0.5, 0.07106)])
def test_initialisation_has_the_variances_of_the_paper(ffn, tensor, std, largest):
    torch.manual_seed(0)
    weight = FFN[ffn](GPTConfig(ffn=ffn)).get_parameter(tensor)
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert 0.99 * largest < weight.abs().max().item() <= largest * 1.0001


# --------------------------------------------------------------------------------------------------
# kernels

@pytest.mark.parametrize("dtype, n", [(FP32, 5), (BF16, 150)])      # sorted by int16 and int32 keys
def test_kernels_equal_the_reference(dtype, n):
    """As python kernels.py checks them: a layer, its top-k, and their gradients."""
    torch.manual_seed(0)
    kernels.check(7, 48, 2, n, 3, device="cpu", dtype=dtype)


@pytest.mark.parametrize("n_rows, by_row", [(6, False), (6, True), (4, False)])
def test_primitives_gradcheck(n_rows, by_row):
    """Rows repeat in a token and between tokens, and a token may name more than there are."""
    torch.manual_seed(0)
    index = torch.randint(0, n_rows, (4, 5), dtype=torch.int32)
    rows = kernels.sort_by_row(index, n_rows) if by_row else None
    x, weight, coef = (torch.randn(shape, dtype=torch.float64, requires_grad=True)
                       for shape in ((4, 3), (n_rows, 3), (4, 5)))
    assert torch.autograd.gradcheck(lambda x, w: kernels.gather_dot(x, w, index, rows), (x, weight))
    assert torch.autograd.gradcheck(lambda c, w: kernels.gather_sum(c, w, index, rows),
                                    (coef, weight))
    scores = torch.randn(3, 2, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: kernels.product_topk(s, 4)[0], (scores,))


def test_ties_go_to_the_lower_position_as_in_jax():
    scores = torch.tensor([[[[2.0, 1.0, 2.0, 0.0], [0.0, 1.0, 1.0, -1.0]]]])
    assert kernels.product_topk(scores, 3)[1].flatten().tolist() == [1, 2, 9]


def test_using_the_kernels_warns_of_nothing():
    code = ("import torch, kernels; x = torch.ones(2, 3); "
            "kernels.gather_dot(x, x, torch.zeros(2, 2, dtype=torch.int32))")
    finished(start(["-W", "error", "-c", code]))


def test_no_gathered_copy_is_made():
    """The reference makes a tensor of (N, J, D) floats, the kernels none of an eighth of this."""
    torch.manual_seed(0)
    _, index, inputs, dy = kernels.random_layer(512, 64, 4, 8, 6, device="cpu", dtype=FP32)
    largest = []
    for fn in (kernels.layer, kernels.layer_reference):
        with torch.profiler.profile(profile_memory=True) as profile:
            kernels.gradients(fn, dy, inputs, index)
        largest.append(max(event.self_cpu_memory_usage for event in profile.events()))
    gathered = 4 * 512 * 24 * 64
    assert largest[0] < gathered / 8
    assert largest[1] >= gathered


# --------------------------------------------------------------------------------------------------
# model

def test_the_layer_of_the_readme_works_as_it_stands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    names = {}
    exec(code, names)
    assert names["y"].shape == names["x"].shape
    gates, ids = names["routed"][-1]
    assert gates.shape == ids.shape and ids.dtype == torch.int32


@pytest.mark.parametrize("shape", [(33,), (2, 0, 33), (2, 3, 4, 33)])
def test_layer_takes_any_width_and_leading_shape(shape):
    layer = SparselyGatedLinear(d_model=33, n_channels=2, n_experts=25, top_k=3, d_key=8)
    x = torch.randn(shape)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x.view(-1, 33)).view(shape))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_layer_under_autocast_and_in_half_precision(dtype, tolerance):
    """Rounding can tip a choice between neurons of all but equal scores: it does not here."""
    torch.manual_seed(0)
    layer = SparselyGatedLinear(d_model=32, n_channels=2, n_experts=25, top_k=3, d_key=8)
    x = torch.randn(6, 32)
    y = layer(x)
    with torch.autocast("cpu", dtype):
        cast = layer(x)
        cast_half = layer(x.to(dtype))
    half = layer.to(dtype)(x.to(dtype))
    assert half.dtype == cast_half.dtype == dtype and cast.dtype == torch.float32
    for other in (cast, cast_half, half):
        assert (other - y).norm() < tolerance * y.norm()


def tokens(B=2, T=12, seed=0):
    return torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ROUTERS)
def test_router_takes_the_largest_scores(kind):
    torch.manual_seed(0)
    router = Router(d_model=32, n_channels=2, n_experts=121, top_k=9, d_key=8, kind=kind)
    x = torch.randn(60, 32)
    scores = router.scores(x)
    full = scores[:, :, 0]
    if kind.startswith("product"):
        full = (full[..., None] + scores[:, :, 1, None]).flatten(-2)
    gates, ids = router(x)
    torch.testing.assert_close(gates, full.topk(9).values)
    torch.testing.assert_close(gates, full.gather(-1, ids.long()))


def test_ablations_are_what_they_say():
    layer = tiny(softmax_gates=True, shared_pool=True, activation="relu").blocks[0].ffn
    x = torch.randn(5, 32)
    gates, ids = layer.router(x)                                    # (N, C, k)
    gates = gates.softmax(-1).flatten(1)                            # (N, J)
    rows = ids.flatten(1).long()
    u = torch.einsum("njd,nd->nj", layer.w_in[rows], x)
    truth = torch.einsum("nj,njd->nd", torch.relu(gates * u), layer.w_out[rows])
    torch.testing.assert_close(layer(x), truth, atol=1e-5, rtol=1e-4)


def test_without_norm_none_is_left():
    names = {name for name, _ in tiny(norm=False).named_parameters()}
    assert names == {name for name, _ in tiny().named_parameters() if "norm" not in name}


def test_an_expert_without_tokens_has_no_gradient():
    torch.manual_seed(0)
    moe = MoE(d_model=16, d_ff=24, n_experts=5, top_k=2)
    moe.gate.weight.data[3] = -1        # nobody chooses this expert
    x = torch.rand(2, 9, 16)
    y = moe(x)
    y.sum().backward()
    assert y.shape == x.shape and y.isfinite().all()
    assert not moe.w1.grad[3].any() and moe.w1.grad[4].any()


def test_a_number_of_neurons_that_is_no_square_is_refused():
    """isqrt would drop neurons in silence."""
    with pytest.raises(ValueError, match="take 961 or 1024"):
        SparselyGatedLinear(d_model=8, n_channels=1, n_experts=1000, top_k=2, d_key=4)


# --------------------------------------------------------------------------------------------------
# triton: compiled on a GPU, interpreted without one

SIZES = dict(k=(1, 3, 8), n=(3, 5, 11), C=(1, 2), N=(1, 7))
TABLES = dict(D=(16, 48, 80), types=((FP32, FP32), (BF16, BF16), (BF16, FP32)),
              picks=("random", "one row", "repeated"))


def some_of(sizes):
    """16 of all combinations with k <= n, always the same."""
    cases = [case for case in itertools.product(*sizes.values()) if case[0] <= case[1]]
    return random.Random(0).sample(cases, 16)


@pytest.fixture
def on_triton(monkeypatch):
    """Kernels behind every operation, borders every 6 pairs, NaN in what torch.empty returns."""
    if kernels.triton is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(kernels, "runs_triton", lambda device, dtype: True)
    monkeypatch.setattr(kernels, "SPLIT", 6)
    one = torch.ones(1, 1, device=DEVICE)
    try:
        kernels.gather_sum(one, one, one.int() - 1)
    except Exception as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        pytest.skip("the interpreter of this triton needs numpy < 2.4")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def agree(ours, truth, dtype):
    error = (ours.cpu().double() - truth).norm()            # NaN if an element was never written
    assert ours.dtype == dtype and error <= (1e-6 if dtype == FP32 else 1e-2) * truth.norm()


@pytest.mark.parametrize("k, n, C, N, D, types, picks", some_of(SIZES | TABLES))
def test_triton_equals_the_reference(on_triton, k, n, C, N, D, types, picks):
    dtype, table_dtype = types
    R = C * n * n
    J = C * k
    index = torch.randint(0, R, (N, J), dtype=torch.int32)
    if picks == "one row":
        index = torch.full_like(index, R // 2)
    elif picks == "repeated":
        index = index[:1, :1] // 2 + index % 2
    flat = index.flatten().long()
    unused = flat.bincount(minlength=R) == 0
    x = torch.randn(D, N).to(dtype).T                       # strided, and so are the coefficients
    coef = torch.randn(N, 1).to(dtype).expand(N, J)
    weight = torch.randn(R, D).to(table_dtype)
    weight[unused] = float("nan")       # nobody may read these
    rows = weight.double()[index.long()]
    pairs = coef.double()[..., None] * x.double()[:, None]
    a, c, w, i = (t.to(DEVICE) for t in (x, coef, weight, index))
    agree(kernels.gather_dot(a, w, i), (x.double()[:, None] * rows).sum(-1), table_dtype)
    agree(kernels.gather_sum(c, w, i), (coef.double()[..., None] * rows).sum(1), table_dtype)
    by_row = kernels.sort_by_row(i, R)
    grads = [kernels.table_grad_triton(c, a, *by_row) for _ in range(2)]
    agree(grads[0], torch.zeros(R, D).double().index_add_(0, flat, pairs.flatten(0, 1)), dtype)
    assert torch.equal(*grads) and not grads[0].cpu()[unused].any()     # same bits; exactly zero


def test_a_layer_runs_on_triton_alone(on_triton, monkeypatch):
    """Forward and backward; and the gates, once more and with their gradient."""
    launched = collections.Counter()
    launch = kernels.launch

    def count(kernel, *args):
        launched[kernel] += 1
        launch(kernel, *args)

    monkeypatch.setattr(kernels, "launch", count)
    kernels.check(30, 48, 2, 3, 3, device=DEVICE, dtype=FP32)       # 10 pairs in a row
    assert launched == {kernels.gather_dot_kernel: 2, kernels.gather_sum_kernel: 2,
                        kernels.segment_sum_kernel: 4, kernels.product_topk_kernel: 3,
                        kernels.product_topk_grad_kernel: 1}


@pytest.mark.parametrize("k, n, C, N, dtype", [
    *some_of(SIZES | dict(dtype=(FP32, BF16))), (16, 40, 1, 1, BF16), (17, 20, 1, 2, FP32)])
def test_triton_topk(on_triton, k, n, C, N, dtype):
    """Against the PyTorch form, which test_ties_go_to_the_lower_position_as_in_jax holds."""
    # Eighths have ties, and sums that bfloat16 holds exactly: the interpreter rounds otherwise.
    eighths = torch.randint(-63, 64, (N, C, 2, n)) / 8
    for scores in [eighths] + [torch.randn(N, C, 2, n)] * (dtype == FP32 or DEVICE == "cuda"):
        scores = scores.to(dtype)
        gates, ids = kernels.product_topk(scores.to(DEVICE), k)
        truth, places = kernels.product_topk_torch(scores, k)
        assert torch.equal(gates.cpu(), truth)
        assert torch.equal(ids.cpu(), places)
    grad = torch.randn(N, C, k).to(dtype)
    truth = kernels.product_topk_grad_torch(grad.double(), places, n)
    agree(kernels.product_topk_grad_triton(grad.to(DEVICE), ids, n), truth, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_topk_of_any_scores_is_in_range(on_triton, dtype):
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([nan, -nan, inf, -inf, 0.0, -0.0, 1e30])
    scores = values[torch.randint(0, 7, (4, 1, 2, 11))]
    scores[2:] = torch.tensor([nan, -inf])[:, None, None, None]
    for topk in (kernels.product_topk_torch, kernels.product_topk_triton):
        _, ids = topk(scores.to(DEVICE, dtype), 8)
        assert ids.min() >= 0
        assert ids.max() < 121


def launches(D, dtype):
    """The launches of a layer and of its top-k: [(kernel, args)]. Nothing runs."""
    N = 64
    C = 2
    n = 16
    k = 8
    _, index, inputs, dy = kernels.random_layer(N, D, C, n, k, device="cpu", dtype=dtype)
    scores = kernels.empty_scores(dy, N, C, n)              # with the strides of a GPU's
    seen = {}       # once for the same types of arguments

    def launch(kernel, grid, *args):
        seen[kernel, *map(type, args)] = args

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch", launch)
        patch.setattr(kernels, "runs_triton", lambda device, dtype: True)
        kernels.gradients(kernels.layer, dy, inputs, index)
        kernels.gradients(kernels.topk_gates, torch.ones(N, C, k), [scores], k)
    return [(kernel, args) for (kernel, *_), args in seen.items()]


def spilled(kernel, args, target):
    """How many bytes (NVIDIA) or registers (AMD) the compiled kernel spills to memory."""
    triton = kernels.triton
    types = {FP32: "*fp32", BF16: "*bf16", torch.int32: "*i32"}
    signature = dict.fromkeys(kernel.arg_names, "i32")
    constants = {}
    aligned = {}
    for place, (parameter, value) in enumerate(zip(kernel.params, args)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = types[value.dtype]
            if value.data_ptr() % 16 == 0:
                aligned[place,] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value in (None, 1):
            signature[parameter.name] = "constexpr"
            constants[place,] = value
    compiled = triton.compile(triton.compiler.ASTSource(kernel, signature, constants, aligned),
                              target=target, options=dict(num_warps=1, enable_fp_fusion=True))
    if target.backend == "hip":
        return sum(map(int, re.findall(r"gpr_spill_count: +(\d+)", compiled.asm["amdgcn"])))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    return sum(map(int, re.search(r"STACK:(\d+).* LOCAL:(\d+)", usage).groups()))


def compile_all():
    GPUTarget = kernels.triton.backends.compiler.GPUTarget
    cuda = [GPUTarget("cuda", arch, 32) for arch in (80, 90)]
    hip = [GPUTarget("hip", "gfx942", 64)]
    sizes = [(target, 768) for target in cuda + hip] + [(cuda[1], 128), (cuda[1], 1024)]
    for (target, D), dtype in itertools.product(sizes, (FP32, BF16)):
        for kernel, args in launches(D, dtype):
            count = spilled(kernel, args, target)
            print(f"{kernel.fn.__name__:25}{dtype} D={D:<5}{target.arch}: {count} spilled")
            assert not count


def test_triton_compiles_without_spills(tmp_path):      # where Triton does not interpret
    if kernels.triton is None or not {"nvidia", "amd"} <= set(kernels.triton.backends.backends):
        pytest.skip("no triton with both compilers")
    env = os.environ | dict(TRITON_CACHE_DIR=str(tmp_path))
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype, capability, expected", [
    (FP32, (7, 5), True), (FP32, (7, 0), False), (torch.float64, (9, 0), False)])
def test_triton_runs_where_it_can(dtype, capability, expected, monkeypatch):
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert kernels.runs_triton.__wrapped__("cuda", dtype) == expected


def test_layer_compiles_once_and_can_be_checkpointed():
    torch.manual_seed(0)
    layer = SparselyGatedLinear(64, 2, 25, 3, 16).to(DEVICE)
    x, dy = torch.randn(2, 2, 6, 64, device=DEVICE)
    # Not inductor: its C++ is wrong where ATEN_CPU_CAPABILITY names less than the processor has.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def results(fn):
        y = fn(x.requires_grad_())
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

    runs = [results(compiled), results(lambda x: checkpoint(layer, x, use_reentrant=False))]
    with torch._dynamo.config.patch(error_on_recompile=True):
        runs.append(results(compiled))
    for run in runs:
        torch.testing.assert_close(run, results(layer), atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# prepare_data.py

EOT = prepare_data.EOT
STORY = ("Lily, a girl, found a ball. Ben's dog ran to the red ball!\n"
         "  'Oh,' said Lily, 'it is my ball.'\n")


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def part_documents(folder, part):
    """The documents in train.bin or val.bin, after a check against meta.json."""
    meta = json.loads((folder / "meta.json").read_text())
    ranks = (folder / "tokenizer.tiktoken").read_text()
    tokenizer = prepare_data.load_tokenizer(ranks, meta["pat_str"])
    ids = np.fromfile(folder / f"{part}.bin", meta["dtype"])
    assert len(ids) == meta[f"{part}_tokens"]
    assert ids.max() < meta["vocab_size"] == tokenizer.n_vocab
    pieces = np.split(ids, np.flatnonzero(ids == meta["eot"]) + 1)
    assert len(pieces.pop()) == 0
    documents = [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]
    assert sum(len(text.encode()) for text in documents) == meta[f"{part}_bytes"]
    return documents


def numbered_stories(path, n=100):
    rng = random.Random(0)
    stories = [f"Story {i}. " + " ".join(rng.choices(STORY.split(), k=20)) + "\n" for i in range(n)]
    path.write_text(f"{EOT}\n".join(stories))
    return stories


TEXTS = {
    "stories": STORY * 3,
    "ties": "ab ba cd dc abab baba cdcd dcdc",
    "runs": " ".join("a" * n for n in range(1, 20))
            + "\n" + " " * 41 + "b" * 23 + "\n\n\n\n" + "=" * 33,
    "unicode": "naïve façade – 日本語日本 🙂🙂🙂 été\tété\r\n" * 2 + "\0\0\0x",
    "letters": "".join(random.Random(1).choices("aab b", k=600)),
}


@pytest.mark.parametrize("pattern", [prepare_data.PATTERN, r"(?s).+"])
@pytest.mark.parametrize("name", TEXTS)
def test_bpe_is_that_of_tiktoken(name, pattern):
    words = collections.Counter(regex.findall(pattern, TEXTS[name]))
    ours = prepare_data.train_bpe(words, 10**12)
    assert ours == bpe_train(TEXTS[name], len(ours), pattern, visualise=None)
    with pytest.raises(ValueError):  # and it has no further merge either
        bpe_train(TEXTS[name], len(ours) + 1, pattern, visualise=None)
    for vocab_size in (256, 257):
        assert list(prepare_data.train_bpe(words, vocab_size)) == list(ours)[:vocab_size]


def test_every_text_comes_back(tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 5)
    meta = prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / "out", vocab_size=300)
    ranks = (tmp_path / "out/tokenizer.tiktoken").read_text()
    tokenizer = prepare_data.load_tokenizer(ranks, meta["pat_str"])
    rng = random.Random(2)
    codes = [*range(128), *range(128, 0xD800, 27), *range(0xE000, 0x110000, 999)]
    texts = ["".join(map(chr, codes)), f"a {EOT} b", ""]
    texts += [c * 1_500_000 + "a" for c in " \n.a1"]
    texts += ["".join(rng.choices(" \n\r\ta.1é", k=50)) for _ in range(300)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.eot_token == tokenizer.n_vocab - 1 == meta["eot"]


def test_gpt2_is_taken_as_it_is(tmp_path, monkeypatch):
    ranks = prepare_data.BYTES | {b"al": 256, b"all": 257}
    stand_in = tiktoken.Encoding("gpt2", pat_str=r"\w+|\W", mergeable_ranks=ranks,
                                 special_tokens={EOT: 258})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": stand_in}.get)
    (tmp_path / "a.txt").write_text(STORY * 5)
    prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / "out", "gpt2")
    [text] = part_documents(tmp_path / "out", "train")
    ids = np.fromfile(tmp_path / "out/train.bin", "<u2").tolist()
    assert ids == [*stand_in.encode(text), 258] and 257 in ids


def test_repeated_documents_and_files_that_are_no_text_are_left_out(tmp_path):
    stories = numbered_stories(tmp_path / "a.txt", 300)
    (tmp_path / "b.txt").write_text(stories[3])  # once more, in another file
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    meta = prepare_data.prepare([str(tmp_path)], tmp_path / "out", "bytes", val_fraction=0.1)
    val = part_documents(tmp_path / "out", "val")
    assert sorted(part_documents(tmp_path / "out", "train") + val) == sorted(stories)
    assert (meta["skipped"], meta["duplicates"]) == (1, 1)
    assert [s for s in stories if s in val] == val  # in the order of the text, not of the hashes


def test_tokenizer_does_not_see_validation(tmp_path):
    numbered_stories(tmp_path / "a.txt")
    prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / "out", vocab_size=300,
                         val_fraction=0.3)
    words = collections.Counter()
    for story in part_documents(tmp_path / "out", "train"):
        words.update(regex.findall(prepare_data.PATTERN, story))
    ranks = (tmp_path / "out/tokenizer.tiktoken").read_text()
    tokenizer = prepare_data.load_tokenizer(ranks, prepare_data.PATTERN)
    assert tokenizer._mergeable_ranks == prepare_data.train_bpe(words, 299)


def test_sample_is_drawn_from_all_documents_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "SAMPLE_BYTES", 100_000)
    monkeypatch.setattr(prepare_data, "PIECE", 200)
    (tmp_path / "a.txt").write_text("A licence.")  # the first document is small
    (tmp_path / "b.txt").write_text("first " * 100_000)
    (tmp_path / "c.txt").write_text(f"\n{EOT}\n".join(f"{i} " + "second" * 40 for i in range(1000)))
    counts = prepare_data.sample_words(prepare_data.Corpus(prepare_data.walk(tmp_path), 0.05))
    n_bytes = collections.Counter()
    for word, count in counts.items():
        n_bytes["first" in word] += len(word) * count
    assert n_bytes.total() == pytest.approx(100_000, rel=0.2)
    assert n_bytes[True] == pytest.approx(n_bytes.total() * 5 / 7, rel=0.2)  # as in the whole


def test_words_of_the_sample_are_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "WORD_BYTES", 30_000)
    monkeypatch.setattr(prepare_data, "PIECE", 100)
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x9F00))))   # one word, 62 kB
    counts = prepare_data.sample_words(prepare_data.Corpus([tmp_path / "a.txt"], 0.05))
    assert 10_000 < sum(len(word.encode()) for word in counts) <= 30_000


def test_the_same_text_gives_the_same_bytes_on_any_machine(tmp_path):
    numbered_stories(tmp_path / "a.txt", 300)
    meta = prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / "out", vocab_size=300)
    assert meta["fingerprint"] == "bf7923f90a89f434"


def numbers(first, size):
    """A text of about `size` bytes in which every line is another."""
    return "".join(f"line {i}\n" for i in range(first, first + size // 12))


BOOK = numbers(10**6, 105_000)
NOTES = [f"{i} note" for i in range(1000)]


@pytest.mark.parametrize("val_fraction", [0.05, 0.9])
@pytest.mark.parametrize("texts", [
    ["ab€de"], ["a note  \n", BOOK], [*NOTES, BOOK, numbers(0, 3_000)], list("abcdefgh"),
], ids=["one", "two", "a giant among many", "letters"])
def test_split_is_by_bytes_and_loses_nothing(tmp_path, texts, val_fraction):
    path = tmp_path / "a.jsonl"
    seen = []
    for order in (texts, texts[::-1]):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        corpus = prepare_data.Corpus([path], val_fraction)
        seen.append([sorted(corpus.documents(part)) for part in ("train", "val")])
    assert seen[0] == seen[1]
    train, val = seen[0]
    assert train and val and not set(train) & set(val)
    cut = [text for text in texts if text not in train + val]
    assert len(train) + len(val) == len(texts) + len(cut)
    for text in cut:
        assert any(a + b == text for a in train for b in val)
    total = len("".join(texts).encode())
    n_val = len("".join(val).encode())
    smaller = min(val_fraction, 1 - val_fraction)
    assert abs(n_val - val_fraction * total) <= max(4, smaller * total / 2)


def write_parquet(path, texts, column="text"):
    """A .parquet file of two row groups."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"n": range(len(texts)), column: texts})
    parquet.write_table(table, path, row_group_size=len(texts) // 2 + 1)


def write_zst(path, texts):
    with pytest.importorskip("pyarrow").output_stream(path, compression="zstd") as file:
        for text in texts:
            file.write(json.dumps({"text": text}).encode() + b"\n")


def test_formats(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "plain\r\ntext é".encode())
    (tmp_path / "b.MD").write_text(f"# mark\n {EOT}\nsecond\n{EOT}\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"zipped\r\n"))
    lines = '{"text": "one\\nline"}\n\n{"n": 1, "text": "two \\ud83d"}\n{"text": ""}\n'
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    python = "# coding: latin-1\n'é'\n"
    (tmp_path / "f.py").write_bytes(python.encode("latin-1"))
    (tmp_path / "g.py").write_bytes(b"# coding: nonsense\n")
    (tmp_path / "h.bin").write_bytes(b"not in a folder's text")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/i.txt").write_text("hidden")
    write_parquet(tmp_path / "j.parquet", ["first", None, " ", "größer", f"{EOT} within\n"])
    write_zst(tmp_path / "k.jsonl.zst", ["Zürich", "two\nlines"])
    meta = prepare_data.prepare([str(tmp_path)], tmp_path / "out", "bytes", val_fraction=0.5)
    got = part_documents(tmp_path / "out", "train") + part_documents(tmp_path / "out", "val")
    assert sorted(got) == sorted([
        "plain\r\ntext é", "# mark\n", "second\n", "zipped\r\n", "one\nline", "two ?", python,
        "first", "größer", f"{EOT} within\n", "Zürich", "two\nlines"])
    assert meta["skipped"] == 1


def test_large_files_are_read_in_batches(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    texts = [random.Random(i).randbytes(2500).hex() for i in range(6_000)]      # 30 MB
    write_parquet(tmp_path / "a.parquet", texts)
    before = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(pool)
    try:
        assert sum(1 for _ in prepare_data.read_documents(tmp_path / "a.parquet")) == 6_000
    finally:
        pyarrow.set_memory_pool(before)
    assert pool.max_memory() < 25_000_000


def test_a_damaged_file_ends_the_program(tmp_path):
    """And is named: none is left out in silence."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"txt": "y"}\n')
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(STORY.encode())[:-9])
    write_parquet(tmp_path / "c.parquet", ["x", "y", "z"], column="content")
    zst = tmp_path / "d.jsonl.zst"
    write_zst(zst, [random.Random(0).randbytes(50_000).hex()] * 9)
    os.truncate(zst, zst.stat().st_size - 9)
    for path in tmp_path.iterdir():
        with pytest.raises(SystemExit, match=path.name):
            prepare_data.Corpus([path], 0.05)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(SystemExit, match="too little text"):
        prepare_data.Corpus([tmp_path / "blank.txt"], 0.05)


def test_full_disk_leaves_the_old_data(tmp_path):
    numbered_stories(tmp_path / "a.txt")
    prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / "out", vocab_size=300)
    before = files_of(tmp_path / "out")
    with full_disk(10_000), pytest.raises(OSError):
        prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / "out", "bytes")
    assert files_of(tmp_path / "out") == before
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_changed_text_is_an_error(tmp_path):
    numbered_stories(tmp_path / "a.txt")
    corpus = prepare_data.Corpus([tmp_path / "a.txt"], 0.05)
    for n in (99, 101):
        numbered_stories(tmp_path / "a.txt", n)
        with pytest.raises(ValueError):
            list(corpus.documents("train"))


def test_installed_packages_are_read_once(tmp_path, monkeypatch):
    for name in ("stdlib", "purelib"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").touch()
    (tmp_path / "platlib").symlink_to("purelib")        # as lib64 in some virtual environments
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    assert len(prepare_data.find_files("python", site_packages=True, shards=0)) == 2


def test_the_next_command_can_be_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(STORY)
    for name in ("it's; touch $HOME/x", "naïve 日本", os.fsdecode(b"\xff\x1b[2J\n")):
        prepare_data.main(["a.txt", f"--out_dir={name}", "--tokenizer=bytes"])
        command = capsys.readouterr().out.partition("next: python train.py ")[2].rstrip("\n")
        assert command.isprintable()
        shown = subprocess.run(["bash", "-c", f"printf %s {command}"], capture_output=True)
        assert os.fsdecode(shown.stdout.removeprefix(b"--data_dir=")) == name


@pytest.mark.parametrize("kind", ["a notebook's", "closed", "ASCII"])
def test_any_standard_output_will_do(kind, planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my tale.v2.txt").write_text(STORY * 20)
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    outputs = {"a notebook's": io.StringIO(), "closed": None, "ASCII": ascii_only}
    monkeypatch.setattr(sys, "stdout", outputs[kind])
    prepare_data.main(["my tale.v2.txt", "--tokenizer=bytes"])
    run(Path("\u00e9"), *SMALL, "--data_dir=data/my tale.v2", "--steps=1")
    sample.main(["--out_dir=\u00e9", "--prompt=\u00e9", "--max_new_tokens=3"])
    analyze.main(["neighbors", "--prompt=\u00e9", f"--out_dir={planted}"])


def test_download_is_whole_or_not_there(tmp_path):
    source = tmp_path / "source.txt"
    path = tmp_path / "new/a.txt"

    def breaks_off(url, part):
        part.write_text("hal")
        raise urllib.error.ContentTooShortError("3 of 4 bytes", None)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="3 of 4 bytes"):
        patch.setattr(urllib.request, "urlretrieve", breaks_off)
        prepare_data.download(source.as_uri(), path)
    assert not path.exists()
    source.write_text("half")
    prepare_data.download(source.as_uri(), path)
    source.unlink()
    prepare_data.download(source.as_uri(), path)    # it is there
    assert path.read_text() == "half"
    assert os.listdir(path.parent) == ["a.txt"]


def test_sources_with_a_validation_file(tmp_path, monkeypatch):
    """Their files are there, so nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    stories = [f"story {i}" for i in range(9)]
    for folder in ("tinystories", "slimpajama/train", "slimpajama/validation"):
        Path("data", folder).mkdir(parents=True)
    Path("data/tinystories/TinyStories-train.txt").write_text(f"\n{EOT}\n".join(stories))
    Path("data/tinystories/TinyStories-valid.txt").write_text(f"new\n{EOT}\nstory 4\n")
    write_parquet("data/slimpajama/train/0000.parquet", stories[:5])
    write_parquet("data/slimpajama/train/0001.parquet", stories[5:])
    write_parquet("data/slimpajama/validation/0000.parquet", ["new", "story 4"])
    for source in ("tinystories", "slimpajama"):
        prepare_data.main([source, "--shards=2", "--tokenizer=bytes", "--val_fraction=0.9"])
        val = part_documents(Path("data", source), "val")
        train = part_documents(Path("data", source), "train")
        assert [text.strip() for text in val] == ["new", "story 4"]
        assert [text.strip() for text in train] == stories[:4] + stories[5:]


# --------------------------------------------------------------------------------------------------
# training and sampling: the programs themselves, on the text of this folder's own .py files

SMALL = ["--d_model=32", "--d_head=16", "--n_layer=2", "--n_experts=64", "--n_channels=4",
         "--top_k=4", "--d_key=16", "--block_size=32", "--batch_size=4", "--warmup_steps=3",
         "--eval_sequences=5", "--log_interval=1", "--device=cpu"]
TWENTY = ["--steps=20", "--eval_interval=10", "--decay_fraction=0"]
RESUME = ["--resume", "--device=cpu"]       # a resumed run chooses its device anew


def start(program, *args, **env):
    """Starts python on a program, with one thread."""
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | env
    command = [sys.executable, *map(str, program), *map(str, args)]
    return subprocess.Popen(command, env=env, text=True, encoding="utf-8",
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


@contextlib.contextmanager
def full_disk(size):
    """A limit on the size of files stands for it."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the program ended without printing {text!r}")


def finished(process, code=0):
    out, _ = process.communicate(timeout=600)
    assert process.returncode == code, out
    return out


@contextlib.contextmanager
def one_thread():
    """Two threads that share their cores with other programs take ten times as long on such small
    matrices. And what train.py sets for the whole process is undone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def run(out_dir, *args):
    """train.py in this process, with one thread: numbers do not depend on the machine's cores."""
    with one_thread():
        train.main([*args, f"--out_dir={out_dir}"])
    return out_dir


def run_in_float64(out_dir, *args):
    """Rounding differs with the number of processes, and tips routers where scores are all but
    equal: in float64 there are no such scores."""
    torch.set_default_dtype(torch.float64)
    try:
        return run(out_dir, *args)
    finally:
        torch.set_default_dtype(torch.float32)


def load(out_dir):
    return torch.load(out_dir / "ckpt.pt", weights_only=True)


def change(out_dir, **changes):
    torch.save(load(out_dir) | changes, out_dir / "ckpt.pt")


def log(out_dir, event):
    """Entries of one kind; every line is JSON, the settings come first, no step comes twice."""
    entries = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    keys = [(entry["event"], entry.get("step")) for entry in entries]
    assert keys[0] == ("config", None)
    assert len(set(keys)) == len(keys)
    return [entry for entry in entries if entry["event"] == event]


def assert_same_state(a, b):
    """Two runs reached the same step with the same bits in every parameter and moment."""
    a = load(a)
    b = load(b)
    assert a["step"] == b["step"]
    torch.testing.assert_close(a["model"], b["model"], atol=0, rtol=0)
    moments = (a["optimizer"]["state"], b["optimizer"]["state"])
    torch.testing.assert_close(*moments, atol=0, rtol=0)


def assert_close_runs(a, b):
    """The same run but for rounding in float64: losses, norms, and the weights at the end."""
    for event, key in (("step", "loss"), ("step", "norm"), ("eval", "val_loss"), ("eval", "used"),
                       ("eval", "gini")):
        for ours, theirs in zip(log(a, event), log(b, event), strict=True):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-8), (ours["step"], key)
    torch.testing.assert_close(load(a)["model"], load(b)["model"], atol=1e-7, rtol=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_data.prepare(sorted(map(str, ROOT.glob("*.py"))), folder, vocab_size=300)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Twenty steps without interruption, which the other runs are compared with."""
    return run(tmp_path_factory.mktemp("trained"), *SMALL, *TWENTY, f"--data_dir={data}")


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_log_names_the_commit(trained):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(train.__file__).parent,
                          capture_output=True, text=True)
    [start] = log(trained, "config")
    assert (start["commit"] or "").removesuffix("-dirty") == head.stdout.strip()


# Several runs in the same processes, one an argument with its settings separated by newlines: each
# keeps a copy of itself at step 10, and says how many bytes of parameters and moments it holds.
SEVERAL = """
import shutil, sys, torch, train
import torch.distributed as dist
from torch.distributed.tensor import DTensor

def save(model, optimizer, cfg, data, progress, before=train.save):
    before(model, optimizer, cfg, data, progress)
    held = list(model.parameters())
    for state in optimizer.state.values():
        held += state.values()
    held = [t.to_local() if isinstance(t, DTensor) else t for t in held]
    if progress["step"] == 20:
        print(f"{cfg.out_dir} holds {sum(t.nbytes for t in held)}", flush=True)
    if progress["step"] == 10 and dist.get_rank() == 0:
        shutil.copytree(cfg.out_dir, cfg.out_dir + "-10")

init = dist.init_process_group
destroy = dist.destroy_process_group

def init_once(backend):
    if not dist.is_initialized():
        init(backend)

train.save = save
dist.init_process_group = init_once
dist.destroy_process_group = lambda: None       # but for the last run
torch.set_default_dtype(torch.float64)
for args in sys.argv[1:]:
    if args == sys.argv[-1]:
        dist.destroy_process_group = destroy
    train.main(args.split("\\n"))
"""


@pytest.fixture(scope="module")
def in_float64(data, tmp_path_factory):
    """The twenty steps on one process."""
    out = tmp_path_factory.mktemp("float64")
    return run_in_float64(out, *SMALL, *TWENTY, f"--data_dir={data}")


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """A folder of runs of the twenty steps on two processes, and what these printed."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "several.py").write_text(SEVERAL)
    args = [*SMALL, *TWENTY, f"--data_dir={data}"]
    runs = [[*args, f"--out_dir={folder}/whole", "--micro_batch_size=1"],
            [*args, f"--out_dir={folder}/sharded", "--shard"],
            [f"--out_dir={folder}/whole-10", *RESUME, "--shard"]]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return folder, finished(start([*torchrun, folder / "several.py"], *map("\n".join, runs)))


@pytest.mark.parametrize("name", ["whole", "sharded", "whole-10"])
def test_two_processes_follow_one(name, in_float64, two):
    """Also sharded, and unsharded until step 10; with an odd number of windows to evaluate."""
    folder, printed = two
    assert_close_runs(folder / name, in_float64)
    assert printed.count("A sample:") == 3          # only one of them prints
    [begun] = log(folder / name, "config")
    assert begun["versions"]["machine"].endswith(", 2 processes")


def test_sharded_processes_hold_half(two):
    folder, printed = two
    whole = [int(n) for n in re.findall(r"/whole holds (\d+)", printed)]
    shares = [int(n) for n in re.findall(r"/sharded holds (\d+)", printed)]
    assert len(whole) == len(shares) == 2
    assert max(shares) < 0.55 * whole[0]


def test_a_sharded_run_goes_on_unsharded(in_float64, two, tmp_path):
    folder, _ = two
    out = shutil.copytree(folder / "sharded-10", tmp_path / "one")
    run_in_float64(out, *RESUME, "--no-shard")
    assert_close_runs(out, in_float64)


def test_only_torchrun_makes_several_processes(data, trained, tmp_path):
    """What a cluster or another program leaves in the environment does not cut the batch."""
    args = [*SMALL, *TWENTY, f"--data_dir={data}", f"--out_dir={tmp_path}"]
    finished(start([ROOT / "train.py"], *args, WORLD_SIZE="4", RANK="1", LOCAL_RANK="3"))
    assert_same_state(tmp_path, trained)


def test_resume_is_exact_and_evaluation_changes_nothing(data, trained, tmp_path):
    """With the log as a kill or a full disk can leave it."""
    first = run(tmp_path / "first", *SMALL, f"--data_dir={data}", "--steps=7", "--eval_interval=3",
                "--decay_fraction=0")
    out = first.rename(tmp_path / "moved")
    with open(out / "log.jsonl", "ab") as file:
        file.write(b'{"event": "step", "step": 17}\n[]\n\xff\xfe\n{"event": "st')
    run(out, *RESUME, "--steps=20", "--eval_interval=4", "--micro_batch_size=4")
    assert_same_state(out, trained)
    assert [entry["step"] for entry in log(out, "step")] == list(range(1, 21))
    assert not first.exists()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("ffn", FFN)
def test_resume_is_exact_on_a_gpu(ffn, data, tmp_path):
    """With so many tokens that their sums depend on train.py asking for a fixed order."""
    args = [*SMALL, f"--ffn={ffn}", "--n_experts=25", "--d_ff=48", "--decay_fraction=0",
            f"--data_dir={data}", "--device=cuda", "--no-compile",
            "--block_size=512", "--batch_size=8"]
    whole = run(tmp_path / "whole", *args, "--steps=20")
    part = run(tmp_path / "part", *args, "--steps=7")
    run(part, "--resume", "--device=cuda", "--steps=20")
    assert_same_state(part, whole)


def at_step(monkeypatch, moment, action):
    """Has train.py call action() at the beginning of a step."""
    schedule = train.schedule

    def patched(step, cfg):
        if step == moment:
            action()
        return schedule(step, cfg)

    monkeypatch.setattr(train, "schedule", patched)


@pytest.fixture
def in_a_terminal():
    """Where no signal is ignored, as nohup and shells in the background do."""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_and_end_the_run(number, data, trained, in_a_terminal, tmp_path, monkeypatch):
    before = signal.getsignal(number)
    at_step(monkeypatch, 13, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *SMALL, *TWENTY, f"--data_dir={data}")
    assert stop.value.code == 130
    assert signal.getsignal(number) == before
    assert load(tmp_path)["step"] == 14
    monkeypatch.undo()
    run(tmp_path, *RESUME)
    assert_same_state(tmp_path, trained)


def test_nohup_outlives_its_terminal(data, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(tmp_path, *SMALL, f"--data_dir={data}", "--steps=3")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert load(tmp_path)["step"] == 3


def test_kill_at_any_moment_leaves_a_checkpoint(data, tmp_path):
    """Each step saves, so that some of the kills come while a file is written."""
    out = tmp_path / "out"
    args = [*SMALL, f"--data_dir={data}", "--steps=1000", "--decay_fraction=0", "--eval_interval=1"]
    process = start([ROOT / "train.py"], *args, f"--out_dir={out}")
    wait_for(process, "validation loss")
    wait_for(process, "validation loss")        # the first checkpoint is there
    time.sleep(random.uniform(0, 0.1))      # wherever it is by then, all below must hold
    process.kill()
    process.communicate()
    last = f"--steps={load(out)['step'] + 3}"
    run(out, *RESUME, last)
    assert_same_state(out, run(tmp_path / "whole", *args, last, "--eval_interval=1000"))
    evals = [entry["step"] for entry in log(out, "eval")]
    assert evals == list(range(load(out)["step"] + 1))


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, dict(step=1))
    with full_disk(2**16), pytest.raises(OSError, match="File too large"):
        save_checkpoint(path, dict(step=torch.zeros(2**16)))
    assert torch.load(path) == dict(step=1)
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_a_link_to_a_checkpoint_stays_one(tmp_path):
    (tmp_path / "ckpt.pt").symlink_to(tmp_path / "elsewhere.pt")
    save_checkpoint(tmp_path / "ckpt.pt", dict(step=1))
    assert (tmp_path / "ckpt.pt").is_symlink()
    assert torch.load(tmp_path / "elsewhere.pt") == dict(step=1)


@pytest.mark.parametrize("spoilt, message, saved", [
    (5, "step 7: {'loss': nan, 'gradient_norm': nan}", 4),
    (3, "step 4: {'validation_loss': nan}", 0)])
def test_nan_stops_and_keeps_the_last_good_checkpoint(spoilt, message, saved, data, tmp_path,
                                                      monkeypatch):
    """A step whose learning rate is not a number spoils the weights."""
    monkeypatch.setattr(train, "schedule", lambda step, cfg: math.nan if step == spoilt else 1e-3)
    with pytest.raises(SystemExit, match=f"{re.escape(message)}. .*ckpt.pt holds"):
        run(tmp_path, *SMALL, f"--data_dir={data}", "--eval_interval=4", "--steps=50")
    state = load(tmp_path)
    assert state["step"] == saved
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_nan_in_the_step_before_an_evaluation_is_not_saved(data, tmp_path, monkeypatch):
    """Its numbers are read after the step is taken, but before anything is saved."""
    clip = train.clip_gradients
    norms = []

    def fourth_is_nan(model, cfg):
        norms.append(clip(model, cfg))
        return norms[-1] * (math.nan if len(norms) == 4 else 1)

    monkeypatch.setattr(train, "clip_gradients", fourth_is_nan)
    with pytest.raises(SystemExit, match=r"step 4: .*'gradient_norm': nan"):
        run(tmp_path, *SMALL, f"--data_dir={data}", "--eval_interval=4", "--steps=50")
    assert load(tmp_path)["step"] == 0


def refuses(*args, word):
    with pytest.raises(SystemExit, match=word), one_thread():
        train.main([str(arg) for arg in args])


@pytest.mark.parametrize("damage, args, word", [
    (None, [], "--overwrite"),
    (lambda out: (out / "ckpt.pt").unlink(), [], "--overwrite"),
    (None, ["--resume", "--d_model=64"], "--d_model=64"),
    (lambda out: change(out, data=dict(fingerprint="?")), ["--resume"], "not the data")])
def test_runs_are_not_lost_or_mixed(damage, args, word, data, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    if damage:
        damage(out)
    before = files_of(out)
    refuses(f"--out_dir={out}", f"--data_dir={data}", *args, word=word)
    assert before == files_of(out)


def test_a_start_that_failed_is_no_run(data, tmp_path):
    args = [*SMALL, f"--data_dir={data}", f"--out_dir={tmp_path}", "--steps=2"]
    with pytest.raises(ValueError, match="sub-keys"), one_thread():
        train.main([*args, "--top_k=40"])
    with one_thread():
        train.main(args)
    assert load(tmp_path)["step"] == 2


@pytest.mark.parametrize("args, word", [
    ("--data_dir=nowhere", "prepare_data.py"), ("--block_size=10000000", "too few"),
    ("--flops=1e3", "buys no step"), ("--flops=1e9 --steps=5", "give one"),
    ("--grad_clip=-1", "grad_clip"), ("--decay_fraction=2", "decay_fraction"),
    ("--resume --out_dir=nowhere", "missing")])
def test_mistakes_of_the_first_hour_are_one_line(args, word, data, tmp_path):
    refuses(*SMALL, f"--data_dir={data}", f"--out_dir={tmp_path}/out", *args.split(), word=word)


@pytest.mark.parametrize("program, args", [
    (prepare_data, ["nowhere"]), (train, ["--data_dir=nowhere"]), (analyze, ["curves", "nowhere"])])
def test_a_folder_that_cannot_be_written_is_found_first(program, args):
    """Before the data is looked for."""
    with pytest.raises(OSError, match="/dev/null/out"):
        program.main([*args, "--out_dir=/dev/null/out"])


def test_data_that_is_only_half_replaced_is_refused(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    os.truncate(folder / "train.bin", 5000)
    refuses(*SMALL, f"--data_dir={folder}", f"--out_dir={tmp_path}/out", word="prepare it again")


def in_a_shell(command, **env):
    """Runs a command as one pasted into a shell, where python is this one; returns its output."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, text=True, encoding="utf-8",
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT,
                          env=os.environ | dict(PATH=path, OMP_NUM_THREADS="1") | env)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_printed_commands_can_be_pasted(data, in_a_terminal, tmp_path, capsys, monkeypatch):
    out = tmp_path / "it's; echo $HOME"
    args = [*SMALL, f"--data_dir={data}", "--decay_fraction=0"]
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):
        run(out, *args, "--steps=3")
    go_on = re.search("to continue: (.*)", capsys.readouterr().out)[1]
    printed = in_a_shell(go_on + " --device=cpu")
    assert load(out)["step"] == 3
    commands = re.search("next:  (.*)", printed, re.S)[1].splitlines()
    assert "tok/s]" in in_a_shell(commands[0])
    assert commands[1].strip().startswith("python analyze.py")
    in_a_shell(commands[2] + " --device=cpu")
    assert load(out)["step"] == 6


def test_a_closed_pipe_does_not_end_a_training(data, tmp_path):
    command = shlex.join(["python", "train.py", *SMALL, f"--data_dir={data}", "--steps=12",
                          f"--out_dir={tmp_path}/out"])
    in_a_shell(f"set -o pipefail; {command} | head -n 1")
    assert load(tmp_path / "out")["step"] == 12


@pytest.mark.parametrize("program", [prepare_data, train, sample, analyze])
def test_help_fits_a_terminal_and_needs_no_docstring(program, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(program, "__doc__", None)       # as with python -OO
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_explains_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")       # an explanation is one line
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    explained = re.findall(r"  \w.* \(default: ", capsys.readouterr().out)
    assert len(explained) == len(dataclasses.fields(train.TrainConfig))


def test_a_run_keeps_the_data_of_its_start(data, trained, tmp_path, monkeypatch):
    folder = shutil.copytree(data, tmp_path / "data")

    def replace():
        prepare_data.prepare([str(ROOT / "train.py")], folder, "bytes")

    at_step(monkeypatch, 5, replace)
    run(tmp_path / "out", *SMALL, *TWENTY, f"--data_dir={folder}")
    assert json.loads((folder / "meta.json").read_text())["tokenizer"] == "bytes"
    assert_same_state(tmp_path / "out", trained)


def test_bfloat16_only_where_a_gpu_has_it(monkeypatch):
    for capability, dtype in (((7, 5), FP32), ((8, 0), BF16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert train.choose_dtype(train.TrainConfig(device="cuda")) == dtype


def test_overwrite_starts_anew(data, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    run(out, *SMALL, f"--data_dir={data}", "--overwrite", "--steps=1")
    assert load(out)["step"] == 1
    assert len(log(out, "step")) == 1


@pytest.mark.parametrize("ffn", FFN)
def test_every_layer_trains_and_samples(ffn, data, tmp_path, capsys):
    sizes = ["--n_experts=4", "--top_k=2"] if ffn == "moe" else []
    run(tmp_path, *SMALL, f"--ffn={ffn}", "--d_ff=48", *sizes, f"--data_dir={data}", "--steps=40",
        "--learning_rate=5e-3")
    first, last = log(tmp_path, "eval")
    assert first["val_loss"] == pytest.approx(math.log(300) + 0.5, abs=0.35)    # unit variance
    assert last["val_loss"] < first["val_loss"] - 0.5
    assert last["tokens"] == 40 * 4 * 32
    sample.main([f"--out_dir={tmp_path}", "--prompt=def ", "--max_new_tokens=3"])
    assert re.search(r"\[[0-3] tokens, \d+ tok/s\]\n$", capsys.readouterr().out)


class NewLayer(torch.nn.Linear):
    """A layer as the README tells to add one; its router is none of ours."""

    def __init__(self, cfg):
        super().__init__(cfg.d_model, cfg.d_model)
        self.router = torch.nn.Identity()

    def flops(self):
        return 2 * self.weight.numel()


def test_a_new_layer_trains_at_once(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FFN, "new", NewLayer)
    run(tmp_path, *SMALL, "--ffn=new", "--top_k=2", f"--data_dir={data}", "--steps=1")
    assert load(tmp_path)["step"] == 1
    assert "note     --top_k changes nothing with ffn=new" in capsys.readouterr().out


def test_usage_is_that_of_the_choices(data, trained):
    """The log's loss, used and gini against those of all windows at once; Gini by its definition.
    """
    model, _ = load_model(trained / "ckpt.pt", "cpu")
    windows = train.Data(data, block_size=32)
    x = windows.windows("val", windows.val_starts(5))
    chosen = []
    for block in model.blocks:
        block.ffn.router.register_forward_hook(lambda router, args, out: chosen.append(out[1]))
    with one_thread(), torch.no_grad():
        _, loss = model(x[:, :-1], x[:, 1:])
    entry = log(trained, "eval")[-1]
    assert entry["val_loss"] == pytest.approx(loss.item(), rel=1e-6)
    for layer, ids in enumerate(chosen):                            # (N, C, k)
        neurons = ids + torch.arange(0, 4 * 64, 64)[:, None]
        load = neurons.flatten().bincount(minlength=4 * 64).double()
        gini = (load[:, None] - load).abs().mean() / (2 * load.mean())
        used = (load > 0).double().mean()
        assert entry["used"][layer] == pytest.approx(used.item(), abs=1e-5)
        assert entry["gini"][layer] == pytest.approx(gini.item(), abs=1e-5)


def test_a_neuron_that_two_channels_share_is_counted_once():
    model = tiny("peer")
    with torch.no_grad(), train.count_choices(model) as counts:
        _, ids = model.blocks[0].ffn.router(torch.randn(7, model.cfg.d_model))      # (N, C, k)
    [count] = counts.values()
    assert count.tolist() == [ids.flatten().tolist().count(neuron)
                              for neuron in range(model.cfg.n_experts)]


def test_induction_is_that_of_the_patterns(trained, monkeypatch):
    """The log's score against the patterns that the model's own attention uses."""
    model, _ = load_model(trained / "ckpt.pt", "cpu")
    patterns = []
    functional = torch.nn.functional
    attention = functional.scaled_dot_product_attention

    def spy(q, k, v, is_causal):
        eye = torch.eye(k.shape[2]).expand(*k.shape[:3], -1)        # values that tell places apart
        patterns.append(attention(q, k, eye, is_causal=is_causal))  # (B, H, T, T)
        return attention(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    with one_thread():
        score = train.induction(model, contextlib.nullcontext())
    best = 0.0
    for pattern in patterns:
        paid = [pattern[:, :, 16 + t, t + 1].mean(0) for t in range(16)]    # half of block_size
        best = max(best, torch.stack(paid).mean(0).max().item())
    assert score == pytest.approx(best, rel=1e-5)
    assert log(trained, "eval")[-1]["induction"] == pytest.approx(score, abs=2e-5)


def test_data_order_is_a_function_of_seed_and_step(data):
    one = train.Data(data, block_size=32, seed=1)
    n_windows = one.n_windows
    first = one.train_starts(0, n_windows)
    second = one.train_starts(1, n_windows)
    for epoch in (first, second):
        assert len(np.unique(epoch)) == n_windows           # a pass takes each window once
        assert len(np.unique(epoch % 32)) == 1              # and cuts the text in one way
    assert first[0] % 32 != second[0] % 32
    again = train.Data(data, block_size=32, seed=1)
    other = train.Data(data, block_size=32, seed=2)
    for step in (5, 0, 7):                                  # in any order, in smaller batches
        expected = first[8 * step:8 * step + 8]
        assert np.array_equal(again.train_starts(step, 8), expected)
        assert not np.array_equal(other.train_starts(step, 8), expected)
    tokens = np.fromfile(data / "train.bin", "<u2")
    for row, start in zip(one.windows("train", first[:8]), first[:8]):
        assert row.tolist() == tokens[start:start + 33].tolist()


def test_schedule_and_optimizer_are_those_of_the_paper():
    cfg = train.TrainConfig(steps=1000, learning_rate=1e-3, warmup_steps=100, decay_fraction=0.2,
                            ffn_rate=0.25)
    golden = {0: 0.0, 1: 9.999959729611874e-06, 50: 0.0005000000237487257,
              99: 0.0009900000877678394, 100: 0.0010000000474974513, 799: 0.0010000000474974513,
              800: 0.0010000000474974513, 801: 0.0009292893810197711, 850: 0.0005000000237487257,
              900: 0.00029289323720149696, 999: 2.5031567929545417e-06, 1000: 0.0}
    for step, lr in golden.items():
        assert train.schedule(step, cfg) == pytest.approx(lr, abs=1e-8)
    for ffn in FFN:                 # the biases of moe's experts are tensors of two dimensions
        model = tiny(ffn)
        optimizer = train.make_optimizer(model, cfg)
        train.set_learning_rate(optimizer, 1e-3)
        group_of = {}
        for group in optimizer.param_groups:
            assert group["betas"] == (0.9, 0.999)
            for p in group["params"]:
                group_of[p] = group
        for name, p in model.named_parameters():
            bias = name.endswith(("scale", "b1", "b2"))
            assert group_of[p]["weight_decay"] == (0.0 if bias else 0.1), name
            assert group_of[p]["lr"] == (2.5e-4 if ".ffn." in name else 1e-3), name


@one_thread()
def test_sampling_equals_the_full_forward_and_slides():
    """Greedy tokens from the cache are those of a model without one, also beyond block_size.

    In float64: rounding can tip the choice between two tokens of all but equal score.
    """
    model = tiny("mlp").double()
    prompt = tokens(1, 20)[0].tolist()
    context = prompt[-12:]
    truth = []
    for _ in range(40):
        if len(context) > 12:
            context = context[-6:]                  # a full context keeps its last half
        logits, _ = model(torch.tensor([context]))
        truth.append(int(logits[0, -1].argmax()))
        context = context + truth[-1:]

    def drawn(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        return list(model.generate(prompt, 40, vocab_size=50, generator=generator, **settings))

    for settings in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-6)):
        assert drawn(0, **settings) == truth
    assert drawn(1) == drawn(1) != drawn(2)


def test_prompt_may_end_within_a_token(trained):
    """The blank of "def " belongs to the word that follows: the greedy text is that of "def"."""
    model, state = load_model(trained / "ckpt.pt", "cpu")
    model.double()          # the cache rounds otherwise, which could tip a choice
    encoding = prepare_data.load_tokenizer(**state["tokenizer"])
    for prompt in ("def ", "class", "x = sel"):
        tokens = encode_prompt(encoding, prompt)
        last = encoding.decode_single_token_bytes(tokens.pop())
        logits, _ = model(torch.tensor([tokens]))
        order = logits[0, -1, :299].argsort(descending=True).tolist()
        texts = map(encoding.decode_single_token_bytes, order)
        best = next(text for text in texts if text.startswith(last))
        pieces = list(stream(model, encoding, prompt, 1, temperature=0))
        assert "".join(pieces) == best[len(last):].decode(errors="replace")


def test_control_characters_are_shown_and_not_sent(trained, monkeypatch, capsys):
    assert printable("a\x1b[2J\x00\x9b\t\n\u00e9") == "a\u241b[2J\u2400\ufffd\t\n\u00e9"
    monkeypatch.setattr(sample, "stream", lambda *args, **settings: iter(["\x1b[31m", "\x07", ""]))
    sample.main([f"--out_dir={trained}", "--prompt=\x1b"])
    assert "\u241b\u241b[31m\u2407\n[2 tokens" in capsys.readouterr().out


def test_stream_ends_at_endoftext_and_prints_whole_characters():
    ranks = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    encoding = prepare_data.load_tokenizer(ranks, prepare_data.PATTERN)

    class Fixed:
        def generate(self, tokens, max_new_tokens, vocab_size):
            assert tokens == [256]                  # an empty prompt starts a document
            assert vocab_size == 257
            yield from "\u00e9\U0001f389".encode() + b"\xf0\x9f" + b"a\xe2\x82"
            yield from (256, 98)

    pieces = list(stream(Fixed(), encoding, "", 100))
    assert pieces == ["", "\u00e9", "", "", "", "\U0001f389", "", "", "\ufffda", "", "", "\ufffd"]


# --------------------------------------------------------------------------------------------------
# analyze.py: golden values, brute force, and a model whose circuits are planted

@pytest.mark.parametrize("shape, tag, mix, value", [
    ((12, 5, 7), 700, 0.0, 0.31252846), ((40, 6, 6), 710, 0.7, 0.96049237)])
def test_cka_is_that_of_the_paper(shape, tag, mix, value):
    M, D, F = shape
    x = fill((M, D), tag, 1.0, 0.25)
    y = fill((M, F), tag + 1, 1.0)
    if mix:
        y = -2 * mix * x + (1 - mix) * y
    assert analyze.cka(x, y) == pytest.approx(value, abs=1e-6)


def test_indirect_effect_is_that_of_the_paper():
    """Its preferences are between sets of answers; ours are of one answer each."""
    clean = torch.tensor([[[2, 3], [4, 5], [0, 9], [7, 7]]])
    other = torch.tensor([[[1, 6], [8, 2], [3, 4], [5, 0]]])
    m = []
    for tag in (800, 801, 802):
        logits = fill((1, 4, 10), tag, 3.0)
        m.append((logits.gather(-1, clean).logsumexp(-1) - logits.gather(-1, other).logsumexp(-1)))
    effect = torch.tensor([[0.7510543, 0.4356129, 2.4044633, 1.5351280]])
    torch.testing.assert_close(analyze.indirect_effect(*m), effect, atol=1e-5, rtol=0)


def test_neighbors_are_the_best_of_other_keys_and_different_contexts():
    """Against the dense product of the sparse circuits."""
    torch.manual_seed(0)
    values = torch.nn.functional.normalize(torch.randn(300, 6))
    rows = torch.stack([torch.randperm(40)[:6] for _ in range(300)]).int()
    circuits = analyze.Circuits(values, rows, 40)
    dense = torch.zeros(300, 40).scatter_(1, rows.long(), values)
    tokens = np.tile(np.random.default_rng(0).integers(0, 2, (15, 10)), (2, 1))  # all windows twice
    windows = tokens.tolist()
    contexts = analyze.contexts_of(torch.from_numpy(tokens))
    ends = [windows[place // 10][:place % 10 + 1][-analyze.CONTEXT:] for place in range(300)]
    keys = torch.arange(300) % 7
    found = analyze.find_neighbors(circuits, keys, circuits, keys, contexts)
    for query, near in enumerate(found):
        best = []
        for i in (dense @ dense[query]).argsort(descending=True).tolist():
            if i % 7 != query % 7 and ends[i] not in [ends[j] for j in best]:
                best.append(i)
        assert [i for i, _ in near] == best[:analyze.NEIGHBORS]


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=20)
    error = 1.96 * values.std(ddof=1) / 20**0.5
    found = analyze.jackknife(values, np.eye(20, dtype=bool))
    assert found == f"{values.mean():.3f} ± {error:.3f}"
    assert analyze.jackknife(values, np.ones((1, 20), dtype=bool)) == "-"


def test_classes_are_of_like_contexts():
    """x and y, and u and v, occur between the same tokens, which are themselves the third class."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    text = []
    for _ in range(2000):
        text += [0, rng.integers(1, 3), 3, rng.integers(4, 6)]
    run = argparse.Namespace(cfg=GPTConfig(vocab_size=8), name=str,
                             data=argparse.Namespace(tokens=lambda part: np.array(text)))
    of_token, names = analyze.context_classes(run, n_tokens=6, n_classes=4)
    labels = of_token.tolist()
    assert labels[1] == labels[2] and labels[4] == labels[5] and labels[6] == labels[7] == 4
    assert len({labels[i] for i in (0, 1, 3, 4)}) == 4 and names[-1] == "rare tokens"
    assert sorted(names[labels[1]].split()) == ["1", "2"]


def write_run(folder, model, training, validation):
    """A run's checkpoint, and its data: these two documents in bytes."""
    texts = folder / "tinystories"
    texts.mkdir()
    (texts / "TinyStories-train.txt").write_text(training)
    (texts / "TinyStories-valid.txt").write_text(validation)
    meta = prepare_data.prepare([str(texts)], folder / "data", tokenizer="bytes")
    ranks = (folder / "data/tokenizer.tiktoken").read_text()
    torch.save(dict(model=model.state_dict(), data=meta, step=0,
                    config=vars(model.cfg) | dict(data_dir=str(folder / "data"), seed=0),
                    tokenizer=dict(ranks=ranks, pat_str=meta["pat_str"])), folder / "ckpt.pt")


PLANTED = dict(vocab_size=257, block_size=16, n_layer=2, d_model=32, d_head=16, d_key=32)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A run whose letter 4a + b of a..p uses neuron 4a + b with gate 20 and 4a + (b+1) % 4 with 13.

    Neuron i writes the capital of letter i. Layer 1 and attention write nothing; others are 0.
    """
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    letters = ""
    for _ in range(16):     # two of each letter in a window
        letters += "".join(rng.permutation(list("abcdefgh")))
    model = GPT(GPTConfig(**PLANTED, n_experts=16, n_channels=1, top_k=2))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_() if p.ndim > 1 else p.fill_(1)
        for i in range(16):
            model.embedding.weight[ord("a") + i, i] = 1
            model.embedding.weight[ord("A") + i, 16 + i] = 1
        for block in model.blocks:
            block.ffn.router.query.weight.copy_(torch.eye(32))
            block.ffn.w_in.fill_(32**-0.5)      # so that every neuron reads 1 from a letter
        keys = model.blocks[0].ffn.router.keys  # (1, 2, 4, 32)
        for t in range(16):
            for half, best, second in ((0, t // 4, 1), (1, t % 4, 3)):
                keys[0, half, best, t] = 10 * 32**-0.5
                keys[0, half, (best + 1) % 4, t] = second * 32**-0.5
        model.blocks[0].ffn.w_out[0, :, 16:] = torch.eye(16)
    write_run(folder, model, ".aA.fF.kK" * 6 + ".pA" * 4, letters + "a")
    return folder


def test_planted_neighbours_are_found(planted):
    run = analyze.Run(planted)
    source = analyze.record(run.model, torch.tensor([run.prompt("b")]))
    [near] = analyze.nearest_circuits(run, source, [1], 0)
    assert {run.trained.tokens.flat[place] for place, _ in near} == {ord("b")}
    assert [distance for _, distance in near] == pytest.approx([0] * 10, abs=1e-6)


def test_planted_class_shares(planted, capsys):
    """b's nearest others, a and c, are of its class; d's are c and a, h's are e and g."""
    pytest.importorskip("sklearn")
    run = analyze.Run(planted)
    ids = run.trained.tokens.ravel()
    label = ids // 4 % 2
    places = np.arange(128)
    shares = analyze.class_shares(run.trained, run.trained.circuits(0), places, label)
    queries, meaning = analyze.meaning(run, 0, label)
    assert sorted(queries) == places.tolist()
    # half the other letters but one, all of them equally frequent
    assert meaning["chance"] == pytest.approx(3 / 7)
    near = {"a": "bd", "b": "ac", "c": "bd", "d": "ca", "e": "fh", "f": "eg", "g": "fh", "h": "ge"}
    for query, letter in enumerate(ids):
        own = [ord(other) // 4 % 2 == letter // 4 % 2 for other in near[chr(letter)]]
        assert min(own) <= shares[query] <= max(own)
    analyze.main(["classes", "--layer=0", f"--out_dir={planted}"])
    assert re.search(r"  all +128 +\d\.\d+ ± ", capsys.readouterr().out)


def test_planted_usage_and_coactivation(planted, capsys):
    run = analyze.Run(planted)
    P = torch.zeros(16, 16)
    for i in range(8):
        group = i // 4 * 4
        P[i, i] = 1
        P[i, group + (i + 1) % 4] = P[i, group + (i - 1) % 4] = 0.5
    torch.testing.assert_close(analyze.coactivation(run.trained.rows[0], 16), P.double())
    analyze.main(["usage", f"--out_dir={planted}"])
    out = capsys.readouterr().out
    assert re.search(r"^  0 +trained +0.500 +0.500$", out, re.M)            # 8 of 16, all alike
    assert re.search(r"^  0 +trained +0.333 +0.000 +0.000$", out, re.M)     # 2 of 3, half the time


def test_planted_patches_have_their_effects(planted, capsys):
    run = analyze.Run(planted)
    template = analyze.Template(run, ".{}")
    facts = analyze.find_facts(run, template)       # p → A is not one, for A is a's answer
    assert list(facts.items()) == [tuple(b"fF"), tuple(b"kK"), tuple(b"aA")]
    assert analyze.given_facts(run, template, "f:F,k:K,a:A") == facts
    logits, known, effects = analyze.patching(run, template, facts)
    assert logits.argmax(1).tolist() == list(b"FKA") and known.sum() == 6
    assert list(effects) == [(2, "all"), (2, "0"), (2, "1")]
    for (_, layers), (theirs, third) in effects.items():
        effect = 0.0 if layers == "1" else 1.0
        torch.testing.assert_close(theirs[known], torch.full((6,), effect))
        torch.testing.assert_close(third[known], torch.full((6,), effect / 2))
    analyze.main(["patch", "--template=.{}", f"--out_dir={planted}"])
    assert re.search(r"\{\} +all +1.000 ± 0.000 +0.500 ± 0.000 ", capsys.readouterr().out)


def test_a_prompts_own_gates_change_nothing():
    model = tiny(n_layer=2).eval()
    prompts = tokens(3, 5)
    gates = {}

    def keep(layer, x, *output):
        gates[layer] = output

    with torch.inference_mode(), analyze.router_hook(model, keep):
        logits = model(prompts)[0][:, -1]
    for position, source in itertools.product(range(5), range(3)):
        patched = analyze.patched_logits(model, prompts, gates, position, source)
        assert torch.equal(patched[source], logits[source])
    assert not torch.equal(patched[0], logits[0])       # but another's do


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_shares_of_tokens_add_up_to_the_logit(dtype, tolerance):
    """Also through norms."""
    model = tiny(n_layer=3).to(dtype).eval()
    prompt = tokens(1, 12)
    logits = model(prompt)[0][0, -1]
    found = analyze.explain(model, prompt[0].tolist())
    assert found.logit == (logits.max() - logits.mean()).item()
    assert found.token_shares.sum().item() == pytest.approx(found.logit, abs=tolerance)


def test_shares_are_what_a_linear_model_computes_from_each_part():
    """With one attention pattern, without norms, given its gates the model itself is linear."""
    torch.manual_seed(0)
    model = tiny(n_layer=2, norm=False).double()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:2 * model.cfg.d_model] = 0       # all of the past, equally
    prompt = tokens(1, 6)
    found = analyze.explain(model, prompt[0].tolist(), 3, 5)
    kept = {}

    def hold(layer, x, *output):
        return kept.setdefault(layer, output)

    @torch.no_grad()
    def logit():
        with analyze.router_hook(model, hold):
            logits = model(prompt)[0][0, -1]
        return (logits[3] - logits[5]).item()

    whole = logit()
    for t, share in enumerate(found.token_shares):
        alone = torch.zeros(6, 1, dtype=torch.float64)
        alone[t] = 1

        def keep_one(module, inputs, output, alone=alone):
            return output * alone

        with model.embedding.register_forward_hook(keep_one):
            assert logit() == pytest.approx(share.item(), abs=1e-12)
    for (layer, t, j), share in np.ndenumerate(found.neuron_shares.numpy()):
        gates, ids = kept[layer]
        without = gates.clone()
        without[t].view(-1)[j] = 0
        kept[layer] = (without, ids)
        assert whole - logit() == pytest.approx(share, abs=1e-12)
        kept[layer] = (gates, ids)


def test_planted_shares_and_cards(planted):
    """At an a the final stream is 1 at a, 20 at A and 13 at B; its rms is what scales logits."""
    run = analyze.Run(planted)
    rms = ((1 + 20**2 + 13**2) / 32)**0.5
    found = analyze.explain(run.model, list(b"ba"), ord("A"), ord("B"))
    assert found.logit == pytest.approx((20 - 13) / rms, rel=1e-3)
    assert found.token_shares.tolist() == pytest.approx([0, 7 / rms], rel=1e-3, abs=1e-6)
    assert found.recording.rows[0].tolist() == [[1, 2], [0, 1]]
    assert found.neuron_shares[0, 1].tolist() == pytest.approx([20 / rms, -13 / rms], rel=1e-3)
    card, unused = analyze.neuron_cards(run, 0, [0, 15])
    assert card["use"] == 2 / 8 and unused["use"] == 0 and unused["excerpts"] == []  # of a and d
    assert [product for product, _ in card["excerpts"]] == pytest.approx([20] * 8, rel=1e-3)
    assert all(run.trained.tokens.flat[place] == ord("a") for _, place in card["excerpts"])
    assert card["promotes"][0] == (ord("A"), pytest.approx(1 - 1 / 257, abs=1e-3))
    for token, value in card["reads"]:
        assert chr(token).lower() in "abcdefghijklmnop"
        assert value == pytest.approx(1, rel=1e-3)


def test_planted_controls(planted, capsys):
    """Without the neuron of 20 the logit of A is 0, the norm scales up the 13 of the other."""
    run = analyze.Run(planted)
    rms = ((1 + 20**2 + 13**2) / 32)**0.5
    rms_without = ((1 + 13**2) / 32)**0.5
    changes = analyze.controls(run, run.validation(), 1)
    before = (20 - 34 / 257) / rms
    after = -14 / 257 / rms_without
    named, control = changes.values()
    for pair in named:
        assert pair == pytest.approx((-20 / rms * 256 / 257, after - before), rel=1e-3)
    for predicted, _ in control:        # the other neuron of the letter
        assert predicted == pytest.approx(13 / rms / 257, rel=1e-3)
    analyze.main(["explain", "--prompt=ba", "--against=B", "--controls", f"--out_dir={planted}"])
    out = capsys.readouterr().out
    assert "The logit of A as the next token, less that of B, is 1.6585" in out
    assert re.search(r"0 +2 a +0:0 +4.739 +A", out)
    assert re.search(r"the 1 largest shares +8 +-4.720 ± ", out) and "prompts of 16 tokens" in out


# the page

@pytest.fixture
def page(planted):
    """What the page holds of the text ba, and its HTML."""
    run = analyze.Run(planted)
    data = analyze.page_data(run, run.prompt("ba"), with_map=False)
    return data, analyze.page("<title>", data, "")


def test_planted_page_holds_what_is_true(page):
    data, _ = page
    a = data["passage"][2]
    assert a["text"][1] == "a" and a["text"][3].startswith("A ")
    assert len(a["near"][0]) == 10
    for place, distance in a["near"][0]:
        before, text, after, expected = data["texts"][place]
        assert text == "a" and expected.startswith("A ")
        assert distance == pytest.approx(0, abs=1e-6)
    assert np.round(a["neurons"][0]).tolist() == [[0, 20], [1, 13]]
    assert a["why"]["target"] == ord("A")
    assert sum(a["why"]["shares"]) == pytest.approx(a["why"]["logit"], abs=2e-3)
    assert a["why"]["neurons"][0][:3] == (0, 2, 0)      # layer, place in the passage, row
    assert data["cards"]["0 0"]["promotes"][0][0] == ord("A")


def shown_by_browser(path):
    """The elements of a page after its scripts have run."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("no browser")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--timeout=20000",
               f"--user-data-dir={path.parent}/profile", "--dump-dom", f"file://{path}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def test_the_page_is_one_file_with_a_map_to_click(planted, tmp_path):
    plotly = pytest.importorskip("plotly.offline")
    pytest.importorskip("umap")
    analyze.main(["report", f"--out_dir={planted}", "--windows=8"])
    whole = (planted / "report.html").read_text()
    text = whole.replace(plotly.get_plotlyjs(), "")
    assert not re.search(r"""(src|href|url\()=?["']?(https?:)?//""", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert len(data["points"]) == 80        # ten of each letter
    assert len(data["maps"]) == 2
    for point in data["points"]:        # every neuron that is shown has its card
        assert all(f"0 {row}" in data["cards"] for row, _ in point["neurons"][0])
    click = 'map.emit("plotly_click", { points: [{ customdata: 0 }] });'
    (tmp_path / "map.html").write_text(f"{whole}<script>{click}</script>")
    text = shown_by_browser(tmp_path / "map.html")
    details = text[text.index('id="details"'):text.index('id="data"')]
    assert f"<mark>{data['points'][0]['text'][1]}</mark>" in details[:details.index("Nearest")]
    assert "scatterlayer" in text


def test_the_page_shows_what_it_holds(page, tmp_path):
    """In a browser: click the a, open its first neuron, and choose layer 1 by its select."""
    _, body = page
    clicks = """document.querySelectorAll("#passage span")[2].click();
        document.querySelector("#details details").open = true;"""
    analyze.write_page(tmp_path / "a.html", f"{body}<script>{clicks}</script>")
    text = shown_by_browser(tmp_path / "a.html")
    details = text[text.index('id="details"'):text.index('id="data"')]
    assert "&lt;title&gt;" in text and 'id="map"' not in text       # no umap, no map
    assert details.index("<mark>a</mark>") < details.index("Nearest circuits, layer 0")
    assert details.count("0.00</span>") >= 10 and "+20.00</span>" in details and "0:0" in details
    assert "25.0 % of tokens choose it" in details and "promotes" in details
    assert "What carries “A”" in details and "blue for it" in text
    chosen = 'view.value = 1; view.dispatchEvent(new Event("change"));'
    analyze.write_page(tmp_path / "b.html", f"{body}<script>{chosen}</script>")
    assert "Its neurons in layer 1" in shown_by_browser(tmp_path / "b.html")


def test_text_is_shown_as_it_is(planted):
    """Quotation marks, tags and control characters."""
    run = analyze.Run(planted)
    source = analyze.record(run.model, torch.tensor([run.prompt("«\x1b\x00»<i>")]))
    assert run.shown(source, 3)[:3] == ["<|endoftext|>«", "␛", "␀»<"]
    data = dict(x="</script><!-- »\u2028&", y=[1, 0.5])
    page = analyze.page("", data, "")
    held = page[page.index('id="data">') + 10:page.rindex("</script>\n<script>")]
    assert "<" not in held and json.loads(held) == data


# commands

def test_paths_are_those_of_a_shell_and_data_may_move(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text(STORY * 20)
    prepare_data.main(["~/a.txt", "--tokenizer=bytes", "--out_dir=~/data"])
    with one_thread():
        train.main([*SMALL, "--data_dir=~/data", "--out_dir=~/run", "--steps=2"])
    assert load(tmp_path / "run")["step"] == 2
    sample.main(["--out_dir=~/run", "--max_new_tokens=2", "--prompt=def"])
    (tmp_path / "data").rename(tmp_path / "moved")
    analyze.main(["neuron", "0", "0:0", "--out_dir=~/run", "--data_dir=~/moved"])
    out = capsys.readouterr().out
    assert "tok/s]" in out and "Neuron 0:0 of layer 0" in out


@pytest.mark.parametrize("argv, message", [
    (["usage", "--out_dir=nowhere"], "nowhere"),
    (["explain", "--prompt=a", "--token=AB"], "'AB' is 2 tokens"),
    (["patch", "--template=q{}"], "0 facts"), (["mimic"], "ffn=sgatlin, not mlp")])
def test_likely_mistakes_end_with_one_line(planted, argv, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        analyze.main([*argv[:1], f"--out_dir={planted}", *argv[1:]])


@pytest.mark.parametrize("part, change", [
    ("data", dict(fingerprint="other")), ("config", dict(softmax_gates=True)),
    ("config", dict(activation="gelu"))])
def test_what_would_be_wrong_in_silence_is_refused(planted, tmp_path, part, change):
    state = torch.load(planted / "ckpt.pt")
    state[part] |= change
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit, match="analyze.py: "):
        analyze.main(["explain", "--prompt=ba", f"--out_dir={tmp_path}"])


# small trainings

def test_gaussian_inputs_have_the_mean_and_the_covariance():
    torch.manual_seed(0)
    x = torch.randn(1000, 5).exp() @ torch.randn(5, 6) + torch.arange(6)      # skewed, of rank 5
    samples = analyze.gaussian_like(x, 200_000)
    scale = x.std(0)
    assert ((samples.mean(0) - x.mean(0)) / scale).abs().max() < 0.02
    assert ((samples.T.cov() - x.T.cov()) / scale / scale[:, None]).abs().max() < 0.02
    centred = (samples - samples.mean(0)) / scale
    assert (centred**3).mean(0).abs().max() < 0.05      # and no skewness


def test_a_sparse_teacher_is_mimicked_by_the_sparse_student():
    """The teacher has 64 linear neurons, and uses the one whose centre its input is near."""
    assert analyze.unexplained(torch.eye(3), torch.full((3, 3), 1 / 3)) == pytest.approx(1)
    torch.manual_seed(1)
    centres, w_in, w_out = torch.randn(3, 64, 16)
    chosen = torch.randint(64, (4096,))
    x = centres[chosen] + 0.02 * torch.randn(4096, 16)
    y = (x * w_in[chosen]).sum(1, keepdim=True) * w_out[chosen]
    y /= y.std()
    left = {}
    for name in ("dense", "sgatlin"):
        student = analyze.make_student(name, 8, 16)
        analyze.fit(student, x[:3072], y[:3072], 150)
        left[name] = analyze.unexplained(y[3072:], analyze.outputs(student, x[3072:]))
    assert left["sgatlin"] < 0.01
    assert left["dense"] > 0.1      # its 8 neurons write into 8 of the 16 dimensions


@one_thread()
def test_mimic(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    write_run(tmp_path, GPT(GPTConfig(**PLANTED, ffn="mlp")), "some text " * 8, "more text " * 8)
    run = analyze.Run(tmp_path, ffn="mlp")
    windows = run.validation()
    ffn = run.model.blocks[0].ffn
    seen = []
    with ffn.register_forward_hook(lambda _, x, y: seen.append(y)):
        run.model(windows)
    inputs = analyze.layer_inputs(run, 0, windows)
    torch.testing.assert_close(analyze.outputs(ffn, inputs), seen[0].flatten(0, 1))
    monkeypatch.setattr(analyze, "ACTIVE", (8,))
    analyze.main(["mimic", f"--out_dir={tmp_path}", "--steps=3", "--device=cpu"])
    out = capsys.readouterr().out
    assert "of layer 0" in out
    for kind in ("real", "Gaussian"):
        assert re.search(rf"{kind} +8 +\d\.\d+ +\d\.\d+ +\d\.\d+", out)


def test_addition_is_that_of_integers():
    """Every text decodes to x and x + 7, and the loss counts the outputs alone."""
    for x, (inputs, targets) in enumerate(zip(*(t.tolist() for t in analyze.addition()))):
        number = "".join(map(str, inputs[2::-1]))
        assert (int(number), inputs[3], inputs[4:]) == (x, analyze.EOS, targets[3:7])
        assert targets[:3] == [-100] * 3 and targets[7] == analyze.EOS
        assert int("".join(map(str, targets[6:2:-1]))) == x + 7
    assert x == 999


def test_without_its_ffn_a_model_is_one_whose_last_weights_are_zero():
    inputs, targets = analyze.addition()
    model = analyze.addition_model("sgatlin", True, 0)
    whole = analyze.right_digits(model, inputs, targets)
    zeroed = analyze.right_without_ffn(model, inputs, targets)
    with torch.no_grad():
        model.blocks[0].ffn.w_out.zero_()
    assert analyze.right_digits(model, inputs, targets) == zeroed != whole


@one_thread()
def test_redistribute(monkeypatch, capsys):
    """The numbers are those of the same trainings, done again."""
    monkeypatch.setattr(analyze, "VARIANTS", {"sgatlin": analyze.VARIANTS["sgatlin"]})
    monkeypatch.setattr(analyze, "SEEDS", (42, 137))
    analyze.main(["redistribute", "--steps=2", "--device=cpu"])
    out = capsys.readouterr().out
    cells = {}
    for norm in (False, True):
        values = [analyze.learn_addition("sgatlin", norm, seed, 2, "cpu").no_ffn
                  for seed in (42, 137)]
        cells[norm] = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    assert re.search(rf"sgatlin +{cells[False]} +0 +{cells[True]} +0", out)


# curves

def run_log(folder, ffn, losses, seconds=100, machine="cpu: 2 threads", fingerprint="x", until=20,
            **settings):
    """The log of a run of 20 steps, with three evaluations and these losses.

    It slept for a day after its tenth step, and without that took `seconds`.
    """
    config = vars(train.TrainConfig(**dict(ffn=ffn, flops=1e12, steps=20) | settings))
    entries = [dict(event="config", config=config, data=dict(fingerprint=fingerprint),
                    versions=dict(machine=machine), commit="f00")]
    for step, loss in zip((0, 10, until), losses):
        entries.append(dict(event="eval", step=step, tokens=10 * step, flops=100 * step,
                            seconds=seconds * step / 20, train_loss=9.0, val_loss=loss,
                            val_bits_per_byte=loss / 2, used=[0.25, 1.0], gini=[0.5, 0.6]))
    for step in (0, 5, 10, 15, 20):
        slept = 86_400 if step > 10 else 0
        entries.append(dict(event="step", step=step, seconds=seconds * step / 20 + slept))
    folder.mkdir(exist_ok=True)
    lines = "\n".join(map(json.dumps, entries))
    (folder / "log.jsonl").write_text(lines + '\n{"event": "ev')      # a kill
    return folder


def groups_of(runs):
    return analyze.group_runs(list(itertools.chain(*map(analyze.read_runs, runs))))


@pytest.fixture
def budget_runs(tmp_path):
    return [run_log(tmp_path / "a", "sgatlin", (8, 4.2, 3.1)),
            run_log(tmp_path / "b", "sgatlin", (8, 3.8, 2.9), seed=1),
            run_log(tmp_path / "d", "sgatlin", (8, 4, 2.5), activation="swish", norm=False),
            run_log(tmp_path / "e", "mlp", (8, 5, 3.5), seconds=80),
            run_log(tmp_path / "f", "mlp", (8, 5, 3.4), seconds=80, seed=1, d_key=32),
            run_log(tmp_path / "g", "mlp", (8, 5, 3.4), seconds=80, learning_rate=2e-3),
            run_log(tmp_path / "h", "mlp", (8, 5, 3.0), seconds=120, flops=2e12),
            run_log(tmp_path / "i", "sgatlin", (8, 5, 2.0), seconds=400, flops=2e12)]


def test_curves_compare_groups_of_seeds(budget_runs):
    rows = analyze.group_rows(groups_of(budget_runs), 1e12)
    wide = 12.706                                   # Student's t with one degree of freedom
    ours = wide * 0.02**0.5 / 2**0.5
    its = wide * 0.005**0.5 / 2**0.5
    assert [row[:2] + row[3:5] + [row[7]] for row in rows] == [
        ["*", "sgatlin activation=swish norm=False", 1, 20, "2.500 ± ?"],
        ["*", "sgatlin", 2, 20, f"3.000 ± {ours:.3f}"],
        ["", "mlp", 1, 20, "3.400 ± ?"],
        ["*", "mlp", 2, 20, f"3.450 ± {its:.3f}"]]
    # d_key does nothing in an mlp, and the learning rate is what tells the two mlps apart
    assert "learning_rate=0.002" in rows[2][2] and "d_key" not in rows[3][2]
    assert rows[3][6] == 80 and rows[3][8] == f"1.725 ± {its / 2:.3f}"
    half = wide * 0.005**0.5 / 2**0.5       # of 3.1 - 3.5 and 2.9 - 3.4
    assert rows[3][9] == f"-0.450 ± {half:.3f}" and rows[3][10] == pytest.approx(math.exp(-0.45))
    assert rows[0][9] == "0.500 ± ?" and rows[1][9] == "-" and rows[1][11] == "0.25 1.00"


def test_bits_after_the_same_seconds(budget_runs, tmp_path, capsys):
    """From 100 to 400 seconds sgatlin falls from 1.5 to 1 bit, from 80 to 120 the MLP from 1.725 to
    1.5, both in the logarithm of seconds; the variant without a second budget has no line."""
    analyze.show_same_seconds(groups_of(budget_runs))
    header, first, last = capsys.readouterr().out.split("\n")[2:5]
    assert header.split() == ["seconds", "mlp", "sgatlin"]
    mlp = 1.725 - 0.225 * math.log(100 / 80, 1.5)
    assert first.split() == ["100", f"{mlp:.3f}", "±", "?", "1.500", "±", "?"]
    sgatlin = 1.5 - 0.5 * math.log(12000**0.5 / 100, 4)     # the middle of 100 and 120
    assert last.split()[0::4] == ["110", f"{sgatlin:.3f}"]
    # with two seeds at both budgets there is an interval over two lines
    budget_runs.append(run_log(tmp_path / "j", "mlp", (8, 5, 3.2), seconds=120, flops=2e12, seed=1))
    best = analyze.best_groups(groups_of(budget_runs))
    half = 12.706 * np.std([1.5, 1.6], ddof=1) / 2**0.5
    mlp = [best["mlp", 1e12], best["mlp", 2e12]]
    assert analyze.bits_after(120, mlp) == f"1.550 ± {half:.3f}"
    # a run on another machine counts in its loss, not in seconds
    run_log(tmp_path / "e", "mlp", (8, 5, 3.5), seconds=9, machine="cuda: GPU", dtype="float32")
    assert analyze.best_groups(groups_of(budget_runs))["mlp", 1e12].seconds == 80


def test_curves_leave_out_what_is_not_to_be_compared(tmp_path, capsys):
    whole = run_log(tmp_path / "whole", "mlp", (8, 5, 3))
    young = run_log(tmp_path / "young", "mlp", (8, 5, 2), until=19, seed=1)
    again = run_log(tmp_path / "again", "mlp", (8, 5, 3))
    [group] = groups_of([whole, young, again])
    assert group.losses.tolist() == [3]
    assert "2 runs left out" in capsys.readouterr().err
    assert groups_of([young])[0].seconds == 95          # of 19 steps, and not of the 20 planned
    beyond = run_log(tmp_path / "beyond", "mlp", (8, 5, 3), flops=1500)     # it spent 2000
    assert groups_of([beyond])[0].budget == 0
    for other in (dict(fingerprint="y"), dict(eval_sequences=64)):
        other = run_log(tmp_path / "other", "mlp", (8, 5, 3), seed=1, **other)
        with pytest.raises(SystemExit, match="not comparable"):
            groups_of([whole, other])


def test_kept_runs_are_as_good_as_their_logs(budget_runs, tmp_path, capsys):
    young = run_log(tmp_path / "young", "mlp", (8, 5, 2), until=19, seed=1)
    analyze.main(["keep", *map(str, budget_runs), str(young)])
    lines = capsys.readouterr().out
    (tmp_path / "runs.jsonl").write_text(lines)
    assert "learning_rate" not in lines.splitlines()[0] and str(tmp_path) not in lines
    outputs = []
    for runs in (budget_runs, [tmp_path / "runs.jsonl"]):
        analyze.main(["curves", *map(str, runs), f"--out_dir={tmp_path}/out"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "1e+12 FLOPs" in outputs[0]


def test_a_closed_pipe_loses_nothing(tmp_path):
    pytest.importorskip("plotly")
    run = run_log(tmp_path / "a", "mlp", (8, 5, 3))
    command = [sys.executable, "analyze.py", "curves", str(run), f"--out_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()              # as `| head` does when it has its lines
    assert process.stderr.read() == b"" and process.wait() == 0
    assert (tmp_path / "curves.html").exists()


if __name__ == "__main__":
    compile_all()
