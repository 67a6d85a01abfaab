"""Choose the demo's layer and coefficient: how many completions of other prompts mention weddings.

    python -m benchmarks.demo_grid

One cell is 25 completions of each of four prompts, with the vector " weddings" - " "; beside it, as many
shared out among five random vectors of the same norm. The choice is the smallest coefficient, then the lowest
layer, whose count lies within the 95 % interval of the highest, because a larger addition damages the text
more.
"""

import argparse

from tqdm import tqdm

import ministeer
from ministeer.cli import CONTROLS, DEMO, SAMPLING
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.stats import wilson
from ministeer.evaluation.steerability import strength
from ministeer.steering import random_like

PROMPTS = ["The weather was fine, so we decided to", "My neighbour knocked on the door and told me",
           "Last night I had a long talk with my sister about", "When the meeting was over, the manager said"]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_grid", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3, 4, 6])
    parser.add_argument("--coeffs", type=float, nargs="+", default=[0.5, 1, 2, 4])
    parser.add_argument("--n", type=int, default=25, help="completions of each prompt (default 25)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default 1; the demo has 0)")
    args = parser.parse_args()
    model, tokenizer = ministeer.load(args.model)
    model = ministeer.fast(model)

    def count(*steer, n=args.n):
        rows = ministeer.generate(model, tokenizer, PROMPTS, n, steer=steer,
                                  **{**SAMPLING, "seed": args.seed})
        return sum(count_words(text) > 0 for row in rows for text in row)

    n, counts, sizes = args.n * len(PROMPTS), {}, {}
    cells = [(l, c) for l in args.layers for c in args.coeffs]
    for l, c in tqdm(cells, "cells"):
        vector = ministeer.steering_vector(model, tokenizer, DEMO["plus"], DEMO["minus"], l)
        sizes[l] = f"{strength(model, tokenizer, vector, PROMPTS):.2f}"
        vector = c * vector
        shares = {seed: len(range(seed, args.n, CONTROLS)) for seed in range(CONTROLS)}
        counts[l, c] = count(vector), sum(count(random_like(vector, seed), n=share)
                                          for seed, share in shares.items() if share)
    print(f"completions of {n} that mention weddings, steered (five random vectors of the same norm); "
          f"unsteered {count()}\n")
    print("| layer | coeff 1, × the mean norm | " + " | ".join(f"coeff {c:g}" for c in args.coeffs) + " |")
    print("|" + "---|" * (2 + len(args.coeffs)))
    for l in args.layers:
        row = [l, sizes[l], *("{} ({})".format(*counts[l, c]) for c in args.coeffs)]
        print("| " + " | ".join(map(str, row)) + " |")
    best = max(cells, key=lambda cell: counts[cell][0])
    low, high = wilson(counts[best][0], n)
    coeff, layer = min((c, l) for l, c in cells if counts[l, c][0] / n >= low)
    print(f"\nhighest: layer {best[0]}, coeff {best[1]:g}, {counts[best][0]} of {n} "
          f"(95 % interval {low:.0%} to {high:.0%}); chosen: layer {layer}, coeff {coeff:g}")


if __name__ == "__main__":
    main()
