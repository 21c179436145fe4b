"""Train a GPT on a folder made by prepare_data.py (made here, if it is the default one and not there).

    python train.py                                    # a laptop or one GPU; --help lists every setting
    python train.py --ffn=swiglu --scale=2 --flops=1e15   # a model of the paper's ladder, a budget of compute
    torchrun --nproc_per_node=8 train.py               # eight GPUs; on CPUs add --device=cpu
    torchrun --nproc_per_node=8 train.py --zero        # each with its share of the optimizer's state
    python train.py --resume                           # continue after Ctrl-C, a kill or a crash

Writes to out_dir: ckpt.pt (the model, the optimizer, the step, the settings, the tokenizer) and log.jsonl
(the settings, then one object per logged step, evaluation and resumption).

The batch of step s is a function of (seed, s) alone: it does not depend on the number of processes, on how
the batch is cut into micro-batches, on evaluations or on interruptions.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import kernels
import prepare_data
from model import FFN, GPT, GPTConfig, load_checkpoint, save_checkpoint
from sample import stream


@dataclass
class TrainConfig(GPTConfig):
    vocab_size: int = 8192          # rows of the embedding; unless given, as many as the tokenizer has
    scale: int = 0                  # 1, 2, ...: take the sizes that are not given from the paper's ladder
    data_dir: str = "data/python"   # folder made by prepare_data.py
    out_dir: str = "out"            # folder for the checkpoint and the log
    resume: bool = False            # continue the run in out_dir
    overwrite: bool = False         # start anew although there is a run in out_dir
    steps: int = 2000               # optimizer steps
    flops: float = 0.0              # compute to spend, counted as in the paper: sets steps; 0: off
    batch_size: int = 256           # sequences per optimizer step, over all processes
    micro_batch_size: int = 32      # sequences per process at a time; lower it when memory runs out
    learning_rate: float = 1e-3     # the highest of the schedule (AdamW, betas 0.9 and 0.999)
    weight_decay: float = 0.1       # of tensors of more than one dimension
    warmup_steps: int = 100         # of linear rise from 0
    decay_fraction: float = 0.2     # share of the steps, at the end, over which the rate falls as 1 - sqrt
    grad_clip: float = 2.0          # bound on the norm of the gradient; 0: off
    eval_interval: int = 200        # steps between evaluations; each saves a checkpoint
    eval_sequences: int = 128       # validation windows per evaluation, always the same ones
    log_interval: int = 10          # steps between log lines
    seed: int = 1337                # of the initialisation and of the order of the data
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls; auto: bfloat16 on GPUs
    compile: bool = True            # run the model through torch.compile
    zero: bool = False              # shard AdamW's state, by whole tensors, over the processes of torchrun

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "batch_size", "micro_batch_size", "eval_interval", "eval_sequences",
                     "log_interval", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        for name in ("scale", "flops", "weight_decay", "warmup_steps", "grad_clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more, and finite")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} must be less than 2**63")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} must lie between 0 and 1")


# The defaults above are the gpu preset: the model, optimizer and schedule of the paper's TinyStories study.
CPU_PRESET = dict(block_size=256, d_model=128, batch_size=8, micro_batch_size=8, steps=1100, warmup_steps=50,
                  learning_rate=6e-3, eval_interval=100, eval_sequences=64, compile=False)
RESUMABLE = {"data_dir", "out_dir", "resume", "overwrite", "steps", "micro_batch_size", "eval_interval",
             "log_interval", "device", "dtype", "compile", "zero"}  # may change in a resumed run


# -----------------------------------------------------------------------------------------------------------
# settings

def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, dict]:
    """The parser, and the settings that the command line gives."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"train.py: {message} (--help lists the settings)\n")
    comments = {}
    for cls in (GPTConfig, TrainConfig):
        comments |= dict(re.findall(r"^    (\w+): .*?  # ?(.*)$", inspect.getsource(cls), re.M))
    for field in dataclasses.fields(TrainConfig):
        text = f"{comments[field.name]} (default: {field.default}"
        text += f"; on a CPU: {CPU_PRESET[field.name]})" if field.name in CPU_PRESET else ")"
        kind = dict(type=field.type)
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif choices := typing.get_args(field.type):
            kind = dict(choices=choices)
        parser.add_argument(f"--{field.name}", help=text.replace("%", "%%"), **kind)
    return parser, vars(parser.parse_args(argv))


def make_config(given: dict, device: str) -> TrainConfig:
    """The preset of the device, under the ladder's sizes if a scale is given, under the settings given."""
    if given.get("resume") and given.get("overwrite"):
        raise ValueError("--resume continues the run in out_dir, --overwrite drops it: give one")
    if "steps" in given and given.get("flops"):
        raise ValueError(f"--steps={given['steps']} and --flops={given['flops']:g} both set the steps: "
                         "give one")
    preset = CPU_PRESET if device == "cpu" else {}
    ladder = {}
    if given.get("scale"):
        ladder = dataclasses.asdict(GPTConfig.ladder(given.get("ffn", GPTConfig.ffn), given["scale"]))
        ladder = {name: ladder[name] for name in ("d_model", "d_head", "n_layer", "d_ff", "n_experts",
                                                  "n_channels", "top_k", "d_key")}
    return TrainConfig(**(preset | ladder | given))


def idle_settings(given: dict, ffn: str) -> list[str]:
    """Of the settings given, those of other feedforward layers, which change nothing in this one."""
    used = getattr(FFN[ffn], "settings", given)
    others = set().union(*(getattr(layer, "settings", ()) for layer in FFN.values()))
    return [name for name in given if name in others and name not in used]


def resume_config(given: dict, saved: dict) -> TrainConfig:
    """The settings of the checkpoint with those given that may change. Raises ValueError for the others."""
    saved = {name: value for name, value in saved.items() if name in TrainConfig.__dataclass_fields__}
    saved = dataclasses.asdict(TrainConfig()) | saved   # a setting newer than the checkpoint has its default
    for name, value in given.items():
        if name not in RESUMABLE and value != saved[name]:
            raise ValueError(f"--{name}={value} contradicts the checkpoint, which has {saved[name]}: drop "
                             "it, or train anew with another --out_dir")
    return TrainConfig(**(saved | given))


# -----------------------------------------------------------------------------------------------------------
# processes, data, schedule

class Processes:
    """The processes of this run (one, or those torchrun started) and this one's place among them."""

    def __init__(self, device: str):
        self.rank, self.world, self.device = 0, 1, torch.device(device)
        launched = dist.is_torchelastic_launched()      # by torchrun: nothing else in the environment counts
        if device == "cuda":
            self.device = torch.device(device, dist.get_node_local_rank() if launched else 0)
            torch.cuda.set_device(self.device)
        if launched:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
            self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def sum(self, *values: float | Tensor) -> list[float]:
        """The sum of each value over the processes, in float64."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.tolist()

    def stop(self, message: str) -> typing.NoReturn:
        """Ends the run with one message. All processes must call it."""
        raise SystemExit(message if self.rank == 0 else 1)

    def print(self, *text: str) -> None:
        if self.rank == 0:
            print(*text, flush=True)


class Data:
    """The tokens of a folder made by prepare_data.py. Raises ValueError if it is not whole or too short."""

    def __init__(self, cfg: TrainConfig):
        self.folder, self.cfg = Path(cfg.data_dir), cfg
        remedy = f"python prepare_data.py --help tells how to make {cfg.data_dir}"
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            ranks, pat_str = (self.folder / "tokenizer.tiktoken").read_text(), self.meta["pat_str"]
            self.tokenizer = dict(ranks=ranks, pat_str=pat_str)
            self.encoding = prepare_data.load_tokenizer(ranks, pat_str)
            # kept open: prepare_data.py may replace them by others during the run
            self.files = {part: open(self.folder / f"{part}.bin", "rb") for part in ("train", "val")}
            sizes = {part: (os.fstat(file.fileno()).st_size, self.meta[f"{part}_tokens"])
                     for part, file in self.files.items()}
            item = np.dtype(self.meta["dtype"]).itemsize
            if (self.encoding.n_vocab != self.meta["vocab_size"]
                    or {"fingerprint", "val_bytes"} - self.meta.keys()):
                raise KeyError
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} is missing: {remedy}") from None
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"meta.json and tokenizer.tiktoken in {cfg.data_dir} are not, or not both, "
                             f"what prepare_data.py made: {remedy}") from None
        for part, (size, tokens) in sizes.items():
            if size != tokens * item:
                raise ValueError(f"{self.folder / part}.bin has {size} bytes, not the {tokens * item} of "
                                 "meta.json: prepare it again")
            if tokens < 2 * cfg.block_size + 1:
                raise ValueError(f"{self.folder / part}.bin has {tokens} tokens: too few for "
                                 f"--block_size={cfg.block_size}, which needs {2 * cfg.block_size + 1}")

    def windows(self, part: str, starts: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (len(starts), T) int64 each, of the windows that begin at these tokens."""
        # mapped anew each time: a long-lived map would count all the pages it has touched as memory in use
        tokens = np.memmap(self.files[part], dtype=self.meta["dtype"], mode="r")
        rows = np.stack([tokens[s:s + self.cfg.block_size + 1] for s in starts]).astype(np.int64)
        if rows.max() >= self.cfg.vocab_size:
            raise ValueError(f"{self.folder / part}.bin holds token {rows.max()}, beyond "
                             f"vocab_size={self.cfg.vocab_size}: prepare it again")
        rows = torch.from_numpy(rows).to(device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def n_windows(self) -> int:
        """Windows in one pass over the training tokens; room is left to shift them."""
        return (self.meta["train_tokens"] - self.cfg.block_size - 1) // self.cfg.block_size

    @functools.lru_cache(maxsize=2)
    def order(self, epoch: int) -> np.ndarray:
        """The first tokens of the windows of a pass: shuffled, and shifted by a random part of a window."""
        rng = np.random.default_rng((self.cfg.seed, epoch))
        return rng.permutation(self.n_windows()) * self.cfg.block_size + rng.integers(self.cfg.block_size)

    def train_batch(self, step: int) -> np.ndarray:
        """The first tokens of the windows of the global batch of a step, (batch_size,)."""
        n, first = self.n_windows(), step * self.cfg.batch_size
        return np.array([self.order(i // n)[i % n] for i in range(first, first + self.cfg.batch_size)])

    def val_batch(self) -> np.ndarray:
        """The first tokens of the validation windows: evenly spaced, as many as fit without overlap."""
        room = self.meta["val_tokens"] - self.cfg.block_size - 1
        count = min(self.cfg.eval_sequences, room // self.cfg.block_size + 1)
        return np.arange(count) * (room // max(count - 1, 1))


def schedule(step: int, cfg: TrainConfig) -> float:
    """Learning rate of a step, the first being 0: linear warm-up, constant, and at the end 1 - sqrt to 0."""
    rise = min(1.0, step / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    decay_steps = int(cfg.decay_fraction * cfg.steps)
    t = step - (cfg.steps - decay_steps)
    fall = 1 - math.sqrt(min(1.0, t / decay_steps)) if t > 0 else 1.0
    return cfg.learning_rate * rise * fall


class ShardedAdamW(ZeroRedundancyOptimizer):
    """AdamW; each process keeps the moments of its share of the tensors (ZeRO stage 1, arXiv 1910.02054).

    Its checkpoints are AdamW's and serve any number of processes, sharded or not. Those of the base class are
    not used: they travel byte by byte (100 s per GB), and load to the CPU the steps that fused AdamW needs on
    its GPU.
    """

    def __init__(self, groups: list[dict], **settings):
        super().__init__(groups, torch.optim.AdamW, **settings)
        self.order = [p for group in groups for p in group["params"]]

    def state_dict(self) -> dict:
        """AdamW's, with all of the state on process 0 (on the CPU) and none on others. All must call it."""
        state = {}
        for i, p in enumerate(self.order):
            mine = self.optim.state.get(p)
            for name, shape in (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape)):
                value = mine[name].to(p.device, copy=True) if mine else p.new_zeros(shape)
                dist.reduce(value, 0)       # one process has it, or none before the first step
                if self.rank == 0:
                    state.setdefault(i, {})[name] = value.cpu()
        return torch.optim.Optimizer.state_dict(self) | dict(state=state)

    def load_state_dict(self, whole: dict) -> None:
        place = {p: i for i, p in enumerate(self.order)}
        mine = [place[p] for group in self.optim.param_groups for p in group["params"]]
        state = {i: whole["state"][j] for i, j in enumerate(mine) if j in whole["state"]}
        self.optim.load_state_dict(self.optim.state_dict() | dict(state=state))


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=decay, weight_decay=cfg.weight_decay), dict(params=rest, weight_decay=0.0)]
    AdamW = ShardedAdamW if cfg.zero else torch.optim.AdamW
    return AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


# -----------------------------------------------------------------------------------------------------------
# the run

def choose(cfg: TrainConfig, device: torch.device) -> tuple[torch.dtype, bool, list[str]]:
    """The dtype of the matmuls, whether to compile, and the lines that say what runs and why."""
    cuda = device.type == "cuda"
    has_bf16 = cuda and torch.cuda.get_device_capability(device) >= (8, 0)      # older ones emulate it
    dtype, why = torch.float32, "bfloat16 pays on GPUs that have it"
    if has_bf16:
        dtype, why = torch.bfloat16, "the GPU has it"
    if cfg.dtype != "auto":
        dtype, why = getattr(torch, cfg.dtype), f"--dtype={cfg.dtype}"
    compiled, reason = cfg.compile, "--compile" if cfg.compile else "--no-compile"
    if cuda and importlib.util.find_spec("triton") is None:
        compiled, reason = False, "it needs triton"
    elif not cuda and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        compiled, reason = False, "it needs a C++ compiler"
    kernel, kernel_reason = kernels.backend(device.type)
    where = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    return dtype, compiled, [f"device   {device.type}: {where}", f"dtype    {str(dtype)[6:]}: {why}",
                             f"kernels  {kernel}: {kernel_reason}",
                             f"compile  {'on' if compiled else 'off'}: {reason}"]


def keep_memory() -> None:
    """Makes glibc keep freed memory: by default it returns large tensors and faults their pages in anew."""
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold, trim_threshold = -3, -1
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


class Run:
    """A model in training: what a step, an evaluation and a checkpoint need."""

    def __init__(self, cfg: TrainConfig, processes: Processes, data: Data, saved: dict | None):
        self.cfg, self.processes, self.data = cfg, processes, data
        device = processes.device
        dtype, compiled, self.setup = choose(cfg, device)
        self.autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        torch.manual_seed(cfg.seed)
        self.model = GPT(cfg).to(device)
        self.optimizer = make_optimizer(self.model, cfg)
        self.step, self.seconds, self.loss = 0, 0.0, None
        if saved:
            try:
                self.model.load_state_dict(saved["model"])
            except RuntimeError:
                raise ValueError(f"the checkpoint in {cfg.out_dir} holds another model than model.py makes "
                                 "of its settings") from None
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds, self.loss = (saved[name] for name in ("step", "seconds", "loss"))
            if self.step > cfg.steps:
                raise ValueError(f"--steps={cfg.steps}: the run in {cfg.out_dir} is already at {self.step}")
        elif cfg.flops:
            cfg.steps = int(cfg.flops // self.flops_per_step())
            if not cfg.steps:
                raise ValueError(f"--flops={cfg.flops:g} buys no step: one costs "
                                 f"{self.flops_per_step():.3g}")
        # The raw model is what is saved and sampled; the wrapped one shares its parameters.
        self.wrapped = torch.compile(self.model) if compiled else self.model
        if dist.is_initialized():
            self.wrapped = DistributedDataParallel(self.wrapped, gradient_as_bucket_view=True)
        self.path, self.log = Path(cfg.out_dir, "ckpt.pt"), Path(cfg.out_dir, "log.jsonl")

    def flops_per_step(self) -> int:
        """Of training, as the paper counts: three times the forward FLOPs of the batch."""
        return 3 * self.model.flops_per_sequence() * self.cfg.batch_size

    def backward(self, starts: np.ndarray) -> float | Tensor:
        """Adds up the gradient of the mean loss over these windows in micro-batches; returns the loss."""
        total = 0.0
        micro = self.cfg.micro_batch_size
        for i in range(0, len(starts), micro):
            x, y = self.data.windows("train", starts[i:i + micro], self.processes.device)
            last = i + micro >= len(starts)
            sync = contextlib.nullcontext() if last or not dist.is_initialized() else self.wrapped.no_sync()
            with sync:
                with self.autocast():
                    _, loss = self.wrapped(x, y)
                loss = loss * (len(x) / len(starts))
                loss.backward()
            total += loss.detach()
        return total

    def train_step(self, stop: bool) -> tuple[float, float, bool]:
        """One optimizer step. Returns the loss over all processes, the gradient norm before clipping, and
        whether any process was told to stop. Raises SystemExit if the loss or the norm is not finite."""
        cfg, world = self.cfg, self.processes.world
        lr = schedule(self.step, cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        mine = self.data.train_batch(self.step).reshape(world, -1)[self.processes.rank]
        loss = self.backward(mine)
        total_norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        loss, norm, stop = self.processes.sum(loss / world, total_norm / world, stop)
        if not math.isfinite(loss + norm):
            self.processes.stop(f"step {self.step}: the loss is {loss}, the gradient norm {norm}. "
                                f"{self.path} holds the last good state; a lower --learning_rate may help")
        if cfg.grad_clip and norm > cfg.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), cfg.grad_clip, total_norm)
        self.optimizer.step()
        self.step, self.loss = self.step + 1, loss
        return loss, norm, stop > 0

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean validation loss in nats per token, over all processes."""
        starts = self.data.val_batch()
        mine = starts[self.processes.rank::self.processes.world]
        total = 0.0
        micro = self.cfg.micro_batch_size
        for i in range(0, len(mine), micro):
            x, y = self.data.windows("val", mine[i:i + micro], self.processes.device)
            with self.autocast():
                total += self.model(x, y)[1].double() * len(x)
        return self.processes.sum(total)[0] / len(starts)

    def save(self) -> None:
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step,
                     seconds=self.seconds, loss=self.loss, config=dataclasses.asdict(self.cfg),
                     data=self.data.meta, tokenizer=self.data.tokenizer)
        if self.processes.rank:
            return
        try:
            save_checkpoint(self.path, state)
        except RuntimeError as error:   # what torch.save makes of a full disk
            raise OSError(f"cannot write {self.path}, is the disk full? ({error})") from None

    def write_log(self, **entry: float) -> None:
        if self.processes.rank == 0:
            with open(self.log, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def report(self) -> None:
        """Prints what is about to run, and how long it will take, measured on one micro-batch."""
        cfg, out = self.cfg, self.processes.print
        total, active = self.model.num_params()
        tokens = cfg.batch_size * cfg.block_size
        passes = cfg.steps * cfg.batch_size / self.data.n_windows()
        starts = self.data.train_batch(0)[:min(cfg.micro_batch_size, cfg.batch_size // self.processes.world)]
        for _ in range(2):      # the first is slower: it compiles, and finds memory
            start = time.perf_counter()
            self.processes.sum(self.backward(starts))
        share = cfg.batch_size / self.processes.world / len(starts)
        expected = (cfg.steps - self.step) * (time.perf_counter() - start) * share
        self.optimizer.zero_grad(set_to_none=True)
        out("\n".join(self.setup))
        out(f"model    {cfg.ffn}, {cfg.n_layer} layers, d_model {cfg.d_model}: {total:,} parameters, "
            f"{active:,} active per token; training takes {self.flops_per_step() / tokens / 1e6:.1f} MFLOP "
            "per token")
        out(f"data     {cfg.data_dir}: {self.data.meta['train_tokens']:,} tokens, "
            f"vocabulary {cfg.vocab_size}")
        out(f"plan     {cfg.steps} steps of {tokens:,} tokens on {self.processes.world} process(es): "
            f"{cfg.steps * tokens / 1e6:.1f} M tokens, {passes:.2f} passes over the data, "
            f"{cfg.steps * self.flops_per_step():.3g} FLOP; about {clock(expected)}")
        if passes > 4:
            out("note     so many passes overfit: take fewer --steps, or more data (prepare_data.py --help)")

    def checkpoint(self) -> None:
        """Evaluates, logs, then saves: the log of a killed run may be ahead of its checkpoint, not behind."""
        cfg, meta = self.cfg, self.data.meta
        val_loss = self.evaluate()
        if not math.isfinite(val_loss):
            self.processes.stop(f"step {self.step}: the validation loss is {val_loss}; {self.path} holds "
                                "the last good state")
        tokens = self.step * cfg.batch_size * cfg.block_size
        bits = val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
        self.write_log(event="eval", step=self.step, tokens=tokens, flops=self.step * self.flops_per_step(),
                       seconds=round(self.seconds, 3), train_loss=self.loss,
                       val_loss=val_loss, val_bits_per_byte=bits)
        self.save()
        self.processes.print(f"step {self.step:6}/{cfg.steps} | validation loss {val_loss:.4f} | "
                             f"{bits:.4f} bits per byte | saved {self.path}")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


# -----------------------------------------------------------------------------------------------------------
# from the command line to the end of the run

def start_log(run: Run, resumed: bool) -> None:
    """A new log begins with the settings; a resumed one loses what came after the checkpoint."""
    if run.processes.rank:
        return
    run.log.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    if resumed:
        for line in run.log.read_text().splitlines() if run.log.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):     # a kill can cut the last line short
                if json.loads(line).get("step", 0) <= run.step:
                    lines.append(line + "\n")
    else:
        run.path.unlink(missing_ok=True)
    partial = run.log.with_name("log.jsonl.partial")
    partial.write_text("".join(lines))
    os.replace(partial, run.log)
    entry = (dict(event="resume", step=run.step) if resumed else
             dict(event="config", config=dataclasses.asdict(run.cfg), data=run.data.meta))
    run.write_log(**entry, versions=dict(torch=torch.__version__, python=platform.python_version(),
                                         machine=run.setup[0].removeprefix("device").strip(),
                                         processes=run.processes.world))


@contextlib.contextmanager
def signals_noted() -> typing.Iterator[list[int]]:
    """Within it SIGINT, SIGTERM and SIGHUP (a closed terminal) stop nothing: they are added to the list."""
    told = []
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}    # Windows has no SIGHUP
    before = {number: signal.signal(number, lambda number, _: told.append(number))
              for number in numbers if signal.getsignal(number) != signal.SIG_IGN}  # nohup ignores SIGHUP
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(run: Run, resumed: bool, told: list[int]) -> bool:
    """Runs to cfg.steps, or until a process was told to stop. Returns whether it got there."""
    cfg = run.cfg
    fresh, stop, pace = not resumed, False, None
    while True:
        at_end = run.step >= cfg.steps
        if fresh and (at_end or run.step % cfg.eval_interval == 0):
            run.checkpoint()
        elif stop:
            run.save()
        if at_end or stop:
            return at_end
        begin = time.perf_counter()
        lr = schedule(run.step, cfg)
        loss, norm, stop = run.train_step(bool(told))
        elapsed = time.perf_counter() - begin
        run.seconds += elapsed
        fresh, pace = True, elapsed if pace is None else 0.9 * pace + 0.1 * elapsed
        if run.step % cfg.log_interval == 0 or run.step == cfg.steps:
            run.write_log(event="step", step=run.step, seconds=round(run.seconds, 3), loss=loss, lr=lr,
                          norm=norm)
            run.processes.print(
                f"step {run.step:6}/{cfg.steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | "
                f"{1e3 * elapsed:.0f} ms | {cfg.batch_size * cfg.block_size / elapsed:,.0f} tok/s | "
                f"eta {clock(pace * (cfg.steps - run.step))}")


def prepare(given: dict, device: str) -> Run:
    """Everything before the first step. Raises ValueError or OSError with one line that says what to do."""
    processes = Processes(device)
    given = {"out_dir": TrainConfig.out_dir} | given    # a run is where it is found, also if it was moved
    path = Path(given["out_dir"], "ckpt.pt")
    saved = None
    if given.get("resume"):
        saved = load_checkpoint(path)
        if missing := {"optimizer", "step", "seconds", "loss", "data"} - saved.keys():
            raise ValueError(f"{path} has no {', '.join(sorted(missing))}: sample.py can use it, "
                             "--resume cannot")
        cfg = resume_config(given, saved["config"])
    else:
        cfg = make_config(given, device)
        if (path.exists() or path.with_name("log.jsonl").exists()) and not cfg.overwrite:
            resume = "--resume continues it" if path.exists() else "it has no checkpoint yet"
            raise ValueError(f"{cfg.out_dir} holds a run: {resume}, --overwrite starts anew, "
                             "--out_dir=... puts this one elsewhere")
    cfg.zero = given.get("zero", cfg.zero and dist.is_initialized())    # a checkpoint's own flag may yield
    if cfg.zero and not dist.is_initialized():
        raise ValueError("--zero shares AdamW's state among processes: start them with torchrun "
                         "--nproc_per_node=N train.py, or give --no-zero")
    if cfg.batch_size % processes.world:
        raise ValueError(f"batch_size={cfg.batch_size} must be a multiple of the {processes.world} "
                         "processes")
    if cfg.data_dir == TrainConfig.data_dir:
        if processes.rank == 0 and not Path(cfg.data_dir, "meta.json").exists():
            print(f"There is no {cfg.data_dir}: preparing it from the Python standard library.", flush=True)
            prepare_data.prepare(["python"], cfg.data_dir)
        processes.sum(0)    # the others wait here
    data = Data(cfg)
    if saved and saved["data"]["fingerprint"] != data.meta["fingerprint"]:
        raise ValueError(f"{cfg.data_dir} is not the data that {path} was trained on: prepare that again")
    if "vocab_size" not in given and not saved:
        cfg.vocab_size = data.meta["vocab_size"]
    if cfg.vocab_size < data.meta["vocab_size"]:
        raise ValueError(f"--vocab_size={cfg.vocab_size} is less than the {data.meta['vocab_size']} of "
                         f"{cfg.data_dir}")
    run = Run(cfg, processes, data, saved)
    run.setup += [f"note     --{name} changes nothing with ffn={cfg.ffn}" for name in idle_settings(given, cfg.ffn)]
    return run


def finish(run: Run) -> None:
    """A sample, and what to do next."""
    out = run.processes.print
    if run.processes.rank == 0:
        generator = torch.Generator(run.processes.device).manual_seed(run.cfg.seed)
        text = "".join(stream(run.model, run.data.encoding, "", 120, temperature=0.8, top_p=0.95,
                              generator=generator))
        out(f"trained for {clock(run.seconds)}. A sample:\n{'-' * 60}\n{text}\n{'-' * 60}")
    where = "" if run.cfg.out_dir == TrainConfig.out_dir else f" --out_dir={run.cfg.out_dir}"
    analysis = {"sgatlin": where, "mlp": f" mimic{where}"}.get(run.cfg.ffn)
    if analysis is None or run.cfg.softmax_gates or run.cfg.shared_pool:
        analysis = f" curves {run.cfg.out_dir}"
    out(f"next:  python sample.py{where} --prompt \"def \"\n"
        f"       python analyze.py{analysis}\n"
        f"       python train.py{where} --resume --steps={2 * run.cfg.steps}")


def main(argv: list[str] | None = None) -> None:
    parser, given = parse_args(argv)
    device = given.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        make_config(given, device)
    except ValueError as error:
        parser.error(str(error))
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch sees no CUDA device; --device=cpu runs without one")
    keep_memory()
    torch.set_flush_denormal(True)      # AdamW's moments of unused neurons become denormals, slow on CPUs
    torch.set_float32_matmul_precision("high")
    try:
        try:        # a mistake of the user is one line; what goes wrong later keeps its traceback
            run = prepare(given, device)
        except (OSError, ValueError) as error:
            parser.exit(2, f"train.py: {error}\n")
        run.report()
        resumed = given.get("resume", False)
        start_log(run, resumed)
        with signals_noted() as told:
            finished = train(run, resumed, told)
        run.wrapped = None      # before the process group: if DDP is its last owner, gloo can hang at the end
        if finished:
            finish(run)
        else:
            run.processes.print(f"stopped and saved at step {run.step}; to continue: "
                                f"python train.py --out_dir={run.cfg.out_dir} --resume")
            raise SystemExit(130)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise SystemExit("train.py: out of memory: lower --micro_batch_size, --block_size or the sizes of "
                         "the model") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # a terminal that cannot show a character shows "?"
    main()
