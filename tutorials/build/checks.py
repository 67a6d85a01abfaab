"""The cases of each part. The right answers are ministeer's; sizes, texts, layers and seeds vary, so that a
shortcut fails somewhere. Read first: compare.py.
"""

import functools
import importlib.util
from itertools import pairwise

import torch

import ministeer
from ministeer.attention import KVCache, attention_pattern, causal_mask
from ministeer.checkpoints.config import Config, Rope
from ministeer.checkpoints.loading import find
from ministeer.evaluation.judges import count_words
from ministeer.evaluation.stats import wilson
from ministeer.generation import Sampling, sample
from ministeer.gpt2 import GPT2
from ministeer.llama import Llama, rotate
from ministeer.steering import pad_together

from .compare import MANY_BLOCKS, Wrong, compare, kind, shape

TEXT = "The bride said that she was late for her wedding, and everybody in the church laughed."
STORY = " Now Mary tells Tom a tale. Then the baker kneads the dough near the oven."
PROMPT = "I went up to my friend and said"


class Reference:
    """The models that give the right answers."""

    @functools.cached_property
    def folder(self):
        return find("smollm2-135m")

    @functools.cached_property
    def loaded(self):
        return ministeer.load(self.folder)

    @functools.cached_property
    def ids(self):
        return torch.tensor([self.loaded[1].encode(TEXT)])

    @property
    def layers(self):
        """Four layers of the default model: the first two, the middle, the last."""
        n_layer = self.loaded[0].config.n_layer
        return 0, 1, n_layer // 2, n_layer - 1

    @property
    def llamas(self):
        """Yield (name, model, ids, layers): the default model, and two whose heads share keys differently."""
        yield "the default model", self.loaded[0], self.ids, self.layers
        for seed, (n_head, n_kv_head, d_head) in enumerate([(4, 1, 4), (6, 2, 8)]):
            model = Llama(Config("llama", n_layer=2, n_head=n_head, n_kv_head=n_kv_head, n_vocab=50, n_ctx=64,
                                 d_model=n_head * d_head, d_head=d_head, d_mlp=40, norm_eps=1e-5, tied=True,
                                 attention_bias=False, mlp_bias=False, rope=Rope()))
            ids = torch.arange(24).view(2, 12) * 7 % 50
            yield f"a random Llama, heads {n_head} and {n_kv_head}", scatter(model, seed), ids, (0, 1)

    @property
    def gpt2s(self):
        """Yield (name, model, ids): one with random weights, and tutorial 12's two if it has run here."""
        model = GPT2(Config("gpt2", n_layer=6, n_head=4, n_kv_head=4, n_vocab=640, n_ctx=64, d_model=128,
                            d_head=32, d_mlp=512, norm_eps=1e-5, tied=True))
        yield "a random GPT-2 shaped like tutorial 12's", scatter(model, 0), torch.arange(36).view(2, 18) * 17
        for name in ("world-plain", "world-skipping"):
            try:
                model, tokenizer = ministeer.load(name)
            except (OSError, ValueError):
                continue
            yield f"tutorial 12's model {name}", model, torch.tensor([tokenizer.encode(STORY)])


def random(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def draw(*size, seed):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def scatter(model, seed):
    """Random weights so large that every part of a block matters."""
    for i, p in enumerate(model.initialise(seed).parameters()):
        p.mul_(5) if p.ndim == 2 else p.add_(0.3 * random(*p.shape, seed=i))        # no two norms alike
    return model


def blocks(model, cache=None):
    """The blocks of a model as part e wants them."""
    return [lambda x, pos, l=l: model.blocks[l](x, l, model.rope(pos), cache)
            for l in range(model.config.n_layer)]


def queries(reference):
    """q, k, v of block 1 of the default model."""
    model, _ = reference.loaded
    block, x = model.blocks[1], model.residuals(reference.ids, stop_layer=1)[-1]
    return block.self_attn.qkv(block.input_layernorm(x), model.rope(torch.arange(x.shape[1])))


def softmax(student, reference):
    for seed, size in enumerate([(1, 1), (3, 3), (2, 5), (1, 6), (2, 4, 4), (1, 2, 3, 7), (3, 2, 1, 5)]):
        for scale in (1, 5000):
            scores = scale * random(*size, seed=seed)
            student.gives((scores + causal_mask(*size[-2:])).softmax(dim=-1), "causal_softmax", scores,
                          case=f"scores {shape(scores)}" + (" in the thousands" if scale > 1 else ""))
    q, k, _ = queries(reference)
    pattern = attention_pattern(q, k)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    for T in (q.shape[2], 3):
        student.gives(pattern[:, :, -T:], "causal_softmax", scores[:, :, -T:],
                      case=f"scores {shape(scores[:, :, -T:])} of block 1 of the default model")


def head(student, reference):
    model, _ = reference.loaded
    for seed, size in enumerate([(1, 2), (3, 4), (2, 5, 6), (2, 3, 4, 8)]):
        x, angle = random(*size, seed=seed), random(size[-2], size[-1] // 2, seed=seed + 50).repeat(1, 2)
        student.gives(rotate(x, angle.cos(), angle.sin()), "rotate", x, angle.cos(), angle.sin(),
                      case=f"x {shape(x)}")
    x, rope = random(2, 3, 5, model.config.d_head, seed=9), model.rope(torch.arange(40, 45))
    student.gives(rotate(x, *rope), "rotate", x, *rope, case="positions 40 … 44 of the default model")
    for seed, (front, T, S, d) in enumerate([((), 1, 1, 3), ((), 4, 4, 2), ((2,), 3, 6, 5), ((2, 3), 5, 7, 4),
                                             ((3, 2), 1, 6, 16)]):
        q, k, v = (random(*front, n, d, seed=10 * seed + i) for i, n in enumerate((T, S, S)))
        pattern = attention_pattern(q.view(1, -1, T, d), k.view(1, -1, S, d)).view(*front, T, S)
        student.gives(pattern @ v, "head", q, k, v, case=f"q {shape(q)}, k and v {shape(k)}")
    q, k, v = queries(reference)
    for T in (q.shape[2], 2):
        expected = attention_pattern(q[:, :1, -T:], k[:, :1]) @ v[:, :1]
        student.gives(expected[:, 0], "head", q[:, 0, -T:], k[:, 0], v[:, 0],
                      case=f"the last {T} queries of head 0, block 1 of the default model")


def block(student, reference):
    for seed, size in enumerate([(4,), (3, 8), (2, 3, 6)]):
        for scale in (1, 0.001):
            x, weight = scale * random(*size, seed=seed), random(size[-1], seed=seed + 50)
            expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight
            student.gives(expected, "rms_norm", x, weight, case=f"x {shape(x)}, values about {scale}")
    for name, model, ids, layers in reference.llamas:
        resid = model.residuals(ids)
        for l in layers:
            w = dict(model.blocks[l].named_parameters())
            for T in (1, 5, ids.shape[1]):
                student.gives(resid[l + 1][:, :T], "llama_block", resid[l][:, :T], w, model.config.n_head,
                              model.rope(torch.arange(T)), case=f"block {l} of {name}, positions 0 … {T - 1}")
            chunks(student, model, l, w, resid[l], name)
    for name, model, ids in reference.gpt2s:
        resid = model.residuals(ids)
        for l, one in enumerate(model.blocks):
            for T in (1, 7, ids.shape[1]):
                student.gives(resid[l + 1][:, :T], "gpt2_block", resid[l][:, :T],
                              dict(one.named_parameters()), model.config.n_head,
                              case=f"block {l} of {name}, positions 0 … {T - 1}")


def chunks(student, model, l, w, x, name):
    """llama_block in chunks. Two runs take turns, so what is kept anywhere but in `past` gets mixed up."""
    runs = [(run, model.blocks[l](run, l, model.rope(torch.arange(x.shape[1])))) for run in (x, x.flip(1))]
    for cuts in ((0, 4, 5, 6, 9), (0, 1, 7)):
        pasts = {}, {}
        for start, stop in pairwise(cuts):
            for (run, expected), past in zip(runs, pasts, strict=True):
                student.gives(expected[:, start:stop], "llama_block", run[:, start:stop], w,
                              model.config.n_head, model.rope(torch.arange(start, stop)), past,
                              case=f"block {l} of {name}, positions {start} … {stop - 1}, {start} in past")


def vector(student, reference):
    def encode(text):
        return [ord(letter) % 60 + 2 for letter in text]

    table = random(62, 5, seed=1)

    def toy(ids):
        """A stream in which a position holds something of itself, its place, and all that came before."""
        x = table[check_ids(ids)] * torch.arange(1, ids.shape[1] + 1)[:, None]
        return x.cumsum(dim=1).sin()
    for bos in (0, 1):
        for plus, minus in [("ab", "c"), ("a", "bcd"), ("ab", "cd"), ("a b", " "), ("", "xyz"), ("zx", "")]:
            n = max(len(plus), len(minus))
            h = toy(torch.tensor([[bos, *encode(text.ljust(n))] for text in (plus, minus)]))
            student.gives((h[0] - h[1])[1:], "steering_vector", encode, toy, plus, minus, bos,
                          case=f"{plus!r} - {minus!r} in a toy model, BOS {bos}")
    model, tokenizer = reference.loaded
    for plus, minus in [(" weddings", " "), ("Love", "Hate"), ("I talk about weddings constantly", "I do"),
                        ("Anger", "Calm and friendly"), ("", " wedding")]:
        for layer in reference.layers[1:3]:
            def stream(ids, layer=layer):
                return model.residuals(check_ids(ids), stop_layer=layer)[-1]
            h = stream(torch.tensor(pad_together(tokenizer, plus, minus)))
            encode = functools.partial(tokenizer.encode, bos=False)
            student.gives((h[0] - h[1])[1:], "steering_vector", encode, stream, plus, minus, tokenizer.bos_id,
                          case=f"{plus!r} - {minus!r} before block {layer} of the default model")


def check_ids(ids):
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.dtype != torch.int64:
        given = f"{ids.dtype} {shape(ids)}" if isinstance(ids, torch.Tensor) else kind(ids)
        raise Wrong(f"the ids must be an int64 tensor with two dimensions; given: {given}")
    return ids


def loop(student, reference):
    for seed, size in enumerate([(1, 3), (2, 4), (4, 2), (3, 2, 4), (2, 1, 3)]):
        rows = random(*size, seed=seed)
        for coeff, start, stop in ((1, 0, 1), (2.5, 0, 6), (-3, 0, 2), (1, 1, 3), (4, 2, 9), (1, 7, 8)):
            pos = torch.arange(start, stop)
            steers = [ministeer.Steer(0, one, coeff) for one in rows.view(-1, *size[-2:])]
            one_by_one = [steer.delta(None, pos) for steer in steers]
            expected = torch.stack(one_by_one) if rows.ndim == 3 else one_by_one[0]
            student.gives(expected, "delta", rows, coeff, pos,
                          case=f"vector {shape(rows)}, coeff {coeff}, positions {start} … {stop - 1}")
    model, _ = reference.loaded
    ids, n_layer = torch.cat([reference.ids, reference.ids.flip(1)]), model.config.n_layer
    T, (first, second, middle, last) = ids.shape[1], reference.layers
    for seed, (layer, n, coeff) in enumerate([(first, 1, 1), (second, 3, -2), (middle, 2, 4), (last, 1, 1),
                                              (second, 2, 0)]):
        rows = random(n, model.config.d_model, seed=seed)
        _, resid = model(ids, ministeer.Steer(layer, rows, coeff))
        for cuts in ((0, T), (0, 2, 3, T)):
            cache = KVCache(T, 2)
            for start, stop in pairwise(cuts):
                pos = torch.arange(start, stop)
                student.gives([x[:, pos] for x in resid], "run", model.embed(ids[:, pos], pos), pos,
                              blocks(model, cache), layer, rows, coeff,
                              case=f"layer {layer} of {n_layer}, vector {shape(rows)}, coeff {coeff}, "
                                   f"positions {start} … {stop - 1} of the default model")
                cache.length = stop
    if importlib.util.find_spec("transformers"):
        hook(student, reference)


def hook(student, reference):
    """`run` against the model of transformers, where a hook adds to what the block reads."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    hub = AutoModelForCausalLM.from_pretrained(reference.folder, dtype=torch.float32).eval()
    model, ids, layer = reference.loaded[0], reference.ids, reference.layers[1]
    pos, rows = torch.arange(ids.shape[1]), random(2, model.config.d_model, seed=7)
    more = torch.zeros(len(pos), model.config.d_model)
    more[1:3] = 3 * rows
    handle = hub.model.layers[layer].register_forward_pre_hook(lambda _, given: (given[0] + more, *given[1:]))
    theirs = hub(ids, output_hidden_states=True, use_cache=False)
    handle.remove()
    resid = student.module.run(model.embed(ids, pos), pos, blocks(model), layer, rows, 3)
    # Trap: transformers notes a stream before its hook, and the last one after the final norm.
    for l in range(layer + 1, model.config.n_layer):
        where = f"run, against a hook in transformers: resid[{l}]"
        compare(resid[l], theirs.hidden_states[l], where, MANY_BLOCKS)


class Forward:
    """`forward` of part f: refuses a token that it has read, or one out of order."""

    def __init__(self, logits):
        self.logits, self.read = logits, 0

    def __call__(self, ids, pos):
        wanted = list(range(self.read, self.read + check_ids(ids).shape[1]))
        given = pos.tolist() if isinstance(pos, torch.Tensor) else pos
        if given != wanted:
            raise Wrong(f"forward has read {self.read} positions, so it expects ids {shape(ids)} at pos "
                        f"{wanted!s:.40}; given: pos {given!s:.40}")
        self.read += len(wanted)
        return self.logits(ids, pos)


def toy_model(seed):
    """Logits (B, T, 30) that depend on every token that was read, and its position."""
    table, seen = 2 * random(30, 30, seed=seed), [torch.zeros(1, 1, 30)]

    def logits(ids, pos):
        x = (table[ids] * (1 + pos[:, None] % 3)).cumsum(dim=1) + seen[-1]
        seen.append(x[:, -1:])
        return 3 * x.sin()
    return Forward(logits)


def cached_model(model, batch):
    cache = KVCache(64, batch)
    return Forward(lambda ids, pos: model(ids, cache=cache)[0])


def continued(forward, ids, draws, p):
    """What `generate` should give, by ministeer's sampling loop."""
    read = [0]

    def step(new):
        read.append(read[-1] + new.shape[1])
        return forward(new, torch.arange(*read[-2:]))[:, -1]
    sampling = Sampling(temperature=float(p > 0), top_p=p, max_new_tokens=draws.shape[1])
    return torch.cat([ids, torch.tensor(list(sample(step, ids, draws, sampling))).T], dim=1)


def nucleus(logits, p, u):
    """-> the tokens that `top_p` should draw, and for which rows rounding cannot change that"""
    chance, ids = logits.double().softmax(dim=-1).sort(dim=-1, descending=True)
    before = chance.cumsum(dim=-1) - chance
    reached = (chance * (before <= p)).cumsum(dim=-1)
    beyond = reached - u[:, None] * reached[:, -1:]
    clear = ((before[:, 1:] - p).abs() > 1e-5).all(dim=-1) & (beyond.abs() > 1e-6).all(dim=-1)
    return ids.gather(1, (beyond > 0).int().argmax(dim=-1, keepdim=True))[:, 0], clear


def generation(student, reference):
    model, tokenizer = reference.loaded
    real = model(reference.ids)[0][0]
    for logits in (random(1, 4, seed=0), random(5, 50, seed=1), real):
        student.gives(logits.argmax(dim=-1), "greedy", logits, case=f"logits {shape(logits)}")
    for seed, (logits, name, most) in enumerate([
            (random(40, 6, seed=0), "random", 1), (4 * random(60, 900, seed=1), "random", 1),
            (0.1 * random(60, 300, seed=2), "nearly equal", 1),
            (real.repeat(4, 1), "the default model's", 0.6)]):
        for p in (0, 0.05, 0.3, 0.6, 0.95):
            if p <= most:                       # the nucleus of 0.95 may hold more than 1,000 tokens
                u = draw(len(logits), seed=seed)
                drawn, clear = nucleus(logits, p, u)
                student.gives(drawn[clear], "top_p", logits[clear], p, u[clear],
                              case=f"{name} logits {shape(logits[clear])}, p {p}")
    for seed, (B, T, n, p) in enumerate([(1, 1, 1, 0), (1, 3, 8, 0), (3, 4, 9, 0.3), (2, 1, 12, 0.9),
                                         (4, 6, 5, 0.6)]):
        ids, draws = torch.arange(B * T).view(B, T) * 7 % 30, draw(B, n, seed=seed)
        expected = continued(toy_model(seed), ids, draws, p)
        student.gives(expected, "generate", toy_model(seed), ids, draws, p,
                      case=f"ids {shape(ids)}, {n} new tokens, p {p}, a toy model")
    ids, draws = torch.tensor([tokenizer.encode(PROMPT)] * 3), draw(3, 12, seed=5)
    for p in (0, 0.3):
        expected = continued(cached_model(model, 3), ids, draws, p)
        student.gives(expected, "generate", cached_model(model, 3), ids, draws, p,
                      case=f"ids {shape(ids)}, 12 new tokens, p {p}, the default model")


# Of N completions each, how many must or may have a word about weddings; README.md says what was measured.
N, STEERED, OTHERS = 20, 5, 1


def together(student, reference):
    logits(student, reference)
    texts = student.module.completions(student.module.SmolLM2(reference.folder), N)
    about = {name: [count_words(text) > 0 for text in group] for name, group in texts.items()}
    unsteered, steered = sum(about["unsteered"]), sum(about["steered"])
    random = [sum(about["random"][i::5]) for i in range(5)]         # text i has random vector i % 5
    low, high = wilson(steered, N)
    shown = (f"about weddings: unsteered {unsteered} of {N}, steered {steered} of {N} "
             f"({low:.0%} to {high:.0%}), random {' '.join(map(str, random))} of {N // 5} each")
    if steered < STEERED or max(unsteered, sum(random)) > OTHERS:
        raise Wrong(f"{shown}. Expected: steered {STEERED} or more, unsteered and random {OTHERS} or less")
    return shown


def logits(student, reference):
    """The whole model, steered and in chunks, against ministeer's."""
    own, (model, _), ids = student.module.SmolLM2(reference.folder), reference.loaded, reference.ids
    rows, pos = random(2, model.config.d_model, seed=3), torch.arange(ids.shape[1])
    expected, _ = model(ids, ministeer.Steer(student.module.LAYER, rows, 2.0))
    forward = own.forward(rows, 2.0)
    for part in pos.split([3, 1, len(pos) - 4]):
        where = f"the logits of the whole model, positions {part[0]} … {part[-1]}"
        compare(forward(ids[:, part], part), expected[:, part], where, MANY_BLOCKS)


PARTS = {"a": softmax, "b": head, "c": block, "d": vector, "e": loop, "f": generation, "together": together}
