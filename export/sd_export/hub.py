"""Fetches from the Hugging Face Hub what an export reads, and nothing else.

huggingface_hub's own conventions hold: HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
HF_HUB_OFFLINE; files land in its cache and are shared with everything else that uses it.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd_engines.errors import ExportError
from sd_export.model_files import weight_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
    "*.index*.json",
)


@dataclass(frozen=True)
class Snapshot:
    """Models in ``folder``: one of this disk, or a repository of the Hub at a ``commit``.

    Of the Hub's, the small ones of ``files`` lie there, and others once they are fetched.
    """

    model: str
    folder: Path
    commit: str | None = None
    files: tuple[Path, ...] | None = None

    def fetch(self, files: Iterable[Path]) -> None:
        """Bring some of `files` onto this disk; `ExportError` as of `find_snapshot`.

        One after the other in this thread: huggingface_hub's own would not hear of an interrupt.
        """
        import huggingface_hub

        if self.commit is not None:
            with _hub_errors(self.model, self.commit):
                for path in dict.fromkeys(files):
                    name = path.relative_to(self.folder).as_posix()
                    huggingface_hub.hf_hub_download(self.model, name, revision=self.commit)

    def fetch_weights(self, folder: Path, component: str) -> tuple[Path, ...]:
        """The weight files of the one model in ``folder``, fetched; errors as of `weight_files`."""
        weights = weight_files(folder, component, None, files=self.files)
        self.fetch(weights)
        return weights


def find_snapshot(model: str, path: Path | None, *, revision: str | None = None) -> Snapshot:
    """The folder ``path``, or without one what the Hub has by the id ``model``.

    Raises `ExportError` that says whether the model, the revision, the permission or the network
    is what is missing.
    """
    if path is not None:
        return Snapshot(model, path)
    import huggingface_hub

    small = list(_SMALL_FILES)
    with _hub_errors(model, revision):
        folder = Path(
            huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=small)
        )
        commit = folder.name
        return Snapshot(model, folder, commit, tuple(_files(model, commit, folder)))


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


def _files(model: str, commit: str, folder: Path) -> Iterator[Path]:
    """All files of the snapshot, as listed by the first download, or as found in the cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        tree = huggingface_hub.get_cached_repo_tree(model, revision=commit)
    except errors.CachedRepoTreeNotFoundError:
        yield from (path for path in folder.rglob("*") if path.is_file())
    else:
        yield from (folder / file.path for file in tree)
