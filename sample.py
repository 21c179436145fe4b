"""Continue a prompt with a model that train.py made.

    python sample.py --prompt "def "
    python sample.py --prompt FILE:start.txt --temperature 0     # the prompt is a file; greedy
    python sample.py --num_samples 3 --top_k 50 --seed 1
    python sample.py                                             # asks for a prompt, if there is a terminal

An empty prompt stands for the start of a document. A sample ends at <|endoftext|> or after max_new_tokens.
The tokenizer comes with the checkpoint.
"""
import argparse
import codecs
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tiktoken
import torch

from model import GPT, GPTConfig, load_checkpoint
from prepare_data import load_tokenizer


def load_model(path: Path, device: str) -> tuple[GPT, tiktoken.Encoding]:
    """The model of a checkpoint, and its tokenizer. Raises ValueError if the file is not a checkpoint."""
    state = load_checkpoint(path)
    names = GPTConfig.__dataclass_fields__
    try:
        model = GPT(GPTConfig(**{name: value for name, value in state["config"].items() if name in names}))
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise ValueError(f"{path} holds another model than its own settings say") from None
    return model.to(device).eval(), load_tokenizer(**state["tokenizer"])


def stream(model: GPT, encoding: tiktoken.Encoding, prompt: str, max_new_tokens: int,
           **settings) -> Iterator[str]:
    """Yields the continuation of prompt, a string per token; settings go to GPT.generate.

    A prompt may end within a token: "def " does, for the blank belongs to the next word. So its last token is
    chosen anew, among those that begin with it, and the first string is what that adds. A string is empty
    while a token ends within a character; bytes that are no UTF-8 become U+FFFD.
    """
    tokens, last = encoding.encode(prompt, allowed_special={"<|endoftext|>"}), b""
    if tokens and tokens[-1] != encoding.eot_token:
        last = encoding.decode_single_token_bytes(tokens.pop())
        settings["first"] = [token for token in range(encoding.n_vocab - 1)
                             if encoding.decode_single_token_bytes(token).startswith(last)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in model.generate(tokens or [encoding.eot_token], max_new_tokens, vocab_size=encoding.n_vocab,
                                **settings):
        if token == encoding.eot_token:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(token)[len(last):])
        last = b""
    yield decoder.decode(b"", final=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--prompt", help="text to continue, or FILE:path")
    parser.add_argument("--out_dir", type=Path, default=Path("out"), help="folder of the run (default: out)")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations to write (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="of the longest (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=0, help="sample from the k likeliest; 0: off (default)")
    parser.add_argument("--top_p", type=float, default=0.95,
                        help="sample from the likeliest that make up this probability (default: 0.95)")
    parser.add_argument("--seed", type=int, default=1337, help="of the random numbers (default: 1337)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.error = lambda message: parser.exit(2, f"sample.py: {message} (--help lists the settings)\n")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch sees no CUDA device")
    warm = 1e-6 <= args.temperature < float("inf")
    for name, good, bound in (("num_samples", args.num_samples > 0, "positive"),
                              ("max_new_tokens", args.max_new_tokens > 0, "positive"),
                              ("temperature", args.temperature == 0 or warm, "0, or 1e-6 or more"),
                              ("top_k", args.top_k >= 0, "0 or more"),
                              ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
                              ("seed", 0 <= args.seed < 2**63, "0 or more, and less than 2**63")):
        if not good:
            parser.error(f"--{name}={getattr(args, name)} must be {bound}")
    return args


def read_prompt(prompt: str | None) -> str:
    if prompt is None:
        return input("prompt> ") if sys.stdin and sys.stdin.isatty() else ""
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        with open(prompt[5:], encoding="utf-8-sig", newline="") as file:     # as prepare_data.py reads it
            return file.read()
    except UnicodeDecodeError:
        raise ValueError(f"{prompt}: the file is not UTF-8 text") from None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        model, encoding = load_model(args.out_dir / "ckpt.pt", device)
        prompt = read_prompt(args.prompt)
        generator = torch.Generator(device).manual_seed(args.seed)
        for i in range(args.num_samples):
            if args.num_samples > 1:
                print(f"--- sample {i + 1}")
            print(prompt, end="", flush=True)
            start = time.perf_counter()
            pieces = stream(model, encoding, prompt, args.max_new_tokens, temperature=args.temperature,
                            top_k=args.top_k, top_p=args.top_p, generator=generator)
            for count, text in enumerate(pieces):       # the last piece is no token: it ends the text
                print(text, end="", flush=True)
            print(f"\n[{count} tokens, {count / (time.perf_counter() - start):.0f} tok/s]", flush=True)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        raise SystemExit(130) from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"sample.py: {error}") from None


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # a terminal that cannot show a character shows "?"
    main()
