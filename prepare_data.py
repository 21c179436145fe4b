"""Text in, tokens out: makes data/NAME/ with train.bin, val.bin, tokenizer.tiktoken and meta.json.

    python prepare_data.py                           # the standard library: needs no network
    python prepare_data.py python --site_packages    # and every installed package: data/packages/
    python prepare_data.py tinystories               # or shakespeare; downloaded to data/NAME/
    python prepare_data.py notes.md books 'logs/*.jsonl.gz'    # your own text

A document is a file, a line of a .jsonl file (key "text"), or what stands between <|endoftext|>
lines in a text file. Equal documents are kept once, in train.bin or in val.bin. The .bin files are
raw little-endian token ids, uint16 (uint32 if the vocabulary is above 65536), with <|endoftext|>
after every document. The same text gives the same bytes, whatever the machine.

About 5 % of the bytes are for validation: the documents with the lowest hashes, so the choice
depends on nothing but the text. A document too large for that, such as a single one, gives its end.
"""
import argparse
import base64
import collections
import contextlib
import glob
import gzip
import hashlib
import heapq
import http.client
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import tokenize
import urllib.request
import zlib
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
BYTES = {bytes([byte]): byte for byte in range(256)}  # the ranks that every BPE starts from
VOCAB_SIZE = 4096       # of the bpe, <|endoftext|> included
VAL_FRACTION = 0.05

# Pre-tokenisation, after tiktoken's cl100k_base: words with the one sign or blank before them,
# digits by three, punctuation. Here punctuation and line ends also take the next line's
# indentation, but for the blank that goes with the next word: 8 % fewer tokens on Python code.
# Contractions need no rule: 't is a sign and a letter. The bound of 128 keeps tiktoken's regex
# engine within its stack on long runs of blanks.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?+\p{L}++"
    r"|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+(?:\s{1,128}(?!\S))?"
    r"|[\r\n]++(?:\s{1,128}(?!\S))?"
    r"|\s{1,128}(?!\S)"
    r"|\s"
)

# The BPE is trained on a sample of at most about SAMPLE_BYTES of text. The trainer's memory goes by
# its different words, of whose bytes it takes about 80 times as much, so these are bounded as well.
SAMPLE_BYTES = 40_000_000
WORD_BYTES = 8_000_000
PIECE = 4096  # characters: a sample of less than everything is made of such pieces

TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories-"
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
DOWNLOADS = {
    "tinystories": [TINYSTORIES + "train.txt", TINYSTORIES + "valid.txt"],
    "shakespeare": [CHAR_RNN + "tinyshakespeare/input.txt"],
}
TEXT_FILE = re.compile(r"\.(txt|md|py|jsonl)(\.gz)?$", re.IGNORECASE)
NOT_OURS = ("site-packages", "dist-packages")  # folders below a source that are left out


class Phase:
    """A line of progress: the name, on a terminal the share done, at the end seconds and a note."""

    def __init__(self, name):
        self.name = f"{name:<22}"
        self.note = ""
        self.total = 0  # bytes; 0 if unknown
        self.done = 0
        self.start = time.monotonic()
        self.shown = self.start
        self.on_terminal = sys.stdout.isatty()
        print(self.name, end="", flush=True)

    def advance(self, n_bytes):
        self.done += n_bytes
        if self.on_terminal and time.monotonic() > self.shown + 0.1:
            self.shown = time.monotonic()
            share = f"{self.done / self.total:.0%}" if self.total else f"{self.done / 1e6:.1f} MB"
            print(f"\r{self.name}{share:>8}", end="", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        name = f"\r{self.name}" if self.on_terminal else ""
        print(f"{name}{time.monotonic() - self.start:6.1f} s  {self.note}", flush=True)


# --------------------------------------------------------------------------------------------------
# files and the documents in them


def download(url, path):
    """Download url to path, unless it is there. Raises OSError if that fails or is cut off."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    request = urllib.request.Request(url, headers={"User-Agent": "prepare_data.py"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply, Phase(path.name) as phase:
            phase.total = int(reply.headers.get("Content-Length", 0))
            with open(part, "wb") as file:
                while chunk := reply.read(1 << 18):
                    file.write(chunk)
                    phase.advance(len(chunk))
            phase.note = f"{phase.done / 1e6:.1f} MB"
        if phase.total and phase.done != phase.total:
            raise OSError(f"got {phase.done} of {phase.total} bytes")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise OSError(f"cannot download {url} ({error}): run again, or save it by hand as {path}; "
                      "the source python needs no network") from error
    finally:
        part.unlink(missing_ok=True)


def walk(folder):
    """The text files below a folder, sorted, but those in hidden folders or installed packages."""
    files = []
    for parent, folders, names in os.walk(folder):
        # os.walk goes into what is left in this list
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in NOT_OURS)
        files += [Path(parent, name) for name in sorted(names) if TEXT_FILE.search(name)]
    return files


def find_files(source, site_packages):
    """The files of one source, downloaded if need be. Raises ValueError if there are none."""
    files = []
    if source in DOWNLOADS:
        for url in DOWNLOADS[source]:
            path = DATA / source / url.rpartition("/")[2]
            download(url, path)
            files.append(path)
    elif source == "python":
        folders = ["stdlib", "purelib", "platlib"] if site_packages else ["stdlib"]
        for name in folders:
            files += [path for path in walk(sysconfig.get_path(name)) if path.suffix == ".py"]
    else:
        found = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if not found:
            raise ValueError(f"{source}: no such file, folder or match, and not one of the sources "
                             f"python, {', '.join(DOWNLOADS)}")
        for path in map(Path, found):
            files += walk(path) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{source}: no .txt, .md, .py or .jsonl files in it")
    return files


def kind_of(path):
    """What a file's name says it is: txt, md, py or jsonl; txt if it says none of them."""
    match = TEXT_FILE.search(path.name)
    return match[1].lower() if match else "txt"


def open_text(path):
    """Open a text file, plain or .gz, for reading; \\r\\n stays, a byte order mark goes.

    It is UTF-8, or what the coding line of a .py file names (PEP 263). Raises OSError, or
    UnicodeError if that is no encoding. Reading raises UnicodeError if it is not text, and OSError,
    EOFError or zlib.error if a .gz is damaged.
    """
    path = Path(path)
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    encoding = "utf-8-sig"
    try:
        if kind_of(path) == "py":
            with opener(path, "rb") as file:
                encoding, _ = tokenize.detect_encoding(file.readline)
        return opener(path, "rt", encoding=encoding, newline="\n")  # this newline leaves \r\n alone
    except (SyntaxError, LookupError) as error:
        raise UnicodeError(f"{path}: {error}") from error


def split_documents(file, path):
    """The documents in an open text file, as they are; blank ones too."""
    kind = kind_of(path)
    if kind == "py":
        yield file.read()
    elif kind == "jsonl":
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                text = json.loads(line)["text"]
                # JSON can spell half a surrogate pair, which UTF-8 cannot: it becomes "?"
                yield text.encode("utf-8", "replace").decode()
            except (json.JSONDecodeError, LookupError, TypeError, AttributeError):
                raise ValueError(f"{path}, line {number}: "
                                 'not a JSON object with a string "text"') from None
    else:
        lines = []
        for line in file:
            if line.strip() == EOT:
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
        yield "".join(lines)


def read_documents(path):
    """The documents of one file but blank ones.

    Raises UnicodeError if it is not text, ValueError if a .jsonl file is not one, OSError.
    """
    try:
        with open_text(path) as file:
            for text in split_documents(file, path):
                if text and not text.isspace():
                    yield text
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
        raise OSError(f"cannot read {path}: {error}") from error


# --------------------------------------------------------------------------------------------------
# training and validation


def choose_parts(sizes, val_fraction):
    """The part, "train", "val" or "cut", of documents of these sizes in bytes, lowest hash first.

    Validation gets the first documents, until it has about val_fraction of the bytes. A document
    larger than the smaller part should be is cut instead and gives val_fraction of itself. So the
    sum is off by at most half of what the smaller part should be. Nothing under 5 bytes is cut.
    """
    largest = max(4, min(val_fraction, 1 - val_fraction) * sum(sizes))
    parts = ["cut" if size > largest else "train" for size in sizes]
    whole = [i for i, part in enumerate(parts) if part == "train"]
    reached = np.cumsum([0] + [sizes[i] for i in whole])  # by the first 0, 1, 2, ... of them
    n_val = int(np.abs(reached - val_fraction * reached[-1]).argmin())
    if "cut" not in parts:  # neither part may be empty
        n_val = max(1, min(n_val, len(whole) - 1))
    for i in whole[:n_val]:
        parts[i] = "val"
    return parts


def cut_end(text, val_fraction):
    """A text without its end, and the end: about val_fraction of the bytes, each not empty."""
    data = text.encode()
    n_train = len(data) - max(1, round(val_fraction * len(data)))
    beginning = data[:n_train].decode("utf-8", "ignore") or text[0]  # "ignore": no half characters
    return beginning, text[len(beginning):]


class Corpus:
    """Which files are text and which part each document belongs to.

    Files that are not text and repeated documents are left out. Validation is TinyStories-valid.txt
    if it is there, else what choose_parts says. The text is read again in every pass.

    Attributes: files; part, an array with "train", "val", "cut" or "" (a repeated document) for
    every document in reading order; train_bytes; skipped, the number of files that are not text.
    """

    def __init__(self, files, val_fraction=None):
        """Reads everything once. Raises ValueError if there is too little text, and as below."""
        validation = [path for path in files if path.match("tinystories/TinyStories-valid.txt")]
        if validation and val_fraction is not None:
            raise ValueError(f"val_fraction {val_fraction}: {validation[0]} is the validation text")
        self.val_fraction = VAL_FRACTION if val_fraction is None else val_fraction
        files = list(dict.fromkeys(validation + files))  # first: of equal documents the first stays
        self.files = []
        hashes = array("Q")
        sizes = array("Q")  # bytes of UTF-8
        n_validation = 0
        with Phase("read") as phase:
            for path in files:
                start = len(hashes)
                try:
                    for text in read_documents(path):
                        data = text.encode()
                        # of 64 bits: two million documents have a false duplicate once in 10^7
                        digest = hashlib.sha256(data).digest()
                        hashes.append(int.from_bytes(digest[:8], "little"))
                        sizes.append(len(data))
                        phase.advance(len(data))
                    self.files.append(path)
                except UnicodeError:
                    del hashes[start:], sizes[start:]
                if path in validation:
                    n_validation = len(hashes)
            phase.note = f"{len(hashes)} documents in {len(self.files)} files"
        self.skipped = len(files) - len(self.files)
        sizes = np.array(sizes)
        # where each different hash first occurs, lowest hash first
        _, kept = np.unique(np.array(hashes), return_index=True)
        if n_validation:
            parts = np.where(kept < n_validation, "val", "train")
        else:
            parts = choose_parts(sizes[kept].tolist(), self.val_fraction)
        self.part = np.full(len(hashes), "", "<U5")
        self.part[kept] = parts
        if "cut" not in parts and not ("train" in parts and "val" in parts):
            raise ValueError("too little text for training and validation: "
                             f"{sizes[kept].sum()} bytes in {len(files)} files, "
                             f"{self.skipped} of them not UTF-8")
        cut_bytes = sizes[self.part == "cut"].sum() * (1 - self.val_fraction)
        self.train_bytes = int(sizes[self.part == "train"].sum() + cut_bytes)

    def documents(self, wanted):
        """The texts of one part, "train" or "val", in reading order."""
        texts = itertools.chain.from_iterable(map(read_documents, self.files))
        for part, text in itertools.zip_longest(self.part.tolist(), texts):
            if part is None or text is None:
                raise ValueError("a file has changed since it was first read: run again")
            if part == "cut":
                beginning, end = cut_end(text, self.val_fraction)
                yield beginning if wanted == "train" else end
            elif part == wanted:
                yield text


# --------------------------------------------------------------------------------------------------
# the tokenizer


def draw_pieces(texts, share):
    """The texts if share is 1, else pieces of them, each drawn with that probability."""
    if share == 1:
        yield from texts
        return
    generator = random.Random(0)
    for text in texts:
        for start in range(0, len(text), PIECE):
            if generator.random() < share:
                yield text[start:start + PIECE]


def count_words(texts, max_bytes):
    """{word: count} in the order of first occurrence, or None if the words exceed max_bytes."""
    pattern = regex.compile(PATTERN)
    counts = {}
    word_bytes = 0
    for text in texts:
        for match in pattern.finditer(text):
            # The time of a merge goes by the length of the words that have the pair, so a word
            # without an end, such as a genome, is cut.
            for start in range(match.start(), match.end(), PIECE):
                word = text[start:min(start + PIECE, match.end())]
                if word in counts:
                    counts[word] += 1
                    continue
                counts[word] = 1
                word_bytes += len(word.encode())
                if word_bytes > max_bytes:
                    return None
    return counts


def sample_words(corpus):
    """Count the words of the training text, or of a sample: ({word: count}, the sample's share).

    Text without blanks, such as Chinese, has hardly a word twice: the sample is halved until its
    different words fit into WORD_BYTES.
    """
    share = min(1, SAMPLE_BYTES / corpus.train_bytes)
    with Phase("count words") as phase:
        counts = count_words(draw_pieces(corpus.documents("train"), share), WORD_BYTES)
        while counts is None:
            share /= 2
            counts = count_words(draw_pieces(corpus.documents("train"), share), WORD_BYTES)
        phase.note = f"{len(counts)} different"
        if share < 1:
            phase.note += f", in pieces drawn from all documents, {share:.1%} of the text"
    return counts, share


def pairs_of(word):
    """The pairs of neighbours in a word: "abc" -> "ab", "bc"."""
    return map(str.__add__, word, word[1:])


def count_pairs(words, counts):
    """Of each pair how often it occurs, and the numbers of the words that have it: two dicts.

    counts says of each word how often it occurs in the text.
    """
    totals = collections.defaultdict(int)
    where = collections.defaultdict(list)
    for number, word in enumerate(words):
        for pair in pairs_of(word):
            totals[pair] += counts[number]
            where[pair].append(number)
    return totals, where


def first_place(pair, numbers, words, tokens):
    """Where a pair first occurs in the words of these numbers: (number of the word, byte in it)."""
    for number in sorted(set(numbers)):
        position = words[number].find(pair)
        if position >= 0:
            before = words[number][:position]
            return number, sum(len(tokens[ord(char)]) for char in before)


def merge(word, pair, token):
    """Put a token where a pair stands in a word: (the new word, [(old pair, new pair), ...]).

    The list has every neighbour pair that changes, once for each time it does:
    merge("xabyab", "ab", "Z") == ("xZyZ", [("xa", "xZ"), ("by", "Zy"), ("ya", "yZ")]).
    """
    left, right = pair
    changes = []
    rest = word.split(pair)  # what stands before, between and after the places of the pair
    for i in range(1, len(rest)):
        if rest[i - 1]:
            before = rest[i - 1][-1]
            changes.append((before + left, before + token))
        elif i > 1:  # two places side by side
            changes.append((right + left, token + token))
        if rest[i]:
            after = rest[i][0]
            changes.append((right + after, token + after))
    return token.join(rest), changes


def train_bpe(word_counts, vocab_size):
    """Byte-pair encoding: {word: count} in the order of first occurrence -> {token bytes: rank}.

    Starts from the 256 bytes and merges the most frequent pair of neighbours, again and again:

        words (count)          the most frequent pair
        a b c (3)  a b (2)     ab 5 times, bc 3 times: ab becomes a token
        ab c (3)   ab (2)      abc 3 times
        abc (3)    ab (2)      no pair is left: the ranks end with ..., ab: 256, abc: 257

    Of equally frequent pairs the first in the text is merged. These are the tokens of tiktoken's
    `_educational.bpe_train`, in the same order. A pair that spells a token which is there already
    is merged into it, without a new rank. Returns fewer ranks when no pair is left.
    """
    ranks = dict(BYTES)
    tokens = list(ranks)
    # A word is a string in which the character of code i stands for token i, and a pair is two such
    # characters: so str.split and join do the merging, at their speed.
    words = [word.encode().decode("latin-1") for word in word_counts]
    counts = list(word_counts.values())
    totals, where = count_pairs(words, counts)
    # The pairs that may be next: (-total, place, pair). Merges take from the totals of other pairs
    # and move their first places back; their entries stay as they are, and are corrected when they
    # come up. (0, 0) stands for a place that is not known yet.
    heap = [(-total, (0, 0), pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size:
        total, place, pair = heapq.heappop(heap)
        if totals[pair] == 0:
            continue
        if -total != totals[pair]:
            heapq.heappush(heap, (-totals[pair], (0, 0), pair))
            continue
        first = first_place(pair, where[pair], words, tokens)
        if place != first:
            heapq.heappush(heap, (total, first, pair))
            continue

        spelling = tokens[ord(pair[0])] + tokens[ord(pair[1])]
        if spelling not in ranks:
            ranks[spelling] = len(tokens)
            tokens.append(spelling)
        token = chr(ranks[spelling])
        new_pairs = set()
        for number in set(where.pop(pair)):
            words[number], changes = merge(words[number], pair, token)
            for old, new in changes:
                totals[old] -= counts[number]
                totals[new] += counts[number]
                where[new].append(number)
                new_pairs.add(new)
        del totals[pair]
        for new in new_pairs:
            heapq.heappush(heap, (-totals[new], (0, 0), new))
    return ranks


def learn_bpe(corpus, vocab_size):
    """Ranks, {token bytes: rank}, from the training text. Raises ValueError if that has too few."""
    counts, share = sample_words(corpus)
    with Phase("merge pairs"):
        ranks = train_bpe(counts, vocab_size - 1)
    if len(ranks) < vocab_size - 1:
        sample = "text" if share == 1 else f"sample of {share:.1%} of the text"
        raise ValueError(f"vocab_size {vocab_size}: the {sample} supports at most {len(ranks) + 1}")
    return ranks


def get_gpt2():
    """The ranks and the pattern of GPT-2's tokenizer. Raises OSError if they are out of reach."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise OSError("cannot get the gpt2 tokenizer: set TIKTOKEN_CACHE_DIR to a folder that has "
                      f"it, or use --tokenizer bpe ({error})") from error
    return gpt2._mergeable_ranks, gpt2._pat_str


def dump_ranks(ranks):
    """The text of a tokenizer.tiktoken: a line per token, its bytes in base64 and its rank."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    return "".join(lines)


def load_tokenizer(ranks, pat_str):
    """The tiktoken.Encoding of a tokenizer.tiktoken's text; <|endoftext|> is the last id.

    Raises ValueError if the text is damaged.
    """
    # not by tiktoken.load, which caches by path and could return an older file
    lines = (line.split() for line in ranks.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("the ranks of the tokenizer are not 0, 1, 2, ...: it is damaged")
    special = {EOT: len(ranks)}
    return tiktoken.Encoding("ours", pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special)


# --------------------------------------------------------------------------------------------------
# the data set


def batches(texts, n_characters=2**23):
    """The texts in lists of about n_characters together: what write_bin holds in memory."""
    batch = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= n_characters:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def write_bin(corpus, part, tokenizer, path, dtype, sha):
    """Encode the documents of one part into a new file and the hash sha; returns their counts."""
    eot = np.array([tokenizer.eot_token], np.uint32)

    def encode(texts):  # runs in threads: tiktoken lets go of Python's lock
        ids = []
        for text in texts:
            ids += [tokenizer.encode_to_numpy(text, disallowed_special=()), eot]
        return np.concatenate(ids).astype(dtype)

    n_tokens = 0
    n_docs = 0
    with Phase(f"encode {part}") as phase, open(path, "wb") as file, ThreadPoolExecutor() as pool:
        for batch in batches(corpus.documents(part)):
            groups = [batch[i:i + 8] for i in range(0, len(batch), 8)]
            for ids in pool.map(encode, groups):
                file.write(ids)
                sha.update(ids)
                n_tokens += len(ids)
            n_docs += len(batch)
            phase.advance(sum(len(text.encode()) for text in batch))
        phase.note = f"{n_tokens:,} tokens, {n_docs:,} docs, {phase.done:,} bytes"
    return {f"{part}_tokens": n_tokens, f"{part}_docs": n_docs, f"{part}_bytes": phase.done}


@contextlib.contextmanager
def workspace(out_dir):
    """A folder in out_dir for unfinished files; a killed run leaves it to the next one.

    Raises OSError if out_dir cannot be written, or another run that is not over writes to it.
    """
    is_new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    folder = out_dir / ".unfinished"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:  # the system unlocks it however the process ends
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another prepare_data.py is writing to {out_dir}: wait for it") from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if is_new and not any(out_dir.iterdir()):
                out_dir.rmdir()


def prepare(sources, out_dir, tokenizer="bpe", vocab_size=VOCAB_SIZE, val_fraction=None,
            site_packages=False):
    """Make the data set of the sources (as on the command line) in out_dir.

    tokenizer is "bpe", "gpt2" or "bytes"; vocab_size counts <|endoftext|> and is for "bpe" alone.
    The files are made in a folder of their own and renamed at the end, meta.json last: if anything
    fails before, what was in out_dir stays as it was, and who has the old files open keeps them.
    Returns what meta.json holds. Raises ValueError or OSError with a message of one line.
    """
    if tokenizer == "bpe" and not 257 <= vocab_size <= 2**20:
        raise ValueError(f"vocab_size {vocab_size}: give 257 (256 bytes and {EOT}) to {2**20}")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction {val_fraction}: give a number between 0 and 1")
    if site_packages and "python" not in sources:
        raise ValueError("site_packages goes with the source python")
    out_dir = Path(out_dir)
    with workspace(out_dir) as folder:  # what can fail at once comes before the reading
        ranks, pat_str = get_gpt2() if tokenizer == "gpt2" else (BYTES, PATTERN)
        files = []
        for source in sources:
            files += find_files(source, site_packages)
        corpus = Corpus(files, val_fraction)
        if tokenizer == "bpe":
            ranks = learn_bpe(corpus, vocab_size)
        meta = {
            "source": " ".join(sources) + (" --site_packages" if site_packages else ""),
            "tokenizer": tokenizer, "pat_str": pat_str,
        }
        try:
            meta |= write_files(corpus, dump_ranks(ranks), pat_str, folder)
            (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        except OSError as error:
            raise OSError(f"{error.strerror or error}: {out_dir} is as it was") from error
        for name in ("train.bin", "val.bin", "tokenizer.tiktoken", "meta.json"):
            os.replace(folder / name, out_dir / name)
    return meta


def write_files(corpus, ranks_text, pat_str, folder):
    """Write train.bin, val.bin and tokenizer.tiktoken; returns what meta.json says of them."""
    encoding = load_tokenizer(ranks_text, pat_str)
    dtype = np.dtype("<u2" if encoding.n_vocab <= 65536 else "<u4")
    sha = hashlib.sha256(f"{ranks_text}{pat_str}".encode())
    train_counts = write_bin(corpus, "train", encoding, folder / "train.bin", dtype, sha)
    val_counts = write_bin(corpus, "val", encoding, folder / "val.bin", dtype, sha)
    (folder / "tokenizer.tiktoken").write_bytes(ranks_text.encode())
    return {
        "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, "dtype": dtype.name,
        **train_counts, **val_counts, "skipped": corpus.skipped,
        "duplicates": int(np.count_nonzero(corpus.part == "")),
        "fingerprint": sha.hexdigest()[:16],
    }


# --------------------------------------------------------------------------------------------------
# the command


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"prepare_data: {message} (--help lists the options)\n")


def parse_arguments():
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="*",
                        help="python (the default), tinystories, shakespeare, or files, folders "
                        "and globs of .txt, .md, .py and .jsonl, plain or .gz")
    parser.add_argument("--tokenizer", choices=["bpe", "gpt2", "bytes"], default="bpe",
                        help="default: bpe")
    parser.add_argument("--vocab_size", type=int,
                        help=f"of the bpe, {EOT} included; default: {VOCAB_SIZE}")
    parser.add_argument("--out_dir", help="default: data/ and the name of the first source; "
                        "data/packages with --site_packages")
    parser.add_argument("--val_fraction", type=float,
                        help=f"share of the bytes, default: {VAL_FRACTION}; not for tinystories, "
                        "which has a file for it")
    parser.add_argument("--site_packages", action="store_true",
                        help="python: the installed packages too")
    args = parser.parse_intermixed_args()
    if args.vocab_size is not None and args.tokenizer != "bpe":
        parser.error(f"--vocab_size is for the bpe; {args.tokenizer} has its own")
    if args.vocab_size is None:
        args.vocab_size = VOCAB_SIZE
    if not args.source:
        args.source = ["python"]
    if args.out_dir is None and args.site_packages:
        args.out_dir = DATA / "packages"
    elif args.out_dir is None:
        # the name of a glob is that of the folder before its first part with a * or ?
        parts = Path(args.source[0]).parts
        plain = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
        args.out_dir = DATA / (plain.resolve().name.split(".")[0] or "text")
    return args


def interrupt_on_signals():
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that unfinished files go."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it: so it stays
            signal.signal(number, signal.default_int_handler)


def main():
    args = parse_arguments()
    interrupt_on_signals()
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may have letters it lacks
    replaces = Path(args.out_dir, "meta.json").exists()
    try:
        meta = prepare(args.source, args.out_dir, args.tokenizer, args.vocab_size,
                       args.val_fraction, args.site_packages)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare_data: {error}")
    except KeyboardInterrupt:
        print("\nprepare_data: interrupted", file=sys.stderr)
        sys.exit(130)
    n_bytes = meta["train_bytes"] + meta["val_bytes"]
    n_tokens = meta["train_tokens"] + meta["val_tokens"]
    print(f"{n_bytes / n_tokens:.2f} bytes per token, vocabulary {meta['vocab_size']}, "
          f"{meta['skipped']} files skipped (not UTF-8), {meta['duplicates']} duplicates left out")
    done = "replaced" if replaces else "wrote"
    folder = shlex.quote(str(args.out_dir))
    print(f"{done} {args.out_dir}; next: python train.py --data_dir={folder}")


if __name__ == "__main__":
    main()
