"""From what a user calls a model to a path on this machine: a local path as it is, a Hub id through the Hub's cache.

Downloads only what running needs: configuration, tokenizer, and one set of weights, safetensors where there are any.
What is in the files is not looked at here; `open` does that.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Collection
from pathlib import Path

from hermes.checkpoint.open import WEIGHT_FILES
from hermes.errors import CheckpointError

__all__ = ["resolve_model", "wanted_files"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}
#: Beside the weights: all small. `*.py` is only fetched; running it is for --trust-remote-code to allow.
_BESIDE = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.py")
_POOLING = "*_Pooling/config.json"
_LIST_SECONDS = 10.0


def resolve_model(model: str | Path, *, revision: str | None = None) -> Path:
    """The directory or file that `model` stands for; a Hub id is downloaded, or found in the cache when offline.

    Blocks while downloading. Raises CheckpointError when there is no such thing, or it cannot be reached.
    """
    path = Path(model)
    # Not the Path: to pathlib an empty name is the current directory.
    if os.path.exists(model):
        return path
    if path.suffix in _WEIGHT_SUFFIXES:
        raise CheckpointError(f"{model}: no such file or directory; give the path of a weight file that exists")
    if not (isinstance(model, str) and _HUB_ID.fullmatch(model)):
        raise CheckpointError(f"{model}: no such file or directory; give a path that exists, or a Hub id like org/name")
    return _snapshot(str(model), revision)


def wanted_files(names: Collection[str]) -> list[str]:
    """Of a repository's files those that running needs; no weights among them if it has none that can be read."""
    top = sorted(name for name in names if "/" not in name)
    beside = [name for name in top if any(fnmatch.fnmatchcase(name, pattern) for pattern in _BESIDE)]
    beside += [name for name in names if fnmatch.fnmatchcase(name, _POOLING) and name.count("/") == 1]
    return sorted({*beside, *_wanted_weights(top)})


def _wanted_weights(top: Collection[str]) -> list[str]:
    """The set of weights that `open_checkpoint` will take, and no other: many repositories hold the same ones twice."""
    safetensors = [name for name in top if name.endswith(".safetensors")]
    for name in WEIGHT_FILES:
        if name in top:
            stem, suffix = ("model", ".safetensors") if ".safetensors" in name else ("pytorch_model", ".bin")
            shards = [other for other in top if re.fullmatch(rf"{stem}-.*{re.escape(suffix)}", other)]
            return [name] if not name.endswith(".json") else [name, *shards]
    return safetensors if len(safetensors) == 1 else []


def _snapshot(repository: str, revision: str | None) -> Path:
    """The local snapshot of a Hub repository, brought up to date when the Hub answers."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    at = f"{repository}{f' at revision {revision}' if revision else ''}"
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=_LIST_SECONDS)
        wanted = wanted_files([sibling.rfilename for sibling in info.siblings or ()])
        patterns = [glob.escape(name) for name in wanted]
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise CheckpointError(f"{at}: neither an existing path nor a valid Hub id") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{at}: the repository has no such revision; look at its page on the Hub") from error
    # Everything: what carries the Hub's requests, and so what it raises, differs between versions of its library.
    except Exception as error:
        if (cached := _cached(repository, revision)) is not None:
            return cached
        if isinstance(error, GatedRepoError):
            fault = "access to it is restricted; ask for access on its page, then run hf auth login"
        elif isinstance(error, RepositoryNotFoundError):
            fault = "neither an existing path nor a public repository of the Hub; check the spelling, or hf auth login"
        else:
            fault = (
                f"not an existing path, not in the Hub's cache, and the Hub cannot be reached "
                f"({type(error).__name__}); go online once and run it again, or give a local directory"
            )
        raise CheckpointError(f"{at}: {fault}") from error


def _cached(repository: str, revision: str | None) -> Path | None:
    """The snapshot in the local cache, perhaps without files that were never wanted; None when there is none."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # Newer versions call a snapshot incomplete that lacks any file of the repository, such as a second set of
        # weights; whether the weights are there is for `open_checkpoint` to say.
        partial = getattr(error, "snapshot_path", None)
        return Path(partial) if partial else None
