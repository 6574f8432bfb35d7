"""Uploads a model folder to the Hugging Face hub.

push_folder(Path("runs/first/model"), "me/my-model", private=True)
"""

import os
from pathlib import Path

from .folder import read_config
from .loading import check_place, is_static, weights_of
from .modules import split_modules
from .schema import LORA_CONFIG_FILE, read_fields


def push_folder(folder: Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a model folder to the hub as the model `name` ("user/model"), creating it if necessary, in one commit;
    returns the commit's address. Raises `ValueError` for what is not a model folder, for LoRA whose base others could
    not find, or with what the hub says."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    check_place(folder)
    for modules in split_modules(folder)[0].values():
        first = modules[0].folder if modules else folder
        if not is_static(first, modules):
            read_config(weights_of(first))
        base = read_fields(first / LORA_CONFIG_FILE).get("base_model_name_or_path")
        if base and os.path.isdir(base):
            found = f"base_model_name_or_path is {base!r}, a folder that only this machine has"
            raise ValueError(f"{first / LORA_CONFIG_FILE}: {found}: put the base's name on the hub there")
    if name.count("/") != 1:
        raise ValueError(f"repository is {name!r}, expected a user or organisation and a name, as in user/model")
    import huggingface_hub
    from huggingface_hub import errors, utils

    lost = (utils.httpx.HTTPError,) if hasattr(utils, "httpx") else ()
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        options = {"commit_message": "Upload a model", "revision": revision, "ignore_patterns": [".*", "*.tmp"]}
        return str(api.upload_folder(repo_id=name, folder_path=folder, **options).commit_url)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, *lost) as error:
        hint = " (log in with `hf auth login`, or set HF_TOKEN)" if "401" in str(error) else ""
        raise ValueError(f"{name}: the hub says: {' '.join(str(error).split())[:300]}{hint}") from None
