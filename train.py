"""Train a GPT on a folder made by prepare_data.py (made here if it is the default one).

    python train.py                                       # one GPU or a laptop; --help lists all
    python train.py --ffn=swiglu --scale=2 --flops=1e15   # a model of the paper's ladder, a budget
    torchrun --nproc_per_node=8 train.py                  # eight GPUs; on CPUs add --device=cpu
    torchrun --nproc_per_node=8 train.py --shard          # parameters and optimizer cut in eighths
    python train.py --resume                              # go on after Ctrl-C, a kill or a crash

Writes to out_dir: ckpt.pt (the model, the optimizer, the step, the settings, the tokenizer) and
log.jsonl (the settings, then one object per logged step, evaluation and resumption).

The batch of step s is a function of (seed, s) alone: it does not depend on the number of processes,
on how it is cut into micro-batches, on evaluations or on interruptions. Read main first.

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
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

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
from torch.utils.benchmark import Timer

import kernels
import prepare_data
from model import FFN, GPT, GPTConfig, load_checkpoint, rotate, save_checkpoint, stream


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
    micro_batch_size: int = 32      # sequences per process at a time; lower it when memory runs out
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
    device: str = "auto"            # cpu, cuda, or auto: cuda if there is one
    dtype: str = "auto"             # of matmuls: float32, bfloat16, or auto: bfloat16 on GPUs
    compile: bool = True            # run the model through torch.compile
    shard: bool = False             # cut parameters, gradients and moments among the processes

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "batch_size", "micro_batch_size", "eval_interval", "eval_sequences",
                     "log_interval", "learning_rate", "ffn_rate"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite")
        for name in ("scale", "flops", "weight_decay", "warmup_steps", "grad_clip", "seed"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be 0 or more, and finite")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} must be less than 2**63")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} must lie between 0 and 1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device!r} is none of auto, cpu, cuda")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is none of auto, float32, bfloat16")


# The defaults above are for a GPU: the model, the optimizer and the schedule of the paper's
# TinyStories study. These replace them on a CPU.
CPU_PRESET = dict(data_dir="data/python", block_size=256, d_model=128, d_key=32, batch_size=8,
                  micro_batch_size=8, steps=1530, warmup_steps=50, learning_rate=6e-3,
                  ffn_rate=0.33, eval_interval=100, eval_sequences=64, compile=False)
# Settings that may differ when a run is resumed.
RESUMABLE = {"data_dir", "out_dir", "resume", "overwrite", "steps", "micro_batch_size",
             "eval_interval", "log_interval", "device", "dtype", "compile", "shard"}


# --------------------------------------------------------------------------------------------------
# settings

def fail(message: object) -> NoReturn:
    """Ends the program with one line: the mistake is the user's, and a traceback would not help."""
    print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: list[str] | None) -> dict:
    """The settings that the command line gives. The help is the comments of the config classes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail         # argparse's own prints the names of all settings first
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
        else:
            parser.add_argument(f"--{field.name}", type=field.type, help=text)
    return vars(parser.parse_args(argv))


def new_config(given: dict, on_cpu: bool) -> TrainConfig:
    """Settings of a new run: those given, over the ladder's if --scale is, over the preset."""
    if "steps" in given and given.get("flops"):
        raise ValueError(f"--steps={given['steps']} and --flops={given['flops']:g} both set the "
                         "steps: give one")
    preset = CPU_PRESET if on_cpu else {}
    ladder = {}
    if given.get("scale"):
        sizes = GPTConfig.ladder(given.get("ffn", GPTConfig.ffn), given["scale"])
        for name in ("d_model", "d_head", "n_layer", "d_ff", "n_experts", "n_channels", "top_k",
                     "d_key"):
            ladder[name] = getattr(sizes, name)
    return TrainConfig(**(preset | ladder | given))


def resumed_config(given: dict, saved: dict) -> TrainConfig:
    """The checkpoint's settings, with those given. ValueError if one of these may not change."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    # A setting that the checkpoint lacks has its default; one that only the checkpoint has, an
    # older train.py made, and is left out.
    settings = dataclasses.asdict(TrainConfig())
    settings |= {name: value for name, value in saved.items() if name in names}
    # Where a run is, and on how many devices, is not remembered: it may go on elsewhere.
    settings["device"] = TrainConfig.device
    settings["shard"] = TrainConfig.shard
    for name, value in given.items():
        if name not in RESUMABLE and value != settings[name]:
            raise ValueError(f"--{name}={value} contradicts the checkpoint, which has "
                             f"{settings[name]}: drop it, or train anew with another --out_dir")
    return TrainConfig(**(settings | given))


def settle(given: dict, device: torch.device, world: int) -> tuple[TrainConfig, dict | None]:
    """All settings, and the checkpoint to resume. ValueErrors and OSErrors are the user's."""
    on_cpu = device.type == "cpu"
    given = {"out_dir": TrainConfig.out_dir} | given    # a run is where it is found, also if moved
    folder = Path(given["out_dir"])
    path = folder / "ckpt.pt"
    saved = None
    if given.get("resume") and given.get("overwrite"):
        raise ValueError("--resume continues the run in out_dir, --overwrite drops it: give one")
    if given.get("resume"):
        saved = load_checkpoint(path)
        for name in ("optimizer", "step", "seconds", "loss", "data"):
            if name not in saved:
                raise ValueError(f"{path} has no {name!r}: sample.py can use it, --resume cannot")
        cfg = resumed_config(given, saved["config"])
        if saved["step"] > cfg.steps:
            raise ValueError(f"--steps={cfg.steps}: the run in {folder} is already at "
                             f"{saved['step']}")
    else:
        cfg = new_config(given, on_cpu)
        if not cfg.overwrite and path.exists():
            raise ValueError(f"{folder} holds a run: --resume continues it, --overwrite starts "
                             "anew, --out_dir=... puts this one elsewhere")
        if not cfg.overwrite and (folder / "log.jsonl").exists():
            raise ValueError(f"{folder} holds a run: it has no checkpoint yet, --overwrite starts "
                             "anew, --out_dir=... puts this one elsewhere")
    if cfg.shard and not dist.is_initialized():
        raise ValueError("--shard cuts the model over several processes: start them with torchrun "
                         "--nproc_per_node=N train.py --shard")
    if cfg.batch_size % world:
        raise ValueError(f"batch_size={cfg.batch_size} must be a multiple of the {world} processes")
    if cfg.flops and not saved:
        with torch.device("meta"):      # only its sizes count
            step_flops = 3 * GPT(cfg).flops_per_sequence() * cfg.batch_size
        cfg.steps = int(cfg.flops // step_flops)
        if cfg.steps == 0:
            raise ValueError(f"--flops={cfg.flops:g} buys no step: one costs {step_flops:.3g}")
    return cfg, saved


def idle_settings(given: dict, ffn: str) -> list[str]:
    """Of the settings given, those of other feedforward layers: they change nothing in this one."""
    if not hasattr(FFN[ffn], "settings"):       # a layer need not say what it uses
        return []
    used = FFN[ffn].settings
    others = set()
    for layer in FFN.values():
        others.update(getattr(layer, "settings", ()))
    return [name for name in given if name in others and name not in used]


# --------------------------------------------------------------------------------------------------
# data

class Data:
    """The tokens of a folder made by prepare_data.py. ValueError if it is not whole or too short.

    The files of the start stay open: prepare_data.py may replace them by others during a run.
    """

    def __init__(self, folder: str | Path, block_size: int, seed: int = 0):
        self.folder = Path(folder)
        self.block_size = block_size
        self.seed = seed
        remedy = f"python prepare_data.py --help tells how to make {folder}"
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.tokenizer = dict(ranks=(self.folder / "tokenizer.tiktoken").read_text(),
                                  pat_str=self.meta["pat_str"])
            self.encoding = prepare_data.load_tokenizer(**self.tokenizer)
            self.files = {"train": open(self.folder / "train.bin", "rb"),       # noqa: SIM115
                          "val": open(self.folder / "val.bin", "rb")}           # noqa: SIM115
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} is missing: {remedy}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"meta.json and tokenizer.tiktoken in {folder} are not, or not both, "
                             f"what prepare_data.py made: {remedy}") from error
        if self.encoding.n_vocab != self.meta["vocab_size"]:
            raise ValueError(f"meta.json and tokenizer.tiktoken in {folder} are not, or not both, "
                             f"what prepare_data.py made: {remedy}")
        for part in ("train", "val"):
            self._check_size(part)

    def _check_size(self, part: str) -> None:
        name = self.folder / f"{part}.bin"
        tokens = self.meta[f"{part}_tokens"]
        size = os.fstat(self.files[part].fileno()).st_size
        expected = tokens * np.dtype(self.meta["dtype"]).itemsize
        if size != expected:
            raise ValueError(f"{name} has {size} bytes, not the {expected} of meta.json: prepare "
                             "it again")
        needed = 2 * self.block_size + 1
        if tokens < needed:
            raise ValueError(f"{name} has {tokens} tokens: too few for --block_size="
                             f"{self.block_size}, which needs {needed}")

    def tokens(self, part: str) -> np.ndarray:
        """All tokens of "train" or "val", mapped from the file."""
        return np.memmap(self.files[part], dtype=self.meta["dtype"], mode="r")

    def windows(self, part: str, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (len(starts), T) int64 each, of the windows that begin there."""
        # Mapped anew each time: a long-lived map counts every page it touched as memory in use.
        tokens = self.tokens(part)
        rows = np.stack([tokens[start:start + self.block_size + 1] for start in starts])
        if rows.max() >= self.meta["vocab_size"]:
            raise ValueError(f"{self.folder}/{part}.bin holds token {rows.max()}, beyond "
                             f"vocab_size={self.meta['vocab_size']}: prepare it again")
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def n_windows(self) -> int:
        """Windows in one pass over the training tokens; room is left to shift them."""
        return (self.meta["train_tokens"] - self.block_size - 1) // self.block_size

    @functools.lru_cache(maxsize=2)         # noqa: B019  there is one Data, as long as the program
    def order(self, epoch: int) -> np.ndarray:
        """Where the windows of a pass start: shuffled, and shifted by a random part of a window."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.n_windows()) * self.block_size
        return order + rng.integers(self.block_size)

    def train_starts(self, step: int, batch_size: int) -> np.ndarray:
        """The first tokens of the windows of the global batch of a step, (batch_size,)."""
        first = step * batch_size
        starts = []
        for i in range(first, first + batch_size):
            epoch, place = divmod(i, self.n_windows())
            starts.append(self.order(epoch)[place])
        return np.array(starts)

    def val_starts(self, count: int) -> np.ndarray:
        """The first tokens of at most count validation windows: evenly spaced, not overlapping."""
        room = self.meta["val_tokens"] - self.block_size - 1
        count = min(count, room // self.block_size + 1)
        return np.arange(count) * (room // max(count - 1, 1))


DEFAULT_DATA = {"data/python": False, "data/packages": True}    # folder: with installed packages?


def open_data(cfg: TrainConfig, given: dict, saved: dict | None, rank: int) -> Data:
    """The data of the run, prepared first if it is the default one and missing.

    Gives a new run the vocabulary of the data. Raises ValueError if the data is damaged, or is not
    what the checkpoint was trained on.
    """
    if cfg.data_dir in DEFAULT_DATA:
        if rank == 0 and not Path(cfg.data_dir, "meta.json").exists():
            print(f"There is no data in {cfg.data_dir}: preparing it from the Python files of this "
                  "machine.", flush=True)
            prepare_data.prepare(["python"], cfg.data_dir, site_packages=DEFAULT_DATA[cfg.data_dir])
        if dist.is_initialized():
            dist.barrier()
    data = Data(cfg.data_dir, cfg.block_size, cfg.seed)
    if saved and saved["data"]["fingerprint"] != data.meta["fingerprint"]:
        raise ValueError(f"{cfg.data_dir} is not the data that the run in {cfg.out_dir} was "
                         "trained on: prepare that again")
    if not saved and "vocab_size" not in given:
        cfg.vocab_size = data.meta["vocab_size"]
    if cfg.vocab_size < data.meta["vocab_size"]:
        raise ValueError(f"--vocab_size={cfg.vocab_size} is less than the "
                         f"{data.meta['vocab_size']} of {cfg.data_dir}")
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
    members = defaultdict(list)     # of each group, by its weight decay and its rate
    for name, p in model.named_parameters():
        is_matrix = p.ndim > 1 and not name.endswith((".b1", ".b2"))    # MoE's are (experts, d_ff)
        decay = cfg.weight_decay if is_matrix else 0.0
        rate = cfg.ffn_rate if ".ffn." in name else 1.0
        members[decay, rate].append(p)
    groups = []
    for (decay, rate), params in members.items():
        groups.append(dict(params=params, weight_decay=decay, rate=rate))
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets lr, times ffn_rate for the feedforward layers.

    A neuron is chosen rarely, and AdamW makes a large step of a gradient that is rare, for it
    divides by the root of the mean square. At a high rate such steps seem to disturb the rest.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]


def clip_gradients(model: nn.Module, cfg: TrainConfig) -> float:
    """Scales the gradients to a norm of grad_clip where it is larger. Returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    if isinstance(norm, DTensor):       # sharded: each process knows the norm of its part
        norm = norm.full_tensor()
    return norm.item()


def choose_dtype(cfg: TrainConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the matmuls, and why."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype), f"--dtype={cfg.dtype}"
    if device.type == "cpu":
        return torch.float32, "bfloat16 is for GPUs"
    # torch.cuda.is_bf16_supported() also counts GPUs that only emulate it, slowly.
    if torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float32, "the GPU has no bfloat16"
    return torch.bfloat16, "the GPU has it"


def choose_compile(cfg: TrainConfig, device: torch.device) -> tuple[bool, str]:
    """Whether to use torch.compile, and why."""
    if cfg.compile and device.type == "cuda" and kernels.triton is None:
        return False, "it needs triton"
    return cfg.compile, "--compile" if cfg.compile else "--no-compile"


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product here: what the utilisation (MFU) is measured against."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    timer = Timer("a @ a", globals=dict(a=a), num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.2).median


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
def processes(device_type: str) -> Iterator[tuple[int, int, torch.device]]:
    """This process's rank, the number of processes, and its device: one, or as torchrun says.

    Only torchrun makes several: RANK or WORLD_SIZE alone in the environment are not believed.
    """
    launched = dist.is_torchelastic_launched()
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank() if launched else 0)
        torch.cuda.set_device(device)
    if not launched:
        yield 0, 1, device
        return
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        if device_type == "cpu":
            # A thread of gloo may still have to drop the last gathered tensor. It needs Python for
            # that, and aborts the process if Python has ended. destroy_process_group does not wait
            # for it, for caches of DTensor keep a sharded model's group alive. So give it time.
            time.sleep(0.5)
        dist.destroy_process_group()


def sum_over_processes(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process: all of them must stop at the same step."""
    return sum_over_processes(torch.tensor(float(flag), device=device)).item() > 0


def wrap(model: GPT, cfg: TrainConfig, compiled: bool) -> nn.Module:
    """What the loop calls in place of model, whose parameters it shares."""
    wrapped = torch.compile(model) if compiled else model
    if dist.is_initialized() and not cfg.shard:
        wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True)
    return wrapped


def shard(model: GPT, device: torch.device) -> None:
    """FSDP2: every process keeps its part of each tensor, and of its gradient and moments."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it Ctrl-C, SIGTERM and a closed terminal stop nothing: they are added to the list."""
    received = []
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)            # Windows has no SIGHUP
        if number is None or signal.getsignal(number) == signal.SIG_IGN:
            continue                                    # nohup ignores SIGHUP
        before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def memory_hint() -> Iterator[None]:
    """A lack of memory becomes one line that says what to lower; other errors stay as they are."""
    try:
        yield
    except RuntimeError as error:
        on_cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise SystemExit("train.py: out of memory: lower --micro_batch_size, --block_size or the "
                         "sizes of the model") from error


def require_finite(step: int, cfg: TrainConfig, rank: int, **values: float) -> None:
    """Ends the run before the checkpoint is spoilt; every process has the same values."""
    if all(math.isfinite(value) for value in values.values()):
        return
    listed = ", ".join(f"the {name.replace('_', ' ')} is {v}" for name, v in values.items())
    message = (f"train.py: step {step}: {listed}. {cfg.out_dir}/ckpt.pt holds the last good state; "
               "a lower --learning_rate may help")
    raise SystemExit(message if rank == 0 else 1)


# --------------------------------------------------------------------------------------------------
# evaluation, checkpoint, log

@contextlib.contextmanager
def count_choices(model: GPT) -> Iterator[list[Tensor]]:
    """Within it every router counts its choices; yields one tensor (C, E) of counts per layer."""
    counts = []
    handles = []
    for block in model.blocks:
        if not hasattr(block.ffn, "router"):
            continue
        count = torch.zeros(model.cfg.n_channels, model.cfg.n_experts, dtype=torch.float64,
                            device=model.rope.device)

        def add(router, args, output, count=count):
            ids = output[1].long()                                      # (N, C, k)
            for c in range(len(count)):
                count[c] += ids[:, c].flatten().bincount(minlength=count.shape[1])

        counts.append(count)
        handles.append(block.ffn.router.register_forward_hook(add))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def usage(counts: Tensor) -> tuple[float, float]:
    """Of counts (C, E): the share of neurons chosen at all, and the Gini coefficient.

    0 says that all are chosen equally often, 1 that one neuron has all choices.
    """
    load = counts.flatten().sort().values               # ascending
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
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.vocab_size, (8, n), generator=generator)
    tokens = torch.cat((tokens, tokens), dim=1).to(model.rope.device)      # (8, 2n)

    recorded = []           # of each layer its queries and its keys, before rotation
    handles = []
    for block in model.blocks:
        for norm in (block.attn.q_norm, block.attn.k_norm):
            handle = norm.register_forward_hook(lambda _, args, output: recorded.append(output))
            handles.append(handle)
    try:
        with autocast:
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()

    best = 0.0
    t = torch.arange(n)     # places of the first occurrences
    for layer in range(model.cfg.n_layer):
        q = rotate(recorded[2 * layer].float(), model.rope[:, :2 * n])     # (8, H, 2n, Dh)
        k = rotate(recorded[2 * layer + 1].float(), model.rope[:, :2 * n])
        logits = q @ k.transpose(2, 3) / model.cfg.d_head ** 0.5           # (8, H, 2n, 2n)
        future = torch.ones_like(logits, dtype=torch.bool).triu(1)
        pattern = logits.masked_fill(future, -math.inf).softmax(dim=3)
        of_heads = pattern[:, :, n + t, t + 1].mean(dim=(0, 2))            # (H,)
        best = max(best, of_heads.max().item())
    return best


@torch.no_grad()
def evaluate(model: GPT, data: Data, cfg: TrainConfig, autocast: contextlib.AbstractContextManager,
             rank: int, world: int) -> dict:
    """Mean validation loss in nats per token, over all processes, and how its routers chose."""
    device = model.rope.device
    starts = data.val_starts(cfg.eval_sequences)
    mine = starts[rank::world]
    total = torch.zeros((), dtype=torch.float64, device=device)
    size = cfg.micro_batch_size
    with count_choices(model) as counts:
        for i in range(0, len(mine), size):
            part = mine[i:i + size]
            x, y = data.windows("val", part)
            with autocast:
                _, loss = model(x.to(device), y.to(device))
            total += loss.double() * len(part)
    # A sharded model needs all processes in each forward pass, also those that have none left.
    most = math.ceil(len(starts) / world)
    if math.ceil(len(mine) / size) < math.ceil(most / size):
        x, _ = data.windows("val", starts[:1])
        with autocast:
            model(x.to(device))
    val_loss = sum_over_processes(total).item() / len(starts)
    bits = val_loss / math.log(2) * data.meta["val_tokens"] / data.meta["val_bytes"]
    result = dict(val_loss=val_loss, val_bits_per_byte=bits,
                  induction=round(induction(model, autocast), 5))
    if counts:
        shares = [usage(sum_over_processes(count)) for count in counts]
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
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_checkpoint(Path(cfg.out_dir, "ckpt.pt"), dict(
            model=model_state, optimizer=optimizer_state, **progress,
            config=dataclasses.asdict(cfg), data=data.meta, tokenizer=data.tokenizer))


def load_optimizer(state: dict, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Restores the moments and step counts of a checkpoint; what the groups are, settings say."""
    if not state or not state["state"]:
        return              # it was saved before the first step
    moments = state["state"]                            # by the names of parameters
    if 0 in moments:                                    # an older train.py numbered them
        names = [name for name, p in model.named_parameters() if p.ndim > 1]
        names += [name for name, p in model.named_parameters() if p.ndim <= 1]
        moments = {names[i]: values for i, values in moments.items()}
    name_of = {p: name for name, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        groups.append(group | dict(params=[name_of[p] for p in group["params"]]))
    set_optimizer_state_dict(model, optimizer, dict(state=moments, param_groups=groups),
                             options=FULL)


def append_log(cfg: TrainConfig, **entry) -> None:
    with open(Path(cfg.out_dir, "log.jsonl"), "a") as file:
        file.write(json.dumps(entry) + "\n")


def start_log(cfg: TrainConfig, data: Data, saved: dict | None, device: torch.device,
              world: int) -> None:
    """A new log begins with the settings; a resumed one loses what came after the checkpoint."""
    path = Path(cfg.out_dir, "log.jsonl")
    kept = []
    if saved and path.exists():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:                # a kill can cut the last line short
                continue
            if entry.get("step", 0) <= saved["step"]:
                kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
    versions = dict(torch=torch.__version__, python=platform.python_version(),
                    machine=describe_device(device), processes=world)
    if saved:
        append_log(cfg, event="resume", step=saved["step"], config=dataclasses.asdict(cfg),
                   versions=versions)
    else:
        (path.parent / "ckpt.pt").unlink(missing_ok=True)
        append_log(cfg, event="config", config=dataclasses.asdict(cfg), data=data.meta,
                   versions=versions)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {torch.get_num_threads()} threads"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def log_evaluation(result: dict, progress: dict, cfg: TrainConfig, model: GPT) -> None:
    step = progress["step"]
    step_flops = 3 * model.flops_per_sequence() * cfg.batch_size
    append_log(cfg, event="eval", step=step, tokens=step * cfg.batch_size * cfg.block_size,
               flops=step * step_flops, seconds=round(progress["seconds"], 3),
               train_loss=progress["loss"], **result)


def log_step(progress: dict, lr: float, norm: float, elapsed: float, peak_flops: float,
             cfg: TrainConfig, model: GPT) -> None:
    """One line about the step that took `elapsed` seconds; MFU: the share of the peak FLOP/s."""
    step = progress["step"]
    step_flops = 3 * model.flops_per_sequence() * cfg.batch_size
    tokens = cfg.batch_size * cfg.block_size
    eta = clock(elapsed * (cfg.steps - step))
    append_log(cfg, event="step", step=step, seconds=round(progress["seconds"], 3),
               loss=progress["loss"], lr=lr, norm=norm)
    print(f"step {step:6}/{cfg.steps} | loss {progress['loss']:.4f} | lr {lr:.2e} | "
          f"norm {norm:.3f} | {1e3 * elapsed:.0f} ms | {tokens / elapsed:,.0f} tok/s | "
          f"mfu {step_flops / elapsed / peak_flops:.1%} | eta {eta}", flush=True)


def report(model: GPT, data: Data, cfg: TrainConfig, given: dict, device: torch.device,
           world: int) -> None:
    """Prints what is about to run, and why it runs so."""
    total, active = model.num_params()
    tokens = cfg.batch_size * cfg.block_size
    flops = 3 * model.flops_per_sequence() * cfg.batch_size
    passes = cfg.steps * cfg.batch_size / data.n_windows()
    dtype, dtype_reason = choose_dtype(cfg, device)
    compiled, compile_reason = choose_compile(cfg, device)
    backend, backend_reason = kernels.backend(device.type)
    print(f"device   {describe_device(device)}")
    print(f"dtype    {str(dtype).removeprefix('torch.')}: {dtype_reason}")
    print(f"compile  {'on' if compiled else 'off'}: {compile_reason}")
    print(f"kernels  {backend}: {backend_reason}")
    print(f"model    {cfg.ffn}, {cfg.n_layer} layers, d_model {cfg.d_model}: {total:,} parameters, "
          f"{active:,} active per token; training takes {flops / tokens / 1e6:.1f} MFLOP per token")
    print(f"data     {cfg.data_dir}: {data.meta['train_tokens']:,} tokens, vocabulary "
          f"{cfg.vocab_size}")
    print(f"plan     {cfg.steps} steps of {tokens:,} tokens on {world} process(es): "
          f"{cfg.steps * tokens / 1e6:.1f} M tokens, {passes:.2f} passes over the data, "
          f"{cfg.steps * flops:.3g} FLOP")
    if passes > 4:
        print("note     so many passes overfit: take fewer --steps, or more data "
              "(prepare_data.py --help)")
    for name in idle_settings(given, cfg.ffn):
        print(f"note     --{name} changes nothing with ffn={cfg.ffn}")
    sys.stdout.flush()


def print_end(model: GPT, data: Data, cfg: TrainConfig, seconds: float, rank: int) -> None:
    """Prints a sample and what to do next. All processes call it, for a sharded model needs all."""
    generator = torch.Generator(model.rope.device).manual_seed(cfg.seed)
    text = "".join(stream(model, data.encoding, "", 120, temperature=0.8, top_p=0.95,
                          generator=generator))
    if rank != 0:
        return
    print(f"trained for {clock(seconds)}. A sample:\n{'-' * 60}\n{text}\n{'-' * 60}")
    where = "" if cfg.out_dir == TrainConfig.out_dir else f" --out_dir={cfg.out_dir}"
    analysis = f"curves {cfg.out_dir}"
    if cfg.ffn == "sgatlin" and not cfg.softmax_gates and not cfg.shared_pool:
        analysis = f"report{where}"     # its circuits can be read
    print(f"next:  python sample.py{where} --prompt \"def \"\n"
          f"       python analyze.py {analysis}\n"
          f"       python train.py{where} --resume --steps={2 * cfg.steps}", flush=True)


# --------------------------------------------------------------------------------------------------
# main

def choose_device(given: dict) -> str:
    wanted = given.get("device", "auto")
    if wanted == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda: torch sees no CUDA device; --device=cpu runs without one")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def build_model(cfg: TrainConfig, saved: dict | None,
                device: torch.device) -> tuple[GPT, torch.optim.Optimizer]:
    """The model and its optimizer, new or as in the checkpoint, sharded if the settings say so."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg)
    if saved:
        try:
            model.load_state_dict(saved["model"])
        except RuntimeError:
            fail(f"the checkpoint in {cfg.out_dir} holds another model than model.py makes of its "
                 "settings")
    if cfg.shard:
        shard(model, device)        # first, for the whole model may not fit on one device
    model.to(device)
    optimizer = make_optimizer(model, cfg)
    if saved:
        load_optimizer(saved["optimizer"], model, optimizer)
    return model, optimizer


def main(argv: list[str] | None = None) -> None:
    given = parse_args(argv)
    keep_memory()
    # AdamW's moments of neurons that are not chosen become denormal numbers, slow on a CPU.
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")      # TF32 where a GPU multiplies float32
    with processes(choose_device(given)) as (rank, world, device), memory_hint():
        if device.type == "cuda":
            sum_in_fixed_order()
        # Build everything. A mistake of the user is found here and ends the program with one line.
        try:
            cfg, saved = settle(given, device, world)
            data = open_data(cfg, given, saved, rank)
            Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            fail(error)
        model, optimizer = build_model(cfg, saved, device)
        dtype, _ = choose_dtype(cfg, device)
        compiled, _ = choose_compile(cfg, device)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        wrapped = wrap(model, cfg, compiled)
        peak_flops = matmul_flops(device, dtype)
        if rank == 0:
            report(model, data, cfg, given, device, world)
            start_log(cfg, data, saved, device, world)
        # seconds are those of the steps alone; loss is that of the last step
        progress = dict(step=0, seconds=0.0, loss=None)
        if saved:
            progress = {name: saved[name] for name in progress}
        step = progress["step"]
        resumed_at = step if saved else None
        saved = None        # its tensors would stay in memory

        with stop_signals() as received:
            stop = False
            while True:
                # Evaluate and save: when it is due, and before a stop.
                due = step % cfg.eval_interval == 0 or step == cfg.steps
                due = due and step != resumed_at        # the log has that evaluation
                if due:
                    result = evaluate(model, data, cfg, autocast, rank, world)
                    require_finite(step, cfg, rank, validation_loss=result["val_loss"])
                    if rank == 0:       # log first: a kill may leave the log ahead, not behind
                        log_evaluation(result, progress, cfg, model)
                if due or stop:
                    save(model, optimizer, cfg, data, progress)
                if due and rank == 0:
                    print(f"step {step:6}/{cfg.steps} | validation loss {result['val_loss']:.4f} | "
                          f"{result['val_bits_per_byte']:.4f} bits per byte | "
                          f"induction {result['induction']:.2f} | "
                          f"saved {cfg.out_dir}/ckpt.pt", flush=True)
                if stop or step == cfg.steps:
                    break

                # Learning rate.
                began = time.perf_counter()
                lr = schedule(step, cfg)
                set_learning_rate(optimizer, lr)

                # Forward and backward, one micro-batch at a time.
                mine = data.train_starts(step, cfg.batch_size).reshape(world, -1)[rank]
                loss = torch.zeros((), device=device)
                for i in range(0, len(mine), cfg.micro_batch_size):
                    starts = mine[i:i + cfg.micro_batch_size]
                    x, y = data.windows("train", starts)
                    # DDP sends gradients with the last micro-batch; others ignore this attribute.
                    wrapped.require_backward_grad_sync = i + cfg.micro_batch_size >= len(mine)
                    with autocast:
                        _, part = wrapped(x.to(device), y.to(device))
                    part = part * (len(starts) / len(mine))
                    part.backward()
                    loss += part.detach()
                loss = sum_over_processes(loss / world).item()

                # Clip and step.
                norm = clip_gradients(model, cfg)
                require_finite(step, cfg, rank, loss=loss, gradient_norm=norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                stop = any_process(bool(received), device)

                # Log.
                step += 1
                elapsed = time.perf_counter() - began
                progress = dict(step=step, seconds=progress["seconds"] + elapsed, loss=loss)
                if rank == 0 and (step % cfg.log_interval == 0 or step == cfg.steps):
                    log_step(progress, lr, norm, elapsed, peak_flops * world, cfg, model)

        del wrapped     # before the process group: if DDP is its last owner, gloo can hang at exit
        if step < cfg.steps:
            if rank == 0:
                print(f"stopped and saved at step {step}; to continue: python train.py "
                      f"--out_dir={cfg.out_dir} --resume", flush=True)
            raise SystemExit(130)
        print_end(model, data, cfg, progress["seconds"], rank)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # a terminal that cannot show a character shows "?"
    try:
        main()
    except KeyboardInterrupt:           # while data is prepared; the loop saves and stops
        raise SystemExit(130) from None
