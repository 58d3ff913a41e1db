"""Modules that refuse a checkpoint which does not fit."""
from typing import Dict, Tuple

from torch import Tensor

from ..utils import printable


class StrictLoading:
    """Mixin of modules that refuse a state dict which does not fit.

    The stock tools load with ``strict=False`` and only log what is missing, a
    common way to a mAP of zero. Both torch and mmengine load through the
    method that is overridden here.
    """

    def is_leftover_key(self, key: str) -> bool:
        """Whether a key of a checkpoint may be left aside."""
        return False

    def explain_mismatch(self, shapes: Dict[str, Tuple]) -> str:
        """A sentence for the error message, about differing shapes."""
        return ''

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        given = {
            key[len(prefix):]: tuple(getattr(value, 'shape', ()))
            for key, value in state_dict.items() if key.startswith(prefix)
        }
        # A checkpoint with nothing for this part of a model is not its
        # matter; the model as a whole may still refuse it.
        if given or not prefix:
            self._raise_on_mismatch(given)
            self._raise_on_values(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _raise_on_mismatch(self, given: Dict[str, Tuple]) -> None:
        own = {k: tuple(v.shape) for k, v in self.state_dict().items()}
        # Converted weights have no batch counters, and nothing reads them.
        missing = [
            k for k in own
            if k not in given and not k.endswith('num_batches_tracked')
        ]
        unexpected = [
            k for k in given if k not in own and not self.is_leftover_key(k)
        ]
        shapes = {
            k: (given[k], own[k])
            for k in own if k in given and given[k] != own[k]
        }
        if not (missing or unexpected or shapes):
            return
        hint = '' if missing or unexpected else self.explain_mismatch(shapes)
        lines = [
            f'the checkpoint does not fit {type(self).__name__}. ' +
            (hint or 'Is it of another size or model?')
        ]
        sections = {
            'only in the model': [f'+ {k} {own[k]}' for k in missing],
            'only in the checkpoint':
            [f'- {printable(k)} {given[k]}' for k in unexpected],
            'of another shape (checkpoint, model)':
            [f'! {k} {a}, {b}' for k, (a, b) in shapes.items()]
        }
        for title, items in sections.items():
            if items:
                lines.append(f'{len(items)} {title}:')
                lines += [f'  {item}' for item in items[:10]]
                lines += ['  ...'] if len(items) > 10 else []
        raise ValueError('\n'.join(lines))

    def _raise_on_values(self, state_dict, prefix: str) -> None:
        """Refuses weights with which every detection would be wrong."""
        wrong = {}
        for key, own in self.state_dict().items():
            value = state_dict.get(prefix + key)
            if value is None or not own.is_floating_point():
                continue
            if not isinstance(value, Tensor) or value.is_meta:
                wrong[key] = 'no data'
            elif not value.is_floating_point():
                wrong[key] = f'{value.dtype}'
            # A sum is faster, but may overflow.
            elif not (value.sum().isfinite() or value.isfinite().all()):
                wrong[key] = 'NaN or infinite'
        if wrong:
            names = [f'{k} ({reason})' for k, reason in wrong.items()]
            raise ValueError(
                f'{len(wrong)} weights of the checkpoint for '
                f'{type(self).__name__} are not finite floating-point numbers:'
                f' {", ".join(names[:10])}{", ..." * (len(wrong) > 10)}. Use '
                'a checkpoint from before they became so')
