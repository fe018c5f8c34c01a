"""What the documents name exists: files, config keys, subcommands and their options."""

import re
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from sharpmask_d2 import add_sharpmask_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# These parts record measurements of models and commands that are no longer in the package.
HISTORY = {
    "CHANGELOG.md": r"## 0\.2\.0.*",
    "ablations.md": r"## Proposals of version 0.1.*",
    "performance.md": r"## Proposals.*",
}
FOLDERS = "benchmarks|configs|docs|sharpmask_d2|tests|tools"


def read(page: Path) -> str:
    """The text of a page without the parts that record history."""
    text = page.read_text(encoding="utf-8")
    return re.sub(HISTORY[page.name], "", text, flags=re.DOTALL) if page.name in HISTORY else text


def commands(text: str) -> list:
    """The words of each `sharpmask` command in a page's blocks of shell commands."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        lines = block.replace("\\\n", " ").split("\n")
        found += [line.split() for line in lines if re.match(r"(\.venv/bin/)?sharpmask ", line)]
    return found


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    names = set(re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w/.*-]*[\w/*])", read(page)))
    missing = sorted(name for name in names if not (list(ROOT.glob(name)) if "*" in name else (ROOT / name).exists()))
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    # Those within docs/ are checked by the build of the site, too; those of the other pages only here.
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_config_keys_that_a_page_names_exist(page):
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    keys = set(re.findall(r"(?<![\w.])((?:MODEL|INPUT|DATASETS|SOLVER)(?:\.[A-Z0-9_]+)+)(?![\w*])", read(page)))
    missing = []
    for key in keys:
        node = cfg
        for word in key.split("."):
            if word not in node:
                missing.append(key)
                break
            node = node[word]
    # Names that end in _ stand for several keys, such as DATASETS.PROPOSAL_FILES_*.
    assert not sorted(key for key in missing if not key.endswith("_"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_have_the_options_that_it_gives(page, monkeypatch, capsys):
    found = commands(read(page))
    if not found:
        pytest.skip("the page has no command")
    installed = list(entry_points(group="console_scripts", name="sharpmask"))
    if not installed:
        pytest.skip("the command `sharpmask` is not installed: run make test or pip install -e .")
    main = installed[0].load()
    for words in found:
        monkeypatch.setattr(sys, "argv", ["sharpmask", words[1], "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr().out
        assert ended.value.code in (0, None), f"sharpmask {words[1]}: there is no such subcommand"
        missing = [word for word in words if word.startswith("--") and not re.search(rf"{word}\b", shown)]
        assert not missing, f"sharpmask {words[1]}"
