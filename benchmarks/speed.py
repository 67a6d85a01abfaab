"""ministeer beside its peers on the same work: one process each, taking turns; medians and ratios, in one table.

    python benchmarks/speed.py                                  (about 25 minutes on two cores with transformers alone beside it)
    python benchmarks/speed.py --tasks vector sweep --dtype bfloat16 --out speed.jsonl
    python benchmarks/speed.py --python steering-vectors=other/bin/python
    python benchmarks/speed.py --model llama-3.1-8b --random --device cuda --dtype bfloat16

A figure is how many times as fast as transformers with a forward pre-hook: the median over repetitions that ran one after the other. Trust
ratios of one run, not seconds across runs. A peer that is not installed is left out with a word; --python names the interpreter of one that
wants an environment of its own. --out appends one JSON line for each measurement.
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

PROMPT, PLUS, MINUS, LAYER = "I went up to my friend and said", " love", " hate", 6
LAYERS, COEFFS, NEW = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27], [1.0, 2.0, 4.0, 8.0], 64
TOP_P, PENALTY = 0.3, 1.0
LLAMA_8B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
            "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16"}


class Ministeer:
    """The plain model, as `ministeer.load` gives it."""
    package, version_of = "ministeer", "ministeer"
    exact = True                    # whether its answers must be transformers' answers

    def __init__(self, folder, dtype, device):
        import ministeer
        self.model, self.tokenizer = ministeer.load(folder, dtype=dtype, device=device)
        self.device = device

    def vector(self):
        from ministeer import steering_vector
        return steering_vector(self.model, self.tokenizer, PLUS, MINUS, LAYER).vector.norm().item()

    def sweep(self):
        from ministeer.evaluation.measure import sweep
        return sweep(self.model, self.tokenizer, PROMPT, PLUS, MINUS, LAYERS, COEFFS).float().max(dim=-1).values.sum().item()

    def generate(self, batch, new=NEW, sampled=False):
        import torch

        from ministeer import steering_vector
        from ministeer.generation import Sampling, sample
        steer = [4 * steering_vector(self.model, self.tokenizer, PLUS, MINUS, LAYER)]
        ids = torch.tensor([self.tokenizer.encode(PROMPT)] * batch, device=self.device)
        how = Sampling(1.0, TOP_P, None, PENALTY, new) if sampled else Sampling(temperature=0, max_new_tokens=new)
        rows = torch.stack(list(sample(self.model, ids, range(batch), how, steer)), dim=1)
        return None if sampled else rows[0].tolist()

    def score(self):
        import torch

        from ministeer.evaluation.measure import _next_logprobs
        with torch.no_grad():
            return sum(_next_logprobs(self.model, ids, ()).sum().item() for ids in scored(self.device))


class MinisteerFast(Ministeer):
    """ministeer.load(…, fast=True)"""

    def __init__(self, folder, dtype, device):
        import ministeer
        self.model, self.tokenizer = ministeer.load(folder, dtype=dtype, device=device, fast=True)
        self.device = device


class MinisteerCompiled(Ministeer):
    """ministeer.fast(model, compile=True)"""

    def __init__(self, folder, dtype, device):
        import ministeer
        super().__init__(folder, dtype, device)
        self.model = ministeer.fast(self.model, compile=True)


class Transformers:
    """A forward pre-hook on the block that reads the changed stream, by somebody who knows the library."""
    package = version_of = "transformers"
    exact = True

    def __init__(self, folder, dtype, device):
        import torch
        from transformers import AutoModelForCausalLM
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
        self.prepare(folder, device)

    def prepare(self, folder, device):
        import torch
        from tokenizers import Tokenizer
        self.device = device
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        config = getattr(self.model, "generation_config", None)
        if config is not None:
            config.eos_token_id, config.pad_token_id = None, 0
        self.pair = torch.tensor([self.encode(text) for text in (PLUS, MINUS)], device=device)
        self.prompt = torch.tensor([self.encode(PROMPT)], device=device)

    def encode(self, text):
        return [0, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def hooked(self, change, layer):
        return self.model.model.layers[layer].register_forward_pre_hook(change)

    def difference(self, layer):
        seen = []
        hook = self.hooked(lambda block, args: seen.append(args[0]), layer)
        self.model(self.pair, use_cache=False)
        hook.remove()
        return (seen[0][0] - seen[0][1])[1:]

    def vector(self):
        return self.difference(LAYER).float().norm().item()

    @contextlib.contextmanager
    def steered(self, layer, vector):
        def add(block, args):
            if args[0].shape[1] == 1:               # a generated token: the vector lies on the prompt
                return None
            x = args[0].clone()
            x[:, 1:1 + len(vector)] += vector
            return (x, *args[1:])
        hook = self.hooked(add, layer)
        yield
        hook.remove()

    def sweep(self):
        """The logits of the last position only, and one pass for the vectors of all layers."""
        hidden = self.model.model(self.pair, output_hidden_states=True, use_cache=False).hidden_states
        total = 0.0
        for layer in LAYERS:
            vector = (hidden[layer][0] - hidden[layer][1])[1:]
            for coeff in COEFFS:
                with self.steered(layer, coeff * vector):
                    total += self.model(self.prompt, use_cache=False, logits_to_keep=1).logits.float().max().item()
        return total

    def generate(self, batch, new=NEW, sampled=False):
        import torch
        ids = self.prompt.repeat(batch, 1)
        how = {"do_sample": True, "top_p": TOP_P, "top_k": 0, "logits_processor": [penalise]} if sampled else {"do_sample": False}
        with self.steered(LAYER, 4 * self.difference(LAYER)):
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0, **how)
        return None if sampled else out[0, ids.shape[1]:].tolist()

    def logits(self, ids):
        return self.model(ids, use_cache=False).logits

    def score(self):
        total = 0.0
        for ids in scored(self.device):
            logits = self.logits(ids)[:, :-1].float()
            total += logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).sum().item()
        return total


def penalise(ids, logits):
    """A frequency penalty, prompt included; transformers has none of its own."""
    import torch
    return logits.scatter_add(1, ids, torch.full(ids.shape, -PENALTY, dtype=logits.dtype, device=ids.device))


class Repeng(Transformers):
    """ControlModel on the block below: one direction on every position, by PCA over a dataset of one pair."""
    package = version_of = "repeng"
    exact = False

    def __init__(self, folder, dtype, device):
        import repeng
        super().__init__(folder, dtype, device)
        from transformers import AutoTokenizer
        self.repeng, self.plain, self.hub_tokenizer = repeng, self.model, AutoTokenizer.from_pretrained(folder)
        self.hub_tokenizer.pad_token = self.hub_tokenizer.decode([0])

    def difference(self, layer):
        control = self.repeng.ControlModel(self.plain, [layer - 1])
        try:
            entry = self.repeng.DatasetEntry(PLUS, MINUS)
            trained = self.repeng.ControlVector.train(control, self.hub_tokenizer, [entry], hidden_layers=[layer - 1], batch_size=2)
        finally:
            control.unwrap()
        import torch
        return torch.tensor(trained.directions[layer - 1], device=self.device)

    @contextlib.contextmanager
    def steered(self, layer, vector):
        control = self.repeng.ControlModel(self.plain, [layer - 1])
        control.set_raw_control({layer - 1: vector.to(self.plain.dtype)})
        self.model = control
        yield
        control.unwrap()
        self.model = self.plain

    def sweep(self):
        total = 0.0
        for layer in (max(layer, 1) for layer in LAYERS):       # it steers the output of a block, so not before the first
            vector = self.difference(layer)
            for coeff in COEFFS:
                with self.steered(layer, coeff * vector):
                    total += self.model(self.prompt, use_cache=False, logits_to_keep=1).logits.float().max().item()
        return total


class SteeringVectors(Repeng):
    """SteeringVector.apply on the block below: one direction on every position, the mean difference of one pair."""
    package, version_of = "steering_vectors", "steering-vectors"

    def __init__(self, folder, dtype, device):
        import steering_vectors
        from transformers import AutoTokenizer
        Transformers.__init__(self, folder, dtype, device)
        self.library, self.plain, self.hub_tokenizer = steering_vectors, self.model, AutoTokenizer.from_pretrained(folder)
        self.hub_tokenizer.pad_token = self.hub_tokenizer.decode([0])

    def difference(self, layer):
        trained = self.library.train_steering_vector(self.model, self.hub_tokenizer, [(PLUS, MINUS)], layers=[layer - 1], show_progress=False)
        return trained.layer_activations[layer - 1]

    def steered(self, layer, vector):
        return self.library.SteeringVector({layer - 1: vector.to(self.model.dtype)}).apply(self.model)


class TransformerLens(Transformers):
    """TransformerBridge with a hook on the stream that block l reads."""
    package, version_of = "transformer_lens", "transformer-lens"

    def __init__(self, folder, dtype, device):
        import torch
        from transformer_lens.model_bridge import TransformerBridge
        torch.set_grad_enabled(False)
        self.model = TransformerBridge.boot_transformers(folder, device=device, dtype=getattr(torch, dtype))
        self.prepare(folder, device)

    def difference(self, layer):
        name = f"blocks.{layer}.hook_in"
        _, cache = self.model.run_with_cache(self.pair, names_filter=lambda hook: hook == name, stop_at_layer=layer + 1)
        return (cache[name][0] - cache[name][1])[1:]

    def steered(self, layer, vector):
        def add(resid, hook):
            if resid.shape[1] > 1:
                resid[:, 1:1 + len(vector)] += vector
            return resid
        return self.model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", add)])

    def sweep(self):
        total = 0.0
        for layer in LAYERS:
            vector = self.difference(layer)
            for coeff in COEFFS:
                with self.steered(layer, coeff * vector):
                    total += self.logits(self.prompt)[:, -1].float().max().item()
        return total

    def generate(self, batch, new=NEW, sampled=False):
        how = {"do_sample": True, "top_p": TOP_P, "freq_penalty": PENALTY} if sampled else {"do_sample": False}
        with self.steered(LAYER, 4 * self.difference(LAYER)):
            out = self.model.generate(self.prompt.repeat(batch, 1), max_new_tokens=new, stop_at_eos=False, verbose=False,
                                      return_type="tokens", **how)
        return None if sampled else out[0, self.prompt.shape[1]:].tolist()

    def logits(self, ids):
        return self.model(ids, return_type="logits")


class NNsight(Transformers):
    """A trace that stops at the block for a vector, and one that adds to its input for the rest."""
    package = version_of = "nnsight"

    def __init__(self, folder, dtype, device):
        import torch
        from nnsight import TransformersModel
        torch.set_grad_enabled(False)
        self.model = TransformersModel(folder, task="text-generation", dispatch=True, dtype=getattr(torch, dtype), device_map=device)
        self.prepare(folder, device)
        config = self.model._module.generation_config
        config.eos_token_id, config.pad_token_id = None, 0

    def difference(self, layer):
        model = self.model
        with model.trace(self.pair) as tracer:
            read = model.model.layers[layer].input.save()
            tracer.stop()
        return (read[0] - read[1])[1:]

    def sweep(self):
        model, prompt, total = self.model, self.prompt, 0.0
        for layer in LAYERS:
            vector = self.difference(layer)
            n = len(vector)
            for coeff in COEFFS:
                with model.trace(prompt, logits_to_keep=1):
                    model.model.layers[layer].input[:, 1:1 + n] += coeff * vector
                    logits = model.output.logits.save()
                total += logits.float().max().item()
        return total

    def generate(self, batch, new=NEW, sampled=False):
        model, vector, ids = self.model, 4 * self.difference(LAYER), self.prompt.repeat(batch, 1)
        n = len(vector)
        how = {"do_sample": True, "top_p": TOP_P, "top_k": 0, "logits_processor": [penalise]} if sampled else {"do_sample": False}
        with model.generate(ids, max_new_tokens=new, **how) as tracer:
            model.model.layers[LAYER].input[:, 1:1 + n] += vector
            out = tracer.result.save()
        return None if sampled else out[0, ids.shape[1]:].tolist()

    def logits(self, ids):
        model = self.model
        with model.trace(ids):
            logits = model.output.logits.save()
        return logits


CONTESTANTS = {"transformers": Transformers, "ministeer": Ministeer, "fast": MinisteerFast, "compiled": MinisteerCompiled,
               "transformer-lens": TransformerLens, "nnsight": NNsight, "repeng": Repeng, "steering-vectors": SteeringVectors}
TASKS = {
    "load": ("load, process start to ready", None),
    "vector": ("vector of one pair before block 6", ["vector"]),
    "sweep": ("sweep, 10 layers × 4 coefficients, next token", ["sweep"]),
    **{f"generate-{b}": (f"{NEW} steered tokens, batch {b}, greedy", ["generate", b]) for b in (1, 8, 32)},
    "sample-8": (f"{NEW} steered tokens, batch 8, top-p {TOP_P}, penalty {PENALTY:g}", ["generate", 8, NEW, True]),
    "cell": (f"one layer of the sweep of 4.1: 200 × 40 tokens, top-p {TOP_P}, penalty {PENALTY:g}", ["generate", 200, 40, True]),
    "score": ("scoring 64 × 128 tokens", ["score"]),
}


def scored(device):
    """64 × 128 token numbers in batches of 8. What they are changes no time."""
    import torch
    return torch.randint(1000, 40000, (64, 128), generator=torch.Generator().manual_seed(0)).to(device).split(8)


def peak_mib():
    """The most memory that this process has held, in MiB; None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return None


def serve(args):
    """One contestant: reads a task a line, writes seconds, answer and peak memory a line."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)                               # whatever a library prints goes with the errors
    import torch
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
        self.log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")     # noqa: SIM115 (closed in `close`)
        command = [args.pythons.get(name, sys.executable), os.path.abspath(__file__), "--serve", name, "--model", args.model,
                   "--dtype", args.dtype, "--device", args.device, "--threads", str(args.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        self.peak = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            said = self.log.read().strip().split("\n")[-1]
            self.close()
            raise RuntimeError(f"{self.name} stopped: {said}")
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
    """-> {name: {"seconds": one a repetition, "answer", "peak_mib"}}. The contestants take turns; a first round is not counted."""
    result, running = {name: {"seconds": [], "answer": None, "peak_mib": None} for name in names}, {}
    try:
        for repetition in range(-1, args.reps):
            for name in list(result):
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
                    result.pop(name)
                    continue
                if repetition >= 0:
                    result[name]["seconds"].append(seconds)
                result[name].update(answer=answer, peak_mib=peak)
    finally:
        for process in running.values():
            with contextlib.suppress(OSError):
                process.close()
    return result


def agree(a, b, dtype):
    """Whether two answers are the same: lists of tokens exactly, numbers up to what the dtype rounds away."""
    if isinstance(a, list):
        return a == b
    return abs(a - b) <= (1e-3 if dtype == "float32" else 3e-2) * abs(b)


def installed(name, args, say):
    """The version of a contestant's library, or None with a word."""
    library = CONTESTANTS[name]
    if library.package == "ministeer":
        return "this one"
    code = f"import importlib.metadata as m, {library.package.partition('.')[0]}; print(m.version({library.version_of!r}))"
    if name not in args.pythons:
        try:
            return importlib.metadata.version(library.version_of)
        except importlib.metadata.PackageNotFoundError:
            say(f"{name} is not installed here and is left out; name the interpreter that has it with --python {name}=…")
            return None
    done = subprocess.run([args.pythons[name], "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"{name} is left out: {args.pythons[name]} says {done.stderr.strip().splitlines()[-1]}")
        return None
    return done.stdout.strip().splitlines()[-1]


def table(rows, names, versions, args):
    import torch
    others = [name for name in names if name != "transformers"]
    print(f"\n{args.dtype}, {args.device}, {args.threads} threads, torch {torch.__version__}, median of {args.reps}; "
          f"times as fast as transformers {versions['transformers']}; in brackets the peak memory of the process, MiB\n")
    print("| work | " + " | ".join(others) + " | transformers |\n|" + "---|" * (len(others) + 2))
    for task, result, ratios in rows:
        base = result["transformers"]
        cells = []
        for name in others:
            same = name not in result or base["answer"] is None or not CONTESTANTS[name].exact
            same = same or agree(result[name]["answer"], base["answer"], args.dtype)
            cells.append(f"{ratios[name]:.2f} ({result[name]['peak_mib']}){'' if same else ' ≠'}" if name in result else "–")
        print(f"| {TASKS[task][0]} | " + " | ".join(cells) + f" | {statistics.median(base['seconds']):.3g} s ({base['peak_mib']}) |")
    seconds = {task: result for task, result, _ in rows}
    if {"generate-8", "sample-8"} <= set(seconds):
        greedy, sampled = ({name: statistics.median(one["seconds"]) for name, one in seconds[task].items()} for task in ("generate-8", "sample-8"))
        print("\nTime of sampling against greedy, batch 8: "
              + ", ".join(f"{name} {sampled[name] / greedy[name]:.2f}" for name in names if name in greedy and name in sampled))
    if "generate-1" in seconds:
        reads, size, limit = bound(args)
        print(f"\nAt batch 1 memory is the limit: {reads:.0f} GB/s of reading for {size:.2f} GB of weights are {limit:.0f} tokens/s. Reached: "
              + ", ".join(f"{name} {NEW / statistics.median(one['seconds']):.0f}" for name, one in seconds["generate-1"].items()) + ".")
    print("\n≠: its answer differs from transformers' answer.")


def bound(args):
    """What memory allows at batch 1, where each token reads all weights once -> (GB/s that a sum reads, GB of weights, tokens/s)."""
    import torch
    from safetensors import safe_open
    torch.set_num_threads(args.threads)
    x, best = torch.ones(2 ** 28, device=args.device), 0.0          # 1 GiB
    for _ in range(6):
        start = time.perf_counter()
        x.sum().item()
        best = max(best, x.numel() * 4 / (time.perf_counter() - start))
    numbers = 0
    for path in Path(args.model).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            numbers += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())     # noqa: SIM118 (not a dict)
    size = numbers * (4 if args.dtype == "float32" else 2)
    return best / 1e9, size / 1e9, best / size


def random_checkpoint(folder, args):
    """Llama-3.1-8B's true shape with random weights, for a device that holds it: 16 GB in bfloat16, one shard a block."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes((Path(args.tokenizer) / "tokenizer.json").read_bytes())
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    generator, places, shards = torch.Generator().manual_seed(0), {}, {}
    for name, tensor in shapes.items():
        parts = name.split(".")
        shards.setdefault(f"model-{parts[2] if parts[1] == 'layers' else 'rest'}.safetensors", []).append((name, tensor.shape))
    for file, tensors in shards.items():
        made = {name: torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator) for name, shape in tensors}
        save_file({name: tensor.bfloat16() for name, tensor in made.items()}, folder / file)
        places.update(dict.fromkeys(made, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="weights/smollm2-135m", help="a folder (default weights/smollm2-135m)")
    parser.add_argument("--random", action="store_true", help="make the folder --model: Llama-3.1-8B's shape with random weights")
    parser.add_argument("--tokenizer", default="weights/smollm2-135m", help="with --random: the folder whose tokenizer is used")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}; all by default")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME",
                        help=f"of {', '.join(CONTESTANTS)}; transformers is always there")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="the interpreter of a peer")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="append JSON lines here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args)
    import torch
    from tqdm import tqdm
    args.pythons = dict(pair.split("=", 1) for pair in args.python if "=" in pair)
    if args.reps < 1 or len(args.pythons) < len(args.python) or not set(args.pythons) <= set(CONTESTANTS):
        parser.error("--reps takes 1 or more, and --python NAME=PATH with one of " + ", ".join(CONTESTANTS))
    args.model = os.path.abspath(args.model)
    if args.random and not os.path.exists(args.model):
        with tempfile.TemporaryDirectory(dir=os.path.dirname(args.model), ignore_cleanup_errors=True) as folder:
            made = Path(folder) / "checkpoint"
            made.mkdir()
            random_checkpoint(made, args)
            os.rename(made, args.model)
    if not os.path.isfile(os.path.join(args.model, "config.json")):
        parser.error(f"no checkpoint in {args.model}; run `ministeer fetch smollm2-135m`")
    versions = {name: installed(name, args, print) for name in CONTESTANTS if name == "transformers" or name in args.contestants}
    names = [name for name, version in versions.items() if version]
    if "transformers" not in names:
        parser.error("all figures are ratios to transformers: pip install -e '.[bench]'")
    rows = []
    for task in tqdm(args.tasks, "tasks"):
        result = measure(task, names, args, tqdm.write)
        if "transformers" not in result:
            continue
        base = result["transformers"]["seconds"]
        ratios = {name: statistics.median(a / b for a, b in zip(base, one["seconds"], strict=True)) for name, one in result.items()}
        rows.append((task, result, ratios))
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                about = {"task": task, "model": os.path.basename(args.model), "dtype": args.dtype, "device": args.device, "threads": args.threads,
                         "torch": torch.__version__, "versions": versions}
                file.write(json.dumps({**about, "ratios": ratios, "results": result}, ensure_ascii=False) + "\n")
    table(rows, names, versions, args)
    return None


if __name__ == "__main__":
    main()
