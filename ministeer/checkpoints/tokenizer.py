"""Tokenizer: text to token numbers and back, on the `tokenizers` library. The one place that writes a BOS.

Read next: steering.py. Turner et al. put a BOS before every prompt, GPT-2's included.
"""

import contextlib
import hashlib
import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers

from ..utils import one_line
from .config import Config, own_file
from .template import render

MAX_BYTES = 100_000_000     # of a file; the largest tokenizer.json of a known model has 35 million


@contextlib.contextmanager
def faults_named(what: str) -> Iterator[None]:
    """Turn whatever fails in the block into a ValueError of one line that begins with `what`.

    Trap: `tokenizers` raises bare Exceptions, and a panic of its Rust code is no Exception at all.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise           # Ctrl-C
        reason = one_line(str(error)[:400], 200) or type(error).__name__
        raise ValueError(f"{what}: {reason}") from None


class Tokenizer:
    """encode, decode, pieces, chat; bos_id, space_id, eos_ids, n_vocab, fingerprint.

    ids are lists of token numbers. A number that no token has gives no text: an embedding may have more rows
    than the tokenizer has tokens. Every method raises ValueError for what tokenizer.json cannot do.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos_id: int | None, eos_ids: Sequence[int] = (),
                 chat_template: str | None = None) -> None:
        """bos_id: the token that begins every text. eos_ids: those that end one."""
        if bos_id is None:
            raise ValueError("config.json names no bos_token_id, and every prompt must begin with one. "
                             "Add the id of the token that begins a document.")
        self.backend, self.eos_ids, self.chat_template = backend, tuple(eos_ids), chat_template
        backend.no_truncation()         # Trap: tokenizer.json may keep the length of a training run's texts
        backend.no_padding()
        if getattr(backend.model, "dropout", None):     # Trap: with it, merges are random
            backend.model.dropout = None
        self.n_vocab = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        for i in self._numbers([bos_id, *eos_ids]):
            if backend.id_to_token(i) is None:
                raise ValueError(f"special token {i} is not in the tokenizer of {self.n_vocab} tokens.")
        # Trap: SmolLM2-Instruct calls <|im_start|>, which opens a chat turn, its BOS. What stood before every
        # document of its training is <|endoftext|>; text is likelier after that (see weights/README.md).
        document = backend.token_to_id("<|endoftext|>")
        if document is not None and backend.id_to_token(bos_id) == "<|im_start|>":
            bos_id = document
            self.eos_ids += (document,)         # what begins a document also ends the one before
        self.bos_id = bos_id

    def _numbers(self, ids):
        """ids, an iterable of any kind of whole number -> a list of ints. Raises ValueError."""
        given, numbers = ids, []
        try:
            for given in ids:
                numbers.append(operator.index(given))
                if isinstance(given, bool) or not 0 <= numbers[-1] < 2**32:
                    raise TypeError
        except (TypeError, RuntimeError):       # torch raises RuntimeErrors
            raise ValueError("token numbers must be whole; those of this tokenizer go from 0 to "
                             f"{self.n_vocab - 1}; given: {given!r:.80}.") from None
        return numbers

    @classmethod
    def load(cls, folder: str | Path, config: Config) -> "Tokenizer":
        """From tokenizer.json in `folder`, BOS and EOS from `config`, and a chat template if there is one."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}. `transformers` writes one: "
                                    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder).")
        with faults_named(f"{path} is not a tokenizer that can be read"):
            # from_file would not take a path that is not UTF-8.
            backend = tokenizers.Tokenizer.from_buffer(_small(own_file(path)).read_bytes())
            _check_growth(backend)
        tokenizer = cls(backend, config.bos_id, config.eos_ids, _chat_template(Path(folder)))
        if tokenizer.n_vocab > config.n_vocab:
            raise ValueError(f"{path} has ids up to {tokenizer.n_vocab - 1}, but the embedding ends at "
                             f"{config.n_vocab - 1}. Is it another model's tokenizer?")
        return tokenizer

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """text -> ids, with exactly one BOS in front, or as the text stands if bos=False.

        Trap: the files of Llama 3 add a BOS and chat templates contain one; a doubled BOS is another prompt.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a string; given: {type(text).__name__}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the text holds half of a surrogate pair, which cannot be encoded.") from None
        with faults_named("tokenizer.json cannot encode this text"):
            ids = self.backend.encode(text, add_special_tokens=False).ids
        if not bos:
            return ids
        text_start = next((i for i, t in enumerate(ids) if t != self.bos_id), len(ids))
        return [self.bos_id, *ids[text_start:]]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """ids -> text. BOS, EOS and other special tokens are left out unless special=True."""
        numbers = self._numbers(ids)
        with faults_named("tokenizer.json cannot decode these ids"):
            return self.backend.decode(numbers, skip_special_tokens=not special)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """ids -> the text of each token alone, with its leading space; part of a character shows as �."""
        # Trap: SentencePiece drops the leading space of the first token, so another one goes before it.
        before = self.decode([self.space_id])
        return [self.decode([self.space_id, i], special=True)[len(before):] for i in self._numbers(ids)]

    @property
    def space_id(self) -> int:
        """The token that is one space: what pads the shorter prompt of a pair."""
        for piece in ("Ġ", "▁", " "):           # byte-level BPE, SentencePiece, plain
            i = self.backend.token_to_id(piece)
            # Trap: in a SentencePiece vocabulary "Ġ" is a letter of Maltese, so what it decodes to decides.
            if i is not None and not self.decode([i]).strip():
                return i
        raise ValueError("this tokenizer has no token for a single space, which pads the prompts of a pair.")

    @property
    def fingerprint(self) -> str:
        """A hex digest of tokenizer.json's content, bos_id, eos_ids and the chat template."""
        content = [self.backend.to_str(), self.bos_id, self.eos_ids, self.chat_template]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """[{"role": …, "content": …}, …] -> the text that the checkpoint's chat template makes of them.

        Its BOS, if it has one, is left out: `encode` and `generate` write it. The template comes with the
        checkpoint and runs in Jinja's sandbox, with the limits of template.py. Raises ValueError if there is
        none or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template: it is a base model. Give it plain text.")
        bos = self.backend.id_to_token(self.bos_id)
        eos = self.backend.id_to_token(self.eos_ids[0]) if self.eos_ids else ""
        with faults_named("the chat template refuses these messages"):
            text = render(self.chat_template, {
                "messages": messages, "add_generation_prompt": add_generation_prompt, "bos_token": bos,
                "eos_token": eos, "tools": None, "documents": None})
        return text.removeprefix(bos)


def _check_growth(backend):
    """Refuse steps that can make a text over 65,536 times as long: the library has no memory limit."""
    growth = 1

    def count(step):
        nonlocal growth
        if "type" in step:      # each step may double a text: ByteLevel writes a letter for each byte
            growth *= max(2, len(step.get("content") or step.get("prepend") or ""))

    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        if part:
            json.loads(part.__getstate__(), object_hook=count)
    if growth > 65_536:
        raise ValueError("its steps can make a text 65,536 times as long.")


def _small(path):
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes; at most {MAX_BYTES:,} are read.")
    return path


def _chat_template(folder):
    """The text of chat_template.jinja, else "chat_template" in tokenizer_config.json, else None."""
    path = folder / "chat_template.jinja"
    with faults_named(f"{path} does not hold a chat template that can be read"):
        if path.is_file():
            return _small(own_file(path)).read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    with faults_named(f"{path} does not hold a chat template that can be read"):
        template = json.loads(_small(own_file(path)).read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, list):          # several by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if not isinstance(template, str | None):
            raise ValueError(f"chat_template is a {type(template).__name__}, not text.")
    return template
