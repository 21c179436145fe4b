"""Read the circuits of a trained sgatlin (arXiv 2606.07414, section 4), and compare it with others.

    python analyze.py                                        # everything about out/: a report
    python analyze.py neighbors --prompt "Once upon a time"  # the circuits most like a text's
    python analyze.py map                                    # do near circuits mean alike? a map
    python analyze.py usage                                  # which neurons are used, and together
    python analyze.py patch --template "The {} was"          # the gates of one prompt in another
    python analyze.py explain --prompt "Once upon a time"    # what adds up to the next token
    python analyze.py neuron 0 3:141                         # what one neuron reads and writes
    python analyze.py mimic --teacher=out-mlp                # is a dense layer secretly sparse?
    python analyze.py redistribute                           # what does attention take over?
    python analyze.py curves out other/log.jsonl             # loss against steps, FLOPs, seconds
    python analyze.py isoflop runs/*                         # at equal FLOPs, which layer is best?

A circuit is the sparse vector of a token's gates in one layer: C*k scores among C*E neurons. Layers
and channels count from 0, as in model.blocks. Every command prints its tables and writes
COMMAND.html and COMMAND.json to out_dir. Pictures need plotly; the map is better with umap-learn.

Every study is a chapter that can be read alone: what it asks, a function that computes, one that
makes a section of the report, and its command. To drop one, delete it, and its lines in run_report
and parse_args; ruff check then names what another chapter took from it.

Letters: W windows, T time, N = W*T tokens, L layers, D d_model, C channels, E neurons per channel,
n = sqrt(E) sub-keys, k top-k, J = C*k, R = C*E rows, V vocab, Q queries, M points, F facts.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import html
import itertools
import json
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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from model import GPT, MLP, PEER, GPTConfig, Router, SparselyGatedLinear, load_model
from prepare_data import open_text
from train import Data, TrainConfig, idle_settings, keep_memory

# Extras are imported before anything is computed. Whatever goes wrong counts as missing: it may be
# another package of that name, or have a dependency that does not load.
try:
    import plotly.graph_objects as go
    from plotly.offline import get_plotlyjs
    from plotly.subplots import make_subplots
    NO_PLOTLY = ""
except Exception as error:
    go = None
    NO_PLOTLY = f"{type(error).__name__}: {error}"


class Mistake(ValueError):
    """The user's: main prints its one line. Other errors keep their tracebacks."""


# --------------------------------------------------------------------------------------------------
# results: tables for the terminal, pictures for the report

class Estimate(NamedTuple):
    """A mean and half its 95 % confidence interval, or, where said, its standard deviation."""
    mean: float | None      # None: unknown
    half: float | None      # None: unknown


def jackknife(values: np.ndarray, belongs: np.ndarray) -> Estimate:
    """The mean of values (n,); its interval comes from leaving out each unit in turn.

    belongs (units, n) says which values are of a unit: a window or a fact. Tokens of one window,
    and pairs with a fact in common, are not independent; units are.
    """
    if np.isnan(values).any() or belongs.all(axis=1).any():     # without that unit there is nothing
        return Estimate(None, None)
    units = len(belongs)
    means = np.array([values[~part].mean() for part in belongs])
    squares = np.square(means - means.mean()).sum()
    return Estimate(float(values.mean()), 1.96 * math.sqrt((units - 1) / units * squares))


class Table(NamedTuple):
    caption: str
    header: list[str]
    rows: list[list]    # of strings, numbers, Estimates, and None for what is not known


@dataclass
class Section:
    """A part of the report; text says how to read it. figures are plotly's, none without plotly."""
    title: str
    text: str
    tables: list[Table] = field(default_factory=list)
    figures: list = field(default_factory=list)
    explorer: str = ""      # HTML to click, which PAGE_SCRIPT brings to life


def cell(value) -> str:
    """A value of a table as text."""
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        if value.mean is None:
            return "-"
        half = "?" if value.half is None else f"{value.half:.3f}"
        return f"{value.mean:.3f} ± {half}"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}" if value < 10**11 else f"{value:.3g}"       # the latter are FLOPs
    return value


def print_section(section: Section, most_rows: int) -> None:
    print(f"\n== {section.title} ==\n{section.text}")
    for caption, header, rows in section.tables:
        lines = [header]
        for row in rows[:most_rows]:
            lines.append([cell(value) for value in row])
        widths = [max(map(len, column)) for column in zip(*lines)]
        print(f"\n{caption}")
        for line in lines:
            padded = [text.ljust(width) for text, width in zip(line, widths)]
            print("  " + "  ".join(padded).rstrip())
        if len(rows) > most_rows:
            print(f"  and {len(rows) - most_rows} more rows in the report")


def progress(text: str) -> None:
    """On stderr, so that `analyze.py ... | head` does not stop the computing."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


# Colours that can be told apart also side by side; the last, grey, is for what has no class.
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#f781bf", "#222222",
           "#17becf", "#d4b400", "#7fd87f", "#0b2f8c", "#aaaaaa")


WHITE_EDGE = ", ".join(f"{x}px {y}px 2px #fff" for x in (-1, 1) for y in (-1, 1))     # of letters


def figure_html(figure) -> str:
    """A chart as HTML, for a page that has plotly.js in it."""
    figure.update_layout(template="plotly_white")
    return figure.to_html(full_html=False, include_plotlyjs=False,
                          config=dict(responsive=True, displayModeBar=False))


def bar_chart(title: str, bars: dict[str, dict[str, Estimate]], height: int = 360):
    """Groups of bars: {name in the legend: {place on the x axis: Estimate}}."""
    figure = go.Figure(layout=dict(title=title, height=height, barmode="group"))
    for colour, (name, values) in zip(itertools.cycle(COLOURS), bars.items()):
        figure.add_bar(name=name, x=list(values), y=[value.mean for value in values.values()],
                       marker_color=colour,
                       error_y=dict(array=[value.half for value in values.values()]))
    return figure


def line_charts(title: str, axes: list[tuple[str, str]], lines: dict[str, list[tuple]],
                height: int = 360, **settings):
    """Charts two in a row, one for each of axes, (title of x, title of y), with logarithmic x.

    lines: {name in the legend: [(x, y) for each chart]}. settings are those of all y axes.
    """
    rows = math.ceil(len(axes) / 2)
    figure = make_subplots(rows=rows, cols=min(len(axes), 2))
    figure.update_layout(title=title, height=height * rows)
    for place, (x_title, y_title) in enumerate(axes):
        cell_of = dict(row=place // 2 + 1, col=place % 2 + 1)
        figure.update_xaxes(title=x_title, type="log", **cell_of)
        figure.update_yaxes(title=y_title, **settings, **cell_of)
        for colour, (name, charts) in zip(itertools.cycle(COLOURS), lines.items()):
            x, y = charts[place]
            figure.add_scatter(x=x, y=y, name=name, legendgroup=name, showlegend=place == 0,
                               mode="lines+markers", marker=dict(color=colour, size=5), **cell_of)
    return figure


# --------------------------------------------------------------------------------------------------
# the page: sections as one HTML file that loads nothing

PAGE_STYLE = """
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f6f7f9; margin: 0 auto;
       max-width: 1400px; padding: 0 20px 60px }
h1 { font-size: 21px; margin: 16px 0 2px } h2 { font-size: 22px; margin: 48px 0 8px }
h3 { font-size: 14px; margin: 16px 0 4px } p { max-width: 56em; margin: 4px 0 12px }
.lead { max-width: none }
nav a { margin-right: 1.2em } a { color: #1d5fc4 }
mark { background: #ffe08a; border-radius: 2px } .quiet { color: #667180; font-size: 13px }
.explorer { display: grid; gap: 14px;
            grid-template: "passage panel" auto "map panel" 1fr / minmax(0, 3fr) minmax(0, 2fr) }
.box { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 12px 16px }
#reading { grid-area: passage } #mapping { grid-area: map }
#panel { grid-area: panel; position: sticky; top: 12px; max-height: calc(100vh - 24px);
         overflow: auto; overscroll-behavior: contain; align-self: start; min-height: 60vh }
#passage { font-size: 18px; line-height: 1.65; margin: 0 0 6px; white-space: pre-wrap }
#passage span { cursor: pointer; border-radius: 3px; padding: 2px 0 }
#passage span:hover { outline: 1px solid #8a96a6 }
#passage .chosen, #passage span:focus { outline: 2px solid #1c2430 }
select, #views button { font: inherit; font-size: 14px; padding: 2px 8px; border-radius: 5px;
                        border: 1px solid #b9c1cb; background: #fff; cursor: pointer }
#views button[aria-pressed=true] { background: #1c2430; color: #fff }
#map { height: 680px !important }
.controls { display: flex; gap: 8px; flex-wrap: wrap; align-items: center; margin-bottom: 8px }
.row { display: flex; gap: 10px; padding: 3px 0; border-bottom: 1px solid #eef0f3;
       font-size: 14px; line-height: 1.35 }
.row > :first-child { flex: 0 0 3.2em; text-align: right; font-variant-numeric: tabular-nums }
.excerpt { white-space: pre-wrap; overflow-wrap: anywhere } summary { cursor: pointer }
summary.row:hover { background: #f3f5f8 } details[open] > summary { font-weight: 600 }
.card { border-left: 3px solid #b9c1cb; margin: 4px 0 12px 8px; padding-left: 12px }
.word { display: inline-block; background: #eef1f5; border-radius: 4px; padding: 0 6px;
        margin: 0 4px 3px 0; font-size: 13px; white-space: pre }
.bars { display: flex; align-items: flex-end; height: 40px; gap: 1px; max-width: 300px }
.bars i { flex: 1; background: #7c9cc9; min-height: 1px }
.search { float: right; padding: 3px 8px; width: 20em; max-width: 100% }
.table { max-height: 460px; overflow: auto; background: #fff; clear: both }
table { border-collapse: collapse; font: 13px/1.5 ui-monospace, monospace; width: 100% }
th { position: sticky; top: 0; background: #e9ecf0; text-align: left }
td, th { padding: 3px 10px; border-bottom: 1px solid #eee; white-space: pre-wrap }
@media (max-width: 900px) {
  body { padding: 0 8px 40px }
  .explorer { grid-template: "passage" "panel" "map" / minmax(0, 1fr) }
  #panel { position: static; max-height: 75vh; min-height: 0; overscroll-behavior: auto }
  #map { height: 620px !important }
}
"""
PAGE_SCRIPT = r"""
"use strict";

// A search box hides the rows of its table that lack its text.
for (const box of document.querySelectorAll(".search")) box.addEventListener("input", () => {
  for (const row of box.parentElement.querySelector("tbody").rows)
    row.hidden = !row.textContent.toLowerCase().includes(box.value.toLowerCase());
});

// The map: a button for each view. layout.meta.views holds [label, traces, layout] of each.
const map = document.getElementById("map");
function showView(label) {
  const view = map.layout.meta.views.find(view => view[0] === label);
  Plotly.update(map, view[1], view[2]);
  for (const button of document.querySelectorAll("#views button"))
    button.setAttribute("aria-pressed", button.textContent === label);
}
if (map) {
  for (const [label] of map.layout.meta.views) {
    const button = make("button", "", label);
    button.addEventListener("click", () => showView(label));
    document.getElementById("views").append(button, " ");
  }
  showView(map.layout.meta.first);
  // A finger that drags scrolls the page.
  if (matchMedia("(pointer: coarse)").matches) Plotly.relayout(map, { dragmode: false });
}

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

// The explorer: a token of the passage, or a point of the map, and all that is known of it.
function explore(data) {
  const passage = document.getElementById("passage");
  const details = document.getElementById("details");
  const layer = document.getElementById("layer");
  const channel = document.getElementById("channel");     // 0 is all of them
  const decoder = new TextDecoder();
  let shown = null;         // what the panel shows

  function text(tokens) {   // a vocabulary entry has a character for each byte
    const bytes = tokens.map(token => data.vocabulary[token]).join("");
    return decoder.decode(Uint8Array.from(bytes, letter => letter.charCodeAt(0)))
      .replaceAll("\r", "").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/  +/g, "  ");
  }
  const word = token => text([token]).replaceAll(" ", "·");
  const neuron = row => Math.floor(row / data.E) + ":" + row % data.E;
  const signed = value => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

  function marked(before, token, after) {       // a blank before the token is not marked
    const blank = token.trim() && token.startsWith(" ") ? " " : "";
    return make("div", "excerpt", before.trimStart() + blank,
                make("mark", "", token.slice(blank.length)), after);
  }
  function excerpt(tokens, at, start, end) {
    return marked(text(tokens.slice(Math.max(start, at - 7), at)), text([tokens[at]]),
                  text(tokens.slice(at + 1, Math.min(at + 5, end))));
  }
  function recordedExcerpt(place) {     // within its window
    const start = place - place % data.T;
    return excerpt(data.recorded, place, start, start + data.T);
  }
  function expected(next) {
    return make("div", "quiet", next.map(([token, p]) => word(token) + " " + p.toFixed(2))
                                    .join("  "));
  }
  function words(title, pairs) {
    return make("div", "", make("span", "quiet", title + " "),
                ...pairs.map(([token, value]) =>
                  make("span", "word", word(token) + " " + signed(value))));
  }

  function card(of) {
    const most = Math.max(1, ...of.counts);
    const bars = of.counts.map((count, i) => {
      const bar = make("i", "");
      bar.style.height = 100 * count / most + "%";
      bar.title = "from " + (of.first + i * of.step).toFixed(2) + ": " + count;
      return bar;
    });
    const rows = of.excerpts.map(([product, place]) =>
      make("div", "row", make("span", "", signed(product)), recordedExcerpt(place)));
    const last = of.first + of.counts.length * of.step;
    return make("div", "card",
      make("div", "quiet", (100 * of.use).toFixed(1) + " % of tokens choose it; their gates, " +
           of.first.toFixed(1) + " to " + last.toFixed(1) + ":"), make("div", "bars", ...bars),
      words("promotes", of.promotes), words("suppresses", of.suppresses),
      words("reads", of.reads), make("div", "quiet", "Where gate × reading is largest; where " +
      "that is negative, it promotes what it otherwise suppresses:"), ...rows);
  }
  // A neuron that adds product * w_out. Its card is made when it is opened.
  function neuronRow(value, label, atLayer, row, product) {
    const of = data.cards[atLayer + " " + row];
    const line = [make("span", "", signed(value)), make("span", "excerpt", label)];
    if (!of) return make("div", "row", ...line);
    const writes = product < 0 ? of.suppresses : of.promotes;
    line[1].append(make("span", "quiet", "  " + writes.slice(0, 5).map(p => word(p[0])).join(" ")));
    const element = make("details", "", make("summary", "row", ...line));
    element.addEventListener("toggle", () => {
      if (element.children.length === 1) element.append(card(of));
    });
    return element;
  }

  function render() {
    const l = Number(layer.value), c = Number(channel.value);
    const near = shown.near[l][c] || shown.near[l][0];
    const of = shown.near[l][c] ? channel.selectedOptions[0].text : "channels of the map";
    const neurons = shown.neurons[l].filter(([row]) => !c || Math.floor(row / data.E) === c - 1);
    const why = shown.explained;
    const next = shown.next.map(([token, p]) => make("span", "word", `${word(token)} ${p}`));
    const parts = [shown.excerpt(), make("div", "", make("span", "quiet", "next: "), ...next)];
    parts.push(make("h3", "", `Nearest circuits, layer ${l}, ${of}`));
    for (const [place, distance] of near)
      parts.push(make("div", "row", make("span", "quiet", distance.toFixed(2)),
        make("div", "", recordedExcerpt(place), expected(data.next[place]))));
    parts.push(make("h3", "", `Its neurons in layer ${l}`), make("div", "quiet",
      "Gate × reading, channel:neuron, and the tokens it promotes here. Open one."));
    for (const [row, product] of neurons.slice(0, 8))
      parts.push(neuronRow(product, neuron(row), l, row, product));
    if (why) {
      parts.push(make("h3", "", `What carries “${word(why.target)}”`), make("div", "quiet",
        "Neurons that add most to its logit: share, layer, at which token, channel:neuron."));
      for (const [atLayer, at, row, share, product] of why.neurons)
        parts.push(neuronRow(share, `${atLayer}  ${word(data.passage[at])}  ${neuron(row)}`,
                             atLayer, row, product));
    }
    details.replaceChildren(...parts);
    const shares = why ? why.shares : [];
    const largest = Math.max(...shares.map(Math.abs));
    [...passage.children].forEach((token, i) => {
      const known = i < shares.length;
      const strength = known ? 0.7 * Math.sqrt(Math.abs(shares[i]) / largest) : 0;
      token.style.background = `rgba(${shares[i] < 0 ? "245,120,20" : "50,130,245"},${strength})`;
      token.title = known ? signed(shares[i]) : "";
    });
    document.getElementById("legend").textContent = why ?
      `Shaded: what each token adds to the logit of “${word(why.target)}”, blue for it, ` +
      `orange against it; they add up to ${signed(why.logit)} over the mean logit.` : "";
  }

  function show(item) {
    shown = item;
    details.parentElement.scrollTop = 0;
    render();
  }
  function choose(i) {      // a token of the passage
    for (const token of passage.children) {
      const chosen = token === passage.children[i];
      token.classList.toggle("chosen", chosen);
      token.setAttribute("aria-pressed", chosen);
      token.tabIndex = chosen ? 0 : -1;
    }
    show({ near: data.near.map(channels => channels.map(tokens => tokens[i])),
           neurons: data.neurons.map(tokens => tokens[i]), next: data.expected[i],
           explained: data.explained[i],
           excerpt: () => excerpt(data.passage, i, 0, data.passage.length) });
  }

  data.passage.forEach((token, i) => {
    const element = make("span", "", i ? text([token]).replaceAll("⏎", "⏎\n") : "▸");
    element.setAttribute("role", "button");
    element.addEventListener("click", () => choose(i));
    passage.append(element);
  });
  passage.addEventListener("keydown", event => {
    const at = [...passage.children].indexOf(document.activeElement);
    const last = data.passage.length - 1;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last, Enter: at,
                 " ": at }[event.key];
    if (to === undefined || to < 0 || to > last) return;
    event.preventDefault();
    passage.children[to].focus();
    choose(to);
  });
  layer.addEventListener("change", () => {
    if (map) showView("layer " + layer.value);
    render();
  });
  channel.addEventListener("change", render);
  if (map) {
    map.on("plotly_click", event => {
      const place = event.points[0].customdata;
      const { near, neurons } = data.points[place];
      passage.querySelector(".chosen")?.classList.remove("chosen");
      show({ near: near.map(pairs => [pairs]), neurons, explained: null,
             next: data.next[place], excerpt: () => recordedExcerpt(place) });
    });
    document.getElementById("views").addEventListener("click", event => {
      const label = event.target.textContent.match(/layer (\d+)/);
      if (label) layer.value = label[1];
      render();
    });
  }
  layer.value = data.layer;
  channel.value = data.channel;
  choose(data.start);
}
const data = document.getElementById("data");
if (data) explore(JSON.parse(data.textContent));
"""


def table_html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    lines = []
    for row in table.rows:
        cells = "".join(f"<td>{html.escape(cell(value))}</td>" for value in row)
        lines.append(f"<tr>{cells}</tr>")
    body = "\n".join(lines).replace("»", "<mark>").replace("«", "</mark>")
    caption = html.escape(table.caption)
    return (f'<div><input class="search" placeholder="search" aria-label="search in: {caption}">'
            f"<h4>{caption}</h4>"
            f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            "</div></div>")


def page(title: str, sections: list[Section]) -> str:
    """The report as one HTML page, with plotly.js in it if it is installed: what can be clicked and
    the charts, then the tables, and then the last section, whole."""
    pictures = []
    tables = []
    last = []
    for section in sections:
        lead = f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"
        figures = [figure_html(figure) for figure in section.figures]
        own_tables = [table_html(table) for table in section.tables]
        if section is sections[-1]:
            last = [section.explorer or lead, *figures, *own_tables]
        else:
            pictures += [section.explorer or lead, *figures]
            tables += own_tables
    if tables:
        tables.insert(0, "<h2>Tables</h2>")
    plotly = f"<script>{get_plotlyjs()}</script>" if go else ""
    return "\n".join([
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<link rel='icon' href='data:,'><title>{html.escape(title)}</title>",
        f"<style>{PAGE_STYLE}</style>{plotly}</head><body><h1>{html.escape(title)}</h1>",
        *pictures, *tables, *last, f"<script>{PAGE_SCRIPT}</script></body></html>"])


def write(path: Path, text: str) -> None:
    """Writes text to path, which holds the old text or the new one at any time."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def check_writable(folder: Path) -> None:
    """Raises OSError now, and not after the computing, if results cannot be written there."""
    while not folder.exists():
        folder = folder.parent
    tempfile.TemporaryFile(dir=folder).close()


def write_results(out_dir: Path, command: str, sections: list[Section]) -> None:
    """COMMAND.json: {title: [text, tables]}, and COMMAND.html."""
    content = {section.title: [section.text, section.tables] for section in sections}
    out_dir.mkdir(parents=True, exist_ok=True)
    write(out_dir / f"{command}.json", json.dumps(content, ensure_ascii=False))
    write(out_dir / f"{command}.html", page(f"sgatlin: {command} of {out_dir}", sections))


# --------------------------------------------------------------------------------------------------
# what chapters about circuits share: a run, its recordings, and similar circuits

class Circuits(NamedTuple):
    """N sparse vectors with J values each, at these rows of R."""
    values: Tensor      # (N, J) float32
    rows: Tensor        # (N, J) int32
    size: int           # R

    def at(self, places) -> "Circuits":
        return Circuits(self.values[places], self.rows[places], self.size)


@dataclass
class Recording:
    """What a model did on windows of text; its N tokens in the order of the windows."""
    cfg: GPTConfig
    tokens: np.ndarray      # (W, T)
    gates: Tensor           # (L, N, J) float32
    rows: Tensor            # (L, N, J) int32: the neurons, c * E + id
    products: Tensor        # (L, N, J) float32: gate * <w_in, x>, by which w_out is multiplied
    top: Tensor             # (N, 5) the likeliest next tokens
    p: Tensor               # (N, 5) their probabilities
    embedding: Tensor       # (V, D) of the model

    def circuits(self, layer: int, channel: int | None) -> Circuits:
        """Those of all tokens, scaled to unit length, of one channel or of all."""
        gates = self.gates[layer]
        rows = self.rows[layer]
        if channel is not None:
            k = self.cfg.top_k
            gates = gates[:, channel * k:channel * k + k]
            rows = rows[:, channel * k:channel * k + k].contiguous()
        lengths = gates.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return Circuits(gates / lengths, rows, self.cfg.n_channels * self.cfg.n_experts)


@contextlib.contextmanager
def router_hook(model: GPT, hook: Callable) -> Iterator[None]:
    """hook(layer, x (N, D), gates (N, C, k), ids (N, C, k)) sees every routing, of what the layer
    reads, and may return other gates and ids."""
    with contextlib.ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            def listen(module, inputs, output, layer=layer):
                return hook(layer, *inputs, *output)
            stack.enter_context(block.ffn.router.register_forward_hook(listen))
        yield


def first_rows(cfg: GPTConfig, device: str | torch.device) -> Tensor:
    """(C, 1) int32: the rows of the first neurons of the channels."""
    return torch.arange(cfg.n_channels, dtype=torch.int32, device=device)[:, None] * cfg.n_experts


@torch.inference_mode()
def record(model: GPT, windows: Tensor, name: str) -> Recording:
    """Runs windows (W, T) int64; keeps 12 bytes per gate, L * N * J of them, on the CPU."""
    cfg = model.cfg
    device = model.embedding.weight.device
    W, T = windows.shape
    gates = torch.empty(cfg.n_layer, W * T, cfg.n_channels * cfg.top_k)
    rows = torch.empty(gates.shape, dtype=torch.int32)
    products = torch.empty(gates.shape)
    first = first_rows(cfg, device)
    top = torch.empty(W * T, 5, dtype=torch.int64)
    p = torch.empty(W * T, 5)
    progress(f"record {name} on {W} x {T} tokens, {12 * gates.numel() / 1e6:.1f} MB")
    batch = max(1, 2**24 // (T * cfg.vocab_size))       # windows at a time: 64 MB of logits
    for start in range(0, W, batch):
        part = windows[start:start + batch]
        here = slice(start * T, start * T + part.numel())

        def keep(layer, x, layer_gates, ids, here=here):
            layer_rows = (ids + first).flatten(1)                       # (N', J)
            w_in = model.blocks[layer].ffn.w_in.flatten(0, 1)           # (R, D)
            readings = kernels.gather_dot(x, w_in, layer_rows)          # (N', J)
            gates[layer, here] = layer_gates.flatten(1).cpu()
            rows[layer, here] = layer_rows.cpu()
            products[layer, here] = (layer_gates.flatten(1) * readings).cpu()

        with router_hook(model, keep):
            logits = model(part.to(device))[0].flatten(0, 1)            # (N', V)
        values, best = logits.topk(5)
        top[here] = best.cpu()
        p[here] = (values - logits.logsumexp(1, keepdim=True)).exp().cpu()
    return Recording(cfg, windows.numpy(), gates, rows, products, top, p,
                     model.embedding.weight.cpu())


CONTEXT = 8         # tokens, up to the one in question: equal contexts have equal circuits


class Run:
    """A checkpoint of train.py, its text, and what is recorded of it once.

    Raises Mistake if out_dir holds no checkpoint, or its data is not there any more.
    """

    def __init__(self, out_dir: Path, device: str, windows: int):
        self.path = out_dir / "ckpt.pt"
        self.device = device
        try:
            self.model, state = load_model(self.path, device)
            folder = Path(state["config"]["data_dir"])
            self.data = Data(folder, self.model.cfg.block_size)
        except ValueError as error:
            raise Mistake(str(error)) from None
        self.cfg = self.model.cfg
        self.seed = state["config"]["seed"]
        if self.data.meta["fingerprint"] != state["data"]["fingerprint"]:
            raise Mistake(f"{folder} is not what {self.path} was trained on: prepare that again")
        self.encoding = self.data.encoding
        self.n_windows = windows

    def validation(self) -> tuple[Tensor, Tensor]:
        """Inputs and next tokens (W, T) of the windows to look at, evenly spaced."""
        return self.data.windows("val", self.data.val_starts(self.n_windows))

    @functools.cached_property
    def trained(self) -> Recording:
        return record(self.model, self.validation()[0], "the trained model")

    @functools.cached_property
    def untrained(self) -> Recording:
        """The control: the same windows through the model as it was before its first step."""
        torch.manual_seed(self.seed)
        model = GPT(self.cfg).to(self.device).eval()
        return record(model, self.validation()[0], "an untrained model")

    def text(self, tokens) -> str:
        """Token ids on one line: ⏎ is a newline, and a run of blanks is two."""
        known = [int(token) for token in tokens if token < self.encoding.n_vocab]
        text = self.encoding.decode(known)
        text = text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")
        return re.sub("  +", "  ", text)

    def name(self, token: int) -> str:
        return self.text([token]).replace(" ", "·")

    def excerpt(self, windows: np.ndarray, place: int) -> str:
        """The token at a place among windows (W, T), marked in its text."""
        w, t = divmod(place, windows.shape[1])
        before = self.text(windows[w, max(t - CONTEXT + 1, 0):t])
        after = self.text(windows[w, t + 1:t + 5])
        return f"{before}»{self.text(windows[w, t:t + 1])}«{after}"

    def predictions(self, recording: Recording, place: int) -> str:
        """The three likeliest next tokens and their probabilities."""
        words = []
        for token, p in zip(recording.top[place, :3].tolist(), recording.p[place, :3].tolist()):
            words.append(f"{self.name(token)} {p:.2f}")
        return "  ".join(words)


def circuits_of(out_dir: Path, device: str, windows: int) -> Run:
    """A Run whose gates are circuits. Raises Mistake for other layers."""
    run = Run(out_dir, device, windows)
    if run.cfg.ffn != "sgatlin":
        raise Mistake(f"{run.path} has ffn={run.cfg.ffn}: only the gates of an sgatlin are its "
                      "circuits")
    if run.cfg.softmax_gates or run.cfg.shared_pool:
        raise Mistake(f"{run.path} has softmax_gates or shared_pool: circuits are read from raw "
                      "gates and one pool per channel")
    return run


def pick(name: str, value: int | None, count: int, default: int | None) -> int | None:
    """--layer or --channel, one of count, or the default where it is not given."""
    if value is None:
        return default
    if not 0 <= value < count:
        raise Mistake(f"--{name}={value}: it goes from 0 to {count - 1}")
    return value


PASSAGE = 64        # tokens


def prompt_tokens(run: Run, prompt: str | None) -> list[int]:
    """<|endoftext|> and the tokens of --prompt, text or FILE:path; without one, of the beginning of
    a validation document. Raises Mistake for no tokens, or more than the model takes."""
    if prompt is None:
        text = run.data.tokens("val")
        text = np.asarray(text[len(text) // 2:][:2**20])
        start = 0
        for end, following in itertools.pairwise(np.flatnonzero(text == run.encoding.eot_token)):
            if following - end > PASSAGE:
                start = end + 1
                break
        length = min(PASSAGE, run.cfg.block_size - 1)
        return [run.encoding.eot_token, *text[start:start + length].tolist()]
    text = prompt
    if prompt.startswith("FILE:"):
        try:
            with open_text(Path(prompt.removeprefix("FILE:"))) as file:
                text = file.read()
        except UnicodeError:
            raise Mistake(f"{prompt}: the file is not UTF-8 text") from None
    ids = run.encoding.encode(text, disallowed_special=())
    if not 1 <= len(ids) < run.cfg.block_size:
        raise Mistake(f"--prompt has {len(ids)} tokens: give it 1 to {run.cfg.block_size - 1}")
    return [run.encoding.eot_token, *ids]


def channel_name(channel: int | None) -> str:
    return "all channels" if channel is None else f"channel {channel}"


def similarities(queries: Circuits, circuits: Circuits) -> Iterator[Tensor]:
    """Inner products (N, up to 128) of all circuits with 128 queries at a time, exact.

    The queries are made dense, as a table whose rows gather_sum adds up for every circuit.
    """
    for values, rows in zip(queries.values.split(128), queries.rows.split(128)):
        dense = torch.zeros(len(values), circuits.size).scatter_(1, rows.long(), values)
        yield kernels.gather_sum(circuits.values, dense.T.contiguous(), circuits.rows)


def gram(circuits: Circuits) -> Tensor:
    """(M, M) inner products among circuits."""
    return torch.cat(list(similarities(circuits, circuits)), dim=1)


def centred(gram: Tensor) -> Tensor:
    """The Gram matrix (M, M) of the same vectors less their mean, in float64."""
    gram = gram.double()
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


NEIGHBORS = 10      # shown and scored per circuit, as in the paper


def contexts_of(tokens: np.ndarray) -> Tensor:
    """(W, T) -> (N,) int64, a hash of the last CONTEXT tokens, or of those that the window has."""
    shifted = tokens.astype(np.uint64) + np.uint64(1)       # 0 stands for what is before the window
    padded = np.pad(shifted, ((0, 0), (CONTEXT - 1, 0)))
    factors = np.random.default_rng(0).integers(2**64, size=CONTEXT, dtype=np.uint64)
    last = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT, axis=1)    # (W, T, CONTEXT)
    return torch.from_numpy((last * factors).sum(-1).astype(np.int64).ravel())


def nearest(sim: Tensor, banned: Tensor, contexts: Tensor) -> list[list[tuple[int, float]]]:
    """The NEIGHBORS circuits most similar to each query, (place, similarity), no two in equal
    contexts.

    sim and banned (N, Q), contexts (N,). Fewer where four times as many candidates repeat their
    contexts.
    """
    count = min(4 * NEIGHBORS, len(sim))
    best = sim.masked_fill(banned, -2).T.topk(count)                            # (Q, count)
    found = []
    for values, places in zip(best.values.tolist(), best.indices.tolist()):
        different = {}
        for place, context, value in zip(places, contexts[places].tolist(), values):
            if value > -2:
                different.setdefault(context, (place, value))
        found.append(list(different.values())[:NEIGHBORS])
    return found


# --------------------------------------------------------------------------------------------------
# neighbours: which circuits are most like those of a text? (arXiv 2606.07414, Table 3)

def find_neighbors(run: Run, queries: Circuits, own: Tensor, layer: int,
                   channel: int | None) -> list[list[tuple[int, float]]]:
    """For queries, in contexts own (Q,), the nearest recorded circuits: (place, similarity)."""
    circuits = run.trained.circuits(layer, channel)
    contexts = contexts_of(run.trained.tokens)
    found = []
    for sim in similarities(queries, circuits):
        part = own[len(found):len(found) + sim.shape[1]]
        found += nearest(sim, contexts[:, None] == part, contexts)
    return found


def neighbors_section(run: Run, source: Recording, layer: int, channel: int | None) -> Section:
    """The circuits nearest to those of a passage."""
    places = torch.arange(1, source.tokens.size)
    queries = source.circuits(layer, channel).at(places)
    own = contexts_of(source.tokens)[places]
    rows = []
    found = find_neighbors(run, queries, own, layer, channel)
    for number, (place, near) in enumerate(zip(places.tolist(), found)):
        token = f"{number} {run.name(source.tokens.flat[place])}"
        rows.append([token, "", run.excerpt(source.tokens, place), run.predictions(source, place)])
        for other, similarity in near:
            rows.append([token, 1 - similarity, run.excerpt(run.trained.tokens, other),
                         run.predictions(run.trained, other)])
    return Section(
        "Neighbours", f"Every token of a text, then the {NEIGHBORS} recorded tokens whose circuits "
        f"in layer {layer} ({channel_name(channel)}) are nearest to its own, with the cosine "
        "distance and what the model expects next. Left out: contexts that repeat its own, or each "
        f"other's, over {CONTEXT} tokens.",
        [Table("Nearest circuits", ["token", "distance", "text", "next"], rows)])


def run_neighbors(args: argparse.Namespace) -> list[Section]:
    run = circuits_of(args.out_dir, args.device, args.windows)
    layer, channel = picked(run, args)
    tokens = prompt_tokens(run, args.prompt)
    source = record(run.model, torch.tensor([tokens]), "the prompt")
    return [neighbors_section(run, source, layer, channel)]


def add_neighbors(commands) -> None:
    parser = add_command(commands, "neighbors", "the circuits nearest to those of a text",
                         run_neighbors)
    add_circuit_options(parser)
    add_prompt_option(parser)


# --------------------------------------------------------------------------------------------------
# structure: do near circuits mean alike, more so than without training? (controls to the next one)

class Classes(NamedTuple):
    """Classes of tokens that occur in like contexts."""
    of_token: np.ndarray    # (V,) int64
    names: list[str]        # the most frequent members of each, and at the end "rare tokens"


def context_classes(run: Run, n_tokens: int = 1000, n_classes: int = 12) -> Classes:
    """k-means of the n_tokens most frequent tokens, found without labels, for text of any kind.

    A token is the square roots of the probabilities of the tokens before and after it, in the first
    4 million tokens of training. No model takes part.
    """
    text = np.asarray(run.data.tokens("train")[:2**22]).astype(np.int64)
    often = np.argsort(-np.bincount(text), kind="stable")[:n_tokens]
    rare = len(often)
    place = np.full(run.cfg.vocab_size, rare)       # of a token in often
    place[often] = np.arange(len(often))
    side = len(often) + 1
    pairs = place[text[:-1]] * side + place[text[1:]]
    counts = np.bincount(pairs, minlength=side**2).reshape(side, side)
    after = counts / counts.sum(1, keepdims=True).clip(1)
    before = counts.T / counts.T.sum(1, keepdims=True).clip(1)
    x = torch.from_numpy(np.concatenate([after, before], axis=1)[:-1]).sqrt()   # (n_tokens, 2*side)
    centres = x[:n_classes]
    for _ in range(30):
        label = torch.cdist(x, centres).argmin(1)
        new = centres.clone()
        for c in range(len(centres)):
            if (label == c).any():
                new[c] = x[label == c].mean(0)
        centres = new
    names = []
    for c in range(len(centres)):
        names.append(" ".join(run.name(token) for token in often[label.numpy() == c][:4]))
    of_token = np.append(label.numpy(), len(centres))[place]
    return Classes(of_token, [*names, "rare tokens"])


def neighbor_shares(circuits: Circuits, queries: np.ndarray, tokens: np.ndarray,
                    label: np.ndarray) -> np.ndarray:
    """(2, Q), for queries, places among tokens (W, T): the share of the nearest circuits that have
    the same token, and of the nearest of other tokens that have the same label (N,)."""
    ids = tokens.ravel()
    contexts = contexts_of(tokens)
    found = []
    parts = np.split(queries, range(128, len(queries), 128))
    for part, sim in zip(parts, similarities(circuits.at(queries), circuits)):
        same_token = torch.from_numpy(ids[:, None] == ids[part])                # (N, up to 128)
        near = nearest(sim, contexts[:, None] == contexts[part], contexts)
        near_others = nearest(sim, same_token, contexts)
        for query, all_near, others in zip(part, near, near_others):
            all_places = [place for place, _ in all_near]
            other_places = [place for place, _ in others]
            found.append([np.mean(ids[all_places] == ids[query]),
                          np.mean(label[other_places] == label[query])])
    return np.array(found).T


def chance_shares(queries: np.ndarray, tokens: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The same shares among all circuits."""
    ids = tokens.ravel()
    found = []
    for query in queries:
        other = ids != ids[query]
        found.append([1 - other.mean(), np.mean(label[other] == label[query])])
    return np.array(found).T


def structure(run: Run, channel: int | None,
              label: np.ndarray) -> tuple[np.ndarray, dict[tuple, np.ndarray]]:
    """Places (Q,) of random tokens, and {(layer, gates): shares (2, Q)} of every layer and its
    controls, and of chance, which has no layer."""
    tokens = run.trained.tokens
    rng = np.random.default_rng(0)
    queries = rng.choice(tokens.size, min(1000, tokens.size), replace=False)
    shuffle = rng.permutation(tokens.size)
    result = {}
    for layer in range(run.cfg.n_layer):
        progress(f"score the neighbours of {len(queries)} tokens in layer {layer}")
        trained = run.trained.circuits(layer, channel)
        controls = {"trained": trained, "untrained": run.untrained.circuits(layer, channel),
                    "shuffled": trained.at(shuffle)}
        for name, circuits in controls.items():
            result[layer, name] = neighbor_shares(circuits, queries, tokens, label)
    result[None, "chance"] = chance_shares(queries, tokens, label)
    return queries, result


def structure_section(run: Run, layer: int, channel: int | None, classes: Classes) -> Section:
    """Do near circuits belong to like tokens, more so than without training or with any gates?"""
    W, T = run.trained.tokens.shape
    label = classes.of_token[run.trained.tokens.ravel()]
    queries, shares = structure(run, channel, label)
    of_window = queries // T == np.arange(W)[:, None]                           # (W, Q)
    measures = ["same token", "same class, other token"]
    rows = []
    bars = [defaultdict(dict), defaultdict(dict)]       # of each measure
    for (of_layer, name), both in shares.items():
        estimates = [jackknife(values, of_window) for values in both]
        rows.append([of_layer, name, *estimates])
        if of_layer is not None:
            for chart, estimate in zip(bars, estimates):
                chart[name][f"layer {of_layer}"] = estimate
    columns = {name: both[1] for (at, name), both in shares.items() if at in (layer, None)}
    of_query = label[queries]
    by_class = []
    for c, count in Counter(of_query.tolist()).most_common():
        chosen = of_query == c
        estimates = [jackknife(values[chosen], of_window[:, chosen]) for values in columns.values()]
        by_class.append([classes.names[c], count, *estimates])
    figures = []
    if go:
        for measure, chart in zip(measures, bars):
            figures.append(bar_chart(f"Share of neighbours: {measure}", chart))
    return Section(
        "Do near circuits mean alike?", f"Of {len(queries)} random tokens: the share of the same "
        f"token in the {NEIGHBORS} nearest circuits, and of the same class in the {NEIGHBORS} "
        "nearest of other tokens. Classes are found without labels: tokens that occur in like "
        "contexts, named by their most frequent members. Controls: the model before training; the "
        "trained gates dealt out to tokens at random; the share in all tokens. Circuits of "
        f"{channel_name(channel)}; intervals of 95 %, over windows.",
        [Table("Share of neighbours", ["layer", "gates", *measures], rows),
         Table(f"{measures[1]}, layer {layer}", ["class", "tokens", *columns], by_class)], figures)


# --------------------------------------------------------------------------------------------------
# map: the circuits in the plane (arXiv 2606.07414, Figure 6)

def import_umap() -> tuple[Callable | None, str]:
    """UMAP and "", or None and a note for the map, which PCA draws then. Slow: call it once."""
    try:
        from umap import UMAP
    except Exception as error:
        return None, (" UMAP keeps neighbours together better: pip install umap-learn "
                      f"({type(error).__name__}: {error}).")
    return UMAP, ""


def plane(inner: Tensor, umap: Callable | None) -> np.ndarray:
    """Coordinates (M, 2) of unit vectors with inner products (M, M): UMAP of cosine distances, or
    PCA."""
    if umap:
        distances = (1 - inner).clamp(min=0).fill_diagonal_(0).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # distances have no inverse, a seed means one thread
            mapper = umap(n_neighbors=15, metric="precomputed", random_state=0)
            return mapper.fit_transform(distances)
    values, vectors = torch.linalg.eigh(centred(inner))
    return (vectors[:, -2:] * values[-2:].clamp(min=0).sqrt()).flip(1).numpy()


def circuit_map(run: Run, layer: int, channel: int | None,
                umap: Callable | None) -> tuple[list[int], dict[str, np.ndarray]]:
    """Places of at most 10 circuits of each of the 100 most frequent tokens, and their coordinates
    (M, 2) in the chosen layer, the same untrained, and every other layer."""
    tokens = run.trained.tokens
    rng = np.random.default_rng(0)
    places = []
    for token in np.argsort(-np.bincount(tokens.ravel()), kind="stable")[:100]:
        places += rng.permutation(np.flatnonzero(tokens == token))[:10].tolist()
    recordings = {f"layer {layer}": (run.trained, layer),
                  f"layer {layer}, untrained": (run.untrained, layer)}
    for other in range(run.cfg.n_layer):
        recordings.setdefault(f"layer {other}", (run.trained, other))
    views = {}
    for title, (recording, of_layer) in recordings.items():
        progress(f"map {len(places)} circuits: {title}")
        circuits = recording.circuits(of_layer, channel).at(places)
        views[title] = plane(gram(circuits), umap).round(2)
    return places, views


def map_section(run: Run, layer: int, channel: int | None, classes: Classes,
                umap: Callable | None, note: str) -> Section:
    places, views = circuit_map(run, layer, channel, umap)
    drawn = draw_map(run, places, views, classes) if go else ""
    text = map_text(len(places), channel, umap, note)
    return Section("Map", text, explorer=f"<p>{html.escape(text)}</p>{drawn}")


def map_text(points: int, channel: int | None, umap: Callable | None, note: str) -> str:
    return (
        f"Map: {'UMAP' if umap else 'PCA'} of {points} circuits ({channel_name(channel)}), at most "
        "10, at random, of each of the 100 most frequent tokens. Near points have like gates, and "
        "colours are classes of tokens that occur in like contexts. A word stands at a point in "
        "the middle of its own. Drag to see those outside; click a class to hide it, twice to see "
        f"it alone. Untrained: the same before the first step, a control.{note}")


def plotly_text(text: str) -> str:
    """Text for plotly, which reads tags in it, but not all entities."""
    return html.escape(text, quote=False)


def label_places(xy: np.ndarray, tokens: np.ndarray, low: np.ndarray,
                 high: np.ndarray) -> list[int]:
    """The points (M, 2) at which their tokens' names stand: of each token the one that is nearest
    to its others, unless it would cover the name of a more frequent token."""
    taken = []
    chosen = []
    for token in dict.fromkeys(tokens.tolist()):        # the most frequent first
        own = np.flatnonzero(tokens == token)
        distances = np.linalg.norm(xy[own, None] - xy[own], axis=-1).sum(1)
        middle = own[distances.argmin()]
        spot = (xy[middle] - low) / (high - low)        # in the part that is seen, 0 to 1
        if all(abs(spot[0] - x) > 0.08 or abs(spot[1] - y) > 0.032 for x, y in taken):
            taken.append(spot)
            chosen.append(int(middle))
    return chosen


def draw_map(run: Run, places: list[int], views: dict[str, np.ndarray], classes: Classes) -> str:
    """One chart as HTML, which PAGE_SCRIPT gives a button for each view. Its axes fit the middle
    90 % of the points."""
    tokens = run.trained.tokens.ravel()[places]
    label = classes.of_token[tokens]
    members = [np.flatnonzero(label == c) for c in np.unique(label)]
    hover = []
    for place in places:
        text = run.excerpt(run.trained.tokens, place)
        expected = run.predictions(run.trained, place)
        hover.append(plotly_text(text) + "<br>next: " + plotly_text(expected))
    figure = go.Figure(layout=dict(
        template="plotly_white", margin=dict(l=0, r=0, t=32, b=0), clickmode="event+select",
        dragmode="pan", legend=dict(orientation="h", y=0, yanchor="top", font=dict(size=11),
                                    entrywidth=0.49, entrywidthmode="fraction")))
    for chosen, c in zip(members, np.unique(label)):
        figure.add_scatter(mode="markers", name=plotly_text(classes.names[c]), hoverinfo="text",
                           hovertext=[hover[m] for m in chosen],
                           customdata=[places[m] for m in chosen],
                           marker=dict(size=7, opacity=0.6, color=COLOURS[c]),
                           selected=dict(marker=dict(size=18, opacity=1)),
                           unselected=dict(marker=dict(opacity=0.6)))
    figure.add_scatter(mode="text", hoverinfo="skip", showlegend=False,
                       textfont=dict(size=13, color="#111", shadow=WHITE_EDGE),
                       unselected=dict(textfont=dict(color="#111")))
    described = []
    for title, xy in views.items():
        low, high = np.percentile(xy, [5, 95], axis=0)      # a few far points would squeeze all
        margin = 0.2 * (high - low)
        low, high = low - margin, high + margin
        named = label_places(xy, tokens, low, high)
        parts = [xy[chosen] for chosen in [*members, named]]        # of each trace
        names = [plotly_text(run.name(tokens[m]).strip("·")) for m in named]
        traces = dict(x=[part[:, 0].tolist() for part in parts],
                      y=[part[:, 1].tolist() for part in parts],
                      text=[None] * len(members) + [names])
        layout = {"xaxis.range": [low[0], high[0]], "yaxis.range": [low[1], high[1]]}
        described.append([title, traces, layout])
    figure.update_xaxes(showticklabels=False, zeroline=False, showgrid=False)
    figure.update_yaxes(showticklabels=False, zeroline=False, showgrid=False)
    figure.update_layout(meta=dict(first=described[0][0], views=sorted(described)))
    chart = figure.to_html(full_html=False, include_plotlyjs=False, div_id="map",
                           config=dict(responsive=True, displaylogo=False, modeBarButtons=[
                               ["zoomIn2d", "zoomOut2d", "resetScale2d"]]))
    return f'<div id="views" class="controls"></div>{chart}'


def run_map(args: argparse.Namespace) -> list[Section]:
    """Structure and map."""
    if not go:
        raise Mistake(f"a map needs plotly, and is better with UMAP: pip install plotly "
                      f"umap-learn ({NO_PLOTLY})")
    umap, note = import_umap()
    run = circuits_of(args.out_dir, args.device, args.windows)
    layer, channel = picked(run, args)
    classes = context_classes(run)
    return [map_section(run, layer, channel, classes, umap, note),
            structure_section(run, layer, channel, classes)]


def add_map(commands) -> None:
    parser = add_command(commands, "map", "circuits in the plane, and whether near ones mean alike",
                         run_map)
    add_circuit_options(parser)


# --------------------------------------------------------------------------------------------------
# usage: which neurons are used, which together, and do the first gates follow the embeddings?
# (arXiv 2606.07414, Figures 8 and 9, and its code's CKA)

class Load(NamedTuple):
    """How a pool of R neurons is used."""
    used: float         # the share of them that is used at least once
    gini: float         # of the counts of use: 0 where all are alike, 1 where one has all
    entropy: float      # of the counts, as a share of that of equal use
    peak: float         # the highest count over the mean
    busiest: float      # the share of all uses that the 64 busiest have


def load_of(rows: Tensor, R: int) -> Load:
    """Of neurons (...), ids below R."""
    counts = rows.flatten().bincount(minlength=R).double().sort().values
    p = counts / counts.sum()
    gini = (p * (2 * torch.arange(1, R + 1) - R - 1)).sum() / R
    entropy = torch.special.entr(p).sum() / math.log(R)
    return Load((counts > 0).double().mean().item(), gini.item(), entropy.item(),
                (counts[-1] / counts.mean()).item(), p[-64:].sum().item())


def different_subkeys(ids: Tensor, n: int) -> list[float]:
    """The mean number of different first, and of second, sub-keys among the k of ids (..., k)."""
    means = []
    for half in (ids // n, ids % n):
        changes = half.sort().values.diff().ne(0).sum(-1)
        means.append(1 + changes.double().mean().item())
    return means


def coactivation(ids: Tensor, size: int) -> Tensor:
    """P(j | i) (size, size): of the tokens that use neuron i the share that use j; ids (N, k)."""
    i, j = torch.broadcast_tensors(ids.long()[:, :, None], ids.long()[:, None, :])
    pairs = (i * size + j)[(i < size) & (j < size)]
    counts = pairs.bincount(minlength=size**2).view(size, size).double()
    return counts / counts.diagonal().clamp(min=1)[:, None]


def shared_subkeys(ids: Tensor, n: int) -> list[float]:
    """Mean P(j | i) over uses of i, for j that share its first sub-key, its second, none.

    ids (..., k).
    """
    first = ids[..., :, None] // n == ids[..., None, :] // n                    # (..., k, k)
    second = ids[..., :, None] % n == ids[..., None, :] % n
    kinds = [(first & ~second, n - 1), (~first & second, n - 1), (~first & ~second, (n - 1)**2)]
    return [pair.sum().item() / ids.numel() / others for pair, others in kinds]


def gram_cka(K: Tensor, L: Tensor) -> float:
    """Linear CKA, in [0, 1], of features with Gram matrices K and L (M, M) (arXiv 1905.00414)."""
    K = centred(K)
    L = centred(L)
    scale = ((K * K).sum() * (L * L).sum()).clamp(min=1e-12).sqrt()
    return ((K * L).sum() / scale).item()


def first_of_each(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct token occurs first, and the same for the 100 most frequent alone."""
    _, first, counts = np.unique(tokens.ravel(), return_index=True, return_counts=True)
    return first, first[np.argsort(-counts, kind="stable")[:100]]


def usage_rows(run: Run) -> list[list]:
    """Of every channel, and of all as one pool, how its neurons are used."""
    E = run.cfg.n_experts
    C = run.cfg.n_channels
    n = math.isqrt(E)
    product = run.cfg.router.startswith("product")
    distinct, _ = first_of_each(run.trained.tokens)
    result = []
    for layer, rows in enumerate(run.trained.rows):
        ids = (rows % E).view(-1, C, run.cfg.top_k)                             # (N, C, k)
        pools = [(c, ids[:, c], E) for c in range(C)]
        for name, pool, size in [*pools, ("all", rows, C * E)]:
            load = load_of(pool, size)
            dead = round(size * (1 - load.used))
            once = load_of(pool[distinct], size)
            chosen = ids if name == "all" else pool
            subkeys = different_subkeys(chosen, n) if product else [None, None]
            result.append([layer, name, load.used, dead, load.gini, once.gini, load.entropy,
                           load.peak, load.busiest, *subkeys])
    return result


def together_rows(run: Run) -> list[list]:
    """How often neurons are used together, by the sub-keys that they share."""
    rows = []
    if not run.cfg.router.startswith("product"):
        return rows
    E = run.cfg.n_experts
    for name, recording in (("trained", run.trained), ("untrained", run.untrained)):
        for layer, of_layer in enumerate(recording.rows):
            ids = (of_layer % E).view(-1, run.cfg.n_channels, run.cfg.top_k)
            rows.append([layer, name, *shared_subkeys(ids, math.isqrt(E))])
    return rows


def alignment_rows(run: Run) -> list[list]:
    """Linear CKA of embeddings and the gates of layer 0."""
    tokens = run.trained.tokens.ravel()
    _, often = first_of_each(run.trained.tokens)
    shuffled = np.random.default_rng(0).permutation(often)
    rows = []
    for name, recording, places in (("trained", run.trained, often),
                                    ("untrained", run.untrained, often),
                                    ("shuffled", run.trained, shuffled)):
        x = recording.embedding[tokens[often]]                                  # (M, D)
        R = run.cfg.n_channels * run.cfg.n_experts
        circuits = Circuits(recording.gates[0], recording.rows[0], R).at(places)
        rows.append([name, gram_cka(x @ x.T, gram(circuits))])
    return rows


def usage_section(run: Run, layer: int, channel: int | None) -> Section:
    cfg = run.cfg
    n = math.isqrt(cfg.n_experts)
    c = channel or 0
    figures = []
    if go:
        size = min(cfg.n_experts, 512 // n * n)         # whole rows of sub-keys
        ids = run.trained.rows[layer, :, c * cfg.top_k:(c + 1) * cfg.top_k] - c * cfg.n_experts
        P = coactivation(ids, size).fill_diagonal_(0)
        figure = go.Figure(layout=dict(title=f"P(j | i) in thousandths: layer {layer}, channel {c}",
                                       height=820))
        figure.add_heatmap(z=P.mul(1000).round().int().tolist(), zmin=0, zmax=100,
                           colorscale="Viridis",
                           hovertemplate="P(%{x} | %{y}) = %{z} / 1000<extra></extra>")
        figure.update_xaxes(title="j", dtick=n, constrain="domain")
        figure.update_yaxes(title="i", dtick=n, constrain="domain", autorange="reversed",
                            scaleanchor="x")
        figures.append(figure)
    return Section(
        "Usage and co-activation", f"Of the {cfg.n_experts} neurons of a channel, the share used "
        f"at least once in {run.trained.tokens.size:,} tokens, and how evenly: Gini (0 all alike, "
        "1 one has all; also over the first of each distinct token, as in the paper), entropy (1 "
        "all alike), the busiest over the mean, the share of all uses that the 64 busiest have, "
        "and how many different first and second sub-keys a token's choices have. P(j | i): of the "
        f"tokens that use neuron i, the share that use j. Neuron {n} a + b has sub-keys a and b: "
        "blocks on the diagonal share a, and stripes b. CKA: how far the gates of layer 0 follow "
        "the embeddings, at the first of each of the 100 most frequent tokens; chance is above 0, "
        "as the shuffled gates show.",
        [Table("Usage", ["layer", "channel", "used", "dead", "Gini", "Gini, distinct", "entropy",
                         "max / mean", "64 busiest", "first sub-keys", "second"], usage_rows(run)),
         Table("Mean P(j | i)", ["layer", "gates", "same first sub-key", "same second", "neither"],
               together_rows(run)),
         Table("Linear CKA of embeddings and gates", ["gates", "CKA"], alignment_rows(run))],
        figures)


def run_usage(args: argparse.Namespace) -> list[Section]:
    run = circuits_of(args.out_dir, args.device, args.windows)
    layer, channel = picked(run, args)
    return [usage_section(run, layer, channel)]


def add_usage(commands) -> None:
    parser = add_command(commands, "usage", "which neurons are used, and which together", run_usage)
    add_circuit_options(parser)


# --------------------------------------------------------------------------------------------------
# patching: do the gates of one prompt carry its answer into another? (arXiv 2606.07414, Figure 7)

# Of facts, by the source of the data; the second is the paper's.
TEMPLATES = {"python": "from {} import", "tinystories": "The {} was"}
MOST_FACTS = 40
FEWEST_COUNT = 5    # occurrences that make a fact


class Fact(NamedTuple):
    """A word and its answer, and what the training text says about them in the template."""
    word: int           # a token
    answer: int         # a token
    count: int          # how often the answer follows the word
    total: int          # how often the word occurs
    lift: float         # p(answer | word) / p(answer)


class Template:
    """A text with one {} for the word: the tokens before and after it, and then the answer's."""

    def __init__(self, run: Run, text: str):
        before, slot, after = text.partition("{}")
        if not slot or "{}" in after:
            raise Mistake(f"--template={text!r} needs one {{}}, for the word that differs")
        self.text = text
        self.prefix = run.encoding.encode_ordinary(before.removesuffix(" "))
        self.suffix = run.encoding.encode_ordinary(after.removesuffix(" "))
        # A blank belongs to the token that it precedes: to the word, and to the answer.
        self.word_blank = " " if before.endswith(" ") else ""
        self.answer_blank = " " if after[-1:].isalnum() or after.endswith(" ") else ""
        if not after:
            self.answer_blank = self.word_blank


class PairCounts:
    """How often words and answers stand in a template in the training text."""

    def __init__(self, run: Run, template: Template):
        text = run.data.tokens("train")
        slot = len(template.prefix)
        end = slot + 1 + len(template.suffix)
        fixed = [*enumerate(template.prefix), *enumerate(template.suffix, slot + 1)]
        self.pairs = Counter()
        for start in range(0, len(text), 2**22):    # a piece at a time: text may exceed memory
            piece = np.asarray(text[start:start + 2**22 + end])
            at = np.arange(max(len(piece) - end, 0))
            for offset, token in fixed:
                at = at[piece[at + offset] == token]
            self.pairs.update(zip(piece[at + slot].tolist(), piece[at + end].tolist()))
        self.words = Counter()
        self.answers = Counter()
        for (word, answer), count in self.pairs.items():
            self.words[word] += count
            self.answers[answer] += count
        self.total = self.pairs.total()

    def fact(self, word: int, answer: int) -> Fact:
        count = self.pairs[word, answer]
        total = self.words[word]
        lift = 0.0
        if count:
            lift = count / total / self.answers[answer] * self.total
        return Fact(word, answer, count, total, lift)


def find_facts(run: Run, template: Template) -> list[Fact]:
    """At most MOST_FACTS facts, no two with the same word or answer.

    A word is one token of letters. Answers are chosen by how much the word raises them: by count *
    log(lift), the pair's share of the mutual information of words and answers; the highest first.
    Raises Mistake below three facts: two to patch, and one as a control.
    """
    counts = PairCounts(run, template)
    letters = re.compile(template.word_blank + "[A-Za-z]+")
    candidates = []
    for (word, answer), count in counts.pairs.items():
        fact = counts.fact(word, answer)
        spelt = run.encoding.decode([word])
        if count >= FEWEST_COUNT and fact.lift > 1 and letters.fullmatch(spelt):
            candidates.append((-count * math.log(fact.lift), fact))
    by_answer = {}
    words = set()
    for _, fact in sorted(candidates):
        if fact.word not in words and fact.answer not in by_answer:
            by_answer[fact.answer] = fact
            words.add(fact.word)
    if len(by_answer) < 3:
        raise Mistake(f"--template={template.text!r} has {len(by_answer)} facts with "
                      f"{FEWEST_COUNT} occurrences in the training text, of 3 needed: try "
                      "another template, or give your own with --facts")
    return list(by_answer.values())[:MOST_FACTS]


def given_facts(run: Run, template: Template, given: str) -> list[Fact]:
    """The facts word:answer of --facts, separated by commas or lines, or of a file of them."""
    if ":" not in given:
        given = Path(given).read_text(encoding="utf-8")
    counts = PairCounts(run, template)
    facts = []
    seen = set()
    for entry in re.split(r"[,\n]+", given.strip()):
        word, colon, answer = entry.partition(":")
        if not colon:
            raise Mistake(f"--facts has {entry!r}, which is not word:answer")
        tokens = []
        for spelt in (template.word_blank + word.strip(), template.answer_blank + answer.strip()):
            ids = run.encoding.encode_ordinary(spelt)
            if len(ids) != 1:
                raise Mistake(f"--facts has {spelt!r}, which is {len(ids)} tokens: take words "
                              "and answers of one token")
            tokens += ids
        fact = counts.fact(*tokens)
        for token in (("word", fact.word), ("answer", fact.answer)):
            if token in seen:
                raise Mistake(f"--facts has the {token[0]} of {entry!r} twice: give it once")
            seen.add(token)
        facts.append(fact)
    if len(facts) < 3:
        raise Mistake(f"--facts has {len(facts)} facts, of 3 needed: two, and one as a control")
    return facts


@torch.inference_mode()
def answer_logits(model: GPT, prompts: Tensor, hook: Callable) -> Tensor:
    """(F, T) -> (F, V), the last position, with hook on the routers."""
    with router_hook(model, hook):
        return model(prompts)[0][:, -1].cpu()


def patched_logits(model: GPT, prompts: Tensor, gates: dict[int, tuple], layers: list[int],
                   position: int, source: int) -> Tensor:
    """(F, V) of prompts (F, T) with the gates at a position, in some layers, those of the prompt
    source: scores and neurons, of all channels. gates: {layer: (gates, ids)} of the prompts."""
    def patch(layer: int, x: Tensor, *output: Tensor) -> tuple[Tensor, ...] | None:
        if layer not in layers:
            return None
        changed = []
        for part, recorded in zip(output, gates[layer]):
            part = part.clone().unflatten(0, prompts.shape)                           # (F, T, C, k)
            part[:, position] = recorded.unflatten(0, prompts.shape)[source, position]
            changed.append(part.flatten(0, 1))
        return tuple(changed)

    return answer_logits(model, prompts, patch)


def preferences(logits: Tensor, answers: Tensor) -> Tensor:
    """(F, F): in prompt a the logit of a's answer less that of b's; logits (F, V), answers (F,)."""
    at_answers = logits[:, answers]
    return at_answers.diagonal()[:, None] - at_answers


def indirect_effect(clean: Tensor, counterfactual: Tensor, patched: Tensor) -> Tensor:
    """Of preferences: 0 where the patch changes nothing, 1 where it does all that the other prompt
    does."""
    return (patched - clean) / (counterfactual - clean)


class Patches(NamedTuple):
    """Effects [a, b], (F, F), are of the gates of b in prompt a, or of every third prompt's."""
    prompts: Tensor         # (F, T)
    p: Tensor               # (F, V) of the next token, unpatched
    known: Tensor           # (F, F) bool: both prompts prefer their own answer
    effects: dict[tuple, tuple[Tensor, Tensor]]     # {(position, layers): (of b, of a third)}
    own_change: float       # by how much a prompt's own gates change a preference, at most


def patching(run: Run, template: Template, facts: list[Fact]) -> Patches:
    """Every prompt with the gates of every other, position by position, layer by layer."""
    rows = []
    for fact in facts:
        rows.append([run.encoding.eot_token, *template.prefix, fact.word, *template.suffix])
    prompts = torch.tensor(rows, device=run.device)                             # (F, T)
    answers = torch.tensor([fact.answer for fact in facts])
    gates = {}

    def keep(layer: int, x: Tensor, *output: Tensor) -> None:
        gates[layer] = output

    logits = answer_logits(run.model, prompts, keep)
    clean = preferences(logits, answers)
    counterfactual = -clean.T           # in prompt b, the logit of a's answer less that of b's
    F = len(facts)
    i = torch.arange(F)
    every = tuple(range(run.cfg.n_layer))
    positions = range(len(template.prefix) + 1, prompts.shape[1])
    progress(f"patch {F * (F - 1)} ordered pairs of {F} facts")
    effects = {}
    own_change = 0.0
    for position, layers in itertools.product(positions, [every, *((layer,) for layer in every)]):
        patched = []
        for source in range(F):
            changed = patched_logits(run.model, prompts, gates, layers, position, source)
            patched.append(preferences(changed, answers))
        m = torch.stack(patched, dim=1)                         # (F, F, F): a, source, b
        own_change = max(own_change, (m[i, i] - clean).abs().max().item())
        effect = indirect_effect(clean[:, None], counterfactual[:, None], m)
        theirs = effect[:, i, i]                                # (F, F): the source is b
        third = (effect.sum(1) - theirs - effect[i, i]) / (F - 2)       # neither a nor b
        effects[position, layers] = (theirs, third)
    known = (clean > 0) & (counterfactual < 0)
    return Patches(prompts.cpu(), logits.softmax(1), known, effects, own_change)


def patching_section(run: Run, text: str | None, given: str | None) -> Section:
    """The gates of one prompt in another: how far they carry its answer, for all ordered pairs."""
    text = text or TEMPLATES.get(run.data.meta["source"].split()[0])
    if not text:
        raise Mistake(f"there is no template for data from {run.data.meta['source']}: give one "
                      "with --template")
    template = Template(run, text)
    facts = given_facts(run, template, given) if given else find_facts(run, template)
    prompts, p, known, effects, own_change = patching(run, template, facts)
    a, b = known.nonzero(as_tuple=True)
    fact_numbers = torch.arange(len(facts))[:, None]
    of_fact = ((a == fact_numbers) | (b == fact_numbers)).numpy()               # (F, known pairs)
    rows = []
    bars = {"the other's gates": {}, "a third prompt's": {}}
    for (position, layers), (theirs, third) in effects.items():
        at = "{}" if position == len(template.prefix) + 1 else run.name(prompts[0, position])
        which = "all" if len(layers) == run.cfg.n_layer else str(layers[0])
        row = []
        for effect in (theirs, third, theirs - third):
            row.append(jackknife(effect[known].double().numpy(), of_fact))
        rows.append([at, which, *row])
        bars["the other's gates"][f"{at}, {which}"] = row[0]
        bars["a third prompt's"][f"{at}, {which}"] = row[1]
    best = p.argmax(1).tolist()
    right = 0
    fact_rows = []
    for number, fact in enumerate(facts):
        right += best[number] == fact.answer
        fact_rows.append([f"{run.name(fact.word)} → {run.name(fact.answer)}", *fact[2:],
                          p[number, fact.answer].item(), run.name(best[number]),
                          p[number, best[number]].item()])
    F = len(facts)
    return Section(
        "Patching", f"In {text!r} the word decides what follows; facts are words and answers that "
        "they raise in the training text (lift: p(answer | word) / p(answer)). A prompt gets, at "
        "one position, the gates (scores and neurons, all channels) of another; the effect is 0 "
        "where that changes nothing, and 1 where it moves the logits of the two answers as far as "
        f"the other prompt does. Means are over the {len(a)} of {F * (F - 1)} ordered pairs whose "
        "prompts both prefer their own answer. Controls: the gates of every third prompt; its own "
        f"gates, which change {own_change:g} at most. The model's first choice is the answer in "
        f"{right} of {F} facts. Intervals of 95 %, over facts.",
        [Table("Effect of patches", ["position", "layers", "effect", "third prompt", "difference"],
               rows),
         Table("Facts", ["fact", "count", "of", "lift", "p(answer)", "first choice", "p"],
               fact_rows)],
        [bar_chart("Effect, by position and layers", bars)] if go else [])


def run_patch(args: argparse.Namespace) -> list[Section]:
    run = circuits_of(args.out_dir, args.device, windows=2)
    return [patching_section(run, args.template, args.facts)]


def add_patch(commands) -> None:
    parser = add_command(commands, "patch", "the gates of one prompt in another", run_patch)
    add_model_options(parser)
    add_fact_options(parser)


# --------------------------------------------------------------------------------------------------
# neuron: where is a neuron chosen, what does it read, and what does it write?

CARD_ITEMS = 8      # excerpts, and tokens in each list


class Card(NamedTuple):
    """Of one neuron. It adds gate * <w_in, x> times w_out: where this product is negative, what it
    promotes and what it suppresses change places."""
    layer: int
    row: int                                # c * E + id
    use: float                              # share of the recorded tokens that choose it
    scores: list[tuple[float, int]]         # histogram of its gates: left edges and counts
    excerpts: list[tuple[float, int]]       # product and recorded place, the largest |product|
    promotes: list[tuple[int, float]]       # tokens, and what w_out adds to their logits directly
    suppresses: list[tuple[int, float]]
    reads: list[tuple[int, float]]          # tokens, and <w_in, x> of x their normed embedding


def row_name(run: Run, row: int) -> str:
    channel, neuron = divmod(row, run.cfg.n_experts)
    return f"{channel}:{neuron}"


@torch.no_grad()
def neuron_words(run: Run, layer: int, rows: list[int]) -> list[list[list[tuple[int, float]]]]:
    """The tokens that each neuron promotes, suppresses and reads, as in its Card."""
    model = run.model
    block = model.blocks[layer]
    embeddings = model.embedding.weight[:run.encoding.n_vocab]          # (V, D) without padding
    w_out = block.ffn.w_out.flatten(0, 1)[rows]                         # (n, D)
    if run.cfg.norm:
        w_out = w_out * model.norm.scale
    writes = w_out @ embeddings.T                                       # (n, V)
    writes -= writes.mean(dim=1, keepdim=True)
    reads = block.ffn.w_in.flatten(0, 1)[rows] @ block.ffn_norm(embeddings).T
    words = [[] for _ in rows]
    for values, keys in ((writes, writes), (writes, -writes), (reads, reads.abs())):
        best = keys.topk(CARD_ITEMS).indices                            # (n, CARD_ITEMS)
        for n, tokens in enumerate(best.tolist()):
            words[n].append([(token, values[n, token].item()) for token in tokens])
    return words


def neuron_cards(run: Run, layer: int, rows: list[int]) -> list[Card]:
    """Of neurons of one layer, from what is recorded; no two excerpts in equal contexts."""
    recording = run.trained
    contexts = contexts_of(recording.tokens).tolist()
    J = recording.rows.shape[2]
    # One sort of all choices, (token, slot) pairs, by neuron.
    R = run.cfg.n_channels * run.cfg.n_experts
    order, offsets = kernels.transpose_index(recording.rows[layer], R)
    cards = []
    for row, words in zip(rows, neuron_words(run, layer, rows)):
        pairs = order[offsets[row]:offsets[row + 1]].long()
        places = pairs // J
        products = recording.products[layer].flatten()[pairs]
        excerpts = {}       # by context
        for i in products.abs().argsort(descending=True, stable=True).tolist():
            place = int(places[i])
            excerpts.setdefault(contexts[place], (products[i].item(), place))
            if len(excerpts) == CARD_ITEMS:
                break
        counts, edges = np.histogram(recording.gates[layer].flatten()[pairs], bins=16)
        scores = list(zip(edges[:-1].tolist(), counts.tolist()))
        use = len(places) / recording.tokens.size
        cards.append(Card(layer, row, use, scores, list(excerpts.values()), *words))
    return cards


def neuron_section(run: Run, card: Card) -> Section:
    words = []
    for pairs in zip(card.promotes, card.suppresses, card.reads):
        row = []
        for token, value in pairs:
            row += [run.name(token), value]
        words.append(row)
    excerpts = []
    for product, place in card.excerpts:
        excerpts.append([product, run.excerpt(run.trained.tokens, place),
                         run.predictions(run.trained, place)])
    name = row_name(run, card.row)
    return Section(
        f"Neuron {name} of layer {card.layer}", f"Chosen by {card.use:.3%} of "
        f"{run.trained.tokens.size:,} tokens. It adds gate * <w_in, x> times w_out. It promotes "
        "and suppresses what w_out does in the logits, directly and less the mean; where the "
        "product is negative the two change places. It reads the tokens whose own embedding has "
        "the largest <w_in, x>, with sign.",
        [Table("Largest products, no two in equal contexts", ["gate * <w_in, x>", "text", "next"],
               excerpts),
         Table("Tokens", ["promotes", "by", "suppresses", "by", "reads", "<w_in, x>"], words),
         Table("Gates", ["from", "tokens"], [list(score) for score in card.scores])])


def run_neuron(args: argparse.Namespace) -> list[Section]:
    if not re.fullmatch(r"\d+:\d+", args.neuron):
        raise Mistake(f"{args.neuron!r} is not CHANNEL:NEURON, such as 3:141")
    channel, neuron = map(int, args.neuron.split(":"))
    run = circuits_of(args.out_dir, args.device, args.windows)
    E = run.cfg.n_experts
    for name, value, count in (("LAYER", args.layer, run.cfg.n_layer),
                               ("CHANNEL", channel, run.cfg.n_channels), ("NEURON", neuron, E)):
        if not 0 <= value < count:
            raise Mistake(f"{name}={value}: it goes from 0 to {count - 1}")
    [card] = neuron_cards(run, args.layer, [channel * E + neuron])
    return [neuron_section(run, card)]


def add_neuron(commands) -> None:
    parser = add_command(commands, "neuron", "a neuron: where it is chosen, what it reads and "
                                             "writes", run_neuron)
    add_model_options(parser)
    add_windows_option(parser)
    parser.add_argument("layer", type=int, metavar="LAYER")
    parser.add_argument("neuron", metavar="CHANNEL:NEURON")


# --------------------------------------------------------------------------------------------------
# explain: which tokens and which neurons make up the logit of the next token?
#
# Hold the gates, the attention patterns and the scales of the norms, 1 / rms, at what they are on a
# prompt: the model is then linear in the embeddings, and has no biases. So embeddings times the
# logit's gradient add up to the logit, exactly, and so do the neurons and what passes them by.

class Attribution(NamedTuple):
    """Of one logit at the last position of a prompt of T tokens; tensors on the CPU."""
    tokens: list[int]       # the prompt, <|endoftext|> first
    target: int             # the next token explained
    against: int | None     # the token it is compared with; None: the mean over the vocabulary
    logit: float            # of target, less that of against, or less the mean logit
    token_shares: Tensor    # (T,), which add up to logit
    neuron_shares: Tensor   # (L, T, J): what each chosen neuron adds, through all later layers
    rows: Tensor            # (L, T, J) int32: the neurons, c * E + id
    gates: Tensor           # (L, T, J)
    products: Tensor        # (L, T, J): gate * <w_in, x>, by which w_out is multiplied


def contrast(logits: Tensor, target: int, against: int | None) -> Tensor:
    """The logit of target less that of against, or less the mean; logits (V,)."""
    other = logits.mean() if against is None else logits[against]
    return logits[target] - other


@contextlib.contextmanager
def held(model: GPT) -> Iterator[list[Tensor]]:
    """Makes the norms' scales and the attention patterns constants in gradients; no value changes.

    The list gets the embeddings (1, T, D), then the outputs (1, T, D) of the feedforward layers.
    """
    flows = []

    def keep(module, inputs, output):
        flows.append(output)

    def hold(module, inputs, output):
        return output.detach()

    def hold_scale(norm, inputs, output):
        x = inputs[0]
        mean_square = x.detach().square().mean(-1, keepdim=True)
        linear = x * torch.rsqrt(mean_square + 1e-6) * norm.scale
        return output.detach() + (linear - linear.detach())     # the value is output's to the bit

    hooks = [(model.embedding, keep)]
    norms = [model.norm]
    for block in model.blocks:
        hooks += [(block.ffn, keep), (block.attn.q_norm, hold), (block.attn.k_norm, hold)]
        norms += [block.attn_norm, block.ffn_norm]
    if model.cfg.norm:
        hooks += [(norm, hold_scale) for norm in norms]
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.enter_context(module.register_forward_hook(hook))
        yield flows


def explain(run: Run, tokens: list[int], target: int | None, against: int | None) -> Attribution:
    """What the tokens and neurons of a prompt add to a logit at its end.

    target None: the likeliest token. Raises Mistake where an activation makes neurons nonlinear.
    """
    model = run.model
    if run.cfg.activation != "identity":
        raise Mistake(f"{run.path} has activation={run.cfg.activation}: shares add up only where "
                      "neurons are linear")
    first = first_rows(run.cfg, run.device)
    gates = []
    rows = []
    products = []

    def keep(layer: int, x: Tensor, layer_gates: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        layer_gates = layer_gates.detach()
        w_in = model.blocks[layer].ffn.w_in.detach().flatten(0, 1)              # (R, D)
        gates.append(layer_gates.flatten(1))                                    # (T, J)
        rows.append((ids + first).flatten(1))                                   # (T, J)
        products.append(gates[layer] * kernels.gather_dot(x.detach(), w_in, rows[layer]))
        return layer_gates, ids

    with torch.enable_grad(), held(model) as flows, router_hook(model, keep):
        logits = model(torch.tensor([tokens], device=run.device))[0][0, -1]     # (V,)
    if target is None:
        target = int(logits.argmax())
    logit = contrast(logits, target, against)
    slopes = torch.autograd.grad(logit, flows)                  # of embeddings, and of each layer
    token_shares = (flows[0] * slopes[0]).sum(-1)[0]                            # (T,)
    neuron_shares = []
    for layer, block in enumerate(model.blocks):
        w_out = block.ffn.w_out.detach().flatten(0, 1)                          # (R, D)
        effect = kernels.gather_dot(slopes[1 + layer][0], w_out, rows[layer])   # (T, J)
        neuron_shares.append(products[layer] * effect)
    return Attribution(tokens, target, against, logit.item(), token_shares.detach().cpu(),
                       torch.stack(neuron_shares).cpu(), torch.stack(rows).cpu(),
                       torch.stack(gates).cpu(), torch.stack(products).cpu())


def largest(values: Tensor, count: int) -> list[tuple[int, int, int]]:
    """The places (layer, t, j) of the largest values (L, T, J)."""
    best = values.flatten().argsort(descending=True, stable=True)[:count]
    layers, positions, slots = torch.unravel_index(best, values.shape)
    return list(zip(layers.tolist(), positions.tolist(), slots.tolist()))


SHOWN_NEURONS = 12


def explain_section(run: Run, found: Attribution) -> Section:
    names = [f"{t} {run.name(token)}" for t, token in enumerate(found.tokens)]
    neurons = []
    for at in largest(found.neuron_shares.abs(), SHOWN_NEURONS):
        layer, t, _ = at
        row = found.rows[at].item()
        [[promotes, suppresses, reads]] = neuron_words(run, layer, [row])
        if found.products[at] < 0:
            promotes, suppresses = suppresses, promotes
        words = []
        for pairs in (promotes, suppresses, reads):
            words.append(" ".join(run.name(token) for token, _ in pairs[:4]))
        neurons.append([layer, names[t], row_name(run, row), found.neuron_shares[at].item(),
                        *words])
    other = "the mean logit" if found.against is None else f"that of {run.name(found.against)}"
    total = found.token_shares.double().sum().item()
    return Section(
        "Why this token?", f"The logit of {run.name(found.target)} as the next token, less "
        f"{other}, is {found.logit:.6f}; the shares of the tokens add up to {total:.6f}, a "
        f"difference of {total - found.logit:.1e}. Gates, attention patterns and the norms' scales "
        "are held at what they are here: shares do not say why these are so. Neurons are those "
        "with the largest shares, through all later layers: where one reads another, both count "
        "what passes through both. Beside a neuron stand the tokens that it writes for and "
        "against, with the sign that it has here, and those whose embeddings it reads most.",
        [Table("Shares of the tokens", ["token", "share"],
               [list(row) for row in zip(names, found.token_shares.tolist())]),
         Table("Shares of neurons", ["layer", "at", "neuron", "share", "writes for", "against",
                                     "reads"], neurons)])


CONTROL_PROMPTS = 100
CONTROL_TOKENS = 64     # of each prompt
SWITCHED_OFF = 8


@torch.no_grad()
def logit_without(run: Run, found: Attribution, neurons: list[tuple[int, int, int]]) -> float:
    """The logit when neurons, places (layer, t, j) in found.rows, add nothing at these t."""
    def switch_off(layer: int, x: Tensor, gates: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        gates = gates.clone()
        for of_layer, t, j in neurons:
            if of_layer == layer:
                channel, neuron = divmod(found.rows[layer, t, j].item(), run.cfg.n_experts)
                gates[t, channel, ids[t, channel] == neuron] = 0
        return gates, ids

    with router_hook(run.model, switch_off):
        logits = run.model(torch.tensor([found.tokens], device=run.device))[0][0, -1]
    return contrast(logits, found.target, found.against).item()


def alike(neurons: list[tuple[int, int, int]], values: Tensor) -> list[tuple[int, int, int]]:
    """For each neuron another, of its layer and position, whose value (L, T, J) is nearest."""
    others = []
    for layer, t, j in neurons:
        distance = (values[layer, t] - values[layer, t, j]).abs()
        for taken_layer, taken_t, taken in [*neurons, *others]:
            if (taken_layer, taken_t) == (layer, t):
                distance[taken] = math.inf
        others.append((layer, t, int(distance.argmin())))
    return others


def controls(run: Run) -> dict[str, list[tuple[float, float]]]:
    """By how neurons are chosen: for every prompt, the change of the logit of the likeliest token,
    less the mean logit, when SWITCHED_OFF neurons are: minus their shares, and what it really is.
    """
    R = run.cfg.n_channels * run.cfg.n_experts
    uses = torch.stack([rows.flatten().bincount(minlength=R) for rows in run.trained.rows]).float()
    windows, _ = run.data.windows("val", run.data.val_starts(CONTROL_PROMPTS))
    progress(f"switch off neurons in {len(windows)} prompts")
    count = min(SWITCHED_OFF, run.cfg.n_channels * run.cfg.top_k // 2)  # leaves as many others
    changes = defaultdict(list)
    for tokens in windows[:, :CONTROL_TOKENS].tolist():
        found = explain(run, tokens, None, None)
        named = largest(found.neuron_shares, count)
        use = uses.gather(1, found.rows.flatten(1).long()).view(found.rows.shape)
        groups = {"the largest shares": named,
                  "others of equal use": alike(named, use),
                  "others of equal |gate|": alike(named, found.gates.abs()),
                  "others of equal |gate * <w_in, x>|": alike(named, found.products.abs())}
        for name, neurons in groups.items():
            predicted = -sum(found.neuron_shares[at].item() for at in neurons)
            changes[name].append((predicted, logit_without(run, found, neurons) - found.logit))
    return changes


def controls_section(run: Run) -> Section:
    rows = []
    for name, pairs in controls(run).items():
        predicted, actual = np.array(pairs).T
        of_prompt = np.eye(len(pairs), dtype=bool)
        correlation = None
        if predicted.std() and actual.std():
            correlation = np.corrcoef(predicted, actual)[0, 1].item()
        rows.append([name, len(pairs), jackknife(predicted, of_prompt),
                     jackknife(actual, of_prompt), correlation])
    return Section(
        "Do shares say what neurons do?", f"The {SWITCHED_OFF} neurons with the largest shares are "
        f"switched off, each at its position, in prompts of {CONTROL_TOKENS} tokens of validation "
        "text; the controls are as many others of the same layers and positions, with the nearest "
        "use, |gate| or |gate * <w_in, x>|. The change of the likeliest token's logit, less the "
        "mean logit: as the shares predict it, and as it is when norms, patterns and gates may "
        "answer. Norms do: they scale up what is left. And what passes through two of the neurons "
        "is predicted twice. Intervals of 95 %, over prompts.",
        [Table("Change of the logit", ["neurons", "prompts", "predicted", "actual", "correlation"],
               rows)])


def run_explain(args: argparse.Namespace) -> list[Section]:
    run = circuits_of(args.out_dir, args.device, args.windows)
    tokens = prompt_tokens(run, args.prompt)
    target = one_token(run, "--token", args.token)
    against = one_token(run, "--against", args.against)
    sections = [explain_section(run, explain(run, tokens, target, against))]
    if args.controls:
        sections.append(controls_section(run))
    return sections


def one_token(run: Run, option: str, text: str | None) -> int | None:
    """The token that an option names, if it is given."""
    if text is None:
        return None
    ids = run.encoding.encode_ordinary(text)
    if len(ids) != 1:
        pieces = " ".join(repr(run.encoding.decode([token])) for token in ids)
        raise Mistake(f"{option}={text!r} is {len(ids)} tokens ({pieces}): give one")
    return ids[0]


def add_explain(commands) -> None:
    parser = add_command(commands, "explain", "what tokens and neurons add to the next token's "
                                              "logit", run_explain)
    add_model_options(parser)
    add_windows_option(parser)
    add_prompt_option(parser)
    parser.add_argument("--token", help="the next token to explain, such as ' girl' (default: the "
                                        "likeliest)")
    parser.add_argument("--against", help="a token to compare it with (default: the mean logit)")
    parser.add_argument("--controls", action="store_true",
                        help="also switch neurons off, and compare with what their shares predict")


# --------------------------------------------------------------------------------------------------
# what mimic and redistribute share: many small trainings at once

def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends a worker without a traceback
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)      # Adam's moments of unused neurons become denormals, slow
    keep_memory()


def parallel(function: Callable, jobs: list[tuple], device: str) -> Iterator:
    """function(*job) for all jobs, in their order: on a CPU a process per core, else one by one.

    function belongs to a module; jobs and results are pickled. One thread each: on a CPU the
    numbers do not depend on how many cores there are.
    """
    if device == "cuda":
        yield from itertools.starmap(function, jobs)
        return
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    workers = min(cores, len(jobs))
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, start_worker) as pool:
        yield from pool.map(function, *zip(*jobs))


# --------------------------------------------------------------------------------------------------
# mimic: is a dense layer a mixture of few neurons in disguise? (arXiv 2512.18452)

class Mixture(nn.Module):
    """The paper's student: a shared MLP, and PEER's experts with one full list of keys, of low
    rank."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.shared = MLP(cfg)
        self.experts = PEER(cfg)
        self.experts.router = Router(cfg, "dense")

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) + self.experts(x)

    def flops(self) -> int:
        return self.shared.flops() + self.experts.flops()


class Effort(NamedTuple):
    active: tuple[int, ...]     # neurons of the students
    tokens: int                 # of training text to fit them to
    steps: int                  # of 1024 tokens each


FULL = Effort((8, 16, 32, 64, 128), 2**17, 600)
QUICK = Effort((8, 32), 2**14, 60)
NEURONS = 4 * 33**2     # of both sparse students: a square, with more sub-keys than any top_k
STUDENTS = {"dense": MLP, "mixture": Mixture, "sgatlin": SparselyGatedLinear}
LONGER = 8              # a dense student learns slowly: it trains so many times as long


def make_student(name: str, m: int, D: int) -> nn.Module:
    """A student with m active neurons, (..., D) -> (..., D), every time the same."""
    settings = {
        "dense": dict(ffn="mlp", d_ff=m),
        "mixture": dict(ffn="peer", n_channels=1, n_experts=NEURONS, top_k=m // 2, d_ff=m // 2),
        "sgatlin": dict(n_channels=4, n_experts=NEURONS // 4, top_k=m // 4),
    }
    torch.manual_seed(0)
    return STUDENTS[name](GPTConfig(d_model=D, d_head=D, d_key=D // 4, **settings[name]))


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
    return ((y - predicted).square().sum() / (y - y.mean(0)).square().sum()).item()


def fit(student: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Trains student(x) to be y, (N, D) each: mean squared error, Adam, cosine to 0."""
    # With 32 neurons on real inputs 1e-2 was best: for dense ones (4800 steps) of 3e-3, 1e-2 and
    # 3e-2, for sparse ones (300 steps) of 1e-3 to 1e-2, and against 3e-2.
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
def window_losses(model: GPT, layer: int, windows: tuple[Tensor, Tensor],
                  ffn: Callable) -> np.ndarray:
    """Loss (W,) of windows, inputs and targets (W, T), with ffn in place of a layer's feedforward
    part: called with x (1, T, D), it returns the output, or None to leave that as it is."""
    def replaced(module, inputs, output):
        return ffn(inputs[0])

    losses = []
    with model.blocks[layer].ffn.register_forward_hook(replaced):
        for x, y in zip(*windows):
            losses.append(model(x[None], y[None])[1].item())
    return np.array(losses)


def imitate(file: Path, kind: str, m: int, name: str) -> tuple[float, np.ndarray]:
    """Fits a student to one kind of the inputs that mimic saved in file.

    Returns what it leaves unexplained of those held out, and the losses (W,) with it in place of
    the layer.
    """
    saved = torch.load(file, mmap=True, weights_only=True)
    device = saved["device"]
    x, y, held_x, held_y = (tensor.to(device) for tensor in saved[kind])
    windows = tuple(tensor.to(device) for tensor in saved["windows"])
    scale = (y - y.mean(0)).square().mean().sqrt()
    student = make_student(name, m, x.shape[1]).to(device)
    steps = saved["steps"] * LONGER if name == "dense" else saved["steps"]
    fit(student, x, y / scale, steps)
    model, _ = load_model(Path(saved["checkpoint"]), device)

    def scaled(x: Tensor) -> Tensor:
        return scale * student(x)

    losses = window_losses(model, saved["layer"], windows, scaled)
    return unexplained(held_y, scale * outputs(student, held_x)), losses


def mimic(run: Run, layer: int, effort: Effort) -> tuple[dict, dict]:
    """Students of one dense layer, fitted to its outputs on real inputs and on Gaussian ones.

    Returns the losses (W,) {with the layer, its mean output, or nothing there: losses}, and what
    imitate returned, {(inputs, m, student): (unexplained, losses)}.
    """
    model = run.model
    T = run.cfg.block_size
    n = run.data.n_windows()
    count = max(1, min(effort.tokens // T, n))
    starts = np.arange(count) * (n // count) * T
    fitted = tuple(part.to(run.device) for part in run.data.windows("train", starts))
    held_out = tuple(part.to(run.device) for part in run.validation())
    progress(f"record layer {layer} on {count} + {len(held_out[0])} windows of {T} tokens")
    fit_inputs = []
    held_inputs = []
    window_losses(model, layer, fitted, fit_inputs.append)      # append returns None: it records
    base = window_losses(model, layer, held_out, held_inputs.append)
    real = torch.cat(fit_inputs).flatten(0, 1)                                  # (N, D)
    held = torch.cat(held_inputs).flatten(0, 1)
    normal = gaussian_like(real.cpu(), len(real) + len(held)).to(run.device)
    inputs = {}
    for kind, x, held_x in (("real", real, held),
                            ("Gaussian", normal[:len(real)], normal[len(real):])):
        ffn = model.blocks[layer].ffn
        parts = (x, outputs(ffn, x), held_x, outputs(ffn, held_x))
        inputs[kind] = [part.cpu() for part in parts]
    mean = inputs["real"][1].mean(0).to(run.device)
    anchors = {"the layer": base, "its mean": window_losses(model, layer, held_out, mean.expand_as),
               "nothing": window_losses(model, layer, held_out, torch.zeros_like)}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "inputs.pt")
        torch.save(inputs | dict(windows=held_out, checkpoint=str(run.path), device=run.device,
                                 layer=layer, steps=effort.steps), file)
        jobs = [(file, *key) for key in itertools.product(inputs, effort.active, STUDENTS)]
        for (_, kind, m, name), result in zip(jobs, parallel(imitate, jobs, run.device)):
            results[kind, m, name] = result
            progress(f"{len(results)}/{len(jobs)} {kind} inputs, {m} active neurons, {name}: "
                     f"{result[0]:.4f} of the variance unexplained")
    return anchors, results


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def mimic_section(run: Run, layer: int, effort: Effort) -> Section:
    anchors, results = mimic(run, layer, effort)
    teacher = run.model.blocks[layer].ffn
    base = anchors["the layer"]

    def change(losses: np.ndarray) -> Estimate:
        return jackknife(losses - base, np.eye(len(base), dtype=bool))

    rows = []
    lines = {name: {"real": ([], []), "Gaussian": ([], [])} for name in STUDENTS}
    for (kind, m, name), (left, losses) in results.items():
        student = make_student(name, m, run.cfg.d_model)
        rows.append([kind, m, name, left, change(losses), parameters(student), student.flops()])
        x, y = lines[name][kind]
        x.append(m)
        y.append(left)
    anchor_rows = []
    for name, losses in anchors.items():
        anchor_rows.append([name, float(losses.mean()), change(losses)])
    figures = []
    if go:
        axes = [("active neurons", f"unexplained, {kind} inputs") for kind in ("real", "Gaussian")]
        charts = {name: list(by_kind.values()) for name, by_kind in lines.items()}
        figures = [line_charts("What students leave unexplained", axes, charts, type="log")]
    note = "Quick trainings, only to see that it works. " if effort is QUICK else ""
    return Section(
        "Mimic", f"{note}Students with m active neurons learn the outputs of the dense layer "
        f"{layer} of {run.path} on its inputs in training text, and on Gaussian inputs of the same "
        f"mean and covariance; the dense ones train {LONGER} times as long. Unexplained: the "
        "fraction of the variance of the outputs that a student leaves on inputs held out; change: "
        "of the validation loss, in nats per token, with the student in the layer's place, with "
        "intervals of 95 % over windows. The sparse ones choose among "
        f"{NEURONS:,} neurons. Where they leave less than a dense one of as many active neurons on "
        "real inputs, and not on Gaussian ones, the layer is a sparse mixture because of its "
        "inputs. But m dense neurons write into m dimensions at most: for small m this alone puts "
        "sparse students ahead, on any inputs.",
        [Table("Students", ["inputs", "m", "student", "unexplained", "change", "parameters",
                            "FLOPs per token"], rows),
         Table("Anchors", ["in place of the layer", "loss", "change"], anchor_rows),
         Table("The layer", ["parameters", "FLOPs per token"],
               [[parameters(teacher), teacher.flops()]])], figures)


def run_mimic(args: argparse.Namespace) -> list[Section]:
    run = Run(args.teacher or args.out_dir, args.device, args.windows)
    if run.cfg.ffn != "mlp":
        raise Mistake(f"{run.path} has ffn={run.cfg.ffn}, mimic needs an mlp: python train.py "
                      "--ffn=mlp --out_dir=out-mlp trains one, then give --teacher=out-mlp")
    layer = pick("layer", args.layer, run.cfg.n_layer, run.cfg.n_layer // 2)
    return [mimic_section(run, layer, QUICK if args.quick else FULL)]


def add_mimic(commands) -> None:
    parser = add_command(commands, "mimic", "students of a dense layer, with few active neurons",
                         run_mimic)
    add_model_options(parser)
    add_windows_option(parser)
    parser.add_argument("--layer", type=int, help="to mimic (default: the middle one)")
    parser.add_argument("--teacher", type=Path, help="folder of a run of --ffn=mlp (default: "
                                                     "out_dir)")
    add_quick_option(parser)


# --------------------------------------------------------------------------------------------------
# redistribute: what does attention take over from a sparse feedforward layer? (arXiv 2605.09403)

EOS = 11                            # after the ten digits; the paper's PAD, 10, is not needed here
VOCABULARY = 12
SEEDS = (42, 137, 256, 512, 1024)   # the paper's
STEPS = 10_000                      # at most
QUICK_STEPS = 100
CHECK = 100                         # steps between checks whether all answers are right
NORMS = {False: "no norm", True: "norm"}


class Variant(NamedTuple):
    """A feedforward layer; the paper's accuracy without it, and its standard deviation (Fig. 1)."""
    settings: dict
    paper: Estimate = Estimate(None, None)
    frozen: bool = False        # the router keeps its random weights


MOE = dict(ffn="moe", n_experts=4, d_ff=64)
SGATLIN = dict(ffn="sgatlin", n_channels=16, n_experts=64, top_k=4, d_key=16)   # 64 of 1024 active
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


def to_zero(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A forward hook that sets a layer's output to zero."""
    return torch.zeros_like(output)


@torch.inference_mode()
def right_digits(model: GPT, inputs: Tensor, targets: Tensor, zeroed: list[nn.Module]) -> Tensor:
    """(1000, 4) bool: is each of o0..o3 right, given the true ones before it, with layers' outputs
    zeroed?"""
    with contextlib.ExitStack() as stack:
        for layer in zeroed:
            stack.enter_context(layer.register_forward_hook(to_zero))
        predicted = model(inputs)[0].argmax(-1)
    return (predicted == targets)[:, 3:7]


def addition_model(name: str, norm: bool, seed: int) -> GPT:
    """One layer of four heads with the feedforward layer of a variant."""
    variant = VARIANTS[name]
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=VOCABULARY, block_size=8, n_layer=1, d_model=64, d_head=16,
                          norm=norm, **variant.settings))
    ffn = model.blocks[0].ffn
    if variant.frozen:
        router = ffn.gate if variant.settings["ffn"] == "moe" else ffn.router
        router.requires_grad_(False)
    return model


class Learned(NamedTuple):
    """The steps a model took, and its accuracy, over all output digits."""
    steps: int
    whole: float
    no_ffn: float
    no_attention: float


def learn_addition(name: str, norm: bool, seed: int, steps: int, device: str) -> Learned:
    """Trains until all 1000 answers are right, or for so many steps."""
    model = addition_model(name, norm, seed).to(device)
    inputs, targets = (tensor.to(device) for tensor in addition())
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
    block = model.blocks[0]
    accuracy = []
    for zeroed in ([], [block.ffn], [block.attn]):
        accuracy.append(right_digits(model, inputs, targets, zeroed).double().mean().item())
    return Learned(step, *accuracy)


def redistribute(seeds: tuple[int, ...], steps: int,
                 device: str) -> dict[tuple[bool, str], list[Learned]]:
    """Trains every variant with and without norm, a model per seed; keys are (norm, variant)."""
    jobs = []
    for norm, name, seed in itertools.product(NORMS, VARIANTS, seeds):
        jobs.append((name, norm, seed, steps, device))
    results = defaultdict(list)
    for number, (job, found) in enumerate(zip(jobs, parallel(learn_addition, jobs, device)), 1):
        name, norm, seed = job[:3]
        results[norm, name].append(found)
        progress(f"{number}/{len(jobs)} {name}, {NORMS[norm]}, seed {seed}: {found.steps} steps, "
                 f"accuracy {found.whole:.3f}, without FFN {found.no_ffn:.3f}, without attention "
                 f"{found.no_attention:.3f}")
    return results


def spread(values: list[float]) -> Estimate:
    """Mean and standard deviation."""
    return Estimate(statistics.fmean(values), statistics.stdev(values))


def sign_flip_test(differences: list[float]) -> float:
    """Two-sided p of n paired differences: the share of the 2^n choices of their signs that bring
    their sum as far from zero. Exact where a difference is as likely as its opposite."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    sums = np.abs(signs @ np.array(differences))
    return float((sums >= sums[0] - 1e-9).mean())


def redistribute_section(seeds: tuple[int, ...], steps: int, device: str) -> Section:
    results = redistribute(seeds, steps, device)
    rows = {norm: [] for norm in NORMS}
    bars = {name: {} for name in (*NORMS.values(), "paper, no norm")}
    tests = []
    for (norm, name), models in results.items():
        whole = [model.whole for model in models]
        no_ffn = [model.no_ffn for model in models]
        no_attention = [model.no_attention for model in models]
        total, active = addition_model(name, norm, 0).num_params()
        solved = f"{whole.count(1)} of {len(models)}"
        taken = round(statistics.fmean(model.steps for model in models))
        variant = VARIANTS[name]
        row = [name, total, active, solved, taken, spread(whole), spread(no_ffn)]
        if not norm:
            row.append(variant.paper)
            if variant.paper.mean is not None:
                bars["paper, no norm"][name] = variant.paper
        rows[norm].append([*row, spread(no_attention)])
        bars[NORMS[norm]][name] = spread(no_ffn)
        if variant.frozen:
            learned_name = name.removesuffix(", frozen router")
            learned = [model.no_ffn for model in results[norm, learned_name]]
            change = [frozen - other for frozen, other in zip(no_ffn, learned)]
            tests.append([NORMS[norm], learned_name, spread(learned), spread(no_ffn),
                          spread(change), sign_flip_test(change)])
    header = ["feedforward layer", "parameters", "active", "solved", "steps", "accuracy",
              "without FFN", "without attention"]
    headers = {False: [*header[:7], "paper", header[7]], True: header}
    note = ""
    if steps == QUICK_STEPS:
        note = f"Quick: {QUICK_STEPS} steps at most, which say only that it works. "
    figures = [bar_chart("Accuracy without the FFN", bars, 420)] if go else []
    n = len(seeds)
    return Section(
        "Redistribute", f"{note}One-layer models (d_model 64, four heads) learn x + 7 for x of "
        "three digits, until all 1000 answers are right. Accuracy is that of the four output "
        "digits, each given the true ones before it; then the output of the FFN, or of attention, "
        "is set to zero. Where much is right without the FFN, attention does much of the work. "
        "Chance is 0.1; to say 0 always gets 0.323, because o3 is 0 unless x > 992. Means ± "
        f"standard deviations over {n} seeds. Paper: without FFN and norm, arXiv 2605.09403, "
        "Figure 1 (its GLU is 170 wide). Departures from it: our initialisation; rotary positions; "
        "no bias in attention; GELU where it has SiLU; GLU and experts are clamped SwiGLUs; the "
        "weights of the chosen experts are not renormalised, so that the loss of the task trains "
        "the router, and no other loss balances it. A frozen router keeps its random weights.",
        [*(Table(f"Accuracy of output digits, {NORMS[norm]}", headers[norm], rows[norm])
           for norm in NORMS),
         Table("Learned and frozen routers, accuracy without FFN: exact sign-flip test of "
               f"{n} pairs, p is {2 / 2**n:g} at least",
               ["model", "layer", "learned", "frozen", "difference", "p"], tests)], figures)


def run_redistribute(args: argparse.Namespace) -> list[Section]:
    if args.quick:
        return [redistribute_section(SEEDS[:2], QUICK_STEPS, args.device)]
    return [redistribute_section(SEEDS, STEPS, args.device)]


def add_redistribute(commands) -> None:
    parser = add_command(commands, "redistribute", "do sparse layers leave more to attention? "
                                                   "trains tiny models of x + 7", run_redistribute)
    add_model_options(parser)
    add_quick_option(parser)


# --------------------------------------------------------------------------------------------------
# curves: how did the loss of runs fall, and did their neurons stay in use?

class Log(NamedTuple):
    """What train.py logged of a run. Old logs lack values, and those of young runs are None."""
    run: Path               # its folder, or the log itself
    settings: dict          # all of train.py's; those newer than the run have their defaults
    cfg: GPTConfig          # of them
    starts: list[dict]      # of the run, and of every resumption: data, versions
    evals: list[dict]       # none yet where a run is young
    steps: list[dict]       # of every log_interval steps


def read_log(run: Path) -> Log:
    """The log of a run: log.jsonl, or its folder. Raises Mistake if it is none."""
    path = run if run.suffix == ".jsonl" else run / "log.jsonl"
    if not path.is_file():
        raise Mistake(f"{path} is missing: python train.py makes it")
    by_event = defaultdict(list)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # a kill can cut a line short
        with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
            entry = json.loads(line)
            by_event[entry["event"]].append(entry)
    if not by_event["config"]:
        raise Mistake(f"{path} is no log of train.py: the settings of a run are missing")
    starts = by_event["config"] + by_event["resume"]
    settings = vars(TrainConfig()) | starts[0]["config"]
    names = GPTConfig.__dataclass_fields__
    cfg = GPTConfig(**{name: value for name, value in settings.items() if name in names})
    return Log(run, settings, cfg, starts, by_event["eval"], by_event["step"])


def column(evals: list[dict], x: str, y: str) -> tuple[list, list]:
    """Values of x and y where a log has both."""
    points = []
    for entry in evals:
        if entry.get(x) is not None and entry.get(y) is not None:
            points.append((entry[x], entry[y]))
    return [point[0] for point in points], [point[1] for point in points]


def layer_column(evals: list[dict], name: str, layer: int) -> tuple[list, list]:
    """Steps, and a layer's value of a list that evaluations hold: used or gini."""
    values = [dict(step=entry["step"], value=entry[name][layer])
              for entry in evals if entry.get(name)]
    return column(values, "step", "value")


def curves_section(runs: list[Path]) -> Section:
    """Validation loss of runs (log.jsonl, or its folder) against steps, tokens, FLOPs, seconds."""
    against = ("step", "tokens", "flops", "seconds")
    rows = []
    losses = {}
    usage = {}
    for log in map(read_log, runs):
        last = log.evals[-1] if log.evals else {}
        values = [last.get(name) for name in (*against, "train_loss", "val_loss",
                                              "val_bits_per_byte")]
        rows.append([str(log.run), log.cfg.ffn, *values])
        name = f"{log.run} ({log.cfg.ffn})"
        evals = [entry for entry in log.evals if entry["step"]]     # a logarithmic axis has no 0
        losses[name] = [column(evals, x, "val_loss") for x in against]
        if any(entry.get("used") for entry in evals):
            for layer in range(log.cfg.n_layer):
                usage[f"{log.run}, layer {layer}"] = [layer_column(evals, "used", layer),
                                                      layer_column(evals, "gini", layer)]
    figures = []
    if go:
        axes = [(x, "validation loss") for x in against]
        figures.append(line_charts("Validation loss", axes, losses, 300))
        if usage:
            axes = [("step", "share of neurons used"), ("step", "Gini of their use")]
            figures.append(line_charts("Neurons in use", axes, usage, 260))
    return Section(
        "Curves", "Validation loss in nats per token. FLOPs are those of training, counted as in "
        "the paper; seconds are those of the steps, without evaluations. Neurons in use, where the "
        "log has them: the share that the validation windows use at least once, and the Gini "
        "coefficient of how often (0 all alike, 1 one has all).",
        [Table("Last evaluation", ["run", "ffn", *against, "train loss", "validation loss",
                                   "bits per byte"], rows)], figures)


def run_curves(args: argparse.Namespace) -> list[Section]:
    return [curves_section(args.runs)]


def add_curves(commands) -> None:
    parser = add_command(commands, "curves", "loss against steps, tokens, FLOPs, seconds",
                         run_curves)
    add_run_list(parser)


# --------------------------------------------------------------------------------------------------
# isoflop: trained with equal FLOPs, which layer is best? (arXiv 2606.07414, Figures 1 and 3)

RECIPE = ("eval_sequences", "block_size", "vocab_size", "batch_size", "weight_decay",
          "warmup_steps", "decay_fraction", "grad_clip")
VARIED = ("activation", "router", "softmax_gates", "shared_pool", "norm")   # a variant of a layer
# Student's t for a two-sided 95 % interval, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def machine_of(log: Log) -> str:
    """The GPU, or the threads of a CPU: the log does not tell one processor from another."""
    versions = log.starts[0].get("versions", {})
    return f"{versions.get('machine')}, {versions.get('processes', 1)} process(es)"


def dtype_of(log: Log) -> str:
    """The dtype of matmuls; auto is float32 on a CPU. On a GPU float32 stands for TF32 too."""
    dtype = log.settings["dtype"]
    if dtype == "auto" and machine_of(log).startswith("cpu"):
        return "float32"
    return dtype


def check_comparable(logs: list[Log]) -> None:
    """Raises Mistake if a run did not spend a budget, or two differ by more than model, budget,
    learning rate and seed."""
    first = None
    seen = {}
    for log in logs:
        budget = log.settings["flops"]
        steps = log.settings["steps"]
        if not budget:
            raise Mistake(f"{log.run} was not trained to a budget: python train.py --flops=...")
        losses = {entry["step"]: entry.get("val_loss") for entry in log.evals}
        done = max(losses, default=0)
        if done != steps or losses[done] is None:
            raise Mistake(f"{log.run} was last evaluated at step {done}, and its budget is "
                          f"{steps} steps: give runs that ended there")
        recipe = {name: log.settings[name] for name in RECIPE}
        recipe["dtype"] = dtype_of(log)
        recipe["data"] = log.starts[0].get("data", {}).get("fingerprint")
        first = first or recipe
        for name, value in recipe.items():
            if value != first[name]:
                raise Mistake(f"{logs[0].run} and {log.run} are not comparable: "
                              f"{name}={first[name]} and {value}")
        same = (*group_key(log), log.settings["seed"])
        if same in seen:
            raise Mistake(f"{seen[same]} and {log.run} are the same run, with seed="
                          f"{log.settings['seed']}: give one")
        seen[same] = log.run


def group_key(log: Log) -> tuple:
    """What runs that differ by their seeds have in common."""
    model = dataclasses.asdict(log.cfg)
    for name in idle_settings(model, log.cfg.ffn):      # those of other layers do not count
        del model[name]
    rates = log.settings["learning_rate"], log.settings["ffn_rate"]
    return log.settings["flops"], repr(model), rates


class Group:
    """Runs of one model with one budget that differ by their seeds; numbers are means over them,
    seconds a median (another program may have slowed down one of them), or None if the runs are of
    several machines."""

    def __init__(self, logs: list[Log]):
        self.logs = logs
        self.cfg = logs[0].cfg
        self.budget = logs[0].settings["flops"]
        self.rates = f"{logs[0].settings['learning_rate']:g}"
        if logs[0].settings["ffn_rate"] != 1:
            self.rates += f", ffn {logs[0].settings['ffn_rate']:g} of it"
        self.variant = variant_name(self.cfg)
        self.losses = [log.evals[-1]["val_loss"] for log in logs]
        self.loss = statistics.fmean(self.losses)
        bits = [log.evals[-1].get("val_bits_per_byte") for log in logs]
        self.bits = None if None in bits else statistics.fmean(bits)
        seconds = [training_seconds(log) for log in logs]
        one_machine = len({machine_of(log) for log in logs}) == 1
        self.seconds = None
        if one_machine and None not in seconds:
            self.seconds = statistics.median(seconds)

    def variance_of_mean(self) -> float:
        """Of the loss, over seeds; at least two."""
        return statistics.variance(self.losses) / len(self.losses)

    def interval(self) -> Estimate:
        """The mean loss and its 95 % interval over seeds, by Student's t; unknown for one seed."""
        freedom = len(self.losses) - 1
        if freedom == 0:
            return Estimate(None, None)
        return Estimate(self.loss, T95.get(freedom, 1.96) * math.sqrt(self.variance_of_mean()))

    def less(self, other: "Group") -> Estimate:
        """The difference of two losses. Its interval has the degrees of freedom of the fewer seeds,
        which makes it rather too wide than too narrow."""
        freedom = min(len(self.losses), len(other.losses)) - 1
        difference = self.loss - other.loss
        if freedom == 0:
            return Estimate(difference, None)
        error = math.sqrt(self.variance_of_mean() + other.variance_of_mean())
        return Estimate(difference, T95.get(freedom, 1.96) * error)

    def row(self) -> list:
        """Of the table of a budget."""
        with torch.device("meta"):
            total, active = GPT(self.cfg).num_params()
        last = self.logs[0].evals[-1]
        return [f"{self.cfg.n_layer} x {self.cfg.d_model}, {layer_sizes(self.cfg)}",
                self.rates, str(self.logs[0].run), total, active,
                last.get("tokens"), last["step"], len(self.losses), self.loss, self.interval(),
                math.exp(self.loss), self.bits, self.seconds]


def training_seconds(log: Log) -> float | None:
    """The steps of a run at the pace of its median step: it may have slept, or shared a processor.

    None if the log has fewer than two lines of steps.
    """
    paces = []
    for before, after in itertools.pairwise(log.steps):
        if after["step"] > before["step"]:
            paces.append((after["seconds"] - before["seconds"]) / (after["step"] - before["step"]))
    return log.settings["steps"] * statistics.median(paces) if paces else None


def variant_name(cfg: GPTConfig) -> str:
    """The layer, and what it has other than the default."""
    words = [cfg.ffn]
    for name in VARIED:
        value = getattr(cfg, name)
        if value != getattr(GPTConfig, name):
            if isinstance(value, str):
                words.append(value)
            else:
                words.append(name if value else f"no {name}")
    return " ".join(words)


def layer_sizes(cfg: GPTConfig) -> str:
    if cfg.ffn in ("sgatlin", "peer"):
        return f"{cfg.n_channels} x {cfg.n_experts} k {cfg.top_k} d_key {cfg.d_key}"
    if cfg.ffn == "moe":
        return f"{cfg.n_experts} x {cfg.d_ff} k {cfg.top_k}"
    return str(cfg.d_ff)


def group_runs(logs: list[Log]) -> dict[float, list[Group]]:
    """The groups of each budget, the lowest loss first."""
    alike = defaultdict(list)
    for log in logs:
        alike[group_key(log)].append(log)
    budgets = defaultdict(list)
    for group in map(Group, alike.values()):
        budgets[group.budget].append(group)
    result = {}
    for budget in sorted(budgets):
        result[budget] = sorted(budgets[budget], key=lambda group: group.loss)
    return result


def best_of_variants(groups: list[Group]) -> dict[str, Group]:
    """Of each variant the group with the most seeds, so that the luck of a single one does not win
    against a mean; of several such groups the one with the lowest loss. The lowest loss first."""
    best = {}
    for group in groups:
        chosen = best.get(group.variant)
        if chosen is None or len(group.losses) > len(chosen.losses):
            best[group.variant] = group
    return dict(sorted(best.items(), key=lambda item: item[1].loss))


def rival_rows(budget: float, best: dict[str, Group]) -> list[list]:
    """sgatlin against every other variant: perplexities, their ratio, the difference of losses."""
    ours = best["sgatlin"]
    rows = []
    for variant, rival in best.items():
        if rival is not ours:
            rows.append([f"{budget:g}", variant, math.exp(ours.loss), math.exp(rival.loss),
                         math.exp(ours.loss - rival.loss), ours.less(rival)])
    return rows


def on_one_machine(logs: list[Log], budgets: dict[float, list[Group]]
                   ) -> tuple[str, dict[float, list[Group]]]:
    """The name of the machine that made most of the runs, and the groups of its own runs, for those
    budgets at which it ran every variant. Seconds of different machines cannot be compared."""
    machine, _ = Counter(map(machine_of, logs)).most_common(1)[0]
    timed = group_runs([log for log in logs if machine_of(log) == machine])
    complete = {}
    for budget, groups in timed.items():
        if {group.variant for group in groups} == {group.variant for group in budgets[budget]}:
            complete[budget] = groups
    return machine, complete


def trade(budgets: dict[float, list[Group]]) -> dict[str, tuple[list, list]]:
    """Of each variant the seconds of its best groups, one a budget, and their bits per byte."""
    points = defaultdict(list)
    for groups in budgets.values():
        for variant, group in best_of_variants(groups).items():
            if group.seconds is not None and group.bits is not None:
                points[variant].append((group.seconds, group.bits))
    return {variant: tuple(zip(*sorted(points[variant]))) for variant in points}


def same_seconds(in_seconds: dict[str, tuple[list, list]]) -> Table | None:
    """Bits per byte after the same seconds: of the variants with several budgets, on the lines that
    draw_budgets draws, at both ends and in the middle of the time that all these lines cover."""
    lines = {variant: line for variant, line in in_seconds.items() if len(line[0]) > 1}
    start = max((seconds[0] for seconds, _ in lines.values()), default=0)
    end = min((seconds[-1] for seconds, _ in lines.values()), default=0)
    if start >= end:
        return None
    rows = []
    for elapsed in np.geomspace(start, end, 3):
        row = [float(elapsed)]
        for seconds, bits in lines.values():
            row.append(float(np.interp(math.log(elapsed), np.log(seconds), bits)))
        rows.append(row)
    return Table("Bits per byte after the same seconds", ["seconds", *lines], rows)


def isoflop_section(runs: list[Path]) -> Section:
    """Runs that spent equal FLOPs: the losses of layers and sizes."""
    logs = [read_log(run) for run in runs]
    check_comparable(logs)
    budgets = group_runs(logs)
    tables = []
    rivals = []
    for budget, groups in budgets.items():
        best = best_of_variants(groups)
        rows = []
        for group in groups:
            star = "*" if group is best[group.variant] else ""
            rows.append([group.variant, star, *group.row()])
        tables.append(Table(f"{budget:g} FLOPs: validation loss", [
            "variant", "best", "n_layer x d_model, ffn", "learning rate", "first run", "parameters",
            "active", "tokens", "steps", "seeds", "loss", "over seeds", "perplexity",
            "bits per byte", "seconds"], rows))
        if "sgatlin" in best:
            rivals += rival_rows(budget, best)
    machine, timed = on_one_machine(logs, budgets)
    in_seconds = trade(timed)
    tables.insert(0, same_seconds(in_seconds))
    if rivals:
        header = ["FLOPs", "rival", "sgatlin", "its", "ratio", "loss less its"]
        tables.insert(0, Table("Perplexity of sgatlin and of its rivals, best sizes", header,
                               rivals))
    return Section(
        "Equal FLOPs", "Runs that spent the same FLOPs of training, counted as in the paper; the "
        "lowest loss first, in nats per token of validation text after the last step. A star marks "
        "the best size and learning rate of a variant, of those with the most seeds. Numbers are "
        "means over seeds, with 95 % intervals by Student's t where there are several. Beside "
        "sgatlin its best rival comes first: a ratio below 1 is in sgatlin's favour. Seconds are "
        "those of the steps, without evaluations, at the pace of the median step, and the median "
        "over seeds. Bits per byte after the same seconds are read off straight lines between the "
        f"budgets, on a logarithmic axis of seconds, for runs on this machine: {machine}.",
        [table for table in tables if table], [draw_budgets(budgets, in_seconds)] if go else [])


def draw_budgets(budgets: dict[float, list[Group]], in_seconds: dict[str, tuple[list, list]]):
    """Loss against FLOPs and bits per byte against seconds, of the best group of each variant.

    A line goes through the means; of the loss all seeds are points, those of later variants a
    little further to the right, so that none hides another.
    """
    chosen = defaultdict(list)
    for groups in budgets.values():
        for variant, group in best_of_variants(groups).items():
            chosen[variant].append(group)
    figure = make_subplots(rows=1, cols=2)
    figure.update_layout(title="Trained with equal FLOPs", height=480)
    figure.update_xaxes(title="FLOPs of training", type="log", tickvals=list(budgets),
                        ticktext=[f"{budget:g}" for budget in budgets], row=1, col=1)
    figure.update_yaxes(title="validation loss, nats per token", row=1, col=1)
    figure.update_xaxes(title="seconds of training", type="log", row=1, col=2)
    figure.update_yaxes(title="bits per byte", row=1, col=2)
    for place, (variant, groups) in enumerate(chosen.items()):
        colour = COLOURS[place % len(COLOURS)]
        marks = dict(legendgroup=variant, name=variant, marker=dict(color=colour, size=6))
        figure.add_scatter(x=[group.budget for group in groups],
                           y=[group.loss for group in groups], mode="lines", **marks, row=1, col=1)
        points = [(group.budget * 1.02**place, loss) for group in groups for loss in group.losses]
        figure.add_scatter(x=[budget for budget, _ in points], y=[loss for _, loss in points],
                           mode="markers", showlegend=False, **marks, row=1, col=1)
        seconds, bits = in_seconds.get(variant, ([], []))
        figure.add_scatter(x=seconds, y=bits, mode="lines+markers", showlegend=False, **marks,
                           row=1, col=2)
    return figure


def run_isoflop(args: argparse.Namespace) -> list[Section]:
    return [isoflop_section(args.runs)]


def add_isoflop(commands) -> None:
    parser = add_command(commands, "isoflop", "layers trained with equal FLOPs: loss, size, "
                                              "seconds", run_isoflop)
    add_run_list(parser)


# --------------------------------------------------------------------------------------------------
# explorer: a passage and a map whose tokens can be clicked, and what is known of each

SHOWN = 8       # nearest circuits, and neurons, of one token


def near_data(run: Run, source: Recording, places, layer: int, channel: int | None) -> list[list]:
    """Of the circuits at places of a recording the nearest recorded: [place, distance] pairs."""
    queries = source.circuits(layer, channel).at(places)
    own = contexts_of(source.tokens)[places]
    found = []
    for near in find_neighbors(run, queries, own, layer, channel):
        found.append([[place, round(1 - similarity, 3)] for place, similarity in near[:SHOWN]])
    return found


def neuron_data(source: Recording, places, layer: int) -> list[list]:
    """Of tokens at places their neurons, [row, gate * <w_in, x>], the largest first."""
    products = source.products[layer, places]                                   # (M, J)
    order = products.abs().argsort(dim=1, descending=True, stable=True)
    rows = source.rows[layer, places].gather(1, order).tolist()
    values = products.gather(1, order).tolist()
    result = []
    for of_rows, of_values in zip(rows, values):
        result.append([[row, round(value, 3)] for row, value in zip(of_rows, of_values)])
    return result


def next_data(run: Run, source: Recording, place: int) -> list[list]:
    """The likeliest next tokens, [token, p]."""
    p = source.p[place].tolist()
    return [[token, round(q, 2)] for token, q in zip(source.top[place].tolist(), p)]


def explained_data(run: Run, tokens: list[int]) -> dict:
    """What a prompt's tokens and neurons add to the logit of the likeliest next token."""
    found = explain(run, tokens, None, None)
    shares = found.neuron_shares                                                # (L, T, J)
    neurons = []
    for place in shares.flatten().abs().topk(min(SHOWN, shares.numel())).indices.tolist():
        layer, t, j = np.unravel_index(place, shares.shape)
        neurons.append([int(layer), int(t), found.rows[layer, t, j].item(),
                        round(shares[layer, t, j].item(), 3),
                        round(found.products[layer, t, j].item(), 3)])
    return dict(target=found.target, logit=round(found.logit, 3), neurons=neurons,
                shares=[round(share, 3) for share in found.token_shares.tolist()])


def explorer_data(run: Run, source: Recording, points: list[int], layer: int,
                  channel: int | None) -> dict:
    """All that the page can show: of the tokens of a passage, source, and of recorded ones at
    points.

    A vocabulary entry has a letter for each byte, latin-1, since a token may end within a
    character. Lists of near circuits are [layer][1 + channel], 0 for all, [token of the passage].
    """
    cfg = run.cfg
    layers = range(cfg.n_layer)
    passage_tokens = source.tokens[0].tolist()
    T = len(passage_tokens)
    progress(f"look up {T} tokens of a passage, and {len(points)} points of the map")
    vocabulary = [run.encoding.decode_single_token_bytes(token).decode("latin-1")
                  for token in range(run.encoding.n_vocab)]
    vocabulary += ["?"] * (cfg.vocab_size - len(vocabulary))
    near = []
    for of_layer in layers:
        near.append([near_data(run, source, torch.arange(T), of_layer, of_channel)
                     for of_channel in (None, *range(cfg.n_channels))])
    neurons = [neuron_data(source, torch.arange(T), of_layer) for of_layer in layers]
    explained = [None] * T
    if cfg.activation == "identity":
        explained = [explained_data(run, passage_tokens[:t + 1]) for t in range(T)]
    near_points = [near_data(run, run.trained, points, of_layer, channel) for of_layer in layers]
    neurons_points = [neuron_data(run.trained, points, of_layer) for of_layer in layers]
    at_points = {}
    for number, place in enumerate(points):
        at_points[place] = dict(near=[lists[number] for lists in near_points],
                                neurons=[lists[number][:SHOWN] for lists in neurons_points])
    # A channel that is chosen has neurons of its own in front.
    shown = [list(lists) for lists in neurons_points]
    for of_layer, lists in enumerate(neurons):
        for pairs in lists:
            shown[of_layer].append(pairs)
            for c in range(cfg.n_channels):
                first_row = c * cfg.n_experts
                shown[of_layer].append([pair for pair in pairs
                                        if first_row <= pair[0] < first_row + cfg.n_experts])
    seen = set(points)
    for pairs in itertools.chain(*itertools.chain(*near), *near_points):
        seen.update(place for place, _ in pairs)
    return dict(
        E=cfg.n_experts, T=run.trained.tokens.shape[1], start=T // 2, layer=layer,
        channel=0 if channel is None else channel + 1, vocabulary=vocabulary,
        recorded=run.trained.tokens.ravel().tolist(), passage=passage_tokens, near=near,
        neurons=neurons, explained=explained, points=at_points,
        expected=[next_data(run, source, t) for t in range(T)],
        next={place: next_data(run, run.trained, place)[:3] for place in sorted(seen)},
        cards=card_data(run, shown, explained))


def card_data(run: Run, shown: list[list], explained: list[dict]) -> dict[str, dict]:
    """The cards, by "layer row", of all neurons that the page can show.

    shown[layer] has the neurons of every token, as neuron_data lists them.
    """
    wanted = defaultdict(set)
    for layer, lists in enumerate(shown):
        for pairs in lists:
            wanted[layer].update(row for row, _ in pairs[:SHOWN])
    for found in filter(None, explained):
        for layer, _, row, *_ in found["neurons"]:
            wanted[layer].add(row)
    cards = {}
    for layer, rows in wanted.items():
        progress(f"make cards of {len(rows)} neurons of layer {layer}")
        for card in neuron_cards(run, layer, sorted(rows)):
            edges = [edge for edge, _ in card.scores]
            cards[f"{layer} {card.row}"] = rounded(dict(
                use=card.use, first=edges[0], step=edges[1] - edges[0],
                counts=[count for _, count in card.scores], excerpts=card.excerpts[:5],
                promotes=card.promotes[:6], suppresses=card.suppresses[:6],
                reads=card.reads[:6]))
    return cards


def rounded(value):
    """Lists, tuples and dicts with all floats in them short."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return value


def json_script(data: dict) -> str:
    """Data for PAGE_SCRIPT. Without "<" no text in it can end the script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{text}</script>'


def explorer_html(data: dict, n_layer: int, n_channels: int, drawn_map: str, lead: str,
                  note: str) -> str:
    layers = ""
    for layer in range(n_layer):
        layers += f'<option value="{layer}">layer {layer}</option>'
    channels = '<option value="0">all channels</option>'
    for channel in range(n_channels):
        channels += f'<option value="{channel + 1}">channel {channel}</option>'
    return f"""<p class="lead">{html.escape(lead)}</p><div class="explorer">
<div id="reading" class="box"><div id="passage" role="group" aria-label="passage"></div>
<div id="legend" class="quiet" aria-live="polite"></div></div>
<div id="panel" class="box"><div class="controls"><select id="layer" aria-label="layer">{layers}
</select><select id="channel" aria-label="channel">{channels}</select></div>
<div id="details"></div></div>
<div id="mapping" class="box">{drawn_map}<p class="quiet">{html.escape(note)}</p></div></div>
{json_script(data)}"""


def explorer_section(run: Run, source: Recording, layer: int, channel: int | None,
                     classes: Classes, umap: Callable | None, note: str) -> Section:
    places, views = circuit_map(run, layer, channel, umap)
    data = explorer_data(run, source, places, layer, channel)
    drawn = draw_map(run, places, views, classes) if go else ""
    lead = ("Click a token, or move with the arrow keys: the circuits nearest to its own, the "
            "neurons it chooses, and what the text so far adds to the prediction. The points of "
            "the map can be clicked, too.")
    text = map_text(len(places), channel, umap, note)
    page_part = explorer_html(data, run.cfg.n_layer, run.cfg.n_channels, drawn, lead, text)
    return Section("Map", text, explorer=page_part)


# --------------------------------------------------------------------------------------------------
# report: all chapters about one run

def run_report(args: argparse.Namespace) -> list[Section]:
    """A chapter that lacks something, facts or a log, is left out with the reason."""
    umap, note = import_umap()
    run = circuits_of(args.out_dir, args.device, args.windows)
    layer, channel = picked(run, args)
    tokens = prompt_tokens(run, args.prompt)
    source = record(run.model, torch.tensor([tokens]), "the prompt")
    try:
        patches = patching_section(run, args.template, args.facts)
    except Mistake as error:
        if args.template or args.facts:
            raise
        patches = Section("Patching", f"Left out: {error}.")
    try:
        curves = curves_section([args.out_dir])
    except Mistake as error:
        curves = Section("Curves", f"Left out: {error}.")
    try:
        found = explain(run, source.tokens[0].tolist(), None, None)
        explained = [explain_section(run, found)]
    except Mistake as error:
        explained = [Section("Why this token?", f"Left out: {error}.")]
    classes = context_classes(run)
    return [explorer_section(run, source, layer, channel, classes, umap, note),
            structure_section(run, layer, channel, classes), *explained,
            usage_section(run, layer, channel), patches,
            neighbors_section(run, source, layer, channel), curves]


def add_report(commands) -> None:
    parser = add_command(commands, "report", "everything (the default)", run_report)
    add_circuit_options(parser)
    add_prompt_option(parser)
    add_fact_options(parser)


# --------------------------------------------------------------------------------------------------
# the command line

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"analyze.py: {message} (--help lists the options)\n")


def at_least_two(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} must be 2 or more")
    return int(text)


def add_command(commands, name: str, text: str, run: Callable) -> argparse.ArgumentParser:
    """A command that calls run(args), which returns its sections."""
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--out_dir", type=Path, default=Path("out"),
                        help="folder of run and results (default: out)")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="(default: auto)")


def add_windows_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--windows", type=at_least_two, default=128,
                        help="of validation text to record (default: 128)")


def add_circuit_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_windows_option(parser)
    parser.add_argument("--layer", type=int,
                        help="of neighbours and single pictures (default: the last but one)")
    parser.add_argument("--channel", type=int, help="(default: all together)")


def picked(run: Run, args: argparse.Namespace) -> tuple[int, int | None]:
    """The layer and the channel of add_circuit_options."""
    layer = pick("layer", args.layer, run.cfg.n_layer, max(run.cfg.n_layer - 2, 0))
    return layer, pick("channel", args.channel, run.cfg.n_channels, None)


def add_prompt_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", help="text to look at, or FILE:path (default: a passage of the "
                                         "validation text)")


def add_fact_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--template", help="text with {} for the word that differs between prompts")
    parser.add_argument("--facts", help="word:answer,word:answer,... or a file of them (default: "
                                        "those of the training text); the paper's: ground:icy,"
                                        "turtle:slow,door:open,doctor:nice,wind:strong,food:ready,"
                                        "lake:big,mum:proud")


def add_quick_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true",
                        help="few, short trainings, to see that it works")


def add_run_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="folder of a run, or its log")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Without a command it is report."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
                    allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for add in (add_report, add_neighbors, add_map, add_usage, add_patch, add_neuron, add_explain,
                add_mimic, add_redistribute, add_curves, add_isoflop):
        add(commands)
    if not argv or argv[0] not in (*commands.choices, "-h", "--help"):
        argv = ["report", *argv]
    args = parser.parse_args(argv)
    if "device" in args:
        if args.device == "auto":
            args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device=cuda: torch sees no CUDA device")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    begin = time.perf_counter()
    sys.stdout.reconfigure(errors="replace")    # a terminal that cannot show a character shows "?"
    try:
        check_writable(args.out_dir)
        sections = args.run(args)
        write_results(args.out_dir, args.command, sections)
        for section in sections:
            print_section(section, 14 if args.command == "report" else 10_000)
        path = args.out_dir / f"{args.command}.json"
        pictures = path.with_suffix(".html")
        if not go:
            pictures = f"no pictures: pip install plotly ({NO_PLOTLY})"
        seconds = time.perf_counter() - begin
        print(f"\nwrote {path} and {pictures} in {seconds:.0f} s", flush=True)
    except BrokenPipeError:     # of `analyze.py ... | head`: all is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, Mistake) as error:
        raise SystemExit(f"analyze.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
