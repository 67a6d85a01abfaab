"""Checkpoints to test on: tiny random ones, made by transformers in the Hub's layout, and the default."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# pytest runs one process per core, so more threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Children inherit that Ctrl-C is ignored, which it is where the tests were started in the background.
in_main_thread = threading.current_thread() is threading.main_thread()
if in_main_thread and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
EVERY_FAMILY = ["gpt2", "llama", "opt", "opt-350m", "gptj"]     # opt-350m: with its norms after each half
N_VOCAB = 384
# For child processes: without coverage's tracing, which doubles their time and covers no new line.
# Trap: if Ctrl-C arrives while coverage holds a lock of its own, the process waits for that lock forever.
UNTRACED = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
TEXT = ["The harbour wakes before the town does, and the gulls begin to argue.",
        "I love you because you are kind.",
        "I hate you because you are so mean to me.",
        "We talk about weddings all day long; the bride was late for her wedding."]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the long tests too, which take many minutes")


def pytest_collection_modifyitems(config, items):
    """Leave out the long tests unless asked for or named; the longest go first, so that no worker waits.

    The longest is tutorial 12, whose trained models other tests use afterwards.
    """
    named = any("::" in argument for argument in config.args)
    if not config.option.all and not named:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    items.sort(key=lambda item: (not item.get_closest_marker("long"), "12_grow_your_own" not in item.name,
                                 "trained_gpt2" in item.name))


@contextlib.contextmanager
def started(command, **options):
    """A process that is killed at the end of the block. Popen's own block waits until it ends by itself."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def time_limit(seconds=60):
    """Fail if the block takes longer: reading from a process or opening a pipe can wait forever."""
    def fail(*_):
        pytest.fail(f"not over after {seconds} seconds")
    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def refused(says, kind=ValueError, most=1000):
    """The block raises an error of this kind that says so in one printable line, shorter than `most`."""
    with pytest.raises(kind, match=says) as fault:
        yield fault
    assert str(fault.value).isprintable() and len(str(fault.value)) < most


def python(*arguments, **variables):
    """-> what Python prints in a process of its own, which ends well and says nothing on stderr"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


class Server(http.server.ThreadingHTTPServer):
    """A web server on this computer, until the end of its block. answer(request): what it does with each"""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *fault):
        self.shutdown()
        super().__exit__(*fault)


class Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with contextlib.suppress(OSError):          # the client went away
            self.server.answer(self)
    do_HEAD = do_POST = do_GET

    def reply(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def tiny_tokenizer(bos="<|endoftext|>"):
    """Byte-level BPE with its BOS at id 0, a chat token at id 1, and a few merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(piece, normalized=False) for piece in (bos, "<|im_end|>")]
    trainer = trainers.BpeTrainer(vocab_size=N_VOCAB - 4, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


def hub_config(family, **settings):
    """A transformers config of a tiny model of that family; settings override."""
    from transformers import GPT2Config, GPTJConfig, LlamaConfig, OPTConfig
    ids = {"vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    if family in ("gpt2", "gptj"):
        sizes = {"n_layer": 4, "n_head": 4, "n_embd": 32, "n_positions": 192}
        if family == "gptj":
            return GPTJConfig(**{**ids, **sizes, "rotary_dim": 6, **settings})
        return GPT2Config(**{**ids, **sizes, **settings})
    if family in ("opt", "opt-350m"):
        sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 32, "ffn_dim": 48,
                 "max_position_embeddings": 192}
        if family == "opt-350m":
            sizes |= {"do_layer_norm_before": False, "word_embed_proj_dim": 20}
        return OPTConfig(**{**ids, **sizes, **settings})
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
             "intermediate_size": 48, "max_position_embeddings": 192}
    return LlamaConfig(**{**ids, **sizes, **settings})


def hub_model(config, seed=0):
    """The transformers model of a config, its random weights so large that every part of a block matters."""
    import transformers
    kind = {"gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM", "llama": "LlamaForCausalLM",
            "opt": "OPTForCausalLM"}[config.model_type]
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:                     # norms start at 1 and biases at 0, which would hide them
                p.add_(0.3 * torch.randn_like(p))
            elif "lm_head" not in name:
                p.mul_(4)
    return model.requires_grad_(False)


def save_checkpoint(folder, model, tokenizer=None):
    """Write a folder in the Hub's layout, as `save_pretrained` does, and the tokenizer beside it."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save(str(folder / "tokenizer.json"))
    return folder


def permute(w, n_head):
    """The Hub's order of the rows of q and k -> GGUF's, as llama.cpp's convert_hf_to_gguf.py has it."""
    return w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, kind="F32", tied=False, surplus=(), drop=(), **settings):
    """A tiny random Llama in GGUF, its matrices stored as `kind` -> the transformers model of those numbers.

    surplus: names of tensors to add. drop: keys to leave out. settings: keys to add, with __ for a dot
    """
    import gguf
    import numpy as np

    from ministeer.checkpoints.convert import unpermute
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    c = hub_config("llama", hidden_size=64, intermediate_size=64, rope_theta=5000.0, rms_norm_eps=1e-5,
                   tie_word_embeddings=tied)
    model = hub_model(c)
    writer = gguf.GGUFWriter(path, settings.pop("general__architecture", "llama"))
    bpe = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = [*sorted(bpe["vocab"], key=bpe["vocab"].get), "19"]    # digits stand alone
    keys = {"llama.block_count": 4, "llama.context_length": 192, "llama.embedding_length": 64,
            "llama.feed_forward_length": 64, "llama.vocab_size": c.vocab_size, "llama.rope.freq_base": 5000.0,
            "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [*(" ".join(pair) for pair in bpe["merges"]), "1 9"],
            "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.chat_template": "{{ messages[0]['content'] }}",
            **{key.replace("__", "."): value for key, value in settings.items()}}
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        if key not in drop:
            add[type(value)](key, value)
    for name, p in model.named_parameters():
        if name == "lm_head.weight" and tied:
            continue
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        rows = p.data.half().numpy()
        rows = permute(rows, heads) if heads else rows
        stored = gguf.GGMLQuantizationType[kind] if p.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(rows.astype(np.float32), stored)
        writer.add_tensor(names.get_name(name, [".weight"]), packed, raw_dtype=stored)
        rows = gguf.dequantize(packed, stored).astype(np.float16)
        p.data = torch.from_numpy(unpermute(rows, heads) if heads else rows).float()
    for name in surplus:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_rows(folder, files):
    """Each name's rows as folder/name.jsonl -> folder"""
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def pytest_generate_tests(metafunc):
    """Tests run with a GPT-2 and a Llama, or with each of the FAMILIES that their file names."""
    chosen = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not chosen:
        families = getattr(metafunc.module, "FAMILIES", ["gpt2", "llama"])
        metafunc.parametrize("family", families, indirect=True, scope="session")


@pytest.fixture(scope="session")
def family(request):
    return request.param


@pytest.fixture(scope="session")
def checkpoint(family, tmp_path_factory):
    """A folder with a tiny random model of each family. Read it, copy it, but never change it."""
    folder = tmp_path_factory.mktemp("weights") / f"tiny-{family}"
    return save_checkpoint(folder, hub_model(hub_config(family)))


@pytest.fixture(scope="session")
def tiny(checkpoint):
    """(model, tokenizer) of a tiny random checkpoint of each family."""
    from ministeer import load
    return load(checkpoint)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a tiny random Llama whose context of 512 fits long texts."""
    config = hub_config("llama", max_position_embeddings=512)
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "tiny", hub_model(config))


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the default model, fetched if need be. If that fails, skip the test, or in CI fail."""
    from ministeer.checkpoints.fetch import DEFAULT, FetchError, fetch
    root = Path(os.environ.get("MINISTEER_WEIGHTS") or ROOT / "weights")
    try:
        return fetch(DEFAULT, root.resolve())
    except FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the default weights are not here and could not be fetched: {error}")


@pytest.fixture(scope="session")
def real(smollm2):
    """(model, tokenizer) of the default model in float32."""
    from ministeer import load
    return load(smollm2)
