"""ministeer play without a browser: what is shown is what the library computes; the server guards itself."""

import asyncio
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, UNTRACED

from ministeer import cli, generate, load
from ministeer.evaluation.measure import sweep
from ministeer.evaluation.stats import wilson
from ministeer.generation import Sampling
from ministeer.play import engine
from ministeer.steering import Steer, random_like, relative_norm, steering_vector

httpx = pytest.importorskip("httpx", reason="httpx comes with the extra test")
testclient = pytest.importorskip("starlette.testclient", reason="starlette comes with the extra play")

GIVEN = {"prompt": "I hate you because you are", "plus": " love you", "minus": " hate", "layer": 2,
         "coeff": 1.5, "where": "front", "n": 7, "max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9,
         "freq_penalty": 0.5, "seed": 3}
SAMPLING = {name: GIVEN[name] for name in engine.SAMPLED}


@pytest.fixture(scope="module")
def tiny_pair(tiny_llama):
    return load(tiny_llama)


@pytest.fixture
def client(tiny_llama, tiny_pair):
    from ministeer.play.server import app
    return testclient.TestClient(app(*tiny_pair, str(tiny_llama)), base_url="http://127.0.0.1")


def events(answer):
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]


@pytest.mark.parametrize("where", ["front", "middle", "back", "every", 3])
def test_the_map_and_the_next_token_are_those_of_the_model(tiny, where):
    model, tokenizer = tiny
    setting = engine.read(model, tokenizer, {**GIVEN, "where": where})
    steer = engine.addition(model, tokenizer, setting)
    seen = engine.look(model, tokenizer, setting)
    ids = torch.tensor([tokenizer.encode(GIVEN["prompt"])])
    logits, plain = model(ids)
    random = [random_like(steer, seed) for seed in range(5)]
    for s, shown in zip([steer, *random], [seen["change"], *seen["random"]], strict=True):
        wanted = [((a - b).norm(dim=-1) / b.norm(dim=-1))[0]
                  for a, b in zip(model(ids, s)[1], plain, strict=True)]
        torch.testing.assert_close(torch.tensor(shown), torch.stack(wanted), rtol=1e-3, atol=1e-5)
    norms = relative_norm(model, tokenizer, steer, GIVEN["prompt"])
    torch.testing.assert_close(torch.tensor(seen["change"][2]), norms, rtol=1e-3, atol=1e-5)
    assert seen["steered"] == norms.nonzero().flatten().tolist()
    assert not torch.tensor(seen["change"])[:, :seen["steered"][0]].any()       # nothing before the addition
    likeliest = logits[0, -1].log_softmax(-1).max().item()
    assert max(logp[0] for _, logp in seen["next"]) == pytest.approx(likeliest, rel=1e-3)


@pytest.mark.parametrize(("where", "rows"), [("front", [0, 1]), ("every", None), (0, [1])])
def test_the_strength_is_in_mean_norms_of_the_layer(tiny, where, rows):
    model, tokenizer = tiny
    seen = engine.look(model, tokenizer, engine.read(model, tokenizer, {**GIVEN, "where": where}))
    vector = steering_vector(model, tokenizer, GIVEN["plus"], GIVEN["minus"], 2).vector.double()
    vector = vector.mean(dim=0, keepdim=True) if rows is None else vector[rows]
    norm = torch.tensor(seen["norms"])[2, 1:].mean().item()         # the norms of the map, BOS left out
    assert seen["strength"] == pytest.approx(1.5 * vector.norm(dim=-1).mean().item() / norm, rel=1e-3)


def test_what_is_added_to_bos_alone_has_no_strength(tiny):
    model, tokenizer = tiny
    setting = engine.read(model, tokenizer, {**GIVEN, "plus": "a", "minus": "b", "where": 0})
    assert engine.addition(model, tokenizer, setting).stop == 1
    assert engine.look(model, tokenizer, setting)["strength"] is None


def test_columns_are_those_of_generate(tiny):
    model, tokenizer = tiny
    setting, texts = engine.read(model, tokenizer, GIVEN), {}
    ended = set()
    for step in engine.completions(model, tokenizer, setting, GIVEN["n"], Sampling(**SAMPLING)):
        for column, i, text, over in step:
            texts[column, i] = texts.get((column, i), "") + text
            assert (column, i) not in ended
            ended |= {(column, i)} if over else set()
    assert ended == set(texts)
    steer = engine.addition(model, tokenizer, setting)

    def wanted(s, n):
        return generate(model, tokenizer, GIVEN["prompt"], n, steer=s, **SAMPLING)
    assert [texts["unsteered", i] for i in range(7)] == wanted((), 7)
    assert [texts["steered", i] for i in range(7)] == wanted(steer, 7)
    for seed in range(5):
        share = range(seed, 7, 5)
        assert [texts["random", i] for i in share] == wanted(random_like(steer, seed), len(share))


def test_more_completions_than_a_batch_are_those_of_generate(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(engine, "BATCH", 4)
    setting, texts = engine.read(model, tokenizer, GIVEN), {}
    for step in engine.completions(model, tokenizer, setting, 3, Sampling(**SAMPLING)):
        for column, i, text, _ in step:
            texts[column, i] = texts.get((column, i), "") + text
    wanted = generate(model, tokenizer, GIVEN["prompt"], 3, **SAMPLING)
    assert [texts["unsteered", i] for i in range(3)] == wanted


def test_scan_is_the_sweep_beside_five_random_vectors(tiny):
    model, tokenizer = tiny
    setting = engine.read(model, tokenizer, GIVEN)
    first, *layers = engine.scan(model, tokenizer, setting, " love")
    target = tokenizer.encode(" love", bos=False)[0]
    assert first["target"] == tokenizer.pieces([target])[0] and first["coeffs"] == [-4, -2, -1, 1, 1.5, 2, 4]
    prompts = [GIVEN[name] for name in ("prompt", "plus", "minus")]
    wanted = sweep(model, tokenizer, *prompts, range(4), first["coeffs"])
    steered = torch.tensor([layer["steered"] for layer in layers]) + first["unsteered"]
    torch.testing.assert_close(steered, wanted.log_softmax(-1)[..., target], rtol=1e-3, atol=1e-3)
    ids = torch.tensor([tokenizer.encode(GIVEN["prompt"])])
    controls = [random_like(engine.addition(model, tokenizer, setting), seed) for seed in range(5)]
    wanted = [model(ids, control)[0][0, -1].log_softmax(-1)[target].item() for control in controls]
    random = [change + first["unsteered"] for change in layers[setting.layer]["random"]]
    assert random == pytest.approx(wanted, rel=1e-3)


def test_scan_adds_where_the_setting_says(tiny):
    model, tokenizer = tiny
    setting = engine.read(model, tokenizer, {**GIVEN, "where": "back"})
    *_, last = engine.scan(model, tokenizer, setting, " love")
    ids = torch.tensor([tokenizer.encode(GIVEN["prompt"])])
    steer = engine.addition(model, tokenizer, replace(setting, layer=3, coeff=4.0))
    steered, plain = (model(ids, s)[0][0, -1].log_softmax(-1) for s in (steer, ()))
    target = tokenizer.encode(" love", bos=False)[0]
    assert last["steered"][-1] == pytest.approx((steered - plain)[target].item(), rel=1e-2)


def test_lens_is_the_unembedding_of_that_place(tiny):
    model, tokenizer = tiny
    setting = engine.read(model, tokenizer, GIVEN)
    ids = torch.tensor([tokenizer.encode(GIVEN["prompt"])])
    resid = model(ids, engine.addition(model, tokenizer, setting))[1]
    p = model.unembed(resid[3])[0, 4].softmax(-1)
    (piece, share), *_ = engine.lens(model, tokenizer, setting, 3, 4)["steered"]
    assert piece == tokenizer.pieces([p.argmax()])[0] and share == pytest.approx(p.max().item(), rel=1e-3)
    assert engine.lens_map(model, tokenizer, setting)[3][4] == piece


def test_counts_come_with_their_interval():
    counts = engine.count({"steered": ["A wedding!", "no", "Wed"], "random": ["no"]}, "wed Wedding")
    assert counts["steered"] == [2, 3, *wilson(2, 3), [True, False, True]]
    assert counts["random"][:2] == [0, 1] and counts["unsteered"][:2] == [0, 0]


@pytest.mark.parametrize("where", ["front", "back", 2, "every"])
def test_python_lines_and_command_repeat_the_setting(tiny_llama, tiny_pair, where, tmp_path, monkeypatch,
                                                     capsys):
    model, tokenizer = tiny_pair
    setting = engine.read(model, tokenizer, {**GIVEN, "where": where})
    steer = engine.addition(model, tokenizer, setting)
    wanted = generate(model, tokenizer, GIVEN["prompt"], 7, steer=steer, **SAMPLING)
    names = {}
    exec(engine.as_python(str(tiny_llama), setting, 7, Sampling(**SAMPLING)), names)
    assert names["texts"] == wanted
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vector.safetensors").write_bytes(engine.as_file(steer))
    assert Steer.load("vector.safetensors") == steer
    command = engine.as_command(str(tiny_llama), setting, 7, Sampling(**SAMPLING))
    program, *arguments = shlex.split(command)
    assert program == "ministeer"
    arguments.insert(1, "--json")
    cli.main(arguments)
    assert json.loads(capsys.readouterr().out)["steered"] == wanted


@pytest.mark.parametrize("name", ["weddings", "love - hate"])
def test_a_preset_makes_its_target_likelier_than_five_random_vectors_do(real, name):
    model, tokenizer = real
    preset = engine.PRESETS[name]
    x = engine.streams(model, tokenizer, engine.read(model, tokenizer, preset), engine.CONTROLS)[-1]
    plain, steered, *random = engine.next_logp(model, x)[:, tokenizer.encode(preset["target"], bos=False)[0]]
    assert len(random) == 5 and steered > max(plain, *random) + 0.5


def test_the_first_preset_is_the_demo():
    preset = engine.PRESETS["weddings"]
    assert {name: preset[name] for name in cli.DEMO} == cli.DEMO


@pytest.mark.parametrize("field, value, sentence", [
    ("prompt", "", "does not fit the front of a prompt of 1 tokens"),
    ("prompt", None, "must be a list of texts"),
    ("prompt", "word " * 500, "reads at most 2000"),
    ("prompt", "q z " * 60, "reads at most 64"),
    ("prompt", "\ud800", "surrogate"),
    ("plus", " hate", "are the same tokens"),
    ("layer", 4, "this model has blocks 0 … 3"),
    ("layer", 1.0, "this model has blocks"),
    ("layer", None, "this model has blocks"),
    ("coeff", None, "coeff must be"),
    ("coeff", float("nan"), "coeff must be"),
    ("n", 51, "from 1 to 50"),
    ("max_new_tokens", 101, "from 1 to 100"),
    ("top_p", 2, "from 0 to 1"),
    ("seed", -1, "0 or more"),
])
def test_bad_input_is_refused_with_its_field(client, field, value, sentence):
    body = json.dumps({**GIVEN, field: value})
    answer = client.post("/look", content=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] == field and sentence in answer.json()["message"]


@pytest.mark.parametrize("where", ["sideways", 60, [1]])
def test_refuses_a_position_that_the_prompt_lacks(client, where):
    answer = client.post("/look", json={**GIVEN, "where": where})
    assert answer.status_code == 422 and answer.json()["field"] in ("prompt", "where")


@pytest.mark.parametrize("path, body", [
    ("look", b"[]"), ("look", b"{"), ("look", b"[" * 100_000), ("look", b" " * 500_000),
    ("lens", json.dumps({**GIVEN, "at_layer": 5, "at": 0}).encode()),
    ("count", b'{"texts": 1, "words": ""}'), ("complete", b"7"),
])
def test_bodies_that_are_not_a_request_are_answered(client, path, body):
    answer = client.post(f"/{path}", content=body)
    assert answer.status_code == 422 and answer.json()["message"]


def test_refuses_other_hosts_and_other_sites(client):
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/", headers={"host": "127.0.0.1.evil.example"}).status_code == 403
    assert client.get("/", headers={"host": "localhost:99"}).status_code == 200
    own, other = "http://127.0.0.1", "http://evil.example"
    for origin, status in ((own, 200), (other, 403), ("null", 403)):
        answer = client.post("/look", json=GIVEN, headers={"origin": origin})
        assert answer.status_code == status


def test_elsewhere_the_address_needs_its_token(tiny_llama, tiny_pair):
    from ministeer.play.server import app
    client = testclient.TestClient(app(*tiny_pair, str(tiny_llama), "secret"), base_url="http://10.0.0.1")
    assert client.get("/").status_code == client.post("/look", json=GIVEN).status_code == 403
    assert client.get("/?token=guess").status_code == client.get("/?token=é").status_code == 403
    assert client.get("/?token=secret").status_code == 200
    answer = client.post("/look", json=GIVEN, headers={"x-token": "secret"})
    assert answer.status_code == 200


def test_the_page_may_load_nothing_from_outside(client):
    for path in ("/", "/style.css", "/play.js", "/nothing"):
        policy = client.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    page = client.get("/").text + client.get("/style.css").text + client.get("/play.js").text
    # The names of HTML and SVG look like addresses and are never requested.
    assert set(re.findall(r"https?://[^/]*", page)) == {"http://www.w3.org"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)


def test_a_stream_ends_with_what_stopped_it(client):
    answer = client.post("/complete", json={**GIVEN, "client": "a", "layer": 99})
    (event,) = events(answer)
    assert event["field"] == "layer"
    *steps, last = events(client.post("/complete", json={**GIVEN, "client": "a"}))
    assert len(steps) == GIVEN["max_new_tokens"] and last == {"done": True}


@pytest.fixture
def endless(tiny_llama, tiny_pair, monkeypatch):
    """(address of a server whose completions never end, an event that is set when one is dropped)"""
    import uvicorn

    from ministeer.play.server import app
    dropped = threading.Event()

    def completions(*_):
        try:
            while True:
                yield []
        finally:
            dropped.set()
    monkeypatch.setattr(engine, "completions", completions)
    server = uvicorn.Server(uvicorn.Config(app(*tiny_pair, str(tiny_llama)), port=0, log_level="error",
                                           timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", dropped
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_a_client_that_leaves_stops_its_work(endless):
    address, dropped = endless
    with httpx.stream("POST", f"{address}/complete", json={**GIVEN, "client": "a"}) as answer:
        lines = answer.iter_lines()     # Trap: httpx closes the connection of one that is thrown away
        next(lines)
        assert not dropped.wait(0.5)
    assert dropped.wait(20)


def test_one_generation_at_a_time_and_a_newer_one_of_a_client_ends_the_older(endless):
    address, dropped = endless

    async def first(lines):
        async for line in lines:
            if line:
                return json.loads(line.removeprefix("data: "))

    async def last(lines):
        return [line async for line in lines if line][-1]

    async def go():
        async with httpx.AsyncClient(base_url=address, timeout=30) as http:
            def ask(client):
                return http.stream("POST", "/complete", json={**GIVEN, "client": client})
            async with ask("a") as a, ask("b") as b:
                a_lines, b_lines = a.aiter_lines(), b.aiter_lines()
                assert await first(a_lines) == {"step": []}
                assert await first(b_lines) == {"ahead": 1}
                look = await http.post("/look", json=GIVEN)
                assert look.status_code == 200                  # answered between two steps of a
                async with ask("a") as newer:
                    assert "newer request" in await last(a_lines)
                    assert await first(b_lines) == {"step": []}
                    assert await first(newer.aiter_lines()) == {"ahead": 1}
                    assert dropped.is_set()
    asyncio.run(asyncio.wait_for(go(), 60))


def test_the_line_of_waiting_clients_is_bounded(client, monkeypatch):
    from ministeer.play import server
    monkeypatch.setattr(server, "MOST_WAITING", 0)
    (event,) = events(client.post("/complete", json={**GIVEN, "client": "a"}))
    assert "Try again" in event["message"]


def test_the_command_serves_other_computers_with_a_token_until_ctrl_c(tiny_llama):
    command = [sys.executable, "-m", "ministeer", "play", "--no-browser", "--port=0", "--host=0.0.0.0",
               f"--model={tiny_llama}"]
    process = subprocess.Popen(command, cwd=ROOT, env=UNTRACED, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0].replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(address.partition("?")[0]).status_code == 403
        answer = httpx.get(address)
        assert answer.status_code == 200 and "Activation addition" in answer.text
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "warning: everyone on this network" in err and "Traceback" not in err


def test_a_port_that_is_taken_is_one_line(tiny_llama, capsys):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as left:
        cli.main(["play", "--no-browser", f"--port={taken.getsockname()[1]}", f"--model={tiny_llama}"])
    assert left.value.code == 2
    assert re.fullmatch(r"ministeer: cannot serve on 127\.0\.0\.1, port \d+: .*\n", capsys.readouterr().err)
