"""Text in, tokens out: makes data/NAME/ with train.bin, val.bin, tokenizer.tiktoken and meta.json.

    python prepare_data.py                          # the standard library's .py files: needs no network
    python prepare_data.py python --site_packages   # and the .py files of every installed package
    python prepare_data.py tinystories              # or shakespeare; downloaded to data/NAME/ and kept there
    python prepare_data.py notes.md books 'logs/*.jsonl.gz'    # your own text

A document is a file, a line of a .jsonl file (key "text"), or what stands between <|endoftext|> lines in a
text file. Equal documents are kept once, in train.bin or in val.bin. The .bin files are raw
little-endian token ids, uint16 (uint32 if the vocabulary is above 65536), with <|endoftext|> after every
document. The same text gives the same bytes, whatever the machine and its number of cores.

About 5 % of the bytes are for validation: the documents with the lowest hashes, so the choice depends on
nothing but the text. A document that is too large for that, such as a single one, gives its end.
"""
import argparse
import base64
import collections
import contextlib
import glob
import hashlib
import heapq
import http.client
import importlib
import io
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import tokenize
import urllib.error
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None

DATA = Path("data")
EOT = "<|endoftext|>"

# Pre-tokenisation, after tiktoken's cl100k_base: words with the one sign or blank before them, digits by
# three, punctuation. Here punctuation and line ends also take the next line's indentation, but for the blank
# that goes with the next word: 8 % fewer tokens on Python code. Contractions need no rule: 't is a sign and
# a letter. The bound of 128 keeps tiktoken's regex engine within its stack on long runs of blanks.
PATTERN = (r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+(?:\s{1,128}(?!\S))?"
           r"|[\r\n]++(?:\s{1,128}(?!\S))?|\s{1,128}(?!\S)|\s")
# The BPE is trained on a sample of at most about SAMPLE_BYTES. Its memory goes by the different words
# together, of which the trainer takes about 60 times as much: they are bounded as well.
SAMPLE_BYTES = 40_000_000
WORD_BYTES = 8_000_000
BYTES = {bytes([byte]): byte for byte in range(256)}  # the ranks that every BPE starts from
PIECE = 4096  # characters: a sample of less than everything is made of such pieces

TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories-"
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
DOWNLOADS = {  # source: {URL: bytes, or None for as many as the server announces}
    "tinystories": {TINYSTORIES + "train.txt": None, TINYSTORIES + "valid.txt": None},
    "shakespeare": {CHAR_RNN + "tinyshakespeare/input.txt": 1_115_394},
}
TEXT_FILE = regex.compile(r"(?i)\.(txt|md|py|jsonl)(\.gz|\.xz|\.zst)?$")
OPENERS = {".gz": ["gzip"], ".xz": ["lzma"], ".zst": ["compression.zstd", "zstandard"]}  # the first there is


class Phase:
    """A line of progress: the name at once, on a terminal the share done, at the end seconds and a note."""

    def __init__(self, name, total=0):
        self.name, self.note = f"{name:<22}", ""
        self.total, self.done = total, 0  # bytes; a total of 0 is unknown
        self.start = self.shown = time.monotonic()
        print(self.name, end="", flush=True)

    def advance(self, n_bytes):
        self.done += n_bytes
        if sys.stdout.isatty() and time.monotonic() > self.shown + 0.1:
            self.shown = time.monotonic()
            share = f"{self.done / self.total:.0%}" if self.total else f"{self.done / 1e6:.1f} MB"
            print(f"\r{self.name}{share:>8}", end="", flush=True)

    def over(self, texts):
        for text in texts:
            yield text
            self.advance(len(text.encode()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        name = f"\r{self.name}" if sys.stdout.isatty() else ""
        print(f"{name}{time.monotonic() - self.start:6.1f} s  {self.note}", flush=True)


def download(url, path, size=None):
    """Download url to path, unless it is there, by way of path.part, which the next call continues."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "prepare_data.py"} | ({"Range": f"bytes={have}-"} if have else {})
    remedy = f"run again to continue, or save it by hand as {path}; the source python needs no network"
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply, Phase(path.name) as phase:
            phase.done = have if reply.status == 206 else 0  # 200: no ranges here, everything comes again
            phase.total = phase.done + int(reply.headers.get("Content-Length", 0))
            with open(part, "ab" if phase.done else "wb") as file:
                while chunk := reply.read(1 << 18):
                    file.write(chunk)
                    phase.advance(len(chunk))
            phase.note = f"{phase.done / 1e6:.1f} MB"
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        if getattr(error, "code", None) == 416:  # part is no beginning of this file
            part.unlink()
        raise OSError(f"cannot download {url} ({error}): {remedy}") from None
    size = size or phase.total or phase.done
    if phase.done != size:
        if phase.total != size:  # not the file that was asked for
            part.unlink()
        raise OSError(f"cannot download {url} (got {phase.done} of {size} bytes): {remedy}")
    os.replace(part, path)


def walk(folder):
    """The text files below folder, sorted, without those in hidden folders or of installed packages."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders
                            if name[0] != "." and name not in ("site-packages", "dist-packages"))
        yield from (Path(parent, name) for name in sorted(names) if TEXT_FILE.search(name))


def find_files(source, site_packages):
    """The files of one source, downloaded if need be. Raises ValueError if there are none."""
    if source in DOWNLOADS:
        files = [DATA / source / url.rpartition("/")[2] for url in DOWNLOADS[source]]
        for path, (url, size) in zip(files, DOWNLOADS[source].items()):
            download(url, path, size)
        return files
    if source == "python":
        folders = ["stdlib", "purelib", "platlib"] if site_packages else ["stdlib"]
        files = [path for name in folders for path in walk(sysconfig.get_path(name)) if path.suffix == ".py"]
    else:
        found = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if not found:
            raise ValueError(f"{source}: no such file, folder or match, and not one of the sources "
                             f"python, {', '.join(DOWNLOADS)}")
        files = [path for top in map(Path, found) for path in (walk(top) if top.is_dir() else [top])]
    if not files:
        raise ValueError(f"{source}: no .txt, .md, .py or .jsonl files in it")
    return files


def open_bytes(path):
    """Open a plain or compressed file for reading bytes."""
    for module in OPENERS.get(path.suffix.lower(), ["io"]):
        try:
            return importlib.import_module(module).open(path, "rb")
        except ModuleNotFoundError:
            pass
    raise OSError(f"{path.suffix} needs Python 3.14, or pip install {module}")


def split_documents(file, path):
    """The documents in an open file, decoded and otherwise as they are."""
    match = TEXT_FILE.search(path.name)
    kind, encoding, document = match[1].lower() if match else "txt", "utf-8-sig", []
    if kind == "py":
        file = io.BytesIO(file.read())  # not every decompressor can seek
        encoding, _ = tokenize.detect_encoding(file.readline)  # its coding line (PEP 263)
        file.seek(0)
    lines = io.TextIOWrapper(file, encoding, newline="\n")  # this newline leaves \r\n alone
    for number, line in enumerate(lines, 1):
        if kind == "jsonl" and not line.isspace():
            try:
                # JSON can spell half a surrogate pair, which UTF-8 cannot: it becomes "?"
                yield json.loads(line)["text"].encode("utf-8", "replace").decode()
            except (json.JSONDecodeError, LookupError, TypeError, AttributeError):
                raise ValueError(f'{path}, line {number}: not a JSON object with a string "text"') from None
        elif kind != "py" and line.strip() == EOT:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def read_documents(path):
    """The documents of one file but blank ones. Raises UnicodeError if not text, ValueError, OSError."""
    try:
        with open_bytes(path) as file:
            yield from (text for text in split_documents(file, path) if text and not text.isspace())
    except (SyntaxError, LookupError) as error:  # a coding line that no codec understands
        raise UnicodeError(error) from None
    except ValueError:
        raise
    except Exception as error:  # every decompressor has a class of its own for a damaged file
        raise OSError(f"cannot read {path}: {error}") from None


def choose_parts(sizes, val_fraction):
    """Split documents of these sizes in bytes, lowest hash first: a list of "train", "val" or "cut".

    Validation gets the first documents until it has about val_fraction of their bytes. A document so large
    that either part would be less than it is cut instead and gives val_fraction of itself. So the whole is
    off by less than half of what was asked for. Of fewer than 5 bytes nothing is cut.
    """
    total = sum(sizes)
    largest = max(4, min(val_fraction, 1 - val_fraction) * total)
    parts = ["cut" if size > largest else "train" for size in sizes]
    whole = [i for i, part in enumerate(parts) if part == "train"]
    reached = np.cumsum([0] + [sizes[i] for i in whole])
    n_val = int(np.abs(reached - val_fraction * reached[-1]).argmin())
    if "cut" not in parts:  # neither part may be empty
        n_val = max(1, min(n_val, len(whole) - 1))
    for i in whole[:n_val]:
        parts[i] = "val"
    return parts


def cut_end(text, val_fraction):
    """A text without its end, and the end: about val_fraction of its bytes, each at least a character."""
    data = text.encode()
    n_train = len(data) - max(1, round(val_fraction * len(data)))
    beginning = data[:n_train].decode("utf-8", "ignore") or text[0]  # "ignore": no half characters
    return beginning, text[len(beginning):]


class Corpus:
    """Which files are text and which part each document belongs to; the text is read again in every pass.

    Files that are not text and repeated documents are left out. Validation is TinyStories-valid.txt if it is
    there, else what choose_parts says.
    """

    def __init__(self, files, val_fraction):
        """Reads everything once. Raises ValueError if there is nothing to train on."""
        validation = [path for path in files if path.match("tinystories/TinyStories-valid.txt")]
        if validation and val_fraction is not None:
            raise ValueError(f"val_fraction {val_fraction}: {validation[0]} is the validation text")
        val_fraction = 0.05 if val_fraction is None else val_fraction
        files = list(dict.fromkeys(validation + files))  # first: of equal documents the first stays
        digests, sizes, n_validation = array("Q"), array("Q"), 0
        self.files, self.val_fraction = [], val_fraction
        with Phase("read") as phase:
            for path in files:
                start = len(digests)
                try:
                    for text in read_documents(path):
                        data = text.encode()
                        # 64 bits: two million documents have a false duplicate with odds of 1 in 10 million
                        digests.append(int.from_bytes(hashlib.sha256(data).digest()[:8], "little"))
                        sizes.append(len(data))
                        phase.advance(len(data))
                    self.files.append(path)
                except UnicodeError:
                    del digests[start:], sizes[start:]
                if path in validation:
                    n_validation = len(digests)
            kept = np.unique(np.array(digests), return_index=True)[1]  # the first of each, lowest hash first
            phase.note = f"{len(digests)} documents in {len(self.files)} files"
        self.part = np.full(len(digests), "", "<U5")  # in reading order; "" is a duplicate
        if n_validation:
            self.part[kept] = np.where(kept < n_validation, "val", "train")
        elif len(kept):
            self.part[kept] = choose_parts(np.array(sizes)[kept].tolist(), val_fraction)
        self.n_bytes = int(np.array(sizes)[kept].sum())  # UTF-8, without duplicates
        sizes = np.array(sizes)
        self.train_bytes = int(sizes[self.part == "train"].sum()
                               + (1 - val_fraction) * sizes[self.part == "cut"].sum())
        self.skipped = len(files) - len(self.files)
        if "cut" not in self.part and not {"train", "val"} <= set(self.part):
            raise ValueError(f"too little text for training and validation: {self.n_bytes} bytes "
                             f"in {len(files)} files, {self.skipped} of them not UTF-8")

    def documents(self, wanted):
        """The texts of one part, "train" or "val", in reading order."""
        texts = (text for path in self.files for text in read_documents(path))
        for part, text in zip(self.part.tolist(), texts, strict=True):  # strict: no file may change
            if part == "cut":
                beginning, end = cut_end(text, self.val_fraction)
                yield beginning if wanted == "train" else end
            elif part == wanted:
                yield text


def every_second(where, step):
    """Of every run of places that are `step` apart the first, the third and so on: those do not overlap."""
    index = np.arange(len(where))
    run = np.maximum.accumulate(np.where(np.diff(where, prepend=-step - 1) == step, 0, index))
    return where[(index - run) % 2 == 0]


def train_bpe(word_counts, vocab_size):
    """Byte-pair encoding: {word: count}, in the order of first occurrence -> {token bytes: rank}.

    From the 256 bytes on, merges the most frequent pair of neighbours, of equally frequent ones the first in
    the text: the tokens of tiktoken's `_educational.bpe_train`, in the same order. A pair that spells an old
    token is merged without a new rank. Returns fewer ranks when no pair is left.
    """
    # all words in one array of bytes, a gap around each: tok[p] is the token that starts at byte p, or -1
    words = [word.encode() for word in word_counts]
    gaps = np.cumsum([0] + [len(word) + 1 for word in words])
    tok = np.frombuffer(b" ".join([b"", *words, b""]), np.uint8).astype(np.int64)
    tok[gaps] = -1
    count = np.append(np.repeat(np.fromiter(word_counts.values(), np.int64), np.diff(gaps)), 0)
    previous = np.arange(-1, len(tok) - 1)  # where the token before the one at p starts
    ranks = {bytes([byte]): byte for byte in range(256)}
    # places of a pair (left << 32 | right): where it came about, in part stale; heap: (-count, place, pair)
    tokens, places, heap = list(ranks), {}, []

    def add(where, left, right):
        pairs = (left << 32) + right
        order = np.argsort(pairs, kind="stable")
        where, pairs = where[order], pairs[order]
        first = np.flatnonzero(np.diff(pairs, prepend=-1))
        totals = np.add.reduceat(count[where], first).tolist()
        for pair, total, new in zip(pairs[first].tolist(), totals, np.split(where, first[1:])):
            if pair in places:  # it came about before: two pairs can spell one token
                new = np.append(new, places[pair])
                total = count[new].sum().item()
            places[pair] = new
            heapq.heappush(heap, (-total, new.min().item(), pair))

    start = np.flatnonzero((tok[:-1] >= 0) & (tok[1:] >= 0))
    add(start, tok[start], tok[start + 1])
    while heap and heap[0][0] < 0 and len(ranks) < vocab_size:
        # merges take places from other pairs, so their counts fall and first places move back: an entry is a
        # bound, and if it does not hold any more its pair goes back with the numbers of now
        *_, pair = entry = heapq.heappop(heap)
        left, right = divmod(pair, 1 << 32)
        middle, end = len(tokens[left]), len(tokens[left]) + len(tokens[right])
        where = places[pair][tok[places[pair]] == left]
        where = places[pair] = np.sort(where[tok[where + middle] == right])
        now = (-count[where].sum().item(), where.min(initial=len(tok)).item(), pair)
        if now != entry:
            heapq.heappush(heap, now)
            continue
        if left == right:
            where = every_second(where, middle)
        token = tokens[left] + tokens[right]
        new = ranks.setdefault(token, len(ranks))
        tokens += [token][:len(ranks) - len(tokens)]
        after = where + end
        tok[where + middle] = -1
        tok[where] = new
        previous[after] = where
        before = previous[where][tok[previous[where]] >= 0]
        add(before, tok[before], new)
        # the pair of two new neighbours has just been added, as what stands before the right one
        last = (tok[after] >= 0) & np.append(after[:-1] != where[1:], True)
        add(where[last], new, tok[after[last]])
    return ranks


def load_tokenizer(ranks, pat_str):
    """The tiktoken.Encoding of a tokenizer.tiktoken's text; <|endoftext|> is the id after the last rank."""
    # not by tiktoken.load, which caches by path and could return an older file
    lines = (line.split() for line in ranks.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("the ranks of the tokenizer are not 0, 1, 2, ...: it is damaged")
    special = {EOT: len(ranks)}
    return tiktoken.Encoding("ours", pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special)


def draw_pieces(texts, share):
    """The texts if share is at least 1, else pieces of them, each drawn with that probability."""
    if share >= 1:
        yield from texts
        return
    random_numbers = random.Random(0)
    for text in texts:
        for start in range(0, len(text), PIECE):
            if random_numbers.random() < share:
                yield text[start:start + PIECE]


def count_words(texts, pattern, max_bytes):
    """{word: count} in the order of first occurrence, or None if the words together exceed max_bytes."""
    counts, word_bytes = {}, 0
    for text in texts:
        for match in pattern.finditer(text):
            word = match.group()
            if word in counts:
                counts[word] += 1
                continue
            counts[word] = 1
            word_bytes += len(word.encode())
            if word_bytes > max_bytes:
                return None
    return counts


def sample_words(corpus, pat_str):
    """Count the words of the training text, or of a sample: ({word: count}, the sample's share).

    Text without blanks, such as Chinese, has hardly a word twice: the sample is halved until its words fit.
    """
    pattern = regex.compile(pat_str)
    share = min(1, SAMPLE_BYTES / corpus.train_bytes)
    with Phase("count words") as phase:
        while True:
            texts = draw_pieces(corpus.documents("train"), share)
            counts = count_words(phase.over(texts), pattern, WORD_BYTES)
            if counts is not None:
                break
            share /= 2
        phase.note = f"{len(counts)} different" + (f", in a sample of {share:.1%}" if share < 1 else "")
    return counts, share


def get_gpt2():
    """The {token bytes: rank} and the pre-tokenisation pattern of GPT-2. Raises OSError if out of reach."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise OSError("cannot get the gpt2 tokenizer: set TIKTOKEN_CACHE_DIR to a folder that has it, "
                      f"or use --tokenizer bpe ({error})") from None
    return gpt2._mergeable_ranks, gpt2._pat_str


def learn_bpe(corpus, vocab_size):
    """The {token bytes: rank} of a BPE trained on the training text. Raises ValueError if it has too few."""
    counts, share = sample_words(corpus, PATTERN)
    with Phase("merge pairs"):
        ranks = train_bpe(counts, vocab_size - 1)
    if len(ranks) < vocab_size - 1:
        sample = "text" if share == 1 else f"sample of {share:.1%} of the text"
        raise ValueError(f"vocab_size {vocab_size}: the {sample} supports at most {len(ranks) + 1}")
    return ranks


def batches(texts, n_characters=2**23):
    """The texts in lists of about n_characters together: what write_bin holds in memory."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= n_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_bin(corpus, part, tokenizer, path, dtype, sha):
    """Encode the documents of one part into a new file and the hash sha; returns counts for meta.json."""
    eot = np.array([tokenizer.eot_token], np.uint32)

    def encode(texts):  # runs in threads: tiktoken lets go of Python's lock
        ids = (tokenizer.encode_to_numpy(text, disallowed_special=()) for text in texts)
        return np.concatenate([part for document in ids for part in (document, eot)]).astype(dtype)

    counts, workers = collections.Counter(), os.cpu_count()
    with Phase(f"encode {part}") as phase, open(path, "wb") as file, ThreadPoolExecutor(workers) as pool:
        for batch in batches(corpus.documents(part)):
            for ids in pool.map(encode, (batch[i:i + 8] for i in range(0, len(batch), 8))):
                file.write(ids)
                sha.update(ids)
                counts[f"{part}_tokens"] += len(ids)
            phase.advance(sum(len(text.encode()) for text in batch))
            counts[f"{part}_docs"] += len(batch)
        counts[f"{part}_bytes"] = phase.done
        phase.note = ", ".join(f"{count:,} {name[len(part) + 1:]}" for name, count in counts.items())
    return dict(counts)


@contextlib.contextmanager
def workspace(out_dir):
    """A folder in out_dir for unfinished files, removed at the end; a killed run leaves it to the next one.

    Raises OSError if out_dir cannot be written, or another run that is not over writes to it.
    """
    is_new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    folder = out_dir / ".unfinished"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:  # the system unlocks it when a process ends, however it ends
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another prepare_data.py is writing to {out_dir}: wait for its end") from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if is_new and not any(out_dir.iterdir()):
                out_dir.rmdir()


def prepare(sources, out_dir, tokenizer="bpe", vocab_size=8192, val_fraction=None, site_packages=False):
    """Make the data set of the sources (as on the command line) in out_dir; returns what meta.json holds.

    vocab_size counts <|endoftext|> and is for bpe alone. The files are made in a folder of their own and
    renamed at the end, meta.json last: if anything fails before, what was in out_dir stays as it was.
    Raises ValueError or OSError with a message of one line.
    """
    if tokenizer == "bpe" and vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and <|endoftext|> take 257")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction {val_fraction}: give a number between 0 and 1")
    if site_packages and "python" not in sources:
        raise ValueError("site_packages goes with the source python")
    out_dir = Path(out_dir)
    with workspace(out_dir) as temp:  # first: if it cannot be, nothing has been read in vain
        ranks, pat_str = get_gpt2() if tokenizer == "gpt2" else (BYTES, PATTERN)
        files = [path for source in sources for path in find_files(source, site_packages)]
        corpus = Corpus(files, val_fraction)
        if tokenizer == "bpe":
            ranks = learn_bpe(corpus, vocab_size)
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        ranks_text = "".join(lines)
        encoding = load_tokenizer(ranks_text, pat_str)
        dtype = "<u2" if encoding.n_vocab <= 65536 else "<u4"
        sha = hashlib.sha256(f"{ranks_text}{pat_str}".encode())
        try:
            counts = write_bin(corpus, "train", encoding, temp / "train.bin", dtype, sha)
            counts |= write_bin(corpus, "val", encoding, temp / "val.bin", dtype, sha)
            meta = {
                "source": " ".join(sources) + " --site_packages" * site_packages, "tokenizer": tokenizer,
                "pat_str": pat_str, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
                "dtype": np.dtype(dtype).name, **counts, "skipped": corpus.skipped,
                "duplicates": int(np.count_nonzero(corpus.part == "")), "fingerprint": sha.hexdigest()[:16],
            }
            (temp / "tokenizer.tiktoken").write_bytes(ranks_text.encode())
            (temp / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        except OSError as error:
            raise OSError(f"{error.strerror or error}: {out_dir} is as it was") from error
        for name in ("train.bin", "val.bin", "tokenizer.tiktoken", "meta.json"):
            os.replace(temp / name, out_dir / name)
    return meta


def interrupt_on_signals():
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that unfinished files go."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) is signal.SIG_DFL:  # under nohup it is ignored, and stays so
            signal.signal(number, signal.default_int_handler)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"prepare_data: {message} (--help lists the options)\n")
    parser.add_argument("source", nargs="*", help="python (the default), tinystories, shakespeare, or "
                        "files, folders and globs of .txt, .md, .py and .jsonl, plain or .gz, .xz, .zst")
    parser.add_argument("--tokenizer", choices=["bpe", "gpt2", "bytes"], default="bpe", help="default: bpe")
    parser.add_argument("--vocab_size", type=int, help="of the bpe, <|endoftext|> included; default: 8192")
    parser.add_argument("--out_dir", help="default: data/ and the name of the first source")
    parser.add_argument("--val_fraction", type=float,
                        help="default: 0.05 of the bytes; not for tinystories, which has a file for it")
    parser.add_argument("--site_packages", action="store_true", help="python: the installed packages too")
    args = parser.parse_intermixed_args()
    if args.vocab_size is not None and args.tokenizer != "bpe":
        parser.error(f"--vocab_size is for the bpe; {args.tokenizer} has its own")
    sources = args.source or ["python"]
    plain = Path(*itertools.takewhile(lambda name: not glob.has_magic(name), Path(sources[0]).parts))
    out_dir = args.out_dir or DATA / (plain.resolve().name.split(".")[0] or "text")
    replaces = Path(out_dir, "meta.json").exists()
    vocab_size = 8192 if args.vocab_size is None else args.vocab_size
    interrupt_on_signals()
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may have letters that it lacks
    try:
        meta = prepare(sources, out_dir, args.tokenizer, vocab_size, args.val_fraction, args.site_packages)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare_data: {error}")
    except KeyboardInterrupt:
        print("\nprepare_data: interrupted", file=sys.stderr)
        sys.exit(130)
    n_bytes, n_tokens = (meta[f"train_{unit}"] + meta[f"val_{unit}"] for unit in ("bytes", "tokens"))
    print(f"{n_bytes / n_tokens:.2f} bytes per token, vocabulary {meta['vocab_size']}, "
          f"{meta['skipped']} files skipped (not UTF-8), {meta['duplicates']} duplicates left out")
    flag = "" if Path(out_dir) == DATA / "python" else f" --data_dir={shlex.quote(str(out_dir))}"
    print(f"{'replaced' if replaces else 'wrote'} {out_dir}; next: python train.py{flag}")


if __name__ == "__main__":
    main()
