"""Every experiment of the paper's section 4, measured: one command each, with controls, intervals and a figure.

    python benchmarks/paper.py layer-sweep
    python benchmarks/paper.py toxicity --data FOLDER --n 100 --judge profanity
    torchrun --nproc-per-node 2 -m benchmarks.paper knowledge --data FOLDER

Writes OUT/EXPERIMENT.json (setting, versions, seed, n, every figure), .md (the tables) and .png. Each piece of work is kept in OUT/.units as
soon as it is done: run the same command again and it goes on from there, with one process or several. FOLDER holds JSON lines, a text a line:
imdb.jsonl (text, label, split), brown.jsonl, wikitext.jsonl and owt_sentences.jsonl (text), rtp_random.jsonl (text), conceptnet.jsonl
(sentence with [MASK], answer, source), and the essays wedding.txt, shipping.txt and others as .txt. Turner et al., section 4.

--protocol code goes the ways of the authors' published code and notebooks where the paper's words differ: documents with the densest topic
words instead of random ones (perplexity), top-p 0.3 instead of 1 (topics, toxicity, sentiment, grid). Where both are cheap, both are in
the table: means over tokens and over documents, KL at c 1 and c 10.
"""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

from . import completions, texts
from . import jobs as shards
from .lab import Lab, faults_in_one_line

import ministeer
from ministeer.utils import write

EXPERIMENTS = {"perplexity": texts.perplexity, "token-shifts": texts.token_shifts, "layer-sweep": completions.layer_sweep,
               "positions": completions.positions, "topics": completions.topics, "toxicity": completions.toxicity,
               "sentiment": completions.sentiment, "knowledge": texts.knowledge, "anatomy": texts.anatomy, "grid": completions.grid}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPERIMENTS), metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--model", default="smollm2-135m", help="a known name or a folder (default smollm2-135m)")
    parser.add_argument("--data", help="the folder with the texts")
    # torchrun takes --n for one of its own; -n passes.
    parser.add_argument("-n", "--n", type=int, help="how many texts, prompts or completions a cell; each experiment has its own default")
    parser.add_argument("--layer", type=int, help="instead of the experiment's own")
    parser.add_argument("--coeff", type=float)
    parser.add_argument("--judge", help="see ministeer/judges.py")
    parser.add_argument("--protocol", choices=("paper", "code"), default="paper", help="whose way to go where they differ (default paper)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="results", help="the folder for what is found (default results)")
    args = parser.parse_args()
    if args.n is not None and args.n < 2:
        parser.error(f"--n takes 2 or more; given: {args.n}.")
    with faults_in_one_line("paper.py"), shards.workers(args.device) as rank:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        lab = Lab(args, rank)
        found, text = EXPERIMENTS[args.experiment](lab)
        if rank[0] == 0:
            libraries = ("torch", "numpy", "tokenizers", "safetensors")
            about = {"experiment": args.experiment, "setting": {**vars(args), "processes": rank[1]}, "seed": args.seed, "model": lab.model.name,
                     "versions": {"ministeer": ministeer.__version__, **{name: importlib.metadata.version(name) for name in libraries}}}
            about["setting"].pop("data")
            write(lab.out / f"{args.experiment}.json", json.dumps({**about, "found": found}, ensure_ascii=False).encode())
            write(lab.out / f"{args.experiment}.md", text.encode())
            print(f"\n{text}\nin {lab.out}: {args.experiment}.json, .md, .png")


if __name__ == "__main__":
    main()
