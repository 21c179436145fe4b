# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy", "tiktoken", "triton; sys_platform == 'linux'", "plotly",
#                 "umap-learn"]
# ///
"""Read the circuits of a trained sgatlin (arXiv 2606.07414, section 4), and compare runs.

    python analyze.py                                        # out/report.html: a page to click
    python analyze.py neighbors --prompt "Once upon a time"  # the circuits most like a text's
    python analyze.py classes                                # do near circuits mean alike?
    python analyze.py usage                                  # which neurons are used, and together
    python analyze.py patch --template "The {} was"          # the gates of one prompt in another
    python analyze.py explain --prompt "Once upon a time"    # what adds up to the next token
    python analyze.py neuron 0 3:141                         # what one neuron reads and writes
    python analyze.py mimic --out_dir=out-mlp                # is a dense layer secretly sparse?
    python analyze.py redistribute                           # what does attention take over?
    python analyze.py curves out runs/*                      # the losses of runs, side by side
    python analyze.py keep runs/* >> runs.jsonl              # a line for each finished run

A circuit is the sparse vector of a token's gates in one layer: C*k scores among C*E neurons. Layers
and channels count from 0, as in model.blocks. Every study can be read alone: what it asks, what
computes, what prints. To drop one, delete it and its line in COMMANDS; explain builds on neuron,
and report on neighbors, classes, neuron and explain. Pictures need plotly, the map and the classes
umap-learn, and intervals over seeds scipy, which it brings.

Letters: W windows, T time, N = W*T tokens, L layers, D d_model, C channels, E neurons per channel,
n = sqrt(E) sub-keys, k top-k, J = C*k, R = C*E rows, V vocab, Q queries, M points, F facts.
"""
import argparse
import contextlib
import functools
import html
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from model import FFN, GPT, GPTConfig, RMSNorm, Router, load_model
from sample import encode_prompt, plain_output, printable
from train import CHOICES, Data, TrainConfig, idle_settings, keep_memory, usage

# --------------------------------------------------------------------------------------------------
# tables, intervals and pages

def cell(value: str | float | None) -> str:
    """A value of a table as text; None and NaN are not known."""
    if value is None or value != value:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def show(title: str, header: list[str], rows: list[list]) -> None:
    """Prints a table."""
    lines = [header]
    for row in rows:
        lines.append([cell(value) for value in row])
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for line in lines:
        padded = [text.ljust(width) for text, width in zip(line, widths)]
        print("  " + "  ".join(padded).rstrip())


def interval(mean: float, half: float) -> str:
    """A mean and half the width of its interval, or its standard deviation; NaN is not known."""
    if math.isnan(mean):
        return "-"
    return f"{mean:.3f} ± " + ("?" if math.isnan(half) else f"{half:.3f}")


def jackknife(values: np.ndarray, belongs: np.ndarray) -> str:
    """The mean of values (n,) with its 95 % interval, found by leaving out each unit in turn.

    belongs (units, n) says which values are of a unit: a window, a fact, a prompt. Tokens of one
    window, and pairs with a fact in common, are not independent; units are.
    """
    units = len(belongs)
    if belongs.all(axis=1).any():           # without that unit nothing is left
        return "-"
    means = np.array([values[~part].mean() for part in belongs])
    variance = (units - 1) * means.var()
    return interval(values.mean(), 1.96 * math.sqrt(variance))


def progress(text: str) -> None:
    """On stderr: `analyze.py ... > file` holds the results alone."""
    print(text, file=sys.stderr, flush=True)


def place_for(out_dir: Path, name: str) -> Path:
    """The file of a page. Fails now, and not after the computing, if it cannot be written."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out_dir).close()
    return out_dir / name


def write_page(path: Path, text: str) -> None:
    """path holds the old page or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    print(f"wrote {path}")


def has_plotly() -> bool:
    try:
        import plotly  # noqa: F401
    except ImportError as error:
        progress(f"no picture: pip install plotly ({error})")
        return False
    return True


# --------------------------------------------------------------------------------------------------
# what the studies of circuits share: a run, its recordings, and similar circuits

class Circuits(NamedTuple):
    """N sparse vectors with J values each, at these rows of R."""
    values: Tensor      # (N, J)
    rows: Tensor        # (N, J) int32
    size: int           # R

    def at(self, places) -> "Circuits":
        return Circuits(self.values[places], self.rows[places], self.size)

    def dense(self) -> Tensor:
        """(N, R)"""
        zeros = torch.zeros(len(self.values), self.size)
        return zeros.scatter_(1, self.rows.long(), self.values)


@dataclass
class Recording:
    """What a model did on windows of text; its N tokens in the order of the windows."""
    tokens: np.ndarray      # (W, T)
    contexts: Tensor        # (N,) int64, see contexts_of
    gates: Tensor           # (L, N, J) in the model's dtype
    rows: Tensor            # (L, N, J) int32: the neurons, c * E + id
    products: Tensor        # (L, N, J): gate * <w_in, x>, by which w_out is multiplied
    top: Tensor             # (N, 3) the likeliest next tokens
    p: Tensor               # (N, 3) their probabilities
    embedding: Tensor       # (V, D) of the model
    size: int               # R

    def circuits(self, layer: int) -> Circuits:
        """Those of all tokens, scaled to unit length."""
        return Circuits(F.normalize(self.gates[layer]), self.rows[layer], self.size)


@contextlib.contextmanager
def router_hook(model: GPT, hook: Callable) -> Iterator[None]:
    """hook(layer, x (N, D), gates (N, C, k), ids (N, C, k)) sees every routing; x is what the layer
    reads. It may return other gates and ids."""
    with contextlib.ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            def listen(module, inputs, output, layer=layer):
                return hook(layer, *inputs, *output)
            stack.enter_context(block.ffn.router.register_forward_hook(listen))
        yield


# How many tokens, with the one in question last, make its context. Circuits in equal contexts are
# nearly equal, which says nothing of the model: such repeats are left out.
CONTEXT = 8


def contexts_of(tokens: Tensor) -> Tensor:
    """(W, T) int64 -> (N,), a hash of the last CONTEXT tokens, or of those that the window has."""
    padded = F.pad(tokens, (CONTEXT - 1, 0), value=-1)      # -1: before the window
    contexts = padded.unfold(1, CONTEXT, 1).flatten(0, 1)                       # (N, CONTEXT)
    return torch.tensor([hash(tuple(context)) for context in contexts.tolist()])


@torch.inference_mode()
def record(model: GPT, windows: Tensor) -> Recording:
    """Runs windows (W, T) int64; keeps 12 bytes per gate, L * N * J of them, on the CPU."""
    cfg = model.cfg
    weight = model.embedding.weight
    W, T = windows.shape
    gates = torch.empty(cfg.n_layer, W * T, cfg.n_channels * cfg.top_k, dtype=weight.dtype)
    rows = torch.empty(gates.shape, dtype=torch.int32)
    products = torch.empty_like(gates)
    top = torch.empty(W * T, 3, dtype=torch.int64)
    p = torch.empty(W * T, 3)

    def keep(layer: int, x: Tensor, of_layer: Tensor, ids: Tensor) -> None:
        ffn = model.blocks[layer].ffn
        chosen = ffn.rows(ids)                                                  # (T, J)
        of_layer = of_layer.flatten(1)                                          # (T, J)
        rows[layer, here] = chosen
        gates[layer, here] = of_layer
        products[layer, here] = of_layer * kernels.gather_dot(x, ffn.w_in.flatten(0, 1), chosen)

    with router_hook(model, keep):
        for w, window in enumerate(windows):
            here = slice(w * T, w * T + T)
            logits = model(window[None].to(weight.device))[0][0]                # (T, V)
            p[here], top[here] = logits.softmax(dim=1).topk(3)
    return Recording(windows.numpy(), contexts_of(windows), gates, rows, products, top, p,
                     weight.detach().cpu(), cfg.n_channels * cfg.n_experts)


PASSAGE = 64        # tokens


class Run:
    """A checkpoint of train.py, its text, and what is recorded of it once."""

    def __init__(self, out_dir: Path, device: str = "cpu", windows: int = 128,
                 data_dir: Path | None = None, ffn: str = "sgatlin"):
        path = out_dir / "ckpt.pt"
        self.device = device
        self.n_windows = windows
        self.model, state = load_model(path, device)
        self.cfg = cfg = self.model.cfg
        self.seed = state["config"]["seed"]
        folder = data_dir or Path(state["config"]["data_dir"])
        self.data = Data(folder, cfg.block_size)
        self.encoding = self.data.encoding
        if self.data.meta["fingerprint"] != state["data"]["fingerprint"]:
            raise SystemExit(f"analyze.py: {folder} is not what {path} was trained on: give "
                             "that with --data_dir")
        if cfg.ffn != ffn:
            raise SystemExit(f"analyze.py: {path} has ffn={cfg.ffn}, not {ffn}")
        ablation = cfg.softmax_gates or cfg.shared_pool or cfg.activation != "identity"
        if ffn == "sgatlin" and ablation:
            raise SystemExit(f"analyze.py: {path} is an ablation, and what is said of gates "
                             "and neurons would not hold")

    def validation(self) -> Tensor:
        """The windows to look at (W, T), evenly spaced."""
        return self.data.windows("val", self.data.val_starts(self.n_windows))[:, :-1]

    @functools.cached_property
    def trained(self) -> Recording:
        windows = self.validation()
        progress(f"record the trained model on {len(windows)} windows")
        return record(self.model, windows)

    @functools.cached_property
    def untrained(self) -> Recording:
        """The control: the same windows through the model as it was before its first step."""
        windows = self.validation()
        progress(f"record an untrained model on {len(windows)} windows")
        torch.manual_seed(self.seed)
        model = GPT(self.cfg).to(self.device).eval()
        return record(model, windows)

    def layer(self, given: int | None) -> int:
        """--layer, or the last but one."""
        if given is None:
            return max(self.cfg.n_layer - 2, 0)
        if not 0 <= given < self.cfg.n_layer:
            raise SystemExit(f"analyze.py: layer {given}, of {self.cfg.n_layer} from 0")
        return given

    def text(self, tokens) -> str:
        """Token ids on one line: ⏎ is a newline and ⇥ a tab."""
        known = [int(token) for token in tokens if token < self.encoding.n_vocab]
        text = printable(self.encoding.decode(known))
        return text.replace("\n", "⏎").replace("\t", "⇥")

    def name(self, token: int) -> str:
        """A token by itself: its blanks are seen."""
        return self.text([token]).replace(" ", "·")

    def shown(self, recording: Recording, place: int) -> list[str]:
        """A token: the text before it, its own, that after, and the likeliest next tokens."""
        w, t = divmod(place, recording.tokens.shape[1])
        window = recording.tokens[w]
        before = window[max(t - CONTEXT + 1, 0):t]
        after = window[t + 1:t + 5]
        words = []
        for token, p in zip(recording.top[place].tolist(), recording.p[place].tolist()):
            words.append(f"{self.name(token)} {p:.2f}")
        return [self.text(before), self.text([window[t]]), self.text(after), "  ".join(words)]

    def prompt(self, text: str | None) -> list[int]:
        """<|endoftext|> and the tokens of a text; without one, the validation text's beginning."""
        if text is None:
            # The first recorded window begins so, too. A token has the same context in both, and
            # is not found as its own neighbour.
            return self.data.tokens("val")[:min(PASSAGE, self.cfg.block_size)].tolist()
        return encode_prompt(self.encoding, text)


def run_of(args: argparse.Namespace, ffn: str = "sgatlin") -> Run:
    return Run(args.out_dir, args.device, getattr(args, "windows", 128), args.data_dir, ffn)


def one_token(run: Run, text: str | None) -> int | None:
    """The token that an option names, if it is given."""
    if text is None:
        return None
    ids = run.encoding.encode_ordinary(text)
    if len(ids) != 1:
        raise SystemExit(f"analyze.py: {text!r} is {len(ids)} tokens, and not one")
    return ids[0]


NEIGHBORS = 10      # shown and scored per circuit, as in the paper
Near = list[tuple[int, float]]      # the places of circuits, and their cosine distances


def find_neighbors(queries: Circuits, own: Tensor, circuits: Circuits, keys: Tensor,
                   contexts: Tensor) -> list[Near]:
    """The NEIGHBORS circuits, of unit length, nearest to each query by cosine distance.

    Left out are circuits whose key (N,) is the query's own (Q,), and repeats of a context (N,).
    Fewer are found where four times as many candidates repeat their contexts.
    """
    found = []
    for start in range(0, len(own), 128):
        part = slice(start, start + 128)                                        # Q' queries
        # Inner products: of the dense queries a table, whose rows are added up for every circuit.
        table = queries.at(part).dense().T.contiguous()                         # (R, Q')
        sim = kernels.gather_sum(circuits.values, table, circuits.rows)         # (N, Q')
        allowed = sim.masked_fill(keys[:, None] == own[part], -math.inf)
        best = allowed.T.topk(min(4 * NEIGHBORS, len(sim)))
        for values, places in zip(best.values.tolist(), best.indices.tolist()):
            different = {}      # by context
            for place, context, value in zip(places, contexts[places].tolist(), values):
                if value > -math.inf:
                    different.setdefault(context, (place, 1 - value))
            found.append(list(different.values())[:NEIGHBORS])
    return found


# --------------------------------------------------------------------------------------------------
# neighbors: which circuits are most like those of a text? (arXiv 2606.07414, Table 3)

def nearest_circuits(run: Run, source: Recording, places, layer: int) -> list[Near]:
    """Of the circuits at places of a recording the nearest of the run's; none in its context."""
    known = run.trained
    return find_neighbors(source.circuits(layer).at(places), source.contexts[places],
                          known.circuits(layer), known.contexts, known.contexts)


def show_neighbors(args: argparse.Namespace) -> None:
    """The circuits nearest to those of a text."""
    run = run_of(args)
    layer = run.layer(args.layer)
    source = record(run.model, torch.tensor([run.prompt(args.prompt)]))
    places = list(range(source.tokens.size))
    rows = []
    for place, near in zip(places, nearest_circuits(run, source, places, layer)):
        rows.append([place, "", *run.shown(source, place)])
        for other, distance in near:
            rows.append(["", distance, *run.shown(run.trained, other)])
    show(f"Every token, and the {NEIGHBORS} whose circuits in layer {layer} are nearest, by cosine "
         f"distance; no two, and none with the token itself, after the same {CONTEXT} tokens",
         ["", "distance", "before", "token", "after", "next"], rows)


# --------------------------------------------------------------------------------------------------
# classes: do near circuits mean alike, and more so than without training?

def context_classes(run: Run, n_tokens: int = 1000,
                    n_classes: int = 12) -> tuple[np.ndarray, list[str]]:
    """Classes of tokens that occur in like contexts, found without labels, for text of any kind.

    Returns the class of each token (V,), and names: the most frequent members of each class, and at
    the end "rare tokens". k-means of the n_tokens most frequent tokens. A token is the square roots
    of the probabilities of the tokens before and after it, in the first 4 million tokens of
    training. No model takes part.
    """
    from sklearn.cluster import KMeans
    from sklearn.preprocessing import normalize
    text = run.data.tokens("train")[:2**22]
    often = np.argsort(-np.bincount(text), kind="stable")[:n_tokens]
    side = len(often) + 1
    place = np.full(run.cfg.vocab_size, len(often))     # of a token in often; the last is for rare
    place[often] = np.arange(len(often))
    pairs = place[text[:-1]] * side + place[text[1:]]
    counts = np.bincount(pairs, minlength=side**2).reshape(side, side)
    after = normalize(counts, norm="l1")
    before = normalize(counts.T, norm="l1")
    x = np.sqrt(np.hstack([after, before]))[:-1]                        # (n_tokens, 2 * side)
    label = KMeans(n_classes, init=x[:n_classes], n_init=1).fit_predict(x)
    names = []
    for c in range(n_classes):
        members = often[label == c]
        names.append(" ".join(map(run.name, members[:4])))
    return np.append(label, n_classes)[place], [*names, "rare tokens"]


def class_shares(recording: Recording, circuits: Circuits, queries: np.ndarray,
                 label: np.ndarray) -> np.ndarray:
    """(Q,): of the circuits nearest to the queries' that belong to other tokens, the share that
    has the same label (N,). queries are places."""
    ids = torch.from_numpy(recording.tokens.ravel())
    found = find_neighbors(circuits.at(queries), ids[queries], circuits, ids, recording.contexts)
    shares = []
    for query, near in zip(queries, found):
        places = [place for place, _ in near]
        shares.append(np.mean(label[places] == label[query]))
    return np.array(shares)


def meaning(run: Run, layer: int, label: np.ndarray) -> tuple[np.ndarray, dict]:
    """Places (Q,) of random tokens, and the shares (Q,) of their classes: by the trained circuits,
    by the untrained, by the trained ones dealt out to tokens at random, and by chance."""
    trained = run.trained
    ids = trained.tokens.ravel()
    size = len(ids)
    equal = np.bincount(ids)[ids]       # tokens equal to each, which are all of its class
    chance = (np.bincount(label)[label] - equal) / (size - equal)
    rng = np.random.default_rng(0)
    queries = rng.choice(size, min(1000, size), replace=False)
    shuffle = rng.permutation(size)
    circuits = trained.circuits(layer)
    untrained = run.untrained.circuits(layer)
    return queries, {
        "trained": class_shares(trained, circuits, queries, label),
        "untrained": class_shares(trained, untrained, queries, label),
        "shuffled": class_shares(trained, circuits.at(shuffle), queries, label),
        "chance": chance[queries]}


def show_classes(args: argparse.Namespace) -> None:
    """Do near circuits mean alike?"""
    run = run_of(args)
    layer = run.layer(args.layer)
    of_token, names = context_classes(run)
    tokens = run.trained.tokens
    label = of_token[tokens.ravel()]
    queries, shares = meaning(run, layer, label)
    windows = np.arange(len(tokens))[:, None]
    of_window = queries // tokens.shape[1] == windows                           # (W, Q)
    chosen = [("all", np.full(len(queries), True))]     # the name of a row, and which queries
    for c, _ in Counter(label[queries].tolist()).most_common():
        chosen.append((names[c], label[queries] == c))
    rows = []
    for name, which in chosen:
        row = [name, int(which.sum())]
        for values in shares.values():
            row.append(jackknife(values[which], of_window[:, which]))
        rows.append(row)
    show(f"Of random tokens, the share of their own class in the {NEIGHBORS} nearest circuits of "
         f"other tokens, layer {layer}; intervals of 95 %, over windows",
         ["class", "tokens", *shares], rows)
    print("\nClasses: tokens that occur in like contexts. Controls: the model before training; the "
          "trained gates dealt out to tokens at random; all tokens. The map is in the report.")


# --------------------------------------------------------------------------------------------------
# usage: which neurons are used, which together, and do the first gates follow the embeddings?
# (arXiv 2606.07414, Figures 8 and 9, and its code's CKA)

def coactivation(ids: Tensor, size: int) -> Tensor:
    """P(j | i) (size, size): of the tokens that use neuron i the share that use j; ids (N, k)."""
    ids = ids.long()
    i = ids[:, :, None]
    j = ids[:, None, :]
    pairs = (i * size + j)[(i < size) & (j < size)]
    counts = pairs.bincount(minlength=size**2).view(size, size).double()
    return counts / counts.diagonal().clamp(min=1)[:, None]


def shared_subkeys(ids: Tensor, n: int) -> list[float]:
    """Mean P(j | i) over uses of i, for j that share its first sub-key, its second, none.

    ids (..., k).
    """
    first = ids[..., :, None] // n == ids[..., None, :] // n                    # (..., k, k)
    second = ids[..., :, None] % n == ids[..., None, :] % n
    means = []
    for pairs, others in ((first & ~second, n - 1),
                          (second & ~first, n - 1),
                          (~first & ~second, (n - 1)**2)):
        means.append(pairs.sum().item() / ids.numel() / others)
    return means


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA, in [0, 1], of two lists of M features, x (M, ...) and y (M, ...) (1905.00414)."""
    grams = []
    for features in (x.double(), y.double()):
        centred = features - features.mean(0)
        grams.append(centred @ centred.T)                                       # (M, M)
    gram_x, gram_y = grams
    return ((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())).item()


def alignment(run: Run) -> dict[str, float]:
    """Linear CKA of the embeddings and the gates of layer 0, at the first of each of the 100 most
    frequent tokens: trained, untrained, and with the gates shuffled."""
    tokens = run.trained.tokens.ravel()
    _, first, counts = np.unique(tokens, return_index=True, return_counts=True)
    often = first[np.argsort(-counts, kind="stable")[:100]]
    shuffled = np.random.default_rng(0).permutation(often)
    result = {}
    for name, recording, places in (("trained", run.trained, often),
                                    ("untrained", run.untrained, often),
                                    ("shuffled", run.trained, shuffled)):
        embeddings = recording.embedding[tokens[often]]                         # (M, D)
        circuits = Circuits(recording.gates[0], recording.rows[0], recording.size)
        result[name] = cka(embeddings, circuits.at(places).dense())
    return result


def draw_coactivation(run: Run, layer: int, path: Path) -> None:
    import plotly.express as px
    n = math.isqrt(run.cfg.n_experts)
    size = min(run.cfg.n_experts, 512 // n * n)         # whole rows of sub-keys
    ids = run.trained.rows[layer, :, :run.cfg.top_k]    # those of channel 0
    P = coactivation(ids, size).fill_diagonal_(0)
    figure = px.imshow(P.numpy(), zmin=0, zmax=0.1, labels=dict(x="j", y="i"), height=820,
                       title=f"P(j | i) of the first {size} neurons, without i = j: layer {layer}, "
                             "channel 0")
    figure.update_xaxes(dtick=n)
    figure.update_yaxes(dtick=n)
    write_page(path, figure.to_html())


def show_usage(args: argparse.Namespace) -> None:
    """Which neurons are used, and which together."""
    run = run_of(args)
    path = place_for(args.out_dir, "usage.html")
    layer = run.layer(args.layer)
    cfg = run.cfg
    n = math.isqrt(cfg.n_experts)
    used = []
    together = []
    for of_layer in range(cfg.n_layer):
        for name, recording in (("trained", run.trained), ("untrained", run.untrained)):
            chosen = recording.rows[of_layer]                                   # (N, J)
            counts = chosen.flatten().bincount(minlength=recording.size)
            used.append([of_layer, name, *usage(counts)])
            ids = (chosen % cfg.n_experts).view(-1, cfg.n_channels, cfg.top_k)
            if cfg.router.startswith("product") and n > 1:
                together.append([of_layer, name, *shared_subkeys(ids, n)])
    if has_plotly():
        draw_coactivation(run, layer, path)
    show(f"Of {run.trained.size:,} neurons, the share used in {run.trained.tokens.size:,} tokens, "
         "and the Gini coefficient: 0 all alike, 1 one has all",
         ["layer", "gates", "used", "Gini"], used)
    if together:
        show("Mean P(j | i): of the tokens that use neuron i, the share that use j; neuron "
             f"{n} a + b has the sub-keys a and b",
             ["layer", "gates", "same first sub-key", "same second", "neither"], together)
    show("Linear CKA of the embeddings and the gates of layer 0; chance is above 0: shuffled",
         ["gates", "CKA"], [list(item) for item in alignment(run).items()])


# --------------------------------------------------------------------------------------------------
# patch: do the gates of one prompt carry its answer into another? (arXiv 2606.07414, Figure 7)

MOST_FACTS = 40
FEWEST_COUNT = 5    # occurrences that make a fact
Facts = dict[int, int]      # words and their answers, one token each


class Template:
    """A text with one {} for the word: the tokens before and after it, and then the answer's."""

    def __init__(self, run: Run, text: str):
        before, after = text.split("{}")
        self.blank = " " if before.endswith(" ") else ""    # belongs to the token of the word
        self.prefix = run.encoding.encode_ordinary(before.removesuffix(" "))
        self.suffix = run.encoding.encode_ordinary(after.removesuffix(" "))

    def prompt(self, run: Run, word: int) -> list[int]:
        return [run.encoding.eot_token, *self.prefix, word, *self.suffix]


def count_pairs(run: Run, template: Template) -> Counter:
    """How often which words and answers stand in a template in the first 16 million tokens of
    training."""
    text = run.data.tokens("train")[:2**24]
    slot = len(template.prefix)
    end = slot + 1 + len(template.suffix)
    at = np.arange(len(text) - end)
    for offset, token in [*enumerate(template.prefix), *enumerate(template.suffix, slot + 1)]:
        at = at[text[at + offset] == token]
    return Counter(zip(text[at + slot].tolist(), text[at + end].tolist()))


def find_facts(run: Run, template: Template) -> Facts:
    """At most MOST_FACTS facts, no two with the same word or answer.

    A word is one token of letters. Answers are chosen by how much the word raises them: by count *
    log(lift), where lift is p(answer | word) / p(answer): the pair's share of the mutual
    information of words and answers; the highest first.
    """
    pairs = count_pairs(run, template)
    words = Counter()
    answers = Counter()
    for (word, answer), count in pairs.items():
        words[word] += count
        answers[answer] += count
    letters = re.compile(template.blank + "[A-Za-z]+")
    candidates = []
    for (word, answer), count in pairs.items():
        lift = count / words[word] / answers[answer] * pairs.total()
        spelt = run.encoding.decode([word])
        if count >= FEWEST_COUNT and lift > 1 and letters.fullmatch(spelt):
            candidates.append((-count * math.log(lift), word, answer))
    facts = {}
    for _, word, answer in sorted(candidates):
        if len(facts) < MOST_FACTS and word not in facts and answer not in facts.values():
            facts[word] = answer
    return facts


def given_facts(run: Run, template: Template, given: str) -> Facts:
    """The facts word:answer,word:answer,... of --facts; answers with their blanks."""
    facts = {}
    for entry in given.split(","):
        word, answer = entry.split(":")
        facts[one_token(run, template.blank + word)] = one_token(run, answer)
    return facts


@torch.inference_mode()
def patched_logits(model: GPT, prompts: Tensor, gates: dict[int, tuple], position: int,
                   source: int) -> Tensor:
    """(F, V) at the end of prompts (F, T) that have, at a position, the gates of the prompt source:
    scores and neurons, of all channels. gates: {layer to patch: (gates, ids)}."""
    T = prompts.shape[1]

    def patch(layer: int, x: Tensor, *output: Tensor) -> tuple[Tensor, ...] | None:
        if layer not in gates:
            return None
        changed = []
        for part, recorded in zip(output, gates[layer]):
            part = part.clone()                                 # (F*T, C, k), prompt by prompt
            part[position::T] = recorded[source * T + position]
            changed.append(part)
        return tuple(changed)

    with router_hook(model, patch):
        return model(prompts)[0][:, -1].cpu()


def preferences(logits: Tensor, answers: Tensor) -> Tensor:
    """(F, F): in prompt a the logit of a's answer less that of b's; logits (F, V), answers (F,)."""
    at_answers = logits[:, answers]
    return at_answers.diagonal()[:, None] - at_answers


def indirect_effect(clean: Tensor, counterfactual: Tensor, patched: Tensor) -> Tensor:
    """Of preferences: 0 where the patch changes nothing, 1 where it does all that the other prompt
    does."""
    return (patched - clean) / (counterfactual - clean)


def patching(run: Run, template: Template, facts: Facts) -> tuple[Tensor, Tensor, dict]:
    """Every prompt with the gates of every other, position by position, layer by layer.

    Returns the logits (F, V), unpatched; known (F, F): both prompts prefer their own answer; and
    {(position, layers, "all" or one's number): two effects (F, F)}, [a, b] of the gates of b in
    prompt a, and of every third prompt's.
    """
    prompts = [template.prompt(run, word) for word in facts]
    prompts = torch.tensor(prompts, device=run.device)
    answers = torch.tensor(list(facts.values()))
    gates = {}

    def keep(layer: int, x: Tensor, *output: Tensor) -> None:
        gates[layer] = output

    with torch.inference_mode(), router_hook(run.model, keep):
        logits = run.model(prompts)[0][:, -1].cpu()                             # (F, V)
    clean = preferences(logits, answers)
    counterfactual = -clean.T           # in prompt b, the logit of a's answer less that of b's
    number = len(facts)
    progress(f"patch {number * (number - 1)} ordered pairs of {number} facts")
    choices = {"all": gates}            # by the name of the layers
    for layer in gates:
        choices[str(layer)] = {layer: gates[layer]}
    positions = range(len(template.prefix) + 1, prompts.shape[1])
    effects = {}
    for position, layers in itertools.product(positions, choices):
        theirs = torch.zeros(number, number)
        third = torch.zeros(number, number)
        for source in range(number):
            changed = patched_logits(run.model, prompts, choices[layers], position, source)
            effect = indirect_effect(clean, counterfactual, preferences(changed, answers))
            theirs[:, source] = effect[:, source]
            effect[source] = 0          # its own gates
            effect[:, source] = 0
            third += effect / (number - 2)
        effects[position, layers] = (theirs, third)
    known = (clean > 0) & (counterfactual < 0)
    return logits, known, effects


def show_patch(args: argparse.Namespace) -> None:
    """The gates of one prompt in another."""
    run = run_of(args)
    template = Template(run, args.template)
    if args.facts:
        facts = given_facts(run, template, args.facts)
    else:
        facts = find_facts(run, template)
    if len(facts) < 3:
        raise SystemExit(f"analyze.py: {len(facts)} facts, of 3 needed: try another --template, or "
                         "give --facts")
    logits, known, effects = patching(run, template, facts)
    a, b = known.nonzero(as_tuple=True)
    fact_numbers = torch.arange(len(facts))[:, None]
    of_fact = ((a == fact_numbers) | (b == fact_numbers)).numpy()               # (F, known pairs)
    at = ["{}", *map(run.name, template.suffix)]
    rows = []
    for (position, layers), (theirs, third) in effects.items():
        row = [at[position - len(template.prefix) - 1], layers]
        for effect in (theirs, third, theirs - third):
            row.append(jackknife(effect[known].double().numpy(), of_fact))
        rows.append(row)
    show(f"{args.template!r} with the gates of another prompt at a position: 0 where they change "
         "nothing, 1 where they do all that the other prompt does; 95 % intervals, over facts",
         ["position", "layers", "effect", "third prompt", "difference"], rows)
    print(f"\nMeans over the {len(a)} of {len(facts) * (len(facts) - 1)} ordered pairs whose "
          "prompts both prefer their own answer. Control: the gates of every third prompt.")
    rows = []
    for (word, answer), p in zip(facts.items(), logits.softmax(1)):
        rows.append([run.name(word), run.name(answer), p[answer].item(), run.name(p.argmax())])
    show("Facts", ["word", "answer", "p(answer)", "first choice"], rows)


# --------------------------------------------------------------------------------------------------
# neuron: where is a neuron chosen, what does it read, and what does it write?

SHOWN = 8       # excerpts, tokens of each list, and neurons of one token


@torch.no_grad()
def neuron_words(run: Run, layer: int, rows: list[int]) -> list[dict]:
    """Three lists (token, value) of each neuron: the tokens that it promotes and suppresses, with
    the slope of their logits; and that it reads, with <w_in, x> of x their normed embedding.

    A neuron adds gate * <w_in, x> times w_out. This product times the slope, divided by the rms of
    the last residual, is what it adds to a logit directly: where it is negative, what the neuron
    promotes and what it suppresses change places.
    """
    model = run.model
    block = model.blocks[layer]
    embeddings = model.embedding.weight[:run.encoding.n_vocab]          # (V', D): no padding
    w_out = block.ffn.w_out.flatten(0, 1)[rows]                         # (M, D)
    if run.cfg.norm:
        w_out = w_out * model.norm.scale
    writes = w_out @ embeddings.T                                       # (M, V')
    writes -= writes.mean(dim=1, keepdim=True)
    w_in = block.ffn.w_in.flatten(0, 1)[rows]
    reads = w_in @ block.ffn_norm(embeddings).T
    words = [{} for _ in rows]
    for name, values, keys in (("promotes", writes, writes), ("suppresses", writes, -writes),
                               ("reads", reads, reads.abs())):
        best = keys.topk(SHOWN).indices                                 # (M, SHOWN)
        best_values = values.gather(1, best)
        for of_neuron, tokens, numbers in zip(words, best.tolist(), best_values.tolist()):
            of_neuron[name] = list(zip(tokens, numbers))
    return words


def neuron_cards(run: Run, layer: int, rows: list[int]) -> list[dict]:
    """Of neurons of one layer: use, the share of the recorded tokens that choose it; excerpts, the
    largest products and their places, no two in equal contexts; promotes, suppresses and reads."""
    recording = run.trained
    contexts = recording.contexts.tolist()
    J = recording.rows.shape[2]
    # One sort of all choices, (token, slot) pairs, by neuron.
    order, offsets = kernels.sort_by_row(recording.rows[layer], recording.size)
    cards = neuron_words(run, layer, rows)
    for row, card in zip(rows, cards):
        pairs = order[offsets[row]:offsets[row + 1]].long()
        places = (pairs // J).tolist()
        products = recording.products[layer].flatten()[pairs]
        excerpts = {}       # by context
        for i in products.abs().argsort(descending=True, stable=True).tolist():
            place = places[i]
            excerpts.setdefault(contexts[place], (products[i].item(), place))
            if len(excerpts) == SHOWN:
                break
        card["use"] = len(places) / recording.tokens.size
        card["excerpts"] = list(excerpts.values())
    return cards


def show_neuron(args: argparse.Namespace) -> None:
    """Where a neuron is chosen, what it reads and writes."""
    run = run_of(args)
    layer = run.layer(args.layer)
    channel, neuron = map(int, args.neuron.split(":"))
    row = np.ravel_multi_index((channel, neuron), (run.cfg.n_channels, run.cfg.n_experts))
    [card] = neuron_cards(run, layer, [int(row)])
    excerpts = []
    for product, place in card["excerpts"]:
        excerpts.append([product, *run.shown(run.trained, place)])
    words = []
    for pairs in zip(card["promotes"], card["suppresses"], card["reads"]):
        cells = []
        for token, value in pairs:
            cells += [run.name(token), value]
        words.append(cells)
    show(f"Neuron {args.neuron} of layer {layer}, chosen by {card['use']:.3%} of "
         f"{run.trained.tokens.size:,} tokens, where what it adds is largest",
         ["gate * <w_in, x>", "before", "token", "after", "next"], excerpts)
    show("Tokens that w_out promotes and suppresses, directly and less the mean (the other way "
         "round where the product is negative), and those whose embeddings w_in reads",
         ["promotes", "slope", "suppresses", "slope", "reads", "<w_in, x>"], words)


# --------------------------------------------------------------------------------------------------
# explain: which tokens and which neurons make up the logit of the next token?
#
# Hold the gates, the attention patterns and the scales of the norms, 1 / rms, at what they are on a
# prompt: the model is then linear in the embeddings, and has no biases. So embeddings times the
# logit's gradient add up to the logit, exactly, and so do the neurons and what passes them by.

class Attribution(NamedTuple):
    """Of one logit at the last position of a prompt of T tokens; tensors on the CPU."""
    recording: Recording    # of the prompt
    target: int             # the next token explained
    against: int | None     # the token it is compared with; None: the mean over the vocabulary
    logit: float            # of target, less that of against, or less the mean logit
    token_shares: Tensor    # (T,), which add up to logit
    neuron_shares: Tensor   # (L, T, J): what each chosen neuron adds, through all later layers


def contrast(logits: Tensor, target: int, against: int | None) -> Tensor:
    """The logit of target less that of against, or less the mean; logits (V,)."""
    other = logits.mean() if against is None else logits[against]
    return logits[target] - other


@contextlib.contextmanager
def held(model: GPT) -> Iterator[list[Tensor]]:
    """Makes gates, norms' scales and attention patterns constants in gradients; no value changes.

    The list gets the embeddings (1, T, D), then the outputs (1, T, D) of the feedforward layers.
    """
    flows = []

    def keep(module, inputs, output):
        flows.append(output)

    def hold(module, inputs, output):
        return output.detach()

    def hold_gates(module, inputs, output):
        gates, ids = output
        return gates.detach(), ids

    def hold_scale(norm, inputs, output):
        x = inputs[0]
        mean_square = x.detach().square().mean(-1, keepdim=True)
        linear = x * torch.rsqrt(mean_square + 1e-6) * norm.scale
        return output.detach() + (linear - linear.detach())     # the value is output's to the bit

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith(("embedding", ".ffn")):
                hook = keep
            elif name.endswith(".router"):
                hook = hold_gates
            elif name.endswith((".q_norm", ".k_norm")):
                hook = hold
            elif isinstance(module, RMSNorm):
                hook = hold_scale
            else:
                continue
            stack.enter_context(module.register_forward_hook(hook))
        yield flows


def explain(model: GPT, tokens: list[int], target: int | None = None,
            against: int | None = None) -> Attribution:
    """What the tokens and neurons of a prompt add to a logit at its end, by default that of the
    likeliest token."""
    device = model.embedding.weight.device
    prompt = torch.tensor([tokens])
    recording = record(model, prompt)
    with torch.enable_grad(), held(model) as flows:
        logits = model(prompt.to(device))[0][0, -1]             # (V,)
    if target is None:
        target = int(logits.argmax())
    logit = contrast(logits, target, against)
    slopes = torch.autograd.grad(logit, flows)                  # of embeddings, and of each layer
    token_shares = (flows[0] * slopes[0]).sum(-1)[0]                            # (T,)
    neuron_shares = []
    for layer, block in enumerate(model.blocks):
        w_out = block.ffn.w_out.detach().flatten(0, 1)                          # (R, D)
        rows = recording.rows[layer].to(device)                                 # (T, J)
        effect = kernels.gather_dot(slopes[1 + layer][0], w_out, rows)          # (T, J)
        neuron_shares.append(recording.products[layer] * effect.cpu())
    return Attribution(recording, target, against, logit.item(), token_shares.detach().cpu(),
                       torch.stack(neuron_shares))


def strongest(found: Attribution, count: int) -> list[tuple[int, int, int, float, float]]:
    """The neurons with the largest shares, of either sign: layer, t, row, share and product."""
    shares = found.neuron_shares
    best = shares.abs().flatten().argsort(descending=True, stable=True)[:count]
    at = torch.unravel_index(best, shares.shape)                # layers, positions, slots
    columns = [at[0], at[1], found.recording.rows[at], shares[at], found.recording.products[at]]
    return list(zip(*[column.tolist() for column in columns]))


@torch.no_grad()
def logit_without(run: Run, found: Attribution, off: Tensor) -> float:
    """The logit when the neurons that off (L, T, J) marks in the recording add nothing there."""
    def switch_off(layer: int, x: Tensor, gates: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = run.model.blocks[layer].ffn.rows(ids).cpu()                      # (T, J)
        marked = found.recording.rows[layer].masked_fill(~off[layer], -1)
        chosen = (rows[:, :, None] == marked[:, None, :]).any(2)                # (T, J)
        return gates.masked_fill(chosen.view(gates.shape).to(gates.device), 0), ids

    prompt = torch.from_numpy(found.recording.tokens).to(run.device)
    with router_hook(run.model, switch_off):
        logits = run.model(prompt)[0][0, -1]
    return contrast(logits, found.target, found.against).item()


def alike(marked: Tensor, values: Tensor) -> Tensor:
    """For each marked neuron another, of its layer and position, whose value is nearest; (L, T, J)
    each."""
    others = torch.zeros_like(marked)
    for layer, t, j in marked.nonzero().tolist():
        distance = (values[layer, t] - values[layer, t, j]).abs()
        distance[marked[layer, t] | others[layer, t]] = math.inf
        others[layer, t, distance.argmin()] = True
    return others


def controls(run: Run, windows: Tensor, count: int) -> dict[str, list[tuple[float, float]]]:
    """By how neurons are chosen: for every prompt, windows (W, T), the change of the logit of the
    likeliest token, less the mean logit, when count neurons are switched off: minus their shares,
    and what it really is."""
    progress(f"switch off neurons in {len(windows)} prompts")
    changes = defaultdict(list)
    for tokens in windows.tolist():
        found = explain(run.model, tokens)
        shares = found.neuron_shares
        named = torch.zeros_like(shares, dtype=torch.bool)
        named.view(-1)[shares.flatten().topk(count).indices] = True
        others = alike(named, found.recording.gates.abs())
        for name, off in ((f"the {count} largest shares", named),
                          ("others of equal |gate|", others)):
            predicted = -shares[off].sum().item()
            changes[name].append((predicted, logit_without(run, found, off) - found.logit))
    return changes


def show_explain(args: argparse.Namespace) -> None:
    """What tokens and neurons add to the next token's logit."""
    run = run_of(args)
    tokens = run.prompt(args.prompt)
    target = one_token(run, args.token)
    against = one_token(run, args.against)
    found = explain(run.model, tokens, target, against)
    names = [f"{t} {run.name(token)}" for t, token in enumerate(tokens)]
    neurons = []
    for layer, t, row, share, product in strongest(found, 12):
        [lists] = neuron_words(run, layer, [row])
        writes = []
        for kind in ("promotes", "suppresses"):
            writes.append(" ".join(run.name(token) for token, _ in lists[kind][:4]))
        reads = " ".join(f"{run.name(token)} {value:+.1f}" for token, value in lists["reads"][:4])
        if product < 0:
            writes.reverse()
        channel, neuron = divmod(row, run.cfg.n_experts)
        neurons.append([layer, names[t], f"{channel}:{neuron}", share, *writes, reads])
    other = "the mean logit" if against is None else f"that of {run.name(against)}"
    total = found.token_shares.double().sum().item()
    show(f"The logit of {run.name(found.target)} as the next token, less {other}, is "
         f"{found.logit:.6f}; the shares of the tokens add up to {total:.6f}", ["token", "share"],
         [list(row) for row in zip(names, found.token_shares.tolist())])
    show("The largest shares of neurons, through all later layers (where one reads another, both "
         "count what passes through both), what they write, with its sign here, and what they read",
         ["layer", "at", "neuron", "share", "writes for", "against", "reads"], neurons)
    if args.controls:
        show_controls(run)


def show_controls(run: Run) -> None:
    """Do shares say what neurons do?"""
    windows = run.data.windows("val", run.data.val_starts(100))[:, :-1]
    windows = windows[:, :64]
    count = min(8, run.cfg.n_channels * run.cfg.top_k // 2)     # leaves as many others
    rows = []
    for name, pairs in controls(run, windows, count).items():
        predicted, actual = np.array(pairs).T
        of_prompt = np.eye(len(pairs), dtype=bool)
        correlation = None
        if predicted.std() and actual.std():
            correlation = np.corrcoef(predicted, actual)[0, 1].item()
        rows.append([name, len(pairs), jackknife(predicted, of_prompt),
                     jackknife(actual, of_prompt), correlation])
    show(f"The change of the likeliest token's logit when {count} neurons are switched off in "
         f"prompts of {windows.shape[1]} tokens: as shares predict it, and as it is when norms, "
         "patterns and gates may answer; 95 % intervals, over prompts",
         ["neurons", "prompts", "predicted", "actual", "correlation"], rows)


# --------------------------------------------------------------------------------------------------
# what mimic and redistribute share

def prepare_trainings() -> None:
    """One thread: on a CPU the numbers do not depend on how many cores there are."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)      # Adam's moments of unused neurons become denormals, slow
    keep_memory()


# --------------------------------------------------------------------------------------------------
# mimic: is a dense layer a mixture of few neurons in disguise? (arXiv 2512.18452)

class Mixture(nn.Module):
    """The paper's student: a shared MLP, and PEER's experts with one full list of keys, of low
    rank."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.shared = FFN["mlp"](cfg)
        self.experts = FFN["peer"](cfg)
        self.experts.router = Router(cfg.d_model, cfg.n_channels, cfg.n_experts, cfg.top_k,
                                     cfg.d_key, kind="dense")

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) + self.experts(x)


NEURONS = 4 * 33**2     # of both sparse students: a square, with more sub-keys than any top_k
ACTIVE = (8, 32, 128)   # neurons of the students
STUDENTS = ("dense", "mixture", "sgatlin")
LONGER = 8              # a dense student learns slowly: it trains so many times as long


def make_student(name: str, m: int, D: int) -> nn.Module:
    """A student with m active neurons, (..., D) -> (..., D), every time the same."""
    sizes = dict(d_model=D, d_key=D // 4)
    torch.manual_seed(0)
    if name == "dense":
        return FFN["mlp"](GPTConfig(ffn="mlp", d_ff=m, **sizes))
    if name == "mixture":
        return Mixture(GPTConfig(ffn="peer", n_channels=1, n_experts=NEURONS, top_k=m // 2,
                                 d_ff=m // 2, **sizes))
    return FFN["sgatlin"](GPTConfig(n_channels=4, n_experts=NEURONS // 4, top_k=m // 4, **sizes))


def gaussian_like(x: Tensor, count: int) -> Tensor:
    """(count, D) samples of the normal distribution with x's mean and covariance, x (N, D)."""
    x = x.double()
    values, vectors = torch.linalg.eigh(x.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T     # (D, D), symmetric
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, x.shape[1], dtype=x.dtype, generator=generator)
    return (x.mean(0) + noise @ root).float()


def unexplained(y: Tensor, predicted: Tensor) -> float:
    """The fraction of the variance of y (N, D) that predictions leave: 1 for y's mean."""
    variance = (y - y.mean(0)).square().sum()
    return ((y - predicted).square().sum() / variance).item()


def fit(student: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Trains student(x) to be y, (N, D) each: mean squared error, Adam, cosine to 0."""
    # 1e-2 was best with 32 neurons on real inputs: dense, 4800 steps, of 3e-3, 1e-2 and 3e-2;
    # sparse, 300 steps, of 1e-3 to 3e-2.
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (1024,))
        F.mse_loss(student(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()


@torch.no_grad()
def outputs(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) for x (N, D), 4096 tokens at a time: the mixture has scores of all neurons."""
    return torch.cat([layer(part) for part in x.split(4096)])


@torch.no_grad()
def layer_inputs(run: Run, layer: int, windows: Tensor) -> Tensor:
    """What a layer's feedforward part reads on windows (W, T): (N, D), window by window."""
    found = []

    def keep(module, inputs):
        found.append(inputs[0].flatten(0, 1))

    with run.model.blocks[layer].ffn.register_forward_pre_hook(keep):
        for window in windows:
            run.model(window[None].to(run.device))
    return torch.cat(found)


def imitate(ffn: nn.Module, name: str, m: int, x: Tensor, held_x: Tensor, steps: int) -> float:
    """Fits a student of m active neurons to what a layer makes of x. Returns what it leaves
    unexplained of the outputs for inputs held out."""
    y = outputs(ffn, x)
    scale = (y - y.mean(0)).square().mean().sqrt()
    student = make_student(name, m, x.shape[1]).to(x.device)
    fit(student, x, y / scale, steps * LONGER if name == "dense" else steps)
    return unexplained(outputs(ffn, held_x), scale * outputs(student, held_x))


def mimic(run: Run, layer: int, steps: int) -> dict[tuple, float]:
    """Students of one dense layer, fitted to its outputs on real inputs and on Gaussian ones:
    {(inputs, m, student): the fraction of the variance that it leaves unexplained}."""
    prepare_trainings()
    T = run.cfg.block_size
    n = run.data.n_windows
    count = min(2**17 // T, n)
    starts = np.arange(count) * (n // count) * T
    progress(f"record layer {layer} on {count} windows of {T} tokens")
    real = layer_inputs(run, layer, run.data.windows("train", starts)[:, :-1])  # (N, D)
    held_out = layer_inputs(run, layer, run.validation())
    sizes = [len(real), len(held_out)]
    normal = gaussian_like(real.cpu(), sum(sizes)).to(run.device)
    inputs = {"real": (real, held_out), "Gaussian": normal.split(sizes)}
    results = {}
    for kind, m, name in itertools.product(inputs, ACTIVE, STUDENTS):
        left = imitate(run.model.blocks[layer].ffn, name, m, *inputs[kind], steps)
        progress(f"{kind} inputs, {m} active neurons, {name}: {left:.4f} of the variance left")
        results[kind, m, name] = left
    return results


def show_mimic(args: argparse.Namespace) -> None:
    """Students of a dense layer (a run of --ffn=mlp), with few active neurons."""
    run = run_of(args, ffn="mlp")
    layer = run.layer(args.layer)
    steps = args.steps or 600
    results = mimic(run, layer, steps)
    rows = []
    for kind, m in itertools.product(("real", "Gaussian"), ACTIVE):
        rows.append([kind, m, *(results[kind, m, name] for name in STUDENTS)])
    show(f"Variance that students of m active neurons leave unexplained of the outputs of layer "
         f"{layer}, on inputs held out, after {steps} steps (dense: {LONGER} times as many)",
         ["inputs", "m", *STUDENTS], rows)
    print("\nWhere sparse students leave less than dense ones on real inputs, and not on Gaussian "
          "ones, the layer is a sparse mixture because of its inputs. But m dense neurons write "
          "into m dimensions at most.")


# --------------------------------------------------------------------------------------------------
# redistribute: what does attention take over from a sparse feedforward layer? (arXiv 2605.09403)
#
# Departures from the paper: our initialisation; rotary positions; no bias in attention; GELU where
# it has SiLU; its GLU is 170 wide; GLU and experts are clamped SwiGLUs; the weights of the chosen
# experts are not renormalised, so that the loss of the task trains the router, and no other loss
# balances it.

EOS = 11                            # after the ten digits; the paper's PAD, 10, is not needed here
SEEDS = (42, 137, 256, 512, 1024)   # the paper's
CHECK = 100                         # steps between checks whether all answers are right
VARIANTS = {    # feedforward layers; the paper's accuracies without them (its Fig. 1):
    "dense 256": dict(ffn="mlp", d_ff=256),                         # 0.119 ± 0.036
    "GLU 128": dict(ffn="swiglu", d_ff=128),                        # 0.097 ± 0.024
    "dense 64": dict(ffn="mlp", d_ff=64),                           # 0.237 ± 0.053
    "MoE top-2": dict(ffn="moe", n_experts=4, d_ff=64, top_k=2),    # 0.187 ± 0.069
    "MoE top-1": dict(ffn="moe", n_experts=4, d_ff=64, top_k=1),    # 0.443 ± 0.125
    "sgatlin": dict(n_channels=16, n_experts=64, top_k=4, d_key=16),
}


def addition() -> tuple[Tensor, Tensor]:
    """x + 7 for x = 0..999 as d0 d1 d2 EOS o0 o1 o2 o3 EOS, the lowest digits first.

    Returns inputs (1000, 8) and the next tokens (1000, 8), -100 before o0.
    """
    x = torch.arange(1000)[:, None]
    powers = 10 ** torch.arange(4)
    eos = torch.full_like(x, EOS)
    digits = x // powers[:3] % 10
    answers = (x + 7) // powers % 10
    text = torch.cat((digits, eos, answers, eos), dim=1)                        # (1000, 9)
    targets = text[:, 1:].clone()
    targets[:, :3] = -100
    return text[:, :-1], targets


@torch.inference_mode()
def right_digits(model: GPT, inputs: Tensor, targets: Tensor) -> float:
    """The share of o0..o3 that are right, each given the true ones before it."""
    predicted = model(inputs)[0].argmax(-1)
    return (predicted == targets)[:, 3:7].double().mean().item()


def right_without_ffn(model: GPT, inputs: Tensor, targets: Tensor) -> float:
    """The same with the output of the feedforward layer set to zero."""
    def to_zero(module, inputs, output):
        return torch.zeros_like(output)

    with model.blocks[0].ffn.register_forward_hook(to_zero):
        return right_digits(model, inputs, targets)


def addition_model(name: str, norm: bool, seed: int) -> GPT:
    """One layer of four heads with the feedforward layer of a variant."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=EOS + 1, block_size=8, n_layer=1, d_model=64, d_head=16,
                         norm=norm, **VARIANTS[name]))


class Learned(NamedTuple):
    """The steps a model took, and the share of right digits, whole and without its FFN."""
    steps: int
    whole: float
    no_ffn: float


def learn_addition(name: str, norm: bool, seed: int, steps: int, device: str) -> Learned:
    """Trains until all 1000 answers are right, or for so many steps."""
    model = addition_model(name, norm, seed).to(device)
    inputs, targets = (tensor.to(device) for tensor in addition())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    for step in range(1, steps + 1):
        batch = torch.randint(len(inputs), (128,)).to(device)
        model(inputs[batch], targets[batch])[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % CHECK == 0 and right_digits(model, inputs, targets) == 1:
            break
    return Learned(step, right_digits(model, inputs, targets),
                   right_without_ffn(model, inputs, targets))


def redistribute(steps: int, device: str) -> dict[tuple[str, bool], list[Learned]]:
    """Trains every variant without and with norm, a model per seed; keys are (variant, norm)."""
    prepare_trainings()
    results = defaultdict(list)
    for norm, name, seed in itertools.product((False, True), VARIANTS, SEEDS):
        found = learn_addition(name, norm, seed, steps, device)
        progress(f"{name}, norm={norm}, seed {seed}: {found.steps} steps, accuracy "
                 f"{found.whole:.3f}, without FFN {found.no_ffn:.3f}")
        results[name, norm].append(found)
    return results


def show_redistribute(args: argparse.Namespace) -> None:
    """Do sparse layers leave more to attention? Trains 60 tiny models of x + 7."""
    steps = args.steps or 10_000
    results = redistribute(steps, args.device)
    rows = []
    for name in VARIANTS:
        row = [name]
        for norm in (False, True):
            no_ffn = [model.no_ffn for model in results[name, norm]]
            solved = sum(model.whole == 1 for model in results[name, norm])
            row += [interval(statistics.fmean(no_ffn), statistics.stdev(no_ffn)), solved]
        rows.append(row)
    show(f"Share of right digits with the FFN's output set to zero, in models that learned x + 7 "
         f"in {steps} steps at most; mean ± standard deviation over {len(SEEDS)} seeds",
         ["feedforward layer", "no norm", "solved", "norm", "solved"], rows)
    print("\nWhere many digits are right without it, attention does much of the work. To say 0 "
          "always gets 0.323, because the last digit is 0 unless x > 992.")


# --------------------------------------------------------------------------------------------------
# curves: which layer has the lowest loss, for equal steps, FLOPs and seconds? (arXiv 2606.07414,
# Figures 1 and 3) And keep: what is left of runs when their folders are gone.

DEFAULTS = vars(TrainConfig())
PLACES = {"data_dir", "out_dir", "resume", "overwrite", "device"}       # keep leaves them out
# Settings that leave the result as it is, and those that have a column of their own.
NO_RESULT = PLACES | {"scale", "steps", "flops", "seed", "micro_batch_size", "eval_interval",
                      "log_interval", "compile", "shard"}
VARIED = ("activation", "router", "softmax_gates", "shared_pool", "norm")   # a variant of a layer


def read_runs(path: Path) -> list[dict]:
    """The run of a folder or of its log, if it has an evaluation, or the runs that keep wrote.

    A run is a dict: run (its name), settings (all of train.py's), data, evals, seconds (of its
    steps so far, at the pace of the median one: it may have slept, or shared a processor), machine,
    versions, commit.
    """
    file = path / "log.jsonl" if path.is_dir() else path
    kept = []
    by_event = defaultdict(list)
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):     # a kill can cut the last line short
            entry = json.loads(line)
            if "evals" in entry:
                kept.append(entry | dict(settings=DEFAULTS | entry["settings"]))
            else:
                by_event[entry["event"]].append(entry)
    if not by_event["eval"]:            # kept runs, or a start that failed
        return kept
    starts = by_event["config"] + by_event["resume"]
    settings = DEFAULTS | starts[-1]["config"]
    last = by_event["eval"][-1]
    if last["flops"] > settings["flops"]:
        settings["flops"] = 0.0         # a run that --resume took beyond its budget
    paces = []
    for before, after in itertools.pairwise(by_event["step"]):
        steps = after["step"] - before["step"]
        paces.append((after["seconds"] - before["seconds"]) / steps)
    seconds = last["step"] * statistics.median(paces) if paces else None
    machines = dict.fromkeys(start["versions"]["machine"] for start in starts)
    return [dict(run=file.resolve().parent.name, settings=settings, data=starts[0]["data"],
                 evals=by_event["eval"], seconds=seconds, machine=" and ".join(machines),
                 versions=starts[-1]["versions"], commit=starts[-1].get("commit"))]


def is_finished(run: dict) -> bool:
    return run["evals"][-1]["step"] == run["settings"]["steps"]


def show_keep(args: argparse.Namespace) -> None:
    """A line of JSON for each finished run, with the settings that are not the default."""
    for run in itertools.chain(*map(read_runs, args.runs)):
        if not is_finished(run):
            progress(f"left out, not finished: {run['run']}")
            continue
        settings = {}
        for name, value in run["settings"].items():
            if name not in PLACES and value != DEFAULTS.get(name):
                settings[name] = value
        print(json.dumps(run | dict(settings=settings)))


def result_settings(run: dict) -> dict:
    """The settings that make a run's loss, but for its seed."""
    settings = run["settings"]
    unlike = NO_RESULT.union(idle_settings(settings, settings["ffn"]))
    result = {name: value for name, value in settings.items() if name not in unlike}
    if result["dtype"] == "auto" and run["machine"].startswith("cpu"):
        result["dtype"] = "float32"
    return result


def group_key(run: dict) -> str:
    """What runs that differ by their seeds have in common."""
    return repr((result_settings(run), run["settings"]["flops"], run["evals"][-1]["step"]))


def over_seeds(values: np.ndarray) -> tuple[float, float]:
    """The mean, and half its 95 % interval by Student's t; NaN for one value."""
    mean = float(values.mean())
    n = len(values)
    if n < 2:
        return mean, math.nan
    from scipy.stats import t
    error = values.std(ddof=1) / math.sqrt(n)
    return mean, float(t.ppf(0.975, n - 1) * error)


class Group:
    """Runs of the same settings and budget that differ by their seeds."""

    def __init__(self, runs: list[dict], machine: str):
        self.runs = runs
        self.settings = result_settings(runs[0])
        self.budget = runs[0]["settings"]["flops"]
        self.last = runs[0]["evals"][-1]
        words = [self.settings["ffn"]]      # the feedforward layer, and how it is not the default
        for name in VARIED:
            value = self.settings.get(name, DEFAULTS[name])
            if value != DEFAULTS[name]:
                words.append(f"{name}={value}")
        self.layer = " ".join(words)
        self.losses = np.array([run["evals"][-1]["val_loss"] for run in runs])
        self.bits = np.array([run["evals"][-1]["val_bits_per_byte"] for run in runs])
        self.loss = float(self.losses.mean())
        self.seeds = [run["settings"]["seed"] for run in runs]
        # Seconds of one kind of machine. Their median, for a program may have run beside.
        seconds = [run["seconds"] for run in runs if run["machine"] == machine and run["seconds"]]
        self.seconds = statistics.median(seconds) if seconds else None

    def less(self, other: "Group") -> tuple[float, float]:
        """The difference of two losses, and half its interval, over the seeds that both have: runs
        of one seed see the same batches. Without two such seeds, that of the means."""
        other_losses = dict(zip(other.seeds, other.losses))
        differences = []
        for seed, loss in zip(self.seeds, self.losses):
            if seed in other_losses:
                differences.append(loss - other_losses[seed])
        if len(differences) < 2:
            return self.loss - other.loss, math.nan
        return over_seeds(np.array(differences))


def group_runs(runs: list[dict]) -> list[Group]:
    """Groups of the finished runs, where there are any, and each once; the lowest loss first.

    Losses on different text, or on windows of different lengths, must not be compared.
    """
    members = defaultdict(dict)     # by what they have in common: runs by seed
    measured = {}                   # a run for each way of measuring
    compared = [run for run in runs if is_finished(run)] or runs
    for run in compared:
        settings = run["settings"]
        members[group_key(run)].setdefault(settings["seed"], run)
        how = (run["data"]["fingerprint"], settings["block_size"], settings["eval_sequences"])
        measured[how] = run["run"]
    if len(measured) > 1:
        raise SystemExit("analyze.py: runs that are not comparable: their data, block_size and "
                         f"eval_sequences are {measured}")
    left_out = len(runs) - sum(map(len, members.values()))
    if left_out:
        progress(f"{left_out} runs left out: not finished, or the same as another")
    [(machine, _)] = Counter(run["machine"] for run in compared).most_common(1)
    groups = [Group(list(by_seed.values()), machine) for by_seed in members.values()]
    return sorted(groups, key=lambda group: group.loss)


def best_groups(groups: list[Group]) -> dict[tuple[str, float], Group]:
    """{(layer, budget): the best group}, the smallest budget first.

    It has the most seeds, so that the luck of a single one does not win against a mean; of several
    such groups it has the lowest loss.
    """
    best = {}
    for group in sorted(groups, key=lambda group: (group.budget, len(group.runs), -group.loss)):
        best[group.layer, group.budget] = group     # the last one stays
    return best


def sizes_of(group: Group, groups: list[Group]) -> str:
    """The settings by which the groups differ, as far as this one has them."""
    words = []
    for name, value in group.settings.items():
        values = {repr(other.settings.get(name)) for other in groups}
        if len(values) > 1 and name not in ("ffn", *VARIED):
            words.append(f"{name}={value}")
    return " ".join(words)


def group_rows(groups: list[Group], budget: float) -> list[list]:
    """The groups of a budget, beside sgatlin's best."""
    best = best_groups(groups)
    ours = best.get(("sgatlin", budget))
    rows = []
    for group in groups:
        if group.budget != budget:
            continue
        star = "*" if group is best[group.layer, budget] else ""
        difference = "-"
        ratio = None
        if ours and ours is not group:
            mean, half = ours.less(group)
            difference = interval(mean, half)
            ratio = math.exp(mean)
        used = np.mean([run["evals"][-1].get("used", []) for run in group.runs], axis=0)
        used = " ".join(f"{share:.2f}" for share in used)       # no MLP's
        loss = interval(*over_seeds(group.losses))
        bits = interval(*over_seeds(group.bits))
        flops = f"{group.last['flops']:.3g}"
        rows.append([star, group.layer, sizes_of(group, groups), len(group.runs),
                     group.last["step"], flops, group.seconds, loss, bits, difference, ratio,
                     used])
    return rows


def bits_after(elapsed: float, best: list[Group]) -> str:
    """Bits per byte of a layer, between its groups, on a logarithmic axis of seconds: on a line for
    each seed that all these groups have, or, without two such seeds, on one through the means."""
    by_seed = []
    for group in best:
        by_seed.append(dict(zip(group.seeds, group.bits)))
    common = set.intersection(*map(set, by_seed))
    lines = [[bits[seed] for bits in by_seed] for seed in common]
    if len(lines) < 2:
        lines = [[group.bits.mean() for group in best]]
    seconds = np.log([group.seconds for group in best])
    found = [np.interp(math.log(elapsed), seconds, line) for line in lines]
    return interval(*over_seeds(np.array(found)))


def show_same_seconds(groups: list[Group]) -> None:
    """At both ends and in the middle of the time that the layers with several budgets cover."""
    timed = [group for group in best_groups(groups).values() if group.budget and group.seconds]
    lines = defaultdict(list)       # by layer
    for group in sorted(timed, key=lambda group: group.seconds):
        lines[group.layer].append(group)
    lines = {layer: of_layer for layer, of_layer in lines.items() if len(of_layer) > 1}
    start = max((of_layer[0].seconds for of_layer in lines.values()), default=math.inf)
    end = min((of_layer[-1].seconds for of_layer in lines.values()), default=0)
    if start >= end:
        return
    rows = []
    for elapsed in np.geomspace(start, end, 3):
        rows.append([f"{elapsed:.0f}", *(bits_after(elapsed, best) for best in lines.values())])
    show("Bits per byte after the same seconds", ["seconds", *lines], rows)


def draw_curves(groups: list[Group], path: Path) -> None:
    """The best groups of each layer by budget, means with intervals; and the losses of every run
    against steps, FLOPs and seconds."""
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots
    loss = "validation loss, nats per token"
    # By the titles of x and y, the layer, and the run (None: a mean): (x, y, half its interval).
    lines = defaultdict(list)
    for (layer, budget), group in best_groups(groups).items():
        if budget:
            point = (budget, *over_seeds(group.losses))
            lines["FLOPs of training", loss, layer, None].append(point)
            point = (group.seconds, *over_seeds(group.bits))
            lines["seconds of training", "bits per byte", layer, None].append(point)
    for group in groups:
        for run in group.runs:
            for entry in run["evals"]:
                if entry["step"] == 0:
                    continue            # logarithmic axes have no 0
                places = dict(step=entry["step"], flops=entry["flops"])
                if group.seconds:
                    places["seconds"] = group.seconds * entry["step"] / group.last["step"]
                for name, place in places.items():
                    point = (place, entry["val_loss"], None)
                    lines[name, loss, group.layer, id(run)].append(point)
    panels = list(dict.fromkeys(line[:2] for line in lines))
    if not panels:
        return
    figure = make_subplots(rows=len(panels), cols=1)
    figure.update_layout(template="plotly_white", height=480 * len(panels))
    colours = {}
    for (x_title, y_title, layer, run_id), points in lines.items():
        x, y, half = zip(*points)
        mode = "lines+markers" if run_id is None else "lines"
        at = dict(row=panels.index((x_title, y_title)) + 1, col=1)
        new = layer not in colours
        colour = colours.setdefault(layer, qualitative.D3[len(colours) % 10])
        figure.update_xaxes(title=x_title, type="log", **at)
        figure.update_yaxes(title=y_title, **at)
        figure.add_scatter(x=x, y=y, error_y=dict(array=half, width=0), mode=mode, name=layer,
                           legendgroup=layer, showlegend=new, marker_color=colour, **at)
    write_page(path, figure.to_html())


def show_curves(args: argparse.Namespace) -> None:
    """The losses of runs, and their differences, over seeds."""
    path = place_for(args.out_dir, "curves.html")
    runs = list(itertools.chain(*map(read_runs, args.runs)))
    if not runs:
        raise SystemExit("analyze.py: none of these is a run of train.py with an evaluation")
    groups = group_runs(runs)
    if has_plotly():        # first: `| head` ends this program
        draw_curves(groups, path)
    for budget in sorted({group.budget for group in groups}):
        show(f"{budget:g} FLOPs" if budget else "Runs without --flops",
             ["best", "layer", "settings that differ", "seeds", "steps", "FLOPs", "seconds", "loss",
              "bits per byte", "sgatlin less it", "ratio", "used"],
             group_rows(groups, budget))
    show_same_seconds(groups)
    print("\nLosses after the last step, 95 % intervals over seeds by Student's t. A star: the "
          "best of a layer, among those with the most seeds. Ratio: of perplexities, below 1 in "
          "sgatlin's favour. Used: the neurons, layer by layer, that the validation windows use.")


# --------------------------------------------------------------------------------------------------
# report: a page with a passage and a map whose tokens can be clicked, and what is known of each

def token_items(run: Run, source: Recording, places: list[int]) -> list[dict]:
    """What the page says of tokens at places of a recording: its text, and, layer by layer, the
    nearest circuits [place, distance] and the neurons [row, product]."""
    near = []
    neurons = []
    for layer in range(run.cfg.n_layer):
        near.append(nearest_circuits(run, source, places, layer))
        products = source.products[layer, places]                               # (M, J)
        order = products.abs().argsort(dim=1, descending=True, stable=True)
        order = order[:, :SHOWN]
        rows = source.rows[layer, places].gather(1, order).tolist()
        values = products.gather(1, order).tolist()
        neurons.append([list(zip(*of_token)) for of_token in zip(rows, values)])
    items = []
    for place, of_near, of_neurons in zip(places, zip(*near), zip(*neurons)):
        items.append(dict(text=run.shown(source, place), near=of_near, neurons=of_neurons))
    return items


def map_places(tokens: np.ndarray) -> list[int]:
    """Of each of the 100 most frequent tokens at most 10 places, at random."""
    rng = np.random.default_rng(0)
    places = []
    for token, _ in Counter(tokens.ravel().tolist()).most_common(100):
        of_token = rng.permutation(np.flatnonzero(tokens == token))
        places += of_token[:10].tolist()
    return places


def map_item(run: Run, layer: int, places: list[int]) -> dict:
    """UMAP of the cosine distances of circuits (the paper's Figure 6): the coordinates, what to
    show of the axes, and the names of the most frequent tokens, each amid its points."""
    from sklearn.metrics.pairwise import cosine_distances
    from umap import UMAP
    progress(f"map {len(places)} circuits of layer {layer}")
    distances = cosine_distances(run.trained.circuits(layer).at(places).dense().numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # distances have no inverse, a seed means one thread
        xy = UMAP(metric="precomputed", random_state=0).fit_transform(distances)        # (M, 2)
    low, high = np.percentile(xy, [4, 96], axis=0)          # a few far points would squeeze all
    margin = 0.15 * (high - low)
    tokens = run.trained.tokens.ravel()[places]
    names = []
    for token in list(dict.fromkeys(tokens.tolist()))[:40]:
        middle = np.median(xy[tokens == token], axis=0)
        names.append([run.name(token).strip("·"), *middle.tolist()])
    return dict(xy=xy.tolist(), low=(low - margin).tolist(), high=(high + margin).tolist(),
                names=names)


def page_data(run: Run, tokens: list[int], with_map: bool) -> dict:
    """All that the page can show, as JSON holds it."""
    source = record(run.model, torch.tensor([tokens]))
    passage = token_items(run, source, list(range(len(tokens))))
    neurons = defaultdict(set)      # by layer: the rows of those shown
    for t, item in enumerate(passage):
        found = explain(run.model, tokens[:t + 1])
        strong = strongest(found, SHOWN)
        item["why"] = dict(target=found.target, logit=found.logit,
                           shares=found.token_shares.tolist(), neurons=strong)
        for layer, _, row, *_ in strong:
            neurons[layer].add(row)
    points = []
    maps = []
    classes = []
    if with_map:
        places = map_places(run.trained.tokens)
        points = token_items(run, run.trained, places)
        maps = [map_item(run, layer, places) for layer in range(run.cfg.n_layer)]
        of_token, classes = context_classes(run)
        for point, place in zip(points, places):
            point["label"] = int(of_token[run.trained.tokens.flat[place]])
    seen = set()                    # the places of excerpts
    for item in passage + points:
        for layer in range(run.cfg.n_layer):
            neurons[layer].update(row for row, _ in item["neurons"][layer])
            seen.update(place for place, _ in item["near"][layer])
    cards = {}                      # by "layer row"
    for layer, rows in neurons.items():
        for row, card in zip(rows, neuron_cards(run, layer, list(rows))):
            cards[f"{layer} {row}"] = card
            seen.update(place for _, place in card["excerpts"])
    texts = {place: run.shown(run.trained, place) for place in seen}
    names = [run.name(token) for token in range(run.cfg.vocab_size)]
    return dict(
        layer=run.layer(None),
        per_channel=run.cfg.n_experts,
        passage=passage,
        points=points,
        maps=maps,
        classes=classes,
        cards=cards,
        texts=texts,
        names=names)


def page(title: str, data: dict, plotly_js: str) -> str:
    """A page that loads nothing: its elements, its data and its script, which fills them."""
    # Three decimals are enough. Without "<" no text in the data can end its script element.
    data = json.loads(json.dumps(data), parse_float=lambda number: round(float(number), 3))
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(title)
    return f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{PAGE_STYLE}</style>
<script>{plotly_js}</script></head><body><h1>{title}</h1>
<p>Click a token, or move with the arrow keys: the circuits nearest to its own, the neurons it
chooses, and what the text so far adds to the prediction. Points of the map can be clicked, too.</p>
<main><div id="left"><div class="box"><div id="passage" role="group" aria-label="passage"></div>
<div id="legend" class="quiet" aria-live="polite"></div></div>
<div id="mapping" class="box"><div id="map"></div><p class="quiet">Map: UMAP of the circuits of at
most 10, at random, of each of the 100 most frequent tokens; near points have like gates. Colours
are classes of tokens that occur in like contexts, a word stands in the middle of its own points.
Click a class to hide it, twice to see it alone.</p>
</div></div>
<div id="panel" class="box"><select id="view" aria-label="layer"></select><div id="details"></div>
</div></main><script type="application/json" id="data">{text}</script>
<script>{PAGE_SCRIPT}</script></body></html>"""


def show_report(args: argparse.Namespace) -> None:
    """A page to click: a passage, a map, circuits and neurons (the default)."""
    run = run_of(args)
    path = place_for(args.out_dir, "report.html")
    plotly_js = ""
    try:
        import umap  # noqa: F401
        from plotly.offline import get_plotlyjs
        plotly_js = get_plotlyjs()
    except ImportError as error:
        progress(f"no map: pip install plotly umap-learn ({error})")
    data = page_data(run, run.prompt(args.prompt), bool(plotly_js))
    write_page(path, page(f"sgatlin: report of {args.out_dir}", data, plotly_js))


PAGE_STYLE = """
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f6f7f9; margin: 0 auto;
       max-width: 1400px; padding: 0 20px 40px }
h1 { font-size: 21px; margin: 16px 0 2px } h3 { font-size: 14px; margin: 16px 0 4px }
p { margin: 4px 0 12px } .quiet { color: #667180; font-size: 13px }
mark { background: #ffe08a; border-radius: 2px }
main { display: flex; gap: 14px; align-items: flex-start }
#left { flex: 3; min-width: 0; display: flex; flex-direction: column; gap: 14px }
.box { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 12px 16px }
#panel { flex: 2; min-width: 0; position: sticky; top: 12px; max-height: calc(100vh - 24px);
         overflow: auto }
#passage { font-size: 18px; line-height: 1.65; white-space: pre-wrap; overflow-wrap: anywhere }
#passage span { cursor: pointer; border-radius: 3px; padding: 2px 0 }
#passage .chosen, #passage span:hover, #passage span:focus { outline: 2px solid #1c2430 }
#map { height: 640px }
select { font: inherit; font-size: 14px; padding: 2px 8px; margin-bottom: 8px }
.row { display: flex; gap: 10px; padding: 3px 0; border-bottom: 1px solid #eef0f3;
       font-size: 14px; line-height: 1.35 }
.row > :first-child { flex: 0 0 3.2em; text-align: right; font-variant-numeric: tabular-nums }
.excerpt { white-space: pre-wrap; overflow-wrap: anywhere } summary { cursor: pointer }
summary.row:hover { background: #f3f5f8 } details[open] > summary { font-weight: 600 }
.card { border-left: 3px solid #b9c1cb; margin: 4px 0 12px 8px; padding-left: 12px }
.word { display: inline-block; background: #eef1f5; border-radius: 4px; padding: 0 6px;
        margin: 0 4px 3px 0; font-size: 13px; white-space: pre }
@media (max-width: 900px) {
  body { padding: 0 8px 40px }
  main { flex-direction: column; align-items: stretch }
  #left { display: contents }
  #panel { position: static; max-height: none } #mapping { order: 1 }
}
"""
PAGE_SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [passage, legend, map, view, details] =
  ["passage", "legend", "map", "view", "details"].map(id => document.getElementById(id));
let shown = null;       // the item of the panel: a token of the passage, or a point of the map

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}
const signed = value => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const neuronName = row => Math.floor(row / data.per_channel) + ":" + row % data.per_channel;
const excerpt = ([before, token, after, next]) => make("div", "excerpt",
  before, make("mark", "", token), after, make("div", "quiet", next));

function words(title, pairs) {
  return make("div", "", make("span", "quiet", title + " "), ...pairs.map(([token, value]) =>
    make("span", "word", data.names[token] + " " + signed(value))));
}
function card(of) {
  return make("div", "card",
    make("div", "quiet", (100 * of.use).toFixed(1) + " % of tokens choose it"),
    words("promotes", of.promotes), words("suppresses", of.suppresses), words("reads", of.reads),
    make("div", "quiet", "Where gate × reading is largest; where that is negative, it promotes " +
         "what it otherwise suppresses:"),
    ...of.excerpts.map(([product, place]) =>
      make("div", "row", make("span", "", signed(product)), excerpt(data.texts[place]))));
}
// A neuron that adds product * w_out; opened, it shows its card.
function neuronRow(value, label, atLayer, row, product) {
  const of = data.cards[atLayer + " " + row];
  const writes = (product < 0 ? of.suppresses : of.promotes).slice(0, 5);
  const said = make("span", "quiet", "  " + writes.map(([token]) => data.names[token]).join(" "));
  return make("details", "", make("summary", "row", make("span", "", signed(value)),
                                  make("span", "excerpt", label, said)), card(of));
}
function render() {
  const l = view.value, why = shown.why;
  const parts = [excerpt(shown.text), make("h3", "", `Nearest circuits, layer ${l}`)];
  for (const [place, distance] of shown.near[l])
    parts.push(make("div", "row", make("span", "quiet", distance.toFixed(2)),
                    excerpt(data.texts[place])));
  parts.push(make("h3", "", `Its neurons in layer ${l}`), make("div", "quiet",
    "Gate × reading, channel:neuron, and the tokens it promotes here. Open one."));
  for (const [row, product] of shown.neurons[l])
    parts.push(neuronRow(product, neuronName(row), l, row, product));
  if (why) {
    parts.push(make("h3", "", `What carries “${data.names[why.target]}”`), make("div", "quiet",
      "Neurons that add most to its logit: share, layer, at which token, channel:neuron."));
    for (const [atLayer, at, row, share, product] of why.neurons)
      parts.push(neuronRow(share, `${atLayer}  ${data.passage[at].text[1]}  ${neuronName(row)}`,
                           atLayer, row, product));
  }
  details.replaceChildren(...parts);
  const shares = why ? why.shares : [];
  const largest = Math.max(...shares.map(Math.abs));
  [...passage.children].forEach((token, i) => {
    const chosen = shown === data.passage[i], share = shares[i] || 0;
    const strength = share ? 0.7 * Math.sqrt(Math.abs(share) / largest) : 0;
    token.style.background = `rgba(${share < 0 ? "245,120,20" : "50,130,245"},${strength})`;
    token.title = i < shares.length ? signed(share) : "";
    token.classList.toggle("chosen", chosen);
    token.setAttribute("aria-pressed", chosen);
    token.tabIndex = chosen ? 0 : -1;
  });
  legend.textContent = why ? "Shaded: what each token adds to the logit of “" +
    `${data.names[why.target]}”, blue for it, orange against it; they add up to ` +
    `${signed(why.logit)} over the mean logit.` : "";
}
function show(item) {
  shown = item;
  details.parentElement.scrollTop = 0;
  render();
}

data.passage.forEach((item) => {
  const text = item.text[1].replace("<|endoftext|>", "▸").replaceAll("⏎", "⏎\n");
  const token = make("span", "", text);
  token.setAttribute("role", "button");
  token.addEventListener("click", () => show(item));
  passage.append(token);
});
passage.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const next = passage.children[data.passage.indexOf(shown) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
  next.click();
});

// The map, drawn anew for each view. Plotly reads tags in its texts.
const plain = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
// Colours that can be told apart also side by side; the last, grey, is for rare tokens.
const colours = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#f781bf",
                 "#222222", "#17becf", "#d4b400", "#7fd87f", "#0b2f8c", "#aaaaaa"];
function drawMap() {
  const { xy, names, low, high } = data.maps[view.value];
  const traces = data.classes.map((name, c) => {
    const own = data.points.map((_, i) => i).filter(i => data.points[i].label === c);
    return { mode: "markers", name: plain(name), customdata: own, hoverinfo: "text",
             x: own.map(i => xy[i][0]), y: own.map(i => xy[i][1]),
             hovertext: own.map(i => plain(data.points[i].text.slice(0, 3).join(""))),
             marker: { size: 7, opacity: 0.6, color: colours[c] },
             selected: { marker: { size: 18, opacity: 1 } },
             unselected: { marker: { opacity: 0.6 } } };
  }).filter(trace => trace.x.length);
  traces.push({ mode: "text", x: names.map(n => n[1]), y: names.map(n => n[2]),
                text: names.map(n => plain(n[0])), hoverinfo: "skip", showlegend: false,
                textfont: { size: 13, color: "#111", shadow: "0 0 3px #fff, 0 0 3px #fff" },
                unselected: { textfont: { color: "#111" } } });
  const axis = i => ({ range: [low[i], high[i]], showticklabels: false, zeroline: false,
                       showgrid: false });
  Plotly.react(map, traces, {
    margin: { l: 0, r: 0, t: 30, b: 0 }, clickmode: "event+select", xaxis: axis(0), yaxis: axis(1),
    // A finger that drags scrolls the page.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "pan",
    legend: { orientation: "h", font: { size: 11 }, entrywidth: 0.49,
              entrywidthmode: "fraction" } },
    { responsive: true, displaylogo: false,
      modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d"]] });
}

data.passage[0].near.forEach((_, l) => view.append(new Option("layer " + l, l)));
view.value = data.layer;
view.addEventListener("change", render);
if (data.points.length) {
  drawMap();
  view.addEventListener("change", drawMap);
  map.on("plotly_click", event => show(data.points[event.points[0].customdata]));
} else {
  document.getElementById("mapping").remove();
}
show(data.passage[Math.floor(data.passage.length / 2)]);
"""


# --------------------------------------------------------------------------------------------------
# the command line

def a_path(text: str) -> Path:
    return Path(text).expanduser()


OPTIONS = {
    "--out_dir": dict(
        type=a_path,
        default=Path("out"),
        help="folder of the run, and of the pages written (default: out)"),
    "--data_dir": dict(type=a_path, help="folder of its data (default: where it was)"),
    "--device": dict(
        choices=CHOICES["device"],
        default=TrainConfig.device,
        help="(default: cuda if there is one)"),
    "--windows": dict(type=int, default=128, help="of validation text to record (default: 128)"),
    "--layer": dict(type=int, help="(default: the last but one)"),
    "--prompt": dict(help="text to look at (default: a passage of the validation text)"),
    "--template": dict(
        required=True,
        help="text with {} for a word that differs between prompts, such as 'The {} was' or "
             "'from {} import'"),
    "--facts": dict(
        help="'word: answer,word: answer,...' (default: those of the training text); the paper's: "
             "'ground: icy,turtle: slow,door: open,doctor: nice,wind: strong,food: ready,lake: big,"
             "mum: proud'"),
    "--token": dict(help="the next token to explain, such as ' girl' (default: the likeliest)"),
    "--against": dict(help="a token to compare it with (default: the mean logit)"),
    "--controls": dict(
        action="store_true",
        help="also switch neurons off, and compare with what their shares predict"),
    "layer": dict(type=int),
    "neuron": dict(metavar="channel:neuron"),
    "--steps": dict(type=int, help="of training (default: mimic 600, redistribute 10000 at most)"),
    "runs": dict(
        nargs="+",
        type=a_path,
        metavar="RUN",
        help="folder of a run, its log, or a file that keep wrote"),
}
MODEL = ["--out_dir", "--data_dir", "--device"]
READING = [*MODEL, "--windows", "--layer"]
COMMANDS = {    # name: (function, whose docstring is the help, and options)
    "report": (show_report, [*MODEL, "--windows", "--prompt"]),
    "neighbors": (show_neighbors, [*READING, "--prompt"]),
    "classes": (show_classes, READING),
    "usage": (show_usage, READING),
    "patch": (show_patch, [*MODEL, "--template", "--facts"]),
    "explain": (show_explain, [*MODEL, "--prompt", "--token", "--against", "--controls"]),
    "neuron": (show_neuron, [*MODEL, "--windows", "layer", "neuron"]),
    "mimic": (show_mimic, [*READING, "--steps"]),
    "redistribute": (show_redistribute, ["--device", "--steps"]),
    "curves": (show_curves, ["--out_dir", "runs"]),
    "keep": (show_keep, ["runs"]),
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Without a command it is report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (function, options) in COMMANDS.items():
        aliases = ["isoflop"] if name == "curves" else []       # what the paper calls it
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__,
                                      aliases=aliases, allow_abbrev=False)
        command.set_defaults(function=function)
        for option in options:
            command.add_argument(option, **OPTIONS[option])
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["report", *argv]
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    plain_output()
    args.function(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:         # of `analyze.py ... | head`, which has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
