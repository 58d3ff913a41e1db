"""How a table of :mod:`.layouts` becomes the name of one tensor."""
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, List

from ..models.bifpn import bifpn_graph
from ..models.efficientnet import block_table

FIRST_LEVEL = 3  # of the pyramid: what we count from 0 others call P3
_NUMBER = re.compile(r'(?<=\.)\d+(?=\.)')
_TF_NORM = dict(
    weight='gamma',
    bias='beta',
    running_mean='moving_mean',
    running_var='moving_variance')


@lru_cache(maxsize=4096)  # several layouts ask for the same tensor
def numbers_of(key: str, arch: str, num_levels: int) -> dict:
    """What the names of others count by, for one tensor of ours.

    Args:
        key (str): Name in our state dict.
        arch (str): Architecture of the backbone, such as 'b0'.
        num_levels (int): Number of pyramid levels.
    """
    own = [int(n) for n in _NUMBER.findall(key)]
    if key.startswith('backbone.blocks.'):
        blocks = block_table(arch)[1]
        # Stages that differ in stride only by their first block's kernel are
        # one layer in MMDetection and MMPretrain.
        layers = [(1, 2, 3, 4, 4, 5, 5)[block['stage'][0]] for block in blocks]
        layer = layers[own[0]]
        stage, repeat = blocks[own[0]]['stage']
        expanded = blocks[own[0]]['expansion'] != 1
        return dict(
            arch=arch,
            stage=stage,
            repeat=repeat,
            layer=layer,
            place=own[0] - layers.index(layer),
            # Keras numbers equal layers of a block in the order of use, timm
            # its norms. A block without expansion has one of each less.
            conv='_1' if expanded else '',
            norm_1='_1' if expanded else '',
            norm_2='_2' if expanded else '_1',
            bn_1=2 if expanded else 1,
            bn_2=3 if expanded else 2,
            last='conv_pwl' if expanded else 'conv_pw')
    if '.nodes.' in key:
        level, inputs = bifpn_graph(num_levels)[own[1]]
        top_down = own[1] < num_levels - 1
        return dict(
            level=level + FIRST_LEVEL,
            count=num_levels + own[1],  # of tensors when the node runs
            source=inputs[own[2]] if len(own) > 2 else None,
            way='up' if top_down else 'down',
            path=1 if top_down else 2,
            again='' if top_down else '_2',
            channel='down_channel' if top_down else 'level_connection')
    if '_norms.' in key:
        return dict(level=own[1] + FIRST_LEVEL)
    return dict(arch=arch)


@dataclass(frozen=True, eq=False)
class Layout:
    """How one project names the tensors of an EfficientDet.

    Args:
        title (str): What a receipt calls it.
        modules (dict): Our modules to theirs. Fusion weights, which are no
            module, are named in full.
        tensorflow (bool): Whether leaves and axes are TensorFlow's.
        suffix (str): What follows each name. Defaults to nothing.
        inner_conv (bool): Whether a convolution may stand in a wrapper, as
            ``x.conv.weight`` for ``x.weight``.
        prefix (str): What may stand in front of all names. Defaults to
            nothing.
        y_first (bool): Whether boxes are (y, x, h, w) of each anchor.
        classifier (str): Pattern of the names of an ImageNet classifier; a
            layout that has one is of a backbone alone.
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
        """The names of one tensor of ours, which may be stored in parts.

        Returns:
            list[str]: Empty where the layout has no such tensor.
        """
        module, leaf = key.rsplit('.', 1)
        kind = _NUMBER.sub('{}', f'{module}.')[:-1]
        own = _NUMBER.findall(f'{module}.')
        values = numbers_of(key, arch, num_levels)
        if leaf == 'fusion_weights':
            kind, leaf = f'{kind}.{leaf}', ''
        if kind not in self.modules:
            return []
        name = self.modules[kind].format(*own, **values)
        if not leaf:
            if not self.tensorflow:
                return [name]
            parts = len(bifpn_graph(num_levels)[int(own[1])][1])
            leaves = [name + (f'_{i}' if i else '') for i in range(parts)]
            return [leaf + self.suffix for leaf in leaves]
        if not self.tensorflow:
            return [f'{name}.{leaf}']
        if kind.endswith(('bn', 'norm', 'norms.{}.{}')):
            leaf = _TF_NORM[leaf]
        elif leaf == 'weight':
            separable = re.search('depthwise|pointwise', kind)
            leaf = (f'{separable.group()}_' if separable else '') + 'kernel'
        return [f'{name}/{leaf}{self.suffix}']

    def normalized(self, name: str) -> str:
        """A name of the source as this table has it."""
        name = name.removeprefix(self.prefix)
        if self.inner_conv:
            return re.sub(r'\.conv\.(weight|bias)$', r'.\1', name)
        return name


class OwnLayout(Layout):
    """Our own names, of what is a checkpoint of ours already."""

    def names(self, key: str, arch: str, num_levels: int) -> List[str]:
        """The name itself."""
        return [key]
