"""What `mkdocs build` does beyond docs/: pages that lie elsewhere, and lists in docstrings.

On GitHub a link leads from file to file of the repository. The site has docs/ as its root, so a
link into docs/ loses that part, and one to a file that is no page becomes plain text.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "kernels/README.md")
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files, config):
    for path in OUTSIDE:
        content = (ROOT / path).read_text()
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri  # on the site
    folder = PurePosixPath(here if here in OUTSIDE else f"docs/{here}").parent

    def rewrite(match):
        image, text, target, anchor = match.groups()
        there = normpath(folder / target).removeprefix("docs/")
        if files.get_file_from_path(there) is None:
            return text
        return f"{image}[{text}]({'../' * here.count('/')}{there}{anchor or ''})"

    return LINK.sub(rewrite, markdown).replace('src="docs/', 'src="')


class Lists(griffe.Extension):
    """Docstrings name a parameter at the start of a line, as in `x: (batch, in_features)`, with
    what goes on indented: a list in Markdown."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = as_lists(obj.docstring.value)


def as_lists(text: str) -> str:
    lines, before = [], ""
    for line in text.splitlines():
        in_list = before.startswith(("- ", "    "))
        if match := re.match(r"\w+(, \w+)*(\([^)]*\))?(?=: )", line):
            if not in_list:
                lines.append("")
            line = f"- `{match[0]}`{line[match.end() :]}"
        elif in_list and line and not line.startswith(" "):
            lines.append("")
        lines.append(line)
        before = line or before
    return "\n".join(lines)
