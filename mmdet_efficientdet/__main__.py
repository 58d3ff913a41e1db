"""Lists the tools of this package and of MMDetection, and runs them by name.

The tools are the scripts that each package installs below ``.mim/tools``. The
list is made from their source text, which imports neither torch nor mmdet.
"""
import ast
import difflib
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

COMMAND = f'python -m {__package__}'
TOOLS = Path(__file__).parent / '.mim' / 'tools'
# Of MMDetection's scripts, those that are of use for a detector of boxes.
HOST_TOOLS = ('train', 'test', 'analysis_tools/analyze_logs',
              'analysis_tools/analyze_results', 'analysis_tools/benchmark',
              'analysis_tools/browse_dataset',
              'analysis_tools/coco_error_analysis',
              'analysis_tools/confusion_matrix', 'analysis_tools/eval_metric',
              'analysis_tools/fuse_results', 'analysis_tools/get_flops',
              'misc/print_config', 'model_converters/publish_model')


def find_tools() -> dict:
    """The file of each installed tool: title to name to path."""
    host = find_spec('mmdet')  # without it, `doctor` and `detect` are of use
    folder = Path(host.origin).parent / '.mim' / 'tools' if host else None
    files = [folder / f'{name}.py' for name in HOST_TOOLS if folder]
    own = [  # without those that run the host's, for mim
        x for x in sorted(TOOLS.glob('*.py')) if x.stem not in HOST_TOOLS
    ]
    return {
        title: {
            file.stem: file
            for file in part if file.is_file()
        }
        for title, part in {
            'Tools of this package': own,
            'Scripts of MMDetection': files
        }.items()
    }


def describe(file: Path) -> str:
    """The summary of a script's docstring, or of its argument parser."""
    tree = ast.parse(file.read_text())
    texts = [ast.get_docstring(tree) or '']
    texts += [
        node.value.value for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == 'description'
        and isinstance(node.value, ast.Constant)
    ]
    summary = next(filter(None, texts), '').partition('\n\n')[0]
    return ' '.join(summary.split())


def overview(tools: dict) -> str:
    """How to call a tool, and one line for each."""
    lines = [f'usage: {COMMAND} TOOL [ARGUMENT ...]']
    for title, files in tools.items():
        lines += ['', f'{title}:']
        lines += [f'  {name:20} {describe(f)}' for name, f in files.items()]
    lines += [
        '', f'Arguments of a tool: {COMMAND} TOOL --help',
        'OMP_NUM_THREADS is 1 unless you set it.'
    ]
    return '\n'.join(lines)


def main() -> int:
    """Runs a tool, or prints the list; returns the exit status."""
    name, *arguments = sys.argv[1:] or ['--help']
    tools = find_tools()
    if name in ('-h', '--help'):
        print(overview(tools))
        return 0
    files = {key: f for part in tools.values() for key, f in part.items()}
    if name not in files:
        near = difflib.get_close_matches(name, files, 1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        print(f'There is no tool {name!r}.{hint}\n', file=sys.stderr)
        print(overview(tools), file=sys.stderr)
        return 2
    # Threads of OpenMP wait in the way of the data loaders.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    # What a script sees that is started by its path
    sys.argv = [str(files[name]), *arguments]
    sys.path[0] = str(files[name].parent)
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except ModuleNotFoundError as error:
        package = error.name.partition('.')[0]
        if package not in ('mmcv', 'mmdet', 'mmengine'):
            raise
        print(
            f'{name} needs MMDetection, but {package} is not installed. '
            f'{COMMAND} doctor says what to install',
            file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
