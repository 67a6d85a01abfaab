"""Tokenizer: text to token numbers and back, on the `tokenizers` library. The one place that writes a BOS.

Read next: steering.py. Turner et al. put a BOS before every prompt, GPT-2's included.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from .config import Config


class Tokenizer:
    """encode, decode, pieces, chat; bos_id, space_id, eos_ids, n_vocab. ids are lists of token numbers."""

    def __init__(self, backend: tokenizers.Tokenizer, bos_id: int | None, eos_ids: Sequence[int] = (),
                 chat_template: str | None = None) -> None:
        """bos_id: the token that begins every text. eos_ids: those that end one."""
        if bos_id is None:
            raise ValueError("config.json names no bos_token_id, and every prompt must begin with one. "
                             "Add the id of the token that begins a document.")
        self.backend, self.eos_ids, self.chat_template = backend, tuple(eos_ids), chat_template
        backend.no_truncation()         # Trap: tokenizer.json may keep the length of a training run's texts
        backend.no_padding()
        self.n_vocab = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # Trap: SmolLM2-Instruct calls <|im_start|>, which opens a chat turn, its BOS. What stood before every
        # document of its training is <|endoftext|>; text is likelier after that (see weights/README.md).
        document = backend.token_to_id("<|endoftext|>")
        if document is not None and backend.id_to_token(bos_id) == "<|im_start|>":
            bos_id = document
            self.eos_ids += (document,)         # what begins a document also ends the one before
        self.bos_id = bos_id
        for i in (bos_id, *self.eos_ids):
            if backend.id_to_token(i) is None:
                raise ValueError(f"special token {i} is not in the tokenizer of {self.n_vocab} tokens.")

    @classmethod
    def load(cls, folder: str | Path, config: Config) -> "Tokenizer":
        """From tokenizer.json in `folder`, BOS and EOS from `config`, and a chat template if there is one."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}. `transformers` writes one: "
                                    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder).")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:      # the library raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from None
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
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):     # it is a string, but not one that UTF-8 can write
            raise ValueError("the text holds half of a surrogate pair, which cannot be encoded.") from None
        if not bos:
            return ids
        text_start = next((i for i, t in enumerate(ids) if t != self.bos_id), len(ids))
        return [self.bos_id, *ids[text_start:]]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """ids -> text. BOS, EOS and other special tokens are left out unless special=True."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """ids -> the text of each token alone, with its leading space; part of a character shows as �."""
        # Trap: SentencePiece drops the leading space of the first token, so another one goes before it.
        before = self.decode([self.space_id])
        return [self.decode([self.space_id, i], special=True)[len(before):] for i in ids]

    @property
    def space_id(self) -> int:
        """The token that is one space: what pads the shorter prompt of a pair."""
        for piece in ("Ġ", "▁", " "):           # byte-level BPE, SentencePiece, plain
            i = self.backend.token_to_id(piece)
            # Trap: in a SentencePiece vocabulary "Ġ" is a letter of Maltese, so what it decodes to decides.
            if i is not None and not self.backend.decode([i]).strip():
                return i
        raise ValueError("this tokenizer has no token for a single space, which pads the prompts of a pair.")

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """[{"role": …, "content": …}, …] -> the text that the checkpoint's own chat template makes of them.

        Its BOS, if it has one, is left out: `encode` and `generate` write it. The template comes with the
        checkpoint and runs in Jinja's sandbox. Raises ValueError if there is none or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template: it is a base model. Give it plain text.")
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        bos = self.backend.id_to_token(self.bos_id)
        eos = self.backend.id_to_token(self.eos_ids[0]) if self.eos_ids else ""
        try:
            text = environment.from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos,
                tools=None, documents=None)
        except Exception as error:      # a template is somebody's program and may fail in any way
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        return text.removeprefix(bos)


def _refuse(message):
    raise ValueError(message)


def _chat_template(folder):
    """The text of chat_template.jinja, else "chat_template" in tokenizer_config.json, else None."""
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        path = folder / "tokenizer_config.json"
        if not path.is_file():
            return None
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, list):          # several by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold a chat template that can be read: {error}") from None
    if not isinstance(template, str | None):
        raise ValueError(f"{path}: chat_template is a {type(template).__name__}, not text.")
    return template
