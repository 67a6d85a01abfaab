"""Damaged files and odd arguments: each of many seeded tries must work or be refused with a sentence.

    python tests/test_fuzz.py       prints how often each kind of try worked, was refused, or failed
    python tests/test_fuzz.py gguf --tries 5000 --seed 7

SECURITY.md says what is promised. A failure is any other exception, a message that is empty, endless or holds
control characters, or a try that is not over after SECONDS.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
SECONDS, MEMORY = 20, 8 * 2 ** 30       # of one try; of the whole process
TRIES = 30                              # of each kind, in pytest
ODD = [None, True, False, 0, -1, 1, 7, 2 ** 31, 2 ** 63, 10 ** 30, 1e308, -0.5, 1e-300, float("nan"),
       float("inf"), "", "x", "\x1b[31mred", "é" * 300, "a" * 100_000, "../../x", "NaN", [], [[]], {},
       {"a": 1}, [1, 2], [None], ["x"] * 1000]


def mutated_json(draw, value):
    """The same JSON value with one to three of its parts replaced, left out, doubled or nested."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 2, 3])):
        places, stack = [], [value]
        while stack:
            part = stack.pop()
            keys = list(part) if isinstance(part, dict) else range(min(len(part), 50))
            for key in keys:
                places.append((part, key))
                if isinstance(part[key], dict | list):
                    stack.append(part[key])
        if not places:
            return draw.choice(ODD)
        part, key = draw.choice(places)
        action = draw.random()
        if action < 0.6:
            part[key] = copy.deepcopy(draw.choice(ODD))
        elif action < 0.75:
            del part[key]
        elif action < 0.9 and isinstance(part, dict):
            part[draw.choice(["x", "\x1b[2J", "a" * 5000, ""])] = copy.deepcopy(part[key])
        else:
            part[key] = [part[key]]
    return value


def mutated_bytes(draw, data, first=4096):
    """The same bytes cut short, flipped, overwritten, stretched or replaced, mostly among the first."""
    data, place = bytearray(data), draw.randrange(min(len(data), first) or 1)
    action = draw.randrange(7)
    if action == 0:
        return bytes(data[:draw.choice([place, draw.randrange(len(data) or 1)])])
    if action == 1:
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(min(len(data), first))] = draw.randrange(256)
    elif action == 2:
        number = draw.choice([0, 1, 2 ** 31, 2 ** 32 - 1, 2 ** 60, 2 ** 63, 2 ** 64 - 1, len(data)])
        data[place:place + 8] = number.to_bytes(8, "little")
    elif action == 3:
        data[place:place] = draw.randbytes(draw.choice([1, 8, 300]))
    elif action == 4:
        del data[place:place + draw.choice([1, 4, 8, 100])]
    elif action == 5:
        data[place:place + 4] = draw.choice([b"\x00" * 4, b"\xff" * 4, b"\x1b[2J", b"null", b'"\\u0'])
    else:
        return draw.choice([b"", b"\x00" * 100, draw.randbytes(500), b"[" * 100_000, b"{}",
                            b"\xef\xbb\xbf{}"])
    return bytes(data)


def mutated_text(draw, value):
    """A JSON value -> the bytes of a mutated one; sometimes its bytes are mutated instead."""
    if draw.random() < 0.25:
        return mutated_bytes(draw, json.dumps(value).encode())
    return json.dumps(mutated_json(draw, value)).encode()


def mutated_safetensors(draw, data):
    size = int.from_bytes(data[:8], "little")
    if draw.random() < 0.3:
        return mutated_bytes(draw, data, 8 + size)
    header = json.loads(data[8:8 + size])
    note = header.get("__metadata__", {}).get("steer")
    if note and draw.random() < 0.6:
        header["__metadata__"]["steer"] = json.dumps(mutated_json(draw, json.loads(note)))
    elif draw.random() < 0.3:
        tensor = draw.choice([name for name in header if name != "__metadata__"])
        kinds = ["F8_E4M3", "F8_E5M2", "I64", "BOOL", "BF16", "F64", "C64", "F4"]
        header[tensor]["dtype"] = draw.choice(kinds)
    else:
        header = mutated_json(draw, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size:]


class Bench:
    """A tiny checkpoint to damage, and one of whole files to compare with."""

    def __init__(self, folder):
        import torch
        from conftest import hub_config, hub_model, save_checkpoint

        from ministeer import load, steering_vector
        self.torch, self.folder = torch, folder
        config = hub_config("llama", max_position_embeddings=512)
        self.whole = save_checkpoint(folder / "tiny", hub_model(config))
        self.model, self.tokenizer = load(self.whole)
        self.steer = steering_vector(self.model, self.tokenizer, " weddings", " ", 1)
        self.kept = {}

    def everywhere(self, layer):
        """A Steer that adds one row at every position."""
        from ministeer import Steer
        return Steer(layer, self.steer.vector[0], start=0)

    def file(self, name):
        """The bytes of a file of the whole checkpoint."""
        if name not in self.kept:
            self.kept[name] = (self.whole / name).read_bytes()
        return self.kept[name]

    def damaged(self, name, data):
        """A copy of the checkpoint whose file `name` holds `data` -> its folder"""
        folder = self.folder / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.whole, folder)
        (folder / name).write_bytes(data)
        return folder

    def run(self, folder):
        from ministeer import load
        model, tokenizer = load(folder)
        model(self.torch.tensor([tokenizer.encode("The gulls argue.")]))


def config(bench, draw):
    raw = json.loads(bench.file("config.json"))
    bench.run(bench.damaged("config.json", mutated_text(draw, raw)))


def weights(bench, draw):
    data = mutated_safetensors(draw, bench.file("model.safetensors"))
    bench.run(bench.damaged("model.safetensors", data))


def index(bench, draw):
    from safetensors import safe_open
    with safe_open(bench.whole / "model.safetensors", "pt") as file:
        names = list(file.keys())
    raw = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    folder = bench.damaged("model.safetensors.index.json", mutated_text(draw, raw))
    os.rename(folder / "model.safetensors", folder / "model-1.safetensors")
    bench.run(folder)


HOSTILE_TOKENIZERS = [
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                       "invert": False}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
    {"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}},
    {"decoder": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
]


def tokenizer(bench, draw):
    from ministeer.checkpoints.config import read_config
    from ministeer.checkpoints.tokenizer import Tokenizer
    raw = json.loads(bench.file("tokenizer.json"))
    if draw.random() < 0.2:
        data = json.dumps({**raw, **draw.choice(HOSTILE_TOKENIZERS)}).encode()
    else:
        raw["model"] = mutated_json(draw, raw["model"]) if draw.random() < 0.3 else raw["model"]
        data = mutated_text(draw, raw)
    folder = bench.damaged("tokenizer.json", data)
    made = Tokenizer.load(folder, read_config(folder / "config.json"))
    ids = made.encode("a" * 30 + "! The bride, 12 gulls\n é")
    made.decode(ids)
    made.pieces(ids)
    made.space_id  # noqa: B018 (a property, which may raise)


TEMPLATE = [
    "{{ messages[0]['content'] }}", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 10 ** 8 }}", "{{ messages | tojson }}", "{% if x %}", "{{ x.y.z }}", "{{ ''.__class__ }}",
    "{% set ns = namespace(n=0) %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '\x1b[2J' }}",
    "{{ raise_exception('\x1b[2J no') }}", "{% include 'x' %}", "{{ 'x'.join(['a' * 9999] * 9999) }}",
    "{{ '%999999999d' % 1 }}", "{{ 'ab' | center(10 ** 9) }}", "{% while %}", "{{ bos_token }}",
    "{{ 1 / 0 }}"]


def chat_template(bench, draw):
    from ministeer.checkpoints.config import read_config
    from ministeer.checkpoints.tokenizer import Tokenizer
    text = "".join(draw.choices(TEMPLATE, k=draw.choice([1, 1, 2, 3])))
    raw = {"chat_template": text if draw.random() < 0.8 else [{"name": "default", "template": text}]}
    raw = mutated_json(draw, raw) if draw.random() < 0.2 else raw
    folder = bench.damaged("tokenizer_config.json", json.dumps(raw).encode())
    made = Tokenizer.load(folder, read_config(folder / "config.json"))
    content = draw.choice(["Hello", "\x1b[2J", "a" * 100_000, None, 1, [1]])
    made.chat([{"role": "user", "content": content}])


def gguf(bench, draw):
    from ministeer.checkpoints.convert import convert_gguf
    path, out = bench.folder / "model.gguf", bench.folder / "converted"
    if "gguf" not in bench.kept:
        from test_fetch import write_gguf
        write_gguf(path)
        bench.kept["gguf"] = path.read_bytes()
    first = draw.choice([40, 2_000, 20_000])
    path.write_bytes(mutated_bytes(draw, bench.kept["gguf"], first))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    convert_gguf(path, out)


def vector(bench, draw):
    from ministeer import Steer
    path = bench.folder / "steer.safetensors"
    if "steer" not in bench.kept:
        bench.steer.save(path)
        bench.kept["steer"] = path.read_bytes()
    path.write_bytes(mutated_safetensors(draw, bench.kept["steer"]))
    ids = bench.torch.tensor([bench.tokenizer.encode("The gulls argue with the bride.")])
    steer = Steer.load(path, any_model=draw.random() < 0.5)
    bench.model(ids, steer)
    repr(steer)


def control_vector(bench, draw):
    from ministeer.interop import gguf as interop
    path = bench.folder / "vector.gguf"
    if "control_vector" not in bench.kept:
        interop.save(path, [bench.everywhere(2), bench.everywhere(3)], "llama")
        bench.kept["control_vector"] = path.read_bytes()
    path.write_bytes(mutated_bytes(draw, bench.kept["control_vector"], draw.choice([40, 500])))
    bench.model(bench.torch.tensor([[0, 40, 50]]), interop.load(path))


def neuronpedia(bench, draw):
    from ministeer.interop import neuronpedia as interop
    path = bench.folder / "vector.json"
    if "neuronpedia" not in bench.kept:
        interop.save(path, bench.everywhere(2), "gpt2-small", "x")
        bench.kept["neuronpedia"] = json.loads(path.read_bytes())
    path.write_bytes(mutated_text(draw, bench.kept["neuronpedia"]))
    bench.model(bench.torch.tensor([[0, 40, 50]]), interop.load(path))


def classifier(bench, draw):
    from ministeer.baselines.classifier import PrefixClassifier
    path = bench.folder / "classifier.safetensors"
    if "classifier" not in bench.kept:
        PrefixClassifier(50, 4, 6).save(path)
        bench.kept["classifier"] = path.read_bytes()
    path.write_bytes(mutated_safetensors(draw, bench.kept["classifier"]))
    made = PrefixClassifier.load(path)
    made.score(made.read(bench.torch.tensor([[0, 1, 2]])))


def manifest(bench, draw):
    import hashlib

    from ministeer.checkpoints.weights import main
    names = ("config.json", "model.safetensors", "tokenizer.json")
    digests = {name: hashlib.sha256(bench.file(name)).hexdigest() for name in names}
    raw = {"ministeer": "0.2.0", "source": "tests", "files": digests}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(bench.damaged("manifest.json", mutated_text(draw, raw)))
    check_text(out.getvalue())


def scores(bench, draw):
    """A cache of scores with odd values: only true scores come back."""
    from benchmarks.web_judges import judge
    folder = bench.folder / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    texts = ["a wedding", "a gull", "the bride"]
    judge("words:weddings", cache=folder)(texts)
    path = folder / "judges.sqlite"
    if draw.random() < 0.5:
        path.write_bytes(mutated_bytes(draw, path.read_bytes(), 16_000))
    else:
        value = draw.choice([None, "x", 99, -1, float("inf"), "1e999", b"\x00", "\x1b[2J"])
        with contextlib.closing(sqlite3.connect(path)) as file, file:
            file.execute("UPDATE scores SET score = ?", [value])
    for score in judge("words:weddings", cache=folder)(texts):
        if score not in (0.0, 1.0):
            raise AssertionError(f"the score {score!r} comes from the cache")


def unit(bench, draw):
    from benchmarks import jobs
    folder = bench.folder / "units"
    shutil.rmtree(folder, ignore_errors=True)
    jobs.run([["a", 1]], lambda _: {"score": [0.5]}, folder)
    (path,) = folder.glob("*.json")
    raw = json.loads(path.read_bytes())
    path.write_bytes(mutated_text(draw, raw))
    jobs.run([["a", 1]], lambda _: {"score": [0.5]}, folder)


def rows(bench, draw):
    """Rows of texts, as benchmarks/paper.py reads them."""
    from benchmarks import rows as files
    folder = bench.folder / "data"
    folder.mkdir(exist_ok=True)
    good = {"text": "The gulls argue.", "label": "pos", "split": "test"}
    lines = [json.dumps(good).encode() for _ in range(4)]
    lines[draw.randrange(4)] = draw.choice([
        lambda: mutated_text(draw, good), lambda: b"", lambda: b"[]", lambda: b"\xff\xfe", lambda: b"null",
        lambda: b'{"text": "\\ud800"}', lambda: b"\xef\xbb\xbf" + lines[0], lambda: b"a" * 10 ** 6])()
    (folder / "imdb.jsonl").write_bytes(draw.choice([b"\n", b"\r\n"]).join(lines))
    path = folder / "imdb.jsonl"
    for row in files.parse(files.read(path), path, text=str):
        row["text"].encode()


def arguments(bench, draw):
    """Python's own arguments: generate, stream, Steer, steering_vector."""
    import ministeer
    from ministeer.generation import stream
    model, made = bench.model, bench.tokenizer
    odd = [*ODD, 2, 0.3, "The gulls", ["The gulls", "I"], bench.steer, [bench.steer], b"x", object(), 1j,
           bench.torch.ones(3), bench.torch.tensor(float("nan"))]
    if draw.random() < 0.3:
        fields = {"layer": 1, "vector": bench.steer.vector, "coeff": 1.0, "start": 1}
        vectors = [bench.torch.ones(2, 32, dtype=dtype) for dtype in
                   (bench.torch.complex64, bench.torch.int64, bench.torch.bfloat16, bench.torch.float8_e5m2)]
        vectors += [bench.torch.ones(2, 32, device="meta"), bench.torch.ones(2, 32).to_sparse()]
        fields[draw.choice(list(fields))] = draw.choice([*odd, *vectors])
        steer = ministeer.Steer(**fields)
        model(bench.torch.tensor([made.encode("The gulls argue with the bride.")]), steer)
        return
    if draw.random() < 0.2:
        pair = {"plus": " weddings", "minus": " ", "layer": 1}
        pair[draw.choice(list(pair))] = draw.choice(odd)
        ministeer.steering_vector(model, made, **pair)
        return
    settings = {"prompts": "The gulls", "n": 2, "max_new_tokens": 4, "steer": bench.steer, "temperature": 1.0,
                "top_p": 0.3, "freq_penalty": 1.0, "seed": 0, "stop": ()}
    for name in draw.sample(list(settings), draw.choice([1, 1, 2])):
        settings[name] = draw.choice(odd)
    if draw.random() < 0.2:
        del settings["n"]
        "".join(stream(model, made, settings.pop("prompts"), **settings))
    else:
        ministeer.generate(model, made, **settings)


def command(bench, draw):
    """A command line, whose exit code is 0 or 2 and whose complaint is one line."""
    from ministeer.cli import main
    options = {"--plus": " weddings", "--minus": " ", "--layer": "1", "--coeff": "1", "-n": "1",
               "--seed": "0", "--max-new-tokens": "3", "--temperature": "1", "--top-p": "0.3",
               "--freq-penalty": "1",
               "--model": str(bench.whole), "--save": str(bench.folder / "saved.safetensors")}
    odd = ["", " ", "x", "-1", "0", "nan", "inf", "1e-320", "1e999", str(10 ** 20), str(10 ** 9), "\x1b[2J",
           "é" * 99, "../..", "/dev/null", "/", str(bench.folder), "--", "-n", "\udcff", "1,5"]
    for name in draw.sample(list(options), draw.choice([1, 1, 2, 3])):
        options[name] = draw.choice(odd)
    for name in draw.sample(list(options), draw.choice([0, 0, 1])):
        del options[name]
    words = [draw.choice(["steer", "steer", "steer", "steer", "models", "fetch", "x"]),
             draw.choice(["The gulls", "The gulls", "The gulls", *odd])]
    for name, value in options.items():
        words += [name, value]
    words += draw.choice([[], [], ["--json"], ["--any-model"], ["x"]])
    if words[0] == "fetch":
        words = ["fetch", draw.choice([name for name in odd if "/" not in name])]
    streams, code = (io.StringIO(), io.StringIO()), 0
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    out, err = (stream.getvalue() for stream in streams)
    check_text(out + err, most=10 ** 6)
    if code not in (0, 2, None):
        raise AssertionError(f"exit code {code}: {words}")
    if code == 2 and len(err.strip().splitlines()) != 1:
        raise AssertionError(f"not one line: {err!r}")
    if code == 2:
        raise ValueError(err)


KINDS = {kind.__name__: kind for kind in (config, weights, index, tokenizer, chat_template, gguf, vector,
                                          control_vector, neuronpedia, classifier, manifest, scores,
                                          unit, rows, arguments, command)}


def check_text(text, most=2_000):
    if len(text) > most:
        raise AssertionError(f"{len(text)} characters: {text[:200]!r} …")
    if not all(c.isprintable() or c == "\n" for c in text):
        raise AssertionError(f"control characters: {text[:300]!r}")


def attempt(bench, kind, seed):
    """-> "worked", "refused", or the failure in words"""
    from ministeer.checkpoints.fetch import FetchError
    from ministeer.evaluation.judges import JudgeError

    def late(*_):
        raise TimeoutError(f"not over after {SECONDS} s")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            KINDS[kind](bench, random.Random(f"{kind} {seed}"))
        for warning in given:
            check_text(str(warning.message))
        return "worked"
    except TimeoutError as error:
        return f"seed {seed}: {error}"
    except (ValueError, OSError, FetchError, JudgeError) as error:
        try:
            check_text(str(error))
        except AssertionError as fault:
            return f"seed {seed}: {fault}"
        return "refused" if str(error).strip() else f"seed {seed}: {type(error).__name__} without a word"
    except BaseException as error:      # pyo3's PanicException is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return f"seed {seed}: {type(error).__name__} at {place}: {str(error)[:150]!r}"
    finally:
        signal.alarm(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["MINISTEER_WEIGHTS"] = os.environ["XDG_CACHE_HOME"] = "/nonexistent"
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        bench = Bench(Path(folder))
        print("| kind | tries | worked | refused | failed |\n|---|---|---|---|---|", flush=True)
        for kind in args.kinds:
            results = [attempt(bench, kind, args.seed + i) for i in range(args.tries)]
            failures = [result for result in results if result not in ("worked", "refused")]
            print(f"| {kind} | {len(results)} | {results.count('worked')} | {results.count('refused')} | "
                  f"{len(failures)} |", flush=True)
            for failure in failures[:10]:
                print(f"    {failure}", file=sys.stderr, flush=True)
        os.chdir("/")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_try_works_or_is_refused_with_a_sentence(kind):
    from conftest import UNTRACED
    done = subprocess.run([sys.executable, __file__, kind, "--tries", str(TRIES)], capture_output=True,
                          text=True, env=UNTRACED, timeout=SECONDS * 10, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("| 0 |"), done.stderr[-2000:]


if __name__ == "__main__":
    main()
