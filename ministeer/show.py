"""What the command line prints: the setting of a run, texts side by side, and progress.

Read before: cli.py.
"""

import json
import shutil
import textwrap


def setting(model, tokenizer, steer, prompt, n, sampling):
    """Everything that a reader needs to get the same completions again."""
    from .steering import relative_norm
    loud = relative_norm(model, tokenizer, steer, prompt)
    ids = tokenizer.encode(prompt)
    first, last = steer.start, (steer.stop or 0) - 1
    if steer.stop is None:
        where = f"every position from {first} on, the new tokens' too"
    else:
        where = f"{quoted(''.join(tokenizer.pieces(ids[first:last + 1])))}, position{f's {first} …' * (last > first)} {last}"
    times = [f"{x:.2f}" for x in loud[first:steer.stop]]
    where += f"; {', '.join(times[:8])}{', …' * (len(times) > 8)} times as long as the stream there" if times else ""
    pair = f"{quoted(steer.note['plus'])} - {quoted(steer.note['minus'])}" if "plus" in steer.note and "minus" in steer.note else "a vector"
    lines = {
        "model": f"{model.name} ({model.config.family}, {model.config.n_layer} layers)",
        "prompt": prompt,
        "vector": f"{pair} before block {steer.layer}, coeff {steer.coeff:g}",
        "added to": where,
        "sampling": f"n {n}, {sampling['max_new_tokens']} tokens, temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, "
                    f"penalty {sampling['freq_penalty']:g}, seed {sampling['seed']}",
    }
    return "\n".join(textwrap.fill(printable(text), width(), initial_indent=f"{name:10}", subsequent_indent=" " * 10)
                     for name, text in lines.items())


def columns(left, right):
    """Two lists of texts side by side, wrapped to the width of the terminal."""
    each = (width() - 3) // 2
    rows = [("unsteered", "steered"), ("-" * each, "-" * each)]
    for pair in zip(left, right, strict=True):
        wrapped = [[line for part in printable(text).split("\n") for line in textwrap.wrap(part.strip(), each)] for text in pair]
        height = max(map(len, wrapped))
        rows += zip(*(lines + [""] * (height - len(lines)) for lines in wrapped), strict=True)
        rows.append(("", ""))
    return "\n".join(f"{a:{each}} | {b}".rstrip() for a, b in rows[:-1])


def width():
    return min(120, max(40, shutil.get_terminal_size((80, 24)).columns))


def quoted(text):
    return json.dumps(text, ensure_ascii=False)


def printable(text):
    """A model may write any character; those that would command the terminal are shown as a dot."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


class progress:
    """A bar on stderr while work is done, where there is a terminal to draw it on and tqdm is installed."""

    def __init__(self, total, label):
        try:
            from tqdm import tqdm
            self.bar = tqdm(total=total, desc=label, unit="tok", leave=False, disable=None)
        except ImportError:
            self.bar = None

    def __enter__(self):
        return self.bar.update if self.bar else None

    def __exit__(self, *fault):
        if self.bar:
            self.bar.close()
