"""Settings that weights were trained with and that no tensor shows."""
from functools import reduce
from typing import List

# Name in the meta of a checkpoint, and place in the config of a model.
PLACES = dict(
    aspect_pairs='bbox_head.anchor_generator.aspect_pairs',
    anchor_scale='bbox_head.anchor_generator.octave_base_scale',
    mean='data_preprocessor.mean',
    std='data_preprocessor.std',
    pad_value='data_preprocessor.pad_value')


def adopt_conventions(config, meta: dict) -> None:
    """Sets the conventions of a checkpoint in a config.

    Args:
        config (Config): It is changed.
        meta (dict): Of the checkpoint, with any of ``PLACES``.
    """
    current = conventions(config.model)
    for key, place in PLACES.items():
        value = meta.get(key, current[key])
        if key == 'aspect_pairs':  # tuples, as in the shipped configs
            value = [tuple(pair) for pair in value]
        elif value == current[key]:
            continue
        config.merge_from_dict({f'model.{place}': value})


def differing_options(meta: dict, model: dict) -> List[str]:
    """Command-line options that set a checkpoint's conventions in a config.

    Args:
        meta (dict): Of the checkpoint, with any of ``PLACES``.
        model (dict): Config of the model. Values that it has already are
            skipped.
    """
    current = conventions(model)
    return [
        option(f'model.{place}', meta[key]) for key, place in PLACES.items()
        if _as_lists(meta.get(key, current[key])) != current[key]
    ]


def conventions(model: dict) -> dict:
    """The values at ``PLACES`` in the config of a model, as plain data."""
    values = {}
    for key, place in PLACES.items():
        *parents, last = place.split('.')
        node = reduce(lambda node, part: node[part], parents, model)
        values[key] = _as_lists(node.get(last, 0))
    return values


def _as_lists(value):
    """A value with lists instead of tuples, which files do not keep."""
    if isinstance(value, (list, tuple)):
        return [_as_lists(item) for item in value]
    return value


def option(key: str, value) -> str:
    """One value for ``--cfg-options``, quoted for a shell."""
    return f"'{key}={value}'".replace(' ', '')
