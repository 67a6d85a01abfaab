import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
play = ["starlette", "uvicorn"]
weights = ["gguf", "huggingface_hub", "filelock", "jinja2", "tqdm"]
interop = ["gguf", "tqdm", "xllamacpp"]     # xllamacpp, which is llama.cpp, is for a test only
tutorials = ["matplotlib", "tqdm", "vaderSentiment"]
notebooks = ["jupytext", "nbformat", "nbclient", "ipykernel", *weights, *tutorials]
judges = ["vaderSentiment", "alt-profanity-check", "scikit-learn", "transformers"]
bench = ["transformers", "transformer-lens", "nnsight", "gguf", "huggingface_hub", "xllamacpp", *tutorials]

source = (HERE / "ministeer/__init__.py").read_text(encoding="utf-8")
setup(
    name="ministeer",
    version=re.search(r'__version__ = "(.+)"', source)[1],
    description="Activation addition (ActAdd) from scratch: hand-written GPT-2, Llama, OPT and GPT-J",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["ministeer", "ministeer.*"]),
    package_data={"ministeer": ["py.typed"], "ministeer.play": ["page.html", "style.css", "play.js"]},
    python_requires=">=3.10",
    install_requires=["numpy", "torch>=2.5", "tokenizers", "safetensors"],      # torch 2.5: enable_gqa
    extras_require={
        "weights": weights,
        "play": play,
        "interop": interop,
        "tutorials": tutorials,
        "notebooks": notebooks,
        "judges": judges,
        "bench": bench,     # repeng and steering-vectors want environments of their own: benchmarks/README.md
        "test": ["pytest", "pytest-cov", "pytest-xdist", "hypothesis", "transformers", "ruff", "playwright",
                 "httpx", *notebooks, *play, *judges],
    },
    entry_points={"console_scripts": ["ministeer = ministeer.cli:main"]},
)
