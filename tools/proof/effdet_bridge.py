"""Networks of effdet 0.4.1 and of ours with the same weights.

The scripts that compare with effdet, and the tests, share this module.
"""
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_efficientdet.scaling import SCALING, scale_config
from mmdet_efficientdet.utils import config_file
from mmdet_efficientdet.weights.convert import build_on_meta, model_signature
from mmdet_efficientdet.weights.layouts import LAYOUTS
from mmdet_efficientdet.weights.matching import match

try:
    import effdet
except ImportError as error:
    raise SystemExit(f'effdet, which the results are compared with, cannot be '
                     f'imported ({error}). Install it: '
                     'pip install effdet==0.4.1') from error


def effdet_network(size, sides, **settings):
    """effdet's network for inputs of (height, width), without weights.

    Args:
        size (str): A key of ``SCALING``.
        sides (tuple[int]): Height and width, of which effdet builds its neck.
        settings: Other values of effdet's config.
    """
    config = effdet.get_efficientdet_config(f'tf_efficientdet_{size}')
    config.update(dict(image_size=tuple(sides), **settings))
    with torch.device('meta'):
        return effdet.EfficientDet(config, pretrained_backbone=False).eval()


def random_weights(size, seed=0, **settings):
    """Weights for effdet's network of a size, none of them trivial.

    Statistics of norms are those of noise: so values keep their magnitude
    through the deepest network, and every tensor shows in the outputs.

    Args:
        size (str): A key of ``SCALING``.
        seed (int): Of all that is random.
        settings: Other values of effdet's config.
    """
    generator = torch.Generator().manual_seed(seed)
    network = effdet_network(size, (320, 320), **settings)
    weights = {}
    for key, value in network.state_dict().items():
        new = torch.zeros(value.shape, dtype=value.dtype)
        if value.ndim == 4:
            new.normal_(0, value[0].numel()**-0.5, generator=generator)
        elif key.endswith('edge_weights'):
            new.uniform_(0.5, 1.5, generator=generator)
            new[-1] -= 0.6  # some are negative, and count as nothing
        elif key.endswith('bias'):
            new.normal_(0, 0.2, generator=generator)
        elif key.endswith('weight'):
            new.uniform_(0.5, 1.5, generator=generator)
        weights[key] = new
    network.load_state_dict(weights, assign=True)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)  # of stochastic depth, too
        network.train()(torch.randn(2, 3, 320, 320))
    return network.state_dict()


def our_network(weights, size, num_classes=90, side=None):
    """Our detector with converted weights.

    Args:
        weights (dict): State dict of effdet's network.
        size (str): A key of ``SCALING``.
        num_classes (int): Classes of those weights.
        side (int): Of the input. Defaults to the size's own.
    """
    cfg = Config.fromfile(config_file(size))
    scale_config(cfg, size, image_size=side)
    cfg.model.backbone.init_cfg = None
    cfg.model.bbox_head.num_classes = num_classes
    model = build_on_meta(cfg)
    state_dict = match(weights, *model_signature(model)).state_dict()
    model.load_state_dict(state_dict, assign=True)
    # Mean and deviation are in no checkpoint.
    model.data_preprocessor = MODELS.build(cfg.model.data_preprocessor)
    model.cfg = cfg
    return model.eval()


def swap_xy(boxes, dim=1):
    """(y, x, h, w) of each anchor as (x, y, w, h), or back."""
    return boxes.unflatten(dim, (-1, 4)).index_select(
        dim + 1, torch.tensor([1, 0, 3, 2])).flatten(dim, dim + 1)


def in_layout(state_dict, layout, arch, num_levels):
    """Our tensors as another project stores them.

    Args:
        state_dict (dict): Ours.
        layout (Layout): One of ``LAYOUTS``.
        arch (str): Architecture of the backbone.
        num_levels (int): Number of pyramid levels.
    """
    stored = {}
    for key, value in state_dict.items():
        if layout.y_first and key.startswith('bbox_head.conv_reg.pointwise'):
            value = swap_xy(value, 0)
        values = [value]
        if layout.tensorflow:
            if value.ndim == 4:
                depthwise = 'depthwise' in key
                value = value.permute((2, 3, 0, 1) if depthwise else (2, 3, 1,
                                                                      0))
            values = list(value) if key.endswith('fusion_weights') else [value]
        names = layout.names(key, arch, num_levels)
        stored.update(zip(names, values, strict=True))
    return stored


def as_effdet(state_dict, size):
    """Copies of our weights and statistics for effdet's network."""
    own = {
        key: value.clone()
        for key, value in state_dict.items() if 'num_batches' not in key
    }
    layout, = (layout for layout in LAYOUTS if layout.title == 'effdet')
    row = SCALING[size]
    return in_layout(own, layout, row.backbone, row.num_levels)
