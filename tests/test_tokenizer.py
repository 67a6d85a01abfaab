"""Tokenizer: one BOS and no second, text that survives, sandboxed templates, the tokens of transformers."""

import json
from dataclasses import replace

import pytest
import tokenizers
import torch
from conftest import N_VOCAB, TEXT, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ministeer.checkpoints.config import parse_config, read_config
from ministeer.checkpoints.tokenizer import Tokenizer

CONFIG = parse_config({"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 32, "n_positions": 192,
                       "vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 1})
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


def test_forgets_the_lengths_that_a_training_run_left_in_the_file(tmp_path):
    backend = tiny_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path, CONFIG)
    for text in ("I", TEXT[0]):
        assert tokenizer.encode(text) == TINY.encode(text)


@pytest.mark.parametrize("text", [None, b"b", ["text"], 5, "\ud800", "a\udcff", "\ud83d\ude00"], ids=ascii)
def test_rejects_what_is_not_text(text):
    says = "surrogate" if isinstance(text, str) else f"must be a string; given: {type(text).__name__}"
    with pytest.raises(ValueError, match=says):
        TINY.encode(text)


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


def test_says_why_a_template_refuses():
    with pytest.raises(ValueError, match="no chat template"):
        TINY.chat(CHATS[0])
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
        with_template("{{ raise_exception('roles must alternate') }}").chat(CHATS[0])


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
