"""The rules of language find what they are for, in pages, comments, docstrings and messages, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import language


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(language, "ROOT", tmp_path)

    def findings(name: str, text: str) -> list[str]:
        (tmp_path / name).write_text(text)
        return language.findings([tmp_path / name])

    return findings


def test_the_repository_has_no_finding() -> None:
    assert language.findings(language.tracked()) == []


@pytest.mark.parametrize(
    ("name", "text", "rule", "line"),
    [
        ("page.md", "# A page\n\nThe file is in a folder.\n", "Terms", 3),
        ("page.md", "The run goes on.\n", "Terms", 1),
        ("page.md", "3.2 ms an image\n", "Rates", 1),
        ("module.py", '"""What became of a tensor."""\n', "Docstrings", 1),
        ("module.py", 'def f():\n    """Return it.\n\n    Rank 0 knows it.\n    """\n', "Verbs", 4),
        ("module.py", 'class A:\n    a: int\n    """whether rank 0 asks"""\n', "Verbs", 3),
        ("module.py", "x = 1  # Ray says so\n", "Verbs", 1),
        ("module.py", 'raise ValueError(f"{x} is in no folder; leave out {y}.")\n', "Terms", 1),
        ("kernel.cu", "int x;  // the host knows it\n", "Verbs", 1),
        ("job.yaml", "a: 1  # six objects an image\n", "Rates", 1),
    ],
)
def test_a_finding_has_its_rule_and_line(found, name: str, text: str, rule: str, line: int) -> None:
    assert found(name, text)[0].startswith(f"{name}:{line}: {rule}: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", "```\nmkdir folder\n```\n\n`folder` and [a directory](folder/is-there.md) exist.\n"),
        ("page.md", "It takes 3 ms per image, and has an image of a step.\n"),
        ("module.py", 'def tell(folder):\n    """Write to `folder`."""\n    return folder["folder"]\n'),
        ("module.py", 'PROGRAM = """\nimport sys\nsaid = sys.argv\n"""\n'),
        ("picture.svg", "<text>folder</text>"),
    ],
)
def test_code_and_plain_words_are_none(found, name: str, text: str) -> None:
    assert found(name, text) == []


def test_rules_are_those_of_vale() -> None:
    """The keys that Vale requires of a rule; `substitution` swaps, `existence` lists."""
    import yaml

    for path in language.RULES.glob("*.yml"):
        rule = yaml.safe_load(path.read_text())
        patterns = {"substitution": "swap", "existence": "tokens"}[rule["extends"]]
        assert rule.keys() == {"extends", "message", "level", "ignorecase", patterns}
        assert rule["message"].count("%s") == (2 if patterns == "swap" else 1)
