"""Whether the classes of a config are those of head, dataset and file."""
from ..utils import shorten


def check_class_count(num_classes: int, classes) -> None:
    """Raises a ValueError unless a head has one output for each name."""
    if isinstance(classes, str):
        raise ValueError(
            f'classes={classes!r} is a string; write a list, such as '
            f'[{classes!r}]')
    if num_classes != len(classes):
        raise ValueError(
            f'the head has num_classes={num_classes}, but the dataset '
            f'{len(classes)} classes {shorten(classes)}. Set both '
            "together in the config: scale_config(_base_, '<size>', "
            "classes=['<name>', ...])")


def check_class_names(classes, names, file: str) -> None:
    """Raises a ValueError unless a file's categories are those of a config."""
    if list(classes) != [name for name in names if name in classes]:
        # MMDetection numbers classes in the order of the file.
        raise ValueError(f'the classes {shorten(classes)} do not fit {file}, '
                         f'which has {shorten(names)}. Write names of that '
                         'file, in the same order')


def innermost(dataset) -> list:
    """The datasets inside wrappers such as RepeatDataset."""
    if hasattr(dataset, 'datasets'):
        return [d for part in dataset.datasets for d in innermost(part)]
    if hasattr(dataset, 'dataset'):
        return innermost(dataset.dataset)
    return [dataset]


def reads_like(dataset, kind: type) -> bool:
    """Whether a dataset is of this kind and reads its file as that does.

    LVIS has fields of its own, and Objects365 sorts the classes.
    """
    return (isinstance(dataset, kind)
            and type(dataset).load_data_list is kind.load_data_list)
