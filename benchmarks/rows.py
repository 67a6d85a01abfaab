"""Files of texts from anywhere: JSON lines whose every line is checked, and plain texts.

Read next: lab.py, train_classifier.py and bos.py, which read their --data here.
"""

import json
from pathlib import Path

from ministeer.utils import one_line

LONGEST = 2 ** 20       # bytes of a line
KINDS = {str: "a string", float | None: "a number from 0 to 1, or null"}


def read(path, where="Name a folder that holds it with --data."):
    """-> the bytes of a file. where: what to do if there is none. Raises ValueError."""
    path = Path(path)
    if not path.is_file():      # a pipe or a device might never end
        raise ValueError(f"no file {path.name} in {path.parent}. {where}")
    return path.read_bytes()


def parse(data, path, **fields):
    """The content of a .txt file -> a text; of a file of JSON lines -> a list with one dict per line.

    fields: what every line must have, by name, as in KINDS. Other fields are left out. Blank lines, a
    byte-order mark and Windows' line ends are allowed. Raises ValueError, which names the line.
    """
    data, path = data.removeprefix(b"\xef\xbb\xbf"), Path(path)
    if path.suffix == ".txt":
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text in UTF-8: {error}.") from None
    wanted = ", ".join(f"{name} ({KINDS[kind]})" for name, kind in fields.items())
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, fields))
        except (ValueError, RecursionError) as error:
            fault = one_line(error, 200).rstrip(".")
            raise ValueError(f"{path}, line {number}: {fault}. Every line is a JSON object with "
                             f"{wanted}.") from None
    return rows


def _row(line, fields):
    if len(line) > LONGEST:
        raise ValueError(f"it has {len(line)} bytes, and at most {LONGEST} are read")
    row = json.loads(line.decode())
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, not an object")
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"it has no {name!r}")
        value = row[name]
        is_share = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if not (isinstance(value, str) if kind is str else value is None or is_share):
            raise ValueError(f"its {name!r} is {one_line(json.dumps(value))}")
        if kind is str:
            value.encode()      # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
    return {name: row[name] for name in fields}
