"""A small classifier that reads a text with the model, token by token: what FUDGE asks how each next token would change its mind.

Read before: decoding.py, whose Guide uses it. benchmarks/train_classifier.py trains it.
"""

import os

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..utils import write


class PrefixClassifier(nn.Module):
    """P(class 1 | the text so far) from a GRU over token ids, trained on texts that are cut anywhere (benchmarks/train_classifier.py).

    A state is all it keeps of a text, so 50 candidates for the next token cost 50 steps and no re-reading.
    """

    def __init__(self, n_vocab, d_embedding=64, d_state=128):
        super().__init__()
        self.n_vocab = n_vocab
        self.embedding = nn.Embedding(n_vocab, d_embedding)
        self.gru = nn.GRU(d_embedding, d_state, batch_first=True)
        self.head = nn.Linear(d_state, 1)

    def read(self, ids, state=None):
        """ids (B, T) after `state` (B, d_state), or from BOS on -> the new state"""
        return self.gru(self.embedding(ids), None if state is None else state[None])[1][0]

    def score(self, state):
        """state (B, d_state) -> the log-odds of class 1, (B,)"""
        return self.head(state)[:, 0]

    def score_next(self, state, ids):
        """The log-odds after each of K candidates: state (B, d_state), ids (B, K) -> (B, K)"""
        B, K = ids.shape
        return self.score(self.read(ids.reshape(B * K, 1), state.repeat_interleave(K, dim=0))).view(B, K)

    def save(self, path):
        """Write a safetensors file, whole or not at all."""
        write(path, save({name: p.detach().contiguous() for name, p in self.named_parameters()}, {"ministeer": "PrefixClassifier"}))

    @classmethod
    def load(cls, path):
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError if the file holds something else."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file {os.fspath(path)}. benchmarks/train_classifier.py makes one.")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}     # noqa: SIM118 (not a dict)
            classifier = cls(*tensors["embedding.weight"].shape, tensors["head.weight"].shape[1])
            classifier.load_state_dict(tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{os.fspath(path)} is not a classifier that ministeer saved: {error}") from None
        return classifier.requires_grad_(False).eval()
