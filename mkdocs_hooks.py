"""Pages that lie beside docs/ become pages of the site, and links lead to them there as they do in the repository."""

import re
from pathlib import Path

from mkdocs.structure.files import File

BESIDE = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files, config):
    root = Path(config.config_file_path).parent
    for name in BESIDE:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri in BESIDE:
        return markdown.replace("](docs/", "](")
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, BESIDE))})", r"](\1", markdown)
