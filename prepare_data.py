# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "tiktoken", "pyarrow"]
# ///
"""Text in, tokens out: writes train.bin, val.bin, tokenizer.tiktoken, meta.json.

    python prepare_data.py                          # Python's standard library
    python prepare_data.py python --site_packages   # and the installed packages
    python prepare_data.py tinystories              # or shakespeare: a download
    python prepare_data.py slimpajama --shards=14 --tokenizer=gpt2
    python prepare_data.py notes.md books logs/*.jsonl.gz --out_dir=data/mine

Your own text may be .txt, .md, .py and .jsonl files, plain, .gz or .zst, and
.parquet files. A document is a .py file, a line of a .jsonl file (key "text"),
a row of a .parquet file (column "text"), or what stands between the lines
<|endoftext|> of any other file. Of equal documents only the first is kept.

The .bin files hold token ids as raw little-endian uint16 (uint32 if there are
more than 65536), with <|endoftext|> after every document. The same text gives
the same bytes on any machine.

About 5 % of the bytes are for validation: the documents with the lowest hashes,
so that the choice depends on nothing but the text. A document that is too large
for this, such as a single one, gives its end instead.
"""
import argparse
import base64
import collections
import gzip
import hashlib
import heapq
import io
import itertools
import json
import os
import random
import re
import shlex
import signal
import socket
import sysconfig
import tempfile
import tokenize
import urllib.request
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np
import regex  # comes with tiktoken
import tiktoken

DATA = Path("data")
EOT = "<|endoftext|>"
BYTES = {bytes([byte]): byte for byte in range(256)}  # the ranks that every BPE starts from
VOCAB_SIZE = 4096       # of the bpe, <|endoftext|> included
VAL_FRACTION = 0.05

# Pre-tokenisation, after tiktoken's cl100k_base: a word with the one sign or blank before it,
# digits by three, punctuation. Unlike there, punctuation and line ends also take the indentation
# of the next line, except for its last blank, which goes with the next word: 8 % fewer tokens on
# Python code. Contractions need no rule: 't is a sign and a letter. The bound of 128 keeps
# tiktoken's regex engine within its stack on long runs of blanks.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?+\p{L}++"
    r"|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+(?:\s{1,128}(?!\S))?"
    r"|[\r\n]++(?:\s{1,128}(?!\S))?"
    r"|\s{1,128}(?!\S)"
    r"|\s"
)

# The BPE learns from a sample of about SAMPLE_BYTES of the text. The trainer needs about 80 bytes
# of memory for each byte of its different words, so these are bounded as well.
SAMPLE_BYTES = 40_000_000
WORD_BYTES = 8_000_000
PIECE = 4096            # characters: a sample consists of such pieces of the documents

HUGGINGFACE = "https://huggingface.co/datasets/"
# Source: the address of its folder and the names of its files. Of slimpajama's training files the
# first --shards are added.
DOWNLOADS = {
    "tinystories": (HUGGINGFACE + "roneneldan/TinyStories/resolve/main/",
                    ["TinyStories-train.txt", "TinyStories-valid.txt"]),
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                    "tinyshakespeare/", ["input.txt"]),
    "slimpajama": (HUGGINGFACE + "DKYoon/SlimPajama-6B/resolve/refs%2Fconvert%2Fparquet/default/",
                   ["validation/0000.parquet"]),
}
# The downloads that are the validation text of their source.
VALIDATION = ["tinystories/TinyStories-valid.txt", "slimpajama/validation/0000.parquet"]


# --------------------------------------------------------------------------------------------------
# files


def import_pyarrow() -> ModuleType:
    """pyarrow, which only .parquet and .zst files need."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise SystemExit("prepare_data.py: .parquet and .zst need pyarrow: "
                         "pip install pyarrow") from None
    return pyarrow


def download(url: str, path: Path) -> None:
    """Download url to path, unless it is there. Ends the program if that fails or is cut off."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    print(f"downloading {url}")
    socket.setdefaulttimeout(30)
    try:
        urllib.request.urlretrieve(url, part)  # checks the size; its errors are OSErrors
        os.replace(part, path)
    except OSError as error:
        raise SystemExit(f"prepare_data.py: {url}: {error}; run again, or save it as "
                         f"{str(path)!r}") from error


def walk(folder: str | Path) -> list[Path]:
    """The text files below a folder, sorted, without hidden folders and installed packages."""
    files = []
    installed = ("site-packages", "dist-packages")
    for parent, folders, names in os.walk(folder):
        # os.walk goes into what is left in this list
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in installed)
        files += [Path(parent, name) for name in sorted(names) if TEXT_FILE.search(name)]
    return files


def find_files(source: str, site_packages: bool, shards: int) -> list[Path]:
    """The files of one source, downloaded if need be. Ends the program if there is no such one."""
    files = []
    path = Path(source).expanduser()
    if source == "python":
        folders = [sysconfig.get_path("stdlib")]
        if site_packages:
            # in most installations the same folder
            folders += sorted({os.path.realpath(sysconfig.get_path(name))
                               for name in ("purelib", "platlib")})
        for folder in folders:
            files += [path for path in walk(folder) if path.suffix == ".py"]
    elif source in DOWNLOADS:
        base, names = DOWNLOADS[source]
        if source == "slimpajama":
            import_pyarrow()  # before the download
            names = names + [f"train/{shard:04}.parquet" for shard in range(shards)]
        for name in names:
            path = DATA / source / name
            download(base + name, path)
            files.append(path)
    elif path.is_dir():
        files = walk(path)
    elif path.exists():
        files = [path]
    else:
        raise SystemExit(f"prepare_data.py: {source!r} is no file, no folder, none of python, "
                         f"{', '.join(DOWNLOADS)}")
    return files


# --------------------------------------------------------------------------------------------------
# the documents in a file: a reader for each kind


def open_binary(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".zst":
        return import_pyarrow().input_stream(path, compression="zstd")
    return open(path, "rb")


def open_text(path: Path) -> io.TextIOWrapper:
    """Open a UTF-8 file for reading; \\r\\n stays, a byte order mark goes."""
    return io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="\n")


def read_text(path: Path) -> Iterator[str]:
    """What stands between lines that are <|endoftext|>; without any, the file is one document."""
    lines = []
    with open_text(path) as file:
        for line in file:
            lines.append(line)
            if line.strip() == EOT:
                yield "".join(lines[:-1])
                lines = []
    yield "".join(lines)


def read_python(path: Path) -> Iterator[str]:
    """A .py file is one document, in the encoding that its coding line names (PEP 263)."""
    with open_binary(path) as file:
        encoding, first_lines = tokenize.detect_encoding(file.readline)
        yield (b"".join(first_lines) + file.read()).decode(encoding)


def read_jsonl(path: Path) -> Iterator[str]:
    """The "text" of each line. Raises KeyError, TypeError or ValueError if a line has none."""
    with open_text(path) as file:
        for line in file:
            if not line.isspace():
                text = json.loads(line)["text"]
                # JSON can spell half a surrogate pair, which UTF-8 cannot: it becomes "?".
                yield text.encode("utf-8", "replace").decode()


def read_parquet(path: Path) -> Iterator[str]:
    """The column "text". Raises KeyError if there is none, ValueError if the file is damaged."""
    parquet = import_pyarrow().parquet
    # read through a buffer, not a whole row group at once
    with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=256, columns=["text"]):
            yield from batch.column("text").to_pylist()


READERS = {"txt": read_text, "md": read_text, "py": read_python, "jsonl": read_jsonl,
           "parquet": read_parquet}
TEXT_FILE = re.compile(rf"\.({'|'.join(READERS)})(\.gz|\.zst)?$", re.IGNORECASE)


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file that are not blank.

    Raises UnicodeError if it is not text, SyntaxError if the coding line of a .py file is wrong.
    """
    reader = read_text
    if match := TEXT_FILE.search(path.name):
        reader = READERS[match[1].lower()]
    for text in reader(path):
        if text and not text.isspace():
            yield text


# --------------------------------------------------------------------------------------------------
# training and validation


def choose_parts(sizes: np.ndarray, val_fraction: float) -> np.ndarray:
    """The part, "train", "val" or "cut", of documents of these sizes in bytes, lowest hash first.

    Validation gets the first documents, until it has about val_fraction of the bytes. A document
    larger than the smaller part should be is cut instead and gives val_fraction of itself. So the
    sum is off by at most half of what the smaller part should be. Nothing under 5 bytes is cut.
    """
    largest = max(4, min(val_fraction, 1 - val_fraction) * sizes.sum())
    parts = np.where(sizes > largest, "cut", "train")
    whole = np.flatnonzero(sizes <= largest)
    reached = np.append(0, sizes[whole].cumsum())  # by the first 0, 1, 2, ... of them
    n_val = np.abs(reached - val_fraction * reached[-1]).argmin()
    if len(whole) == len(sizes):  # neither part may be empty
        n_val = max(1, min(n_val, len(whole) - 1))
    parts[whole[:n_val]] = "val"
    return parts


def cut_end(text: str, val_fraction: float) -> tuple[str, str]:
    """A text without its end, and the end: about val_fraction of the bytes, each not empty."""
    data = text.encode()
    n_train = len(data) - max(1, round(val_fraction * len(data)))
    beginning = data[:n_train].decode("utf-8", "ignore") or text[0]  # "ignore": no half characters
    return beginning, text[len(beginning):]


class Corpus:
    """Which files are text, and which part each document belongs to.

    Files that are not text and repeated documents are left out. Validation is the documents of
    the VALIDATION files if there are any, else what choose_parts says. The text is read again in
    every pass.

    Attributes: files; part, an array with "train", "val", "cut" or "" (a repeated document) for
    every document in reading order; train_bytes; skipped, the number of files that are not text.
    """

    def __init__(self, files: list[Path], val_fraction: float):
        """Reads everything once. Ends the program if a file is damaged or there is too little."""
        print(f"reading {len(files)} files")
        validation = [path for path in files if any(path.match(name) for name in VALIDATION)]
        self.val_fraction = val_fraction
        self.files = []
        hashes = array("Q")
        sizes = array("Q")  # bytes of UTF-8
        n_validation = 0
        # validation first: of equal documents the first one stays
        for path in sorted(files, key=lambda path: path not in validation):
            start = len(hashes)
            try:
                for text in read_documents(path):
                    data = text.encode()
                    # of 64 bits: two million documents have a false duplicate once in 10^7
                    digest = hashlib.sha256(data).digest()
                    hashes.append(int.from_bytes(digest[:8], "little"))
                    sizes.append(len(data))
                self.files.append(path)
            except (UnicodeError, SyntaxError):  # the latter: a coding line without sense
                del hashes[start:]
                del sizes[start:]
            except Exception as error:  # it is damaged, or not what its name says
                raise SystemExit(f"prepare_data.py: {str(path)!r}, document "
                                 f"{len(hashes) - start + 1}: {error!r}") from error
            if path in validation:
                n_validation = len(hashes)
        self.skipped = len(files) - len(self.files)

        sizes = np.array(sizes, np.int64)
        # where each different hash first occurs, lowest hash first
        _, kept = np.unique(np.array(hashes), return_index=True)
        if n_validation:
            parts = np.where(kept < n_validation, "val", "train")
        else:
            parts = choose_parts(sizes[kept], val_fraction)
        self.part = np.full(len(hashes), "", "<U5")
        self.part[kept] = parts
        cut_bytes = sizes[self.part == "cut"].sum() * (1 - val_fraction)
        self.train_bytes = int(sizes[self.part == "train"].sum() + cut_bytes)
        if (parts == "val").all():  # otherwise neither part is empty
            raise SystemExit(f"prepare_data.py: too little text: {len(kept)} documents, "
                             f"{self.skipped} files that are not UTF-8")

    def documents(self, wanted: str) -> Iterator[str]:
        """The texts of one part, "train" or "val", in reading order.

        Raises ValueError if there are other documents than when they were first read.
        """
        texts = itertools.chain.from_iterable(map(read_documents, self.files))
        for part, text in zip(self.part, texts, strict=True):
            if part == "cut":
                beginning, end = cut_end(text, self.val_fraction)
                yield beginning if wanted == "train" else end
            elif part == wanted:
                yield text


# --------------------------------------------------------------------------------------------------
# the tokenizer


def draw_pieces(texts: Iterator[str], share: float) -> Iterator[str]:
    """The texts if share is 1, else pieces of them, each drawn with that probability."""
    generator = random.Random(0)
    for text in texts:
        length = len(text) if share == 1 else PIECE
        for start in range(0, len(text), length):
            if generator.random() < share:
                yield text[start:start + length]


def count_words(texts: Iterator[str]) -> dict[str, int] | None:
    """{word: count} in the order of first occurrence, or None if the words exceed WORD_BYTES."""
    pattern = regex.compile(PATTERN)
    counts = {}
    word_bytes = 0
    for text in texts:
        for match in pattern.finditer(text):
            # The time of a merge goes by the length of the words that have the pair, so a word
            # without an end, such as a genome, is cut.
            for start in range(match.start(), match.end(), PIECE):
                word = text[start:min(start + PIECE, match.end())]
                if word not in counts:
                    counts[word] = 0
                    word_bytes += len(word.encode())
                counts[word] += 1
        if word_bytes > WORD_BYTES:
            return None
    return counts


def sample_words(corpus: Corpus) -> dict[str, int]:
    """Count the words of the training text, or of a sample of it: {word: count}.

    Text without blanks, such as Chinese, has hardly a word twice: the sample is halved until its
    different words fit into WORD_BYTES.
    """
    share = min(1, SAMPLE_BYTES / corpus.train_bytes)
    while (counts := count_words(draw_pieces(corpus.documents("train"), share))) is None:
        share /= 2
    return counts


def first_place(pair: str, numbers: list, words: list, tokens: list) -> tuple:
    """Where a pair first occurs in the words of these numbers: (number of the word, byte in it)."""
    for number in sorted(set(numbers)):
        position = words[number].find(pair)
        if position >= 0:
            before = words[number][:position]
            return number, sum(len(tokens[ord(char)]) for char in before)


def merge(word: str, pair: str, token: str) -> tuple:
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


def train_bpe(word_counts: dict[str, int], vocab_size: int) -> dict[bytes, int]:
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
    totals = collections.defaultdict(int)  # of each pair: how often it occurs
    where = collections.defaultdict(list)  # and the numbers of the words that have it, or had it
    for number, word in enumerate(words):
        for pair in map(str.__add__, word, word[1:]):  # "abc" -> "ab", "bc"
            totals[pair] += counts[number]
            where[pair].append(number)
    # The pairs that may be next: (-total, place, pair). Merges take from the totals of other pairs
    # and move their first places back; their entries stay as they are, and are corrected when they
    # come up. (0, 0) stands for a place that is not known yet.
    heap = [(-total, (0, 0), pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size:
        entry = heapq.heappop(heap)
        pair = entry[2]
        if totals[pair] == 0:
            continue
        today = (-totals[pair], first_place(pair, where[pair], words, tokens), pair)
        if entry != today:
            heapq.heappush(heap, today)
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


def load_tokenizer(ranks: str, pat_str: str) -> tiktoken.Encoding:
    """The encoding of a tokenizer.tiktoken's text; <|endoftext|> is the last id.

    Raises ValueError if the text is damaged.
    """
    rank_of = {}
    for rank, line in enumerate(ranks.splitlines()):
        token, number = line.split()
        if int(number) != rank:  # tiktoken would end the program
            raise ValueError(f"the tokenizer is damaged in line {rank + 1}")
        rank_of[base64.b64decode(token)] = rank
    return tiktoken.Encoding("ours", pat_str=pat_str, mergeable_ranks=rank_of,
                             special_tokens={EOT: len(rank_of)})


# --------------------------------------------------------------------------------------------------
# the data set


def write_bin(texts: Iterator[str], path: Path, tokenizer: tiktoken.Encoding, dtype: np.dtype,
              sha: "hashlib._Hash") -> dict:
    """Encode texts into a new file and the hash sha; returns the counts for meta.json."""
    n_docs = 0
    n_bytes = 0

    def encode(text: str) -> np.ndarray:  # runs in threads: tiktoken lets go of Python's lock
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())
        return np.append(ids.astype(dtype), dtype.type(tokenizer.eot_token))

    with open(path, "wb") as file, ThreadPoolExecutor() as pool:
        while batch := list(itertools.islice(texts, 128)):  # the documents in memory
            for ids in pool.map(encode, batch):
                file.write(ids)
                sha.update(ids)
            n_docs += len(batch)
            n_bytes += sum(len(text.encode()) for text in batch)
        n_tokens = file.tell() // dtype.itemsize
    print(f"{path.name}: {n_tokens:,} tokens, {n_docs:,} documents, {n_bytes:,} bytes")
    return {f"{path.stem}_tokens": n_tokens, f"{path.stem}_docs": n_docs,
            f"{path.stem}_bytes": n_bytes}


def prepare(sources: list[str], out_dir: str | Path, tokenizer: str = "bpe",
            vocab_size: int = VOCAB_SIZE, val_fraction: float = VAL_FRACTION,
            site_packages: bool = False, shards: int = 14) -> dict:
    """Make the data set of the sources (as on the command line) in out_dir.

    tokenizer is "bpe", "gpt2" or "bytes"; vocab_size counts <|endoftext|> and is for "bpe" alone,
    which has fewer tokens if the text has no more pairs to merge.
    The files are made in a folder of their own and renamed at the end, meta.json last: if anything
    fails before, what was in out_dir stays as it was, and who has the old files open keeps them.
    Returns what meta.json holds. Raises OSError if out_dir cannot be written or the disk is full;
    a mistake in the arguments ends the program.
    """
    if not 0 < val_fraction < 1:
        raise SystemExit(f"prepare_data.py: --val_fraction={val_fraction} must lie in (0, 1)")
    out_dir = Path(out_dir).expanduser()
    out_dir.mkdir(parents=True, exist_ok=True)
    # what can fail at once comes before the reading
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out_dir) as name:
        folder = Path(name)
        ranks = BYTES
        pat_str = PATTERN
        if tokenizer == "gpt2":
            gpt2 = tiktoken.get_encoding("gpt2")
            ranks = gpt2._mergeable_ranks
            pat_str = gpt2._pat_str
        files = []
        for source in sources:
            files += find_files(source, site_packages, shards)
        corpus = Corpus(files, val_fraction)
        if tokenizer == "bpe":
            print("learning the tokenizer")
            ranks = train_bpe(sample_words(corpus), vocab_size - 1)  # 1: <|endoftext|>

        ranks_text = ""
        for token, rank in ranks.items():
            ranks_text += f"{base64.b64encode(token).decode()} {rank}\n"
        (folder / "tokenizer.tiktoken").write_bytes(ranks_text.encode())
        encoding = load_tokenizer(ranks_text, pat_str)
        dtype = np.dtype("<u2" if encoding.n_vocab <= 65536 else "<u4")
        meta = {
            "source": " ".join(sources) + (" --site_packages" if site_packages else ""),
            "tokenizer": tokenizer, "pat_str": pat_str, "vocab_size": encoding.n_vocab,
            "eot": encoding.eot_token, "dtype": dtype.name,
        }
        sha = hashlib.sha256(f"{ranks_text}{pat_str}".encode())
        for part in ("train", "val"):
            texts = corpus.documents(part)
            meta |= write_bin(texts, folder / f"{part}.bin", encoding, dtype, sha)
        meta["skipped"] = corpus.skipped
        meta["duplicates"] = int((corpus.part == "").sum())
        meta["fingerprint"] = sha.hexdigest()[:16]
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        for file in ("train.bin", "val.bin", "tokenizer.tiktoken", "meta.json"):
            os.replace(folder / file, out_dir / file)
    return meta


# --------------------------------------------------------------------------------------------------
# the command


def quoted(path: str) -> str:
    """A path as a shell reads it, without control characters that a terminal would obey."""
    if path.isprintable():
        return shlex.quote(path)
    codes = "".join(f"\\x{byte:02x}" for byte in os.fsencode(path))
    return f"$'{codes}'"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["python"],
                        help=f"python (default), {', '.join(DOWNLOADS)}, files or folders")
    parser.add_argument("--out_dir", help="default: data/ and the name of the first source, "
                        "or data/packages")
    parser.add_argument("--tokenizer", choices=["bpe", "gpt2", "bytes"], default="bpe")
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE,
                        help=f"of the bpe (default: {VOCAB_SIZE})")
    parser.add_argument("--val_fraction", type=float, default=VAL_FRACTION,
                        help=f"share of the bytes (default: {VAL_FRACTION})")
    parser.add_argument("--site_packages", action="store_true",
                        help="installed packages too")
    parser.add_argument("--shards", type=int, default=14,
                        help="slimpajama: files, of 292 MB each (default: 14)")
    args = parser.parse_intermixed_args(argv)
    if args.out_dir is None:
        name = TEXT_FILE.sub("", Path(args.sources[0]).resolve().name)
        args.out_dir = DATA / ("packages" if args.site_packages else name)

    meta = prepare(**vars(args))
    print(f"vocabulary {meta['vocab_size']}, {meta['skipped']} files skipped (not UTF-8), "
          f"{meta['duplicates']} duplicates left out")
    print(f"next: python train.py --data_dir={quoted(os.path.expanduser(args.out_dir))}")


if __name__ == "__main__":
    # as Ctrl-C does, so that unfinished files go
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
