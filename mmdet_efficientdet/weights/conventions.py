"""Settings that weights were trained with and that no tensor shows."""
import logging
import shlex
from functools import reduce
from typing import List

from mmengine.logging import print_log

from ..utils import shown

# Name in the meta of a checkpoint, and place in the config of a model.
PLACES = dict(
    aspect_pairs='bbox_head.anchor_generator.aspect_pairs',
    anchor_scale='bbox_head.anchor_generator.octave_base_scale',
    mean='data_preprocessor.mean',
    std='data_preprocessor.std',
    pad_value='data_preprocessor.pad_value')


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # False for NaN


def _is_positive(value) -> bool:
    return _is_number(value) and value > 0


def _is_list(value, is_item, counts) -> bool:
    return (isinstance(value, (list, tuple)) and len(value) in counts
            and all(map(is_item, value)))


def _is_pair(value) -> bool:
    return _is_list(value, _is_positive, (2, ))


# What the meta may have: a test of the value, and the words of the error.
# Without mean and std, images are not normalized.
_ALLOWED = dict(
    aspect_pairs=(lambda value: _is_list(value, _is_pair, range(1, 101)),
                  'a list of pairs (width, height) of positive, finite '
                  'numbers'),
    anchor_scale=(_is_positive, 'a positive, finite number'),
    mean=(lambda value: value is None or _is_list(value, _is_number, (1, 3)),
          'a finite number for each channel'),
    std=(lambda value: value is None or _is_list(value, _is_positive, (1, 3)),
         'a positive, finite number for each channel'),
    pad_value=(_is_number, 'a finite number'))


def read_conventions(meta: dict) -> dict:
    """The conventions in the meta of a checkpoint, of which none is trusted.

    Args:
        meta (dict): With any of ``PLACES``.

    Returns:
        dict: Those that it has, as finite numbers in lists.

    Raises:
        ValueError: If a value is not allowed. The message has its name.
    """
    found = {}
    if not isinstance(meta, dict):
        raise ValueError(f'the meta of the checkpoint is {shown(meta)}, but '
                         'must be a dict')
    for key, (is_allowed, allowed) in _ALLOWED.items():
        if key not in meta:
            continue
        value = meta[key]
        if not is_allowed(value):
            raise ValueError(f'the {key} of the checkpoint is {shown(value)}, '
                             f'but must be {allowed}')
        found[key] = _as_lists(value)
    return found


def adopt_conventions(config, meta: dict) -> None:
    """Sets the conventions of a checkpoint in a config.

    Args:
        config (Config): It is changed.
        meta (dict): Of the checkpoint, with any of ``PLACES``.

    Raises:
        ValueError: As in :func:`read_conventions`.
    """
    current = conventions(config.model)
    given = read_conventions(meta)
    for key, place in PLACES.items():
        value = given.get(key, current[key])
        if key == 'aspect_pairs':  # tuples, as in the shipped configs
            value = [tuple(pair) for pair in value]
        elif value == current[key]:
            continue
        config.merge_from_dict({f'model.{place}': value})


def differing_options(meta: dict, model: dict) -> List[str]:
    """Command-line options that set a checkpoint's conventions in a config.

    Args:
        meta (dict): Of the checkpoint, with any of ``PLACES``. If a value is
            not allowed, this is logged, and there are no options.
        model (dict): Config of the model. Values that it has already are
            skipped.
    """
    current = conventions(model)
    try:
        given = read_conventions(meta)
    except ValueError as error:
        print_log(
            f'{error}. The weights are used with the settings of the config',
            'current', logging.WARNING)
        return []
    return [
        option(f'model.{PLACES[key]}', value) for key, value in given.items()
        if value != current[key]
    ]


def conventions(model: dict) -> dict:
    """The values at ``PLACES`` in the config of a model, as plain data."""
    values = {}
    for key, place in PLACES.items():
        *parents, last = place.split('.')
        node = reduce(lambda node, part: node[part], parents, model)
        values[key] = _as_lists(
            node.get(last, 0 if key == 'pad_value' else None))
    return values


def _as_lists(value):
    """A value with lists instead of tuples, which files do not keep."""
    if isinstance(value, (list, tuple)):
        return [_as_lists(item) for item in value]
    return value


def option(key: str, value) -> str:
    """One value for ``--cfg-options``, quoted for a shell."""
    return shlex.quote(f'{key}={value}'.replace(' ', ''))
