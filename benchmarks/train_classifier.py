"""Train the classifier of unfinished texts that FUDGE and LMA + Classifier ask: minutes on two cores.

    python -m benchmarks.train_classifier sentiment --data FOLDER       # the train rows of imdb.jsonl
    python -m benchmarks.train_classifier toxicity --data FOLDER        # rtp_random.jsonl, rtp_toxic.jsonl

imdb.jsonl has the fields text, label (pos or neg) and split; the others have text, continuation, toxicity and
continuation_toxicity. Writes OUT/sentiment.safetensors or OUT/toxicity.safetensors. Class 1 is positive, or
toxic. The classifier never judges, and it reads no text from the tuning or test prompts of rivals.py (see
prompts.py). A GRU that reads from left to right gives an answer at every position, so every prefix of every
text is trained on at once; cutting at random does that one prefix at a time (Yang and Klein 2021; Dekoninck
et al. 2024 cut at random).
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import ministeer
from ministeer.baselines.classifier import PrefixClassifier
from ministeer.utils import check_target

from . import rows
from .lab import faults_in_one_line
from .prompts import SPLIT, split

LENGTH = 128                    # tokens of a text that are read


def sentiment(folder):
    """-> texts, labels from 0 to 1"""
    reviews = [row for row in read(folder / "imdb.jsonl", text=str, label=str, split=str)
               if row["split"] == "train"]
    check_enough(reviews)
    return [row["text"] for row in reviews], [float(row["label"] == "pos") for row in reviews]


def toxicity(folder):
    """-> texts, labels from 0 to 1: the worse of prompt and continuation (Pei et al. 2023)"""
    fields = {"text": str, "toxicity": float | None, "continuation": str,
              "continuation_toxicity": float | None}
    tuning, test, rest = split(read(folder / "rtp_random.jsonl", **fields), SPLIT)
    reserved = {row["text"] for row in [*tuning, *test]}
    prompts = [row for row in [*rest, *read(folder / "rtp_toxic.jsonl", **fields)]
               if row["text"] not in reserved and None not in row.values()]
    check_enough(prompts)
    labels = [max(row["toxicity"], row["continuation_toxicity"]) for row in prompts]
    return [row["text"] + row["continuation"] for row in prompts], labels


def read(path, **fields):
    return rows.parse(rows.read(path), path, **fields)


def check_enough(texts):
    if len(texts) < 10:
        raise ValueError(f"{len(texts)} texts are left to train on; at least 10 are needed, "
                         "and some hundreds for a useful classifier.")


def train(ids, labels, embedding, epochs, seed):
    """-> a PrefixClassifier.

    Its embedding is a learned projection of the language model's, which also knows words that the texts do
    not have.
    """
    torch.manual_seed(seed)
    classifier = PrefixClassifier(len(embedding))
    scaled = embedding / embedding.std()
    project = torch.nn.Linear(embedding.shape[1], classifier.embedding.embedding_dim, bias=False)
    drop = torch.nn.Dropout(0.3)
    parameters = [project.weight, *classifier.gru.parameters(), *classifier.head.parameters()]
    steps = epochs * -(-len(ids) // 32)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
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
                logits = classifier.head(drop(states))[..., 0]
                loss = F.binary_cross_entropy_with_logits(logits[real], target[real])
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
    """-> {tokens: how often a text of class 1 beats one of class 0 after so many tokens}; chance is 0.5

    This is the area under the ROC curve, which does not depend on how common the classes are. Labels from 0.3
    to 0.5 are not clear and left out.
    """
    ones = [i for i, label in enumerate(labels) if label >= 0.5]
    zeros = [i for i, label in enumerate(labels) if label < 0.3]
    shares = {}
    for length in lengths:
        scores = torch.stack([classifier.score(classifier.read(torch.tensor([row[:length]])))[0]
                              for row in ids])
        shares[length] = (scores[ones][:, None] > scores[zeros]).float().mean().item()
    return shares


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_classifier", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("sentiment", "toxicity"))
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokens and embedding it reads")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    with faults_in_one_line("train_classifier.py"):
        run(args)


def run(args):
    """Read, train, test on a fifth of the texts, and save."""
    if args.epochs < 1:
        raise ValueError(f"--epochs must be 1 or more; given: {args.epochs}.")
    args.out.mkdir(parents=True, exist_ok=True)
    target = check_target(args.out / f"{args.task}.safetensors")
    texts, labels = {"sentiment": sentiment, "toxicity": toxicity}[args.task](args.data)
    model, tokenizer = ministeer.load(args.model)
    ids = [tokenizer.encode(text)[:LENGTH] for text in texts]
    held_out = sorted(random.Random(args.seed).sample(range(len(ids)), len(ids) // 5))
    kept = sorted(set(range(len(ids))) - set(held_out))
    embedding = model.get_parameter(model.embedding_name).float()
    classifier = train([ids[i] for i in kept], [labels[i] for i in kept], embedding, args.epochs, args.seed)
    shares = ranked(classifier, [ids[i] for i in held_out], [labels[i] for i in held_out])
    print(f"{args.task}: {len(kept)} texts; of {len(held_out)} held out, "
          "pairs ranked rightly after so many tokens:",
          ", ".join(f"{length}: {share:.0%}" for length, share in shares.items()))
    classifier.save(target)


if __name__ == "__main__":
    main()
