"""Fetches from the Hugging Face Hub what an export reads, and nothing else.

huggingface_hub's own conventions hold: HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
HF_HUB_OFFLINE; files land in its cache and are shared with everything else that uses it.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sd_engines.errors import ExportError
from sd_export.model_files import CONTROLNET_STEM, WEIGHT_STEMS, weight_kinds
from sd_export.source import read_index

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from huggingface_hub import errors

_SMALL_FILES = (
    "model_index.json",
    "config.json",
    "README.md",
    "LICENSE*",
    "License*",
    "license*",
    "*/config.json",
    "scheduler/*.json",
    "low_res_scheduler/*.json",
    "tokenizer/*.json",
    "tokenizer/merges.txt",
    "tokenizer_2/*.json",
    "tokenizer_2/merges.txt",
    "feature_extractor/preprocessor_config.json",
)


def fetch(model: str, *, revision: str | None, variant: str | None) -> tuple[Path, str]:
    """Bring a snapshot's needed files onto this disk; its folder and its commit.

    Raises `ExportError` that says whether the model, the revision, the permission or the network
    is what is missing.
    """
    with _hub_errors(model, revision):
        folder = _small_files(model, revision=revision)
        commit = folder.name
        read_index(folder, source=model)  # gigabytes are not fetched to be refused
        patterns = _weight_patterns(_files(model, commit, folder), variant)
        _download(model, commit, [*_SMALL_FILES, *patterns])
    return folder, commit


def fetch_vae(model: str) -> tuple[Path, str]:
    """The same for a VAE alone, or the VAE of a whole checkpoint: its own folder, and the commit.

    Without a config of its own that is its folder ``vae``, whether or not there is one.
    """
    with _hub_errors(model, None):
        folder = _small_files(model, revision=None)
        commit = folder.name
        inner = "" if (folder / "config.json").is_file() else "vae/"
        files = {name for name in _files(model, commit, folder) if name.startswith(inner)}
        moved = [f"vae/{name.removeprefix(inner)}" for name in files]
        patterns = _weight_patterns(moved, None, components=("vae",))
        _download(model, commit, [inner + pattern.removeprefix("vae/") for pattern in patterns])
    return folder / inner, commit


def fetch_controlnet(model: str) -> tuple[Path, str]:
    """The same for one ControlNet, which is its repository's only model."""
    import huggingface_hub

    with _hub_errors(model, None):
        small = ["config.json"]
        folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=small))
        commit = folder.name
        patterns = _patterns_of("", CONTROLNET_STEM, _files(model, commit, folder), variant=None)
        _download(model, commit, small + patterns)
    return folder, commit


def _small_files(model: str, *, revision: str | None) -> Path:
    import huggingface_hub

    patterns = list(_SMALL_FILES)
    return Path(
        huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
    )


def _download(model: str, commit: str, patterns: list[str]) -> None:
    import huggingface_hub

    huggingface_hub.snapshot_download(model, revision=commit, allow_patterns=patterns)


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Say in the toolkit's words what huggingface_hub says in its own."""
    from huggingface_hub import constants, errors

    def failed(message: str, hint: str) -> ExportError:
        return ExportError(message, hint, component=model, stage="fetch")

    try:
        yield
    except errors.GatedRepoError as error:
        raise failed(
            "access is granted on the Hub only after its conditions are accepted",
            f"Accept them at {constants.ENDPOINT}/{model}, then log in: hf auth login "
            "(or set HF_TOKEN).",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise failed(
            "no such model on the Hub, or it is private",
            "Check the spelling (owner/name); for a private one log in: hf auth login "
            "(or set HF_TOKEN).",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise failed(
            f"the model has no revision {revision!r}",
            f"See its branches and tags at {constants.ENDPOINT}/{model}/tree/main.",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise failed(*_refusal(error.__cause__)) from error
        offline = constants.HF_HUB_OFFLINE
        raise failed(
            "not in the cache, and HF_HUB_OFFLINE is set"
            if offline
            else f"not in the cache, and the Hub at {constants.ENDPOINT} cannot be reached",
            "Unset HF_HUB_OFFLINE, or name a folder on this disk."
            if offline
            else "Check the network, or name a folder on this disk.",
        ) from error
    except errors.HFValidationError as error:
        raise failed("not a valid id on the Hub", "Write owner/name.") from error
    except errors.HfHubHTTPError as error:
        raise failed(*_refusal(error)) from error
    except OSError as error:
        raise failed(
            f"cannot be downloaded: {error}",
            "Check the network and the room on the disk of HF_HOME; what has arrived is kept.",
        ) from error


def _refusal(error: errors.HfHubHTTPError) -> tuple[str, str]:
    """Message and hint for an answer that is neither yes nor a plain no."""
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        return f"the Hub refused access ({status})", "Log in: hf auth login (or set HF_TOKEN)."
    return f"the Hub answered {status}", "Try again in a while."


def _files(model: str, commit: str, folder: Path) -> list[str]:
    """All files of the snapshot, as listed by the first download, or as found in the cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        tree = huggingface_hub.get_cached_repo_tree(model, revision=commit)
    except errors.CachedRepoTreeNotFoundError:
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return [file.path for file in tree]


def _weight_patterns(
    files: Iterable[str], variant: str | None, *, components: Iterable[str] = WEIGHT_STEMS
) -> list[str]:
    """For each model the one kind of file to read: safetensors where there is one, else pickles."""
    present = set(files)
    patterns = []
    for component in components:
        patterns += _patterns_of(f"{component}/", WEIGHT_STEMS[component], present, variant=variant)
    return patterns


def _patterns_of(
    folder: str, stem: str, files: Collection[str], *, variant: str | None
) -> list[str]:
    """The same for one model, whose files lie in ``folder``: empty, or with a slash at its end."""
    middle = f".{variant}" if variant else ""
    for start, suffix in weight_kinds(stem):
        name = f"{folder}{start}{middle}.{suffix}"
        sharded = f"{folder}{start}{middle}-"
        if name in files:
            return [name]
        if any(file.startswith(sharded) and file.endswith(suffix) for file in files):
            return [f"{sharded}*.{suffix}", f"{folder}{start}*.index*.json"]
    return []
