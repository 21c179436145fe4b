"""Read the circuits of a trained sgatlin (arXiv 2606.07414, section 4), and compare it with other layers.

    python analyze.py                                         # all of it on out/: a summary, out/report.html
    python analyze.py neighbors --prompt "def __init__(self"  # the circuits most like those of a text
    python analyze.py map                                     # circuits in the plane: do near ones agree?
    python analyze.py usage                                   # which neurons are used, and which together
    python analyze.py patch --template "from {} import"       # the gates of one prompt in another
    python analyze.py mimic --teacher=out-mlp                 # is a dense layer a sparse one in disguise?
    python analyze.py redistribute                            # do sparse layers leave more to attention?
    python analyze.py curves out other/log.jsonl              # loss against steps, tokens, FLOPs, seconds
    python analyze.py isoflop runs/*                          # at equal training FLOPs, which model is best?

A circuit is the sparse vector of a token's gates in one layer: C*k scores among C*E neurons. Layers and
channels count from 0, as in model.blocks. Every command prints its tables and writes COMMAND.html and
COMMAND.json to out_dir. The pictures need plotly, and the map is better with umap-learn.

Letters: W windows, T time, N = W*T tokens, L layers, C channels, E neurons a channel, n = sqrt(E) sub-keys,
k top_k, J = C*k, R = C*E rows, Q queries, M points of a map, F facts, V vocabulary.
"""
import argparse
import builtins
import concurrent.futures
import contextlib
import functools
import html
import importlib
import itertools
import json
import keyword
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from model import GPT, MLP, PEER, GPTConfig, Router, SparselyGatedLinear, load_checkpoint
from sample import load_model
from train import Data, TrainConfig, keep_memory

NEIGHBORS = 10      # shown and scored per circuit, as in the paper
CONTEXT = 8         # tokens, up to the one in question: circuits in equal contexts are no news to each other
Circuits = tuple[Tensor, Tensor]    # scores (N, J), and their rows (N, J) in a table of R: sparse vectors
TEMPLATES = {"python": "from {} import", "tinystories": "The {} was"}   # of facts, by the source of the data


# -----------------------------------------------------------------------------------------------------------
# results: tables for the terminal, pictures for the report, every number in the JSON file

class Estimate(NamedTuple):
    """A mean and half its 95% confidence interval, or, where said, the standard deviation; None: unknown."""
    mean: float | None
    half: float | None


def jackknife(mean: Callable[[np.ndarray], float], units: int) -> Estimate:
    """mean of all units, its interval from leaving out each in turn; mean takes the mask of those to keep.

    Units are windows or facts: tokens of one window, and pairs with a fact in common, are not independent.
    """
    values = np.array([mean(keep) for keep in ~np.eye(units, dtype=bool)])
    half = 1.96 * math.sqrt((units - 1) / units * np.square(values - values.mean()).sum())
    return Estimate(None, None) if math.isnan(half) else Estimate(float(mean(np.full(units, True))), half)


def cell(value) -> str:
    if value is None:       # a log may lack it: no step was trained yet, or an older train.py wrote it
        return "-"
    if isinstance(value, tuple | list):     # an Estimate, which JSON makes a list
        return "-" if value[0] is None else "{:.3f} ± {:.3f}".format(*value)
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


@dataclass
class Section:
    """A part of the report. A figure is plotly's, as plain data: {"data": [...], "layout": {...}}."""
    title: str
    text: str                                                                       # how to read it
    tables: list[tuple[str, list[str], list[list]]] = field(default_factory=list)   # caption, header, rows
    figures: list[dict] = field(default_factory=list)

    def print(self, most_rows: int) -> None:
        print(f"\n== {self.title} ==\n{self.text}")
        for caption, header, rows in self.tables:
            cells = [header, *([cell(value) for value in row] for row in rows[:most_rows])]
            widths = [max(map(len, column)) for column in zip(*cells)]
            print(f"\n{caption}")
            for row in cells:
                print("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
            if len(rows) > most_rows:
                print(f"  and {len(rows) - most_rows} more rows in the report")


def figure(data: list[dict], title: str, height: int, **layout) -> dict:
    return dict(data=data, layout=dict(title=dict(text=title), height=height, **layout))


def bars(name: str, values: dict[str, Estimate]) -> dict:
    return dict(type="bar", name=name, x=list(values), y=[v.mean for v in values.values()],
                error_y=dict(type="data", array=[v.half for v in values.values()]))


def axis(title: str, **settings) -> dict:
    return dict(title=dict(text=title), **settings)


def panels(points: dict[str, list[dict]], axes: list[tuple[dict, dict]], title: str, height: int) -> dict:
    """Scatter plots in two columns, each of this height and with its own x and y axis of axes.

    A name has one colour, one place in the legend, and its points {"x": ..., "y": ...} in each of the plots.
    """
    data, rows = [], math.ceil(len(axes) / 2)
    layout = {f"{x}axis{i}": shape for i, pair in enumerate(axes, 1) for x, shape in zip("xy", pair)}
    for c, (name, parts) in enumerate(points.items()):
        colour = f"hsl({c * 137.5 % 360:.0f}, 65%, {40 + c % 3 * 10}%)"     # steps of the golden angle
        data += [dict(type="scatter", mode="lines+markers", name=name, legendgroup=name, showlegend=i == 1,
                      xaxis=f"x{i}", yaxis=f"y{i}", marker=dict(color=colour, size=5)) | part
                 for i, part in enumerate(parts, 1)]
    grid = dict(rows=rows, columns=min(len(axes), 2), pattern="independent")
    return figure(data, title, height * rows, grid=grid, **layout)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><link rel="icon" href="data:,"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h2 { margin-top: 2.5em; border-top: 1px solid #ddd; padding-top: 1em } h4 { margin: 1.6em 0 .4em }
p { max-width: 52em } nav a { margin-right: 1.2em } mark { background: #ffe08a }
input { float: right; padding: 3px 8px; width: 20em } .table { max-height: 460px; overflow: auto }
table { border-collapse: collapse; font: 13px/1.5 ui-monospace, monospace; width: 100% }
th { position: sticky; top: 0; background: #f0f0f0; text-align: left }
td, th { padding: 3px 10px; border-bottom: 1px solid #eee; white-space: pre-wrap; vertical-align: top }
</style><script>PLOTLY</script></head><body><h1>TITLE</h1><nav>LINKS</nav>
BODY<script>
for (const box of document.querySelectorAll("input")) box.addEventListener("input", () => {
  for (const row of box.parentElement.querySelector("tbody").rows)
    row.hidden = !row.textContent.toLowerCase().includes(box.value.toLowerCase());
});
for (const div of document.querySelectorAll("[data-figure]")) {
  const figure = JSON.parse(div.dataset.figure);
  Plotly.newPlot(div, figure.data, figure.layout, {responsive: true, displaylogo: false});
}
</script></body></html>
"""


def page(title: str, sections: list[Section], plotly: str) -> str:
    """The report as one HTML page that loads nothing; plotly is the text of plotly.js."""
    esc, body, links = html.escape, [], []
    for i, section in enumerate(sections):
        links.append(f'<a href="#s{i}">{esc(section.title)}</a>')
        body.append(f'<h2 id="s{i}">{esc(section.title)}</h2><p>{esc(section.text)}</p>')
        body += [f'<div data-figure="{esc(json.dumps(figure))}"></div>' for figure in section.figures]
        for caption, header, rows in section.tables:
            head = "".join(f"<th>{esc(name)}" for name in header)
            cells = "\n".join("<tr>" + "".join(f"<td>{esc(cell(value))}" for value in row) for row in rows)
            cells = cells.replace("»", "<mark>").replace("«", "</mark>")
            body.append(f'<div><input placeholder="search"><h4>{esc(caption)}</h4><div class="table"><table>'
                        f"<thead><tr>{head}</thead><tbody>{cells}</tbody></table></div></div>")
    parts = dict(TITLE=esc(title), LINKS="".join(links), BODY="\n".join(body), PLOTLY=plotly)
    return re.sub("|".join(parts), lambda match: parts[match[0]], PAGE)


def extra(name: str, attribute: str) -> tuple[object | None, str]:
    """attribute of an optional package and "", or None and why there is none. Any failure of its import
    counts: it may be another package of that name, or have a dependency that does not load."""
    try:
        return getattr(importlib.import_module(name), attribute), ""
    except Exception as error:      # what an import runs is not ours, and can fail in any way
        return None, f"{name} has failed to import: {type(error).__name__}: {error}"


def progress(text: str) -> None:
    """On stderr, so that `analyze.py ... | head` stops no computing."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def replace(path: Path, text: str) -> None:
    """Writes text to path, which holds the old text or the new one at any time."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# -----------------------------------------------------------------------------------------------------------
# the model, its text and its gates

class Subject:
    """A run of train.py, and what is computed about it once. ValueErrors are the user's."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device, self.path = args, args.device, (args.teacher or args.out_dir) / "ckpt.pt"
        self.model, self.encoding = load_model(self.path, self.device)
        self.cfg = cfg = self.model.cfg
        if cfg.ffn != "mlp" and args.command == "mimic":
            raise ValueError(f"{self.path} has ffn={cfg.ffn}, mimic needs an mlp: python train.py --ffn=mlp "
                             "--out_dir=out-mlp trains one, then give --teacher=out-mlp")
        if cfg.ffn != "sgatlin" and args.command != "mimic":
            raise ValueError(f"{self.path} has ffn={cfg.ffn}: only the gates of an sgatlin are its circuits")
        if cfg.softmax_gates or cfg.shared_pool:
            raise ValueError(f"{self.path} has softmax_gates or shared_pool: circuits are read from raw "
                             "gates and one pool per channel")
        saved, fields = load_checkpoint(self.path), TrainConfig.__dataclass_fields__
        settings = {name: value for name, value in saved["config"].items() if name in fields}
        self.data = Data(TrainConfig(**settings | dict(eval_sequences=args.windows)))
        if self.data.meta["fingerprint"] != saved["data"]["fingerprint"]:
            raise ValueError(f"{self.data.folder} is not what {self.path} was trained on: prepare that again")
        self.source = self.data.meta["source"].split()[0]
        default = cfg.n_layer // 2 if args.command == "mimic" else max(cfg.n_layer - 2, 0)
        self.layer = default if args.layer is None else args.layer
        if not 0 <= self.layer < cfg.n_layer or not 0 <= (args.channel or 0) < cfg.n_channels:
            raise ValueError(f"--layer goes from 0 to {cfg.n_layer - 1}, --channel to {cfg.n_channels - 1}")
        self.umap, self.no_umap = (extra("umap", "UMAP") if args.command in ("report", "map")
                                   else (None, ""))     # slow to import
        self.channels = "all channels" if args.channel is None else f"channel {args.channel}"

    @functools.cached_property
    def trained(self) -> "Recording":
        windows, _ = self.data.windows("val", self.data.val_batch(), torch.device("cpu"))
        return record(self.model, windows, "the trained model")

    @functools.cached_property
    def untrained(self) -> "Recording":
        """The control: the same windows through the model as it was before its first step."""
        torch.manual_seed(self.data.cfg.seed)
        model = GPT(self.cfg).to(self.device).eval()
        return record(model, torch.from_numpy(self.trained.tokens), "an untrained model")

    @functools.cached_property
    def classes(self) -> dict[str, list[str]]:
        """Classes of the recorded tokens, (N,) each, under the name of the way to find them."""
        kinds = {"kind": python_kinds(self)} if self.source == "python" else {}
        return kinds | {"context class": context_classes(self)}

    def circuits(self, recording: "Recording", layer: int) -> Circuits:
        """Gates (N, J), scaled to unit length, and rows (N, J); J = k where --channel chooses one."""
        c, k = self.args.channel, self.cfg.top_k
        part = slice(None) if c is None else slice(c * k, c * k + k)
        gates, rows = recording.gates[layer, :, part], recording.rows[layer, :, part].contiguous()
        return gates / gates.norm(dim=1, keepdim=True).clamp(min=1e-12), rows

    def tokens(self, part: str) -> np.ndarray:
        return np.memmap(self.data.folder / f"{part}.bin", dtype=self.data.meta["dtype"], mode="r")

    def text(self, tokens) -> str:
        """Token ids on one line: ⏎ is a newline, and a run of blanks is two."""
        text = self.encoding.decode([int(t) for t in tokens if t < self.encoding.n_vocab])
        return re.sub("  +", "  ", text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥"))

    def name(self, token: int) -> str:
        return self.text([token]).replace(" ", "·")

    def excerpt(self, windows: np.ndarray, i: int) -> str:
        """Token i of windows (W, T), counted through all of them, marked in its text."""
        w, t = divmod(i, windows.shape[1])
        spans = (max(t - CONTEXT + 1, 0), t), (t, t + 1), (t + 1, t + 5)
        return "{}»{}«{}".format(*(self.text(windows[w, a:b]) for a, b in spans))

    def predictions(self, recording: "Recording", i: int) -> str:
        top = zip(recording.top[i].tolist()[:3], recording.p[i].tolist())
        return "  ".join(f"{self.name(token)} {p:.2f}" for token, p in top)


@contextlib.contextmanager
def router_hook(model: GPT, hook: Callable):
    """hook(layer, gates (N, C, k), ids (N, C, k)) sees every routing; one that it returns replaces it."""
    with contextlib.ExitStack() as stack:
        for i, block in enumerate(model.blocks):
            stack.enter_context(block.ffn.router.register_forward_hook(
                lambda module, args, out, i=i: hook(i, *out)))
        yield


@dataclass
class Recording:
    """What a model did on windows of text; its N tokens in the order of the windows."""
    tokens: np.ndarray      # (W, T)
    gates: Tensor           # (L, N, J) float32
    rows: Tensor            # (L, N, J) int32: the neurons, c * E + id
    top: Tensor             # (N, 5) the likeliest next tokens
    p: Tensor               # (N, 5) their probabilities
    embedding: Tensor       # (V, D) of the model


@torch.inference_mode()
def record(model: GPT, windows: Tensor, name: str) -> Recording:
    """Runs windows (W, T) int64; keeps 8 bytes per gate, L * W * T * C * k of them, on the CPU."""
    cfg, (W, T), device = model.cfg, windows.shape, model.embedding.weight.device
    shape = cfg.n_layer, W * T, cfg.n_channels * cfg.top_k
    gates, rows = torch.empty(shape), torch.empty(shape, dtype=torch.int32)
    first = torch.arange(cfg.n_channels, dtype=torch.int32)[:, None] * cfg.n_experts        # (C, 1)
    top, p = torch.empty(W * T, 5, dtype=torch.int64), torch.empty(W * T, 5)
    progress(f"record {name} on {W} x {T} tokens, {8 * gates.numel() / 1e6:.1f} MB")
    batch = max(1, 2**24 // (T * cfg.vocab_size))       # windows at a time: 64 MB of logits
    for start in range(0, W, batch):
        end = min(start + batch, W)
        here = slice(start * T, end * T)

        def keep(layer, g, ids):
            gates[layer, here], rows[layer, here] = g.flatten(1).cpu(), (ids.cpu() + first).flatten(1)

        with router_hook(model, keep):
            logits = model(windows[start:end].to(device))[0].flatten(0, 1)      # (N', V)
        values, best = logits.topk(5)
        top[here], p[here] = best.cpu(), (values - logits.logsumexp(1, keepdim=True)).exp().cpu()
    return Recording(windows.numpy(), gates, rows, top, p, model.embedding.weight.cpu())


# -----------------------------------------------------------------------------------------------------------
# similarity of circuits

def similarities(queries: Circuits, circuits: Circuits, R: int) -> Iterator[Tensor]:
    """Inner products, exact, (N, 128) at a time, of sparse vectors: values and rows, (Q, J) and (N, J) each.

    Only 128 queries at a time are made dense, as the table whose rows gather_sum adds up for every circuit.
    """
    for values, rows in zip(*(t.split(128) for t in queries)):
        table = torch.zeros(len(values), R).scatter_(1, rows.long(), values).T.contiguous()     # (R, 128)
        yield kernels.gather_sum(circuits[0], table, circuits[1])


def gram(circuits: Circuits, R: int) -> Tensor:
    """(M, M) inner products among circuits."""
    return torch.cat(list(similarities(circuits, circuits, R)), dim=1)


def contexts_of(tokens: np.ndarray) -> Tensor:
    """(W, T) -> (N,) int64, a hash of the last CONTEXT tokens, or of those that the window has."""
    padded = np.pad(tokens.astype(np.uint64) + np.uint64(1), ((0, 0), (CONTEXT - 1, 0)))
    factors = np.random.default_rng(0).integers(2**64, size=CONTEXT, dtype=np.uint64)
    last = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT, axis=1)                # (W, T, CONTEXT)
    return torch.from_numpy((last * factors).sum(-1).astype(np.int64).ravel())


def nearest(sim: Tensor, banned: Tensor, contexts: Tensor) -> list[list[tuple[int, float]]]:
    """The NEIGHBORS circuits most similar to each query, (position, similarity), no two in equal contexts.

    sim and banned (N, Q), contexts (N,). Fewer where four times as many candidates repeat their contexts.
    """
    best, found = sim.masked_fill(banned, -2).T.topk(min(4 * NEIGHBORS, len(sim))), []
    for values, places in zip(best.values.tolist(), best.indices.tolist()):
        different = {}
        for place, context, value in zip(places, contexts[places].tolist(), values):
            if value > -2:
                different.setdefault(context, (place, value))
        found.append(list(different.values())[:NEIGHBORS])
    return found


def neighbors(subject: Subject) -> Section:
    """The circuits nearest to those of a prompt, or of a passage of the recorded text."""
    cfg, recorded, layer, prompt = subject.cfg, subject.trained, subject.layer, subject.args.prompt
    (W, T), reference = recorded.tokens.shape, recorded
    if prompt is None:      # 24 tokens in the middle
        queries = W // 2 * T + T // 2 + np.arange(min(24, T // 2))
    else:
        ids = [subject.encoding.eot_token, *subject.encoding.encode(prompt, disallowed_special=())]
        if not 2 <= len(ids) <= cfg.block_size:
            raise ValueError(f"--prompt has {len(ids) - 1} tokens: give it 1 to {cfg.block_size - 1}")
        reference, queries = record(subject.model, torch.tensor([ids]), "the prompt"), np.arange(1, len(ids))
    contexts, own = contexts_of(recorded.tokens), contexts_of(reference.tokens)[queries]
    asked, found, rows = tuple(t[queries] for t in subject.circuits(reference, layer)), [], []
    for sim in similarities(asked, subject.circuits(recorded, layer), cfg.n_channels * cfg.n_experts):
        found += nearest(sim, contexts[:, None] == own[len(found):len(found) + sim.shape[1]], contexts)
    for number, (query, near) in enumerate(zip(queries.tolist(), found)):
        token = f"{number} {subject.name(reference.tokens.flat[query])}"
        for source, i, distance in [(reference, query, ""), *((recorded, i, 1 - sim) for i, sim in near)]:
            rows.append([token, distance, subject.excerpt(source.tokens, i), subject.predictions(source, i)])
    return Section(
        "Neighbours", f"Every token of a text, then the {NEIGHBORS} recorded tokens whose circuits in layer "
        f"{layer} ({subject.channels}) are nearest to its own, with the cosine distance and what the model "
        f"expects next. Left out: contexts that repeat its own, or each other's, over {CONTEXT} tokens.",
        [("Nearest circuits", ["token", "distance", "text", "next"], rows)])


# -----------------------------------------------------------------------------------------------------------
# classes of tokens, and whether near circuits share them

PYTHON = re.compile(
    rb"(?P<comment>#[^\n]*)|(?P<number>\d[\w.]*)|(?P<indentation>\s+)|(?P<string>(?i:[rbfu]{0,2})(?:"
    rb"'''(?:\\.|.)*?'''|\"\"\"(?:\\.|.)*?\"\"\"|'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"))"
    rb"|(?P<name>[^\W\d]\w*)|(?P<operator>.)", re.DOTALL)


def python_kinds(subject: Subject) -> list[str]:
    """The kind of every recorded token of Python (N,): that of its first character that is no blank."""
    text, starts, T = np.asarray(subject.tokens("val")), subject.data.val_batch(), subject.cfg.block_size
    kinds, first = np.full(len(text), "other", "<U11"), 0
    for last in [*np.flatnonzero(text == subject.encoding.eot_token).tolist(), len(text)]:
        if ((starts < last) & (starts + T > first)).any():      # a document that the windows touch
            pieces = subject.encoding.decode_tokens_bytes(text[first:last].tolist())
            of_byte, end = [], 0
            for match in PYTHON.finditer(b"".join(pieces)):
                word, kind = match[0].decode("utf-8", "replace"), match.lastgroup
                if kind == "name" and (keyword.iskeyword(word) or hasattr(builtins, word)):
                    kind = "keyword" if keyword.iskeyword(word) else "builtin"
                of_byte += [kind] * len(match[0])
            for i, piece in enumerate(pieces, first):
                start, end = end, end + len(piece)
                inked = (kind for kind in of_byte[start:end] if kind != "indentation")
                kinds[i] = next(inked, "indentation")
        first = last + 1
    return kinds[starts[:, None] + np.arange(T)].ravel().tolist()


def context_classes(subject: Subject, n_tokens: int = 1000, n_classes: int = 12) -> list[str]:
    """The class of every recorded token (N,), found without labels, named by its most frequent members.

    k-means of the n_tokens most frequent tokens, each as the square roots of the probabilities of the tokens
    before and after it, in the first 4 million tokens of training. No model takes part.
    """
    text = np.asarray(subject.tokens("train")[:2**22]).astype(np.int64)
    often = np.argsort(-np.bincount(text), kind="stable")[:n_tokens]
    side, place = len(often) + 1, np.full(subject.cfg.vocab_size, len(often))   # the last place: all rarer
    place[often] = np.arange(len(often))
    counts = np.bincount(place[text[:-1]] * side + place[text[1:]], minlength=side**2).reshape(side, side)
    p = np.concatenate([c / c.sum(1, keepdims=True).clip(1) for c in (counts, counts.T)], axis=1)
    x = torch.from_numpy(p[:-1]).sqrt()                                         # (n_tokens, 2 * side)
    centres = x[:n_classes]
    for _ in range(30):
        label = torch.cdist(x, centres).argmin(1)
        centres = torch.stack([x[label == c].mean(0) if c in label else x[c] for c in range(len(centres))])
    names = [" ".join(subject.name(t) for t in often[label == c][:4]) for c in range(len(centres))]
    classes = [names[c] for c in label.tolist()] + ["rare tokens"]
    return [classes[i] for i in place[subject.trained.tokens.ravel()].tolist()]


def shares(circuits: Circuits, queries: np.ndarray, tokens: np.ndarray, labels: list[np.ndarray],
           R: int) -> tuple[np.ndarray, np.ndarray]:
    """For queries (Q,), positions among tokens (W, T): the share of the nearest circuits that have the same
    token, and, for each of labels (N,), the share of the nearest of other tokens that have the same label;
    and both among all circuits, as chance would have it. Each (1 + labels, Q)."""
    ids, contexts, found, chance = tokens.ravel(), contexts_of(tokens), [], []
    asked = tuple(t[queries] for t in circuits)
    for part, sim in zip(np.split(queries, range(128, len(queries), 128)), similarities(asked, circuits, R)):
        same = ids[:, None] == ids[part]                                        # (N, 128)
        like = [(label[:, None] == label[part]) & ~same for label in labels]
        near = nearest(sim, contexts[:, None] == contexts[part], contexts)
        others = nearest(sim, torch.from_numpy(same), contexts)
        found.append([[np.mean([hit[i, q] for i, _ in places]) for q, places in enumerate(lists)]
                      for hit, lists in [(same, near), *((hit, others) for hit in like)]])
        chance.append([same.mean(0), *(hit.sum(0) / (~same).sum(0) for hit in like)])
    return np.concatenate(found, axis=1), np.concatenate(chance, axis=1)


def structure(subject: Subject) -> Section:
    """Do near circuits belong to like tokens, more so than without training and with shuffled gates?"""
    tokens, classes, rng, result = subject.trained.tokens, subject.classes, np.random.default_rng(0), {}
    (W, T), R = tokens.shape, subject.cfg.n_channels * subject.cfg.n_experts
    queries, shuffle = rng.choice(W * T, min(1000, W * T), replace=False), rng.permutation(W * T)
    labels = [np.unique(names, return_inverse=True)[1] for names in classes.values()]
    for layer in range(subject.cfg.n_layer):
        progress(f"score the neighbours of {len(queries)} tokens in layer {layer}")
        gates = {name: subject.circuits(getattr(subject, name), layer) for name in ("trained", "untrained")}
        gates["shuffled"] = tuple(t[shuffle] for t in gates["trained"])
        for name, circuits in gates.items():
            result[layer, name], chance = shares(circuits, queries, tokens, labels, R)
    result["", "chance"] = chance

    def estimate(values: np.ndarray, chosen: np.ndarray) -> Estimate:
        return jackknife(lambda keep: values[chosen & keep[queries // T]].mean(), W)

    measures = ["same token", *(f"same {way}, other token" for way in classes)]
    rows = [[*key, *(estimate(values, queries >= 0) for values in result[key])] for key in result]
    (way, names), by_class = next(iter(classes.items())), []
    compared = {name: values[1] for (layer, name), values in result.items() if layer in (subject.layer, "")}
    of_query = np.array(names)[queries]
    for name, count in Counter(of_query.tolist()).most_common():
        chosen = of_query == name
        if len(set(queries[chosen] // T)) > 2:
            by_class.append([name, count, *(estimate(values, chosen) for values in compared.values())])
    return Section(
        "Do near circuits mean alike?", f"Of {len(queries)} random tokens: the share of the same token in "
        f"the {NEIGHBORS} nearest circuits, and of the same class in the {NEIGHBORS} nearest of others. "
        "Controls: the model before training; the trained gates dealt out to tokens at random; the share in "
        f"all tokens. Circuits of {subject.channels}; intervals of 95%, over windows.",
        [("Share of neighbours", ["layer", "gates", *measures], rows),
         (f"{measures[1]}, layer {subject.layer}", [way, "tokens", *compared], by_class)],
        [figure([bars(name, {row[0]: row[2 + m] for row in rows if row[1] == name}) for name in gates],
                measure, 320, barmode="group", xaxis=axis("layer", dtick=1))
         for m, measure in enumerate(measures)])


# -----------------------------------------------------------------------------------------------------------
# map

def plane(inner: Tensor, umap: Callable | None) -> np.ndarray:
    """Coordinates (M, 2) of unit vectors with inner products (M, M): UMAP of cosine distances, or PCA."""
    if umap:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # distances have no inverse, and a seed means one thread
            mapper = umap(n_neighbors=15, metric="precomputed", random_state=0)
            return mapper.fit_transform((1 - inner).clamp(min=0).fill_diagonal_(0).numpy())
    values, vectors = torch.linalg.eigh(centred(inner))
    return (vectors[:, -2:] * values[-2:].clamp(min=0).sqrt()).flip(1).numpy()


def circuit_map(subject: Subject) -> Section:
    """The circuits of the 100 most frequent tokens in the plane, for every layer, and one untrained."""
    cfg, tokens, rng, placed, figures = subject.cfg, subject.trained.tokens, np.random.default_rng(0), [], []
    method = "UMAP" if subject.umap else "PCA"
    often = np.argsort(-np.bincount(tokens.ravel()), kind="stable")[:100]
    points = [i for t in often for i in rng.permutation(np.flatnonzero(tokens == t))[:10].tolist()]    # (M,)
    views = {f"layer {layer}": (subject.trained, layer) for layer in range(cfg.n_layer)}
    views[f"layer {subject.layer}, untrained"] = subject.untrained, subject.layer
    for title, (recording, layer) in views.items():
        progress(f"map {len(points)} circuits by {method}: {title}")
        circuits = tuple(t[points] for t in subject.circuits(recording, layer))
        hover = [html.escape(f"{subject.excerpt(tokens, i)}\nnext: {subject.predictions(recording, i)}")
                 .replace("\n", "<br>") for i in points]
        placed.append((plane(gram(circuits, cfg.n_channels * cfg.n_experts), subject.umap).round(2), hover))
    hidden = dict(showticklabels=False, zeroline=False)
    for way, names in subject.classes.items():
        members = {name: [m for m, i in enumerate(points) if names[i] == name]
                   for name in sorted({names[i] for i in points})}
        dots = {name: [dict(mode="markers", x=xy[chosen, 0].tolist(), y=xy[chosen, 1].tolist(),
                            hoverinfo="text", hovertext=[hover[m] for m in chosen]) for xy, hover in placed]
                for name, chosen in members.items()}
        figures.append(panels(dots, [(axis(title, **hidden), hidden) for title in views],
                              f"Circuits by {way}", 400))
    remedy = "" if subject.umap else (" UMAP keeps neighbours together better: pip install umap-learn "
                                      f"({subject.no_umap}).")
    return Section(
        "Map", f"{method} of {len(points)} circuits ({subject.channels}): at most 10, at random, of each of "
        "the 100 most frequent tokens. Near points have like gates. Point at one to see its text and what "
        f"the model expects next; click a class to hide it, twice to see it alone.{remedy}", figures=figures)


# -----------------------------------------------------------------------------------------------------------
# usage, co-activation, CKA

def usage_of(rows: Tensor, C: int, E: int) -> list[list[float]]:
    """Of rows (N, J), per channel: the share of its neurons used at least once; of the counts of use the
    Gini coefficient (0: all alike, 1: one has all), and the entropy as a share of that of equal use."""
    counts = rows.flatten().bincount(minlength=C * E).view(C, E).double().sort(dim=1).values
    p = counts / counts.sum(1, keepdim=True)
    gini = (p * (2 * torch.arange(1, E + 1) - E - 1)).sum(1) / E
    entropy = torch.special.entr(p).sum(1) / math.log(E)
    return torch.stack(((counts > 0).double().mean(1), gini, entropy), dim=1).tolist()


def coactivation(ids: Tensor, size: int) -> Tensor:
    """P(j | i): of the tokens that use neuron i the share that use j, i, j < size; ids (N, k)."""
    i, j = torch.broadcast_tensors(ids.long()[:, :, None], ids.long()[:, None, :])
    counts = (i * size + j)[(i < size) & (j < size)].bincount(minlength=size**2).view(size, size).double()
    return counts / counts.diagonal().clamp(min=1)[:, None]


def shared_subkeys(ids: Tensor, n: int) -> list[float]:
    """Mean P(j | i) over uses of i, for j that share its first sub-key, its second, none; ids (..., k)."""
    first, second = (x[..., :, None] == x[..., None, :] for x in (ids // n, ids % n))
    pairs = (first & ~second, n - 1), (~first & second, n - 1), (~first & ~second, (n - 1)**2)
    return [pair.sum().item() / ids.numel() / others for pair, others in pairs]


def centred(gram: Tensor) -> Tensor:
    """The Gram matrix (M, M) of the same vectors less their mean, in float64."""
    gram = gram.double()
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def gram_cka(K: Tensor, L: Tensor) -> float:
    """Linear CKA, in [0, 1], of features with Gram matrices K and L (M, M) (arXiv 1905.00414)."""
    K, L = centred(K), centred(L)
    return ((K * L).sum() / ((K * K).sum() * (L * L).sum()).clamp(min=1e-12).sqrt()).item()


def usage(subject: Subject) -> Section:
    """Which neurons are used, which together, and whether the first gates follow the embeddings."""
    cfg, trained, usage_rows, pairs, alignment = subject.cfg, subject.trained, [], [], []
    C, E, k, n = cfg.n_channels, cfg.n_experts, cfg.top_k, math.isqrt(cfg.n_experts)
    flat = trained.tokens.ravel()
    _, first, counts = np.unique(flat, return_index=True, return_counts=True)
    often = first[np.argsort(-counts, kind="stable")[:100]]     # where the most frequent tokens occur first
    for layer, rows in enumerate(trained.rows):
        for c, (every, once) in enumerate(zip(usage_of(rows, C, E), usage_of(rows[first], C, E))):
            usage_rows.append([layer, c, every[0], round(E * (1 - every[0])), *every[1:], *once[1:]])
    for name, seen, chosen in (("trained", trained, often), ("untrained", subject.untrained, often),
                               ("shuffled", trained, np.random.default_rng(0).permutation(often))):
        x, circuits = seen.embedding[flat[often]], (seen.gates[0, chosen], seen.rows[0, chosen])
        alignment.append([name, gram_cka(x @ x.T, gram(circuits, C * E))])
        if name != "shuffled" and cfg.router.startswith("product"):
            pairs += [[layer, name, *shared_subkeys((rows % E).view(-1, C, k), n)]
                      for layer, rows in enumerate(seen.rows)]
    c, size = subject.args.channel or 0, min(E, 1024 // n * n)      # whole rows of sub-keys
    P = coactivation(trained.rows[subject.layer, :, c * k:c * k + k] - c * E, size).fill_diagonal_(0)
    heat = dict(type="heatmap", z=P.mul(1000).round().int().tolist(), zmin=0, zmax=100, colorscale="Viridis",
                hovertemplate="P(%{x} | %{y}) = %{z} / 1000<extra></extra>")
    grid = dict(dtick=n, showgrid=False, constrain="domain")
    axes = dict(xaxis=axis("j", **grid), yaxis=axis("i", autorange="reversed", scaleanchor="x", **grid))
    return Section(
        "Usage and co-activation", f"Of the {E} neurons of a channel, the share used at least once in "
        f"{len(flat):,} tokens, and how evenly: Gini (0 all alike, 1 one has all), entropy (1 all alike), "
        "over all tokens, and over the first of each distinct one, as in the paper. P(j | i): of the tokens "
        f"that use neuron i, the share that use j. Neuron {n} a + b has sub-keys a and b: blocks on the "
        "diagonal share a, and stripes b. CKA: how far the gates of layer 0 follow the embeddings, at the "
        "first of each of the 100 most frequent tokens; chance is above 0, as the shuffled gates show.",
        [("Usage", ["layer", "channel", "used", "dead", "Gini", "entropy", "Gini, distinct",
                    "entropy, distinct"], usage_rows),
         ("Mean P(j | i)", ["layer", "gates", "same first sub-key", "same second", "neither"], pairs),
         ("Linear CKA of embeddings and gates", ["gates", "CKA"], alignment)],
        [figure([heat], f"P(j | i) in thousandths: layer {subject.layer}, channel {c}", 820, **axes)])


# -----------------------------------------------------------------------------------------------------------
# causal patching

Fact = namedtuple("Fact", "word answer count total")    # tokens; occurrences of both, and of the word


def find_facts(subject: Subject, template: str) -> tuple[list[int], list[int], list[Fact]]:
    """The tokens before and after the template's slot, and at most 40 facts, the most frequent first.

    A word is one token of letters, its answer the token that most often follows; of several with
    one answer the most frequent stays. Raises ValueError below three: two to patch, one as a control.
    """
    before, slot, after = template.partition("{}")
    if not slot or "{}" in after:
        raise ValueError(f"--template={template!r} needs one {{}}, for the word that differs")
    blank, at_least = before.endswith(" "), subject.args.min_count      # a blank belongs to the word's token
    prefix, suffix = map(subject.encoding.encode_ordinary, (before[:-1] if blank else before, after))
    text, pairs, total, end = subject.tokens("train"), Counter(), Counter(), len(prefix) + 1 + len(suffix)
    for start in range(0, len(text), 2**22):    # a piece at a time: a corpus may be larger than memory
        piece = text[start:start + 2**22 + end]
        at = np.arange(max(len(piece) - end, 0))
        for offset, token in [*enumerate(prefix), *enumerate(suffix, len(prefix) + 1)]:
            at = at[piece[at + offset] == token]
        pairs.update(zip(piece[at + len(prefix)].tolist(), piece[at + end].tolist()))
        total.update(piece[at + len(prefix)].tolist())
    letters, words, facts = re.compile(rb" [A-Za-z]+" if blank else rb"[A-Za-z]+"), set(), {}
    for (word, answer), count in pairs.most_common():
        spelt = subject.encoding.decode_single_token_bytes(word)
        if word not in words and count >= at_least and letters.fullmatch(spelt):
            facts.setdefault(answer, Fact(word, answer, count, total[word]))
        words.add(word)
    if len(facts) < 3:
        raise ValueError(f"--template={template!r} has {len(facts)} facts with {at_least} occurrences in "
                         f"{subject.data.folder}, of 3 needed: lower --min_count, or try another template")
    return prefix, suffix, list(facts.values())[:40]


def preference(logits: Tensor, answers: Tensor, others: Tensor) -> Tensor:
    """How much logits (..., V) prefer answers (..., A) to others (..., A): difference of their logsumexp."""
    return logits.gather(-1, answers).logsumexp(-1) - logits.gather(-1, others).logsumexp(-1)


def indirect_effect(clean: Tensor, counterfactual: Tensor, patched: Tensor) -> Tensor:
    """Of preferences: 0 where the patch changes nothing, 1 where it does all that the other prompt does."""
    return (patched - clean) / (counterfactual - clean)


@torch.inference_mode()
def patched_logits(model: GPT, prompts: Tensor, choices: list[tuple[list[int], int]]) -> Iterator[Tensor]:
    """Last logits (F, V) of prompts (F, T); then, for each choice (layers, position), those with the gates
    (scores and ids, all channels) there from another of the prompts: (F prompts, F sources, V)."""
    clean, shape = {}, prompts.shape

    def last_logits(hook: Callable) -> Tensor:
        with router_hook(model, hook):
            return model(prompts)[0][:, -1].cpu()

    yield last_logits(lambda layer, *out: clean.update({layer: out}))
    for layers, position in choices:
        def patch(source: int, layer: int, *out: Tensor):
            if layer in layers:
                new = [x.clone().unflatten(0, shape) for x in out]              # (F, T, C, k)
                for x, recorded in zip(new, clean[layer]):
                    x[:, position] = recorded.unflatten(0, shape)[source, position]
                return tuple(x.flatten(0, 1) for x in new)
        yield torch.stack([last_logits(functools.partial(patch, s)) for s in range(len(prompts))], dim=1)


def patching(subject: Subject) -> Section:
    """The gates of one prompt in another: how far they carry its answer, for all ordered pairs of facts."""
    template, rows, effects, own_change = subject.args.template or TEMPLATES.get(subject.source), [], [], 0.0
    if not template:
        raise ValueError(f"there is no template for data from {subject.source}: give one with --template")
    prefix, suffix, facts = find_facts(subject, template)
    prompts = torch.tensor([[subject.encoding.eot_token, *prefix, fact.word, *suffix] for fact in facts])
    F, slot, every = len(facts), len(prefix) + 1, list(range(subject.cfg.n_layer))
    choices = [(layers, position) for position in range(slot, prompts.shape[1])
               for layers in (every, *([layer] for layer in every))]
    progress(f"patch {F * (F - 1)} ordered pairs of {F} facts in {len(choices)} places")
    runs, i = patched_logits(subject.model, prompts.to(subject.device), choices), torch.arange(F)
    logits, answers = next(runs), torch.tensor([fact.answer for fact in facts])
    own, other = answers[:, None, None].expand(F, F, 1), answers[None, :, None].expand(F, F, 1)     # [a, b]
    clean = preference(logits[:, None].expand(F, F, -1), own, other)
    counter = preference(logits.expand(F, F, -1), own, other)
    known = (clean > 0) & (counter < 0)                 # both prompts prefer their own answer

    def estimate(x: Tensor) -> Estimate:
        return jackknife(lambda keep: x[known & torch.from_numpy(keep[:, None] & keep)].mean().item(), F)

    for (layers, position), z in zip(choices, runs):
        shape = F, F, F, 1                              # [a, source, b]
        patched = preference(z[:, :, None].expand(*shape[:3], -1), own[:, None].expand(shape),
                             other[:, None].expand(shape))
        own_change = max(own_change, (patched - clean[:, None])[i, i].abs().max().item())
        means = []
        for x in (indirect_effect(clean[:, None], counter[:, None], patched), (patched < 0).double()):
            theirs, third = x[:, i, i], (x.sum(1) - x[i, i] - x[:, i, i]) / (F - 2)     # [a, b]
            means += [theirs, third, theirs - third]
        effects.append(means[0])
        rows.append([subject.name(prompts[0, position]) if position > slot else "{}",
                     "all" if layers == every else f"{layers[0]}",
                     *map(estimate, means[:5])])
    return report_patches(subject, template, facts, logits.softmax(1), known, effects[0], rows, own_change)


def report_patches(subject: Subject, template: str, facts: list[Fact], p: Tensor, known: Tensor,
                   effect: Tensor, rows: list[list], own_change: float) -> Section:
    """The section of patching: p (F, V) of the clean model, known and effect (F, F), rows of the table."""
    F, names = len(facts), [f"{subject.name(fact.word)} → {subject.name(fact.answer)}" for fact in facts]
    best = p.argmax(1).tolist()
    right = sum(token == fact.answer for token, fact in zip(best, facts))
    table = [[name, fact.count, fact.total, p[a, fact.answer].item(), subject.name(best[a]),
              p[a, best[a]].item()]
             for a, (name, fact) in enumerate(zip(names, facts))]
    matrix = [[None if a == b else round(effect[a, b].item(), 3) for b in range(F)] for a in range(F)]
    heat = dict(type="heatmap", x=names, y=names, z=matrix, zmin=-1, zmax=1, colorscale="RdBu",
                hovertemplate="%{y}<br>with the gates of %{x}<br>effect %{z}<extra></extra>")
    shown = [bars(name, {f"{row[0]}, {row[1]}": row[column] for row in rows})
             for name, column in (("the other's gates", 2), ("a third prompt's", 3))]
    return Section(
        "Patching", f"Facts of the training data: in {template!r} the word decides what follows. A prompt "
        "gets, at one position, the gates (scores and neurons, all channels) of another; the effect is 0 "
        "where that changes nothing, and 1 where it moves the logits of the two answers as far as the other "
        f"prompt does. Means are over the {known.sum()} of {F * (F - 1)} ordered pairs whose prompts both "
        "prefer their own answer; a flip now prefers the other's. Controls: the gates of every third "
        f"prompt; its own gates, which change {own_change:g} at most. The model's first choice is the "
        f"answer in {right} of {F} facts. Intervals of 95%, over facts.",
        [("Effect of patches", ["position", "layers", "effect", "third prompt", "difference", "flips",
                                "flips, third"], rows),
         ("Facts", ["fact", "count", "of", "p(answer)", "first choice", "p"], table)],
        [figure(shown, "Effect, by position and layers", 360, barmode="group"),
         figure([heat], "Effect of every pair, all layers at the word: a row gets a column's gates", 700,
                xaxis=dict(automargin=True), yaxis=dict(automargin=True))])


# -----------------------------------------------------------------------------------------------------------
# processes

def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends a worker without a traceback
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)      # Adam's moments of unused neurons become denormals, slow on CPUs
    keep_memory()


def parallel(function: Callable, jobs: list[tuple], device: str) -> Iterator:
    """function(*job) for all jobs, in their order: on a CPU a process per core, else here, one by one.

    function belongs to a module; jobs and results are pickled. One thread each: on a CPU the numbers do not
    depend on how many cores there are.
    """
    if device == "cuda":
        yield from itertools.starmap(function, jobs)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(cores, len(jobs)), spawn, start_worker) as pool:
        yield from pool.map(function, *zip(*jobs))


# -----------------------------------------------------------------------------------------------------------
# mimic: is a dense layer a mixture of few neurons in disguise? (arXiv 2512.18452)

class Mixture(nn.Module):
    """The paper's student: a shared MLP, and PEER's experts chosen by one full list of keys, of low rank."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.shared, self.experts = MLP(cfg), PEER(cfg)
        self.experts.router = Router(cfg, "dense")

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) + self.experts(x)

    def flops(self) -> int:
        return self.shared.flops() + self.experts.flops()


class Effort(NamedTuple):
    active: tuple[int, ...]     # neurons of the students
    tokens: int                 # of training text to fit them to
    steps: int                  # of 1024 tokens each


FULL, QUICK = Effort((8, 16, 32, 64, 128), 2**17, 600), Effort((8, 32), 2**14, 60)
NEURONS = 4 * 33**2     # of both sparse students: a square, with more sub-keys in a channel than any top_k
STUDENTS = {    # name: class, how much longer it trains (the dense one learns slowly), settings of m active
    "dense": (MLP, 8, lambda m: dict(ffn="mlp", d_ff=m)),
    "mixture": (Mixture, 1, lambda m: dict(ffn="peer", n_channels=1, n_experts=NEURONS, top_k=m // 2,
                                           d_ff=m // 2)),
    "sgatlin": (SparselyGatedLinear, 1, lambda m: dict(n_channels=4, n_experts=NEURONS // 4, top_k=m // 4)),
}


def make_student(name: str, m: int, D: int) -> nn.Module:
    """A student with m active neurons, (..., D) -> (..., D), every time the same."""
    kind, _, settings = STUDENTS[name]
    torch.manual_seed(0)
    return kind(GPTConfig(d_model=D, d_head=D, d_key=D // 4, **settings(m)))


def gaussian_like(x: Tensor, count: int) -> Tensor:
    """(count, D) samples of the normal distribution with the mean and the covariance of x (N, D)."""
    x = x.double()
    values, vectors = torch.linalg.eigh(x.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T     # (D, D), symmetric
    noise = torch.randn(count, x.shape[1], dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    return (x.mean(0) + noise @ root).float()


def unexplained(y: Tensor, predicted: Tensor) -> float:
    """The fraction of the variance of y (N, D) that predictions leave: 0 for y itself, 1 for its mean."""
    return ((y - predicted).square().sum() / (y - y.mean(0)).square().sum()).item()


def fit(student: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Trains student(x) to be y, (N, D) each: mean squared error, Adam, cosine to 0, batches of 1024."""
    # with 32 neurons on real inputs 1e-2 was best: for dense ones (4800 steps) of 3e-3, 1e-2 and 3e-2, for
    # sparse ones (300 steps) of 1e-3 to 1e-2, and against 3e-2
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
    """layer(x) for x (N, D), 4096 tokens at a time: a full list of keys gives large scores."""
    return torch.cat([layer(part) for part in x.split(4096)])


@torch.no_grad()
def window_losses(model: GPT, layer: int, windows: tuple[Tensor, Tensor], ffn: Callable) -> np.ndarray:
    """Loss (W,) of windows, inputs and targets (W, T), with ffn in place of a layer's feedforward part:
    called with x (1, T, D), it returns the output, or None to leave that as it is."""
    with model.blocks[layer].ffn.register_forward_hook(lambda module, args, out: ffn(args[0])):
        return np.array([model(x[None], y[None])[1].item() for x, y in zip(*windows)])


def imitate(file: Path, kind: str, m: int, name: str) -> tuple[float, np.ndarray]:
    """Fits a student to one kind of the inputs that mimic saved in file. Returns what it leaves unexplained
    of those held out, and the losses (W,) with it in place of the layer."""
    saved = torch.load(file, mmap=True, weights_only=True)
    device = torch.device(saved["device"])
    x, y, held_x, held_y, *windows = (t.to(device) for t in (*saved[kind], *saved["windows"]))
    scale = (y - y.mean(0)).square().mean().sqrt()
    student = make_student(name, m, x.shape[1]).to(device)
    fit(student, x, y / scale, saved["steps"] * STUDENTS[name][1])
    model, _ = load_model(Path(saved["checkpoint"]), saved["device"])
    losses = window_losses(model, saved["layer"], windows, lambda x: scale * student(x))
    return unexplained(held_y, scale * outputs(student, held_x)), losses


def mimic(subject: Subject) -> Section:
    """Students of one dense layer, fitted to its outputs on real inputs and on Gaussian ones."""
    model, data, layer, device = subject.model, subject.data, subject.layer, torch.device(subject.device)
    effort, T, n = QUICK if subject.args.quick else FULL, data.cfg.block_size, data.n_windows()
    count, recorded = max(1, min(effort.tokens // T, n)), []
    held_out = data.windows("val", data.val_batch(), device)
    progress(f"record layer {layer} on {count} + {len(held_out[0])} windows of {T} tokens")
    for windows in (data.windows("train", np.arange(count) * (n // count) * T, device), held_out):
        recorded.append([])
        base = window_losses(model, layer, windows, recorded[-1].append)
    real = [torch.cat(parts).flatten(0, 1) for parts in recorded]       # fit and held out, (N, D) each
    sizes = [len(x) for x in real]
    gaussian = gaussian_like(real[0].cpu(), sum(sizes)).to(device).split(sizes)
    inputs = {kind: [t.cpu() for x in parts for t in (x, outputs(model.blocks[layer].ffn, x))]
              for kind, parts in (("real", real), ("Gaussian", gaussian))}
    mean = inputs["real"][1].mean(0).to(device)
    anchors = {"the layer": base, "its mean": window_losses(model, layer, held_out, mean.expand_as),
               "nothing": window_losses(model, layer, held_out, torch.zeros_like)}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "inputs.pt")
        torch.save(inputs | dict(windows=held_out, checkpoint=str(subject.path),
                                 device=subject.device, layer=layer, steps=effort.steps), file)
        jobs = [(file, *key) for key in itertools.product(inputs, effort.active, STUDENTS)]
        for (_, *key), result in zip(jobs, parallel(imitate, jobs, subject.device)):
            results[tuple(key)] = result
            progress("{}/{} {} inputs, {} active neurons, {}: {:.4f} of the variance unexplained".format(
                len(results), len(jobs), *key, result[0]))
    return report_students(subject, anchors, results)


def dense_neurons(left: float, dense: dict[int, float]) -> float | str:
    """Fewest neurons with which dense students, {m: unexplained}, leave as little: on lines between logs."""
    best, first = np.unique(np.minimum.accumulate(list(dense.values())), return_index=True)    # ascending
    m = np.array(list(dense))[first]
    if left > best[-1] or left < best[0]:
        return f"< {m[-1]}" if left > best[-1] else f"> {m[0]}"
    return float(np.exp(np.interp(np.log(left), np.log(best), np.log(m))))


def costs(layer: nn.Module) -> list[int]:
    """Parameters of a student or an MLP, those that a token uses, and its FLOPs."""
    total = sum(p.numel() for p in layer.parameters())
    idle = sum(2 * (NEURONS - len(router.keys) * router.top_k) * router.query.weight.shape[1]
               for router in layer.modules() if isinstance(router, Router))
    return [total, total - idle, layer.flops()]


def report_students(subject: Subject, anchors: dict[str, np.ndarray],
                    results: dict[tuple[str, int, str], tuple[float, np.ndarray]]) -> Section:
    """The section of mimic, from what imitate returned for inputs, m and student."""
    layer, base, rows = subject.layer, anchors["the layer"], []
    kinds, active = ("real", "Gaussian"), sorted({m for _, m, _ in results})

    def change(losses: np.ndarray) -> Estimate:
        return jackknife(lambda keep: (losses - base)[keep].mean(), len(base))

    for (kind, m, name), (left, losses) in results.items():
        dense = {i: results[kind, i, "dense"][0] for i in active}
        rows.append([kind, m, name, left, dense_neurons(left, dense), change(losses),
                     *costs(make_student(name, m, subject.cfg.d_model))])
    plots = [(column, kind) for column in (3, 5) for kind in kinds]
    axes = [(axis("active neurons", type="log", tickvals=active),
             axis(f"unexplained, {kind} inputs", type="log") if column == 3 else
             axis(f"change in loss, {kind} inputs")) for column, kind in plots]
    lines = {name: [dict(x=active, y=[row[3] if column == 3 else row[5].mean for row in rows
                                      if (row[0], row[2]) == (kind, name)]) for column, kind in plots]
             for name in STUDENTS}
    note = "Quick trainings, only to see that it works. " if subject.args.quick else ""
    return Section(
        "Mimic", f"{note}Students with m active neurons learn the outputs of the dense layer {layer} of "
        f"{subject.path} on its inputs in training text, and on Gaussian inputs of the same mean and "
        f"covariance; the dense ones train {STUDENTS['dense'][1]} times as long. Unexplained: the "
        "fraction of the variance of the outputs that a student leaves on inputs held out; as dense: the "
        "active neurons of a dense student that leaves as much; change: of the validation loss, in nats per "
        "token, with the student in the layer's place, with intervals of 95% over windows. The sparse ones "
        f"choose among {NEURONS:,} neurons. Where they need fewer than a dense one on real inputs, and not "
        "on Gaussian ones, the layer is a sparse mixture because of its inputs. But m dense neurons write "
        "into m dimensions at most: for small m this alone puts sparse students ahead, on any inputs.",
        [("Students", ["inputs", "m", "student", "unexplained", "as dense", "change", "parameters", "active",
                       "FLOPs per token"], rows),
         ("Anchors", ["in place of the layer", "loss", "change"],
          [[name, float(losses.mean()), change(losses)] for name, losses in anchors.items()]),
         ("Costs of the layer", ["parameters", "active", "FLOPs per token"],
          [costs(subject.model.blocks[layer].ffn)])],
        [panels(lines, axes, "What students leave unexplained, and what that costs", 400)])


# -----------------------------------------------------------------------------------------------------------
# redistribute: what attention takes over from a sparse feedforward layer (arXiv 2605.09403)

EOS, VOCABULARY = 11, 12        # ten digits, the paper's PAD, which nothing here needs, and EOS
SEEDS = 42, 137, 256, 512, 1024     # the paper's
STEPS, QUICK_STEPS, CHECK = 10_000, 100, 100    # at most, and between checks whether all answers are right
NORMS = {False: "no norm", True: "norm"}


class Variant(NamedTuple):
    """A feedforward layer; the paper's accuracy without it, and its standard deviation (Figure 1)."""
    settings: dict
    paper: Estimate = Estimate(None, None)
    frozen: bool = False        # the router keeps its random weights


MOE = dict(ffn="moe", n_experts=4, d_ff=64)
SGATLIN = dict(ffn="sgatlin", n_channels=16, n_experts=64, top_k=4, d_key=16)   # 64 of 1024 neurons active
VARIANTS = {
    "dense 256": Variant(dict(ffn="mlp", d_ff=256), Estimate(0.119, 0.036)),
    "GLU 128": Variant(dict(ffn="swiglu", d_ff=128), Estimate(0.097, 0.024)),
    "dense 64": Variant(dict(ffn="mlp", d_ff=64), Estimate(0.237, 0.053)),
    "MoE top-2": Variant(MOE | dict(top_k=2), Estimate(0.187, 0.069)),
    "MoE top-1": Variant(MOE | dict(top_k=1), Estimate(0.443, 0.125)),
    "MoE top-1, frozen router": Variant(MOE | dict(top_k=1), Estimate(0.491, 0.095), frozen=True),
    "sgatlin": Variant(SGATLIN),
    "sgatlin, frozen router": Variant(SGATLIN, frozen=True),
}


def addition() -> tuple[Tensor, Tensor, Tensor]:
    """x + 7 for x = 0..999 as d0 d1 d2 EOS o0 o1 o2 o3 EOS, the lowest digits first.

    Returns inputs (1000, 8), the next tokens (1000, 8), -100 before o0, and how many digits carry (1000,).
    """
    x, powers = torch.arange(1000)[:, None], 10 ** torch.arange(4)
    eos = torch.full_like(x, EOS)
    text = torch.cat((x // powers[:3] % 10, eos, (x + 7) // powers % 10, eos), dim=1)       # (1000, 9)
    targets = text[:, 1:].clone()
    targets[:, :3] = -100
    return text[:, :-1], targets, (x % powers[1:] + 7 >= powers[1:]).sum(1)


@torch.inference_mode()
def right_digits(model: GPT, inputs: Tensor, targets: Tensor, zeroed: list[nn.Module]) -> Tensor:
    """(1000, 4) bool: is each of o0..o3 right, given the true ones before it, with outputs of layers zeroed?
    """
    with contextlib.ExitStack() as stack:
        for layer in zeroed:
            stack.enter_context(layer.register_forward_hook(lambda module, args, out: torch.zeros_like(out)))
        return (model(inputs)[0].argmax(-1) == targets)[:, 3:7]


def addition_model(name: str, norm: bool, seed: int) -> GPT:
    """One layer of four heads with the feedforward layer of a variant."""
    settings, _, frozen = VARIANTS[name]
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=VOCABULARY, block_size=8, n_layer=1, d_model=64, d_head=16, norm=norm,
                          **settings))
    ffn = model.blocks[0].ffn
    if frozen:
        (ffn.gate if settings["ffn"] == "moe" else ffn.router).requires_grad_(False)
    return model


def learn_addition(name: str, norm: bool, seed: int, steps: int,
                   device: str) -> tuple[int, list[list[float]]]:
    """Trains until all 1000 answers are right. Returns the steps taken, and the accuracy of output digits:
    of the whole model, without its FFN, without its attention; each in all, where 0..3 digits carry, and of
    o0..o3."""
    model = addition_model(name, norm, seed).to(device)
    inputs, targets, carries = (t.to(device) for t in addition())
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.01, fused=True)
    for step in range(1, steps + 1):
        batch = torch.randint(len(inputs), (128,)).to(device)
        model(inputs[batch], targets[batch])[1].backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % CHECK == 0 and right_digits(model, inputs, targets, []).all():
            break
    block, accuracy = model.blocks[0], []
    for zeroed in ([], [block.ffn], [block.attn]):
        right = right_digits(model, inputs, targets, zeroed).double()
        accuracy.append([right.mean().item(), *(right[carries == n].mean().item() for n in range(4)),
                         *right.mean(0).tolist()])
    return step, accuracy


def sign_flip_test(differences: np.ndarray) -> float:
    """Two-sided p of paired differences (n,): the share of the 2^n choices of their signs that bring their
    sum as far from zero. Exact where a difference is as likely as its opposite; at least 2 / 2^n."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    sums = np.abs(signs @ differences)
    return float((sums >= sums[0] - 1e-9).mean())


def redistribute(args: argparse.Namespace) -> Section:
    """Trains models of x + 7 with each feedforward layer, and measures them with a layer's output zeroed."""
    seeds, steps = (SEEDS[:2], QUICK_STEPS) if args.quick else (SEEDS, STEPS)
    jobs = [(name, norm, seed, steps, args.device) for norm in NORMS for name in VARIANTS for seed in seeds]
    taken, accuracy = {}, {}
    for n, (job, (step, result)) in enumerate(zip(jobs, parallel(learn_addition, jobs, args.device)), 1):
        (name, norm, seed), (whole, no_ffn, no_attention) = job[:3], (values[0] for values in result)
        taken.setdefault((norm, name), []).append(step)
        accuracy.setdefault((norm, name), []).append(result)
        progress(f"{n}/{len(jobs)} {name}, {NORMS[norm]}, seed {seed}: {step} steps, accuracy {whole:.3f}, "
              f"without FFN {no_ffn:.3f}, without attention {no_attention:.3f}")
    return report_addition(args, taken, {key: np.array(values) for key, values in accuracy.items()})


def report_addition(args: argparse.Namespace, taken: dict[tuple, list[int]],
                    accuracy: dict[tuple, np.ndarray]) -> Section:
    """The section of redistribute; accuracy (seeds, 3, 9) as learn_addition returns it."""
    rows, details, tests, shown = {norm: [] for norm in NORMS}, [], [], {norm: {} for norm in NORMS}
    unknown, n = Estimate(None, None), len(next(iter(accuracy.values())))

    def spread(values: np.ndarray) -> Estimate:
        return Estimate(float(values.mean()), float(values.std(ddof=1)))

    for (norm, name), values in accuracy.items():
        whole, shown[norm][name], no_attention = map(spread, values[:, :, 0].T)
        solved = f"{(values[:, 0, 0] == 1).sum()} of {len(values)}"
        paper = unknown if norm else VARIANTS[name].paper
        rows[norm].append([name, *addition_model(name, norm, 0).num_params(), solved,
                           round(np.mean(taken[norm, name])), whole, shown[norm][name], paper, no_attention])
        details += [[NORMS[norm], name, zeroed, *map(spread, values[:, i, 1:].T)]
                    for i, zeroed in enumerate(("nothing", "FFN", "attention"))]
        if VARIANTS[name].frozen:
            base = name.removesuffix(", frozen router")
            change = values[:, 1, 0] - accuracy[norm, base][:, 1, 0]
            tests.append([NORMS[norm], base, shown[norm][base], shown[norm][name], spread(change),
                          sign_flip_test(change)])
    quick = f"Quick: {QUICK_STEPS} steps at most, which say only that it works. " if args.quick else ""
    header = ["feedforward layer", "parameters", "active", "solved", "steps", "accuracy", "without FFN",
              "paper", "without attention"]
    paper = {name: variant.paper for name, variant in VARIANTS.items() if variant.paper != unknown}
    return Section(
        "Redistribute", f"{quick}One-layer models (d_model 64, four heads) learn x + 7 for x of three "
        "digits, until all 1000 answers are right. Accuracy is that of the four output digits, each given "
        "the true ones before it; then the output of the FFN, or of attention, is set to zero. Where much "
        "is right without the FFN, attention does much of the work. Chance is 0.1; to say 0 always gets "
        f"0.323, because o3 is 0 unless x > 992. Means ± standard deviations over {n} seeds. Paper: without "
        "FFN and norm, arXiv 2605.09403, Figure 1 (its GLU is 170 wide). Departures from it: our "
        "initialisation; rotary positions; no bias in attention; GELU where it has SiLU; GLU and experts are "
        "clamped SwiGLUs; the weights of the chosen experts are not renormalised, so that the loss of the "
        "task trains the router, and no other loss balances it. A frozen router keeps its random weights.",
        [*((f"Accuracy of output digits, {NORMS[norm]}", header, rows[norm]) for norm in NORMS),
         (f"Learned and frozen routers, accuracy without FFN: exact sign-flip test of {n} pairs, p is "
          f"{2 / 2**n:g} at least", ["model", "layer", "learned", "frozen", "difference", "p"], tests),
         ("Accuracy where 0 to 3 digits carry, and of each output digit, the lowest first",
          ["model", "layer", "zeroed", *(f"{i} carry" for i in range(4)), *(f"o{i}" for i in range(4))],
          details)],
        [figure([*(bars(NORMS[norm], shown[norm]) for norm in NORMS), bars("paper, no norm", paper)],
                "Accuracy of output digits without the FFN", 420, barmode="group")])


# -----------------------------------------------------------------------------------------------------------
# logs: curves, and models of equal training FLOPs

class Log(NamedTuple):
    """What train.py logged of a run."""
    run: Path               # its folder, or the log itself
    settings: dict
    cfg: GPTConfig          # of them; those newer than the run have their defaults
    starts: list[dict]      # of the run, and of every resumption: data, versions
    evals: list[dict]


def read_log(run: Path) -> Log:
    """The log of a run: log.jsonl, or its folder. ValueErrors are the user's."""
    path, by_event = run if run.suffix == ".jsonl" else run / "log.jsonl", defaultdict(list)
    if not path.is_file():
        raise ValueError(f"{path} is missing: python train.py makes it")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):    # a kill can cut a line short
            entry = json.loads(line)
            by_event[entry["event"]].append(entry)
    starts, evals = by_event["config"] + by_event["resume"], by_event["eval"]
    if not by_event["config"]:
        raise ValueError(f"{path} is no log of train.py: it does not begin with the settings of a run")
    settings = vars(TrainConfig()) | starts[0]["config"]    # a setting newer than the run has its default
    names = GPTConfig.__dataclass_fields__
    cfg = GPTConfig(**{name: value for name, value in settings.items() if name in names})
    return Log(run, settings, cfg, starts, evals)


def line(evals: list[dict], x: str) -> dict:
    """Validation loss against x; without step 0, which has no place on a logarithmic axis."""
    later = [entry for entry in evals if entry["step"] and None not in (entry.get(x), entry.get("val_loss"))]
    return dict(x=[entry[x] for entry in later], y=[entry["val_loss"] for entry in later])


def curves(runs: list[Path]) -> Section:
    """Validation loss of runs (log.jsonl, or its folder) against steps, tokens, FLOPs and seconds."""
    against, rows, lines = ("step", "tokens", "flops", "seconds"), [], {}
    for log in map(read_log, runs):
        last = log.evals[-1] if log.evals else {}
        rows.append([str(log.run), log.cfg.ffn, *map(last.get, (*against, "train_loss", "val_loss",
                                                                "val_bits_per_byte"))])
        lines[f"{log.run} ({log.cfg.ffn})"] = [line(log.evals, name) for name in against]
    return Section(
        "Curves", "Validation loss in nats per token. FLOPs are those of training, counted as in the paper; "
        "seconds are those of the steps, without evaluations.",
        [("Last evaluation",
          ["run", "ffn", *against, "train loss", "validation loss", "bits per byte"], rows)],
        [panels(lines, [(axis(name, type="log"), {}) for name in against], "Validation loss", 350)])


SAME = ("eval_sequences", "block_size", "vocab_size", "batch_size", "learning_rate", "weight_decay",
        "warmup_steps", "decay_fraction", "grad_clip")      # in all runs that are compared
VARIED = "activation", "router", "softmax_gates", "shared_pool", "norm"     # what names a variant of a layer


def check_comparable(logs: list[Log]) -> None:
    """Raises ValueError if a run did not spend a budget, or two differ by more than model, budget, seed."""
    first, seen, budgets = None, {}, Counter(log.settings["flops"] for log in logs)
    for log in logs:
        run, cfg, start = log.run, log.settings, log.starts[0]
        step = log.evals[-1]["step"] if log.evals else None
        if not cfg["flops"]:
            raise ValueError(f"{run} was not trained to a budget: python train.py --flops=...")
        if step != cfg["steps"]:
            raise ValueError(f"{run} was last evaluated at step {cell(step)}, and its budget is {cfg['steps']} "
                             "steps: give runs that ended there")
        dtype, device = cfg["dtype"], start["versions"]["machine"].split(":")[0]
        settings = {name: cfg[name] for name in SAME} | dict(
            data=start["data"]["fingerprint"], dtype=f"auto on {device}" if dtype == "auto" else dtype)
        first = first or settings
        for name, value in settings.items():
            if value != first[name]:
                raise ValueError(f"{logs[0].run} and {run} are not comparable: {name}={first[name]} and "
                                 f"{value}")
        same = repr(log.cfg), cfg["flops"], cfg["seed"]
        if same in seen:
            raise ValueError(f"{seen[same]} and {run} are the same run, with seed={cfg['seed']}: give one")
        seen[same] = run
    for log in logs:
        if budgets[budget := log.settings["flops"]] == 1:
            others = ", ".join(f"{other:g}" for other in budgets if other != budget) or "none"
            raise ValueError(f"{log.run} alone has flops={budget:g} (other budgets: {others}): there is "
                             "nothing to compare it with")


class Group:
    """The runs of one model with one budget; they differ by their seeds, over which numbers are averaged."""

    def __init__(self, logs: list[Log]):
        self.run, self.cfg = logs[0].run, logs[0].cfg
        words = [value if isinstance(value, str) else name if value else f"no {name}" for name in VARIED
                 if (value := getattr(self.cfg, name)) != getattr(GPTConfig, name)]
        self.variant = " ".join([self.cfg.ffn, *words])
        with torch.device("meta"):
            self.total, self.active = GPT(self.cfg).num_params()
        by_step = [{entry["step"]: entry for entry in log.evals} for log in logs]
        self.evals = [entry | {key: statistics.fmean(entries[step][key] for entries in by_step)
                               for key in ("seconds", "val_loss", "val_bits_per_byte")}
                      for step, entry in by_step[0].items() if all(step in entries for entries in by_step)]
        self.last = self.evals[-1]
        self.loss, self.losses = self.last["val_loss"], [log.evals[-1]["val_loss"] for log in logs]
        versions = [start["versions"] for log in logs for start in log.starts]
        self.machines = {f"{v['machine']}, {v.get('processes', 1)} process(es)" for v in versions}


def group_runs(logs: list[Log]) -> dict[float, list[Group]]:
    """The groups of each budget, the lowest loss first."""
    alike, budgets = defaultdict(list), defaultdict(list)
    for log in logs:
        alike[log.settings["flops"], repr(log.cfg)].append(log)
    for (budget, _), of_model in alike.items():
        budgets[budget].append(Group(of_model))
    return {budget: sorted(budgets[budget], key=lambda group: group.loss) for budget in sorted(budgets)}


def layer_sizes(cfg: GPTConfig) -> str:
    if cfg.ffn in ("sgatlin", "peer"):
        return f"{cfg.n_channels} x {cfg.n_experts} k {cfg.top_k} d_key {cfg.d_key}"
    return f"{cfg.n_experts} x {cfg.d_ff} k {cfg.top_k}" if cfg.ffn == "moe" else f"{cfg.d_ff}"


def seconds_to(evals: list[dict], loss: float) -> float | None:
    """When the validation loss, linear between evaluations, first reaches a value; None: never."""
    for a, b in itertools.pairwise(evals):
        if a["val_loss"] <= loss:
            return a["seconds"]
        if b["val_loss"] <= loss:
            share = (a["val_loss"] - loss) / (a["val_loss"] - b["val_loss"])
            return a["seconds"] + share * (b["seconds"] - a["seconds"])
    return None


def race(best: dict[str, Group], groups: list[Group]) -> list[list]:
    """Seconds to the loss of the best size of another variant, in the quickest of sgatlin; or, where none
    gets there, the other way round."""
    rows = []
    for rival in [name for name in best if name != "sgatlin" in best]:
        for runner, goal in (("sgatlin", best[rival]), (rival, best["sgatlin"])):
            times = [seconds_to(group.evals, goal.loss) for group in groups if group.variant == runner]
            seconds, own = min((t for t in times if t is not None), default=None), goal.last["seconds"]
            reached = ["-", "-"] if seconds is None else [seconds, seconds / own]
            rows.append([runner, goal.variant, goal.loss, own, *reached])
            if seconds is not None:
                break
    return rows


def isoflop(runs: list[Path]) -> Section:
    """Runs that spent equal FLOPs: the losses of models and sizes, and the seconds to equal loss."""
    logs = [read_log(run) for run in runs]
    check_comparable(logs)
    tables, figures, notes = [], [], ""
    for budget, groups in group_runs(logs).items():
        best = {}       # of each variant the size of the lowest loss
        for group in groups:
            best.setdefault(group.variant, group)
        rows = [[group.variant, "*" if best[group.variant] is group else "", str(group.run),
                 f"{group.cfg.n_layer} x {group.cfg.d_model}, {layer_sizes(group.cfg)}", group.total,
                 group.active, group.last["tokens"], group.last["step"], len(group.losses), group.loss,
                 statistics.stdev(group.losses) if len(group.losses) > 1 else "-", math.exp(group.loss),
                 group.last["val_bits_per_byte"], group.last["seconds"]] for group in groups]
        tables.append((f"{budget:g} FLOPs: validation loss",
                       ["variant", "best size", "first run", "n_layer x d_model, ffn", "parameters", "active",
                        "tokens", "steps", "seeds", "loss", "sd", "perplexity", "bits per byte", "seconds"],
                       rows))
        timed, machines = list(best.values()), set().union(*(group.machines for group in groups))
        if len(machines) > 1:
            timed, notes = [], (f"{notes} At {budget:g} FLOPs no seconds are compared: the runs are of "
                                f"{' and of '.join(sorted(machines))}.")
        elif rows := race(best, groups):
            tables.append((f"{budget:g} FLOPs: seconds to equal loss",
                           ["variant", "reaches the final loss of", "loss", "which took", "after", "ratio"],
                           rows))
        figures.append(isoflop_figure(budget, groups, timed))
    return Section(
        "Equal FLOPs", "Runs that spent the same FLOPs of training, counted as in the paper; the lowest "
        "loss first, in nats per token of validation text after the last step. A star marks the best sizes "
        "of a variant. Numbers are means over seeds, and sd their standard deviation; seconds are those "
        "of the steps, without evaluations. Seconds to equal loss are those of the quickest sizes of the "
        "first variant and of the best of the second: a ratio below 1 means that the first is quicker, and "
        "- that it never reaches that loss; then the line below has the other way round. A falling learning "
        "rate brings a run to its low losses only near its end, so a run planned for just that loss would "
        f"need fewer seconds than these.{notes}",
        tables, figures)


def isoflop_figure(budget: float, groups: list[Group], timed: list[Group]) -> dict:
    """The final loss against parameters, and, of the best sizes, the loss against seconds."""
    lines = {}
    for variant in sorted({group.variant for group in groups}):
        sizes = sorted((group.total, group.loss) for group in groups if group.variant == variant)
        lines[variant] = [dict(zip("xy", zip(*sizes)))]
        lines[variant] += [line(group.evals, "seconds") for group in timed if group.variant == variant]
    axes = [(axis(name, type="log"), {}) for name in ("parameters", "seconds")[:1 + bool(timed)]]
    return panels(lines, axes, f"Validation loss with {budget:g} FLOPs", 420)


# -----------------------------------------------------------------------------------------------------------
# the command line

def repeated(name: str, subject: Subject) -> Section | None:
    """What the experiment of that name wrote to the folder of the report, if it did."""
    file = subject.args.out_dir / f"{name}.json"
    if not file.exists():
        return None
    try:
        [saved] = json.loads(file.read_text(encoding="utf-8")).values()
        return Section(**saved)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{file} is not what python analyze.py {name} writes") from None


OPTIONS = {
    "out_dir": dict(type=Path, default=Path("out"), help="folder of run and results (default: out)"),
    "device": dict(choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)"),
    "windows": dict(type=int, default=128, help="of validation text to record (default: 128)"),
    "layer": dict(type=int, help="of neighbours and single pictures (default: the last but one), or to "
                                 "mimic (default: the middle one)"),
    "channel": dict(type=int, help="(default: all together)"),
    "prompt": dict(help="text whose neighbours to find (default: a passage of the validation text)"),
    "template": dict(help="text with {} for the word that differs between prompts"),
    "min_count": dict(type=int, default=5, help="occurrences that make a fact (default: 5)"),
    "teacher": dict(type=Path, help="folder of a run of --ffn=mlp (default: out_dir)"),
    "quick": dict(action="store_true", default=False, help="few, short trainings, to see that it works"),
}
RECORDED = "out_dir", "device", "windows", "layer", "channel"
COMMANDS = {    # name: parts, help, options. A part takes the Subject and may return a Section
    "report": ([lambda subject: curves([subject.args.out_dir]), neighbors, structure, circuit_map, usage,
                patching, functools.partial(repeated, "mimic"), functools.partial(repeated, "redistribute"),
                functools.partial(repeated, "isoflop")],
               "everything (the default)", (*RECORDED, "prompt", "template", "min_count")),
    "neighbors": ([neighbors], "the circuits nearest to those of a text", (*RECORDED, "prompt")),
    "map": ([structure, circuit_map], "circuits in the plane, and whether near ones mean alike", RECORDED),
    "usage": ([usage], "which neurons are used, and which together", RECORDED),
    "patch": ([patching], "the gates of one prompt in another", (*RECORDED[:2], "template", "min_count")),
    "mimic": ([mimic], "students of a dense layer, with few active neurons",
              (*RECORDED[:4], "teacher", "quick")),
    "redistribute": ([redistribute], "do sparse layers leave more to attention? trains tiny models of x + 7",
                     (*RECORDED[:2], "quick")),
    "curves": ([lambda args: curves(args.runs)], "loss against steps, tokens, FLOPs, seconds", RECORDED[:1]),
    "isoflop": ([lambda args: isoflop(args.runs)], "models trained with equal FLOPs: loss, size and seconds",
                RECORDED[:1]),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"analyze.py: {message} (--help lists the options)\n")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command, or report, and all OPTIONS; those that are not the command's have their defaults."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command, (_, text, options) in COMMANDS.items():
        sub = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        for option in options:
            sub.add_argument(f"--{option}", **OPTIONS[option])
        if command in ("curves", "isoflop"):
            sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log")
    named = argv and argv[0] in (*COMMANDS, "-h", "--help")
    args = parser.parse_args(argv if named else ["report", *argv])
    args = argparse.Namespace(**{name: kind.get("default") for name, kind in OPTIONS.items()} | vars(args))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch sees no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, least in (("windows", 2), ("min_count", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}={getattr(args, name)} must be {least} or more")
    return args


def main(argv: list[str] | None = None) -> None:
    args, begin = parse_args(sys.argv[1:] if argv is None else argv), time.perf_counter()
    sys.stdout.reconfigure(errors="replace")    # a terminal that cannot show a character shows "?"
    plotly_js, why = extra("plotly.offline", "get_plotlyjs")
    path, sections = args.out_dir / f"{args.command}.html", []
    try:
        if args.command == "map" and not plotly_js:
            raise ValueError(f"a map needs plotly, and is better with UMAP: pip install plotly umap-learn ({why})")
        subject = args if args.command in ("redistribute", "curves", "isoflop") else Subject(args)
        args.out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out_dir).close()    # can it be written? Found before the computing
        for part in COMMANDS[args.command][0]:
            try:
                sections += filter(None, [part(subject)])
            except ValueError as error:
                if args.command != "report":        # which goes on without a log, or facts
                    raise
                sections.append(Section(f"Part {len(sections) + 1}: left out", f"{error}."))
        content = json.dumps({section.title: vars(section) for section in sections}, ensure_ascii=False)
        replace(path.with_suffix(".json"), content)
        if plotly_js:
            replace(path, page(f"sgatlin: {args.command} of {args.out_dir}", sections, plotly_js()))
        for section in sections:
            section.print(14 if args.command == "report" else 10_000)
        pictures = path if plotly_js else f"no pictures: pip install plotly ({why})"
        print(f"\nwrote {path.with_suffix('.json')} and {pictures} in {time.perf_counter() - begin:.0f} s",
              flush=True)
    except BrokenPipeError:     # `| head` has seen enough; all is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # what is left in the buffer
    except (OSError, ValueError) as error:
        raise SystemExit(f"analyze.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
