"""Strict loading of checkpoints."""
from typing import Dict, Tuple

from torch import Tensor

from ..utils import printable


class StrictLoading:
    """Mixin of modules that refuse a state dict that does not fit.

    MMDetection's tools load with ``strict=False`` and only log missing keys,
    a common cause of a mAP of zero. PyTorch and MMEngine both load through
    the method that is overridden here.
    """

    def is_leftover_key(self, key: str) -> bool:
        """Whether a key that only the checkpoint has is ignored."""
        return False

    def adapt_weights(self, state_dict: dict, prefix: str) -> None:
        """Changes what is loaded before it is compared."""

    def explain_mismatch(self, shapes: Dict[str, Tuple]) -> str:
        """Returns a sentence about differing shapes for the error message."""
        return ''

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name, module in self.named_modules(prefix=prefix[:-1]):
            if isinstance(module, StrictLoading):
                module.adapt_weights(state_dict, name and f'{name}.')
        given = {
            key[len(prefix):]: tuple(getattr(value, 'shape', ()))
            for key, value in state_dict.items() if key.startswith(prefix)
        }
        # A part of a model accepts a checkpoint without any key of its own;
        # the model as a whole may still refuse it.
        if given or not prefix:
            self._raise_on_mismatch(given)
            self._raise_on_values(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _raise_on_mismatch(self, given: Dict[str, Tuple]) -> None:
        own = {k: tuple(v.shape) for k, v in self.state_dict().items()}
        # Converted weights have no batch counters, and no norm reads them.
        missing = [
            f'+ {k} {own[k]}' for k in own
            if k not in given and not k.endswith('num_batches_tracked')
        ]
        unexpected = [
            f'- {printable(k)} {given[k]}' for k in given
            if k not in own and not self.is_leftover_key(k)
        ]
        shapes = {
            k: (given[k], own[k])
            for k in own if given.get(k, own[k]) != own[k]
        }
        if not (missing or unexpected or shapes):
            return
        hint = '' if missing or unexpected else self.explain_mismatch(shapes)
        hint = hint or 'Is it of another size or model?'
        lines = [f'the checkpoint does not fit {type(self).__name__}. {hint}']
        for title, items in (('only in the model',
                              missing), ('only in the checkpoint', unexpected),
                             ('of another shape (checkpoint, model)', [
                                 f'! {k} {a}, {b}'
                                 for k, (a, b) in shapes.items()
                             ])):
            if items:
                lines.append(f'{len(items)} {title}:')
                lines += [f'  {item}' for item in items[:10]]
                lines += ['  ...'] * (len(items) > 10)
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
