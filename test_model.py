"""python -m pytest -q test_model.py

What the tests compare with: numbers of the paper's own JAX code (golden), one-line references in float64,
finite differences, other libraries (tiktoken's own trainer), and the program run a second time in another way.
"""
import dataclasses
import math

import numpy as np
import pytest
import torch

import kernels
from model import FFN, GPT, ROUTERS, Attention, GPTConfig, KVCache, Router

# -----------------------------------------------------------------------------------------------------------
# golden numbers: outputs and gradients of the paper's JAX code on weights from a formula


def fill(shape, tag, scale, offset=0.0):
    """The weights behind the golden numbers: a hash of (tag, position), uniform in offset +- scale."""
    h = np.arange(math.prod(shape), dtype=np.uint64) * 2654435761 + (tag * 2246822519 + 374761393) % 2**32
    h &= 0xFFFFFFFF
    h ^= h >> 15
    h = h * 2246822519 & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 3266489917 & 0xFFFFFFFF
    h ^= h >> 16
    return (offset + scale * (2 * (h / 2**32) - 1)).astype(np.float32).reshape(shape)


def golden_shapes(kind, cfg):
    """Paths and shapes of a layer's parameters in the JAX code: kernels are (inputs..., outputs...)."""
    D, F_, E, C, K = cfg.d_model, cfg.d_ff, cfg.n_experts, cfg.n_channels, cfg.d_key
    n = math.isqrt(E)
    glu = {"Dense_0/kernel": (D, 2 * F_), "Dense_0/bias": (2 * F_,),
           "Dense_1/kernel": (F_, D), "Dense_1/bias": (D,)}
    heads = (D // cfg.d_head, cfg.d_head)
    router = {
        "product_dense": {"router/Dense_0/kernel": (D, K), "router/DenseGeneral_0/kernel": (K, 2, C, n)},
        "dense": {"router/Dense_0/kernel": (D, K), "router/DenseGeneral_0/kernel": (K, C, E)},
        "product_key": {"router/queries/kernel": (2, C, D, K), "router/keys": (2, C, n, K)},
        "key": {"router/queries/kernel": (C, D, K), "router/keys": (C, E, K)},
    }[cfg.router]
    return {
        "sgatlin": {"experts": (2, C, E, D), **router},
        "peer": {"experts": (2, E, D), "ProductKeyValueRouter_0/queries/kernel": (2, C, D, K),
                 "ProductKeyValueRouter_0/keys": (2, C, n, K)},
        "mlp": {"Dense_0/kernel": (D, F_), "Dense_1/kernel": (F_, D)},
        "swiglu": glu,
        "moe": {"gate/kernel": (D, E)}
        | {f"GatedLinearUnit_{e}/{path}": shape for e in range(E) for path, shape in glu.items()},
        "attention": {"query_norm/scale": heads[1:], "key_norm/scale": heads[1:],
                      "output_projection/kernel": (*heads, D)}
        | {f"{name}_projection/kernel": (D, *heads) for name in ("query", "key", "value")},
    }[kind]


def golden_values(shapes, tag):
    """{path: array}: the tags count up from `tag` in the order of the sorted paths."""
    values = {}
    for i, path in enumerate(sorted(shapes)):
        shape, scale, offset = shapes[path], 0.0, 0.0
        if path.endswith("scale"):
            scale, offset = 0.3, 1.0
        elif path.endswith("bias"):
            scale = 0.5
        elif path.endswith("keys"):
            scale = 3**0.5
        elif path.endswith(("experts", "embedding")):
            scale = (3 / shape[-1])**0.5
        elif path.endswith("queries/kernel"):
            scale = (3 / shape[-2])**0.5
        else:
            inputs = shape[:2] if path.endswith("output_projection/kernel") else shape[:1]
            scale = (3 / math.prod(inputs))**0.5
        values[path] = fill(shape, tag + i, scale, offset)
    return values


def to_ours(kind, p):
    """The parameters of a layer of the JAX code under the names and shapes of ours."""
    p = {path.replace("ProductKeyValueRouter_0", "router"): value for path, value in p.items()}
    if kind == "attention":
        D = p["output_projection/kernel"].shape[-1]
        qkv = [p[f"{name}_projection/kernel"].reshape(D, -1).T for name in ("query", "key", "value")]
        ours = {"qkv.weight": np.concatenate(qkv),
                "out.weight": p["output_projection/kernel"].reshape(-1, D).T, "q_norm.scale": p["query_norm/scale"], "k_norm.scale": p["key_norm/scale"]}
    elif kind == "mlp":
        ours = {"up.weight": p["Dense_0/kernel"].T, "down.weight": p["Dense_1/kernel"].T}
    elif kind == "swiglu":
        ours = {"w1": p["Dense_0/kernel"].T, "b1": p["Dense_0/bias"],
                "w2": p["Dense_1/kernel"].T, "b2": p["Dense_1/bias"]}
    elif kind == "moe":
        experts = range(p["gate/kernel"].shape[1])
        ours = {"gate.weight": p["gate/kernel"].T}
        for name, path in (("w1", "Dense_0/kernel"), ("b1", "Dense_0/bias"), ("w2", "Dense_1/kernel"),
                           ("b2", "Dense_1/bias")):
            ours[name] = np.stack([p[f"GatedLinearUnit_{e}/{path}"].T for e in experts])
    else:
        ours = {"w_in": p["experts"][0], "w_out": p["experts"][1]}
        if "router/keys" in p:      # (2, C, n, K) and (2, C, D, K), or without the 2
            keys, queries = p["router/keys"], p["router/queries/kernel"]
            keys, queries = (v if v.ndim == 4 else v[None] for v in (keys, queries))
            ours["router.keys"] = keys.swapaxes(0, 1)
            ours["router.query.weight"] = queries.transpose(1, 0, 3, 2).reshape(-1, queries.shape[2])
        else:                       # (K, 2, C, n), or without the 2
            keys = p["router/DenseGeneral_0/kernel"]
            keys = keys if keys.ndim == 4 else keys[:, None]
            ours["router.keys"] = keys.transpose(2, 1, 3, 0)
            ours["router.query.weight"] = p["router/Dense_0/kernel"].T
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in ours.items()}


# D 4, E 9, K 3, k 2, C 2, F 5, 3 experts of moe, d_head 2; x (1, 2, 4); the loss is <y, v>
GOLDEN_LAYERS = {
    "sgatlin_product_dense_identity": dict(tag=90000, x_scale=1.5, y=[-0.294311, 0.30198, -0.311896,
        -1.072253, -0.277016, -0.202955, 0.295437, -0.075653], dx=[-2.738605, -1.336467, 1.358569,
        -1.853941, 0.307275, -1.18371, -0.222052, -0.052052], indices=[3, 6, 2, 5, 1, 2, 6, 8],
        scores=[1.385332, 0.378034, 2.078154, 1.307344, 0.838128, 0.53015, 0.449867, 0.270794],
        grad_squares=[55.5657, 7.27125, 7.75653]),
    "sgatlin_product_key_value_identity": dict(tag=90100, x_scale=1.5, y=[-3.28751, -3.287164, -0.736103,
        1.757361, 2.820555, 1.293435, -0.958215, 0.678659], dx=[-1.264097, 0.518145, 1.170355, -0.303943,
        1.624513, -1.570318, 0.882962, 1.237403], indices=[5, 3, 7, 6, 7, 8, 6, 8], scores=[2.898931,
        2.636587, 2.335095, 2.214378, 0.795505, 0.521675, 1.467871, 1.447006], grad_squares=[33.5391,
        1.23088, 10.2929]),
    "sgatlin_dense_identity": dict(tag=90200, x_scale=1.5, y=[0.496283, 0.08361, 0.498689, 0.170996,
        0.976489, -1.413761, 1.340808, -1.15758], dx=[-0.530396, 0.345885, 0.456237, 0.466177, 1.107042,
        -0.492181, -0.844847, -0.459648], indices=[2, 6, 5, 7, 5, 8, 3, 4], scores=[1.639415, 0.980276,
        0.637839, 0.580936, 1.230893, 1.173353, 1.286798, 1.215971], grad_squares=[17.8899, 1.76149,
        1.40054]),
    "sgatlin_key_value_identity": dict(tag=90300, x_scale=1.5, y=[1.063564, -1.327406, -2.232626, 0.329793,
        -1.241663, 2.248841, 0.849364, -0.840998], dx=[1.163394, -2.661235, 2.140954, -0.252513, -0.240143,
        -0.27692, 0.567139, 0.608874], indices=[2, 5, 5, 1, 8, 1, 0, 6], scores=[1.935248, 1.722059,
        0.512769, 0.235425, 2.203209, 1.816931, 1.02742, 0.944748], grad_squares=[37.096, 3.56375,
        4.66427]),
    "sgatlin_product_dense_gelu": dict(tag=90400, x_scale=1.5, y=[-0.208831, -0.334475, -0.576881, 1.92923,
        -0.104317, -0.694331, 0.636616, -0.431913], dx=[-2.153166, 0.149069, -2.892196, -0.201818,
        -0.195727, 0.403882, 0.156362, 0.101055], indices=[4, 5, 1, 7, 6, 7, 6, 8], scores=[3.113792,
        2.958701, 2.253599, 1.528945, 2.148096, 1.787153, 2.350664, 1.424145], grad_squares=[47.1422,
        3.62995, 6.66064]),
    "sgatlin_product_dense_relu": dict(tag=90500, x_scale=1.5, y=[-1.003399, -0.044689, -0.725974, 0.831655,
        0.86533, 2.005757, 1.964373, 0.632376], dx=[2.749801, -0.966421, 0.167419, 1.102588, -0.203176,
        0.958063, 0.121254, 0.604234], indices=[0, 2, 1, 0, 7, 1, 5, 4], scores=[0.976818, 0.899545,
        0.166519, -0.064554, 1.496969, 1.291509, 2.289309, 1.910294], grad_squares=[14.1635, 7.75822,
        20.5815]),
    "sgatlin_product_dense_swish": dict(tag=90600, x_scale=1.5, y=[0.679664, -1.588424, 1.268511, -0.699926,
        0.05552, 0.088514, -0.106061, -0.037175], dx=[-0.140062, -0.361162, -1.015192, -0.884645, -0.13521,
        -0.043903, -0.076828, -0.05264], indices=[0, 6, 8, 6, 8, 5, 0, 3], scores=[1.12214, 1.030964,
        1.460376, 1.390019, 0.924878, 0.911147, 0.437936, 0.236357], grad_squares=[9.50837, 1.51693,
        2.58928]),
    "peer": dict(tag=90700, x_scale=1.5, y=[-0.09211, -0.232086, 0.17015, -0.061817, -0.725824, 0.655233,
        0.95034, 0.092449], dx=[-0.079443, 0.013129, -0.033522, -0.005281, 0.144864, 0.092422, -0.334939,
        0.25261], indices=[6, 8, 7, 4, 8, 7, 7, 8], scores=[1.050571, 0.716671, 1.310172, 0.932234,
        0.608037, 0.352841, 0.503589, 0.453784], grad_squares=[0.0516613, 0.15627, 5.7463]),
    "mlp_gelu": dict(tag=90800, x_scale=1.5, y=[-0.61989, 0.474027, -0.042425, -0.026182, -0.184779,
        0.048056, -0.427901, 0.07051], dx=[0.658339, 0.056881, 0.268361, 0.358516, 0.594058, -0.051725,
        0.253365, 0.274091], grad_squares=[7.74516, 6.3752]),
    "glu_sigmoid": dict(tag=90900, x_scale=1.5, y=[-0.92616, 0.512779, 0.026411, 0.140086, -0.605031,
        0.027591, -0.023025, -0.264029], dx=[0.416482, -0.705865, -0.444228, 0.274661, 0.01189, 0.121089,
        0.008112, -0.071348], grad_squares=[0.836266, 2.30371, 1.07601, 1.99568]),
    "glu_sigmoid_clamped": dict(tag=91000, x_scale=12.0, y=[16.323347, -19.821892, -50.955185, 16.007441,
        1.646773, -13.784221, -26.149363, 14.829702], dx=[-1.034835, 1.627049, 0.000794, 0.275663,
        -7.206256, -6.853174, 0.545523, 3.96128], grad_squares=[118.661, 13594.4, 2.58033, 6768.06]),
    "moe": dict(tag=91100, x_scale=1.5, y=[-0.315246, 0.206225, 0.308578, 0.436561, 0.166925, -0.054806,
        -0.116833, 0.061344], dx=[-0.475455, 0.642914, 0.162505, -0.129861, 0.981839, 0.153854, -0.000426,
        -0.687999], indices=[1, 2, 1, 0], grad_squares=[0.00336955, 0.0145417, 0.0129421, 0.0301519,
        1.52329, 7.47558, 3.06734, 1.28493, 0.0296786, 0.0657996, 0.218208, 0.0806947, 0.0502254]),
    "attention": dict(tag=91200, x_scale=1.5, y=[0.268394, -0.504779, 0.732942, 1.137209, 0.360657,
        -0.453334, 0.86936, 1.199806], dx=[0.15348, 0.052205, -0.011055, 0.605741, -0.403823, -0.107037,
        0.012774, 0.205162], grad_squares=[0.00675777, 0.0535891, 0.784071, 0.0277296, 0.863348, 1.17436]),
}


def golden_config(case):
    kind, _, rest = case.partition("_")
    kind = {"glu": "swiglu"}.get(kind, kind)
    router, _, activation = rest.rpartition("_")
    cfg = dict(d_model=4, d_head=2, n_experts=9, d_key=3, top_k=2, n_channels=2, d_ff=5, block_size=2)
    if kind == "sgatlin":
        cfg |= dict(router=router.replace("_value", ""), activation=activation)
    elif kind == "moe":
        cfg |= dict(n_experts=3)
    return kind, GPTConfig(**cfg, ffn="mlp" if kind == "attention" else kind)


@pytest.mark.parametrize("case", GOLDEN_LAYERS)
def test_layer_is_that_of_the_paper(case):
    golden = GOLDEN_LAYERS[case]
    kind, cfg = golden_config(case)
    values = golden_values(golden_shapes(kind, cfg), golden["tag"] + 2)
    layer = Attention(cfg) if kind == "attention" else FFN[kind](cfg)
    layer.load_state_dict(to_ours(kind, values))
    routed = []
    if hasattr(layer, "router"):
        layer.router.register_forward_hook(lambda *args: routed.append(args[-1]))
    x = torch.from_numpy(fill((1, 2, 4), golden["tag"], golden["x_scale"])).requires_grad_()
    y = layer(x, GPT(cfg).rope) if kind == "attention" else layer(x)
    (y * torch.from_numpy(fill((1, 2, 4), golden["tag"] + 1, 1.0))).sum().backward()

    def close(ours, theirs, **tolerance):
        torch.testing.assert_close(ours.detach().flatten(), torch.tensor(theirs), **tolerance)

    atol = 1e-4 if "clamped" in case else 1e-5
    close(y, golden["y"], atol=atol, rtol=0)
    close(x.grad, golden["dx"], atol=atol, rtol=1e-5)
    for gates, ids in routed:
        close(gates, golden["scores"], atol=1e-5, rtol=0)
        assert ids.flatten().tolist() == golden["indices"]
    shapes = golden_shapes(kind, cfg)
    for path, square in zip(sorted(shapes), golden["grad_squares"], strict=True):
        mask = to_ours(kind, {other: np.full(shape, other == path) for other, shape in shapes.items()})
        ours = sum((p.grad.double().square() * mask[name]).sum() for name, p in layer.named_parameters())
        assert ours.item() == pytest.approx(square, rel=2e-5), path


# tag of the first parameter; loss; sum of squares of the logits and of all gradients
GOLDEN_MODELS = {
    "sgatlin": (4201002, 4.0249467, 557.26825, 24.577230),
    "peer": (24202002, 4.0927649, 526.74256, 23.199296),
    "mlp": (203002, 3.5270715, 515.54066, 14.972819),
    "swiglu": (204002, 3.7853584, 511.34184, 40.166757),
    "moe": (1205002, 4.3607874, 498.09925, 25.519319),
}


def golden_model(ffn):
    moe = dict(n_experts=4, top_k=2, d_ff=24) if ffn == "moe" else dict(n_experts=25, top_k=3, d_ff=48)
    cfg = GPTConfig(vocab_size=32, block_size=8, n_layer=2, d_model=32, d_head=8, n_channels=2, d_key=6,
                    ffn=ffn, **moe)
    layers = {"attention/": ("attention", "attn."), "ffw/": (ffn, "ffn.")}
    shapes = {"embedder/embedding": (32, 32), "output_norm/scale": (32,)}
    for i in range(2):
        shapes |= {f"blocks_{i}/attention_norm/scale": (32,), f"blocks_{i}/feedforward_norm/scale": (32,)}
        for prefix, (kind, _) in layers.items():
            part = golden_shapes(kind, dataclasses.replace(cfg, router="product_dense"))
            shapes |= {f"blocks_{i}/{prefix}{path}": shape for path, shape in part.items()}
    values = golden_values(shapes, GOLDEN_MODELS[ffn][0])
    ours = {"embedding.weight": values["embedder/embedding"], "norm.scale": values["output_norm/scale"]}
    for i in range(2):
        ours |= {f"blocks.{i}.attn_norm.scale": values[f"blocks_{i}/attention_norm/scale"],
                 f"blocks.{i}.ffn_norm.scale": values[f"blocks_{i}/feedforward_norm/scale"]}
        for prefix, (kind, name) in layers.items():
            start = f"blocks_{i}/{prefix}"
            part = {path.removeprefix(start): v for path, v in values.items() if path.startswith(start)}
            ours |= {f"blocks.{i}.{name}{key}": value for key, value in to_ours(kind, part).items()}
    model = GPT(cfg)
    model.load_state_dict({name: torch.as_tensor(value) for name, value in ours.items()})
    return model


@pytest.mark.parametrize("ffn", GOLDEN_MODELS)
def test_model_is_that_of_the_paper(ffn):
    model = golden_model(ffn)
    tokens = torch.tensor([[28, 2, 3, 12, 10, 27, 0, 0], [18, 30, 21, 1, 18, 2, 20, 19]])
    inputs = torch.cat((torch.ones(2, 1, dtype=torch.long), tokens[:, :-1]), dim=1)
    logits, loss = model(inputs, tokens.masked_fill(tokens == 0, -100))
    loss.backward()
    _, golden_loss, logit_squares, grad_squares = GOLDEN_MODELS[ffn]
    assert loss.item() == pytest.approx(golden_loss, abs=2e-6)
    assert logits.double().square().sum().item() == pytest.approx(logit_squares, rel=1e-6)
    squares = sum(p.grad.double().square().sum().item() for p in model.parameters())
    assert squares == pytest.approx(grad_squares, rel=1e-5)


# parameters at the paper's vocabulary of 50258; forward FLOPs of a sequence of 1024 and of 2048 tokens
GOLDEN_LADDER = [
    ("mlp", 1, 6696064, 1610612736, 5368709120),
    ("mlp", 6, 104679168, 173946175488, 425201762304),
    ("mlp", 9, 280895616, 543581798400, 1261109772288),
    ("swiglu", 1, 6762880, 1744830464, 5637144576),
    ("swiglu", 6, 123611904, 212600881152, 502511173632),
    ("swiglu", 9, 344727936, 674041430016, 1522029035520),
    ("moe", 1, 8154240, 1753219072, 5653921792),
    ("moe", 6, 407258880, 183911841792, 445133094912),
    ("moe", 9, 1301438592, 576876183552, 1327698542592),
    ("peer", 1, 9677952, 4563402752, 11274289152),
    ("peer", 6, 684279552, 196494753792, 470298918912),
    ("peer", 9, 2807406720, 504927092736, 1183800360960),
    ("sgatlin", 1, 13249664, 2013265920, 6174015488),
    ("sgatlin", 6, 2356233984, 112742891520, 302795194368),
    ("sgatlin", 9, 10368065664, 317693362176, 809332899840),
]


def on_meta(cfg):
    with torch.device("meta"):
        return GPT(cfg)


@pytest.mark.parametrize("ffn, scale, params, flops_1024, flops_2048", GOLDEN_LADDER)
def test_ladder_has_the_sizes_of_the_paper(ffn, scale, params, flops_1024, flops_2048):
    model = on_meta(GPTConfig.ladder(ffn, scale))
    assert model.num_params()[0] == params
    assert (model.flops_per_sequence(1024), model.flops_per_sequence(2048)) == (flops_1024, flops_2048)


@pytest.mark.parametrize("router, params, flops", [
    ("product_dense", 2356233984, 112742891520), ("product_key", 2392803072, 187636383744),
    ("dense", 2542225152, 493652803584), ("key", 2559919872, None)])
def test_routers_have_the_sizes_of_the_paper(router, params, flops):
    model = on_meta(GPTConfig.ladder("sgatlin", 6, router=router))
    assert model.num_params()[0] == params
    assert flops is None or model.flops_per_sequence(1024) == flops   # the paper's code does not count key


def test_active_parameters():
    cfg = GPTConfig(n_layer=1, d_model=64, n_experts=256, n_channels=3, top_k=5)
    total, active = on_meta(cfg).num_params()
    assert total - active == 2 * 3 * (256 - 5) * 64
    moe = on_meta(GPTConfig(n_layer=1, d_model=64, ffn="moe", n_experts=4, top_k=1))
    one = sum(w[0].numel() for w in (moe.blocks[0].ffn.w1, moe.blocks[0].ffn.b1, moe.blocks[0].ffn.w2,
                                     moe.blocks[0].ffn.b2))
    assert moe.num_params()[0] - moe.num_params()[1] == 3 * one


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


# -----------------------------------------------------------------------------------------------------------
# kernels

def layer_tensors(N=7, D=48, C=2, n=5, k=3, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return kernels.random_layer(N, D, C, n, k, device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("index", ["routed", "one row", "repeated"])
def test_kernels_equal_the_reference(index, dtype, tolerance):
    t = layer_tensors(dtype=dtype)
    if index == "one row":
        t["index"] = torch.full_like(t["index"], 11)
    elif index == "repeated":
        t["index"][:, 1::2] = t["index"][:, ::2]
    operands = [t[name] for name in ("x", "gates", "w_in", "w_out")]
    ours = kernels.gradients(lambda *a: kernels.layer(*a, t["index"]), t["dy"], *operands)
    truth = kernels.gradients(lambda *a: kernels.layer_reference(*a, t["index"]), t["dy"].double(),
                              *(o.double() for o in operands))
    for a, b in zip(ours, truth):
        assert a.dtype == dtype and (a.double() - b).norm() <= tolerance * b.norm()
    unused = torch.ones(len(t["w_in"]), dtype=torch.bool)
    unused[t["index"].flatten().long()] = False
    assert unused.any() and not ours[3][unused].any() and not ours[4][unused].any()


@pytest.mark.parametrize("by_row", [False, True])
def test_primitives_gradcheck(by_row):
    torch.manual_seed(0)
    index = torch.randint(0, 6, (4, 5), dtype=torch.int32)      # rows repeat in and between tokens
    rows = kernels.transpose_index(index, 6) if by_row else None
    x, weight, coef = (torch.randn(shape, dtype=torch.float64, requires_grad=True)
                       for shape in ((4, 3), (6, 3), (4, 5)))
    assert torch.autograd.gradcheck(lambda x, w: kernels.gather_dot(x, w, index, rows), (x, weight))
    assert torch.autograd.gradcheck(lambda c, w: kernels.gather_sum(c, w, index, rows), (coef, weight))
    scores = torch.randn(3, 2, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: kernels.product_topk(s, 4)[0], (scores,))


def test_transposed_index_sorts_the_pairs_by_row():
    for n_rows in (9, 40_000):      # int16 and int32 keys
        torch.manual_seed(0)
        index = torch.randint(0, n_rows, (50, 6), dtype=torch.int32)
        order, offsets = kernels.transpose_index(index, n_rows)
        assert order.tolist() == sorted(range(300), key=lambda p: (index.flatten()[p].item(), p))
        assert torch.equal(offsets.diff(), index.flatten().bincount(minlength=n_rows).int())


@pytest.mark.parametrize("n, k", [(3, 1), (3, 2), (11, 8), (32, 8), (40, 39)])
def test_product_keys_are_full_keys(n, k):
    scores = torch.randn(20, 2, 2, n, generator=torch.Generator().manual_seed(n))
    for s in (scores, scores.double(), scores.bfloat16().float()):
        gates, ids = kernels.product_topk(s, k)
        expected, _ = kernels.product_topk_reference(s, k)
        ids = ids.long()
        assert torch.equal(gates, expected)
        assert torch.equal(gates, s[..., 0, :].gather(-1, ids // n) + s[..., 1, :].gather(-1, ids % n))
        assert ids.sort(-1).values.diff(dim=-1).min() > 0 if k > 1 else True


def test_ties_go_to_the_lower_position_and_nan_stays_in_range():
    gates, ids = kernels.product_topk(torch.zeros(1, 1, 2, 6), 5)
    assert ids.flatten().tolist() == [0, 1, 2, 3, 4]
    scores = torch.tensor([[[[2.0, 1.0, 2.0, 0.0], [0.0, 1.0, 1.0, -1.0]]]])
    assert kernels.product_topk(scores, 3)[1].flatten().tolist() == [1, 2, 9]
    for bad in (float("nan"), float("inf"), -float("inf")):
        scores = torch.randn(5, 2, 2, 6)
        scores[2:] = bad
        ids = kernels.product_topk(scores, 5)[1]
        assert ids.min() >= 0 and ids.max() < 36


def test_no_gathered_copy_is_made():
    t = layer_tensors(N=512, D=64, C=4, n=8, k=6)
    operands = [t[name] for name in ("x", "gates", "w_in", "w_out")]
    peak, reference = (kernels.peak_bytes(lambda: kernels.gradients(lambda *a: layer(*a, t["index"]), t["dy"],
                                                                    *operands), "cpu")
                       for layer in (kernels.layer, kernels.layer_reference))
    N, J, D, R = 512, 24, 64, 256
    assert peak < 4 * (4 * N * D + 4 * R * D + 12 * N * J) < 4 * N * J * D < reference


def test_kernels_compile_without_graph_breaks():
    t = layer_tensors()

    def loss(scores, x, w_in, w_out):
        gates, ids = kernels.product_topk(scores, 3)
        index = (ids + torch.arange(0, 50, 25, dtype=torch.int32)[:, None]).flatten(1)
        return kernels.layer(x, gates.flatten(1), w_in, w_out, index).square().sum()

    operands = [t[name].requires_grad_() for name in ("scores", "x", "w_in", "w_out")]
    expected = torch.autograd.grad(loss(*operands), operands)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*operands), operands)
    for a, b in zip(compiled, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# -----------------------------------------------------------------------------------------------------------
# model

TINY = dict(vocab_size=50, block_size=12, n_layer=2, d_model=32, d_head=8, d_key=8, n_channels=2)


def tiny(ffn="sgatlin", **sizes):
    torch.manual_seed(0)
    own = dict(n_experts=4, top_k=2, d_ff=16) if ffn == "moe" else dict(n_experts=25, top_k=3, d_ff=48)
    return GPT(GPTConfig(**(TINY | own | sizes), ffn=ffn))


def tokens(B=2, T=12, seed=0):
    return torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ffn", FFN)
def test_every_parameter_learns(ffn):
    model = tiny(ffn)
    logits, loss = model(tokens(B=8), tokens(B=8, seed=1))
    assert loss.item() == pytest.approx(math.log(50) + 0.5, abs=0.35)   # unit-variance logits cost half a nat
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("ffn", FFN)
def test_the_future_cannot_be_seen(ffn):
    model, idx = tiny(ffn), tokens()
    changed = idx.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.equal(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("kind", ROUTERS)
def test_router_takes_the_largest_scores(kind):
    torch.manual_seed(0)
    router = Router(GPTConfig(**TINY, n_experts=25, top_k=4), kind)
    x = torch.randn(6, 32)
    scores = router.scores(x)
    full = scores[:, :, 0]
    if kind.startswith("product"):
        full = (full[..., None] + scores[:, :, 1, None]).flatten(-2)
    gates, ids = router(x)
    assert torch.equal(gates, full.topk(4).values) and torch.equal(gates, full.gather(-1, ids.long()))


def test_layer_is_linear_given_its_gates():
    """And a forward hook on the router records or replaces them."""
    layer = tiny().blocks[0].ffn
    x, z = torch.randn(2, 1, 5, 32)
    recorded = []
    handle = layer.router.register_forward_hook(lambda module, args, out: recorded.append(out))
    y = layer(x)
    handle.remove()
    gates, ids = recorded[0]
    truth = torch.einsum("nck,nckd,nckD,nd->nD", gates, *(
        w[torch.arange(2)[:, None], ids.long()] for w in (layer.w_in, layer.w_out)), x[0])
    torch.testing.assert_close(y[0], truth, atol=1e-5, rtol=1e-4)
    layer.router.register_forward_hook(lambda *args: recorded[0])
    torch.testing.assert_close(layer(2 * x + z), 2 * y + layer(z), atol=1e-4, rtol=1e-4)


def test_moe_groups_tokens_and_computes_the_same():
    torch.manual_seed(0)
    moe = FFN["moe"](GPTConfig(d_model=16, d_head=8, d_ff=24, ffn="moe", n_experts=5, top_k=2))
    x = torch.randn(2, 9, 16)
    p = moe.gate(x).softmax(-1)
    p = p * (p >= p.topk(2).values[..., -1:])
    gate, linear = (torch.einsum("btd,efd->btef", x, moe.w1) + moe.b1).chunk(2, dim=-1)
    hidden = gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7)) * (linear.clamp(-7, 7) + 1)
    dense = torch.einsum("bte,bted->btd", p, torch.einsum("btef,edf->bted", hidden, moe.w2) + moe.b2)
    torch.testing.assert_close(moe(x), dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes, message", [
    (dict(n_experts=1000), "n_experts=1000 must be a square for product keys: take 961 or 1024"),
    (dict(n_experts=64), "top_k=8 must be less than the 8 sub-keys of n_experts=64"),
    (dict(d_model=100), "d_head=64 must be even and divide d_model=100"),
    (dict(n_layer=0), "n_layer=0 must be positive"), (dict(ffn="glu"), "ffn='glu' is none of sgatlin, peer"),
    (dict(ffn="moe", top_k=9), "top_k=9 must not exceed n_experts=8")])
def test_bad_sizes_are_explained(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**sizes)


def test_cache_equals_the_full_forward():
    model, idx = tiny().eval(), tokens(B=1)
    full, cache = model(idx)[0], KVCache()
    for piece in (idx[:, :5], idx[:, 5:6], idx[:, 6:9], idx[:, 9:]):
        start = len(cache)
        logits, _ = model(piece, cache=cache)
        torch.testing.assert_close(logits, full[:, start:len(cache)], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="13 tokens exceed block_size=12"):
        model(idx[:, :1], cache=cache)
