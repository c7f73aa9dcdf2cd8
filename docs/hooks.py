# SPDX-License-Identifier: Apache-2.0
"""Hooks of the documentation site.

Documents link to code, configurations and results by relative paths, which work where the repository is browsed. The site holds
only docs/. Each linked file outside of it is therefore copied to source/ in the site; with `repo_url` in mkdocs.yml, the link
leads there instead. Three documents at the root of the repository also become pages.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {each: f"project/{each.lower()}" for each in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
"""Documents at the root of the repository, and the pages that they become."""
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Any, config: Any) -> Any:
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    uri = page.file.src_uri
    origin = next((source for source, root_page in ROOT_PAGES.items() if root_page == uri), f"docs/{uri}")

    def rewrite(link: re.Match[str]) -> str:
        target = os.path.normpath(Path(origin).parent / link[1])
        is_page = target in ROOT_PAGES or target.startswith("docs/")
        if not (ROOT / target).is_file() or (target.endswith(".md") and not is_page):
            log.warning("%s links to %s, which is not a file, or a document that is no page", origin, target)
            return link[0]
        return _site_link(target, uri, config, files) + (link[2] or "")

    return _LINK.sub(rewrite, markdown)


def _site_link(target: str, uri: str, config: Any, files: Any) -> str:
    """The link from the page `uri` to `target`, a file of the repository."""
    if target in ROOT_PAGES or target.startswith("docs/"):
        place = ROOT_PAGES.get(target, target.removeprefix("docs/"))
    elif config.repo_url:
        return f"{config.repo_url.rstrip('/')}/blob/main/{target}"
    else:
        place = f"source/{target}"
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
    return os.path.relpath(place, Path(uri).parent)
