"""An adapter with its card, put on the Hugging Face hub."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: its client's, without network
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)

from mllm_keeplora.continual.edits import edit
from mllm_keeplora.continual.saved_run import SavedRun
from mllm_keeplora.errors import ConfigError, KeepLoRAError
from mllm_keeplora.reports.card import write_card
from mllm_keeplora.resources import find
from mllm_keeplora.runs.files import check_hashes
from mllm_keeplora.runs.run_directory import CARD_FILES


class PushError(KeepLoRAError, RuntimeError):
    """What the hub has refused."""


class Pushed(NamedTuple):
    """What was put on the hub, or would be.

    Attributes:
        files: name -> bytes.
        url: of the commit; None for a dry run.
        warning: what a reader of the repository will miss; None where all is there.
    """

    files: dict[str, int]
    url: str | None
    warning: str | None


def push(
    run: SavedRun, repo: str, *, stage: int | str | None = None, private: bool = False, dry_run: bool = False
) -> Pushed:
    """Puts the adapter's folder on the hub, in one commit; its card is written anew and loads it from there.

    A card that was edited in the run's folder is not sent: the one that is sent says where to load the adapter from.

    Args:
        run: a run at its end, or what `edit` has made of one.
        repo: `USER/NAME` on the hub; it is made if missing.
        stage: the adapter as it was after this stage, by number or task; None takes the last.
        private: whether a repository that is made is private.
        dry_run: send nothing; see what would be sent.

    Raises:
        ConfigError: a name that the hub does not take.
        PushError: the hub's refusal, such as a login that is missing.
        EditError, ArtifactError: no such stage, or files that were changed.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(f"{repo!r} is no name on the hub: expected USER/NAME, of letters, digits, '-', '_' and '.'")
    with TemporaryDirectory() as scratch:
        copy = edit(run, Path(scratch) / "run", stage=stage) if run.edit is None or stage else run
        if copy is run:
            check_hashes(run.directory.adapter_hashes, "make the adapter again", CARD_FILES)
        write_card(copy, repo)
        folder = copy.directory.adapter
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        return Pushed(files, None if dry_run else _upload(folder, repo, private, files), _missing_base(run))


def _upload(folder: Path, repo: str, private: bool, files: dict[str, int]) -> str:
    api = HfApi(library_name="mllm-keeplora")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(files), commit_message="Adapter and model card"
        )
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is no name on the hub: {error}") from error
    except OfflineModeIsEnabled as error:
        raise PushError(f"{error}; unset HF_HUB_OFFLINE to push") from error
    except (HfHubHTTPError, OSError) as error:
        said = " ".join(str(error).split())
        raise PushError(
            f"{repo} cannot be written: {said}. Log in by `hf auth login`, or set HF_TOKEN to a token that may write"
        ) from error
    except HTTPError as error:
        raise PushError(
            f"{repo} cannot be written: {type(error).__name__}: {error}. See to the network and push again, or copy "
            "the run to a machine that has one and push there"
        ) from error
    return str(commit.commit_url)


def _missing_base(run: SavedRun) -> str | None:
    base = run.config.model.base_model
    if not find(base).is_dir():
        return None
    return f"the base {base} is a folder here, not on the hub: nobody else can load the adapter without it"
