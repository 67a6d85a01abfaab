"""benchmarks/devices.py passes on the CPU, and says no where one number or one identity is wrong."""

from types import SimpleNamespace

import pytest
import torch
from test_benchmarks_paper import run

import ministeer
from benchmarks import devices


def test_the_cpu_computes_what_the_cpu_computes(checkpoint, monkeypatch, capsys):
    run(monkeypatch, devices, ["--model", checkpoint, "--device", "cpu"])       # or it ends with 1
    table = capsys.readouterr().out
    assert [line.split(" | ")[0].strip("| ") for line in table.split("\n")[4:7]] == [*devices.BOUNDS]
    assert "–" not in table                     # nothing was left out


def with_a_fault(model):
    """The model, one of whose blocks writes one per cent too much at position 5."""
    block, forward = model.blocks[1], model.blocks[1].forward

    def wrong(x, *rest):
        y = forward(x, *rest).clone()
        y[:, 5:6] *= 1.01
        return y
    block.forward = wrong
    return model


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_wrong_number_at_one_position_is_found(checkpoint, monkeypatch):
    def load(name, **how):
        model, tokenizer = ministeer.checkpoints.loading.load(name, **how)
        return (with_a_fault(model) if how else model), tokenizer
    monkeypatch.setattr(ministeer, "load", load)
    args = SimpleNamespace(model=checkpoint, device="cpu", dtypes=["float32"])
    assert not devices.run(args)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_steer_that_acts_too_early_is_found(tiny):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(devices.TEXT)])
    steer = 2 * ministeer.steering_vector(model, tokenizer, " love", " hate", 2)
    plain, right = devices.read(model, ids), devices.read(model, ids, steer)
    early = devices.read(model, ids, ministeer.Steer(1, steer.vector, 2.0))
    assert devices.exact_identities(model, tokenizer, ids, steer, plain, right)
    assert not devices.exact_identities(model, tokenizer, ids, steer, plain, early)
