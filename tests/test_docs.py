"""What the documents say is there is there, and the examples that need no download run."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_tree_in_the_readme_exists():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    folders: list[tuple[int, Path]] = []
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = (folders[-1][1] if folders else ROOT) / name
        assert path.exists(), f"the README names {path.relative_to(ROOT)}, which is not there"
        if name.endswith("/"):
            folders.append((indent, path))


def test_primitives_example_runs_and_trains_the_adapter_alone():
    torch.manual_seed(0)
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs/primitives.md").read_text(), re.S).group(1)
    names: dict = {}
    exec(example, names)
    assert names["out"].shape == (5, 128)
    assert names["out"].dtype == torch.float32
    trained = {name for name, p in names["layer"].named_parameters() if p.grad is not None}
    assert trained == {f"{part}_lora_{factor}" for part in ("gate_up", "down") for factor in "AB"}
