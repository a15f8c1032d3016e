"""What `mkdocs build` needs beside the pages: those outside docs/, and lists in docstrings.

On GitHub a link leads from file to file of the repository. On the site the same file tree is kept,
with docs/ as its root, so a link into docs/ loses that part, and a link to a file that is no page
becomes plain text.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "kernels/README.md")
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)#:]+)(#[^)]*)?\)")
PARAMETER = re.compile(r"(\w+(?:, \w+)*(?:\([^)]*\))?)(:| \(|, )")


def on_files(files, config):
    for path in OUTSIDE:
        content = (ROOT / path).read_text()
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    if here not in OUTSIDE:
        here = f"docs/{here}"

    def rewrite(match):
        image, text, target, anchor = match.groups()
        path = normpath(PurePosixPath(here).parent / target)  # in the repository
        at = path.removeprefix("docs/") if path not in OUTSIDE else path
        if files.get_file_from_path(at) is None:
            return text
        up = "../" * page.file.src_uri.count("/")
        return f"{image}[{text}]({up}{at}{anchor or ''})"

    return LINK.sub(rewrite, markdown)


class Lists(griffe.Extension):
    """Docstrings name a parameter at the start of a line, as in `x: (batch, in_features)`, with
    what goes on indented: a list in Markdown."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = as_lists(obj.docstring.value)


def as_lists(text: str) -> str:
    lines, before = [], ""
    for line in text.splitlines():
        if match := re.match(r"(\w+(?:, \w+)*)(\([^)]*\))?: ", line):
            if not before.startswith(("- ", "    ")):
                lines.append("")
            name = "".join(filter(None, match.groups()))
            line = f"- `{name}`: {line[match.end() :]}"
        elif before.startswith(("- ", "    ")) and line and not line.startswith(" "):
            lines.append("")
        lines.append(line)
        before = line or before
    return "\n".join(lines)
