"""What fewer bits cost: KL to the float32 model, and the loss of real texts, in nats a token.

    python -m benchmarks.bits --data texts.jsonl        (one JSON object per line, with the field "text")
"""

import argparse

import torch
from tqdm import tqdm

import ministeer

from . import rows
from .lab import faults_in_one_line


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSON lines with a field text")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=50, help="texts (default 50, the first that fit)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each (default 128)")
    args = parser.parse_args()
    with faults_in_one_line("bits.py"):
        run(args)


@torch.no_grad()
def run(args):
    """Measure and print the table."""
    plain, tokenizer = ministeer.load(args.model)
    texts = (row["text"] for row in rows.parse(rows.read(args.data), args.data, text=str))
    encoded = [ids[:args.tokens] for ids in map(tokenizer.encode, texts) if len(ids) >= args.tokens][:args.n]
    if not encoded:
        raise ValueError(f"{args.data} has no text of {args.tokens} tokens.")
    models = {"float32": plain, "bfloat16": ministeer.load(args.model, dtype="bfloat16")[0],
              **{bits: ministeer.fast(plain, weights=bits) for bits in ("int8", "int4")}}
    kl, loss = ({name: [] for name in models} for _ in range(2))
    for ids in tqdm(torch.tensor(encoded)[:, None], "texts"):
        wanted = plain(ids)[0][0, :-1].log_softmax(dim=-1)
        for name, model in models.items():
            given = model(ids)[0][0, :-1].float().log_softmax(dim=-1)
            kl[name].append((wanted.exp() * (wanted - given)).sum(dim=-1).mean())
            loss[name].append(-given.gather(1, ids[0, 1:, None]).mean())
    print(f"{args.model}, {len(encoded)} texts of {args.tokens} tokens, nats/token, with a 95 % interval\n")
    print("| weights | KL to float32 | loss | more than float32 |\n|---|---|---|---|")
    for name in models:
        more = torch.stack(loss[name]) - torch.stack(loss["float32"])
        cells = [f"{x.mean():.4f} ± {1.96 * x.std() / len(x) ** 0.5:.4f}"
                 for x in (torch.stack(kl[name]), more)]
        print(f"| {name} | {cells[0]} | {torch.stack(loss[name]).mean():.4f} | {cells[1]} |")


if __name__ == "__main__":
    main()
