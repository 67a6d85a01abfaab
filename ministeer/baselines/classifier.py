"""A small classifier that reads a text token by token. FUDGE asks it what each next token would change.

Read first: logits.py, whose Guide uses it. benchmarks/train_classifier.py trains it.
"""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..utils import one_line, write


class PrefixClassifier(nn.Module):
    """P(class 1 | the text so far) from a GRU over token ids, trained on texts that are cut anywhere.

    All it keeps of a text is a state, so 50 candidates for the next token cost 50 steps and no re-reading.
    """

    def __init__(self, n_vocab: int, d_embedding: int = 64, d_state: int = 128):
        super().__init__()
        self.n_vocab = n_vocab
        self.embedding = nn.Embedding(n_vocab, d_embedding)
        self.gru = nn.GRU(d_embedding, d_state, batch_first=True)
        self.head = nn.Linear(d_state, 1)

    def read(self, ids: Tensor, state: Tensor | None = None) -> Tensor:
        """ids (B, T) after `state`, or from BOS on if it is None -> the new state (B, d_state)"""
        return self.gru(self.embedding(ids), None if state is None else state[None])[1][0]

    def score(self, state: Tensor) -> Tensor:
        """state (B, d_state) -> the log-odds of class 1, (B,)"""
        return self.head(state)[:, 0]

    def score_next(self, state: Tensor, ids: Tensor) -> Tensor:
        """state (B, d_state), K candidates ids (B, K) -> the log-odds after each, (B, K)"""
        B, K = ids.shape
        states = self.read(ids.reshape(B * K, 1), state.repeat_interleave(K, dim=0))
        return self.score(states).view(B, K)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file. If writing fails, `path` keeps what it held before."""
        tensors = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        write(path, save(tensors, {"ministeer": "PrefixClassifier"}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> PrefixClassifier:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError if it holds something else."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file {os.fspath(path)}. "
                                    "`python -m benchmarks.train_classifier` makes one.")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            with torch.device("meta"):          # shapes only, so that wrong ones take no memory
                classifier = cls(*tensors["embedding.weight"].shape, tensors["head.weight"].shape[1])
            classifier.load_state_dict(tensors, assign=True)
            for name, x in tensors.items():
                if x.dtype != torch.float32 or not x.numel() or not torch.isfinite(x).all():
                    raise ValueError(f"{name} must hold finite float32 numbers")
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            path = os.fspath(path)
            raise ValueError(f"{path} is not a classifier that ministeer saved: {one_line(error)}") from None
        return classifier.requires_grad_(False).eval()
