"""render: the text that a checkpoint's chat template makes, in a process of its own that has limits.

Read first: tokenizer.py, which calls it. This file is also the program of that process. Format: Jinja.
"""

import contextlib
import json
import subprocess
import sys
from typing import Any

# Jinja's sandbox keeps a template from files and from Python, but not from loops or texts without end.
SECONDS = 10
MEMORY = 2**29              # bytes; a limit that only Linux enforces
CHARACTERS = 1_000_000      # of a template, and of what it makes


def render(template: str, variables: dict[str, Any]) -> str:
    """-> what the template makes of the variables, which JSON must be able to write.

    Raises ValueError for whatever goes wrong in the template, and once it passes a limit.
    """
    if len(template) > CHARACTERS:
        raise ValueError(f"it has {len(template):,} characters; at most {CHARACTERS:,} are read.")
    task = json.dumps([[str(path) for path in sys.path], template, variables])
    try:
        # -I: without it, Python would look for modules in the folder of this file and in the environment's.
        done = subprocess.run([sys.executable, "-I", __file__], input=task, timeout=SECONDS,
                              capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        raise ValueError(f"it did not end within {SECONDS} seconds.") from None
    if done.returncode:
        raise ValueError(f"its process ended early (exit {done.returncode}).")
    text, fault = json.loads(done.stdout)
    if fault:
        raise ValueError(fault)
    return text


def run_template(template: str, variables: dict[str, Any]) -> str:
    """As render, without limits of time and memory."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise ValueError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = tojson
    text = environment.from_string(template).render(variables)
    if len(text) > CHARACTERS:
        raise ValueError(f"it makes {len(text):,} characters; at most {CHARACTERS:,} are taken.")
    return text


def main() -> None:
    """From stdin [folders with packages, template, variables], to stdout [text, null] or [null, fault]."""
    folders, template, variables = json.load(sys.stdin)
    sys.path += folders     # jinja2 may be where -I does not look; Python's own modules are found first
    with contextlib.suppress(ImportError, ValueError, OSError):     # not on Windows, or a lower limit holds
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        answer = [run_template(template, variables), None]
    except Exception as error:      # a template is somebody's program and may fail in any way
        answer = [None, str(error)[:200] or type(error).__name__]
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
