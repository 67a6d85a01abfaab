"""Tokenizer: one BOS and no second, text that survives, sandboxed templates, the tokens of transformers."""

import io
import json
import os
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from conftest import N_VOCAB, TEXT, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ministeer.checkpoints import template as limits
from ministeer.checkpoints.config import parse_config, read_config
from ministeer.checkpoints.tokenizer import Tokenizer, faults_named

CONFIG = parse_config({"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 32, "n_positions": 192,
                       "vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 1})
make_pipe = getattr(os, "mkfifo", os.mkdir)     # Windows has none
AWKWARD = [
    "", " ", "   leading", "trailing  ", "a  5", "x\n\n5", "1234567890 3.14 2nd", "don't I'll THEY'RE 'tis",
    "\t\ttabs\r\nlines\n\n\n end", "\x00\x01\x1b[31m\x7f\x85", "\u200b\ufeff\u2028\u00a0\u3000",
    "\N{REPLACEMENT CHARACTER}", "naïve café e\u0301", "日本語のテキスト 中文 한국어",
    "😀 👩\u200d👩\u200d👧 🏳\ufe0f 🇪🇺", "١٢٣ ⅷ ²", "Ġ▁ĊÿĀ", "<|endoftext|>",
    "a<|im_start|>b<|im_end|> c <|endoftext|>", "<|endoftext|><|endoftext|> twice", "<|im_start", "<s>",
    "word " * 2000, "a" * 10_000, " " * 1000, "```python\n    x = {'a': [1, 2]}\n```",
    "http://example.org/?q=a%20b#c",
]
awkward = pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text[:12]))
anything = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(AWKWARD)), max_size=4).map("".join)
without_deadline = settings(deadline=None, max_examples=150)


def llama_2(*letters):
    """As Llama 2's tokenizer.json: BPE over the whole text, ▁ for a space with one in front, and bytes."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXT * 3, trainers.BpeTrainer(vocab_size=100, show_progress=False))
    bpe = json.loads(trained.to_str())["model"]
    special, learned = ["<unk>", "<s>", "</s>"], sorted(bpe["vocab"], key=bpe["vocab"].get)
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *learned, *letters]
    tokenizer = tokenizers.Tokenizer(models.BPE(
        {token: i for i, token in enumerate(tokens)}, [tuple(merge) for merge in bpe["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(special)
    return tokenizer


TINY, LLAMA_2 = Tokenizer(tiny_tokenizer(), 0, (1,)), Tokenizer(llama_2(), 1, (2,))
both = pytest.mark.parametrize("tokenizer", [TINY, LLAMA_2], ids=["byte-level", "llama-2"])


def bos_of(tokenizer):
    return tokenizer.backend.id_to_token(tokenizer.bos_id)


@pytest.fixture(scope="module")
def smol(smollm2):
    """The tokenizer of the default model, without the model."""
    return Tokenizer.load(smollm2, read_config(smollm2 / "config.json"))


@pytest.fixture(scope="module")
def smol_hub(smollm2):
    # Trap: if tokenizer_config.json named the class GPT2Tokenizer, transformers would split as GPT-2 does and
    # not as the file says, which also splits before each digit ("a  5" would come out different).
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def folder(tmp_path):
    """A folder that holds a tokenizer.json."""
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


# BOS

@pytest.mark.parametrize("times", [0, 1, 2, 5])
@both
def test_there_is_one_bos_in_front_however_many_the_text_has(tokenizer, times):
    written = bos_of(tokenizer) * times
    ids = tokenizer.encode(written + TEXT[1])
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids[1:]).strip() == TEXT[1]
    assert tokenizer.encode(written + TEXT[1], bos=False) == [tokenizer.bos_id] * times + ids[1:]
    assert tokenizer.encode(written) == [tokenizer.bos_id]
    assert tokenizer.encode(written, bos=False) == [tokenizer.bos_id] * times


@both
def test_ignores_that_a_file_adds_a_bos_of_its_own(tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    bos = bos_of(tokenizer)
    special = [(bos, tokenizer.bos_id)]
    backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=special)
    adding = Tokenizer(backend, tokenizer.bos_id)
    assert backend.encode(TEXT[1]).ids == adding.encode(TEXT[1]) == tokenizer.encode(TEXT[1])
    assert adding.encode(TEXT[1], bos=False) == tokenizer.encode(TEXT[1], bos=False)


@both
def test_a_bos_inside_a_text_stays(tokenizer):
    bos = bos_of(tokenizer)
    ids = tokenizer.encode(f"one{bos}{bos}two{bos}")
    assert ids.count(tokenizer.bos_id) == 4 and ids[0] == ids[-1] == tokenizer.bos_id
    assert tokenizer.decode(ids, special=True).count(bos) == 4
    assert bos not in tokenizer.decode(ids)


@pytest.mark.parametrize(("first", "bos", "written", "eos"), [
    ("<|endoftext|>", "<|im_start|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),   # a document
    ("<|endoftext|>", "<|im_end|>", "<|im_end|>", ["<|im_end|>"]),      # another BOS is taken at its word
    ("<s>", "<|im_start|>", "<|im_start|>", ["<|im_end|>"]),            # there is no <|endoftext|>
])
def test_smollm2s_bos_is_what_stood_before_every_document(first, bos, written, eos):
    backend = tiny_tokenizer(bos=first)
    backend.add_special_tokens(["<|im_start|>"])
    tokenizer = Tokenizer(backend, backend.token_to_id(bos), (1,))
    assert (bos_of(tokenizer), [backend.id_to_token(i) for i in tokenizer.eos_ids]) == (written, eos)


def test_the_default_models_bos(smol, smollm2):
    assert read_config(smollm2 / "config.json").bos_id == smol.backend.token_to_id("<|im_start|>")
    assert bos_of(smol) == "<|endoftext|>"
    assert [smol.backend.id_to_token(i) for i in smol.eos_ids] == ["<|im_end|>", "<|endoftext|>"]


# Text to ids and back

@awkward
def test_awkward_text_survives(text):
    assert TINY.decode(TINY.encode(text, bos=False), special=True) == text


@without_deadline
@given(anything)
def test_any_text_survives_byte_level(text):
    assert TINY.decode(TINY.encode(text, bos=False), special=True) == text


@without_deadline
@given(st.text())
def test_any_text_survives_llama_2(text):
    text = text.replace("▁", "")                # the one letter that stands for another
    assert LLAMA_2.decode(LLAMA_2.encode(text)) == text


@without_deadline
@given(st.text(st.characters(codec="ascii")))
def test_pieces_joined_are_the_text(text):
    ids = TINY.encode(text)
    pieces = TINY.pieces(ids)
    assert len(pieces) == len(ids) and pieces[0] == "<|endoftext|>" and "".join(pieces[1:]) == text
    ids = LLAMA_2.encode(text, bos=False)
    pieces = LLAMA_2.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == (" " + text if text else "")      # its own space


@both
def test_pieces_of_parts_of_a_character(tokenizer):
    ids = tokenizer.encode("I😀", bos=False)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids) and pieces[-4:] == ["\N{REPLACEMENT CHARACTER}"] * 4
    assert tokenizer.decode(ids) == "I😀"
    assert tokenizer.pieces([]) == []


@both
def test_spaces_in_front_count(tokenizer):
    texts = ["love", " love", "  love"]
    rows = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(row) for row in rows] == texts
    assert len(set(map(tuple, rows))) == 3
    assert [tokenizer.decode(torch.tensor(row)) for row in rows] == texts       # tensors too


def test_a_piece_keeps_its_space():
    assert TINY.pieces(TINY.encode("I love you", bos=False)) == ["I", " love", " you"]
    ids = [LLAMA_2.backend.token_to_id(token) for token in ("▁because", "<s>", "b", "<0x0A>")]
    assert LLAMA_2.pieces(ids) == [" because", "<s>", "b", "\n"]


@pytest.mark.parametrize(("backend", "space"), [
    (TINY.backend, "Ġ"), (LLAMA_2.backend, "▁"),
    (llama_2("Ġ"), "▁"),                        # a letter among the thousands of a SentencePiece vocabulary
    (tokenizers.Tokenizer(models.BPE({"<s>": 0, "a": 1, " ": 2}, [])), " "),
    (tokenizers.Tokenizer(models.BPE({"<s>": 0, "a": 1}, [])), None),
], ids=["byte-level", "llama-2", "maltese", "plain", "none"])
def test_the_space_that_pads(backend, space):
    tokenizer = Tokenizer(backend, 0)
    if space:
        assert backend.id_to_token(tokenizer.space_id) == space
    else:
        with pytest.raises(ValueError, match="no token for a single space"):
            _ = tokenizer.space_id
    assert TINY.encode(" ") == [0, TINY.space_id]


def test_forgets_what_a_training_run_left_in_the_file(folder):
    backend = tiny_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.model.dropout = 0.5
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder, CONFIG)
    for text in ("I", *TEXT):
        assert tokenizer.encode(text) == TINY.encode(text)
    assert tokenizer.fingerprint == TINY.fingerprint


@pytest.mark.parametrize("text", [None, b"b", ["text"], 5, "\ud800", "a\udcff", "\ud83d\ude00"], ids=ascii)
def test_rejects_what_is_not_text(text):
    says = "surrogate" if isinstance(text, str) else f"must be a string; given: {type(text).__name__}"
    with pytest.raises(ValueError, match=says):
        TINY.encode(text)


@pytest.mark.parametrize(("ids", "given"), [
    ([-1], "-1"), ([5, 2**32], "4294967296"), ([10**20], "10{20}"), ([-10**999], "-1000"), ([0.5], "0.5"),
    ([1.0], "1.0"), (["a"], "'a'"), ("12", "'1'"), ([None], "None"), ([True], "True"), ([[1]], r"\[1\]"),
    (5, "5"), (None, "None"), (["\x1b[31m" * 99], r"'\\x1b\[31m"), (torch.tensor(3), r"tensor\(3\)"),
    (torch.tensor([0.5]), r"tensor\(0.5"), (torch.tensor([[1, 2]]), r"tensor\(\[1, 2"), (np.ones(2), "1.0"),
], ids=lambda x: ascii(x)[:40])
@pytest.mark.parametrize("method", ["decode", "pieces"])
def test_rejects_what_is_not_token_numbers(method, ids, given):
    with pytest.raises(ValueError, match=rf"go from 0 to {TINY.n_vocab - 1}; given: .*{given}") as error:
        getattr(TINY, method)(ids)
    assert str(error.value).isprintable() and len(str(error.value)) < 200


@both
def test_a_row_of_the_embedding_that_no_token_has_is_no_text(tokenizer):
    beyond = [tokenizer.n_vocab, 2**32 - 1]
    ids = tokenizer.encode(TEXT[1])
    assert tokenizer.decode([*ids, *beyond]) == tokenizer.decode(ids) == tokenizer.decode(np.array(ids))
    assert tokenizer.pieces(beyond) == ["", ""]


@pytest.mark.parametrize("change", [
    lambda backend: backend.add_tokens(["new"]),
    lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
    {"bos_id": 2}, {"eos_ids": ()}, {"eos_ids": (1, 2)}, {"chat_template": "{{ messages }}"},
], ids=["vocabulary", "normaliser", "bos", "no eos", "two eos", "template"])
def test_the_fingerprint_is_of_the_content(folder, change):
    backend, arguments = tiny_tokenizer(), {"bos_id": 0, "eos_ids": (1,)}
    if callable(change):
        change(backend)
    else:
        arguments |= change
    prints = [Tokenizer(backend, **arguments).fingerprint for _ in range(2)]
    assert prints[0] == prints[1] != TINY.fingerprint
    assert Tokenizer.load(folder, CONFIG).fingerprint == TINY.fingerprint
    assert len(bytes.fromhex(TINY.fingerprint)) == 32


# The same as transformers

def same_as(tokenizer, hub, text):
    ids = tokenizer.encode(text, bos=False)
    assert ids == hub.encode(text, add_special_tokens=False)
    for special in (False, True):
        theirs = hub.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, special) == theirs


@awkward
def test_the_default_models_tokens_are_those_of_transformers(smol, smol_hub, text):
    same_as(smol, smol_hub, text)


def test_any_tokens_are_those_of_transformers(smol, smol_hub):
    hubs = [(t, PreTrainedTokenizerFast(tokenizer_object=t.backend)) for t in (TINY, LLAMA_2)]
    hubs.append((smol, smol_hub))

    @without_deadline
    @given(anything)
    def check(text):
        for tokenizer, hub in hubs:
            same_as(tokenizer, hub, text)

    check()


# Chat

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hi <|im_end|>\n"}],
    [{"role": "user", "content": "“日本” & <b>'x'</b>"}, {"role": "assistant", "content": "2"},
     {"role": "user", "content": "3"}],
]
LLAMA_3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\n\n' }}
{%- endif %}"""
MANY_PARTS = """{% if tools is not none or documents is not none %}{{ raise_exception('tools') }}{% endif %}
{% for message in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {% set name = message.role | upper %}
  {{ name }}: {{ message | tojson }}{{ eos_token }}
{% endfor %}
{{ 'ASSISTANT:' if add_generation_prompt }}"""


def with_template(template):
    return Tokenizer(tiny_tokenizer(), 0, (1,), template)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("template", [None, LLAMA_3, MANY_PARTS], ids=["default model", "llama-3", "parts"])
def test_a_chat_is_that_of_transformers(smol, smol_hub, template, messages, add_generation_prompt):
    ours, hub = smol, smol_hub
    if template:
        ours = with_template(template)
        hub = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), chat_template=template,
                                      bos_token="<|endoftext|>", eos_token="<|im_end|>")
    theirs = hub.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ours.chat(messages, add_generation_prompt) == theirs.removeprefix("<|endoftext|>")


def test_a_template_with_bos_gives_no_second_one():
    tokenizer = with_template(LLAMA_3)
    text = tokenizer.chat(CHATS[0])
    assert text == "<|start|>user<|end|>\n\nHi<|eot|><|start|>assistant<|end|>\n\n"
    assert tokenizer.encode(text).count(0) == tokenizer.encode("<|endoftext|>" + text).count(0) == 1
    assert text == tokenizer.chat(CHATS[0], True) != tokenizer.chat(CHATS[0], False)


CONFIG_FILE, JINJA = "tokenizer_config.json", "chat_template.jinja"
TOOLS = {"name": "tools", "template": "no"}


@pytest.mark.parametrize(("files", "template"), [
    ({}, None), ({CONFIG_FILE: {}}, None), ({CONFIG_FILE: {"chat_template": "text"}}, "text"),
    ({CONFIG_FILE: {"chat_template": [TOOLS, {"name": "default", "template": "list"}]}}, "list"),
    ({CONFIG_FILE: {"chat_template": [TOOLS]}}, None),
    ({CONFIG_FILE: {"chat_template": "text"}, JINJA: "“é”\n"}, "“é”\n"),      # as in transformers
])
def test_where_a_template_is_found(folder, files, template):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    assert Tokenizer.load(folder, CONFIG).chat_template == template


@pytest.mark.parametrize("name, content", [
    (JINJA, b"\xff"), *((CONFIG_FILE, content) for content in (
        b"{", b"[]", b"\xff", b'{"chat_template": 5}', b'{"chat_template": {"default": "x"}}',
        b'{"chat_template": ["x"]}', b'{"chat_template": [{"name": "default"}]}', b"[" * 100_000)),
], ids=lambda x: ascii(x[:40]))
def test_rejects_a_template_that_cannot_be_read(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        Tokenizer.load(folder, CONFIG)


def test_a_base_model_has_no_chat():
    with pytest.raises(ValueError, match="no chat template"):
        TINY.chat(CHATS[0])


LOOP = "{% for i in range(99999) %}"
GROW = "{% set n = namespace(x=['a']) %}{% for i in range(99) %}{% set n.x = "
REFUSALS = [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ raise_exception('\x1b[31m\n\nall is well') }}", r"·\[31m all is well"),
    ("{{ raise_exception('a' * 1000) }}", "a{150}"),
    (LOOP * 2 + "{% endfor %}" * 2, "did not end within 1 second"),
    ("{% macro f() %}" + LOOP + "{% endfor %}{{ f() }}{% endmacro %}{{ f() }}", "1 second|recursion"),
    *((GROW + text, "MemoryError|1 second") for text in (
        "n.x + n.x %}{% endfor %}", "[n.x] * 9 %}{% endfor %}{{ n.x }}")),
    *((f"{{{{ {text} }}}}", "MemoryError|1 second|characters") for text in (
        "'a' * 10**9", "'a' * 10**12", "'a'.zfill(10**10)", "'%1000000000d' % 5", "'a' | center(10**10)",
        "'{:>10000000000}'.format(1)", "9 ** (9 ** 9)", "range(99999) | join('a' * 99999)",
        "lipsum(10**9)", "messages | tojson(indent=10**10)", "'a' * (10**6 + 1)")),
    ("a" * 1_000_001, "it has 1,000,001 characters; at most"),
    ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "recursion"),
    ("{{ messages | tojson(default=cycler) }}", "unexpected keyword argument 'default'"),
    ("{{ 10**5000 }}", "4300 digits"),
]


@pytest.mark.parametrize(("template", "says"), REFUSALS, ids=lambda x: ascii(x[:40]))
def test_says_why_a_template_refuses(template, says, monkeypatch):
    # The time counts the start of a process, which takes seconds on a busy machine.
    monkeypatch.setattr(limits, "SECONDS", 1 if "1 second" in says else 60)
    with pytest.raises(ValueError, match=f"the chat template refuses these messages: .*({says})") as error:
        with_template(template).chat(CHATS[0])
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_the_process_of_a_template_prints_one_line_of_json(monkeypatch, capsys):
    for template, answer in (("{{ 'é' * 9 }}", ["é" * 9, None]), ("{{ f() }}", [None, "'f' is undefined"])):
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps([["/packages"], template, {}])))
        monkeypatch.setattr(limits, "MEMORY", -1)       # without a limit, which would stay in this process
        monkeypatch.setattr("sys.path", [])
        limits.main()
        assert json.loads(capsys.readouterr().out) == answer
    crash = subprocess.CompletedProcess([], -11, "", "")
    monkeypatch.setattr(limits.subprocess, "run", lambda *a, **how: crash)
    with pytest.raises(ValueError, match=r"messages: its process ended early \(exit -11\)"):
        with_template("x").chat(CHATS[0])


HOSTILE = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ raise_exception.__globals__['json'].codecs.open('ran', 'w') }}",
    "{{ lipsum.__globals__['os'].system('touch ran') }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__[1].__subclasses__}'.format(messages)() }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
    "{{ messages[0].update(content='other') }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]
BROKEN = ["{% if %}", "{{ unclosed", "{% endfor %}", "{{ 'x' | no_such_filter }}", "{{ no_such_function() }}",
          "{{ messages[0].no.such }}", "{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ 'x'.index('y') }}"]


@pytest.mark.parametrize("template", HOSTILE + BROKEN)
def test_refuses_hostile_and_broken_templates(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="the chat template refuses these messages: "):
        with_template(template).chat(messages)
    assert list(tmp_path.iterdir()) == []
    assert messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("messages", [
    None, 5, "Hi", b"Hi", [None], ["Hi"], [{}], [{"role": "user"}], [{"role": "user", "content": None}],
], ids=ascii)
def test_rejects_what_is_not_messages(messages):
    with pytest.raises(ValueError, match="refuses these messages"):
        with_template("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}").chat(messages)


# Files that do not fit; test_weights.py has damaged ones

@pytest.mark.parametrize(("changes", "says"), [
    ({"bos_id": None}, "names no bos_token_id"),
    ({"n_vocab": TINY.n_vocab}, None),
    ({"n_vocab": TINY.n_vocab - 1}, "another model's tokenizer"),
    ({"bos_id": N_VOCAB - 1}, "special token 383 is not in the tokenizer"),     # behind the file's last token
    ({"eos_ids": (1, N_VOCAB - 1)}, "special token 383 is not in the tokenizer"),
])
def test_rejects_a_tokenizer_that_does_not_fit_the_config(folder, changes, says):
    if says is None:
        Tokenizer.load(folder, replace(CONFIG, **changes))
    else:
        with pytest.raises(ValueError, match=says):
            Tokenizer.load(folder, replace(CONFIG, **changes))


TOKENS = {"<|endoftext|>": 0, "<|im_end|>": 1, "a": 2}
TOO_LONG = "can be read: its steps can make a text 65,536 times as long"


def step(kind, **settings):
    return {"type": kind, **settings}


def split(pattern):
    return step("Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)


@pytest.mark.parametrize(("part", "value", "says"), [
    ("model", step("WordLevel", vocab=TOKENS, unk_token="no"), "encode this text: .*Missing .UNK. token"),
    ("model", step("Unigram", vocab=[*TOKENS.items()], unk_id=None), "encode this text: .*`unk_id` is mis"),
    *(("model", model, "can be read: ") for model in (step("\x1b[31m"), {}, 5)),
    ("version", "\x1b[31m\n", r"can be read: .*·\[31m"), ("version", "v" * 10_000, "can be read: .*vvv"),
    ("pre_tokenizer", split("(a+)+$"), "encode this text: .*retry-limit-in-match"),
    ("pre_tokenizer", split("("), "can be read: .*Oniguruma error"),
    ("pre_tokenizer", step("FixedLength", length=0), "encode this text: chunk size must be non-zero"),
    ("pre_tokenizer", step("Sequence", pretokenizers=[step("Whitespace")] * 17), TOO_LONG),
    ("normalizer", step("Prepend", prepend=""), "encode this text: index out of bounds"),
    ("normalizer", step("Precompiled", precompiled_charsmap="AAAA"), "can be read: .*precompiled_charsmap"),
    ("normalizer", step("Precompiled", precompiled_charsmap="BAAAAP////94eA=="), "text: index out of bounds"),
    ("normalizer", step("Replace", pattern={"Regex": "(a|a)*$"}, content=""), "text: .*retry-limit-in-match"),
    ("normalizer", step("Replace", pattern={"String": "a"}, content="a" * 70_000), TOO_LONG),
    ("normalizer", step("Sequence", normalizers=[step("ByteLevel")] * 17), TOO_LONG),
    ("decoder", step("Strip", content="a", start=0, stop=2**40), "decode these ids: index out of bounds"),
    ("decoder", step("Sequence", decoders=[step("Fuse")] * 17), TOO_LONG),
], ids=lambda x: ascii(x)[:50])
def test_a_fault_of_the_file_is_a_sentence_and_no_panic(folder, part, value, says):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: value}))

    def use():
        tokenizer = Tokenizer.load(folder, CONFIG)
        tokenizer.decode(tokenizer.encode("a" * 60 + " b"))

    with pytest.raises(ValueError, match=says) as error:
        use()
    reason = str(error.value).replace(str(folder), "")
    assert reason.isprintable() and len(reason) < 300


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_ctrl_c_is_not_a_fault(signal):
    with pytest.raises(signal), faults_named("x"):
        raise signal


@pytest.mark.parametrize("make", [os.mkdir, make_pipe, os.unlink], ids=["folder", "pipe", "nothing"])
@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG_FILE, JINJA])
def test_what_is_not_a_file_is_not_opened(folder, name, make):
    path = folder / name
    path.unlink() if name == "tokenizer.json" else None
    if make is not os.unlink:
        make(path)
    if name == "tokenizer.json":
        with pytest.raises(FileNotFoundError, match=r"no tokenizer.json in"):
            Tokenizer.load(folder, CONFIG)
    else:
        assert Tokenizer.load(folder, CONFIG).chat_template is None


@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG_FILE, JINJA])
def test_rejects_a_file_of_gigabytes_without_reading_it(folder, name):
    with open(folder / name, "ab") as file:
        file.truncate(2**33)            # it takes no room on the disk
    with pytest.raises(ValueError, match=f"{name} .* 8,589,934,592 bytes; at most 100,000,000 are read"):
        Tokenizer.load(folder, CONFIG)


def test_reads_a_folder_whose_name_is_not_utf_8(folder):
    latin_1 = os.fsdecode(os.fsencode(folder) + b"/caf\xe9")
    try:
        os.mkdir(latin_1)
    except OSError:
        pytest.skip("this system has no such names")
    os.rename(folder / "tokenizer.json", os.path.join(latin_1, "tokenizer.json"))
    assert Tokenizer.load(latin_1, CONFIG).fingerprint == TINY.fingerprint
