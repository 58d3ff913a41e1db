"""Writes configs/efficientdet/metafile.yml, which lists the models by name.

Example:
    python tools/studies/make_metafile.py

MMEngine and MIM read the file, for example in DetInferencer('efficientdet-d0',
scope='mmdet_efficientdet'). Its values come from mmdet_efficientdet/scaling.py
and from the manifest of published weights; parameters and multiply-adds are
counted on the models. Run the command after a change of either: the tests fail
until the file is up to date.
"""
import argparse
from pathlib import Path

TARGET = Path(__file__).parents[2] / 'configs/efficientdet/metafile.yml'
HEADER = '''\
# Written by tools/studies/make_metafile.py; change that file instead.
#
# Parameters and FLOPs are those of a model for 80 classes. FLOPs are the
# multiply-adds of its convolutions and linear layers for one image. The image
# is a square with sides of Input Size pixels. Box AP is on val2017; Source
# says who measured it, and how.
'''
COLLECTION = {
    'Name': 'EfficientDet',
    'Metadata': {
        'Training Data': 'COCO',
        'Architecture': ['EfficientNet', 'BiFPN']
    },
    'Paper': {
        'URL': 'https://arxiv.org/abs/1911.09070',
        'Title': 'EfficientDet: Scalable and Efficient Object Detection'
    }
}


def count_multiply_adds(model, image_size: int) -> int:
    """Counts the multiply-adds of convolutions and linear layers.

    Args:
        model (nn.Module): A detector on the meta device, so that nothing is
            computed.
        image_size (int): Side of the input (1, 3, image_size, image_size).
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.empty(1, 3, image_size, image_size, device='meta')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops() // 2  # torch counts both operations


def describe_model(size: str) -> dict:
    """Returns the entry of one size, a key of ``SCALING``."""
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    from mmdet_efficientdet.scaling import SCALING
    from mmdet_efficientdet.utils import config_file
    from mmdet_efficientdet.weights.published import manifest

    row, path = SCALING[size], config_file(size)
    weights = manifest()[f'effdet://tf_efficientdet_{size}']
    config = Config.fromfile(path)
    with torch.device('meta'), DefaultScope.overwrite_default_scope(
            config.default_scope):
        model = MODELS.build(config.model)
    return {
        'Name': path.stem,
        'Alias': [f'efficientdet-{size}'],
        'In Collection': COLLECTION['Name'],
        'Config': f'configs/efficientdet/{path.name}',
        'Metadata': {
            'Input Size': row.image_size,
            'Parameters': sum(p.numel() for p in model.parameters()),
            'FLOPs': count_multiply_adds(model, row.image_size),
            'Epochs': row.epochs
        },
        'Results': [{
            'Task': 'Object Detection',
            'Dataset': 'COCO',
            'Metrics': {
                'box AP': weights.ap
            },
            'Source': f'as published in {weights.how_sure["ap"]}; not '
                      'measured with this project'
        }],
        'Weights': weights.path,
        'Converted From': {
            'Weights': weights.addresses[0] + weights.file
        }
    }  # yapf: disable


def format_metafile(models: list) -> str:
    """Returns the text of metafile.yml for the entries of its models."""
    import yaml

    return HEADER + yaml.safe_dump(
        {
            'Collections': [COLLECTION],
            'Models': models
        }, sort_keys=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()

    from mmdet_efficientdet.scaling import SCALING

    TARGET.write_text(format_metafile([describe_model(s) for s in SCALING]))
    print(f'Wrote {TARGET}')


if __name__ == '__main__':
    main()
