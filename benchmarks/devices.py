"""Does a device compute what the CPU computes? Parity and identities of one model, in every dtype.

    python -m benchmarks.devices --device cuda
    python -m benchmarks.devices --device cuda --model gpt2 --dtypes float32 bfloat16

A figure is the mean over positions of |difference| / |vector|, for the logits or for the residuals of one
layer, whichever is largest. (The mean, because in bfloat16 single positions differ a lot: where a token is
about to become an attention sink, rounding decides how strong the sink is.) The first three columns compare
the device with the CPU in float32, unsteered and steered, and with transformers, if it is installed, on the
same device in the same dtype. The others compare the device with itself: a text read token by token and
whole, a row in a batch and alone, and `fast` and compiled models with the plain one. The command ends with 1
if a figure is above its bound, or if one of the exact identities fails: coeff 0 changes no number, a Steer
changes nothing before its layer, and a seed gives the same text twice.
"""

import argparse
import sys

import torch

import ministeer
from ministeer.checkpoints.loading import find

from .lab import faults_in_one_line

TEXT = "I went up to my friend and said that the wedding would be on the second Sunday of May, in a park"
OTHER = "The capital of France is a city on the river Seine, whose bridges and museums people come to see"
# float32 differs by the order of summation, the others also by their 8 or 11 significant bits.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
COLUMNS = ("unsteered", "steered", "transformers", "token by token", "in a batch", "fast", "compiled")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=[*BOUNDS], choices=[*BOUNDS], metavar="DTYPE")
    args = parser.parse_args()
    with faults_in_one_line("devices.py"):
        if not run(args):
            sys.exit(1)


@torch.no_grad()
def run(args):
    """Print the table. -> whether every figure is within its bound and every identity holds"""
    reference, tokenizer = ministeer.load(args.model)
    layer = reference.config.n_layer // 2
    steer = 2 * ministeer.steering_vector(reference, tokenizer, " love", " hate", layer)
    T = min(len(tokenizer.encode(text)) for text in (TEXT, OTHER))
    ids = torch.tensor([tokenizer.encode(text)[:T] for text in (TEXT, OTHER)])
    expected = {name: read(reference, ids, how) for name, how in (("unsteered", ()), ("steered", steer))}
    print(f"{args.model} on {args.device}, 2 texts of {T} tokens; love - hate before block {layer}, c 2\n")
    print("| dtype | bound | " + " | ".join(COLUMNS) + " | exact |\n|" + "---|" * (len(COLUMNS) + 3))
    good = True
    for dtype in args.dtypes:
        model, _ = ministeer.load(args.model, dtype=dtype, device=args.device)
        here = ids.to(args.device)
        plain, steered = read(model, here), read(model, here, steer)
        errors = {"unsteered": error(plain, expected["unsteered"]),
                  "steered": error(steered, expected["steered"]),
                  "transformers": beside_transformers(args, dtype, here, plain),
                  "token by token": error(one_by_one(model, here, steer), steered),
                  "in a batch": error([x[:1] for x in steered], read(model, here[:1], steer)),
                  "fast": error(one_by_one(ministeer.fast(model), here, steer), steered),
                  "compiled": error(one_by_one(ministeer.fast(model, compile=True), here[:1], steer),
                                    [x[:1] for x in steered])}
        exact = exact_identities(model, tokenizer, here, steer, plain, steered)
        within = [value is None or value <= BOUNDS[dtype] for value in errors.values()]      # False for NaN
        good = good and exact and all(within)
        cells = ["–" if errors[name] is None else f"{errors[name]:.1e}" for name in COLUMNS]
        cells.append("yes" if exact else "**no**")
        print(f"| {dtype} | {BOUNDS[dtype]:g} | " + " | ".join(cells) + " |")
    return good


def read(model, ids, steer=(), cache=None):
    """-> the residuals and, last, the logits of ids (B, T)"""
    logits, resid = model(ids, steer, cache)
    return [*resid, logits]


def one_by_one(model, ids, steer):
    """`read`, one position at a time into a cache."""
    cache = ministeer.KVCache(ids.shape[1], len(ids))
    parts = [read(model, part, steer, cache) for part in ids.split(1, dim=1)]
    return [torch.cat(column, dim=1) for column in zip(*parts, strict=True)]


def error(found, wanted):
    """|a - b| / |b| of each position, its mean; the largest of two lists of tensors (B, T, …)."""
    pairs = [(a.float().cpu(), b.float().cpu()) for a, b in zip(found, wanted, strict=True)]
    return max(float(((a - b).norm(dim=-1) / b.norm(dim=-1)).mean()) for a, b in pairs)


def exact_identities(model, tokenizer, ids, steer, plain, steered):
    """Whether coeff 0 changes nothing, a Steer nothing before its layer, and a seed gives one text."""
    same = [torch.equal(a, b) for a, b in zip(plain, read(model, ids, 0 * steer), strict=True)]
    before = [torch.equal(a, b) for a, b in zip(plain[:steer.layer], steered, strict=False)]
    texts = [ministeer.generate(model, tokenizer, "I think that", 3, 12, steer, seed=4) for _ in range(2)]
    return all(same) and all(before) and texts[0] == texts[1]


def beside_transformers(args, dtype, ids, found):
    """The error against transformers' residuals and logits, from the same files. None without the library."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    hub = AutoModelForCausalLM.from_pretrained(find(args.model), dtype=getattr(torch, dtype))
    out = hub.eval().to(args.device)(ids, output_hidden_states=True)
    # Its last hidden state has passed the final norm, so that it is not a residual.
    return error([*found[:-2], found[-1]], [*out.hidden_states[:-1], out.logits])


if __name__ == "__main__":
    main()
