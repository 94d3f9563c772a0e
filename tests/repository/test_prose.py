"""The words of comments, docstrings, messages, configs, templates and documents: the field's own, in full sentences.

python tests/repository/test_prose.py    lists every place where a turn of phrase is used that has a plainer form
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_TURNS = 25  # the rest are prompts, test data and pictures on posters
# A poster has pictures on it, and a brief says how many: there the word is the name of a thing.
OF_POSTERS = re.compile(
    r"^(data_scripts/(posters|make_posters|controls)|configs/briefs|training/(metrics/(posters|cycle)|innovation/)|"
    r"pipelines/(common/(poster_domain|design_brief|layout_pictures)|analyze|layout_analysis)|"
    r"model_cards/(trained/|layout_encoder|grammar_abstractor|poster_decoder)|"
    r"docs/(design/)?(data|decoder|encoder|abstractor|innovation|controlnet)|tests/(data_scripts|innovation|metrics/test_(posters|cycle)|pipelines/test_design_brief))"
)
TURNS = {
    "picture": r"\bpictures?\b",
    "figures": r"\bfigures\b",
    "go on with": r"\bgo(es|ing|ne)? on with\b",
    "averages": r"\b(the|of|these|their|weight) averages\b",
    "wanted": r"\bwanted\b",
    "found, of predictions": r"\b(as found|found (values?|masks?|classes|pixels))\b",
    "told": r"\b(is|are|was|be) told\b",
    "so many": r"\bso many\b",
    "at the least": r"\bat the least\b",
    "mend": r"\bmend(s|ed|ing)?\b",
    "anew": r"\banew\b",
    "says nothing to": r"\bsays? nothing to\b",
    "is no X": r"\b(is|are|was|were) no (?!longer|more|less|different|better|worse|other\b)[a-z]+",
    "had from": r"\bbe had from\b",
}
GENITIVE = re.compile(r"^(Of|For whom|To whom|Whose)\b")
TEXT = {".md", ".jinja", ".yaml", ".toml", ".sh", ""}


def sources() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    kept = [n for n in names if Path(n).suffix in TEXT | {".py"} and not n.endswith(("docs/LOG.md", "test_prose.py"))]
    return [ROOT / name for name in kept if (ROOT / name).exists() and not name.endswith("LICENSE")]


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of docstrings, and of the strings under fields of classes, which `--help` shows."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in node.body:
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)):
                    continue
                if isinstance(part.value.value, str):
                    yield part.lineno, part.value.value


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of what people read in a file: of code, its comments and the strings that are sentences."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        fenced = False
        for number, line in enumerate(text.splitlines(), 1):
            fenced ^= line.lstrip().startswith("```")
            if path.suffix in {".yaml", ".toml", ".sh", ""}:
                line = line.partition("#")[2]
            if not fenced:
                yield number, re.sub(r"`[^`]*`|\{\{.*?\}\}|\]\([^)]*\)", " ", line)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            for offset, line in enumerate(node.value.splitlines()):
                yield node.lineno + offset, re.sub(r"`[^`]*`", " ", line)


def turns(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str, str]]:
    """Yield (line, turn, text) of every turn of phrase in a file that has a plainer form."""
    name = path.relative_to(root).as_posix()
    for line, text in prose(path):
        for turn, pattern in TURNS.items():
            if turn == "picture" and OF_POSTERS.match(name):
                continue
            for _ in re.finditer(pattern, text, re.IGNORECASE):
                yield line, turn, text.strip()


def genitives(path: Path) -> Iterator[tuple[int, str]]:
    if path.suffix == ".py":
        for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            if GENITIVE.match(text.strip()):
                yield line, text.strip().splitlines()[0]


def test_terms_are_those_of_the_field():
    listed = [(path.relative_to(ROOT), *rest) for path in sources() for rest in turns(path)]
    assert len(listed) <= MOST_TURNS, "\n".join(f"{path}:{line}: {turn}: {text}" for path, line, turn, text in listed)


def test_no_docstring_begins_with_a_genitive():
    listed = [f"{path.relative_to(ROOT)}:{line}: {text}" for path in sources() for line, text in genitives(path)]
    assert not listed, "\n".join(listed)


@pytest.mark.parametrize(("text", "turn"), [("# a picture is read", "picture"), ('"""It is no number."""', "is no X")])
def test_a_turn_would_be_noticed(tmp_path, text, turn):
    (tmp_path / "code.py").write_text(text + "\n")
    assert [name for _, name, _ in turns(tmp_path / "code.py", tmp_path)] == [turn]


if __name__ == "__main__":
    listed = [(path, *rest) for path in sources() for rest in turns(path)]
    for path, line, turn, text in listed:
        print(f"{path.relative_to(ROOT)}:{line}: {turn}: {text}")
    count = sum(len(list(genitives(path))) for path in sources())
    print(f"{len(listed)} turns, {count} docstrings begin with a genitive")
