"""Which token should stand before a text: the mean loss of real texts after each candidate.

    python -m benchmarks.bos --data texts.jsonl         (one JSON object per line, with the field "text")

The first token after BOS has nothing but BOS before it, so it is reported apart from the rest.
"""

import argparse

import torch
from tqdm import tqdm

import ministeer
from ministeer.evaluation.measure import logprobs

from . import rows
from .lab import faults_in_one_line

CANDIDATES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "\n")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bos", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSON lines with a field text")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=200, help="texts (default 200, the first of the file)")
    parser.add_argument("--tokens", type=int, default=64,
                        help="texts are cut to about so many tokens, by their characters (default 64)")
    args = parser.parse_args()
    with faults_in_one_line("bos.py"):
        run(args)


def run(args):
    """Measure and print the table."""
    texts = [row["text"] for row in rows.parse(rows.read(args.data), args.data, text=str)]
    texts = [text[:4 * args.tokens] for text in texts if len(text) > 20][:args.n]
    if len(texts) < 2:
        raise ValueError(f"{args.data} has {len(texts)} texts of more than 20 characters; "
                         "at least 2 are needed.")
    model, tokenizer = ministeer.load(args.model)
    losses = {}
    for piece in tqdm(CANDIDATES, "candidates"):
        tokenizer.bos_id = tokenizer.backend.token_to_id("Ċ" if piece == "\n" else piece)
        if tokenizer.bos_id is None:
            raise ValueError(f"{args.model} has no token {piece!r}, one of the candidates.")
        losses[piece] = [-x for x in logprobs(model, tokenizer, texts)]
    mean = {piece: torch.stack([x.mean() for x in row]) for piece, row in losses.items()}
    print(f"{args.model}, {len(texts)} texts, nats/token: mean over texts, "
          f"with a 95 % interval of the difference to {CANDIDATES[0]}\n")
    print("| before the text | all tokens | difference | first token | from the second on |")
    print("|---|---|---|---|---|")
    for piece, row in losses.items():
        gap = mean[piece] - mean[CANDIDATES[0]]
        half = 1.96 * gap.std() / len(gap) ** 0.5
        first = torch.stack([x[0] for x in row]).mean()
        rest = torch.stack([x[1:].mean() for x in row]).mean()
        print(f"| `{piece!r}` | {mean[piece].mean():.3f} | {gap.mean():+.3f} ± {half:.3f} | "
              f"{first:.2f} | {rest:.3f} |")


if __name__ == "__main__":
    main()
