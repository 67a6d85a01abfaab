"""GGUF files that are damaged, hostile or of another model: each fault has a sentence, nothing is written."""

import os
import struct

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from test_fetch import write_gguf

from ministeer import load
from ministeer.checkpoints import convert
from ministeer.checkpoints.convert import convert_gguf

U32, U64, F32 = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<f")
make_pipe = getattr(os, "mkfifo", os.mkdir)     # Windows has none
STRING, ARRAY = 8, 9        # GGUF's types of a value


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """The bytes of a GGUF file that can be converted. Its matrices have 8 bits, its norms are in float32."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, "Q8_0")
    return path.read_bytes()


def check_refused(folder, says, content=None):
    """Convert folder/model.gguf, which gets `content`: it must be refused, and nothing be written."""
    path, out = folder / "model.gguf", folder / "out"
    if content is not None:
        path.write_bytes(content)
    out.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=says) as error:
        convert_gguf(path, out)
    text = str(error.value)
    assert path.name in text and text.isprintable() and len(text) < 400
    assert list(out.iterdir()) == []


def with_norm(folder, intact, number):
    """Write folder/model.gguf, intact but for the first weight of its final norm."""
    path = folder / "model.gguf"
    path.write_bytes(intact)
    (place,) = (t.data_offset for t in gguf.GGUFReader(path).tensors if t.name == "output_norm.weight")
    path.write_bytes(intact[:place] + F32.pack(number) + intact[place + 4:])
    return path


def header(n_tensors, n_keys, rest):
    return b"GGUF" + U32.pack(3) + U64.pack(n_tensors) + U64.pack(n_keys) + rest


def string(text):
    return U64.pack(len(text)) + text


@pytest.mark.parametrize(("changes", "says"), [
    ({"surplus": ["blk.0.attn_q.bias"]}, "has a tensor 'blk.0.attn_q.bias', which no Llama has"),
    ({"surplus": ["rope_freqs.weight"]}, "has a tensor 'rope_freqs.weight', which no Llama has"),
    ({"surplus": ["blk.0.evil/../../x.weight"]}, "has a tensor 'blk.0.evil/../../x.weight'"),
    ({"surplus": ["x\x1b[31m" * 9]}, r"has a tensor 'x\\x1b\[31m"),
    ({"surplus": ["blk.04.attn_norm.weight"]}, r"layers.04.input_layernorm.weight is \(4,\).* it is missing"),
    ({"general__architecture": "qwen2"}, "says 'qwen2', 'gpt2', 'smollm'; only a Llama with SmolLM's byte-l"),
    ({"tokenizer__ggml__model": "llama"}, "says 'llama', 'llama', 'smollm'; only"),
    ({"tokenizer__ggml__pre": "llama-bpe"}, "says 'llama', 'gpt2', 'llama-bpe'; only"),
    ({"tokenizer__ggml__pre": "x\n" * 999}, r"says 'llama', 'gpt2', 'x\\nx\\n"),
    ({"llama__rope__scaling__type": "yarn"}, "stretches its rotary embedding"),
    ({"llama__rope__dimension_count": 8}, "or rotates only part of a head"),
    *(({"drop": [key]}, f"does not say its {key}") for key in (
        "llama.block_count", "llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")),
    ({"llama__attention__head_count": 5}, "hidden_size 64 is not a multiple of 5 heads"),
    ({"llama__attention__head_count": 0}, "num_attention_heads is 0; it must be"),
    ({"llama__attention__head_count": [4, 4, 4, 4]}, r"num_attention_heads is \[4, 4, 4, 4\]; it must be"),
    ({"llama__attention__head_count": 64}, "a head is 1 wide"),
    ({"llama__attention__head_count_kv": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
    ({"llama__attention__head_count_kv": 4}, r"k_proj.weight is \(32, 64\); in a .* is \(64, 64\)"),
    ({"llama__feed_forward_length": 63}, r"down_proj.weight is \(64, 64\); in a Llama .* is \(64, 63\)"),
    ({"llama__block_count": 3}, r"layers.3.* is \(64,\); in a Llama of its sizes it is missing"),
    ({"llama__block_count": 5}, r"layers.4.* is missing; in a Llama of its sizes it is \(64,\)"),
    ({"llama__block_count": 10**9}, "num_hidden_layers is 1000000000"),
    ({"llama__context_length": "long"}, "max_position_embeddings is 'long'"),
    ({"llama__vocab_size": 100}, "tokens, but llama.vocab_size is 100"),
    ({"llama__vocab_size": 400}, r"embed_tokens.weight is \(384, 64\)"),
    *(({"llama__attention__layer_norm_rms_epsilon": eps}, "rms_norm_eps is") for eps in
      ("small", [1e-5], -1.0, float("nan"))),
    ({"llama__rope__freq_base": float("inf")}, "rope_theta is inf"),
    ({"tokenizer__ggml__bos_token_id": 9999}, "special token 9999 is outside the vocabulary"),
    ({"tokenizer__ggml__bos_token_id": 383}, "special token 383 is not in the tokenizer"),
    ({"tokenizer__ggml__bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
    ({"tokenizer__ggml__eos_token_id": 383}, "special token 383 is not in the tokenizer"),
    ({"tokenizer__ggml__tokens": ["a", "b", "a"], "tokenizer__ggml__token_type": [3, 3, 1]},
     "3 types for 3 tokens, of which 2 are different"),
    ({"tokenizer__ggml__tokens": [1, 2]}, "tokenizer.ggml.tokens is not a list of str"),
    ({"tokenizer__ggml__tokens": "abc"}, "tokenizer.ggml.tokens is not a list of str"),
    ({"tokenizer__ggml__token_type": [3, 3]}, r"has 2 types for \d+ tokens"),
    ({"tokenizer__ggml__token_type": ["3"]}, "tokenizer.ggml.token_type is not a list of int"),
    ({"tokenizer__ggml__merges": [5]}, "tokenizer.ggml.merges is not a list of str"),
    ({"tokenizer__ggml__merges": ["ab"]}, "merges has an entry that is not two tokens with a space"),
    ({"tokenizer__ggml__merges": ["a b c"]}, "merges has an entry that is not two tokens with a space"),
    ({"tokenizer__ggml__merges": ["東 京"]}, "Token `東` out of vocabulary"),
    ({"tokenizer__chat_template": 5}, "its chat template is 5, not text"),
], ids=lambda x: ascii(x)[:60])
def test_refuses_a_gguf_that_would_not_be_the_same_model(tmp_path, changes, says):
    write_gguf(tmp_path / "model.gguf", **changes)
    check_refused(tmp_path, f"model.gguf cannot be converted: .*{says}")


@pytest.mark.parametrize("content", [
    header(2**60, 0, b""), header(0, 2**60, b""), header(2**64 - 1, 2**64 - 1, b""),
    header(0, 1, U64.pack(2**60) + b"key"),
    header(0, 1, string(b"key") + U32.pack(STRING) + U64.pack(2**60) + b"value"),
    *(header(0, 1, string(b"key") + U32.pack(ARRAY) + U32.pack(kind) + U64.pack(2**60) + b"\1" * 800)
      for kind in range(13)),
    header(1, 0, string(b"w") + U32.pack(2**32 - 1) + U64.pack(1)),
    header(1, 0, string(b"w") + U32.pack(1) + U64.pack(2**60) + U32.pack(0) + U64.pack(0)),
    header(1, 0, string(b"w") + U32.pack(2) + U64.pack(2**32) * 2 + U32.pack(0) + U64.pack(0)),
    header(1, 0, string(b"w") + U32.pack(1) + U64.pack(1) + U32.pack(0) + U64.pack(2**63)),
    header(0, 1, string(b"key") + U32.pack(ARRAY) + (U32.pack(ARRAY) + U64.pack(1)) * 5000),    # list in list
    header(0, 2, (string(b"key") + U32.pack(4) + U32.pack(0)) * 2),
    header(0, 1, string(b"\xff") + U32.pack(4) + U32.pack(0)),
    header(0, 1, string(b"key") + U32.pack(99)),
    header(0, 1, string(b"general.alignment") + U32.pack(4) + U32.pack(0)),
    header(0, 0, b""), b"GGUF" + U32.pack(99), b"GGUF", b"\x80\x02pickle", b"\0" * 100, b"",
], ids=lambda content: ascii(content[16:60]))
def test_a_header_announces_no_more_than_the_file_has(tmp_path, content):
    check_refused(tmp_path, "model.gguf cannot be converted: ", content)


def test_a_header_has_a_most_of_values(tmp_path, intact, monkeypatch):
    monkeypatch.setattr(convert, "MOST_VALUES", 100)
    check_refused(tmp_path, "its header holds more than 100 values", intact)


def test_a_file_cut_anywhere_is_refused(tmp_path, intact):
    n_header = intact.index(U32.pack(gguf.GGMLQuantizationType.Q8_0) + U64.pack(0)) + 2000
    for end in [*range(0, n_header, 101), n_header, len(intact) - 1]:
        check_refused(tmp_path, "model.gguf cannot be converted: ", intact[:end])


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_damaged_byte_gives_a_sentence_or_a_model_that_loads(tmp_path_factory, intact, data):
    folder = tmp_path_factory.mktemp("damaged")
    damaged = bytearray(intact)
    for place in data.draw(st.lists(st.integers(0, 9500), min_size=1, max_size=3)):
        damaged[place] = data.draw(st.integers(0, 255))
    (folder / "model.gguf").write_bytes(damaged)
    refusal = None
    try:
        convert_gguf(folder / "model.gguf", folder)
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        load(folder)
    else:
        assert refusal.startswith("model.gguf cannot be converted: ") and refusal.isprintable()
        assert [path.name for path in folder.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("number", [65_505.0, -1e30, float("inf"), float("-inf"), float("nan")])
def test_refuses_numbers_that_float16_cannot_hold(tmp_path, intact, number):
    with_norm(tmp_path, intact, number)
    check_refused(tmp_path, r"output_norm.weight holds NaN or numbers beyond 65,504")


def test_takes_the_largest_number_of_float16(tmp_path, intact):
    convert_gguf(with_norm(tmp_path, intact, -65_504), tmp_path)
    model, _ = load(tmp_path)
    assert model.norm.weight[0] == -65_504


def test_refuses_a_tensor_that_is_there_twice(tmp_path, intact):
    twice = intact.replace(b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight")
    check_refused(tmp_path, "duplicated tensor with name blk.0.attn_norm.weight", twice)


@pytest.mark.parametrize(("kind", "says"), [
    (gguf.GGMLQuantizationType.I32, "I32 is not yet implemented"), (999, "999.* is not a valid")])
def test_refuses_a_tensor_of_a_type_that_is_not_known(tmp_path, intact, kind, says):
    place = intact.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8      # one dimension
    check_refused(tmp_path, says, intact[:place] + U32.pack(kind) + intact[place + 4:])


def test_refuses_the_byte_order_of_other_machines(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    check_refused(tmp_path, "byte order of this machine")


@pytest.mark.parametrize("make", [os.mkdir, make_pipe, lambda path: None], ids=["folder", "pipe", "nothing"])
def test_refuses_what_is_not_a_file_without_opening_it(tmp_path, make):
    make(tmp_path / "model.gguf")
    check_refused(tmp_path, "is not a file")


def test_a_full_disk_leaves_no_part_of_a_model(tmp_path, intact, monkeypatch):
    def save_file(weights, path, metadata):
        path.write_bytes(b"the first half")
        raise SafetensorError("No space left on device")
    monkeypatch.setattr(convert, "save_file", save_file)
    (tmp_path / "model.gguf").write_bytes(intact)
    with pytest.raises(OSError, match=r"model.safetensors could not be written: No space left on device"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
