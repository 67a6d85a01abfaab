# %% [markdown]
# # 01 · Tokens
#
# **What does a language model read?** 15 minutes. You need Python; nothing about language models.
#
# Every cell prints something, and what it printed here stands below it as `#>`. Run the whole file with `python tutorials/01_tokens.py`, or
# open it as a notebook. `21±3` in such a line means a number from 18 to 24, which differs a little between machines; behind `≈` stands a text that
# was drawn, and may be another one where you are.

# %%
import lesson
import matplotlib.pyplot as plt
import torch

from ministeer.steering import pad_together

model, tokenizer = lesson.load()        # ministeer.load("smollm2-135m"): a Llama with 135 million weights
prompt = "I hate you because"
print(model.name, "with", model.config.n_layer, "layers and", model.config.n_vocab, "possible tokens")
#> smollm2-135m with 30 layers and 49152 possible tokens

# %% [markdown]
# ## What is a token?
# A model is a function with learned numbers, its weights: token numbers in, scores for the next token out. It works in steps, its layers. Its
# tokenizer has a list of pieces of text, the *vocabulary*, and a token is a place in that list. The list was learned too (byte-pair encoding, BPE):
# begin with bytes, and join the commonest neighbours into a new piece, again and again.

# %%
ids = tokenizer.encode(prompt)
print("ids   ", ids)
print("pieces", tokenizer.pieces(ids))
#> ids    [0, 57, 13735, 346, 975]
#> pieces ['<|endoftext|>', 'I', ' hate', ' you', ' because']

# %% [markdown]
# Two things to remember. The space belongs to the token: the second word is `" hate"`, not `"hate"`. And a token that we did not write stands in
# front, id 0. It is called BOS, *beginning of sequence*. In training it separated documents, so after it the model expects a text to begin.
#
# ## Does the leading space matter?

# %%
for text in (" wedding", "wedding", " Wedding", " weddings", "weddings"):
    pieces = tokenizer.pieces(tokenizer.encode(text, bos=False))
    print(f"{text!r:12} {len(pieces)} {pieces}")
#> ' wedding'   1 [' wedding']
#> 'wedding'    2 ['wed', 'ding']
#> ' Wedding'   2 [' Wed', 'ding']
#> ' weddings'  1 [' weddings']
#> 'weddings'   2 ['wed', 'dings']

# %% [markdown]
# It does: one more space, and another token with another meaning to the model. Later you will steer with `" weddings"`. Leave its space out, and
# you have another vector. This is a common reason why somebody else's example does not work.
#
# ## What does the model answer?
# A score for every token of the vocabulary, at every position: the *logits*. Softmax, exp(score) / sum of all exp(score), makes probabilities of
# them. The last position tells what may come next.

# %%
logits, resid = model(torch.tensor([ids]))
print("logits", tuple(logits.shape), "= (texts, positions, vocabulary)")
p = logits[0, -1].softmax(dim=-1)
for i in p.topk(5).indices.tolist():
    print(f"{p[i]:6.1%} {tokenizer.pieces([i])[0]!r}")
#> logits (1, 5, 49152) = (texts, positions, vocabulary)
#> 47.4% ' you'
#> 22.1% ' of'
#> 13.7% ' I'
#> 2.7% ' your'
#> 2.7% ' it'

# %% [markdown]
# The last *prompt* position writes the first *new* token. Whoever changes what happens there changes the first new token.
#
# ## What does BOS do?
# Without it the same words get other probabilities. Ministeer writes it exactly once, whatever the text already begins with; forgetting it, or
# writing it twice, is a common bug.

# %%
without, _ = model(torch.tensor([tokenizer.encode(prompt, bos=False)]))
q = without[0, -1].softmax(dim=-1)
distance = (p - q).abs().sum().item() / 2
print(f"{distance:.0%} of the probability lies on other tokens without BOS")
print(tokenizer.encode("<|endoftext|>" + prompt) == ids)
#> 17% of the probability lies on other tokens without BOS
#> True

# %% [markdown]
# ## How do two prompts get the same length?
# A steering vector is the difference of two prompts, position by position, so they must have equally many tokens. The shorter one is filled up
# with the token of a single space.

# %%
for row in pad_together(tokenizer, "I talk about weddings constantly", "I never talk"):
    print(tokenizer.pieces(row))
#> ['<|endoftext|>', 'I', ' talk', ' about', ' weddings', ' constantly']
#> ['<|endoftext|>', 'I', ' never', ' talk', ' ', ' ']

# %% [markdown]
# ## The figure: the ten likeliest next tokens, with BOS and without

# %%
top = p.topk(10).indices
figure, axis = plt.subplots(figsize=(7, 3.4))
axis.bar(torch.arange(10) - 0.2, p[top], 0.38, color=lesson.BLUE, label="with BOS")
axis.bar(torch.arange(10) + 0.2, q[top], 0.38, color=lesson.ORANGE, label="without BOS")
axis.set_xticks(range(10), [repr(piece) for piece in tokenizer.pieces(top)], rotation=30, ha="right", rotation_mode="anchor")
axis.set_ylabel("probability")
axis.set_title(f"next token after {prompt!r} (exact, no sampling)", fontsize="medium")
axis.legend()
lesson.save(figure, "01_tokens")

# %% [markdown]
# ## Exercise 1
# How many tokens is a text, BOS not counted?

# %%
def n_tokens(tokenizer, text):
    """-> the number of tokens of `text`, an int"""
    return None                 # your line


lesson.check(n_tokens, ((tokenizer, ""), 0), ((tokenizer, prompt), len(ids) - 1))
#> n_tokens: not yet. n_tokens(the tokenizer, '') gives None; expected 0

# %% [markdown]
# ## Exercise 2
# How many space tokens does `pad_together` add to the shorter of two prompts?

# %%
def n_padding(tokenizer, plus, minus):
    """-> how many spaces are added, an int"""
    return None                 # your line


lesson.check(n_padding, ((tokenizer, "I hate", "I"), n_pad := len(tokenizer.encode(" hate")) - 1), ((tokenizer, "I", "I hate"), n_pad))
#> n_padding: not yet. n_padding(the tokenizer, 'I hate', 'I') gives None; expected 1

# %% [markdown]
# ## Exercise 3
# How likely is it that the next token after `prompt` is `word`? Take care that `word` is one token.

# %%
def probability(model, tokenizer, prompt, word):
    """-> a float from 0 to 1; ValueError if `word` is not exactly one token"""
    return None                 # your lines


(love,) = tokenizer.encode(" love", bos=False)
lesson.check(probability, ((model, tokenizer, prompt, " love"), p[love].item()))
#> probability: not yet. probability(the model, the tokenizer, 'I hate you because', ' love') gives None; expected 0.0002273

# %% [markdown]
# **You know now** what the model reads and what it answers, why spaces and BOS matter, and how two prompts are made equally long.
# Next: [02](02_one_block.py), what one block does with it.
