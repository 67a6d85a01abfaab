"""Make notebooks of the tutorials: python -m tutorials.notebooks SOURCE [TUTORIAL …]

Each is written to tutorials/notebooks/ with its outputs and figures. It needs no other file: its first
cell installs ministeer from SOURCE and writes lesson.py where they are missing, and its last cell holds the
solutions. Needs: pip install -e ".[notebooks]".
"""

import argparse
import os
import re
from pathlib import Path

from ministeer.cli import Parser
from ministeer.utils import write

from .record import cells, is_code, split_output

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "notebooks"
SETUP = """\
#@title Run this cell first
# Where they are missing, it installs ministeer and writes lesson.py, which the cells below import.
import importlib.util
import subprocess
import sys
from pathlib import Path

sys.path.append("..")       # in a clone, lesson.py is in the folder above
if importlib.util.find_spec("ministeer") is None:
    wanted = {wanted!r}
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wanted], check=True)
if importlib.util.find_spec("lesson") is None:
    Path("lesson.py").write_text(r'''{lesson}''', encoding="utf-8")
importlib.invalidate_caches()
"""
SOLUTIONS = """\
<details><summary>Solutions</summary>

```python
{solutions}```

</details>
"""


def main(argv=None):
    pages = {page.stem: page for page in sorted(HERE.glob("[01][0-9]_*.py"))}
    top = Parser(prog="python -m tutorials.notebooks", description=__doc__.splitlines()[0],
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("source", metavar="SOURCE",
                     help="where pip finds ministeer: git+https://…, or the address of a wheel")
    top.add_argument("names", metavar="TUTORIAL", nargs="*", help="such as 01_tokens; all if none is given")
    args = top.parse_args(argv)
    for name in args.names or pages:
        if name not in pages:
            top.error(f"there is no tutorial {name!r:.40}. Possible: {', '.join(pages)}.")
        notebook = execute(build(pages[name], args.source), FOLDER)
        write(FOLDER / f"{name}.ipynb", notebook_bytes(notebook))
        print(FOLDER / f"{name}.ipynb", flush=True)


def build(page, source):
    """-> the notebook of a tutorial, not executed: its cells without `#>` lines, setup and solutions"""
    import jupytext
    from nbformat.v4 import new_code_cell, new_markdown_cell
    text = "".join(split_output(cell)[0] if is_code(cell) else cell
                   for cell in cells(page.read_text(encoding="utf-8")))
    text = re.sub(r"\]\(([01]\d_\w+)\.py\)", r"](\1.ipynb)", text)
    text = re.sub(r"\[([^]]+)\]\(\.\./[^)]+\)", r"\1", text)        # only tutorials lie beside it
    notebook = jupytext.reads(text, fmt="py:percent")
    setup = SETUP.format(wanted=f"ministeer[weights,tutorials] @ {source}",
                         lesson=(HERE / "lesson.py").read_text(encoding="utf-8"))
    solutions = (HERE / "solutions" / page.name).read_text(encoding="utf-8")
    folded = {"jupyter": {"source_hidden": True}, "cellView": "form"}           # in Jupyter, in Colab
    notebook.cells.insert(0, new_code_cell(setup, metadata=folded))
    notebook.cells.append(new_markdown_cell(SOLUTIONS.format(solutions=solutions)))
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"                   # nbformat's own are random
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return notebook


def execute(notebook, folder):
    """Run the notebook as if it lay in `folder` -> the notebook, with its outputs"""
    from nbclient import NotebookClient
    folder.mkdir(exist_ok=True)
    os.environ["TQDM_DISABLE"] = "1"            # a progress bar would be an output
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(folder)}})
    return client.execute()


def notebook_bytes(notebook):
    import nbformat
    nbformat.validate(notebook)
    return (nbformat.writes(notebook) + "\n").encode()


if __name__ == "__main__":
    main()
