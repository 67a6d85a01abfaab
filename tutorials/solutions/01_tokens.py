"""Solutions of tutorial 01."""

import torch


def n_tokens(tokenizer, text):
    return len(tokenizer.encode(text, bos=False))


def n_padding(tokenizer, plus, minus):
    return abs(len(tokenizer.encode(plus)) - len(tokenizer.encode(minus)))


def probability(model, tokenizer, prompt, word):
    ids = tokenizer.encode(word, bos=False)
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens.")
    logits, _ = model(torch.tensor([tokenizer.encode(prompt)]))
    return logits[0, -1].softmax(dim=-1)[ids[0]].item()
