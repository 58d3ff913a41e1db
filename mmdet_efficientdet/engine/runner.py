"""Runner and inferencer that name the data which MMDetection cannot read."""
import warnings
from typing import Iterable, Iterator

import mmdet.apis
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..registry import RUNNERS
from ..scaling import innermost
from .preflight import in_plain_words


class NamingPipeline(Compose):
    """The transforms of a dataset; an image that cannot be read is named."""

    def __call__(self, data: dict):
        """Applies the transforms.

        Raises:
            ValueError: If the image cannot be read.
        """
        for transform in self.transforms:
            try:
                data = transform(data)
            except Exception as error:  # every library raises its own
                if 'Load' not in type(transform).__name__ or 'img' in data:
                    raise
                raise ValueError(
                    f'{data.get("img_path")} cannot be read as an image '
                    f'({error}). Replace it or leave it out; python -m '
                    'mmdet_efficientdet check_dataset lists all such images'
                ) from error
            if data is None:
                return None
        return data


@RUNNERS.register_module()
class DetRunner(Runner):
    """mmengine's runner, which names faulty data and lets more be turned off.

    A dataset is built, and its file parsed, before any hook runs. If that
    fails, the file is checked as ``tools/check_dataset.py`` does. It works for
    every dataset and loader of images, and in every process.

    ``--cfg-options default_hooks.ema=None`` turns a hook off. mmengine takes
    None only for its own six hooks. Without workers, ``persistent_workers`` is
    ignored, which data loaders refuse.
    """

    def register_default_hooks(self, hooks: dict = None) -> None:
        """Registers the hooks; a hook that does nothing stands for None."""
        super().register_default_hooks({
            name: Hook() if hook is None else hook
            for name, hook in (hooks or {}).items()
        })

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs) -> DataLoader:
        """Builds a data loader; see :func:`in_plain_words`."""
        if isinstance(dataloader, DataLoader):
            return dataloader
        if not dataloader.get('num_workers'):
            dataloader = dict(dataloader, persistent_workers=False)
        with in_plain_words(dataloader['dataset']):
            built = Runner.build_dataloader(dataloader, *args, **kwargs)
        for part in innermost(built.dataset):
            if type(getattr(part, 'pipeline', None)) is Compose:
                part.pipeline = NamingPipeline(part.pipeline.transforms)
        return built


class DetInferencer(mmdet.apis.DetInferencer):
    """MMDetection's, which leaves out images that cannot be read.

    It warns of each of them. After a call, ``unreadable`` is a list of their
    paths and errors, and the results are those of the other images, in order.
    If none can be read, a ValueError is raised.
    """

    def _get_chunk_data(self, inputs: Iterable, chunk_size: int) -> Iterator:
        host, self.unreadable = mmdet.apis.DetInferencer, []

        def read() -> Iterator[tuple]:
            for item in inputs:
                try:
                    yield from next(host._get_chunk_data(self, [item], 1))
                except Exception as error:  # every library raises its own
                    self.unreadable.append((item, str(error)))
                    warnings.warn(f'unreadable {item}: {error}', stacklevel=2)
            if 0 < len(self.unreadable) == len(inputs):
                raise ValueError(f'no image can be read: {self.unreadable}')

        return super(host, self)._get_chunk_data(read(), chunk_size)
