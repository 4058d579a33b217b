"""Models as folders and as repositories on the hub: config.json, model.safetensors, tokenizer.json and README.md.

huggingface_hub's `PyTorchModelHubMixin` is not used: it falls back to a pickle, loads with `strict=False`, and reads
config.json whole. Its parts below are: downloads with their cache, and commits.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from magnet_fast.atomic import write_text_atomically
from magnet_fast.models import weights
from magnet_fast.models.card import is_untouched, model_card
from magnet_fast.models.files import dict_of, is_safetensors, read_json, safetensors_metadata
from magnet_fast.models.registry import parse_config
from magnet_fast.showing import shown

if TYPE_CHECKING:
    from magnet_fast.models.base import ReferringModel

FORMAT = "magnet_fast.pretrained/1"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
CARD = "README.md"


class Vocabulary(Protocol):
    """What of a tokenizer goes beside a model; the tokenizers of `magnet_fast.data` have it."""

    def digest(self) -> str: ...

    def to_json(self) -> str | None: ...


@dataclass(frozen=True)
class Pretrained:
    """The files of a saved model, at hand.

    Attributes:
        what: it is called, in messages.
        config: of the model, as plain entries.
        weights: its file.
        tokenizer: its file; None where none was saved.
    """

    what: str
    config: dict[str, Any]
    weights: Path
    tokenizer: Path | None

    def load(self) -> tuple[ReferringModel, dict[str, str]]:
        """The model, in evaluation mode on the CPU, and what else the file of weights says.

        Raises:
            ValueError: the weights are in no safetensors file that `models.save` wrote, leave a base out, or are of
                another model than config.json.
        """
        if not is_safetensors(self.weights):
            raise ValueError(f"{self.what}: its {WEIGHTS} is another kind of file (a pickle?); expected safetensors")
        metadata = safetensors_metadata(self.weights)
        if "bases" in metadata:  # which may name any file or repository
            raise ValueError(
                f"{self.what}: its {WEIGHTS} holds only what was trained; expected all weights, as save_pretrained and "
                "`magnet-fast push` write them"
            )
        if "config" in metadata and dict_of(metadata, "config", f"{self.what}: {WEIGHTS}") != self.config:
            raise ValueError(f"{self.what}: {CONFIG} and {WEIGHTS} describe different models; save it again")
        return weights.load_with_metadata(self.weights)


def save_pretrained(
    model: ReferringModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Vocabulary | None = None,
    metadata: Mapping[str, str] | None = None,
    scores: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    name: str = "OWNER/NAME",
    compact: bool = False,
) -> None:
    """Write a model as a folder that `from_pretrained` reads, and that the hub takes as it is.

    All weights go into it, also those of a base that a run left out. A README.md that somebody edited is kept, with a
    warning.

    Args:
        tokenizer: goes with the model, so that nothing else is needed to use it.
        metadata: more, text to text, as for `models.save`.
        scores, license, name: for README.md, see `card.model_card`.
        compact: as for `models.save`.
    """
    folder, stored = Path(folder), None if tokenizer is None else tokenizer.to_json()
    card = model_card(model, name, tokenizer=stored is not None, scores=scores, license=license)
    folder.mkdir(parents=True, exist_ok=True)
    extra = {**(metadata or {}), **({} if tokenizer is None else {"tokenizer_vocab": tokenizer.digest()})}
    weights.save(model, folder / WEIGHTS, extra, compact=compact)
    if stored is not None:
        write_text_atomically(folder / TOKENIZER, stored)
    if not _keeps(folder / CARD, str(folder)):
        write_text_atomically(folder / CARD, card)
    described = {
        "library_name": "magnet_fast",
        "format": FORMAT,
        "tokenizer": stored is not None,
        "model": json.loads(model.config.model_dump_json()),
    }
    write_text_atomically(folder / CONFIG, json.dumps(described, indent=2) + "\n")


def push_to_hub(
    model: ReferringModel, repository: str, *, private: bool = False, token: str | None = None, **contents: Any
) -> str:
    """Write a model to a repository on the hub, in one commit; it is made where it does not exist.

    A README.md that somebody edited is kept, with a warning.

    Args:
        repository: "owner/name".
        private: make it private. A public one that exists is refused then.
        token: of the hub, with the right to write; None for the one that `hf auth login` keeps.
        **contents: `tokenizer`, `metadata`, `scores` and `license`, as `save_pretrained` takes them.

    Returns:
        The address of the commit.

    Raises:
        ValueError: no such name, or the hub does not take it; the message says why.
    """
    checked_name(repository)
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    api = HfApi(token=token, library_name="magnet_fast")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, name=repository, **contents)
        files = sorted(Path(folder).iterdir())
        try:
            api.create_repo(repository, private=private or None, exist_ok=True)
            public = private and not api.model_info(repository).private
            if not public:
                with suppress(RemoteEntryNotFoundError):
                    if _keeps(Path(api.hf_hub_download(repository, CARD)), repository):
                        files = [file for file in files if file.name != CARD]
                added = [CommitOperationAdd(file.name, file) for file in files]
                return api.create_commit(repository, added, commit_message="Model of magnet_fast").commit_url
        except Exception as error:  # the hub's client raises many kinds
            raise ValueError(
                f"{repository!r} cannot be written on the hub: {_told(error)}; it takes network, and a token that may "
                "write there (hf auth login)"
            ) from error
    raise ValueError(f"private: {repository!r} is public already; nothing was written. Make it private on the hub")


def from_pretrained(source: str | os.PathLike[str], **where: Any) -> ReferringModel:
    """The model of a folder or of a repository on the hub, in evaluation mode on the CPU.

    Args:
        source: a folder that exists, else "owner/name".
        **where: `revision`, `token`, `cache_dir` and `local_files_only`, as `find` takes them.

    Raises:
        ValueError: as `find` and `Pretrained.load`.
    """
    return find(source, **where).load()[0]


def find(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Pretrained:
    """The files of a model: of a folder that exists, else of a repository on the hub, downloaded into its cache.

    The configuration comes first and is checked before weights are fetched; all files are of one commit.

    Args:
        source: the folder, or "owner/name".
        revision: a branch, tag or commit of the repository; None for its main branch.
        token: of the hub, for private repositories; None for the one that `hf auth login` keeps, False for none.
        cache_dir: None for the hub's own, `HF_HOME`.
        local_files_only: take what the cache holds, without network, as with `HF_HUB_OFFLINE=1`.

    Raises:
        ValueError: no such name, repository, revision or file; no network and nothing in the cache; or a
            configuration that is no model's of this package.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision: expected None with a folder, {os.fspath(source)!r}; got {revision!r}")
        return _look(str(folder), lambda name: folder / name)
    return fetch(os.fspath(source), revision, token, cache_dir, local_files_only)


def fetch(
    repository: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Pretrained:
    """As `find`, of a repository on the hub, whatever folders there are."""
    checked_name(repository)

    def download(name: str) -> Path:
        nonlocal revision
        path = _download(
            repository,
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        revision = path.parent.name  # the commit: the next file is of the same one
        return path

    return _look(repository, download)


def checked_name(repository: str) -> str:
    """The name itself; ValueError, before anything is asked of the hub, where it can be none of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        pass
    else:
        if repository.count("/") == 1:
            return repository
    raise ValueError(
        f"repository: expected a folder that exists, or owner/name of letters, digits, '-', '_' and '.'; got "
        f"{repository!r:.120}"
    )


def _look(what: str, file: Callable[[str], Path]) -> Pretrained:
    """The files of a model, by what gives a file of a name."""
    path = file(CONFIG)
    if not path.is_file():
        raise ValueError(f"{what} has no {CONFIG}: it is no folder that save_pretrained wrote")
    described = read_json(path)
    format = described.get("format")
    if not isinstance(format, str) or not format.startswith("magnet_fast.pretrained/"):
        raise ValueError(
            f"{what} is of another library: its {CONFIG} has format {shown(format, 40)}, expected {FORMAT!r}"
        )
    if format != FORMAT:
        raise ValueError(
            f"{what} has format {shown(format, 40)}, expected {FORMAT!r}: a later version wrote it, update"
        )
    try:
        parse_config(described["model"])
    except Exception as error:  # of a part's own libraries, for what a stranger wrote
        raise ValueError(f"{what}: the model of its {CONFIG} is none of this package: {error!s:.500}") from error
    tokenizer = file(TOKENIZER) if described.get("tokenizer") is True else None
    found = Pretrained(what, described["model"], file(WEIGHTS), tokenizer)
    for one in (found.weights, found.tokenizer):
        if one is not None and not one.is_file():
            raise ValueError(f"{what} has no {one.name}; save it again. Pickles (pytorch_model.bin) are not read")
    return found


def _download(repository: str, name: str, **where: Any) -> Path:
    from huggingface_hub import errors, hf_hub_download

    at = f" at revision {where['revision']!r}" if where["revision"] else ""
    if name == CONFIG and (lost := _lost(repository, **where)) is not None:
        raise ValueError(_unreached(repository, f"{name}{at}", _told(lost))) from lost
    try:
        return Path(hf_hub_download(repository, name, library_name="magnet_fast", **where))
    except errors.RepositoryNotFoundError as error:  # or a gated one
        raise ValueError(
            f"repository {repository!r} is not on the hub, or private, or to be asked for; correct the name, or log in "
            "(hf auth login) with a token that may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"repository {repository!r} has no revision {where['revision']!r}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = _told(error.__cause__) if error.__cause__ else "local_files_only=True"
        raise ValueError(_unreached(repository, f"{name}{at}", reason)) from error
    except errors.EntryNotFoundError as error:
        raise ValueError(
            f"repository {repository!r} has no {name}{at}: no model that save_pretrained wrote. Pickles "
            "(pytorch_model.bin) are not read"
        ) from error
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(f"repository {repository!r}: {name} cannot be fetched: {_told(error)}") from error


def _unreached(repository: str, file: str, reason: str) -> str:
    return (
        f"repository {repository!r}: the cache has no {file}, and the hub is not reached: {reason}; load it once with "
        "network, or give the folder of a copy"
    )


def _lost(
    repository: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Exception | None:
    """The error of a first connection, where a download needs one and none comes about.

    The hub's client tries again for half a minute where nobody answers, and for six where packets are lost. All else
    (a slow answer, a refusal, a proxy) is left to it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if local_files_only or isinstance(try_to_load_from_cache(repository, CONFIG, cache_dir, revision), str):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(repository, CONFIG, revision=revision), token=token, library_name="magnet_fast")
    except Exception as error:  # by name: the client's HTTP library is another one in other versions
        if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
            return error
    return None


def _keeps(card: Path, where: str) -> bool:
    """Whether a README.md is to stay, which a warning then says."""
    kept = card.exists() and not is_untouched(card.read_text(encoding="utf-8", errors="replace"))
    if kept:
        warnings.warn(f"{where} has an edited {CARD}, which is kept; remove it to have it written anew", stacklevel=4)
    return kept


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
