import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import shapes

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("rftjax/**/*.py"))
PROGRAMS = sorted([*SOURCES, *ROOT.glob("experiments/**/*.py"), *ROOT.glob("scripts/**/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
MAX_LINES = 500

# Heavy libraries, each with the modules that may import it, so that it is replaced or updated in one place.
OWNERS = {
    "datasets": {"tasks.sources"},
    "gguf": {"weights.gguf"},
    "httpx2": {"environments.mcp_servers"},
    "huggingface_hub": {"tasks.sources", "weights.directories"},
    "mcp": {"environments.mcp_servers"},
    "orbax": {"run.checkpoint"},
    "safetensors": {"weights.shards"},
    "starlette": {"serving.app", "serving.tracing"},
    "tensorboard": {"monitor.events"},
    "tokenizers": {"text.gguf_tokenizer", "text.rank_tokenizer"},
    "transformers": {"text.tokenizer"},
    "uvicorn": {"serving.server"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "rftjax").with_suffix("").parts)


def names_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields variables, parameters, keywords and attributes with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno


def legend() -> set[str]:
    """The letters that the docstring of rftjax/types.py explains, as "B sequences"."""
    doc = ast.get_docstring(ast.parse((ROOT / "rftjax/types.py").read_text())) or ""
    paragraph = doc.partition("Shape suffixes")[2].partition("\n\n")[0]
    letters = set(re.findall(r"\b([A-Z]) [a-z]", paragraph))
    assert {"B", "T", "V", "D", "L"} <= letters
    return letters


def strange_suffixes(tree: ast.AST, letters: set[str]) -> list[str]:
    found = []
    for name, line in names_in(tree):
        strange = {c for c in shapes.suffix(name) if not c.isdigit()} - letters
        if strange:
            found.append(f"line {line}: {name}: {', '.join(sorted(strange))}")
    return found


def strange_einsums(tree: ast.AST, letters: set[str]) -> list[str]:
    """Capital letters outside the legend; small ones are axes that have no name outside the product."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("einsum"):
            for argument in node.args[:1]:
                text = argument.value if isinstance(argument, ast.Constant) else ""
                strange = set(re.findall("[A-Z]", str(text))) - letters
                if strange:
                    found.append(f"line {node.lineno}: {text}: {', '.join(sorted(strange))}")
    return found


def test_shape_suffixes_and_einsums_use_the_letters_of_the_legend():
    letters = legend()
    for path in PROGRAMS:
        tree = ast.parse(path.read_text())
        strange = strange_suffixes(tree, letters) + strange_einsums(tree, letters)
        assert not strange, (
            f"{path.relative_to(ROOT)}: not in the legend of rftjax/types.py: {strange}"
        )


def test_strange_letters_are_found():
    tree = ast.parse("x_BQ = f(y_BT, MAX_LOG=1)\njnp.einsum('BTD,DZ->BTZ,r', x_BQ, a)")
    assert strange_suffixes(tree, set("BTD")) == ["line 1: x_BQ: Q", "line 2: x_BQ: Q"]
    assert strange_einsums(tree, set("BTD")) == ["line 2: BTD,DZ->BTZ,r: Z"]


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        ({"x_BT": np.zeros((2, 3)), "y_B": np.zeros(2), "z_B1": np.zeros((2, 1))}, ""),
        ({"x_BT": np.zeros(3)}, "x_BT has shape (3,)"),
        ({"x_BT": np.zeros((2, 3)), "y_B": np.zeros(3)}, "B is 3 in y_B and 2 in x_BT"),
        ({"z_B1": np.zeros((2, 3))}, "z_B1 has shape (2, 3)"),
        ({"MAX_B": np.zeros((2, 3)), "count_B": 3}, ""),
    ],
)
def test_names_are_compared_with_shapes(names, fault):
    assert shapes.faults(names) == ([fault] if fault else [])


def test_the_functions_that_tests_run_are_watched(watch):
    if sys.version_info < (3, 12):
        pytest.skip("needs sys.monitoring")
    from rftjax import grpo

    before = watch.checked
    grpo.policy_loss(np.zeros((2, 3)), np.ones((2, 3), bool), np.zeros(2))
    assert watch.checked > before


def test_no_module_has_a_name_that_says_nothing():
    for path in [*PROGRAMS, *TESTS]:
        assert not {"utils", "helpers", "common", "misc"} & set(re.split(r"[_.]", path.stem)), path


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in PROGRAMS
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_heavy_libraries_are_imported_by_their_owners_only():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported = [node.module or ""]
            for name in imported:
                library = name.partition(".")[0]
                owners = OWNERS.get(library, {module_of(path)})
                assert module_of(path) in owners, f"{path.name}:{node.lineno} imports {library}"


def test_the_type_check_is_never_suppressed():
    pattern = re.compile(r"#\s*(type:\s*ignore|pyright:)")
    for path in [*PROGRAMS, *TESTS]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_every_module_has_a_docstring():
    for path in PROGRAMS:
        text = path.read_text()
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path.relative_to(ROOT)
