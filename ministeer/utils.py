"""write: a file whole or not at all. Whatever is saved here is saved so."""

import contextlib
import os


def write(path, data):
    """Write bytes to a new file beside `path`, then rename it: `path` holds all of them, or what it held before."""
    part = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        with open(part, "xb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException as error:
        if not isinstance(error, FileExistsError):          # then it is not ours
            with contextlib.suppress(OSError):
                os.unlink(part)
        raise
