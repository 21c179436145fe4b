"""Continue a prompt with a model that train.py made.

    python sample.py --prompt "def "
    python sample.py --prompt FILE:start.txt --temperature 0    # the prompt is a file; greedy
    python sample.py --num_samples 3 --top_k 50 --seed 1
    python sample.py                                            # asks for a prompt in a terminal

An empty prompt stands for the start of a document. A sample ends at <|endoftext|> or after
max_new_tokens. The tokenizer comes with the checkpoint.
"""
import argparse
import math
import sys
import time
import zlib
from pathlib import Path
from typing import NoReturn

import torch

from model import load_model, stream
from prepare_data import load_tokenizer, open_text


def fail(message: object) -> NoReturn:
    """Ends the program with one line: the mistake is the user's."""
    print(f"sample.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = fail         # argparse's own prints the names of all settings first
    parser.add_argument("--prompt", help="text to continue, or FILE:path")
    parser.add_argument("--out_dir", type=Path, default=Path("out"),
                        help="folder of the run (default: out)")
    parser.add_argument("--num_samples", type=int, default=1,
                        help="continuations to write (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, default=200,
                        help="of the longest (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=0,
                        help="sample from the k likeliest; 0: off (default)")
    parser.add_argument("--top_p", type=float, default=0.95,
                        help="sample from the likeliest that make up this probability "
                             "(default: 0.95)")
    parser.add_argument("--seed", type=int, default=1337,
                        help="of the random numbers (default: 1337)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="(default: auto)")
    args = parser.parse_args(argv)
    if args.num_samples < 1 or args.max_new_tokens < 1:
        parser.error(f"--num_samples={args.num_samples} and --max_new_tokens="
                     f"{args.max_new_tokens} must be positive")
    # Below 1e-6 the logits would overflow; the largest one wins there in any case.
    if args.temperature != 0 and not 1e-6 <= args.temperature < math.inf:
        parser.error(f"--temperature={args.temperature} must be 0, or 1e-6 or more")
    if args.top_k < 0:
        parser.error(f"--top_k={args.top_k} must be 0 or more")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top_p={args.top_p} must be above 0 and at most 1")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed={args.seed} must be 0 or more, and less than 2**63")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch sees no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def read_prompt(prompt: str | None) -> str:
    """The text of --prompt; a file is read as prepare_data.py does. Raises ValueError, OSError."""
    if prompt is None:
        return input("prompt> ") if sys.stdin and sys.stdin.isatty() else ""
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        with open_text(Path(prompt.removeprefix("FILE:"))) as file:
            return file.read()
    except UnicodeError:
        raise ValueError(f"{prompt}: the file is not UTF-8 text") from None
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{prompt}: {error}") from None        # a damaged .gz


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        model, state = load_model(args.out_dir / "ckpt.pt", args.device)
        encoding = load_tokenizer(**state["tokenizer"])
        prompt = read_prompt(args.prompt)
    except (OSError, ValueError) as error:
        fail(error)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1}")
        print(prompt, end="", flush=True)
        began = time.perf_counter()
        pieces = 0
        for text in stream(model, encoding, prompt, args.max_new_tokens,
                           temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                           generator=generator):
            print(text, end="", flush=True)
            pieces += 1
        tokens = pieces - 1             # the last piece is no token: it ends the text
        speed = tokens / (time.perf_counter() - began)
        print(f"\n[{tokens} tokens, {speed:.0f} tok/s]", flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # a terminal that cannot show a character shows "?"
    try:
        main()
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        raise SystemExit(130) from None
