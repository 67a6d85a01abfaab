"""Every experiment of the paper's section 4: one command each, with controls, intervals and a figure.

    python -m benchmarks.paper layer-sweep
    python -m benchmarks.paper toxicity --data FOLDER --n 100 --judge profanity
    torchrun --nproc-per-node 2 -m benchmarks.paper knowledge --data FOLDER

Writes OUT/EXPERIMENT.json (settings, versions, seed, n, every figure), .md (the tables) and .png. Each piece
of work is kept in OUT/.units as soon as it is done: run the same command again and it goes on from there, in
one process or several. FOLDER holds JSON lines, one text per line: imdb.jsonl (text, label, split),
brown.jsonl, wikitext.jsonl, owt_sentences.jsonl and rtp_random.jsonl (text), conceptnet.jsonl (sentence with
[MASK], answer, source); and essays as .txt: wedding.txt, shipping.txt and others. Turner et al., section 4.

--protocol code does what the authors' published code and notebooks do where the paper says something else:
documents with the most topic words instead of random ones (perplexity), top-p 0.3 instead of 1 (topics,
toxicity, sentiment, grid). Where both are cheap, both are in the table: means over tokens and over documents,
KL at c 1 and c 10.
"""

import argparse
import json
from pathlib import Path

from ministeer.utils import printable, write

from . import completions, jobs, layers, methods, texts
from .lab import Lab, faults_in_one_line, versions

EXPERIMENTS = {"perplexity": texts.perplexity, "token-shifts": texts.token_shifts,
               "layer-sweep": completions.layer_sweep, "positions": completions.positions,
               "topics": completions.topics, "toxicity": completions.toxicity,
               "sentiment": completions.sentiment, "knowledge": texts.knowledge, "anatomy": texts.anatomy,
               "grid": completions.grid, "sink": layers.sink, "readers": layers.readers,
               "steerability": methods.prompt_slopes, "methods": methods.methods,
               "methods-mood": methods.mood}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPERIMENTS), metavar="EXPERIMENT",
                        help=", ".join(EXPERIMENTS))
    parser.add_argument("--model", default="smollm2-135m",
                        help="a known name or a folder (default smollm2-135m)")
    parser.add_argument("--data", help="the folder with the texts")
    # torchrun would take --n for an option of its own; -n passes.
    parser.add_argument("-n", "--n", type=int,
                        help="texts, prompts or completions per cell; each experiment has its own default")
    parser.add_argument("--layer", type=int, help="instead of the experiment's own")
    parser.add_argument("--coeff", type=float, help="likewise")
    parser.add_argument("--judge",
                        help="a name from ministeer/evaluation/judges.py, perspective or openai:TOPIC")
    parser.add_argument("--protocol", choices=("paper", "code"), default="paper",
                        help="which to follow where the two differ (default paper)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="results", help="the folder for the results (default results)")
    args = parser.parse_args()
    if args.n is not None and args.n < 2:
        parser.error(f"--n takes 2 or more; given: {args.n}.")
    with faults_in_one_line("paper.py"), jobs.workers(args.device) as rank:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        lab = Lab(args, rank)
        result, text = EXPERIMENTS[args.experiment](lab)
        if rank[0] == 0:
            text = printable(text)
            settings = {key: value for key, value in vars(args).items() if key not in ("data", "out")}
            about = {"experiment": args.experiment, "setting": {**settings, "processes": rank[1]},
                     "seed": args.seed, "model": lab.model.name,
                     "versions": versions()}
            content = json.dumps({**about, "found": result})
            write(lab.out / f"{args.experiment}.json", content.encode())
            write(lab.out / f"{args.experiment}.md", text.encode())
            print(f"\n{text}\nin {printable(lab.out)}: {args.experiment}.json, .md, .png")


if __name__ == "__main__":
    main()
