"""Tools of others that look into a config."""
import re

import numpy as np
import pytest
import torch
from helpers.tiny_data import CONFIGS, make_dataset, write_config
from mmdet.apis import DetInferencer

DOCS = CONFIGS.parents[1] / 'docs'


class SlicingInferencer(DetInferencer):
    """Looks for a transform as SAHI does, by the host's own method."""

    def _init_pipeline(self, cfg):
        pipeline = cfg.test_dataloader.dataset.pipeline
        resize = self._get_transform_idx(pipeline, 'Resize')
        if resize == -1:
            raise ValueError('there is no Resize')
        pipeline[resize]['scale'] = (64, 64)  # as if image_size were given
        return super()._init_pipeline(cfg)


def test_resize_by_its_type(tmp_path):
    """The config of the docs; it finds the same, but for rounding."""
    root = make_dataset(tmp_path / 'data')
    config = write_config(tmp_path / 'my_config.py', root)
    block, = (
        text for text in re.findall(r'```python\n(.*?)```', (
            DOCS / 'training.md').read_text(), re.S)
        if "type='Resize'" in text)
    sliced = tmp_path / 'sliced.py'
    sliced.write_text(block.replace('640, 640', '1, 1'))
    with pytest.raises(ValueError, match='no Resize'):
        SlicingInferencer(str(config), device='cpu')
    image = str(root / 'JPEGImages' / '000002.jpg')  # 128 x 96
    found = []
    for kind, path in ((DetInferencer, config), (SlicingInferencer, sliced)):
        torch.manual_seed(0)
        inferencer = kind(str(path), device='cpu', show_progress=False)
        found += inferencer(image)['predictions']
    ours, hosts = ({
        key: np.array(value)
        for key, value in one.items()
    } for one in found)
    assert len(ours['scores']) == len(hosts['scores']) > 0
    assert np.abs(ours['scores'] - hosts['scores']).max() < 2e-3
    away = np.abs(ours['bboxes'][:, None] - hosts['bboxes']).max(-1)
    assert away.min(0).max() < 1 > away.min(1).max()  # pixels
