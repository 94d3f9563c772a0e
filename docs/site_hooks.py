"""Hooks of the documentation site: links to files outside docs/ lead to their pages on the site."""

from __future__ import annotations

import posixpath
import re

OUTSIDE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "configs/experiments/latent_diffusion/ablation/README.md": "ablation.md",
    "configs/experiments/autoencoder/phase1/README.md": "phase1.md",
    "notebooks/quickstart.ipynb": "notebooks/quickstart.md",
    "notebooks/use_a_shared_model.ipynb": "notebooks/use_a_shared_model.md",
}
"""Markdown files and notebooks outside docs/ that are pages of the site, and the names of the pages."""
LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Return the text of a guide with links as the site needs them (mkdocs calls this)."""
    uri = page.file.src_uri
    return markdown if uri in OUTSIDE.values() else with_links_of_the_site(markdown, f"docs/{uri}", uri)


def with_links_of_the_site(markdown: str, source: str, page: str) -> str:
    """Return a Markdown text in which each link to a file of the repository leads to a page of the site.

    Args:
        source: path of the text in the repository.
        page: path of its page on the site. A link to a file that has no page becomes plain text.
    """

    def changed(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif target in OUTSIDE:
            target = OUTSIDE[target]
        else:
            return link["text"][1:-1]
        return f"{link['text']}({posixpath.relpath(target, posixpath.dirname(page) or '.')}{link['anchor'] or ''})"

    return LINK.sub(changed, markdown)
