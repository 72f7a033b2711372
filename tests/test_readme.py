"""What README, docs and notebooks quote and link to is what is there."""

import inspect
import json
import re
import textwrap
from pathlib import Path

from standin import ROOT

from controlnet import ControlNet

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("models/*/README.md")]


def prose(path: Path) -> str:
    """A page's Markdown without its blocks of code; a notebook's too."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub("^```.*?^```", "", text, flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall("^#+ (.*)", prose(path), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_ten_lines_are_the_code():
    code = textwrap.dedent(inspect.getsource(ControlNet.residuals)).splitlines()
    docstring = next(i for i, line in enumerate(code) if '"""' in line)
    block = "\n".join(code[:docstring] + code[docstring + 1 :])
    assert f"```python\n{block}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    """A notebook's, if they are [`Class.function`](../file.py), to a file with both."""
    pattern = r"(?:\[([^\[\]]*))?\]\((?!https?:)([^)]+)\)"
    links = [(page, *link) for page in (*PAGES, *NOTEBOOKS) for link in re.findall(pattern, prose(page))]
    assert len(links) > 50
    for page, label, link in links:
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists() and (not heading or heading in anchors(target)), (page, link)
        if page in NOTEBOOKS and target.suffix == ".py" and label != f"`{target.name}`":
            for name in label.strip("`").split("."):
                assert re.search(rf"^ *(def|class) {name}\b|^{name}\b.* = ", target.read_text(), re.M), (label, link)
    for page in NOTEBOOKS:  # its contents lead to all headings but the title
        assert len(anchors(page) - {link.removeprefix("#") for place, _, link in links if place == page}) == 1, page


def test_named_tests_exist():
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    named = [name for page in PAGES for name in re.findall(r"`(test_\w+)`", prose(page))]
    assert len(named) > 10
    for name in named:
        assert f"def {name}(" in tests, name
