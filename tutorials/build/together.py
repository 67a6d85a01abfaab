"""SmolLM2 from its three files, with your lines: python together.py [CHECKPOINT]

Prints completions without the vector, with " weddings" - " " before block 1, and with random vectors.
"""

import json
import sys

import torch
from c_block import llama_block, rms_norm
from d_vector import steering_vector
from e_loop import run
from f_generate import generate
from safetensors.torch import load_file
from tokenizers import Tokenizer

PROMPT, PLUS, MINUS, LAYER, COEFF = "I went up to my friend and said", " weddings", " ", 1, 1.0


class SmolLM2:
    def __init__(self, folder):
        with open(f"{folder}/config.json", encoding="utf-8") as file:
            config = json.load(file)
        w = {name.removeprefix("model."): stored.float()
             for name, stored in load_file(f"{folder}/model.safetensors").items()}
        self.embedding, self.norm = w["embed_tokens.weight"], w["norm.weight"]
        self.layers = [{name.removeprefix(f"layers.{l}."): x for name, x in w.items()
                        if name.startswith(f"layers.{l}.")} for l in range(config["num_hidden_layers"])]
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.bos = self.tokenizer.token_to_id("<|endoftext|>")      # before every document of its training
        self.n_head = config["num_attention_heads"]
        d = config["hidden_size"] // self.n_head
        speed = config["rope_theta"] ** -(torch.arange(0, d, 2) / d)            # radians per position
        angle = torch.outer(torch.arange(512), speed).repeat(1, 2)              # (512, d / 2) -> (512, d)
        self.cos, self.sin = angle.cos(), angle.sin()

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def blocks(self):
        """The blocks for one run, each with an empty past."""
        def with_past(w, past):
            return lambda x, pos: llama_block(x, w, self.n_head, (self.cos[pos], self.sin[pos]), past)
        return [with_past(w, {}) for w in self.layers]

    def stream(self, ids, layer):
        pos, nothing = torch.arange(ids.shape[1]), torch.zeros(1, self.embedding.shape[1])
        return run(self.embedding[ids], pos, self.blocks()[:layer], layer, nothing, 0)[-1]

    def forward(self, vector, coeff):
        """-> forward(new_ids, pos) -> logits, steered, for one run"""
        blocks = self.blocks()

        def forward(ids, pos):
            x = run(self.embedding[ids], pos, blocks, LAYER, vector, coeff)[-1]
            return rms_norm(x, self.norm) @ self.embedding.T
        return forward


@torch.no_grad()
def completions(model, n, n_new=40, p=0.3, seed=0):
    """-> {"unsteered", "steered", "random": n texts}; the random vectors are five, of the same norms."""
    generator = torch.Generator().manual_seed(seed)
    vector = steering_vector(model.encode, lambda ids: model.stream(ids, LAYER), PLUS, MINUS, model.bos)
    noise = torch.randn(5, *vector.shape, generator=generator)
    noise = noise * vector.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    vectors = torch.stack([torch.zeros_like(vector)] * n + [vector] * n + [noise[i % 5] for i in range(n)])
    prompt = [model.bos, *model.encode(PROMPT)]
    draws = torch.rand(n, n_new, generator=generator).repeat(3, 1)      # the same draws for all three
    ids = generate(model.forward(vectors, COEFF), torch.tensor([prompt] * 3 * n), draws, p)
    ends = [model.tokenizer.token_to_id(end) for end in ("<|endoftext|>", "<|im_end|>")]
    texts = []
    for row in ids[:, len(prompt):].tolist():
        stop = next((t for t, i in enumerate(row) if i in ends), n_new)
        texts.append(model.tokenizer.decode(row[:stop]))
    return {"unsteered": texts[:n], "steered": texts[n:2 * n], "random": texts[2 * n:]}


if __name__ == "__main__":
    model = SmolLM2(sys.argv[1] if len(sys.argv) > 1 else "weights/smollm2-135m")
    for name, texts in completions(model, n=5).items():
        print(f"{name}:", *(repr(text) for text in texts), sep="\n  ")
