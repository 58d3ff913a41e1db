"""A process group of two ranks without a GPU."""
from datetime import timedelta

import torch
from torch.multiprocessing import start_processes


def _rank(rank, function, folder, args):
    torch.distributed.init_process_group(
        'gloo',
        f'file://{folder}/store',
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60))
    try:
        function(*args)
    except (OSError, RuntimeError, ValueError) as error:
        (folder / f'{rank}.txt').write_text(str(error))
    torch.distributed.destroy_process_group()


def errors_of_ranks(function, folder, *args):
    """What ``function(*args)`` raises on each of two ranks.

    Args:
        function (Callable): Runs in both processes.
        folder (Path): An empty one, or of the function's own.

    Returns:
        list[str]: The messages; '' where nothing is raised.
    """
    start_processes(
        _rank, (function, folder, args), nprocs=2, start_method='fork')
    files = [folder / f'{rank}.txt' for rank in range(2)]
    return [file.read_text() if file.exists() else '' for file in files]
