"""Print the code lines of the package's files, and which wing imports which.

Example:
    python tools/proof/show_structure.py

A code line is a line with a token that is neither a comment nor a docstring.
The imports are those of the source text, also inside functions.
"""
import argparse
import ast
import io
import tokenize
from collections import Counter
from importlib.util import resolve_name
from pathlib import Path
from typing import Dict, Set

PACKAGE = Path(__file__).resolve().parents[2] / 'mmdet_efficientdet'
# A wing may import wings of lower floors only.
FLOORS = (('scaling', ), ('deploy', ), ('utils', ), ('registry', ),
          ('models', ), ('datasets', 'weights'), ('engine', ))
_SPACE = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENCODING, tokenize.ENDMARKER)


def modules() -> Dict[str, Path]:
    """The package's modules by name, such as 'models.bifpn'.

    The package itself and its command line, which may import everything, are
    left out.
    """
    files = sorted(PACKAGE.glob('*.py')) + sorted(PACKAGE.glob('[a-z]*/*.py'))
    return {
        '.'.join(file.relative_to(PACKAGE).with_suffix('').parts): file
        for file in files if file.parent != PACKAGE or file.stem[0] != '_'
    }


def code_lines(path: Path) -> int:
    """Number of lines with code: no blanks, comments and docstrings."""
    lines, previous = set(), tokenize.NEWLINE
    text = io.StringIO(path.read_text())
    for token in tokenize.generate_tokens(text.readline):
        docstring = token.type == tokenize.STRING and previous in _SPACE
        if token.type not in (*_SPACE, tokenize.COMMENT) and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            previous = token.type
    return len(lines)


def imports() -> Dict[str, Set[str]]:
    """The modules of the package that each of its modules imports."""
    names = modules()
    graph = {}
    for name, path in names.items():
        package = f'{PACKAGE.name}.{name}'.rpartition('.')[0]
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                target = resolve_name('.' * node.level + (node.module or ''),
                                      package)
                found |= {f'{target}.{alias.name}' for alias in node.names}
                found.add(target)
        own = {n.removeprefix(f'{PACKAGE.name}.') for n in found}
        own |= {f'{n}.__init__' for n in own}
        graph[name] = own & names.keys()
    return graph


def wing(module: str) -> str:
    """The wing of a module, which for a file at the top is its own name."""
    return module.partition('.')[0]


def main() -> None:
    """Prints both."""
    argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sizes = {name: code_lines(path) for name, path in modules().items()}
    for name, size in sizes.items():
        print(f'{size:5}  {name.replace(".", "/")}.py')
    print(f'{sum(sizes.values()):5}  code lines')
    arrows = Counter((wing(a), wing(b)) for a, targets in imports().items()
                     for b in targets if wing(a) != wing(b))
    for (a, b), count in sorted(arrows.items()):
        print(f'{a} -> {b}: {count} imports')


if __name__ == '__main__':
    main()
