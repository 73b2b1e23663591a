"""The site has the repository's own tree, so that a relative link works in both."""

from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# What becomes a page or may be linked from one; no page of the site is a copy of another file.
SHOWN = (
    "*.md",
    "LICENSE",
    "CITATION.cff",
    "docs/*.md",
    "docs/*.png",
    "notebooks/*.ipynb",
    "allo_lib/**/*.py",
    "allo_lib/profiles/*.yaml",
    "results/*.md",
    "results/*.html",
    "results/*/*.*",
    "results/*/figures/*.png",
    "results/*/tables/*.*",
)


@event_priority(100)  # before mkdocs-jupyter, which takes its notebooks out of these files
def on_files(files, config):
    """Let the site's pages be the folder's own, and the results those of the repository."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted({path for pattern in SHOWN for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        if "/." in name:  # a store
            continue
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
