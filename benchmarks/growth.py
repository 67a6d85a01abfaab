"""How time and memory grow with prompt length, rows of a batch, layers of a sweep, and texts scored.

    python -m benchmarks.growth     (about five minutes on two cores; writes benchmarks/figures/growth-*.png)

Each point is a process of its own: it loads the model, does the work once to warm up and then twice, and
reports the shorter time and the most memory it ever held. The dashed line shows growth in proportion, drawn
from the last point.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import ministeer
from ministeer.evaluation.measure import next_logprobs, sweep
from ministeer.generation import Sampling, decoder, sample

from .peers import MINUS, PLUS, PROMPT, TOP_P, rows
from .speed import peak_mib

SIZES = {
    "prompt": ("tokens of the prompt, read once", [16, 32, 64, 128, 256, 512, 1024, 2048]),
    "batch": ("rows, 32 steered tokens each", [1, 2, 4, 8, 16, 32, 64]),
    "layers": ("layers swept, 4 coefficients each", [1, 2, 4, 8, 15, 30]),
    "texts": ("texts of 128 tokens scored", [8, 16, 32, 64, 128]),
}


def work(kind, size, model, tokenizer):
    """-> a function that does the work of one point."""
    steer = 2 * ministeer.steering_vector(model, tokenizer, PLUS, MINUS, layer=2)
    generator = torch.Generator().manual_seed(0)
    if kind == "prompt":
        ids = torch.randint(1000, 40000, (1, size), generator=generator)
        return lambda: model(ids, steer, last_only=True)
    if kind == "batch":
        ids = rows(torch.tensor([tokenizer.encode(PROMPT)]), size)      # all different, so that all are read
        sampling = Sampling(top_p=TOP_P, freq_penalty=1.0, max_new_tokens=32)
        draws = torch.rand(size, 32, generator=generator)
        return lambda: list(sample(decoder(model, (steer,), size, ids.shape[1] + 32), ids, draws, sampling))
    if kind == "layers":
        return lambda: sweep(model, tokenizer, PROMPT, PLUS, MINUS, range(size), [1.0, 2.0, 4.0, 8.0])
    texts = torch.randint(1000, 40000, (size, 128), generator=generator)
    return lambda: [next_logprobs(model, ids, steer) for ids in texts.split(8)]


def point(kind, size, args):
    """One process: print [seconds, MiB after loading, MiB at the peak]."""
    torch.set_num_threads(args.threads)
    model, tokenizer = ministeer.load(args.model)
    if args.fast:
        model = ministeer.fast(model)
    loaded, run, seconds = peak_mib(), work(kind, size, model, tokenizer), []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    print(json.dumps([min(seconds[1:]), loaded, peak_mib()]))


def draw(kind, points, path, args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sizes, (seconds, loaded, peak) = SIZES[kind][1], zip(*points, strict=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    left.loglog(sizes, seconds, "o-", color="#0072B2", label="measured")
    left.loglog(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], "--", color="0.5",
                label="in proportion")
    left.set_ylabel("seconds")
    left.legend(frameon=False)
    right.plot(sizes, peak, "o-", color="#D55E00", label="at the peak")
    right.axhline(statistics.median(loaded), linestyle="--", color="0.5", label="the loaded model")
    right.set_xscale("log")
    right.set_ylim(0, 1.15 * max(peak))
    right.set_ylabel("memory of the process, MiB")
    right.legend(frameon=False, loc="lower right")
    for axis in (left, right):
        axis.set_xlabel(SIZES[kind][0])
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    weights = "packed" if args.fast else "plain"
    figure.suptitle(f"SmolLM2-135M, float32, {weights}, {args.threads} threads", fontsize="medium")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="weights/smollm2-135m",
                        help="a folder (default weights/smollm2-135m)")
    parser.add_argument("--fast", action="store_true", help="with packed weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=str(Path(__file__).parent / "figures"),
                        help="the folder for the figures")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        return point(args.point[0], int(args.point[1]), args)
    Path(args.out).mkdir(exist_ok=True)
    for kind, (label, sizes) in SIZES.items():
        points = []
        for size in tqdm(sizes, kind):
            command = [sys.executable, "-m", "benchmarks.growth", "--point", kind, str(size),
                       "--model", args.model, "--threads", str(args.threads)]
            if args.fast:
                command.append("--fast")
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            points.append(json.loads(done.stdout))
        draw(kind, points, Path(args.out) / f"growth-{kind}.png", args)
        print(f"\n| {label} | " + " | ".join(map(str, sizes)) + " |\n|" + "---|" * (len(sizes) + 1))
        print("| seconds | " + " | ".join(f"{seconds:.3g}" for seconds, _, _ in points) + " |")
        print("| peak memory, MiB | " + " | ".join(str(peak) for _, _, peak in points) + " |\n")
    return None


if __name__ == "__main__":
    main()
