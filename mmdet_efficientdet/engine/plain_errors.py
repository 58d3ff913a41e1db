"""Runner and inferencer that name the data which MMDetection cannot read."""
import warnings
from typing import Iterable, Iterator

import mmdet.apis
from mmengine.dataset import Compose
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..datasets.class_names import innermost
from ..registry import RUNNERS
from .preflight import in_plain_words


class NamingPipeline(Compose):
    """The transforms of a dataset; an image that cannot be read is named."""

    def __call__(self, data: dict):
        """Applies the transforms.

        Raises:
            ValueError: If the image cannot be read.
        """
        try:
            return super().__call__(data)
        except Exception as error:  # every library raises its own
            if 'img' in data:  # another transform failed
                raise
            raise ValueError(
                f'{data.get("img_path")} cannot be read as an image ({error}).'
                ' Replace it or leave it out; python -m mmdet_efficientdet '
                'check_dataset lists all such images') from error


@RUNNERS.register_module()
class PlainErrorRunner(Runner):
    """mmengine's runner, with the words of the pre-flight for faulty data.

    A dataset is built, and its file parsed, before any hook runs. If that
    fails, the file is checked as ``tools/check_dataset.py`` does. It works for
    every dataset and loader of images, and in every process.
    """

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs) -> DataLoader:
        """Builds a data loader; see :func:`in_plain_words`."""
        if isinstance(dataloader, DataLoader):
            return dataloader
        with in_plain_words(dataloader['dataset']):
            built = Runner.build_dataloader(dataloader, *args, **kwargs)
        for part in innermost(built.dataset):
            if type(getattr(part, 'pipeline', None)) is Compose:
                part.pipeline = NamingPipeline(part.pipeline.transforms)
        return built


class DetInferencer(mmdet.apis.DetInferencer):
    """MMDetection's, which leaves out images that cannot be read.

    It warns of each of them. After a call, ``unreadable`` is a list of their
    paths and errors. If none can be read, a ValueError is raised.
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
