# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy", "tiktoken", "triton; sys_platform == 'linux'"]
# ///
"""Train a GPT on a folder made by prepare_data.py (made here if it is the default one).

    python train.py                                       # one GPU or a laptop; --help lists all
    python train.py --ffn=swiglu --scale=2 --flops=1e15   # a model of the paper's ladder, a budget
    torchrun --nproc_per_node=8 train.py                  # eight GPUs, or processes of a CPU
    torchrun --nproc_per_node=8 train.py --shard          # parameters and optimizer cut in eighths
    python train.py --resume                              # go on after Ctrl-C, a kill or a crash

Writes to out_dir: ckpt.pt (the model, the optimizer, the step, the settings, the tokenizer) and
log.jsonl (the settings, then one object per logged step, evaluation and resumption).

The batch of step s is a function of (seed, s) alone: it does not depend on the number of processes,
on how it is cut into micro-batches, on evaluations or on interruptions. Read `train` first.

Letters: B sequences in a batch, T block_size, C channels, E neurons per channel, k top_k.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import inspect
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import kernels
import prepare_data
from model import (
    ACTIVATIONS,
    FFN,
    GPT,
    ROUTERS,
    GPTConfig,
    SparselyGatedLinear,
    ladder,
    rotate,
    save_checkpoint,
)
from sample import plain_output, printable, stream


@dataclass
class TrainConfig(GPTConfig):
    vocab_size: int = 4096          # rows of the embedding; unless given, those of the tokenizer
    scale: int = 0                  # 1, 2, ...: sizes of the paper's ladder, unless they are given
    data_dir: str = "data/packages"     # folder made by prepare_data.py
    out_dir: str = "out"            # folder for the checkpoint and the log
    resume: bool = False            # continue the run in out_dir
    overwrite: bool = False         # start anew although there is a run in out_dir
    steps: int = 2000               # optimizer steps
    flops: float = 0.0              # compute to spend, counted as in the paper: sets steps; 0: off
    batch_size: int = 64            # sequences per optimizer step, over all processes
    micro_batch_size: int = 0       # sequences per process at a time; 0: 2 GB of logits at most
    learning_rate: float = 1e-3     # the highest of the schedule (AdamW, betas 0.9 and 0.999)
    ffn_rate: float = 1.0           # learning rate of the feedforward layers, relative
    weight_decay: float = 0.1       # of matrices; not of biases and the scales of norms
    warmup_steps: int = 100         # of linear rise from 0
    decay_fraction: float = 0.2     # share of the steps, at the end, of a fall as 1 - sqrt
    grad_clip: float = 2.0          # bound on the norm of the gradient; 0: off
    eval_interval: int = 200        # steps between evaluations; each saves a checkpoint
    eval_sequences: int = 128       # validation windows per evaluation, always the same ones
    log_interval: int = 10          # steps between log lines
    seed: int = 1337                # of the initialisation and of the order of the data
    device: str = "cuda" if torch.cuda.is_available() else "cpu"    # cpu or cuda
    dtype: str = "auto"             # of matmuls: float32, bfloat16, or auto: bfloat16 on GPUs
    compile: bool = True            # run the model through torch.compile
    shard: bool = False             # cut parameters, gradients and moments among the processes

    def __post_init__(self):
        super().__post_init__()
        # Either would train on in silence, and wrongly.
        if self.grad_clip < 0 or not 0 <= self.decay_fraction <= 1:
            raise SystemExit(f"train.py: --grad_clip={self.grad_clip} must be 0 or more, and "
                             f"--decay_fraction={self.decay_fraction} between 0 and 1")


# The defaults above are for a GPU: the model, the optimizer and the schedule of the paper's
# TinyStories study. These replace them on a CPU.
CPU_PRESET = dict(data_dir="data/python", block_size=256, d_model=128, n_channels=4, d_key=32,
                  batch_size=8, steps=1840, warmup_steps=50, learning_rate=6e-3, ffn_rate=0.33,
                  eval_interval=100, eval_sequences=64, compile=False)
# Settings that may differ when a run is resumed.
RESUMABLE = {"data_dir", "out_dir", "resume", "overwrite", "steps", "micro_batch_size",
             "eval_interval", "log_interval", "device", "dtype", "compile", "shard"}
CHOICES = {"ffn": FFN, "router": ROUTERS, "activation": ACTIVATIONS,
           "device": ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",),
           "dtype": ("auto", "float32", "bfloat16")}

# Which of torchrun's processes this is. RANK and WORLD_SIZE that others left behind do not count.
LAUNCHED = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


# --------------------------------------------------------------------------------------------------
# settings

def parse_args(argv: list[str] | None) -> dict:
    """The settings that the command line gives. The help is the comments of the config classes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     usage="python train.py [--SETTING=VALUE ...]")
    comments = {}
    for cls in (GPTConfig, TrainConfig):
        comments |= dict(re.findall(r"^    (\w+): .*?# ?(.*)$", inspect.getsource(cls), re.M))
    for field in dataclasses.fields(TrainConfig):
        default = f"default: {field.default}"
        if field.name in CPU_PRESET:
            default += f"; on a CPU: {CPU_PRESET[field.name]}"
        text = f"{comments.get(field.name, '')} ({default})".replace("%", "%%")
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=text)
            continue
        convert = os.path.expanduser if field.name.endswith("_dir") else field.type
        parser.add_argument(f"--{field.name}", type=convert, help=text, metavar="",
                            choices=CHOICES.get(field.name))
    return vars(parser.parse_args(argv))


def new_config(given: dict) -> TrainConfig:
    """Settings of a new run: those given, over the ladder's if --scale is, over the preset."""
    if "steps" in given and given.get("flops"):
        raise SystemExit("train.py: --steps and --flops both set the steps: give one")
    settings = dict(CPU_PRESET) if given.get("device", TrainConfig.device) == "cpu" else {}
    if given.get("scale"):
        settings |= ladder(given.get("ffn", TrainConfig.ffn), given["scale"])
    return TrainConfig(**(settings | given))


def resumed_config(given: dict, saved: dict) -> TrainConfig:
    """The checkpoint's settings, with those given, of which some may not change."""
    # Where a run is, and on how many devices, is not remembered: it may go on elsewhere.
    settings = saved | dict(out_dir=TrainConfig.out_dir, device=TrainConfig.device, shard=False)
    for name, value in given.items():
        if name not in RESUMABLE and value != settings[name]:
            raise SystemExit(f"train.py: --{name}={value} contradicts the checkpoint, which has "
                             f"{settings[name]}: drop it, or train anew with another --out_dir")
    return TrainConfig(**(settings | given))


def load_settings(given: dict) -> tuple[TrainConfig, dict | None]:
    """All settings, and the checkpoint to resume."""
    folder = Path(given.get("out_dir", TrainConfig.out_dir))
    path = folder / "ckpt.pt"
    if given.get("resume"):
        if not path.exists():
            raise SystemExit(f"train.py: {path} is missing: without --resume a run begins")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return resumed_config(given, saved["config"]), saved
    log = folder / "log.jsonl"
    # A log without an evaluation is of a start that failed.
    begun = path.exists() or (log.exists() and '"eval"' in log.read_text(errors="replace"))
    if begun and not given.get("overwrite"):
        raise SystemExit(f"train.py: {folder} holds a run: --resume continues it, --overwrite "
                         "starts anew, --out_dir=... puts this one elsewhere")
    return new_config(given), None


def step_flops(model: GPT, cfg: TrainConfig) -> int:
    """FLOPs of a training step, as the paper counts them: backward costs twice forward."""
    return 3 * model.flops_per_sequence() * cfg.batch_size


def steps_for(budget: float, cfg: TrainConfig) -> int:
    """How many steps a budget of FLOPs buys."""
    with torch.device("meta"):              # only its sizes count
        cost = step_flops(GPT(cfg), cfg)
    if budget < cost:
        raise SystemExit(f"train.py: --flops={budget:g} buys no step: one costs {cost:.3g}")
    return int(budget // cost)


def settings_of(ffn: str) -> set[str]:
    """The settings that a feedforward layer reads."""
    read = set()
    defaults = GPTConfig(ffn=ffn)

    class Reader:
        def __getattr__(self, name):
            read.add(name)
            return getattr(defaults, name)

    with torch.device("meta"):
        FFN[ffn](Reader())
    return read


def idle_settings(given: dict, ffn: str) -> list[str]:
    """Of the settings given, those of other feedforward layers: they change nothing in this one."""
    used = settings_of(ffn)
    others = set().union(*map(settings_of, FFN))
    return [name for name in given if name in others and name not in used]


def out_dir_option(cfg: TrainConfig) -> str:
    return shlex.quote(f"--out_dir={cfg.out_dir}")


def resume_command(cfg: TrainConfig) -> str:
    """What continues this run; the dots stand for torchrun's own options."""
    start = "torchrun ..." if LAUNCHED else "python"
    command = f"{start} train.py {out_dir_option(cfg)} --resume"
    # A run does not remember these two.
    if cfg.device != TrainConfig.device:
        command += f" --device={cfg.device}"
    if cfg.shard:
        command += " --shard"
    return command


# --------------------------------------------------------------------------------------------------
# data

class Data:
    """The tokens of a folder made by prepare_data.py.

    The files of the start stay open: prepare_data.py may replace them by others during a run.
    """

    def __init__(self, folder: str | Path, block_size: int, seed: int = 0):
        folder = Path(folder)
        self.block_size = block_size
        self.seed = seed
        if not (folder / "meta.json").exists():
            raise SystemExit(f"{folder}/meta.json is missing: python prepare_data.py --help tells "
                             "how to make it")
        self.meta = json.loads((folder / "meta.json").read_text())
        self.tokenizer = dict(ranks=(folder / "tokenizer.tiktoken").read_text(),
                              pat_str=self.meta["pat_str"])
        self.encoding = prepare_data.load_tokenizer(**self.tokenizer)
        # Windows in one pass over the training tokens; room is left to shift them.
        self.n_windows = (self.meta["train_tokens"] - block_size - 1) // block_size
        self.files = {}
        for part in ("train", "val"):
            self.files[part] = open(folder / f"{part}.bin", "rb")               # noqa: SIM115
            tokens = len(self.tokens(part))
            # Another run of prepare_data.py may just have replaced one file and not yet the others.
            if tokens != self.meta[f"{part}_tokens"]:
                raise SystemExit(f"{folder}: {part}.bin and meta.json are not of the same data: "
                                 "prepare it again")
            # Where the windows of a pass start is shifted by up to a window.
            needed = 2 * block_size + 1 if part == "train" else block_size + 1
            if tokens < needed:
                raise SystemExit(f"{folder}/{part}.bin has {tokens} tokens: too few for "
                                 f"--block_size={block_size}, which needs {needed}")

    def tokens(self, part: str) -> np.ndarray:
        """All tokens of "train" or "val", mapped from the file."""
        return np.memmap(self.files[part], dtype=self.meta["dtype"], mode="r")

    def windows(self, part: str, starts: np.ndarray) -> Tensor:
        """The windows that begin there, (len(starts), T + 1) int64: inputs, and a target more."""
        # Mapped anew each time: a long-lived map counts every page it touched as memory in use.
        rows = self.tokens(part)[starts[:, None] + np.arange(self.block_size + 1)]
        return torch.from_numpy(rows.astype(np.int64))

    @functools.lru_cache(maxsize=2)         # noqa: B019  there is one Data, as long as the program
    def order(self, epoch: int) -> np.ndarray:
        """Where the windows of a pass start: shuffled, and shifted by a random part of a window."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.n_windows) * self.block_size
        return order + rng.integers(self.block_size)

    def train_starts(self, step: int, batch_size: int) -> np.ndarray:
        """The first tokens of the windows of the global batch of a step, (batch_size,)."""
        first = step * batch_size
        starts = []
        for i in range(first, first + batch_size):
            epoch, place = divmod(i, self.n_windows)
            starts.append(self.order(epoch)[place])
        return np.array(starts)

    def val_starts(self, count: int) -> np.ndarray:
        """The first tokens of at most count validation windows: evenly spaced, not overlapping."""
        room = self.meta["val_tokens"] - self.block_size - 1
        count = min(count, room // self.block_size + 1)
        return np.arange(count) * (room // max(count - 1, 1))


DEFAULT_DATA = {"data/python": False, "data/packages": True}    # folder: with installed packages?


def open_data(cfg: TrainConfig, saved: dict | None) -> Data:
    """The data of the run, prepared first if it is the default one and missing."""
    if cfg.data_dir in DEFAULT_DATA:
        if RANK == 0 and not Path(cfg.data_dir, "meta.json").exists():
            say(f"There is no data in {cfg.data_dir}: preparing it from the Python files of this "
                "machine.")
            prepare_data.prepare(["python"], cfg.data_dir, site_packages=DEFAULT_DATA[cfg.data_dir])
        if LAUNCHED:
            dist.barrier()
    data = Data(cfg.data_dir, cfg.block_size, cfg.seed)
    if saved and saved["data"]["fingerprint"] != data.meta["fingerprint"]:
        raise SystemExit(f"train.py: {cfg.data_dir} is not the data that the run in {cfg.out_dir} "
                         "was trained on: prepare that again")
    return data


# --------------------------------------------------------------------------------------------------
# optimizer, schedule, precision

def schedule(step: int, cfg: TrainConfig) -> float:
    """Learning rate of a step, the first being 0: linear warm-up, constant, at the end 1 - sqrt."""
    rise = 1.0
    if step < cfg.warmup_steps:
        rise = step / cfg.warmup_steps
    fall = 1.0
    decay_steps = int(cfg.decay_fraction * cfg.steps)
    decayed = step - (cfg.steps - decay_steps)          # steps since the fall began
    if decayed > 0:
        fall = 1 - math.sqrt(min(1.0, decayed / decay_steps))
    return cfg.learning_rate * rise * fall


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay is for matrices, not for biases (b1 and b2) and the scales of norms.

    Each group has, beside AdamW's own settings, the `rate` that set_learning_rate multiplies by.
    """
    groups = {}
    for name, p in model.named_parameters():
        is_matrix = p.ndim > 1 and not name.endswith((".b1", ".b2"))    # MoE's are (experts, d_ff)
        decay = cfg.weight_decay if is_matrix else 0.0
        rate = cfg.ffn_rate if ".ffn." in name else 1.0
        group = groups.setdefault((decay, rate), dict(params=[], weight_decay=decay, rate=rate))
        group["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=cfg.learning_rate, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets lr, times ffn_rate for the feedforward layers.

    A neuron is chosen rarely, and AdamW takes a large step on a rare gradient, since it divides by
    the root of the mean square. At a high rate such steps seem to disturb the rest.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]


def clip_gradients(model: nn.Module, cfg: TrainConfig) -> Tensor:
    """Scales the gradients to a norm of grad_clip where it is larger. Returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    # Sharded: each process knows the norm of its part.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def choose_dtype(cfg: TrainConfig) -> torch.dtype:
    """The dtype of the matmuls."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    # torch.cuda.is_bf16_supported() also counts GPUs that only emulate it, slowly.
    if cfg.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    return torch.float32


def micro_batch(cfg: TrainConfig) -> int:
    """How many sequences a process takes at a time: without a setting, 2 GB of logits at most."""
    if cfg.micro_batch_size:
        return cfg.micro_batch_size
    logits_bytes = 4 * cfg.block_size * cfg.vocab_size          # of a sequence
    return max(1, min(cfg.batch_size // WORLD, 2 * 10**9 // logits_bytes))


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product here: what the utilisation (MFU) is measured against."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / (kernels.median_ms(torch.mm, a, a) / 1e3)


def keep_memory() -> None:
    """Makes glibc keep freed memory: by default it gives large tensors back, page by page."""
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold, trim_threshold = -3, -1         # names of mallopt's parameters
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def sum_in_fixed_order() -> None:
    """Makes equal runs on a GPU equal to the bit; a step on an H100 takes 46 ms instead of 44.

    By default the gradients of attention and of the embedding are sums in whatever order the
    threads arrive in, and cuBLAS may choose a product's order by what else is running. An operation
    that has no fixed order raises RuntimeError; none of the five layers uses one.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # 8 buffers of 4 MB
    torch.use_deterministic_algorithms(True)
    # It would also fill new tensors before they are written; here nothing reads them before that.
    torch.utils.deterministic.fill_uninitialized_memory = False


# --------------------------------------------------------------------------------------------------
# processes

@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Within it the processes of torchrun can reach each other, and each has its GPU."""
    if not LAUNCHED:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        if device == "cpu":
            # A thread of gloo may still have to drop the last gathered tensor. It needs Python for
            # that, and aborts the process if Python has ended. destroy_process_group does not wait
            # for it, for caches of DTensor keep a sharded model's group alive. So give it time.
            time.sleep(0.5)
        dist.destroy_process_group()


def wrap(model: GPT, cfg: TrainConfig) -> nn.Module:
    """What the loop calls in place of model, whose parameters it shares."""
    compiled = cfg.compile and (cfg.device == "cpu" or kernels.triton)  # a GPU needs triton for it
    wrapped = torch.compile(model) if compiled else model
    if LAUNCHED and not cfg.shard:
        wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True)
    return wrapped


def shard(model: GPT, device: str) -> None:
    """FSDP2: every process keeps its part of each tensor, and of its gradient and moments."""
    mesh = init_device_mesh(device, (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it Ctrl-C, SIGTERM and a closed terminal are recorded in the list and stop nothing."""
    received = []

    def receive(number, frame):
        received.append(number)
        with contextlib.suppress(OSError):              # print could interrupt another print
            os.write(2, b"train.py: saving after this step\n")

    with contextlib.ExitStack() as restore:
        for number in signal.Signals:                   # Windows has no SIGHUP
            if number.name not in ("SIGINT", "SIGTERM", "SIGHUP"):
                continue
            if signal.getsignal(number) != signal.SIG_IGN:      # nohup ignores SIGHUP
                before = signal.signal(number, receive)
                restore.callback(signal.signal, number, before)
        yield received


def say(text: str) -> None:
    """Prints, on process 0, if standard output is still open: a closed one ends no training."""
    if RANK != 0:
        return
    try:
        print(printable(text), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def require_finite(step: int, cfg: TrainConfig, **values: float) -> None:
    """Ends the run before the checkpoint is spoilt; every process has the same values."""
    if not all(map(math.isfinite, values.values())):
        message = (f"train.py: step {step}: {values}. {cfg.out_dir}/ckpt.pt holds the last good "
                   "state; a new run with a lower --learning_rate may help")
        raise SystemExit(message if RANK == 0 else 1)


# --------------------------------------------------------------------------------------------------
# evaluation, checkpoint, log

@contextlib.contextmanager
def count_choices(model: GPT) -> Iterator[dict[nn.Module, Tensor]]:
    """Within it every router counts its choices; yields the counts (R,) of each, in order."""
    counts = defaultdict(int)
    with contextlib.ExitStack() as hooks:
        for block in model.blocks:
            if not isinstance(block.ffn, SparselyGatedLinear):
                continue

            def add(router, args, output, ffn=block.ffn):
                _, ids = output                                         # (N, C, k)
                R = ffn.w_in.numel() // ffn.w_in.shape[-1]              # neurons of all pools
                counts[router] += ffn.rows(ids).flatten().bincount(minlength=R)
            hooks.enter_context(block.ffn.router.register_forward_hook(add))
        yield counts


def usage(counts: Tensor) -> tuple[float, float]:
    """Of the counts of all neurons: the share that is chosen at all, and the Gini coefficient.

    0 says that all are chosen equally often, 1 that one neuron has all choices.
    """
    load = counts.double().sort().values                # ascending
    n = len(load)
    rank = torch.arange(1, n + 1, dtype=load.dtype, device=load.device)
    gini = ((2 * rank - n - 1) * load).sum() / (n * load.sum())
    return (load > 0).double().mean().item(), gini.item()


@torch.no_grad()
def induction(model: GPT, autocast: contextlib.AbstractContextManager) -> float:
    """The prefix-matching score of the best head, between 0 and 1 (Olsson et al., 2209.11895).

    On random tokens that are repeated once, the attention that a token of the repeat pays to the
    one after its first occurrence, on average. A head with a high score can copy: what followed a
    word the last time, it expects again. The loss falls steeply when the first such head forms.
    """
    n = min(64, model.cfg.block_size // 2)
    if n == 0:
        return 0.0          # no room for a repeat
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.vocab_size, (8, n), generator=generator)
    tokens = torch.cat((tokens, tokens), dim=1).to(model.rope.device)      # (8, 2n)

    recorded = []           # of each layer its queries and its keys, before rotation
    with contextlib.ExitStack() as hooks, autocast:
        for block in model.blocks:
            for norm in (block.attn.q_norm, block.attn.k_norm):
                hook = norm.register_forward_hook(lambda _, args, output: recorded.append(output))
                hooks.enter_context(hook)
        model(tokens)

    best = 0.0
    t = torch.arange(n)     # places of the first occurrences
    rope = model.rope[:, :2 * n]
    for q, k in zip(recorded[::2], recorded[1::2]):                        # (8, H, 2n, Dh) each
        q = rotate(q.float(), rope)
        k = rotate(k.float(), rope)
        logits = q @ k.transpose(2, 3) / model.cfg.d_head ** 0.5           # (8, H, 2n, 2n)
        future = torch.ones_like(logits, dtype=torch.bool).triu(1)
        pattern = logits.masked_fill(future, -math.inf).softmax(dim=3)
        of_heads = pattern[:, :, n + t, t + 1].mean(dim=(0, 2))            # (H,)
        best = max(best, of_heads.max().item())
    return best


@torch.no_grad()
def evaluate(model: GPT, data: Data, cfg: TrainConfig,
             autocast: contextlib.AbstractContextManager) -> dict:
    """Validation loss in nats per token and bits per byte, induction, and how the routers chose.

    Every process does all of it: a sharded model needs them all in each forward pass, and it is
    little beside training.
    """
    windows = data.windows("val", data.val_starts(cfg.eval_sequences))
    total = torch.zeros((), dtype=torch.float64, device=model.rope.device)
    with count_choices(model) as counts:
        for part in windows.split(micro_batch(cfg)):
            part = part.to(total.device)
            with autocast:
                _, loss = model(part[:, :-1], part[:, 1:])
            total += loss.double() * len(part)
    val_loss = total.item() / len(windows)
    bits = val_loss / math.log(2) * data.meta["val_tokens"] / data.meta["val_bytes"]
    result = dict(val_loss=val_loss, val_bits_per_byte=bits,
                  induction=round(induction(model, autocast), 5))
    if counts:
        shares = [usage(count) for count in counts.values()]
        result["used"] = [round(used, 5) for used, _ in shares]
        result["gini"] = [round(gini, 5) for _, gini in shares]
    return result


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)     # whole tensors, on process 0


def save(model: GPT, optimizer: torch.optim.Optimizer, cfg: TrainConfig, data: Data,
         progress: dict) -> None:
    """Writes the checkpoint: the same file for any number of processes, sharded or not.

    Every process must call it, and process 0 writes. progress: step, seconds and loss.
    """
    model_state = get_model_state_dict(model, options=FULL)
    optimizer_state = {}
    if optimizer.state:     # before the first step there is none, and the call below would make one
        optimizer_state = get_optimizer_state_dict(model, optimizer, options=FULL)
    if RANK == 0:
        save_checkpoint(Path(cfg.out_dir, "ckpt.pt"), dict(
            model=model_state, optimizer=optimizer_state, **progress,
            config=dataclasses.asdict(cfg), data=data.meta, tokenizer=data.tokenizer))


def append_log(cfg: TrainConfig, **entry) -> None:
    if RANK == 0:
        with open(Path(cfg.out_dir, "log.jsonl"), "a") as file:
            file.write(json.dumps(entry) + "\n")


def start_log(cfg: TrainConfig, data: Data, saved: dict | None) -> None:
    """A new log begins with the settings; a resumed one loses what came after the checkpoint."""
    path = Path(cfg.out_dir, "log.jsonl")
    kept = []
    if saved and path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):     # a kill can cut the last line short
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("step", 0) <= saved["step"]:
                    kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
    about = dict(config=dataclasses.asdict(cfg), data=data.meta,
                 versions=dict(torch=torch.__version__, python=platform.python_version(),
                               machine=describe_device(cfg.device)), commit=git_commit())
    if saved:
        append_log(cfg, event="resume", step=saved["step"], **about)
    else:
        Path(cfg.out_dir, "ckpt.pt").unlink(missing_ok=True)
        append_log(cfg, event="config", **about)


def describe_device(device: str) -> str:
    if device == "cuda":
        text = f"cuda: {torch.cuda.get_device_name()}"
    else:
        text = f"cpu: {torch.get_num_threads()} threads"
    return f"{text}, {WORLD} processes" if WORLD > 1 else text


def git_commit() -> str | None:
    """The git commit of this code, with -dirty if it was changed since; None outside of git."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty",
               "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def log_evaluation(result: dict, progress: dict, cfg: TrainConfig, model: GPT) -> None:
    step = progress["step"]
    append_log(cfg, event="eval", step=step, tokens=step * cfg.batch_size * cfg.block_size,
               flops=step * step_flops(model, cfg), seconds=round(progress["seconds"], 3),
               train_loss=progress["loss"], **result)
    say(f"step {step:6}/{cfg.steps} | validation loss {result['val_loss']:.4f} | "
        f"{result['val_bits_per_byte']:.4f} bits per byte | induction {result['induction']:.2f}")


def log_step(progress: dict, lr: float, norm: float, elapsed: float, peak_flops: float,
             cfg: TrainConfig, model: GPT) -> None:
    """One line about the step that took `elapsed` seconds.

    MFU: the share of the peak FLOP/s by the paper's count, which leaves out the unembedding.
    """
    step = progress["step"]
    tokens = cfg.batch_size * cfg.block_size
    eta = timedelta(seconds=round(elapsed * (cfg.steps - step)))
    append_log(cfg, event="step", step=step, seconds=round(progress["seconds"], 3),
               loss=progress["loss"], lr=lr, norm=norm)
    say(f"step {step:6}/{cfg.steps} | loss {progress['loss']:.4f} | lr {lr:.2e} | "
        f"norm {norm:.3f} | {1e3 * elapsed:.0f} ms | {tokens / elapsed:,.0f} tok/s | "
        f"mfu {step_flops(model, cfg) / elapsed / peak_flops:.1%} | eta {eta}")


def report(model: GPT, data: Data, cfg: TrainConfig, given: dict) -> None:
    """Prints what is about to run."""
    total, active = model.num_params()
    tokens = cfg.batch_size * cfg.block_size
    flops = step_flops(model, cfg)
    passes = cfg.steps * cfg.batch_size / data.n_windows
    say(f"device   {describe_device(cfg.device)}, {str(choose_dtype(cfg))[6:]}")
    say(f"model    {cfg.ffn}, {cfg.n_layer} layers, d_model {cfg.d_model}: {total:,} parameters, "
        f"{active:,} active per token; training takes {flops / tokens / 1e6:.1f} MFLOP per token")
    say(f"data     {cfg.data_dir}: {data.meta['train_tokens']:,} tokens, vocabulary "
        f"{cfg.vocab_size}")
    say(f"plan     {cfg.steps} steps of {tokens:,} tokens, {micro_batch(cfg)} sequences at a time: "
        f"{cfg.steps * tokens / 1e6:.1f} M tokens, {passes:.2f} passes over the data, "
        f"{cfg.steps * flops:.3g} FLOP")
    if passes > 4:
        say("note     so many passes overfit: take fewer --steps, or more data "
            "(prepare_data.py --help)")
    for name in idle_settings(given, cfg.ffn):
        say(f"note     --{name} changes nothing with ffn={cfg.ffn}")


def print_end(model: GPT, data: Data, cfg: TrainConfig, seconds: float) -> None:
    """Prints a sample and what to do next. All processes call it, for a sharded model needs all."""
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    text = "".join(stream(model, data.encoding, "", 120, temperature=0.8, top_p=0.95,
                          generator=generator))
    line = "-" * 60
    say(f"trained for {timedelta(seconds=round(seconds))}. A sample:\n{line}\n{text}\n{line}")
    out_dir = out_dir_option(cfg)
    analysis = f"curves {shlex.quote(cfg.out_dir)}"
    ablation = cfg.softmax_gates or cfg.shared_pool or cfg.activation != "identity"
    if cfg.ffn == "sgatlin" and not ablation:
        analysis = f"report {out_dir}"      # it has circuits
    say(f"next:  python sample.py {out_dir}\n"
        f"       python analyze.py {analysis}\n"
        f"       {resume_command(cfg)} --steps={2 * cfg.steps}")


# --------------------------------------------------------------------------------------------------
# main

def set_up(given: dict) -> tuple[TrainConfig, dict | None, Data]:
    """The settings, the checkpoint to resume, and the data. What can fail at once comes first."""
    cfg, saved = load_settings(given)
    if RANK == 0:
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.out_dir).close()         # raises OSError if it is read-only
    with torch.device("meta"):
        GPT(cfg)            # n_experts that is no square raises here, before data is prepared
    if saved is None and cfg.flops:
        cfg = dataclasses.replace(cfg, steps=steps_for(cfg.flops, cfg))
    data = open_data(cfg, saved)
    if saved is None and "vocab_size" not in given:
        cfg = dataclasses.replace(cfg, vocab_size=data.meta["vocab_size"])
    if cfg.vocab_size < data.meta["vocab_size"]:
        raise SystemExit(f"train.py: --vocab_size={cfg.vocab_size} is less than the "
                         f"{data.meta['vocab_size']} of {cfg.data_dir}")
    return cfg, saved, data


def build_model(cfg: TrainConfig, saved: dict | None) -> tuple[GPT, torch.optim.Optimizer]:
    """The model and its optimizer, new or as in the checkpoint, sharded if the settings say so."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg)
    if saved:
        model.load_state_dict(saved["model"])
    if cfg.shard:
        shard(model, cfg.device)    # first, for the whole model may not fit on one device
    model.to(cfg.device)
    optimizer = make_optimizer(model, cfg)
    if saved and saved["optimizer"]:        # there is none before the first step
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=FULL)
    return model, optimizer


def load_batch(data: Data, step: int, cfg: TrainConfig) -> tuple[Tensor, ...]:
    """This process's part of a step's batch, in micro-batches of windows (B, T + 1)."""
    mine = data.train_starts(step, cfg.batch_size).reshape(WORLD, -1)[RANK]
    windows = data.windows("train", mine)                       # (B, T + 1)
    if cfg.device == "cuda":
        windows = windows.pin_memory()      # the copy then runs beside the GPU's work
    windows = windows.to(cfg.device, non_blocking=True)
    return windows.split(micro_batch(cfg))


def read_numbers(loss: Tensor, norm: Tensor, stop: bool) -> tuple[float, float, bool]:
    """The loss of all processes, the norm, and whether any has to stop: the step's one wait."""
    numbers = torch.stack((loss, norm, torch.full_like(loss, float(stop)))) / WORLD
    if LAUNCHED:
        dist.all_reduce(numbers)
    loss, norm, stops = numbers.tolist()
    return loss, norm, stops > 0


def forward_backward(wrapped: nn.Module, batch: tuple[Tensor, ...], cfg: TrainConfig,
                     autocast: contextlib.AbstractContextManager) -> Tensor:
    """Adds up the gradients of a batch, one micro-batch at a time; returns its mean loss."""
    loss = torch.zeros((), device=batch[0].device)
    for i, part in enumerate(batch):
        # DDP sends gradients with the last micro-batch; others ignore this attribute.
        wrapped.require_backward_grad_sync = i == len(batch) - 1
        with autocast:
            _, mean = wrapped(part[:, :-1], part[:, 1:])
        # The share of this process's sequences: DDP averages over processes.
        share = mean * (len(part) * WORLD / cfg.batch_size)
        share.backward()
        loss += share.detach()
    return loss


def train(given: dict) -> None:
    cfg, saved, data = set_up(given)
    model, optimizer = build_model(cfg, saved)
    dtype = choose_dtype(cfg)
    autocast = torch.autocast(cfg.device, dtype, enabled=dtype != torch.float32)
    wrapped = wrap(model, cfg)
    peak_flops = matmul_flops(cfg.device, dtype) * WORLD
    report(model, data, cfg, given)
    if RANK == 0:
        start_log(cfg, data, saved)
    # seconds are those of the steps alone; loss is that of the last step
    progress = dict(step=0, seconds=0.0, loss=None)
    resumed_at = None
    if saved:
        progress = {name: saved[name] for name in progress}
        resumed_at = saved["step"]          # where nothing is to be evaluated again
    saved = None        # its tensors would stay in memory

    step = progress["step"]
    batch = load_batch(data, step, cfg)
    with stop_signals() as received:
        stop = False
        while True:
            # Evaluate when it is due, and save then and before a stop.
            due = (step % cfg.eval_interval == 0 or step >= cfg.steps) and step != resumed_at
            if due:
                result = evaluate(model, data, cfg, autocast)
                require_finite(step, cfg, validation_loss=result["val_loss"])
                # Log first: a kill may leave the log ahead, not behind.
                log_evaluation(result, progress, cfg, model)
            if due or stop:
                save(model, optimizer, cfg, data, progress)
            if stop or step >= cfg.steps:
                break

            # Forward, backward, clip and step.
            began = time.perf_counter()
            loss = forward_backward(wrapped, batch, cfg, autocast)
            lr = schedule(step, cfg)
            set_learning_rate(optimizer, lr)
            norm = clip_gradients(model, cfg)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # Read the numbers of the step while the next batch is on its way.
            step += 1
            batch = load_batch(data, step, cfg)
            loss, norm, stop = read_numbers(loss, norm, bool(received))
            require_finite(step, cfg, loss=loss, gradient_norm=norm)
            elapsed = time.perf_counter() - began
            progress = dict(step=step, seconds=progress["seconds"] + elapsed, loss=loss)
            if step % cfg.log_interval == 0 or step == cfg.steps:
                log_step(progress, lr, norm, elapsed, peak_flops, cfg, model)

    del wrapped     # before the process group: if DDP is its last owner, gloo can hang at exit
    if step < cfg.steps:
        say(f"stopped and saved at step {step}; to continue: {resume_command(cfg)}")
        raise SystemExit(130)
    print_end(model, data, cfg, progress["seconds"])


def main(argv: list[str] | None = None) -> None:
    given = parse_args(argv)
    plain_output()
    keep_memory()
    # AdamW's moments of neurons that are not chosen become denormal numbers, slow on a CPU.
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")      # TF32 where a GPU multiplies float32
    device = given.get("device", TrainConfig.device)
    if device == "cuda":
        sum_in_fixed_order()
    with processes(device):
        train(given)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:           # while data is prepared; the loop saves and stops
        raise SystemExit(130) from None
