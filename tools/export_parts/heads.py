"""The plain network as runtimes call it: from an RGB image to joined heads."""
import copy
from typing import Sequence, Tuple

import torch
import torch.fx
from torch import Tensor, nn

from mmdet_efficientdet.deploy.network import PlainNetwork
from mmdet_efficientdet.deploy.postprocess import join
from mmdet_efficientdet.deploy.settings import DetectorSettings

YXHW = (1, 0, 3, 2)  # TensorFlow's order of a box, by ours


class Heads(nn.Module):
    """Normalises images and joins the maps of all levels.

    Args:
        network (PlainNetwork): It is not changed.
        settings (DetectorSettings): Its mean and deviation are used.
        yxhw (bool): Whether boxes are (dy, dx, dh, dw), as TensorFlow Lite
            expects, not (dx, dy, dw, dh). Defaults to False.
    """

    def __init__(self,
                 network: PlainNetwork,
                 settings: DetectorSettings,
                 yxhw: bool = False) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.num_classes = network.settings['num_classes']
        for name in ('mean', 'std'):
            value = torch.tensor(getattr(settings, name)).view(1, 1, 1, 3)
            self.register_buffer(name, value)
        if yxhw:
            conv = self.network.reg_net.predictor.conv
            for weight in (conv.weight, conv.bias):
                rows = weight.data.unflatten(0, (-1, 4))[:, YXHW]
                weight.data = rows.flatten(0, 1).contiguous()
        self.eval()  # an exporter copies the mode of the outermost module

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor]:
        """Predicts boxes and class scores of all anchors.

        Args:
            images (Tensor): ``(N, H, W, 3)`` RGB of 0 to 255, any type.

        Returns:
            tuple[Tensor]: Deltas ``(N, A, 4)`` and logits ``(N, A, K)``; the
            anchors are in the order level, row, column, octave, aspect.
        """
        images = (images.float() - self.mean) / self.std
        cls_scores, bbox_preds = self.network(images.permute(0, 3, 1, 2))
        return join(bbox_preds, 4), join(cls_scores, self.num_classes)


def freeze(heads: Heads, image_size: Sequence[int]) -> nn.Module:
    """The operators for one height and width, none of which works in place.

    Exporters cannot follow the arithmetic on sizes in the network, and
    litert-torch has no addition with a factor. The batch size may vary.

    Args:
        heads (Heads): What to trace.
        image_size (Sequence[int]): Height and width.
    """
    images = torch.zeros(1, *image_size, 3)
    program = torch.export.export(heads, (images, ), strict=False)
    module = program.run_decompositions({}).module()
    graph, ops = module.graph, torch.ops.aten
    for node in list(graph.nodes):
        factor = node.kwargs.get('alpha')
        # Checks of the input's shape and type
        if (node.op == 'call_module'
                or node.target is ops._assert_tensor_metadata.default):
            graph.erase_node(node)
        elif factor is not None:
            with graph.inserting_before(node):
                scaled = node.args[1] if factor == 1 else graph.call_function(
                    ops.mul.Tensor, (node.args[1], factor))
            node.args, node.kwargs = (node.args[0], scaled), {}
        elif node.target is ops.mul.Tensor and node.args[1] == 1.0:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    # The module of an exported program has no modes, which exporters set.
    return torch.fx.GraphModule(module, graph).eval()
