"""Does any vector change the mood of a text, or its insults? A large search, beside searches by chance.

    python -m benchmarks.search neg-to-pos --data FOLDER        # or pos-to-neg, toxicity

A search has some 18,000 cells. A cell is a pair of texts (search_pairs.py), a place, a layer, and a strength
with a sign. The place is the front, as in Algorithm 1, or every position, with the difference at the pair's
last tokens. The strength is a fraction of the mean norm of the stream that the block reads.

Each round on the tuning prompts keeps fewer cells (successive halving). Three rounds compare log-odds of the
next token, wanted words against unwanted ones. Strong additions can move these without changing texts as
wanted, so the cells to keep are taken in turn from each place and strength. Two rounds of completions follow.
The winner has the best score among cells with disfluency at most 1.5 times the unsteered model's.

The best of many cells is good by chance alone. So the same search, with as many cells, also runs on random
vectors of the same norms and on shuffled pairs (plus with plus, minus with minus), --controls times each. The
winner of the pairs should do better than their winners.

All winners complete the test prompts once, beside five random vectors of the winner's norm and, with
--rivals, the methods of rivals.py at the strengths that were chosen there. Sentiment has a second judge,
which the search does not use. Tests are paired, and their p-values are corrected together.

Writes OUT/search-TASK.json, .md, .png, and the winner as OUT/search-TASK.safetensors, which `rivals --steer`
reads. --front searches in the same way, but only at the front, and writes OUT/search-TASK-front. An
interrupted run continues where it stopped. --estimate only says how many hours the command would take here.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ministeer.baselines import logits
from ministeer.baselines.classifier import PrefixClassifier
from ministeer.evaluation import measure
from ministeer.methods.many_pairs import differences
from ministeer.steering import Steer, random_like, steering_vectors
from ministeer.utils import check_target, printable, write

from . import jobs, linear_judge, rivals
from .completions import disfluency_of, sums_by_prompt
from .lab import RANDOM, Lab, chunks, faults_in_one_line
from .search_pairs import CHATS, CUES, PAIRS, WORDS
from .search_report import WINNER, compare, draw, report

FRONT, EVERY = "front", "every position"
STRENGTHS = {FRONT: (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), EVERY: (0.05, 0.1, 0.2, 0.35, 0.5, 1.0)}
READ = 6                                # tokens of a tuning prompt before the cue, in the rounds of log-odds
ROUNDS = ((1, 1530), (4, 192), (16, 32))        # of log-odds: (tuning prompts, cells kept)
FINALS = ((16, 8), (50, 1))                     # of completions: the same
SHORT = 40                              # tokens of these completions, at most
ROWS = 120                              # texts in one batch
TRAINING = 2000                         # reviews that the second judge learns from, and is tested on


@dataclass
class Direction:
    """A vector before every block, with coeff 1 scaled to the mean norm of the stream there.

    name: the texts that it comes from. place: FRONT or EVERY. steers: one for each layer
    """
    name: str
    place: str
    steers: list

    def at(self, layer, strength):
        steer = self.steers[layer]
        return steer.scaled(strength * steer.coeff)


def stream_norms(lab, prompts):
    """The mean norm of resid[l] over all positions of the prompts but BOS, for each layer."""
    norms = []
    for prompt in prompts:
        resid = lab.model.residuals(torch.tensor([lab.tokenizer.encode(prompt)], device=lab.model.device))
        norms.append(torch.stack([x[0, 1:].float().norm(dim=-1).mean() for x in resid]))
    return torch.stack(norms).mean(dim=0)


def shuffled(pairs, seed):
    """Equally many pairs, each of two plus texts or of two minus texts, so without the contrast."""
    order = random.Random(seed).sample(pairs, len(pairs))
    return [(a[side], b[side]) for side in (0, 1) for a, b in zip(order[::2], order[1::2], strict=True)]


def directions(lab, task, kind, norms):
    """-> the Directions of a search: kind "pairs", "random SEED" or "shuffled SEED" """
    model, tokenizer = lab.model, lab.tokenizer
    pairs, chats = PAIRS[task], CHATS[task] if tokenizer.chat_template else []
    name, _, seed = kind.partition(" ")
    if name == "shuffled":
        pairs, chats = shuffled(pairs, int(seed)), shuffled(chats, int(seed))
    prompts = [tuple(tokenizer.chat([{"role": "user", "content": text}]) for text in pair) for pair in chats]
    layers = range(model.config.n_layer)

    def scaled(steer):
        rows = float(steer.vector.norm(dim=-1).mean())
        return steer.scaled(float(norms[steer.layer]) / rows if rows else 0.0)

    def everywhere(name, states):
        return name, EVERY, [Steer(l, states[l], fingerprint=model.fingerprint) for l in layers]

    names = [f"{plus!r} - {minus!r}" for plus, minus in pairs]
    made = [(name, FRONT, steering_vectors(model, tokenizer, *pair, layers))
            for name, pair in zip(names, pairs, strict=True)]
    names += [f"{plus!r} - {minus!r} as a chat" for plus, minus in chats]
    states = differences(model, tokenizer, *zip(*pairs, *prompts, strict=True))
    made += [everywhere(name, row) for name, row in zip(names, states, strict=True)]
    made.append(everywhere(f"mean of {len(pairs)} pairs", states[:len(pairs)].mean(dim=0)))
    if lab.args.front:
        made = [direction for direction in made if direction[1] == FRONT]
    if name == "random":
        made = [(pair, place, [random_like(s, 1000 * (1 + int(seed)) + i) for s in steers])
                for i, (pair, place, steers) in enumerate(made)]
    return [Direction(pair, place, [scaled(s) for s in steers]) for pair, place, steers in made]


def all_cells(found):
    """-> [number of the Direction, layer, strength] of every cell, added and subtracted.

    If two texts end with the same token, their difference there is 0 before block 0, which gives no cell.
    """
    return [[i, steer.layer, sign * strength]
            for i, direction in enumerate(found) for steer in direction.steers if steer.coeff
            for strength in STRENGTHS[direction.place] for sign in (1, -1)]


def word_ids(tokenizer, words):
    """The ids of those words that are single tokens after a space."""
    encoded = [tokenizer.encode(f" {word}", bos=False) for word in words]
    ids = [ids[0] for ids in encoded if len(ids) == 1]
    if not ids:
        raise ValueError("none of the words of search_pairs.py is a single token of this model's tokenizer.")
    return ids


@torch.no_grad()
def log_odds(model, tokenizer, prompts, steers, kind, unkind):
    """log p(kind words) - log p(unkind words) of the next token, mean over prompts, under each of `steers`.

    steers: all of one layer, so that each prompt is read up to there once. One row of a batch for each.
    """
    layer, totals = steers[0].layer, torch.zeros(len(steers))
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
        pos = torch.arange(ids.shape[1], device=model.device)
        start = model.residuals(ids, stop_layer=layer)[-1]
        for first in range(0, len(steers), ROWS):
            rows = steers[first:first + ROWS]
            x = start.expand(len(rows), -1, -1)
            last = model.run(x, pos, merged(rows), first_layer=layer)[-1][:, -1:]
            logp = model.unembed(last)[:, 0].float().log_softmax(dim=-1)
            odds = logp[:, kind].logsumexp(dim=-1) - logp[:, unkind].logsumexp(dim=-1)
            totals[first:first + len(rows)] += odds.cpu()
    return (totals / len(prompts)).tolist()


def merged(rows):
    """One Steer for each row of a batch -> Steers with a coeff for each row, equal vectors only once."""
    added = {}
    for i, s in enumerate(rows):
        steer, coeff = added.setdefault(id(s.vector), (s, torch.zeros(len(rows))))
        coeff[i] = s.coeff
    return [steer.scaled(coeff) for steer, coeff in added.values()]


def keep(cells, scores, groups, n):
    """The n best cells, taken in turn from each group: first the best of each, then the second best, …"""
    ranked, rank = sorted(range(len(cells)), key=lambda i: -scores[i]), {}
    place = {}
    for i in ranked:
        place[i] = rank[groups[i]] = rank.get(groups[i], -1) + 1
    return [cells[i] for i in sorted(ranked, key=lambda i: (place[i], -scores[i]))[:n]]


def seconds(work):
    """How long work() takes. The first call, which is not timed, warms up."""
    work()
    start = time.monotonic()
    work()
    return time.monotonic() - start


class Search:
    """What the searches of one task share, whatever vectors they try."""

    def __init__(self, lab, task):
        self.lab, self.task = lab, task
        self.scorer = lab.judge("profanity" if task == "toxicity" else "vader")
        self.sign = 1 if task == "neg-to-pos" else -1       # times the judge's score: the higher, the better
        self.tuning, self.test, self.new = rivals.texts(lab, task)
        self.short = min(self.new, SHORT)
        heads = [lab.tokenizer.decode(lab.tokenizer.encode(text)[1:1 + READ]) for text in self.tuning]
        self.cued = [head + CUES[task] for head in heads]
        self.words = [word_ids(lab.tokenizer, words.split()) for words in WORDS[task]]
        self.norms = stream_norms(lab, self.tuning[:16])

    def best(self, kind):
        """-> the winner of one search: its Steer, cell in words, score, and the cells of each round"""
        lab, found = self.lab, directions(self.lab, self.task, kind, self.norms)
        cells, counts = all_cells(found), []
        for number, (n_prompts, survivors) in enumerate(ROUNDS):
            counts.append(len(cells))
            by_layer = {}
            for cell in cells:
                by_layer.setdefault(cell[1], []).append(cell)

            def odds(_, number, layer, here=by_layer, prompts=self.cued[:n_prompts]):
                steers = [found[i].at(layer, strength) for i, layer, strength in here[layer]]
                return log_odds(lab.model, lab.tokenizer, prompts, steers, *self.words)

            results = lab.run([[kind, number, layer] for layer in sorted(by_layer)], odds)
            cells = [cell for layer in sorted(by_layer) for cell in by_layer[layer]]
            scores = [score for row in results.values() for score in row]
            groups = [(found[i].place, abs(strength)) for i, _, strength in cells]
            cells = keep(cells, scores, groups, survivors)
        for n_prompts, survivors in FINALS:
            counts.append(len(cells))
            n_prompts = min(n_prompts, len(self.tuning))
            steers = [found[i].at(layer, strength) for i, layer, strength in cells]
            results = self.completions(kind, steers, n_prompts)
            limit = rivals.LIMIT * self.completions("unsteered", [None], n_prompts)[0]["disfluency"][0]
            order = sorted(range(len(cells)), key=lambda i: (results[i]["disfluency"][0] > limit,
                                                             -results[i]["score"]))
            tried = [{"cell": self.in_words(found, cells[i]), **results[i]} for i in order]
            cells = [cells[i] for i in order[:survivors]]
        i, layer, strength = cells[0]
        note = {"method": "search", "task": self.task, "kind": kind, "cell": tried[0]["cell"]}
        return {"steer": replace(found[i].at(layer, strength), note=note), "cell": tried[0]["cell"],
                "score": tried[0]["score"], "within": tried[0]["disfluency"][0] <= limit, "counts": counts,
                "finalists": tried}

    def in_words(self, found, cell):
        i, layer, strength = cell
        return f"{found[i].name}, {found[i].place}, layer {layer}, {strength:+g} of the norm"

    def completions(self, kind, steers, n_prompts):
        """-> for each of `steers`, rivals.summary of one continuation of the first tuning prompts"""
        size, prompts = max(1, ROWS // n_prompts), self.tuning[:n_prompts]

        def work(_, __, first):
            return self.write_and_score(steers[first:first + size], prompts)

        units = [[kind, f"{n_prompts} × {self.short} tokens", first] for first in range(0, len(steers), size)]
        return [result for row in self.lab.run(units, work).values() for result in row]

    def write_and_score(self, steers, prompts):
        lab, results = self.lab, []
        for rows in lab.generate_all(prompts, steers, 1, self.short, rivals.SAMPLING, lab.args.seed):
            continuations = [text for row in rows for text in row]
            nll = measure.disfluency(lab.model, lab.tokenizer, prompts, continuations)
            scores = self.scorer([text.strip() for text in continuations])
            results.append(rivals.summary(scores, nll, 1, self.sign, lab.args.seed))
        return results

    def hours(self):
        """About how long the command takes on this machine, from the time of one batch of each kind of work.

        Methods of --rivals are counted like ActAdd.
        """
        lab, args, layer = self.lab, self.lab.args, self.lab.model.config.n_layer // 2
        found = directions(lab, self.task, "pairs", self.norms)
        cells, odds, texts = len(all_cells(found)), 0, 0
        for n_prompts, kept in ROUNDS:
            odds, cells = odds + n_prompts * cells, kept
        for n_prompts, kept in FINALS:
            texts, cells = texts + n_prompts * cells, kept
        steers = [found[i % len(found)].at(layer, 1.0) for i in range(ROWS)]
        prompts = (self.tuning * ROWS)[:ROWS]
        odds *= seconds(lambda: log_odds(lab.model, lab.tokenizer, self.cued[:1], steers, *self.words)) / ROWS
        text = seconds(lambda: self.write_and_score(steers[:1], prompts)) / ROWS
        searches = 1 + 2 * args.controls
        tests = len(self.test) * ((1 + searches + len(args.rivals)) * args.repeats + len(RANDOM))
        return (searches * (odds + texts * text) + tests * text * self.new / self.short) / 3600

    def test_once(self, conditions, judges):
        """-> {condition: {judge's name: scores by prompt, "JUDGE, reached", "disfluency", "example"}}

        conditions: {name: (a Steer, None or a LogitMixer, continuations of each prompt)}
        """
        lab, versions = self.lab, ", ".join(judge.version for judge in judges)

        def write_and_score(_, name, repeats, first, n, __):
            what, prompts = conditions[name][0], self.test[first:first + n]
            if isinstance(what, logits.LogitMixer):
                rows = logits.generate(lab.model, lab.tokenizer, prompts, what, repeats, self.new,
                                       seed=lab.args.seed, **rivals.SAMPLING)
            else:
                rows = lab.generate(prompts, repeats, self.new, what, rivals.SAMPLING, lab.args.seed)
            texts = [text for row in rows for text in row]
            nll = measure.disfluency(lab.model, lab.tokenizer, [p for p in prompts for _ in range(repeats)],
                                     texts)
            stripped = [text.strip() for text in texts]
            return {"scores": {judge.name: judge(stripped) for judge in judges}, "nll": nll,
                    "example": stripped[0]}

        parts, results = {}, {}
        for name, (_, repeats) in conditions.items():
            size = max(1, ROWS // repeats)
            parts[name] = [["test", name, repeats, first, min(size, len(self.test) - first), versions]
                           for first in range(0, len(self.test), size)]
        done = lab.run([unit for units in parts.values() for unit in units], write_and_score)
        for name, (_, repeats) in conditions.items():
            here = [done[tuple(unit)] for unit in parts[name]]
            nll = [pair for part in here for pair in part["nll"]]
            results[name] = {"disfluency": disfluency_of(sums_by_prompt(nll, repeats), lab.args.seed),
                             "example": here[0]["example"]}
            for judge in judges:
                scores = chunks([score for part in here for score in part["scores"][judge.name]], repeats)
                results[name][judge.name] = [statistics.mean(row) for row in scores]
                results[name][f"{judge.name}, reached"] = [statistics.mean(self.sign * x > 0 for x in row)
                                                           for row in scores]
        return results


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(PAIRS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("-n", "--n", type=int, default=120, help="test prompts (default 120)")
    parser.add_argument("--repeats", type=int, default=3, help="continuations of each (default 3)")
    parser.add_argument("--controls", type=int, default=5,
                        help="searches of random vectors, and of shuffled pairs (default 5 each)")
    parser.add_argument("--front", action="store_true", help="search only at the front, as in Algorithm 1")
    parser.add_argument("--rivals", nargs="*", default=[], metavar="METHOD=STRENGTH",
                        help="methods of rivals.py for the test, such as LMA=24; Prompted needs no strength")
    parser.add_argument("--classifier", help="default OUT/toxicity.safetensors or OUT/sentiment.safetensors")
    parser.add_argument("--judge", help="default profanity for toxicity, vader for sentiment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="results")
    parser.add_argument("--estimate", action="store_true",
                        help="only say how many hours the command would take here")
    args = parser.parse_args()
    args.layer, args.coeff, args.protocol, args.tuning = None, None, "paper", FINALS[-1][0]
    args.experiment = f"search-{args.task}" + "-front" * args.front
    with faults_in_one_line("search.py"), jobs.workers(args.device) as rank:
        for name in ("n", "repeats"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be 1 or more; given: {getattr(args, name)}.")
        if not 0 <= args.controls <= 100:
            raise ValueError(f"--controls must be 0 to 100; given: {args.controls}.")
        Path(args.out).mkdir(parents=True, exist_ok=True)
        run(args, rank)


def run(args, rank):
    """Search, test once; the first process writes the results."""
    lab = Lab(args, rank)
    # These do not change what a search finds, or args.experiment tells them apart.
    for name in ("n", "repeats", "controls", "front", "rivals", "classifier", "estimate"):
        del lab.about[name]
    # A reader may try other pairs and words.
    lab.about["search"] = [PAIRS[args.task], CHATS[args.task], CUES[args.task], WORDS[args.task],
                           [*STRENGTHS.values()], READ, ROUNDS, FINALS, SHORT]
    check_target(lab.out / f"{args.experiment}.safetensors")
    methods = rivals_by_name(lab, args)
    search = Search(lab, args.task)
    if args.estimate:
        print(f"about {search.hours():.1f} hours, by one process on {args.device} in {args.dtype}.")
        return
    judges = [search.scorer]
    if args.task != "toxicity":
        judges.append(second_judge(lab))
    best = {"pairs": search.best("pairs")}
    for seed in range(args.controls):
        for name in ("random", "shuffled"):
            best[f"{name} {seed}"] = search.best(f"{name} {seed}")
    winner = best["pairs"]["steer"]
    conditions = {"unsteered": (None, args.repeats), WINNER: (winner, args.repeats)}
    for seed, name in enumerate(RANDOM):        # five, so one continuation of each is enough
        conditions[name] = (random_like(winner, seed), 1)
    conditions |= {f"best of {kind}": (found["steer"], args.repeats) for kind, found in best.items()
                   if kind != "pairs"}
    conditions |= {name: (method, args.repeats) for name, method in methods.items()}
    results = search.test_once(conditions, judges)
    base = search.completions("unsteered", [None], min(FINALS[-1][0], len(search.tuning)))[0]
    if rank[0] != 0:
        return
    winner.save(lab.out / f"{args.experiment}.safetensors")
    tests = compare(results, judges, list(methods), best, search.sign, args.seed)
    text = printable(report(lab, search, best, base, results, tests, judges))
    about = {"setting": {key: value for key, value in vars(args).items() if key not in ("data", "out")},
             "unsteered on tuning prompts": base, "test": results,
             "best": {kind: {**found, "steer": None} for kind, found in best.items()},
             "tests": [[*key, *test] for key, test in tests.items()]}
    write(lab.out / f"{args.experiment}.json", json.dumps(about).encode())
    write(lab.out / f"{args.experiment}.md", text.encode())
    draw(lab, search, best, base, results, judges)
    print(text)


def second_judge(lab):
    """-> the linear judge, trained on reviews. Sets lab.accuracy: how often each of the two is right."""
    reviews = lab.rows("imdb.jsonl", text=str, label=str, split=str)
    random.Random(lab.args.seed).shuffle(reviews)
    parts = {name: [row for row in reviews if row["split"] == name][:TRAINING] for name in ("train", "test")}
    judge = linear_judge.linear(parts["train"])
    lab.accuracy = {other.name: linear_judge.accuracy(other, parts["test"])
                    for other in (judge, lab.judge("vader"))}
    return judge


def rivals_by_name(lab, args):
    """--rivals -> {name in words: a LogitMixer}. Raises ValueError for an unknown method or strength."""
    chosen = dict(entry.partition("=")[::2] for entry in args.rivals)
    classifier, digest = None, ""
    if any("Classifier" in name or name == "FUDGE" for name in chosen):
        path = rivals.classifier_path(args)
        classifier, digest = PrefixClassifier.load(path).to(args.device), f", {rivals.digest(path)}"
    cells, methods = rivals.cells(lab, args.task, classifier, [*chosen]), {}
    for name, strength in chosen.items():
        if name == "ActAdd" or strength not in cells.get(name, {}):
            known = [f"{method}={cell}" if cell else method for method in cells for cell in cells[method]]
            raise ValueError(f"--rivals {name}={strength} is no method of this task with such a strength. "
                             f"Of those methods possible: {', '.join(known[1:])}.")
        uses = digest if cells[name][strength].guide else ""
        methods[f"{name} {strength}".strip() + uses] = cells[name][strength]
    return methods


if __name__ == "__main__":
    main()
