"""Compares the classes of a dataset with a head."""
from ..utils import shorten


def check_class_count(num_classes: int, classes) -> None:
    """Raises a ValueError unless a head has one output for each name."""
    if isinstance(classes, str):
        raise ValueError(
            f'classes={classes!r} is a string; write a list, such as '
            f'[{classes!r}]')
    if num_classes != len(classes):
        raise ValueError(
            f'the head has num_classes={num_classes}, but the dataset has '
            f'{len(classes)} classes {shorten(classes)}. Set both '
            "together in the config: scale_config(_base_, '<size>', "
            "classes=['<name>', ...]), and where the config replaces a "
            'dataset of the base, such as by a wrapper with _delete_=True, '
            "metainfo=dict(classes=('<name>', ...)) in each part")


def reads_like(dataset, kind: type) -> bool:
    """Whether a dataset is of this kind and reads its file in the same way.

    Subclasses may not: LVIS has other fields, and Objects365 sorts classes.
    """
    return (isinstance(dataset, kind)
            and type(dataset).load_data_list is kind.load_data_list)
