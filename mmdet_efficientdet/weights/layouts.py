"""The names of our tensors in the files of other projects.

A layout names the tensors of one project. Its table in ``layouts.yml`` maps
our modules to those of that project.
"""
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence

import yaml

from ..models.bifpn import bifpn_graph
from ..models.efficientnet import block_table
from ..scaling import FIRST_LEVEL

_NUMBER = re.compile(r'(?<=\.)\d+(?=\.)')
_TF_NORM = dict(
    weight='gamma',
    bias='beta',
    running_mean='moving_mean',
    running_var='moving_variance')


@lru_cache(maxsize=4096)  # several layouts ask for the same tensor
def name_fields(key: str, arch: str, num_levels: int) -> dict:
    """Computes the fields of the names that a layout gives a tensor of ours.

    Other projects count blocks, levels and nodes in other ways than we do.

    Args:
        key (str): Name in our state dict.
        arch (str): Architecture of the backbone, such as 'b0'.
        num_levels (int): Number of pyramid levels.
    """
    numbers = [int(n) for n in _NUMBER.findall(key)]
    if key.startswith('backbone.blocks.'):
        blocks = block_table(arch)[1]
        # In MMDetection and MMPretrain two layers have two stages each.
        layers = [(1, 2, 3, 4, 4, 5, 5)[block['stage'][0]] for block in blocks]
        index = numbers[0]
        layer = layers[index]
        stage, repeat = blocks[index]['stage']
        expanded = blocks[index]['expansion'] != 1
        return dict(
            arch=arch,
            stage=stage,
            repeat=repeat,
            layer=layer,
            place=index - layers.index(layer),
            # Keras numbers the layers of one type in a block, and timm the
            # norms. A block without expansion has one less of each.
            conv='_1' if expanded else '',
            norm_1='_1' if expanded else '',
            norm_2='_2' if expanded else '_1',
            bn_1=2 if expanded else 1,
            bn_2=3 if expanded else 2,
            last='conv_pwl' if expanded else 'conv_pw')
    if '.nodes.' in key:
        node = numbers[1]
        level, inputs = bifpn_graph(num_levels)[node]
        top_down = node < num_levels - 1
        return dict(
            level=level + FIRST_LEVEL,
            count=num_levels + node,  # feature maps before this node
            source=inputs[numbers[2]] if len(numbers) > 2 else None,
            way='up' if top_down else 'down',
            path=1 if top_down else 2,
            again='' if top_down else '_2',
            channel='down_channel' if top_down else 'level_connection')
    if '_norms.' in key:
        return dict(level=numbers[1] + FIRST_LEVEL)
    return dict(arch=arch)


@dataclass(frozen=True, eq=False)
class Layout:
    """How one project names the tensors of an EfficientDet.

    Args:
        title (str): Its name in a receipt.
        modules (dict): Maps our modules to theirs, and our fusion weights to
            theirs. Empty for the checkpoints of this package, whose names
            are ours.
        tensorflow (bool): Whether parameters have TensorFlow's names and
            axes. Defaults to False.
        suffix (str): Follows each name. Defaults to ''.
        inner_conv (bool): Whether a convolution may be wrapped, with the
            name ``x.conv.weight`` instead of ``x.weight``. Defaults to False.
        prefix (str): Optional start of all names. Defaults to ''.
        y_first (bool): Whether the box outputs of an anchor are in the order
            (y, x, h, w). Defaults to True.
        classifier (str): Pattern for the names of an ImageNet classifier.
            Only the layout of a backbone has one. Defaults to ''.
    """
    title: str
    modules: Dict[str, str]
    tensorflow: bool = False
    suffix: str = ''
    inner_conv: bool = False
    prefix: str = ''
    y_first: bool = True
    classifier: str = ''

    def names(self, key: str, arch: str, num_levels: int) -> List[str]:
        """The names that another project gives to one tensor of ours.

        Returns:
            list[str]: Several where the fusion weights of a node are stored
            one by one; empty if the layout has no such tensor.
        """
        if not self.modules:
            return [key]
        module, leaf = key.rsplit('.', 1)
        if leaf == 'fusion_weights':
            module = key
        kind = _NUMBER.sub('{}', f'{module}.')[:-1]
        if kind not in self.modules:
            return []
        numbers = _NUMBER.findall(f'{module}.')
        name = self.modules[kind].format(*numbers,
                                         **name_fields(key, arch, num_levels))
        if not self.tensorflow:
            return [name if module == key else f'{name}.{leaf}']
        if module == key:
            inputs = bifpn_graph(num_levels)[int(numbers[1])][1]
            names = [
                f'{name}_{i}'.removesuffix('_0') for i in range(len(inputs))
            ]
        elif kind.endswith(('bn', 'norm', 'norms.{}.{}')):
            names = [f'{name}/{_TF_NORM[leaf]}']
        elif leaf == 'weight':
            separable = re.search('depthwise_|pointwise_', f'{kind}_')
            names = [f'{name}/{separable.group() if separable else ""}kernel']
        else:
            names = [f'{name}/{leaf}']
        return [part + self.suffix for part in names]

    def normalized(self, name: str) -> str:
        """A name of the source without prefix and wrapper."""
        name = name.removeprefix(self.prefix)
        if self.inner_conv:
            return re.sub(r'\.conv\.(weight|bias)$', r'.\1', name)
        return name


_TABLES = yaml.safe_load(Path(__file__).with_suffix('.yml').read_text())


def _layout(backbone: str = '',
            start: str = '',
            nets: Sequence[str] = (),
            detector: Optional[Mapping[str, str]] = None,
            **fields) -> Layout:
    """A layout of ``layouts.yml``, which explains the fields."""
    modules = {
        f'backbone.{ours}': start + theirs
        for ours, theirs in _TABLES['backbones'].get(backbone, {}).items()
    }
    for net, word in zip(('cls', 'reg'), nets):
        for ours, theirs in detector.items():
            modules[ours.replace('NET', net)] = theirs.replace('NET', word)
    return Layout(modules=modules, **fields)


IGNORED: Dict[str, str] = _TABLES['ignored']
LAYOUTS = [_layout(**fields) for fields in _TABLES['detectors']]
BACKBONES = [_layout(**fields) for fields in _TABLES['classifiers']]
