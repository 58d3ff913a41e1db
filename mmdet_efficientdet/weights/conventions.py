"""What a checkpoint says of itself in its meta, of which nothing is trusted.

Its conventions are the settings that the weights were trained with and that
no tensor shows.
"""
import json
import logging
import shlex
from collections import Counter
from functools import reduce
from operator import getitem
from typing import Annotated, List, Optional, Sequence, TypedDict

import msgspec
from mmengine.logging import print_log
from msgspec import Meta

from ..utils import shorten, shown

# Name in the meta of a checkpoint, and place in the config of a model.
PLACES = dict(
    aspect_pairs='bbox_head.anchor_generator.aspect_pairs',
    anchor_scale='bbox_head.anchor_generator.octave_base_scale',
    mean='data_preprocessor.mean',
    std='data_preprocessor.std',
    pad_value='data_preprocessor.pad_value')

# NaN is in no range.
_Number = Annotated[float, Meta(gt=-1e30, lt=1e30)]
_Positive = Annotated[float, Meta(gt=0, lt=1e30)]
_Pair = Annotated[List[_Positive], Meta(min_length=2, max_length=2)]
_UpTo3 = Meta(min_length=1, max_length=3)


class _DatasetMeta(TypedDict, total=False):
    classes: Optional[List[str]]


class Origin(TypedDict):
    """What the converter notes: name and SHA-256 of a file, and a receipt."""
    file: str
    sha256: str
    receipt: List[str]


# What the meta may have: a type, and the words of the error. Without mean and
# std, images are not normalized.
_ALLOWED = dict(
    aspect_pairs=(Annotated[List[_Pair],
                            Meta(min_length=1, max_length=100)],
                  'a list of pairs (width, height) of positive, finite '
                  'numbers'),
    anchor_scale=(_Positive, 'a positive, finite number'),
    mean=(Optional[Annotated[List[_Number], _UpTo3]],
          'a finite number for each of 1 or 3 channels'),
    std=(Optional[Annotated[List[_Positive], _UpTo3]],
         'a positive, finite number for each of 1 or 3 channels'),
    pad_value=(_Number, 'a finite number'),
    dataset_meta=(Optional[_DatasetMeta],
                  "a dict with a list of texts as 'classes', the class names"),
    source=(Optional[Origin],
            "a dict of the texts 'file' and 'sha256' and the list 'receipt'"))


def _read(meta: dict, key: str):
    """One value of a meta as plain data.

    Raises:
        ValueError: If it is not allowed. The message has its name.
    """
    kind, allowed = _ALLOWED[key]
    try:
        json.dumps(meta[key])  # raises at a set, which has no order
        value = msgspec.convert(meta[key], kind)
        if key in ('mean', 'std') and value and len(value) == 2:
            raise ValueError
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ValueError(f'the {key} of the checkpoint is {shown(meta[key])}, '
                         f'but must be {allowed}') from error
    return value


def read_conventions(meta: dict) -> dict:
    """The conventions in the meta of a checkpoint.

    Args:
        meta (dict): With any of ``PLACES``.

    Returns:
        dict: Those that it has, as finite numbers in lists.

    Raises:
        ValueError: If a value is not allowed. The message has its name.
    """
    if not isinstance(meta, dict):
        raise ValueError(f'the meta of the checkpoint is {shown(meta)}, but '
                         'must be a dict')
    return {key: _read(meta, key) for key in PLACES if key in meta}


def meta_of(checkpoint: dict) -> dict:
    """The ``meta`` of a checkpoint, or {} if it has none or it is no dict."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


def class_names(meta: dict) -> List[str]:
    """The class names in the meta of a checkpoint, if any.

    Raises:
        ValueError: If they are not a list of different texts.
    """
    given = meta.get('dataset_meta')
    if isinstance(given, dict):  # of which nothing else is read
        given = dict(classes=given.get('classes'))
    given = _read(dict(dataset_meta=given), 'dataset_meta') or {}
    names = given.get('classes') or []
    check_unique(names)
    return names


def check_unique(names: Sequence[str]) -> None:
    """Raises a ValueError that names a class name that occurs twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f'the class name {twice[0]!r} occurs twice in '
                         f'{shorten(names)}; names must be unique')


def origin_of(meta: dict) -> Optional[Origin]:
    """The origin that the converter has noted in a meta, if any.

    Raises:
        ValueError: If it is not what the converter writes.
    """
    return _read(meta, 'source') if 'source' in meta else None


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
        node = reduce(getitem, parents, model)
        value = node.get(last, 0 if key == 'pad_value' else None)
        # Lists instead of tuples, which files do not keep.
        values[key] = json.loads(json.dumps(value))
    return values


def option(key: str, value) -> str:
    """One value for ``--cfg-options``, quoted for a shell."""
    return shlex.quote(f'{key}={value}'.replace(' ', ''))
