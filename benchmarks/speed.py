"""ministeer beside transformers with a forward pre-hook, on the same work: one process each, in turn, medians and ratios.

    python benchmarks/speed.py                      (about eight minutes on two cores)
    python benchmarks/speed.py --tasks vector sweep --reps 7 --out speed.jsonl

The ratio is how many times as fast as transformers, the median over repetitions that ran one after the other. Trust ratios of one run, not
seconds across runs. --out appends one JSON line for each measurement.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from tqdm import tqdm

PROMPT, PLUS, MINUS = "I went up to my friend and said", " love", " hate"
NEW, LAYERS, COEFFS, LAYER = 64, [0, 3, 6, 9, 12, 15, 18, 21, 24, 27], [1.0, 2.0, 4.0, 8.0], 6
SCORED = torch.randint(1000, 40000, (16, 128), generator=torch.Generator().manual_seed(0))


class Ministeer:
    packed = False

    def __init__(self, folder, dtype):
        import ministeer
        self.model, self.tokenizer = ministeer.load(folder, dtype=dtype, fast=self.packed)

    def vector(self):
        from ministeer import steering_vector
        return steering_vector(self.model, self.tokenizer, PLUS, MINUS, LAYER).vector.norm().item()

    def sweep(self):
        from ministeer.measure import sweep
        return sweep(self.model, self.tokenizer, PROMPT, PLUS, MINUS, LAYERS, COEFFS).float().max(dim=-1).values.sum().item()

    def generate(self, batch):
        from ministeer import steering_vector
        from ministeer.generation import Sampling, sample
        steer = [4 * steering_vector(self.model, self.tokenizer, PLUS, MINUS, LAYER)]
        ids = torch.tensor([self.tokenizer.encode(PROMPT)] * batch)
        steps = sample(self.model, ids, range(batch), Sampling(temperature=0, max_new_tokens=NEW), steer)
        return torch.stack(list(steps), dim=1)[0].tolist()

    def score(self):
        from ministeer.measure import _next_logprobs
        with torch.no_grad():
            return sum(_next_logprobs(self.model, ids, ()).sum().item() for ids in SCORED.split(8))


class MinisteerFast(Ministeer):
    packed = True


class Transformers:
    def __init__(self, folder, dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(self, text):
        return [0, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def hooked(self, change, layer=LAYER):
        return self.model.model.layers[layer].register_forward_pre_hook(change)

    def pair(self):
        return torch.tensor([self.encode(text) for text in (PLUS, MINUS)])

    def vector(self, layer=LAYER):
        seen = []
        hook = self.hooked(lambda block, args: seen.append(args[0]), layer)
        self.model(self.pair(), use_cache=False)
        hook.remove()
        self.difference = (seen[0][0] - seen[0][1])[1:]
        return self.difference.norm().item()

    def steered(self, layer, coeff):
        def add(block, args):
            if args[0].shape[1] == 1:               # a generated token: the vector lies on the prompt
                return None
            x = args[0].clone()
            x[:, 1:1 + len(self.difference)] += coeff * self.difference
            return (x, *args[1:])
        return self.hooked(add, layer)

    def sweep(self):
        """As somebody would who knows the library: the logits of the last position only, and one pass for the vectors of all layers."""
        hidden = self.model.model(self.pair(), output_hidden_states=True, use_cache=False).hidden_states
        ids, total = torch.tensor([self.encode(PROMPT)]), 0.0
        for layer in LAYERS:
            self.difference = (hidden[layer][0] - hidden[layer][1])[1:]
            for coeff in COEFFS:
                hook = self.steered(layer, coeff)
                total += self.model(ids, use_cache=False, logits_to_keep=1).logits.float().max().item()
                hook.remove()
        return total

    def generate(self, batch):
        self.vector()
        hook = self.steered(LAYER, 4)
        ids = torch.tensor([self.encode(PROMPT)] * batch)
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        hook.remove()
        return out[0, ids.shape[1]:].tolist()

    def score(self):
        total = 0.0
        for ids in SCORED.split(8):
            logits = self.model(ids, use_cache=False).logits[:, :-1].float()
            total += logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).sum().item()
        return total


CONTESTANTS = {"transformers": Transformers, "ministeer": Ministeer, "ministeer-fast": MinisteerFast}
TASKS = {"load": None, "vector": "vector", "sweep": "sweep", **{f"generate-{b}": ("generate", b) for b in (1, 8, 32)}, "score": "score"}


def serve(name, folder, dtype, threads):
    """One contestant: reads a task a line, writes seconds and answer a line."""
    torch.set_num_threads(threads)
    contestant = CONTESTANTS[name](folder, dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        start = time.perf_counter()
        answer = getattr(contestant, method)(*arguments)
        print(json.dumps([time.perf_counter() - start, answer]), flush=True)


def start(name, args):
    command = [sys.executable, __file__, "--serve", name, "--model", args.model, "--dtype", args.dtype, "--threads", str(args.threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if process.stdout.readline() != "ready\n":
        sys.exit(f"{name} did not start; run `{' '.join(command)}` to see why.")
    return process


def measure(task, running, args):
    """-> {name: [seconds, one a repetition]}, {name: answer}. The contestants take turns; a first round is not counted."""
    seconds, answers = {name: [] for name in running}, {}
    for _ in range(args.reps + 1):
        for name, process in running.items():
            if task == "load":
                begin = time.perf_counter()
                start(name, args).kill()
                took, answers[name] = time.perf_counter() - begin, None
            else:
                method = TASKS[task]
                process.stdin.write(json.dumps([method] if isinstance(method, str) else method) + "\n")
                process.stdin.flush()
                took, answers[name] = json.loads(process.stdout.readline())
            seconds[name].append(took)
    return {name: some[1:] for name, some in seconds.items()}, answers


def agree(a, b):
    return a == b if isinstance(a, list) or a is None else abs(a - b) <= 1e-3 * abs(b)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="weights/smollm2-135m", help="a folder (default weights/smollm2-135m)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="append JSON lines here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.model, args.dtype, args.threads)
    running = {name: start(name, args) for name in CONTESTANTS}
    rows = []
    for task in tqdm(args.tasks, "tasks"):
        seconds, answers = measure(task, running, args)
        ratios = {name: statistics.median(a / b for a, b in zip(seconds["transformers"], some, strict=True)) for name, some in seconds.items()}
        same = {name: agree(answer, answers["transformers"]) for name, answer in answers.items()}
        rows.append((task, seconds["transformers"], ratios, same))
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps({"task": task, "dtype": args.dtype, "threads": args.threads, "torch": torch.__version__,
                                       "seconds": seconds, "ratios": ratios, "same answer": same}) + "\n")
    for process in running.values():
        process.kill()
    names = [name for name in CONTESTANTS if name != "transformers"]
    print(f"{args.dtype}, {args.threads} threads, torch {torch.__version__}, median of {args.reps}; times as fast as transformers\n")
    print("| work | transformers | " + " | ".join(names) + " | same answers |\n|" + "---|" * (len(names) + 3))
    for task, base, ratios, same in rows:
        print(f"| {task} | {statistics.median(base):.3g} s | " + " | ".join(f"{ratios[name]:.2f}" for name in names)
              + f" | {'yes' if all(same.values()) else 'no'} |")
    return None


if __name__ == "__main__":
    main()
