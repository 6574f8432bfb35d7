"""Files of the Hugging Face hub: downloaded, or found in its cache, with errors of one line.

folder = snapshot("BeIR/scifact", kind="dataset", patterns=["corpus.jsonl.gz"], where="beir:scifact: ")
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def snapshot(
    repository: str,
    *,
    patterns: Sequence[str],
    where: str,
    revision: str | None = None,
    kind: Literal["model", "dataset"] = "model",
    local_files_only: bool = False,
) -> Path | None:
    """The folder in the hub's cache with those files of a repository that match `patterns`, as far as there are any.

    Args:
        where: what an error begins with.
        revision: commit, tag or branch; None: the default branch.
        local_files_only: return None if the cache lacks the repository, instead of asking the hub.

    Raises `ValueError` if the hub has no such repository or revision, cannot be reached, or breaks off."""
    from huggingface_hub import constants

    if local_files_only and not (Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}").is_dir():
        return None
    import huggingface_hub  # here, because it takes a fifth of a second and local folders do not need it
    from huggingface_hub import errors, utils

    # Version 1 raises this when a connection is lost for good; earlier versions raise OSError.
    lost = (utils.httpx.HTTPError,) if hasattr(utils, "httpx") else ()
    level = utils.logging.get_verbosity()
    utils.logging.set_verbosity_error()  # it warns of each retry; what comes of them is raised below
    hides_bars = os.environ.get("EMBEDFT_PROGRESS") == "0" and not utils.are_progress_bars_disabled()
    if hides_bars:
        utils.disable_progress_bars()
    try:
        options = {"repo_type": kind, "allow_patterns": list(patterns), "local_files_only": local_files_only}
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, **options))
    except errors.LocalEntryNotFoundError:
        if local_files_only:
            return None
        raise ValueError(f"{where}not in the hub's cache, and the hub cannot be reached") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{where}no such {kind} on the hub (a private one needs HF_TOKEN)") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{where}the hub has no revision {revision or 'main'!r} of this {kind}") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ValueError(f"{where}the hub says: {' '.join(str(error).split())}") from None
    except lost as error:
        raise ValueError(f"{where}lost the connection to the hub, try again: {error}") from None
    finally:
        utils.logging.set_verbosity(level)
        if hides_bars:
            utils.enable_progress_bars()
