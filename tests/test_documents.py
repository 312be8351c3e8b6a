"""The README and the docs run: every python block, page by page, as a reader would paste them."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for code in blocks(page):
            exec(compile(code, str(page), "exec"), space)
    assert space


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", prose):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_house_imports_downwards():
    """Data flows metric -> tape -> curvature -> control -> optim; nothing below imports from above."""
    rooms = ["manifolds", "metric", "tape", "curvature", "control", "optim"]
    faces = ["modules", "problems", "cli", "plotting"]
    for k, room in enumerate(rooms):
        for file in (ROOT / "src" / "pullback" / room).rglob("*.py"):
            used = set(re.findall(r"^\s*(?:from|import) pullback\.(\w+)", file.read_text(encoding="utf-8"), re.M))
            assert not used & {*rooms[k + 1 :], *faces}, f"{file.name} imports upwards: {used}"
