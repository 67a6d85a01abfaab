"""One model in several processes: each of them computes what one process would, and keeps its part alone.

torchrun runs this file, too: what `results` returns is computed there, and here in one process.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EVERY_FAMILY, N_VOCAB, UNTRACED, hub_config, hub_model, save_checkpoint
from safetensors.torch import save_file

from ministeer import KVCache, Steer, fast, generate, load, steering_vector
from ministeer.checkpoints.config import read_config
from ministeer.checkpoints.parallel import cut
from ministeer.cli import main
from ministeer.llama import Llama
from ministeer.methods import ablation, function_vectors, inside_blocks, optimised, pplm, weight_difference

# Grouped queries that 4 processes can share, and a vocabulary that neither 2 nor 4 divide.
SETTINGS = {"llama": {"num_attention_heads": 8, "num_key_value_heads": 4}}
UNEVEN = N_VOCAB - 3
LLAMA = EVERY_FAMILY.index("llama")
PLUS, MINUS = ["I love you", "You are kind", "so kind", "a bride"], ["I hate you", "so mean", "a gull", "day"]


def results(folder, parallel):
    """Everything that is compared, by name: tensors to 1e-4, the rest exactly."""
    model, tokenizer = load(folder, parallel=parallel)
    ids = torch.tensor([tokenizer.encode(text)[:7] for text in ("Xerxes the Great", "Quizzes and jokes")])
    steer = [3 * steering_vector(model, tokenizer, "Love", "Hate", layer=1)]
    logits, resid = model(ids, steer)
    cache = KVCache(7, 2)
    chunks = [model(ids[:, a:b], steer, cache)[0] for a, b in ((0, 2), (2, 6), (6, 7))]
    x = resid[1].clone().requires_grad_()
    last = model.run(x, torch.arange(7), first_layer=1)[-1]
    (gradient,) = torch.autograd.grad(model.unembed(last).log_softmax(dim=-1)[..., 7].sum(), x)
    texts, drawn = generate(model, tokenizer, ["I hate you because", "Quiz the bride"], n=2, max_new_tokens=8,
                            steer=steer, top_p=0.9, freq_penalty=1.0, seed=3, return_ids=True)
    return model, tokenizer, {
        "vector": steer[0].vector, "logits": logits, "chunks": torch.cat(chunks, dim=1),
        "resid": torch.stack(resid), "stopped": model.residuals(ids, stop_layer=0)[0], "gradient": gradient,
        "bfloat16": load(folder, dtype="bfloat16", parallel=parallel)[0](ids)[0].float(),
        "ids": drawn, "texts": texts, "fingerprint": model.fingerprint,
        "kinds": {type(x) for x in (logits, *resid)},
    }, cache


def methods(model, tokenizer):
    """Of methods that look at the stream, or pass gradients to it."""
    found = optimised.for_sentence(model, tokenizer, "gulls", layer=1, steps=2, rate=0.1)
    direction = Steer(0, found.vector)
    turned = inside_blocks.icv(model, tokenizer, PLUS, MINUS)
    return {"optimised": found.vector, "icv": turned(torch.tensor([[0, 7, 8]]))[0],
            "ablation": model(torch.tensor([[0, 7, 8]]), ablation.ablation(model, direction))[0],
            "pplm": pplm.pplm(model, tokenizer, "I", [" b"], layer=1, max_new_tokens=2, steps=1)}


def refusals(model, tokenizer):
    """What the methods say that look at single heads or matrices, and `fast`."""
    direction, said = Steer(0, torch.ones(model.config.d_model)), []
    for call in (lambda: inside_blocks.iti(model, tokenizer, PLUS, MINUS),
                 lambda: ablation.orthogonalised(model, direction),
                 lambda: weight_difference.fine_tuned(model, tokenizer, PLUS, 1),
                 lambda: weight_difference.weights_plus(model, model, model),
                 lambda: function_vectors.function_vector(model, tokenizer, PLUS, MINUS, [" b"] * 4, 1),
                 lambda: function_vectors.indirect_effects(model, tokenizer, MINUS, [" b"] * 4,
                                                           torch.ones(4, 4, 8))):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    with warnings.catch_warnings(record=True) as caught:
        unchanged = fast(model, compile=True) is model
    return said, unchanged, [str(warning.message) for warning in caught]


def work(out, *folders):
    """In one of torchrun's processes."""
    for folder in map(Path, folders):
        model, tokenizer, values, cache = results(folder, parallel=True)
        parts = list(model.parameters())
        values |= {"heads": cache.layers[0][0].shape[1], "processes": model.processes,
                   "numbers": sum({x.data_ptr(): x.numel() for x in parts}.values())}
        if folder.name in ("gpt2", "llama"):
            values |= methods(model, tokenizer)
        if folder.name == "llama":
            values["refusals"] = refusals(model, tokenizer)
        torch.save(values, f"{out}/{folder.name}-{os.environ['RANK']}.pt")


def torchrun(processes, *arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(processes), *map(str, arguments)]
    return subprocess.run(command, env={**UNTRACED, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300,
                          encoding="utf-8", **options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return [save_checkpoint(root / family, hub_model(hub_config(
        family, vocab_size=UNEVEN, **SETTINGS.get(family, {})))) for family in EVERY_FAMILY]


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_computes_what_one_would_and_keeps_its_part(checkpoints, processes, tmp_path):
    done = torchrun(processes, __file__, tmp_path, *checkpoints)
    assert done.returncode == 0, done.stderr
    assert "unwaited" not in done.stderr            # torch's word for a sum that nobody took
    for folder in checkpoints:
        model, tokenizer, expected, cache = results(folder, parallel=False)
        if folder.name in ("gpt2", "llama"):
            expected |= methods(model, tokenizer)
        every = [torch.load(tmp_path / f"{folder.name}-{rank}.pt", weights_only=False)
                 for rank in range(processes)]
        for values in every:
            for name, value in expected.items():
                if isinstance(value, torch.Tensor):
                    tolerance = 0.05 if name == "bfloat16" else 1e-4
                    assert close(values[name], value, tolerance), (folder.name, name)
                else:
                    assert values[name] == value, (folder.name, name)
            assert values["heads"] == cache.layers[0][0].shape[1] / processes
            assert values["processes"] == processes
            # bit for bit, so that the same tokens are drawn
            assert torch.equal(values["logits"], every[0]["logits"])
        check_parts(model, [values["numbers"] for values in every])
        if folder.name == "llama":
            check_refusals(processes, every[0]["refusals"])


def check_parts(model, numbers):
    """numbers: how many numbers each process keeps. Norms and what is as small are whole in each."""
    whole = ("norm", "ln_", "wpe", "embed_positions", "project_", "proj.bias", "fc2.bias", "fc_out.bias")
    counts = {name: p.numel() for name, p in model.named_parameters()}
    reads = ("q_proj", "k_proj", "v_proj")
    kept = sum(n for name, n in counts.items() if any(part in name for part in whole)
               and not any(part in name for part in reads))
    vocabulary = sum(n for n in counts.values() if n % UNEVEN == 0)
    rows = -(-UNEVEN // len(numbers))           # the last process has fewer
    cut = sum(counts.values()) - kept - vocabulary
    assert max(numbers) == numbers[0] == kept + cut // len(numbers) + vocabulary // UNEVEN * rows
    assert sum(numbers) == sum(counts.values()) + (len(numbers) - 1) * kept


def check_refusals(processes, refusals):
    said, unchanged, warned = refusals
    assert len(said) == 6
    assert all(f"{processes} processes share those of this model. Load it without parallel=True" in sentence
               for sentence in said)
    assert unchanged
    assert f"{processes} processes share its weights" in warned[0]


def test_one_process_alone_is_told_to_start_torchrun(checkpoints, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun did not start this one. Run .*torchrun --nproc-per-node"):
        load(checkpoints[LLAMA], parallel=True)


@pytest.mark.long
def test_the_command_line_prints_once_what_one_process_prints(checkpoints, tmp_path, capsys):
    command = ["steer", "I hate you", "--model", str(checkpoints[LLAMA]), "--plus", " love", "--layer", "1",
               "--json", "--save"]
    main([*command, str(tmp_path / "one")])
    one = json.loads(capsys.readouterr().out)
    done = torchrun(2, "-m", "ministeer", *command, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == one
    a, b = (Steer.load(tmp_path / name) for name in ("one", "two"))
    assert close(a.vector, b.vector)
    assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize(("processes", "settings", "says"), [
    (3, {}, "4 key/value heads and an MLP of width 48 cannot be divided evenly among 3 processes. "
            "Possible numbers: 1, 2, 4."),
    (4, {"d_mlp": 50}, "an MLP of width 50 cannot be divided evenly among 4 processes. "
                       "Possible numbers: 1, 2."),
    (2, {"family": "fifth"}, "PLANS in checkpoints/parallel.py has no plan that says how to cut a fifth"),
])
def test_what_cannot_be_divided_is_refused(checkpoints, monkeypatch, processes, settings, says):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    with torch.device("meta"):
        model = Llama(replace(read_config(checkpoints[LLAMA] / "config.json"), **settings))
    with pytest.raises(ValueError, match=re.escape(says)):
        cut(model)


PEAK = """
import sys
from ministeer.checkpoints.weights import load_model

def memory(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) / 1024

tiny, large, *parallel = sys.argv[1:]
load_model(tiny, parallel=bool(parallel))       # so that what torch keeps for itself is not counted
before = memory("VmRSS")
load_model(large, parallel=bool(parallel))
sys.stdout.write(f"peak {memory('VmHWM') - before:.0f}.\\n")      # in one piece: the processes share it
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_loading_takes_the_memory_of_a_part_and_one_tensor(checkpoints, tmp_path):
    config = hub_config("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
                        num_attention_heads=16, num_key_value_heads=8, vocab_size=8192)
    folder = tmp_path / "large"
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Llama(read_config(folder / "config.json"))
    weights = {f"model.{name}".replace("model.lm_head", "lm_head"): torch.zeros(p.shape, dtype=torch.float16)
               for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    (tmp_path / "peak.py").write_text(PEAK, encoding="utf-8")
    total = sum(x.numel() for x in weights.values()) * 4 / 2 ** 20              # MB in float32
    tensor = max(x.numel() for x in weights.values()) * 4 / 2 ** 20
    for processes in (1, 4):
        done = torchrun(processes, tmp_path / "peak.py", checkpoints[LLAMA], folder,
                        *["parallel"] * (processes > 1))
        assert done.returncode == 0, done.stderr
        peaks = [int(peak) for peak in re.findall(r"peak (\d+)\.", done.stdout)]
        assert len(peaks) == processes
        assert 0.9 * total / processes <= min(peaks)
        assert max(peaks) <= total / processes + tensor


if __name__ == "__main__":
    work(*sys.argv[1:])
    # All is written. After gradients, gloo's threads sometimes abort a process that ends in the usual way.
    os._exit(0)
