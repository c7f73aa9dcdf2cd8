# SPDX-License-Identifier: Apache-2.0
"""The model that a user names on the command line of a tool."""

from pathlib import Path

from sage_backend.engine.checkpoint import check_model_folder


def check_model(model: str) -> None:
    """Check a model's folder or name before anything is started for it.

    Raises ValueError, in one line, for a folder that is not there or holds no model. What may be a name on a hub, and files and
    URLs, are left to vLLM.
    """
    path = Path(model)
    if path.is_dir():
        check_model_folder(path)
    elif not path.is_file() and "://" not in model and not _may_be_on_a_hub(model):
        raise ValueError(f"there is no model folder {model}")


def _may_be_on_a_hub(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError  # not at the top: slow to import, and most models are folders
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~"))
