"""How many lines of source a family takes: its entry in FAMILIES, and what that needs of its own module.

Blank lines, comments and docstrings do not count. Where families share code of a module, the first of them bears it.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

from mindgen.weights import families

FOLDER = Path(families.__file__).parent


def family_lines() -> dict[str, int]:
    """The lines of every family, in the order of FAMILIES."""
    table, origins = _read_table()
    seen: set[tuple[str, int]] = set()
    counts = {}
    for name, value in table.items():
        lines = {("__init__", line) for line in range(value.lineno, (value.end_lineno or 0) + 1)}
        for used in _names(value):
            if origins.get(used) not in (None, "dense", "family"):
                lines |= _needed(used, str(origins[used]))
        counts[name] = len(lines - seen)
        seen |= lines
    return counts


def _read_table() -> tuple[dict[str, ast.expr], dict[str, str]]:
    """The entries of FAMILIES, and the module that each imported name is of."""
    tree = ast.parse((FOLDER / "__init__.py").read_text())
    origins = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            origins |= {alias.name: str(node.module).rpartition(".")[2] for alias in node.names}
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            table = {str(ast.literal_eval(key)): value for key, value in pairs if key is not None}
    return table, origins


def _needed(name: str, module: str) -> set[tuple[str, int]]:
    """The lines of a module's statements that a name of it is made of, directly or through others."""
    source = (FOLDER / f"{module}.py").read_text()
    statements = {target: node for node in ast.parse(source).body for target in _targets(node)}
    code, found, waiting = _code_lines(source), set(), [name]
    while waiting:
        node = statements.pop(waiting.pop(), None)
        if node is not None:
            found |= {(module, line) for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in code}
            waiting += _names(node)
    return found


def _targets(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _names(node: ast.AST) -> list[str]:
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]


def _code_lines(source: str) -> set[int]:
    """The lines with code on them; a string that is a statement of its own is a docstring."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in layout]
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings
