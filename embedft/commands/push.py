"""`embedft push`: uploads a model folder, with its model card, to the Hugging Face hub.

embedft push runs/first/model me/my-model --private
"""

from dataclasses import dataclass
from pathlib import Path

from .. import config
from ..config import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class Options(config.Options):
    folder: str = option(REQUIRED, "model folder, such as a run's model/", metavar="FOLDER", positional=True)
    repository: str = option(REQUIRED, "user or organisation, and a name", metavar="USER/NAME", positional=True)
    private: bool = option(False, "make a new repository private")
    revision: str | None = option(None, "branch to commit to [main]")


def run(options: Options) -> None:
    """Uploads the folder, and prints the commit's address."""
    from ..encoders.push import push_folder

    print(push_folder(Path(options.folder), options.repository, private=options.private, revision=options.revision))
