"""Train the classifier of unfinished texts that FUDGE and LMA + Classifier ask: minutes on two cores.

    python benchmarks/train_classifier.py sentiment --data FOLDER       # imdb.jsonl (text, label pos/neg, split): its train rows
    python benchmarks/train_classifier.py toxicity --data FOLDER        # rtp_random.jsonl, rtp_toxic.jsonl (text, continuation, their toxicity)

Writes OUT/sentiment.safetensors or OUT/toxicity.safetensors. Class 1 is positive, or toxic. It never judges: judges.py has its own. No text of the
tuning or test split of rivals.py is read: of rtp_random the first TUNING + TEST prompts of one fixed order, whatever --seed says, are left out.
A GRU that reads from left to right gives an answer at every position, so every prefix of every text is trained on at once, which is what
cutting at random would do one at a time (Yang and Klein 2021; Dekoninck et al. 2024 cut at random).
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import ministeer
from ministeer.baselines.classifier import PrefixClassifier

TUNING, TEST = 50, 400         # prompts of rtp_random that are kept for the search and for the result; see completions.provoking
SPLIT = 0                       # the seed of their order, one for all runs: a classifier trained once may then be used with every --seed
LENGTH = 128                    # tokens of a text that are read


def sentiment(folder):
    """-> texts, labels from 0 to 1"""
    rows = [row for row in lines(folder / "imdb.jsonl", "text", "label", "split") if row["split"] == "train"]
    need(rows)
    return [row["text"] for row in rows], [float(row["label"] == "pos") for row in rows]


def toxicity(folder):
    """-> texts, labels from 0 to 1: the worse of prompt and continuation (Pei et al. 2023)"""
    fields = "text", "toxicity", "continuation", "continuation_toxicity"
    rows = [row for row in lines(folder / "rtp_random.jsonl", *fields) if len(row["text"]) >= 3]
    random.Random(SPLIT).shuffle(rows)          # as rivals.py orders its prompts, so the first ones are its own
    kept = {row["text"] for row in rows[:TUNING + TEST]}
    rows = [row for row in [*rows[TUNING + TEST:], *lines(folder / "rtp_toxic.jsonl", *fields)] if row["text"] not in kept]
    rows = [row for row in rows if None not in (row["continuation"], row["toxicity"], row["continuation_toxicity"])]
    need(rows)
    return [row["text"] + row["continuation"] for row in rows], [max(row["toxicity"], row["continuation_toxicity"]) for row in rows]


def lines(path, *fields):
    """The rows of a file, each of which must have these fields."""
    if not path.is_file():
        raise ValueError(f"no {path.name} in {path.parent}.")
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    lack = next((field for row in rows for field in fields if field not in row), None)
    if lack:
        raise ValueError(f"a row of {path.name} has no {lack!r}; every row needs {', '.join(fields)}.")
    return rows


def need(rows):
    if len(rows) < 10:
        raise ValueError(f"{len(rows)} texts are left to train on; 10 or more are needed, some hundreds for a useful classifier.")


def train(ids, labels, embedding, epochs, seed):
    """-> a PrefixClassifier. Its embedding is a learned projection of the language model's, which knows words that the texts do not have."""
    torch.manual_seed(seed)
    classifier = PrefixClassifier(*embedding.shape[:1])
    scaled = embedding / embedding.std()
    project = torch.nn.Linear(embedding.shape[1], classifier.embedding.embedding_dim, bias=False)
    drop = torch.nn.Dropout(0.3)
    some = [project.weight, *classifier.gru.parameters(), *classifier.head.parameters()]
    steps = epochs * -(-len(ids) // 32)
    optimizer = torch.optim.AdamW(some, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    order = random.Random(seed)
    with tqdm(total=steps, unit="step") as bar:
        for _ in range(epochs):
            numbers = order.sample(range(len(ids)), len(ids))
            for start in range(0, len(ids), 32):
                batch = numbers[start:start + 32]
                x = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in batch], batch_first=True)
                real = torch.arange(x.shape[1]) < torch.tensor([len(ids[i]) for i in batch])[:, None]
                states, _ = classifier.gru(drop(project(scaled[x])))
                target = torch.tensor([labels[i] for i in batch])[:, None].expand(-1, x.shape[1])
                loss = F.binary_cross_entropy_with_logits(classifier.head(drop(states))[..., 0][real], target[real])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
    with torch.no_grad():
        classifier.embedding.weight.copy_(project(scaled))
    return classifier.requires_grad_(False).eval()


def ranked(classifier, ids, labels, lengths=(8, 16, 32, 64, LENGTH)):
    """-> {tokens: how often a held-out text of class 1 scores above one of class 0 after so many tokens}; 0.5 is guessing, 1 is always.

    The area under the ROC curve, which a lopsided share of the classes does not flatter. Labels from 0.3 to 0.5 are not clear and left out.
    """
    found = {}
    for length in lengths:
        scores = torch.stack([classifier.score(classifier.read(torch.tensor([some[:length]])))[0] for some in ids])
        ones, zeros = (scores[[i for i, label in enumerate(labels) if clear(label)]] for clear in (lambda x: x >= 0.5, lambda x: x < 0.3))
        found[length] = (ones[:, None] > zeros).float().mean().item()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("sentiment", "toxicity"))
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokens and embedding it reads")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    try:
        if args.epochs < 1:
            raise ValueError(f"--epochs must be 1 or more; given: {args.epochs}.")
        texts, labels = {"sentiment": sentiment, "toxicity": toxicity}[args.task](args.data)
        model, tokenizer = ministeer.load(args.model)
    except (ValueError, OSError) as error:
        print(f"train_classifier.py: {error}", file=sys.stderr)
        sys.exit(2)
    ids = [tokenizer.encode(text)[:LENGTH] for text in texts]
    held = set(random.Random(args.seed).sample(range(len(ids)), len(ids) // 5))
    mine = [[some[i] for i in range(len(ids)) if i not in held] for some in (ids, labels)]
    embedding = model.get_parameter(model.embedding_name).float()
    classifier = train(*mine, embedding, args.epochs, args.seed)
    found = ranked(classifier, *[[some[i] for i in sorted(held)] for some in (ids, labels)])
    print(f"{args.task}: {len(mine[0])} texts; of {len(held)} held out, pairs ranked rightly after so many tokens:",
          ", ".join(f"{length}: {share:.0%}" for length, share in found.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    classifier.save(args.out / f"{args.task}.safetensors")


if __name__ == "__main__":
    main()
