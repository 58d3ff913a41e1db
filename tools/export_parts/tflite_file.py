"""Edits TensorFlow Lite files by their schema, without TensorFlow.

All functions change a ``ModelT`` of one subgraph, as :func:`read` returns it.
"""
from pathlib import Path
from typing import List, Sequence

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

POSTPROCESS = 'TFLite_Detection_PostProcess'


class Builder(flatbuffers.Builder):
    """Writes equal arrays once.

    A tenth of an int8 file are zero points, one of eight bytes for each
    channel and all of them zero.
    """

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.known = {}

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        """The offset of an array, perhaps of an equal one before."""
        key = x.dtype.str, x.tobytes()
        if key not in self.known:
            self.known[key] = super().CreateNumpyVector(x)
        return self.known[key]


def read(path: str):
    """The objects of a file."""
    data = Path(path).read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    for buffer in model.buffers:
        if buffer.offset > 1:  # the quantiser writes weights behind the model
            end = buffer.offset + buffer.size
            buffer.data = np.frombuffer(data[buffer.offset:end], np.uint8)
            buffer.offset = buffer.size = 0
    return model


def write(model, path: str, signature: Sequence = ()) -> None:
    """Writes a file.

    Args:
        model (ModelT): What to write.
        path (str): The file.
        signature (Sequence): Its signatures. Defaults to none: Coral takes
            the outputs of a file without one in their own order.
    """
    model.signatureDefs = list(signature)
    builder = Builder()
    builder.Finish(model.Pack(builder), b'TFL3')
    Path(path).write_bytes(builder.Output())


def signature_input(path: str) -> str:
    """The name of the input in the first signature of a file."""
    return read(path).signatureDefs[0].inputs[0].name.decode()


def fix_nearest(model) -> None:
    """Makes nearest-neighbour resizing that of PyTorch.

    litert-torch 0.10.0 sets ``half_pixel_centers``, which is wrong if a level
    is not exactly twice as large as the next, as in Lite0 at 320 pixels.
    """
    for operator in model.subgraphs[0].operators:
        options = operator.builtinOptions
        if type(options).__name__ == 'ResizeNearestNeighborOptionsT':
            options.halfPixelCenters = False


def take_uint8(model) -> None:
    """Puts a conversion from uint8 before an int8 input.

    The pixel 0 to 255 is the quantised value plus 128, so nothing is rounded.
    """
    graph = model.subgraphs[0]
    old = graph.inputs[0]
    tensor = graph.tensors[old]
    scale, zero = tensor.quantization.scale, tensor.quantization.zeroPoint
    if abs(scale[0] - 1) > 1e-3 or zero[0] != -128:
        raise ValueError(f'the input has scale {scale[0]} and zero point '
                         f'{zero[0]}, not 1 and -128: the calibration images '
                         'must have pixels of 0 and of 255')
    new = _tensor(model, 'images', tensor.shape, schema.TensorType.UINT8)
    graph.tensors[new].quantization = _scales(1.0, 0)
    graph.inputs = np.array([new], np.int32)
    _operator(model, schema.BuiltinOperator.QUANTIZE, [new], [old], first=True)


def give_float(model) -> None:
    """Puts a conversion to float32 behind each int8 output."""
    graph, outputs = model.subgraphs[0], []
    for index in graph.outputs:
        tensor = graph.tensors[index]
        if tensor.type == schema.TensorType.INT8:
            old, index = index, _tensor(model, f'output_{len(outputs)}',
                                        tensor.shape,
                                        schema.TensorType.FLOAT32)
            _operator(model, schema.BuiltinOperator.DEQUANTIZE, [old], [index])
        outputs.append(index)
    graph.outputs = np.array(outputs, np.int32)


def add_postprocess(model,
                    anchors: np.ndarray,
                    num_classes: int,
                    max_detections: int = 100) -> None:
    """Appends sigmoid and ``TFLite_Detection_PostProcess``.

    Args:
        model (ModelT): With float32 outputs (dy, dx, dh, dw) and logits.
        anchors (np.ndarray): ``(A, 4)`` centre and size (y, x, h, w), by the
            size of the input.
        num_classes (int): Number of classes.
        max_detections (int): Defaults to 100.
    """
    graph, float32 = model.subgraphs[0], schema.TensorType.FLOAT32
    boxes, logits = graph.outputs
    scores = _tensor(model, 'class_scores', graph.tensors[logits].shape,
                     float32)
    _operator(model, schema.BuiltinOperator.LOGISTIC, [logits], [scores])
    data = np.ascontiguousarray(anchors, np.float32)
    constant = _tensor(model, 'anchors', data.shape, float32, data)
    count = max_detections
    # MediaPipe pairs metadata and tensors by ascending index.
    outputs = [
        _tensor(model, name, shape, float32)
        for name, shape in (('boxes', (1, count, 4)), ('classes', (1, count)),
                            ('scores', (1, count)), ('count', (1, )))
    ]
    options = flexbuffers.Builder()
    with options.Map():
        for name, value in dict(
                max_detections=count,
                max_classes_per_detection=1,
                detections_per_class=count,
                num_classes=num_classes).items():
            options.Int(name, value)
        options.Bool('use_regular_nms', False)
        options.Float('nms_score_threshold', 0.001)
        options.Float('nms_iou_threshold', 0.5)
        for axis in 'yxhw':
            options.Float(f'{axis}_scale', 1.0)
    operator = _operator(model, schema.BuiltinOperator.CUSTOM,
                         [boxes, scores, constant], outputs)
    operator.customOptions = np.frombuffer(options.Finish(), np.uint8)
    graph.outputs = np.array(outputs, np.int32)


def add_metadata(model, data: np.ndarray) -> None:
    """Adds what MediaPipe reads, packed as bytes."""
    entry, buffer = schema.MetadataT(), schema.BufferT()
    entry.name, entry.buffer = 'TFLITE_METADATA', len(model.buffers)
    buffer.data = data
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]


def _scales(scale: float, zero: int):
    result = schema.QuantizationParametersT()
    result.scale = np.array([scale], np.float32)
    result.zeroPoint = np.array([zero], np.int64)
    return result


def _tensor(model,
            name: str,
            shape: Sequence[int],
            kind: int,
            data: np.ndarray = None) -> int:
    """Adds a tensor; returns its index."""
    tensor = schema.TensorT()
    tensor.name, tensor.type = name.encode(), kind
    tensor.shape = np.array(shape, np.int32)
    buffer = schema.BufferT()
    if data is not None:
        buffer.data = np.frombuffer(data.tobytes(), np.uint8)
    tensor.buffer = len(model.buffers)
    model.buffers.append(buffer)
    graph = model.subgraphs[0]
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _operator(model,
              code: int,
              inputs: List[int],
              outputs: List[int],
              first: bool = False):
    """Adds an operator at the start or the end; returns it."""
    entry = schema.OperatorCodeT()
    entry.builtinCode, entry.version = code, 1
    entry.deprecatedBuiltinCode = min(code, 127)
    if code == schema.BuiltinOperator.CUSTOM:
        entry.customCode = POSTPROCESS.encode()
    elif code != schema.BuiltinOperator.LOGISTIC:
        entry.version = 2  # with int8
    model.operatorCodes.append(entry)
    operator = schema.OperatorT()
    operator.opcodeIndex = len(model.operatorCodes) - 1
    operator.inputs = np.array(inputs, np.int32)
    operator.outputs = np.array(outputs, np.int32)
    operators = model.subgraphs[0].operators
    operators.insert(0 if first else len(operators), operator)
    return operator
