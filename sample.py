# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy", "tiktoken", "triton; sys_platform == 'linux'"]
# ///
"""Continue a prompt with a model that train.py made.

    python sample.py --prompt "def "
    python sample.py --prompt "$(cat start.txt)" --temperature 0    # a file's text; greedy
    python sample.py --num_samples 3 --top_k 50 --seed 1
    python sample.py                                                # asks in a terminal

A prompt is the start of a document; an empty one starts any. A sample ends at <|endoftext|> or
after max_new_tokens. The tokenizer comes with the checkpoint.
"""
import argparse
import codecs
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tiktoken
import torch

from model import GPT, load_model
from prepare_data import load_tokenizer


def encode_prompt(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """<|endoftext|>, after which every document of the training text begins, and the text."""
    return [encoding.eot_token, *encoding.encode(text, allowed_special={"<|endoftext|>"})]


def stream(model: GPT, encoding: tiktoken.Encoding, prompt: str, max_new_tokens: int,
           **settings) -> Iterator[str]:
    """Yields the continuation of prompt, a string per token; settings go to GPT.generate.

    A prompt may end within a token: "def " does, since a space belongs to the token of the next
    word. So the prompt's last token is chosen anew, among those that begin with it, and the first
    string is what that adds. A string is empty while a token ends within a character; bytes that
    are no UTF-8 become U+FFFD.
    """
    tokens = encode_prompt(encoding, prompt)
    last_bytes = b""                                        # of the prompt's last token
    if tokens[-1] != encoding.eot_token:
        last_bytes = encoding.decode_single_token_bytes(tokens.pop())
        settings["first"] = [token for token in range(encoding.eot_token)
                             if encoding.decode_single_token_bytes(token).startswith(last_bytes)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in model.generate(tokens, max_new_tokens, vocab_size=encoding.n_vocab, **settings):
        if token == encoding.eot_token:
            break
        text = encoding.decode_single_token_bytes(token)
        yield decoder.decode(text[len(last_bytes):])
        last_bytes = b""                                    # only the first token repeats them
    yield decoder.decode(b"", final=True)


# A terminal obeys control characters, and only shows their pictures. Line ends and tabs stay.
PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


def printable(text: str) -> str:
    """The text with a picture in place of each control character: ESC becomes ␛."""
    return text.translate(PICTURES)


def plain_output() -> None:
    """Standard output that shows "?" for a character it lacks; a notebook's lacks none."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompt", help="text to continue")
    parser.add_argument("--out_dir", default="out", help="folder of the run")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations to write")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="of the longest")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy")
    parser.add_argument("--top_k", type=int, default=0,
                        help="sample from the k likeliest tokens; 0: off")
    parser.add_argument("--top_p", type=float, default=0.95,
                        help="sample from the likeliest that make up this probability")
    parser.add_argument("--seed", type=int, default=1337, help="of the random numbers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    plain_output()
    model, state = load_model(Path(args.out_dir).expanduser() / "ckpt.pt", args.device)
    encoding = load_tokenizer(**state["tokenizer"])
    prompt = args.prompt
    if prompt is None:
        prompt = input("prompt> ") if sys.stdin and sys.stdin.isatty() else ""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1}")
        print(printable(prompt), end="", flush=True)
        began = time.perf_counter()
        pieces = 0
        for text in stream(model, encoding, prompt, args.max_new_tokens,
                           temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                           generator=generator):
            print(printable(text), end="", flush=True)
            pieces += 1
        tokens = pieces - 1             # the last piece is no token: it ends the text
        speed = tokens / (time.perf_counter() - began)
        print(f"\n[{tokens} tokens, {speed:.0f} tok/s]", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        raise SystemExit(130) from None
