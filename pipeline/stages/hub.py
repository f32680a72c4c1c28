"""Files of repositories on the Hugging Face hub, downloaded once into its cache. One way for models and SAEs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sae.errors import ConfigError

HUB = "hf://"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/(.*))?")


def fetch_file(repo: str, file: str, setting: str, revision: str | None = None) -> Path:
    """Download (or find in the cache) one file; ConfigError names the `setting`."""
    from huggingface_hub import hf_hub_download

    return _fetch(lambda: hf_hub_download(repo, file, revision=revision), setting)


def fetch_folder(repo: str, folder: str, names: tuple[str, ...], setting: str, revision: str | None = None) -> Path:
    """Download the files of these names that `folder` of the repository has; the local folder."""
    from huggingface_hub import snapshot_download

    wanted = [f"{folder}/{name}" if folder else name for name in names]
    root = _fetch(lambda: snapshot_download(repo, allow_patterns=wanted, revision=revision), setting)
    if not any((root / name).is_file() for name in wanted):
        raise ConfigError(
            f"{setting}: the repository has none of {', '.join(wanted[:4])}, ... ; name a folder or a file in it"
        )
    return root / folder


def parse_address(address: str) -> tuple[str, str | None, str]:
    """`hf://owner/repo[@revision][/path]` as (owner/repo, revision, path).

    ConfigError for anything else, a path that leaves the repository included.
    """
    match = _ADDRESS.fullmatch(address)
    path = (match[3] or "").rstrip("/") if match else ""
    if not match or any(part in ("", ".", "..") for part in path.split("/") if path):
        raise ConfigError(f"{address[:120]!r}: expected hf://owner/repo, or hf://owner/repo/path")
    return match[1], match[2], path


def _fetch(download: Callable[[], str], setting: str) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(download())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{setting}: cannot be had from the hub ({reason})") from error
