"""What the checks of data and recipe find, in the words of one table."""
from pathlib import Path
from typing import Callable, List, Optional, Sequence

import yaml

from ..utils import printable

TABLE = yaml.safe_load(Path(__file__).with_suffix('.yml').read_text())


class Finding:
    """One kind of fault, with its words from the table.

    ``error`` tells whether the training will surely fail, ``count`` how often
    the fault was found.

    Args:
        name (str): Key of the table ``findings.yml``.
        faults (Sequence): What was found. Defaults to ('', ), one fault of
            which there is no more to show.
        show (Callable): The text of a fault; those of the first three are
            examples. Defaults to str.
        error (bool, optional): Defaults to None, the level in the table.
        values: For the words in braces.
    """

    def __init__(self,
                 name: str,
                 faults: Sequence = ('', ),
                 show: Callable[..., str] = str,
                 error: Optional[bool] = None,
                 **values) -> None:
        self.name, self.count = name, len(faults)
        row = TABLE[name]
        self.error = row['level'] == 'error' if error is None else error
        self.text, self.fix = (
            printable(row[key].format(count=self.count, **values))
            for key in ('text', 'fix'))
        examples = filter(None, map(show, faults[:3]))
        self.examples = [*map(printable, examples)]

    def __str__(self) -> str:
        level = 'ERROR' if self.error else 'WARNING'
        return '\n'.join([
            f'{level} {self.name}: {self.text}',
            *(f'    {example}' for example in self.examples),
            f'  fix: {self.fix}'
        ])


def find(name: str, faults: Sequence, *args, **values) -> List[Finding]:
    """The finding of :class:`Finding`, or none if there are no faults."""
    return [Finding(name, faults, *args, **values)] if len(faults) else []


def verdict(findings: Sequence[Finding], run: str = 'training') -> str:
    """The last line of a report on a training or a test."""
    errors = sum(finding.error for finding in findings)
    if errors:
        return (f'VERDICT: this {run} will fail (errors: {errors}, '
                f'warnings: {len(findings) - errors})')
    if findings:
        return f'VERDICT: it can train (warnings: {len(findings)})'
    return 'VERDICT: nothing was found'
