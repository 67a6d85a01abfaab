"""ministeer beside its peers on the same work: one process each, taking turns; medians and ratios in a table.

    python -m benchmarks.speed      (about 25 minutes on two cores if transformers is the only peer here)
    python -m benchmarks.speed --tasks vector sweep --dtype bfloat16 --out speed.jsonl
    python -m benchmarks.speed --python steering-vectors=other/bin/python --minutes 20
    python -m benchmarks.speed --contestants llama.cpp compiled --tasks texts-1 texts-8 texts-32
    python -m benchmarks.speed --model llama-3.1-8b --random --device cuda --dtype bfloat16

A figure is how many times as fast as transformers with a forward pre-hook: the median over repetitions that
ran one after the other. Trust ratios within one run, not seconds across runs. A peer that is not installed is
left out with a message; --python names the interpreter of one that needs an environment of its own. --out
appends one JSON line for each measurement. The peers are in peers.py. Ctrl-C prints what is done.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .peers import CONTESTANTS, NEW, PENALTY, TOP_P

LLAMA_8B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
            "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16"}
SAMPLED = f"top-p {TOP_P}, penalty {PENALTY:g}"
# name: (what the table calls it, the method of a contestant and its arguments)
TASKS = {
    "load": ("load, process start to ready", None),
    "vector": ("vector of one pair before block 6", ["vector"]),
    "sweep": ("sweep, 10 layers × 4 coefficients, next token", ["sweep"]),
    "generate-1": (f"{NEW} steered tokens, batch 1, greedy", ["generate", 1]),
    "generate-8": (f"{NEW} steered tokens, batch 8, greedy", ["generate", 8]),
    "generate-32": (f"{NEW} steered tokens, batch 32, greedy", ["generate", 32]),
    "texts-1": (f"{NEW} steered tokens as text, batch 1, whole vocabulary", ["texts", 1]),
    "texts-8": (f"{NEW} steered tokens as text, batch 8, whole vocabulary", ["texts", 8]),
    "texts-32": (f"{NEW} steered tokens as text, batch 32, whole vocabulary", ["texts", 32]),
    "sample-8": (f"{NEW} steered tokens, batch 8, {SAMPLED}", ["generate", 8, NEW, True]),
    "cell": (f"one layer of the sweep of 4.1: 200 × 40 tokens, {SAMPLED}", ["generate", 200, 40, True]),
    "score": ("scoring 64 × 128 tokens", ["score"]),
}


def peak_mib():
    """The most memory that this process has held, in MiB; None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return None


def serve(args):
    """Be one contestant: read one task per line, write [seconds, answer, peak memory] per line."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1",
                      TOKENIZERS_PARALLELISM="false")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)                               # whatever a library prints goes with the errors
    torch.set_num_threads(args.threads)
    contestant = CONTESTANTS[args.serve](args.model, args.dtype, args.device)
    print(json.dumps(peak_mib()), file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        start = time.perf_counter()
        answer = getattr(contestant, method)(*arguments)
        if args.device != "cpu":
            torch.cuda.synchronize()
        print(json.dumps([time.perf_counter() - start, answer, peak_mib()]), file=answers, flush=True)


class Process:
    """A contestant in a process of its own."""

    def __init__(self, name, args):
        self.name = name
        self.log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [args.pythons.get(name, sys.executable), "-m", "benchmarks.speed", "--serve", name,
                   "--model", args.model, "--dtype", args.dtype, "--device", args.device,
                   "--threads", str(args.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads),
                       "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True, env=environment)
        self.peak = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            last = self.log.read().strip().split("\n")[-1]
            self.close()
            raise RuntimeError(f"{self.name} stopped: {last}")
        return json.loads(line)

    def ask(self, task):
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()


def measure(task, names, args, say):
    """-> {name: {"seconds": one per repetition, "answer", "peak_mib"}}.

    The contestants take turns; the first round does not count. One that fails is left out with a message to
    `say`, and one that has no such task without a message. If time runs out, only the rounds that all of them
    finished count, and args.ended is True.
    """
    method = TASKS[task][1]
    results = {name: {"seconds": [], "answer": None, "peak_mib": None} for name in names
               if method is None or getattr(CONTESTANTS[name], method[0], None)}
    running = {}
    try:
        for repetition in range(-1, args.reps):
            for name in list(results):
                if time.monotonic() > args.end:
                    raise KeyboardInterrupt
                try:
                    if task == "load":
                        begin = time.perf_counter()
                        process = Process(name, args)
                        seconds, answer, peak = time.perf_counter() - begin, None, process.peak
                        process.close()
                    else:
                        if name not in running:
                            running[name] = Process(name, args)
                        seconds, answer, peak = running[name].ask(TASKS[task][1])
                except RuntimeError as error:
                    say(f"{task}: {error}")
                    results.pop(name)
                    continue
                if repetition >= 0:
                    results[name]["seconds"].append(seconds)
                results[name].update(answer=answer, peak_mib=peak)
    except KeyboardInterrupt:
        args.ended = True
        rounds = min(len(result["seconds"]) for result in results.values())
        for result in results.values():
            del result["seconds"][rounds:]
        return results if rounds else {}
    finally:
        for process in running.values():
            with contextlib.suppress(OSError):
                process.close()
    return results


def agree(a, b, dtype):
    """Whether two answers are the same: lists of tokens exactly, numbers up to the rounding of the dtype."""
    if isinstance(a, list):
        return a == b
    return abs(a - b) <= (1e-3 if dtype == "float32" else 3e-2) * abs(b)


def installed(name, args, say):
    """The version of a contestant's library; None, with a message to `say`, if it is not installed."""
    library = CONTESTANTS[name]
    if library.package == "ministeer":
        return "this one"
    if name not in args.pythons:
        try:
            return importlib.metadata.version(library.version_of)
        except importlib.metadata.PackageNotFoundError:
            say(f"{name} is not installed here and is left out; "
                f"name the interpreter that has it with --python {name}=…")
            return None
    module = library.package.partition(".")[0]
    code = f"import importlib.metadata as m, {module}; print(m.version({library.version_of!r}))"
    done = subprocess.run([args.pythons[name], "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"{name} is left out: {args.pythons[name]} says {done.stderr.strip().splitlines()[-1]}")
        return None
    return done.stdout.strip().splitlines()[-1]


def table(rows, names, versions, args):
    """Print the results. rows: (task, results of `measure`, {name: ratio to transformers})"""
    others = [name for name in names if name != "transformers"]
    fewest = min(len(results["transformers"]["seconds"]) for _, results, _ in rows)
    print(f"\n{args.dtype}, {args.device}, {args.threads} threads, torch {torch.__version__}, median of "
          f"{args.reps}{f' (of {fewest} where it ended early)' if fewest < args.reps else ''}; "
          f"times as fast as transformers {versions['transformers']}; "
          "in brackets the peak memory of the process, MiB\n")
    print("| work | " + " | ".join(others) + " | transformers |\n|" + "---|" * (len(others) + 2))
    kept = {name: CONTESTANTS[name].bits or args.dtype.strip("bfloat") for name in names}
    print("| bits of a weight | " + " | ".join(kept[name] for name in [*others, "transformers"]) + " |")
    for task, results, ratios in rows:
        base = results["transformers"]
        cells = [cell(name, results, ratios, args.dtype) for name in others]
        print(f"| {TASKS[task][0]} | " + " | ".join(cells)
              + f" | {statistics.median(base['seconds']):.3g} s ({base['peak_mib']}) |")
    medians = {task: {name: statistics.median(result["seconds"]) for name, result in results.items()}
               for task, results, _ in rows}
    if {"generate-8", "sample-8"} <= set(medians):
        greedy, sampled = medians["generate-8"], medians["sample-8"]
        print("\nTime of sampling against greedy, batch 8: "
              + ", ".join(f"{name} {sampled[name] / greedy[name]:.2f}" for name in names
                          if name in greedy and name in sampled))
    if "generate-1" in medians:
        speed, size, limit = bound(args)
        print(f"\nAt batch 1 memory is the limit: reading {size:.2f} GB of weights at {speed:.0f} GB/s "
              f"allows {limit:.0f} tokens/s. Reached: "
              + ", ".join(f"{name} {NEW / seconds:.0f}" for name, seconds in medians["generate-1"].items())
              + ".")
    if "score" in medians:
        speed, work, plain = matmul_time(args)
        print(f"\nIn scoring, products of matrices are most of the work: {work / 1e9:.0f} GFLOP take "
              f"{plain:.2f} s at the {speed / 1e9:.0f} GFLOP/s of one large torch.matmul. "
              "In shares of that speed: "
              + ", ".join(f"{name} {plain / seconds:.0%}" for name, seconds in medians["score"].items())
              + ".")
    print("\n≠: its answer differs from transformers' answer. Not compared, because it does other work: "
          + (", ".join(name for name in others if not CONTESTANTS[name].exact) or "none") + ".")


def cell(name, results, ratios, dtype):
    if name not in results:
        return "–"
    answer, expected = results[name]["answer"], results["transformers"]["answer"]
    same = expected is None or not CONTESTANTS[name].exact or agree(answer, expected, dtype)
    return f"{ratios[name]:.2f} ({results[name]['peak_mib']}){'' if same else ' ≠'}"


def bound(args):
    """What memory allows at batch 1, where each token reads all weights once.

    -> (GB/s at which a sum reads, GB of weights, tokens/s)
    """
    torch.set_num_threads(args.threads)
    x, best = torch.ones(2 ** 28, device=args.device), 0.0          # 1 GiB
    for _ in range(6):
        start = time.perf_counter()
        x.sum().item()
        best = max(best, x.numel() * 4 / (time.perf_counter() - start))
    numbers = sum(map(math.prod, shapes_of(args.model).values()))
    size = numbers * (4 if args.dtype == "float32" else 2)
    return best / 1e9, size / 1e9, best / size


def matmul_time(args):
    """The time of scoring's products by torch.matmul, where each token meets each matrix but the embedding.

    The products inside attention are not counted. Packed products can be faster than torch.matmul.
    -> (FLOP/s of a large product of two matrices, FLOP of the task, seconds)
    """
    torch.set_num_threads(args.threads)
    x = torch.ones(2048, 2048, dtype=getattr(torch, args.dtype), device=args.device)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    shapes = shapes_of(args.model)
    looked_up = ["wpe.weight", "embed_positions.weight"]
    if any(name.startswith("lm_head") for name in shapes):      # otherwise the embedding is also the head
        looked_up += ["wte.weight", "embed_tokens.weight"]
    matrices = [math.prod(shape) for name, shape in shapes.items()
                if len(shape) == 2 and not name.endswith(tuple(looked_up))]
    work, speed = 2 * 64 * 128 * sum(matrices), 2 * 2048 ** 3 / best
    return speed, work, work / speed


def shapes_of(folder):
    """{name: shape} of a checkpoint's tensors."""
    from safetensors import safe_open
    shapes = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}    # noqa: SIM118
    return shapes


def random_checkpoint(folder, args):
    """Llama-3.1-8B's true shape with random weights: 16 GB in bfloat16, one shard per block."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes((Path(args.tokenizer) / "tokenizer.json").read_bytes())
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    shards, weight_map = {}, {}
    for name, tensor in shapes.items():
        parts = name.split(".")
        part = parts[2] if parts[1] == "layers" else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    for file, shard in shards.items():
        tensors = {}
        for name, shape in shard.items():
            if len(shape) == 1:                 # a norm
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensors[name] = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="weights/smollm2-135m",
                        help="a folder (default weights/smollm2-135m)")
    parser.add_argument("--random", action="store_true",
                        help="make the folder --model: Llama-3.1-8B's shape with random weights")
    parser.add_argument("--tokenizer", default="weights/smollm2-135m",
                        help="with --random: the folder whose tokenizer is used")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK",
                        help=f"from {', '.join(TASKS)}; all by default")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS),
                        metavar="NAME", help=f"from {', '.join(CONTESTANTS)}; transformers always runs")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH",
                        help="the interpreter of a peer")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="begin no measurement after so many minutes; the table has what is done by then")
    parser.add_argument("--out", help="append JSON lines here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args)
    # Not at the top: `serve` turns off the bars of libraries, which works only before tqdm is loaded.
    from tqdm import tqdm

    args.pythons = dict(pair.split("=", 1) for pair in args.python if "=" in pair)
    if args.reps < 1 or len(args.pythons) < len(args.python) or not set(args.pythons) <= set(CONTESTANTS):
        parser.error("--reps takes 1 or more, and --python NAME=PATH with one of " + ", ".join(CONTESTANTS))
    args.model = os.path.abspath(args.model)
    if args.random and not os.path.exists(args.model):
        parent = os.path.dirname(args.model)
        with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as folder:
            made = Path(folder) / "checkpoint"
            made.mkdir()
            random_checkpoint(made, args)
            os.rename(made, args.model)
    if not os.path.isfile(os.path.join(args.model, "config.json")):
        parser.error(f"no checkpoint in {args.model}; run `ministeer fetch smollm2-135m`")
    versions = {name: installed(name, args, print) for name in CONTESTANTS
                if name == "transformers" or name in args.contestants}
    names = [name for name, version in versions.items() if version]
    if "transformers" not in names:
        parser.error("all figures are ratios to transformers: pip install -e '.[bench]'")
    args.end, args.ended, rows = time.monotonic() + 60 * args.minutes, False, []
    for task in tqdm(args.tasks, "tasks"):
        results = {} if args.ended else measure(task, names, args, tqdm.write)
        if "transformers" not in results:
            continue
        base = results["transformers"]["seconds"]
        ratios = {name: statistics.median(a / b for a, b in zip(base, result["seconds"], strict=True))
                  for name, result in results.items()}
        rows.append((task, results, ratios))
        if args.out:
            about = {"task": task, "model": os.path.basename(args.model), "dtype": args.dtype,
                     "device": args.device, "threads": args.threads, "torch": torch.__version__,
                     "versions": versions, "ratios": ratios, "results": results}
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(about, ensure_ascii=False) + "\n")
    if rows:
        table(rows, names, versions, args)
    if args.ended:
        print("\nEnded early, by --minutes or Ctrl-C.")
    return None


if __name__ == "__main__":
    main()
