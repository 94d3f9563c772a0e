"""Remote sources of shards: the URLs that a name stands for, and the state of each of them.

https://host/{00000..00099}.tar               a range of URLs, as WebDataset has them; also {a,b}
hf://datasets/user/name/data/*.tar            files of a dataset on the Hub
user/name                                     a dataset on the Hub, with the splits that `datasets` finds
s3://bucket/shards/*.tar                      a store that fsspec knows, if its package is installed
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipelines.tools.cli import UserError, cause, nearest, printable
from training.data.shards.remote import HUB, STORES, find_in_store, has_wildcard, is_remote, state_of, version_of
from training.data.shards.remote_file import RemoteFile
from training.data.shards.threads import map_in_threads

SUFFIXES = (".tar", ".parquet")
REQUESTS_AT_ONCE = 16
_MOST_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class RemoteShard:
    """A shard that lies elsewhere.

    Attributes:
        url: its URL, with its version (see `remote`) unless a commit in it pins the content.
        size: its size in bytes.
        version: 16 hexadecimal digits that change with its content.
        split: its split, if the source says so.
    """

    url: str
    size: int
    version: str
    split: str | None = None

    def as_file(self) -> RemoteFile:
        """Return the file for reading its headers in turn."""
        return RemoteFile(self.url, self.size, read_ahead=True)

    def __str__(self) -> str:
        return self.url.removesuffix(f"#{self.version}")


def suffix_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def names_hub(name: str) -> bool:
    """Return whether a name is a dataset on the Hub, or files of one."""
    return name.startswith("hf://") or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def remote_folder(name: str) -> str | None:
    """Return what the URLs of all shards of a remote source begin with; None for other sources."""
    if names_hub(name):
        return f"{HUB}{_parts_of_hub_url(name)[0]}@"
    if not is_remote(name):
        return None
    fixed = re.split(r"[{*?\[]", name.partition("://")[2])[0]
    return f"{name.partition('://')[0]}://{fixed.rpartition('/')[0] or fixed}/"


def commit_of(name: str, revision: str) -> str:
    """Return the commit of a dataset on the Hub.

    Args:
        name: user/name, or hf://datasets/user/name@revision/path.
        revision: commit, branch or tag; "auto" is the newest commit, or the revision in the name. A commit is read
            instead of a branch or tag in the name: a run keeps that with which it was started.

    Raises:
        UserError: the dataset or the revision does not exist, the Hub does not answer, or the name has another
            revision.
    """
    repo, own, _ = _parts_of_hub_url(name)
    given = None if revision == "auto" else revision
    if own and given and own != given and (_is_commit(own) or not _is_commit(given)):
        raise UserError(
            f"--dataset_name has the revision {printable(own)}, and --dataset_revision is {printable(given)}; give one "
            "of them"
        )
    wanted = given or own
    return wanted if wanted and _is_commit(wanted) else _newest_commit(repo, wanted)


def _is_commit(revision: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


@functools.lru_cache(maxsize=16)
def _newest_commit(repo: str, revision: str | None) -> str:
    """Return the commit of a revision; one answer counts for the whole process."""
    from huggingface_hub import HfApi

    with _hub_errors(repo):
        commit = HfApi().dataset_info(repo, revision=revision).sha
    assert commit is not None
    return commit


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # those of the Hub, and those of its HTTP client, which differ between its versions
        raise UserError(
            f"dataset '{printable(repo)}' is not a local folder and cannot be read on the Hub ({cause(error)}); check "
            "--dataset_name, --dataset_revision, the network and the login"
        ) from None


def remote_shards(name: str, config_name: str | None, commit: str) -> list[RemoteShard]:
    """Return the shards of a remote source.

    Args:
        config_name: configuration of a dataset on the Hub, if it has several.
        commit: commit of a dataset on the Hub.

    Raises:
        UserError: nothing is found, a shard cannot be read, or the name is not that of a source.
    """
    if names_hub(name):
        return _on_hub(name, config_name, commit)
    return _in_store(name) if name.partition("://")[0] in STORES else _at_urls(name)


def expanded(pattern: str) -> list[str]:
    """Return the names that a pattern with {000..099} or {a,b} stands for. Raises UserError if there are too many."""
    choices: list[list[str]] = []
    texts = _BRACES.split(pattern)
    for place, text in enumerate(texts):
        choices.append([text] if place % 2 == 0 else _in_braces(text))
    number = 1
    for choice in choices:
        number *= len(choice)
    if number > _MOST_SHARDS:
        raise UserError(f"{printable(pattern)} stands for {number:,} shards; give at most {_MOST_SHARDS:,}")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _in_braces(text: str) -> list[str]:
    found = _RANGE.fullmatch(text)
    if not found:
        return text.split(",")
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < _MOST_SHARDS:
        raise UserError(f"{{{text}}} is not a range of shards; write it as {{00000..00099}}, the smaller number first")
    digits = len(found[1]) if found[1].startswith("0") else 0
    return [f"{number:0{digits}d}" for number in range(first, last + 1)]


def _at_urls(name: str) -> list[RemoteShard]:
    shown = printable(name)
    if "@" in name.partition("://")[2].partition("/")[0]:
        raise UserError(
            "--dataset_name has a user or password in its URL, which would be in the files of the run; write them into "
            "~/.netrc, as for curl (machine HOST login USER password PASSWORD), and leave them out of the URL"
        )
    if "?" in name or "#" in name:
        raise UserError(
            f"{shown.partition('?')[0]}: URLs with a ? or # cannot be read, as access keys in them would be in the "
            "files of the run and expire; give the plain URL, with user and password in ~/.netrc, or s3://"
        )
    if has_wildcard(name):
        raise UserError(f"{shown}: a web server cannot list files; name them as a range, such as {{00000..00099}}.tar")
    urls = expanded(name)
    unknown = next((url for url in urls if suffix_of(url) not in SUFFIXES), None)
    if unknown is not None:
        raise UserError(
            f"{printable(unknown)} is not a shard; --streaming true reads tar files of WebDataset (.tar) and Parquet "
            "files (.parquet)"
        )
    if len({suffix_of(url) for url in urls}) > 1:
        raise UserError(f"{shown} names tar files and Parquet files; give one of them")
    return _with_states(urls)


def _with_states(urls: Sequence[str]) -> list[RemoteShard]:
    """Return shards with their states, for which each of them is asked; the first error ends it."""

    def shard(url: str) -> RemoteShard:
        state = state_of(url)
        return RemoteShard(f"{url}#{state.version}", state.size, state.version)

    return map_in_threads(shard, urls, REQUESTS_AT_ONCE, "state of the shards")


def _in_store(name: str) -> list[RemoteShard]:
    protocol, _, rest = name.partition("://")
    if has_wildcard(rest.partition("/")[0]):
        raise UserError(f"{printable(name)}: buckets are not listed; write the name of the bucket without *, ? and [")
    urls = _named(name, find_in_store, exact=lambda url: [url])
    return _with_states(_of_one_kind(urls, name))


def _named(name: str, find: Callable[[str], Sequence[str]], exact: Callable[[str], Sequence[str]]) -> list[str]:
    """Return the files that a name with ranges stands for.

    Args:
        find: returns the files that match a pattern with *, ? or [, or that are in a folder.
        exact: returns the file with this name in a list; the list is empty if it is known not to exist.

    Raises:
        UserError: a file, folder or pattern is not there: of a range, all shards have to exist.
    """
    files: dict[str, None] = {}
    for one in expanded(name):
        found = exact(one) if suffix_of(one) in SUFFIXES and not has_wildcard(one) else find(one)
        if not found:
            raise UserError(f"there is nothing at {printable(one)}, which is part of {printable(name)}; check the name")
        files.update(dict.fromkeys(found))
    return list(files)


def _of_one_kind(names: Iterable[str], source: str) -> list[str]:
    """Return the tar files, or the Parquet files without any tar files. Raises UserError if both are missing."""
    names = [name for name in names if not PurePosixPath(name).name.startswith((".", "_"))]
    for suffix in SUFFIXES:  # img2dataset writes a table of each tar file beside it
        if found := sorted(name for name in names if suffix_of(name) == suffix):
            return found
    raise UserError(
        f"--streaming true reads shards (tar files of WebDataset, or Parquet files), and {printable(source)} has none"
    )


def _parts_of_hub_url(name: str) -> tuple[str, str | None, str | None]:
    """Return the repository, the revision if there is one, and the path in hf://datasets/user/name@revision/path; the
    path is None for user/name."""
    if not name.startswith("hf://"):
        return name, None, None
    found = re.fullmatch(rf"{HUB}([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", name)
    if not found:
        raise UserError(f"{printable(name)} is not a dataset on the Hub; write it as {HUB}user/name/folder/*.tar")
    return found[1], found[2] and found[2].replace("%2F", "/"), (found[3] or "").rstrip("/")


def _on_hub(name: str, config_name: str | None, commit: str) -> list[RemoteShard]:
    from huggingface_hub import HfApi

    repo, _, path = _parts_of_hub_url(name)
    with _hub_errors(repo):
        tree = HfApi().list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)
        files = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
    splits: dict[str, Any]
    if path is None:
        splits = _splits_of(repo, config_name, commit)
    else:
        splits = dict.fromkeys(_named(path, functools.partial(_find_in, files), lambda file: [file] * (file in files)))
    known = {file: split for file, split in splits.items() if file in files and suffix_of(file) in SUFFIXES}
    # `datasets` may take the files that img2dataset writes beside its tar files for the data.
    beside = all(str(PurePosixPath(file).with_suffix(".tar")) in files for file in known)
    if path is None and config_name is None and beside and not any(suffix_of(file) == ".tar" for file in known):
        known = {file: splits.get(file) for file in files if suffix_of(file) == ".tar"}
    shards = []
    for file in _of_one_kind(known, name):
        about: Any = files[file]
        version = version_of(about.size, about.lfs.sha256 if about.lfs else about.blob_id)
        shards.append(RemoteShard(f"{HUB}{repo}@{commit}/{file}", about.size, version, known[file]))
    return shards


def _find_in(files: Iterable[str], name: str) -> list[str]:
    """Return the files of a repository that match a pattern, or that are in a folder."""
    if has_wildcard(name):
        return [file for file in files if fnmatch.fnmatchcase(file, name)]
    return [file for file in files if not name or file.startswith(f"{name}/")]


def _splits_of(repo: str, config_name: str | None, commit: str) -> dict[str, str]:
    """Return the files of a dataset on the Hub with their splits, as `datasets` finds them."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(repo, config_name, revision=commit)
    except ValueError as error:
        known = re.findall(r"'([\w.-]+)'", str(error))
        raise UserError(
            f"the dataset {repo} cannot be opened ({cause(error)}){nearest(config_name or '', known)}; choose one of "
            "its configurations with --dataset_config_name"
        ) from None
    except (OSError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"the dataset {repo} cannot be opened ({cause(error)}); check --dataset_name") from None
    prefix = f"{HUB}{repo}@{commit}/"
    found = builder.config.data_files or {}
    return {str(file).removeprefix(prefix): str(split) for split, files in found.items() for file in files}
