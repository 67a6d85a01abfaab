"""Wrong answers of tutorial 01, each called EXERCISE_MISTAKE; its check refuses each."""

import torch


def n_tokens_words(tokenizer, text):
    return len(text.split())


def n_tokens_with_bos(tokenizer, text):
    return len(tokenizer.encode(text))


def n_padding_always_one(tokenizer, plus, minus):
    return 1


def n_padding_words(tokenizer, plus, minus):
    return abs(len(plus.split()) - len(minus.split()))


def n_padding_signed(tokenizer, plus, minus):
    return len(tokenizer.encode(plus)) - len(tokenizer.encode(minus))


def next_probabilities(model, tokenizer, prompt, bos=True):
    logits, _ = model(torch.tensor([tokenizer.encode(prompt, bos=bos)]))
    return logits[0, -1].softmax(dim=-1)


def probability_first_token_of_the_word(model, tokenizer, prompt, word):
    return next_probabilities(model, tokenizer, prompt)[tokenizer.encode(word, bos=False)[0]].item()


def probability_empty_word(model, tokenizer, prompt, word):
    ids = tokenizer.encode(word, bos=False)
    if len(ids) > 1:
        raise ValueError("more than one token")
    return next_probabilities(model, tokenizer, prompt)[ids].sum().item()


def probability_without_bos(model, tokenizer, prompt, word):
    (token,) = tokenizer.encode(word, bos=False)
    return next_probabilities(model, tokenizer, prompt, bos=False)[token].item()


def probability_bos_counted_as_the_word(model, tokenizer, prompt, word):
    return next_probabilities(model, tokenizer, prompt)[tokenizer.encode(word)[0]].item()


def probability_logit(model, tokenizer, prompt, word):
    (token,) = tokenizer.encode(word, bos=False)
    return model(torch.tensor([tokenizer.encode(prompt)]))[0][0, -1, token].item()
