"""What weights were trained with and no tensor of theirs tells."""
from functools import reduce
from typing import List

# Its name in the meta of a checkpoint, and its place in a model's config.
PLACES = dict(
    aspect_pairs='bbox_head.anchor_generator.aspect_pairs',
    anchor_scale='bbox_head.anchor_generator.octave_base_scale',
    mean='data_preprocessor.mean',
    std='data_preprocessor.std',
    pad_value='data_preprocessor.pad_value')


def conventions(model: dict) -> dict:
    """The values at ``PLACES`` in a model's config, as plain data."""
    values = {}
    for key, place in PLACES.items():
        *parents, last = place.split('.')
        node = reduce(lambda node, part: node[part], parents, model)
        values[key] = _listed(node.get(last, 0))
    return values


def _listed(value):
    """Lists in the place of tuples, with which texts and files differ."""
    if isinstance(value, (list, tuple)):
        return [_listed(item) for item in value]
    return value


def adopt_conventions(config, meta: dict) -> None:
    """Sets in a config what a checkpoint tells of itself.

    Args:
        config (Config): Is changed.
        meta (dict): With any of ``PLACES``.
    """
    now = conventions(config.model)
    for key, place in PLACES.items():
        value = meta.get(key, now[key])
        if key == 'aspect_pairs':  # as shipped, so that texts are equal
            value = [tuple(pair) for pair in value]
        elif value == now[key]:
            continue
        config.merge_from_dict({f'model.{place}': value})


def differing_options(meta: dict, model: dict) -> List[str]:
    """Options of a command that set what a model's config has otherwise.

    Args:
        meta (dict): Of a checkpoint, with any of ``PLACES``.
        model (dict): Config of the model.
    """
    own = conventions(model)
    return [
        option(f'model.{place}', meta[key]) for key, place in PLACES.items()
        if _listed(meta.get(key, own[key])) != own[key]
    ]


def option(key: str, value) -> str:
    """One value for ``--cfg-options``, quoted for a shell."""
    return f"'{key}={value}'".replace(' ', '')
