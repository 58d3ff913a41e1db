"""Which parameters decay, and in which groups."""
import pytest
import torch
from helpers.models import SIZES
from helpers.tiny_data import CONFIGS
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

# Kernels under weight decay: tensors and elements, for 90 classes.
DECAYED = {
    'd0': (150, 3_820_384),
    'd1': (200, 6_535_488),
    'd2': (216, 7_993_088),
    'd3': (251, 11_887_032),
    'd4': (297, 20_510_664),
    'd5': (331, 33_364_464),
    'd6': (381, 51_475_632),
    'd7': (381, 51_475_632),
    'd7x': (462, 76_618_528),
    'lite0': (118, 3_193_184),
    'lite1': (149, 4_180_528),
    'lite2': (165, 5_173_104),
    'lite3': (194, 8_235_904),
    'lite3x': (194, 9_155_904),
    'lite4': (228, 14_958_864)
}


@pytest.mark.parametrize('name', DECAYED)
def test_decayed_kernels(name, build_detector):
    """Two groups: the official kernels, and all else without decay."""
    model = build_detector(name, 90, 'meta')
    wrapper = build_optim_wrapper(model,
                                  Config.fromfile(SIZES[name]).optim_wrapper)
    decayed, spared = wrapper.optimizer.param_groups
    assert decayed['weight_decay'] == 4e-5 and spared['weight_decay'] == 0
    assert decayed['lr'] == spared['lr'] == 0.16
    kernels = decayed['params']
    assert (len(kernels), sum(k.numel() for k in kernels)) == DECAYED[name]
    assert all(kernel.ndim == 4 for kernel in kernels)
    assert all(other.ndim < 2 for other in spared['params'])
    everything = {id(p) for p in model.parameters()}
    assert everything == {id(p) for p in kernels + spared['params']}
    assert wrapper.optimizer.defaults['nesterov'] is False
    assert wrapper.optimizer.defaults['momentum'] == 0.9
    assert wrapper.clip_grad_kwargs == dict(max_norm=10, norm_type=2)


def test_fusion_weights_do_not_decay(model_cfg):
    """Not even those that have a row for each channel."""
    cfg = model_cfg('d0')
    cfg.neck.fusion = 'channel_softmax'
    with torch.device('meta'):
        model = MODELS.build(cfg)
    wrapper = build_optim_wrapper(model,
                                  Config.fromfile(SIZES['d0']).optim_wrapper)
    decayed, spared = wrapper.optimizer.param_groups
    assert len(decayed['params']) == DECAYED['d0'][0]
    assert {p.ndim for p in spared['params']} == {1, 2}


def test_groups_keep_their_options():
    """The trees' backbone learns more slowly; frozen blocks not at all."""
    config = Config.fromfile(CONFIGS / 'efficientdet_lite0_1xb8_trees.py')
    config.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    model = MODELS.build(config.model)
    groups = build_optim_wrapper(model,
                                 config.optim_wrapper).optimizer.param_groups
    assert {(round(g['lr'], 9), g['weight_decay'])
            for g in groups} == {(6e-4, 1e-2), (6e-4, 0), (6e-3, 1e-2),
                                 (6e-3, 0)}
    assert len(groups) == 4
    for group in groups:
        assert {p.ndim > 1
                for p in group['params']} == {group['weight_decay'] > 0}
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group['params']) for group in groups) == len(learned)
    assert len(learned) < len(list(model.parameters()))


@pytest.mark.parametrize('kind, decay', [('AdamW', 1e-2), ('SGD', 0),
                                         (torch.optim.AdamW, 1e-2)])
def test_decay_is_the_optimizers(kind, decay, model_cfg):
    """A recipe that leaves rate and decay out gets torch's own numbers."""
    with torch.device('meta'):
        model = MODELS.build(model_cfg('d0'))
    config = Config.fromfile(SIZES['d0']).optim_wrapper
    config.optimizer = dict(type=kind)
    config.paramwise_cfg.custom_keys.backbone = dict(lr_mult=0.1)
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    assert {(round(g['lr'], 9), g['weight_decay'])
            for g in groups} == {(rate, d)
                                 for rate in (1e-3, 1e-4)
                                 for d in (decay, 0)}
    for group in groups:
        if {p.ndim for p in group['params']} == {4}:
            assert group['weight_decay'] == decay


def test_log_of_the_groups(log):
    """One line in place of one or more for each parameter."""
    config = Config.fromfile(CONFIGS / 'efficientdet_lite0_1xb8_trees.py')
    config.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    model = MODELS.build(config.model)
    log.clear()
    groups = build_optim_wrapper(model,
                                 config.optim_wrapper).optimizer.param_groups
    assert not [m for m in log if 'paramwise' in m or 'is skipped' in m]
    line, = (line for line in log if line.startswith('Parameters: '))
    for group in groups:
        part = (f"{len(group['params'])} with {{'lr': {group['lr']}, "
                f"'weight_decay': {group['weight_decay']}}}")
        assert part in line
    frozen = sum(not p.requires_grad for p in model.parameters())
    assert frozen and f'; {frozen} frozen' in line
    # Others are heard, then as now.
    MMLogger.get_current_instance().info('paramwise_options of mine')
    assert log[-1] == 'paramwise_options of mine'


def test_decay_of_a_key():
    """A key's own decay_mult counts for all that it names."""
    model = torch.nn.ModuleDict({
        name: torch.nn.Conv2d(1, 1, 1)
        for name in ('slow', 'decayed', 'other')
    })
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='mmdet_efficientdet.GroupedOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=1, weight_decay=0.1),
            paramwise_cfg=dict(
                flat_decay_mult=0,
                custom_keys=dict(
                    slow=dict(lr_mult=0.5), decayed=dict(decay_mult=1)))))
    found = {
        id(parameter): (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }
    assert [
        found[id(parameter)] for name in ('slow', 'decayed', 'other')
        for parameter in (model[name].weight, model[name].bias)
    ] == [(0.5, 0.1), (0.5, 0), (1, 0.1), (1, 0.1), (1, 0.1), (1, 0)]


def test_decay_of_norms_is_the_users():
    """Without a key the host's own order of rules counts."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    rules = dict(flat_decay_mult=0, norm_decay_mult=1)
    optimizer = dict(type='SGD', lr=1, weight_decay=0.1)
    ours, hosts = (
        build_optim_wrapper(
            model,
            dict(
                optimizer=optimizer,
                paramwise_cfg=rules,
                constructor=constructor)) for constructor in (
                    'mmdet_efficientdet.GroupedOptimWrapperConstructor',
                    'DefaultOptimWrapperConstructor'))
    decay = [{
        id(p): group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    } for wrapper in (ours, hosts)]
    assert decay[0] == decay[1]
    assert sorted(decay[0].values()) == [0, 0.1, 0.1, 0.1]


def test_shared_parameter():
    """It would be stepped twice, and its gradient counted twice."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    config = dict(
        constructor='mmdet_efficientdet.GroupedOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=1),
        paramwise_cfg=dict(flat_decay_mult=0))
    with pytest.raises(ValueError, match='0.weight is shared'):
        build_optim_wrapper(model, config)
    config['paramwise_cfg']['bypass_duplicate'] = True
    group, = build_optim_wrapper(model, config).optimizer.param_groups
    assert len(group['params']) == 3
