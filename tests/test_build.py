"""The track "Build it yourself": solutions pass, stubs and plausible wrong answers do not."""

import ast
import doctest
import json
import re
import shutil

import pytest
import torch
from conftest import hub_config, hub_model, save_checkpoint

from tutorials.build import checks
from tutorials.build.__main__ import check, main
from tutorials.build.compare import ALLOWED, FILES, HERE, Importing, Student, Wrong

LETTERS = [part for part in FILES if part != "together"]
SOLUTIONS = HERE / "solutions"

# Of each part: what is wrong, and how its solution has to be changed for that.
WRONG = {
    "a": [
        ("mask off by one", "> query", ">= query"),
        ("sees one key too many", "> query", "> query + 1"),
        ("mask transposed", "> query", "< query"),
        ("queries at the first positions", "torch.arange(S - T, S)", "torch.arange(T)"),
        ("softmax over the queries", "dim=-1", "dim=-2"),
        ("softmax over everything", "weights.sum(dim=-1, keepdim=True)", "weights.sum()"),
        ("overflows", "(scores - scores.amax(dim=-1, keepdim=True)).exp()", "scores.exp()"),
        ("-100 for -inf", "-math.inf", "-100.0"),
        ("0 for -inf", "-math.inf", "0.0"),
        ("masked afterwards", "scores = scores.masked_fill(torch.arange(S) > query, -math.inf)",
         "later = torch.arange(S) > query", "keepdim=True)\n", "keepdim=True) * ~later\n"),
    ],
    "b": [
        ("pairs of neighbours", "x.chunk(2, dim=-1)", "(x[..., ::2], x[..., 1::2])"),
        ("turns the other way", "[-right, left]", "[right, -left]"),
        ("halves not exchanged", "[-right, left]", "[-left, right]"),
        ("cos and sin exchanged", "rotate(x, cos, sin)", "rotate(x, sin, cos)"),
        ("in place", "return x * cos", "return x.mul_(cos)"),
        ("no scale", " / math.sqrt(q.shape[-1])", ""),
        ("scale d", "math.sqrt(q.shape[-1])", "q.shape[-1]"),
        ("scale of the positions", "q.shape[-1]", "k.shape[-2]"),
        ("no mask", "causal_softmax(scores)", "scores.softmax(dim=-1)"),
        ("no softmax", "causal_softmax(scores)", "scores.tril()"),
    ],
    "c": [
        ("no eps", " + 1e-5).sqrt()", ").sqrt()"),
        ("subtracts the mean", "return x / (x", "x = x - x.mean(dim=-1, keepdim=True)\n    return x / (x"),
        ("norm after", 'y = rms_norm(x, w["input_layernorm.weight"])', "y = x"),
        ("adds to the norm", "x = x + head(q, k, v)", "x = y + head(q, k, v)"),
        ("second half reads the first norm", 'y = rms_norm(x, w["post_attention_layernorm.weight"])\n', "\n"),
        ("repeat", "z.repeat_interleave(n_head // z.shape[1], dim=1)",
         "z.repeat(1, n_head // z.shape[1], 1, 1)"),
        ("no rotation", "q, k = rotate(q, *rope), rotate(k, *rope)", "pass"),
        ("rotates v", "q, k = rotate(q, *rope)", "v = rotate(v, *rope)\n    q, k = rotate(q, *rope)"),
        ("heads of a fixed width", "q.shape[-1] // n_head", "64"),
        ("heads not merged", "transpose(1, 2).flatten(2) @ w", "reshape(x.shape) @ w"),
        ("past is not read", "if past:", "if False:"),
        ("past is not kept", "if past is not None:", "if False:"),
        ("past keeps the last chunk only", "    if past:\n", "    new = {'k': k, 'v': v}\n    if past:\n",
         "update(k=k, v=v)", "update(new)"),
        ("one past for all", "def llama_block", "shared = {}\n\n\ndef llama_block", 'past["', 'shared["',
         "past.update(k=k, v=v)", "past.update(k=k), shared.update(k=k, v=v)"),
        ("gate and up exchanged", "F.silu(gate) * up", "gate * F.silu(up)"),
        ("relu", "F.silu", "F.relu"),
        ("exact gelu", 'approximate="tanh"', 'approximate="none"'),
        ("no bias", ' + w[f"{name}.bias"]', ""),
        ("transposed weights", 'y @ w[f"{name}.weight"]', 'y @ w[f"{name}.weight"].T'),
        ("heads cut first", "(3, n_head, -1))", "(n_head, 3, -1)).transpose(2, 3)"),
        ("the first norm twice", "ln_2", "ln_1"),
        ("another eps", '"ln_1.bias"], 1e-5', '"ln_1.bias"], 1e-3'),
    ],
    "d": [
        ("pads left", "[row + [space] * (length - len(row))", "[[space] * (length - len(row)) + row"),
        ("pads after BOS", "row + [space] * (length - len(row))",
         "row[:1] + [space] * (length - len(row)) + row[1:]"),
        ("pads with BOS", "[space] *", "[bos] *"),
        ("pads the text", "encode(minus)]]", "encode(minus.ljust(len(plus)))]]"),
        ("pads minus only", "max(map(len, rows))", "len(rows[0])"),
        ("cuts the longer one", "row + [space] * (length - len(row))", "row[:min(map(len, rows))]"),
        ("no BOS", "[bos, *", "[*"),
        ("BOS twice", "[bos, *", "[bos, bos, *"),
        ("BOS 0", "[bos, *", "[0, *"),
        ("keeps the row of BOS", "[1:]", ""),
        ("the last row only", "[1:]", "[-1:]"),
        ("minus minus plus", "h_plus - h_minus", "h_minus - h_plus"),
        ("mean over positions", "[1:]", "[1:].mean(dim=0)"),
        ("unit norm", "(h_plus - h_minus)[1:]", "torch.nn.functional.normalize(h_plus - h_minus)[1:]"),
    ],
    "e": [
        ("start 0", "pos - 1", "pos"),
        ("positions of the chunk", "pos - 1", "pos - pos[0] - 1"),
        ("the end of a vector", " & (row < n)", ""),
        ("BOS gets a row too", "(row >= 0) & ", ""),
        ("everywhere", " * inside[:, None]", ""),
        ("no coeff", "return coeff * ", "return "),
        ("absolute coeff", "return coeff * ", "return abs(coeff) * "),
        ("rows of the batch", "vector.shape[-2]", "vector.shape[0]"),
        ("after the block", "l == layer", "l == layer + 1"),
        ("at every layer from there", "l == layer", "l >= layer"),
        ("noted before", "        if l == layer:", "        resid.append(x)\n        if l == layer:",
         "        resid.append(x)\n        x = block", "        x = block"),
        ("no last stream", "    resid.append(x)\n    return", "    return"),
        ("in place", "x = x + delta", "x += delta"),
        ("positions made up", "block(x, pos)", "block(x, torch.arange(x.shape[1]))"),
    ],
    "f": [
        ("drops the token that crosses", "before <= p", "before + chance <= p"),
        ("no cut", "before <= p", "before <= 1"),
        ("not divided by the sum", " * reached[:, -1:]", ""),
        ("unlikeliest first", ".topk(min(1000, logits.shape[-1]))", ".sort(dim=-1)"),
        ("ten tokens", "min(1000, ", "min(10, "),
        ("one u for all", "u[:, None]", "u[0]"),
        ("draws of its own", "u[:, None]", "torch.rand(len(u), 1)"),
        ("places for ids", "return ids.gather(1, first)[:, 0]", "return first[:, 0]"),
        ("greedy over the batch", "argmax(dim=-1)\n", "argmax(dim=0)\n"),
        ("greedy gives the logit", "logits.argmax(dim=-1)\n", "logits.amax(dim=-1)\n"),
        ("first position", "[:, -1]\n", "[:, 0]\n"),
        ("no cache", "forward(new, pos)", "forward(ids, torch.arange(ids.shape[1]))"),
        ("position stands still", "pos[-1:] + 1", "pos[-1:]"),
        ("positions of the chunk", "pos[-1:] + 1", "torch.arange(1)"),
        ("always greedy", "if p == 0 else top_p(logits, p, u)", ""),
        ("same draw for all tokens", "else top_p(logits, p, u)", "else top_p(logits, p, draws[:, 0])"),
        ("new tokens only", "    return ids\n", "    return ids[:, -draws.shape[1]:]\n"),
        ("in front", "torch.cat([ids, new]", "torch.cat([new, ids]"),
    ],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A tiny Llama in the place of the default model, in float16 like it."""
    folder = tmp_path_factory.mktemp("build")
    model = hub_model(hub_config("llama", rms_norm_eps=1e-5, tie_word_embeddings=True)).half()
    save_checkpoint(folder, model)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    tiny = checks.Reference()
    tiny.folder = folder
    return tiny


@pytest.fixture
def folder(tmp_path):
    """A student's folder, in which everything is solved."""
    for path in SOLUTIONS.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


def verdict(folder, part, reference):
    ((_, wrong, _),) = check(folder, [part], reference)
    return wrong


def change(folder, part, *changes):
    """Replace text in the student's file of a part; each text must be there."""
    path = folder / f"{FILES[part]}.py"
    code = path.read_text()
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in code
        code = code.replace(old, new)
    path.write_text(code)


@pytest.mark.parametrize("part", LETTERS)
def test_solution_passes(part, reference):
    assert verdict(SOLUTIONS, part, reference) == ""


@pytest.mark.parametrize("part", LETTERS)
def test_stub_is_refused_with_what_it_gives_and_what_is_expected(part, folder, reference):
    shutil.copy(HERE / f"{FILES[part]}.py", folder)
    assert "it gives None, expected a tensor (" in verdict(folder, part, reference)


@pytest.mark.parametrize("part, what", [(part, wrong[0]) for part in LETTERS for wrong in WRONG[part]])
def test_wrong_answer_is_refused(part, what, folder, reference):
    (changes,) = (wrong[1:] for wrong in WRONG[part] if wrong[0] == what)
    change(folder, part, *changes)
    wrong = verdict(folder, part, reference)
    assert wrong
    assert "SyntaxError" not in wrong and "NameError" not in wrong      # it should run


@pytest.mark.parametrize("part", LETTERS)
def test_examples_in_the_stubs_are_true(part):
    with Importing(SOLUTIONS):
        names = vars(Student(SOLUTIONS, part).module)
    stub = ast.parse((HERE / f"{FILES[part]}.py").read_text(encoding="utf-8"))
    functions = [node for node in stub.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        docstring = ast.get_docstring(function)
        example = doctest.DocTestParser().get_doctest(docstring, dict(names), function.name, "", 0)
        assert example.examples
        assert doctest.DocTestRunner().run(example).failed == 0


def test_whole_model_of_the_solutions_computes_what_ministeer_does(reference):
    with Importing(SOLUTIONS), torch.no_grad():
        checks.logits(Student(SOLUTIONS, "together"), reference)


def test_no_weddings_no_pass(reference):
    wrong = verdict(SOLUTIONS, "together", reference)
    assert re.search(r"unsteered 0 of 20, steered \d of 20 \(.*\), random (\d ){5}of 4 each", wrong)


@pytest.mark.long
def test_solutions_write_about_weddings_on_the_default_model(smollm2, monkeypatch, capsys):
    monkeypatch.setenv("MINISTEER_WEIGHTS", str(smollm2.parent))
    assert main(["check", "--solutions"]) == 0
    assert "7 of 7 parts done" in capsys.readouterr().out


@pytest.mark.parametrize("code, message", [
    ("def causal_softmax(scores):\n    return scores[0, 0, 0, 0]\n", "a_softmax.py, line 2: IndexError: "),
    ("def causal_softmax(scores)\n    return 1\n", "a_softmax.py, line 1: SyntaxError: expected ':'"),
    ("def causal_softmax(scores):\n    raise SystemExit\n", "a_softmax.py, line 2: SystemExit: "),
    ("1 / 0\n", "a_softmax.py, line 1: ZeroDivisionError: division by zero"),
    ("", "the file has no function causal_softmax"),
    ("import math\nfrom ministeer.attention import attend\n", "line 2: it imports ministeer.attention. "),
    ("def causal_softmax(scores):\n    return scores[None]\n", "gives a tensor (1, 1, 1), expected (1, 1)"),
    ("def causal_softmax(scores):\n    return 1.0\n", "it gives a float, expected a tensor (1, 1)"),
    ("def causal_softmax(scores):\n    return scores.softmax(-1)\n",
     "scores (3, 3): at index [0, 0] it gives 0."),
])
def test_message_says_what_and_where(code, message, tmp_path, reference):
    (tmp_path / "a_softmax.py").write_text(code)
    wrong = verdict(tmp_path, "a", reference)
    assert message in wrong
    assert "\n" not in wrong


def test_nan_is_not_right():
    with pytest.raises(Wrong, match=r"at index \[1\] it gives nan, expected 1 \(1 of 2 values differ\)"):
        checks.compare(torch.tensor([0.0, torch.nan]), torch.tensor([0.0, 1.0]), "f")


def test_check_goes_to_the_first_part_that_is_not_right(folder, reference, monkeypatch, capsys):
    monkeypatch.setattr(checks, "Reference", lambda: reference)
    change(folder, "b", " / math.sqrt(q.shape[-1])", "")
    assert main(["check", "--folder", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a         ok"
    assert lines[1].startswith("b         not yet  head, q (4, 2), k and v (4, 2): at index [1, 0] it gives ")
    assert lines[2:] == ["          For a hint: python -m tutorials.build hint b 1", "1 of 7 parts done"]


def test_start_copies_the_stubs_and_leaves_what_is_there(tmp_path, capsys):
    mine = tmp_path / "new" / "mine"
    assert main(["start", str(mine)]) == 0
    assert sorted(path.name for path in mine.iterdir()) == sorted(f"{file}.py" for file in FILES.values())
    (mine / "a_softmax.py").write_text("my work")
    main(["start", str(mine)])
    assert (mine / "a_softmax.py").read_text() == "my work"
    assert "a_softmax.py: already there, and kept" in capsys.readouterr().out


@pytest.mark.parametrize("part", LETTERS)
def test_three_hints_each_name_the_next(part, capsys):
    for n in (1, 2, 3):
        assert main(["hint", part, str(n)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"**{part}, hint {n}: ")
        assert (f"hint {part} {n + 1}" in printed) == (n < 3)
        assert max(map(len, printed.splitlines())) <= 110


@pytest.mark.parametrize("command, message", [
    (["check", "g"], "there is no part 'g'. Possible: a, b, c, d, e, f, together."),
    (["check", "--folder", "nowhere"], "no folder nowhere. `python -m tutorials.build start nowhere`"),
    (["hint", "a", "4"], "there is no hint 4 for part a."),
    (["hint", "x", "1"], "there is no part 'x'."),
    (["hint", "a", "one"], "invalid int value"),
    ([], "COMMAND"),
])
def test_odd_input_gives_one_line(command, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_missing_file_and_missing_model_give_one_line(tmp_path, reference, monkeypatch, capsys):
    assert "there is no b_head.py in " in verdict(tmp_path, "b", reference)
    monkeypatch.chdir(tmp_path)
    for name in ("MINISTEER_WEIGHTS", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(SystemExit):
        main(["check", "a"])
    assert "ministeer fetch smollm2-135m" in capsys.readouterr().err


def test_files_of_the_student_import_no_helper():
    for path in [*(HERE / f"{file}.py" for file in FILES.values()), *SOLUTIONS.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert name.split(".")[0] in ALLOWED | set(FILES.values()) | {"sys"}
