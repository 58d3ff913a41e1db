"""The networks of benchmark.py in other runtimes, as functions of one call."""
import io
import time
import warnings

import torch

from mmdet_efficientdet.utils import import_package


def onnx_file(network, images):
    """A network as an ONNX file of the size of ``images``.

    Args:
        network (Module): Returns lists of tensors.
        images (Tensor): ``(N, 3, H, W)``.
    """
    import_package('onnx', 'the ONNX row')
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            network.eval(), (images, ), file, dynamo=False, opset_version=17)
    return file.getvalue()


def in_onnxruntime(data, images, threads):
    """A function that runs an ONNX file."""
    runtime = import_package('onnxruntime', 'the ONNX row')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    available = runtime.get_available_providers()
    wanted = ['CUDAExecutionProvider', 'CPUExecutionProvider']
    session = runtime.InferenceSession(
        data, options, [name for name in wanted if name in available])
    feed = {session.get_inputs()[0].name: images.cpu().numpy()}
    return lambda: session.run(None, feed)


def in_openvino(data, images, threads):
    """A function that runs an ONNX file in float32, or None.

    None stands for a machine without OpenVINO.
    """
    try:
        openvino = import_package('openvino', 'the OpenVINO row')
    except ValueError as error:
        print(error)
        return None
    core = openvino.Core()
    model = core.compile_model(
        core.read_model(data),
        'CPU',
        {
            'INFERENCE_PRECISION_HINT': 'f32',  # else bfloat16 where it can
            'INFERENCE_NUM_THREADS': threads
        })
    x = images.cpu().numpy()
    return lambda: model(x)


def compiled(network, images, title):
    """The network compiled by inductor, after its first call.

    On a GPU it is recorded as CUDA graphs.
    """
    mode = 'reduce-overhead' if images.is_cuda else 'default'
    torch._dynamo.reset()
    function = torch.compile(network, mode=mode)
    start = time.perf_counter()
    function(images)
    print(f'{title}: compiled in {time.perf_counter() - start:.0f} s')
    return lambda: function(images)


def half(network, images):
    """The network in automatic mixed precision, bfloat16 on a CPU."""
    dtype = torch.float16 if images.is_cuda else torch.bfloat16

    def run():
        with torch.autocast(images.device.type, dtype):
            network(images)

    return run
