# %% [markdown]
# # 01 · Tokens
#
# **What does a language model read?** 15 minutes. You need Python; nothing about language models.
#
# Most cells print something. In the script, what they printed is shown below them after `#>`. The text after
# `≈` was sampled, so yours may differ, and counts of such texts may differ a little. Run the whole file with
# `python tutorials/01_tokens.py`, or make a notebook of it ([README.md](README.md)).

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
# A model is a function: token numbers go in, and scores for the next token come out. It computes them in
# steps, its layers, with numbers that it has learned, its weights. A tokenizer turns text into token numbers.
# It has a list of pieces of text, the *vocabulary*, and a token is the number of a piece in that list. The
# list was learned too, by byte-pair encoding (BPE): start from single bytes, then join the most frequent pair
# of neighbours into a new piece, again and again.

# %%
ids = tokenizer.encode(prompt)
print("ids   ", ids)
print("pieces", tokenizer.pieces(ids))
#> ids    [0, 57, 13735, 346, 975]
#> pieces ['<|endoftext|>', 'I', ' hate', ' you', ' because']

# %% [markdown]
# Remember two things. First, the space belongs to the token: the second word is `" hate"`, not `"hate"`.
# Second, there is a token at the front that we did not write, number 0. It is called BOS, *beginning of
# sequence*. In training it stood between documents, so after it the model expects a text to begin.
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
# It does: without the space you get other tokens, which mean something else to the model. Later you will
# steer with `" weddings"`. If you leave out its space, you get another vector. This is a common reason why an
# example that worked for somebody else does not work for you.
#
# ## What does the model answer?
# At every position, it gives a score to every token of the vocabulary: the *logits*. Softmax turns them into
# probabilities: exp(score) / sum of all exp(score). The last position says what may come next.

# %%
logits, resid = model(torch.tensor([ids]))
print("logits", tuple(logits.shape), "= (texts, positions, vocabulary)")
p = logits[0, -1].softmax(dim=-1)
for i in p.topk(5).indices.tolist():
    print(f"{p[i]:6.1%} {tokenizer.pieces([i])[0]!r}")
#> logits (1, 5, 49152) = (texts, positions, vocabulary)
#>  47.4% ' you'
#>  22.1% ' of'
#>  13.7% ' I'
#>   2.7% ' your'
#>   2.7% ' it'

# %% [markdown]
# The first *new* token comes from the last position of the *prompt*. So if you change what happens at that
# position, you change the first new token.
#
# ## What does BOS do?
# Without BOS, the same words get other probabilities. Ministeer writes it exactly once, even if the text
# already begins with it. Forgetting it, or writing it twice, is a common bug.

# %%
without, _ = model(torch.tensor([tokenizer.encode(prompt, bos=False)]))
q = without[0, -1].softmax(dim=-1)
distance = (p - q).abs().sum().item() / 2
print(f"{distance:.0%} of the probability lies on other tokens without BOS")
print("written once, even before a text that has it:", tokenizer.encode("<|endoftext|>" + prompt) == ids)
#> 17% of the probability lies on other tokens without BOS
#> written once, even before a text that has it: True

# %% [markdown]
# ## How do two prompts get the same length?
# A steering vector is the difference of two prompts, position by position, so both must have the same number
# of tokens. The shorter one is padded: single-space tokens are added at its end.

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
labels = [repr(piece) for piece in tokenizer.pieces(top)]
axis.set_xticks(range(10), labels, rotation=30, ha="right", rotation_mode="anchor")
axis.set_ylabel("probability")
axis.set_title(f"next token after {prompt!r} (exact, no sampling)", fontsize="medium")
axis.legend()
lesson.save(figure, "01_tokens")

# %% [markdown]
# ## Exercise 1
# How many tokens does a text have, not counting BOS?

# %%
def n_tokens(tokenizer, text):
    """-> the number of tokens of `text`, an int"""
    return None                 # your line


cases = [((tokenizer, text), len(tokenizer.encode(text)) - 1) for text in ("", prompt, "weddings", " love  ")]
lesson.check(n_tokens, *cases)
#> n_tokens: not yet. For (tokenizer, '') it gives None, not 0

# %% [markdown]
# ## Exercise 2
# How many space tokens does `pad_together` add to the shorter of two prompts?

# %%
def n_padding(tokenizer, plus, minus):
    """-> how many spaces are added, an int"""
    return None                 # your line


n_hate = len(tokenizer.encode(" hate", bos=False))
n_wedding = len(tokenizer.encode("wedding", bos=False))
lesson.check(n_padding, ((tokenizer, "I hate", "I"), n_hate), ((tokenizer, "I", "I hate"), n_hate),
             ((tokenizer, "", prompt), len(ids) - 1), ((tokenizer, prompt, prompt), 0),
             ((tokenizer, "", "wedding"), n_wedding))
#> n_padding: not yet. For (tokenizer, 'I hate', 'I') it gives None, not 1

# %% [markdown]
# ## Exercise 3
# How likely is `word` to be the next token after `prompt`? Make sure that `word` is a single token.

# %%
def probability(model, tokenizer, prompt, word):
    """-> a float from 0 to 1; ValueError if `word` is not exactly one token"""
    return None                 # your lines


(love,), (you,) = (tokenizer.encode(word, bos=False) for word in (" love", " you"))
first = model(torch.tensor([ids[:1]]))[0][0, -1].softmax(dim=-1)            # after BOS alone
lesson.check(probability, ((model, tokenizer, prompt, " love"), p[love].item()),
             ((model, tokenizer, prompt, " you"), p[you].item()),
             ((model, tokenizer, "", " you"), first[you].item()),
             ((model, tokenizer, prompt, "wedding"), ValueError),
             ((model, tokenizer, prompt, ""), ValueError))
#> probability: not yet. For (model, tokenizer, 'I hate you because', ' love') it gives None, not 0.0002273

# %% [markdown]
# ## Your own topic
# Choose a topic to steer toward, and keep it for all the tutorials. Which of its words are single tokens:
# with the leading space or without, in the singular or in the plural? Write a prompt that does not name the
# topic. How likely are five of your words to come next? Set five words of another topic beside them.
# Tutorial 04 will change these numbers.
#
# **Now you know** what the model reads and what it answers, why spaces and BOS matter, and how two prompts
# are brought to the same length. Next: [02](02_one_block.py), what one block does with its input.
