"""Writes TensorFlow Lite files: python litert_file.py JOB.

The folder JOB holds plain.safetensors, plain.json, anchors.npy (xyxy in
pixels), job.json (``format`` and ``precision``) and, for int8, images.npy. It
gets model.tflite. litert-torch cannot share an environment with MMDetection.
"""
import json
import sys
import zipfile
from pathlib import Path
from typing import Sequence

import numpy as np
import tflite_file
import torch
from heads import Heads, freeze

from mmdet_efficientdet.deploy.network import load_plain
from mmdet_efficientdet.deploy.settings import DetectorSettings


def convert(heads: Heads, image_size: Sequence[int], path: str) -> None:
    """Writes a float32 file: images ``(1, H, W, 3)`` of 0 to 255 in.

    Args:
        heads (Heads): With boxes as (dy, dx, dh, dw).
        image_size (Sequence[int]): Height and width.
        path (str): The file.
    """
    import litert_torch
    images = torch.zeros(1, *image_size, 3)
    module = freeze(heads, image_size)
    litert_torch.convert(module, (images, )).export(str(path))
    model = tflite_file.read(path)
    tflite_file.fix_nearest(model)
    signature = model.signatureDefs  # the quantiser calibrates by it
    tflite_file.write(model, path, signature)


def quantize(path: str, images: np.ndarray, target: str) -> None:
    """Writes the file with int8 inside: uint8 in, float32 out.

    Weights are quantised for each channel, activations by the smallest and
    the largest value that the images cause.

    Args:
        path (str): What :func:`convert` has written.
        images (np.ndarray): ``(n, H, W, 3)`` uint8.
        target (str): The file to write.
    """
    from ai_edge_quantizer import quantizer, recipe

    inputs = [x[None].astype(np.float32) for x in images]
    run = quantizer.Quantizer(str(path))
    run.load_quantization_recipe(recipe.static_wi8_ai8())
    name = tflite_file.signature_input(path)
    found = run.calibrate({'serving_default': [{name: x} for x in inputs]})
    # The whole range, so that a pixel is exactly one step. The calibration
    # averages the ranges of the images.
    graph = tflite_file.read(path).subgraphs[0]
    values = found[graph.tensors[graph.inputs[0]].name.decode()]
    values['min'] = np.zeros_like(values['min'])
    values['max'] = np.full_like(values['max'], 255)
    run.quantize(found).export_model(str(target), overwrite=True)
    model = tflite_file.read(target)
    tflite_file.take_uint8(model)
    tflite_file.give_float(model)
    tflite_file.write(model, target)


def halve(path: str, target: str) -> None:
    """Writes the file with weights as float16; it computes in float32."""
    from ai_edge_quantizer import quantizer
    run = quantizer.Quantizer(str(path))
    config = dict(
        weight_tensor_config=dict(num_bits=16, dtype='FLOAT'),
        compute_precision='FLOAT',
        explicit_dequantize=True)
    run.load_quantization_recipe([
        dict(
            regex='.*',
            operation=operation,
            algorithm_key='float_casting',
            op_config=config) for operation in ('CONV_2D', 'DEPTHWISE_CONV_2D')
    ])
    run.quantize().export_model(str(target), overwrite=True)


def add_metadata(path: str, settings: DetectorSettings,
                 anchors: np.ndarray) -> None:
    """Adds what MediaPipe's ``ObjectDetector`` reads, in place.

    Args:
        path (str): A file with the two outputs of :class:`Heads`, or with
            the four of ``TFLite_Detection_PostProcess``.
        settings (DetectorSettings): With the class names.
        anchors (np.ndarray): ``(A, 4)`` centre and size (y, x, h, w), by the
            size of the input.
    """
    # The writers of mediapipe 1.2.3 import a module that it does not have.
    from mediapipe.tasks.metadata import metadata_schema_py_generated as schema
    from mediapipe.tasks.python.metadata.metadata_writers import \
        metadata_info as info
    image = info.InputImageTensorMd(  # the network normalises by itself
        'image', None, [0.0], [1.0], schema.ColorSpaceType.RGB)
    model = tflite_file.read(path)
    labels = dict(label_files=[info.LabelFileMd('labels.txt')])
    if len(model.subgraphs[0].outputs) == 2:
        outputs = [
            info.LocationTensorMd('location'),
            info.ClassificationTensorMd('score', **labels)
        ]
        custom = [
            _table(
                schema.CustomMetadataT,
                name='DETECTOR_METADATA',
                data=_packed(
                    _decoding(len(settings.classes), anchors), b'V001'))
        ]
    else:
        outputs = [
            info.LocationTensorMd('location'),
            info.CategoryTensorMd('category', **labels),
            info.ClassificationTensorMd('score'),
            info.TensorMd('number of detections')
        ]
        custom = None
    graph = _table(
        schema.SubGraphMetadataT,
        inputTensorMetadata=[image.create_metadata()],
        outputTensorMetadata=[x.create_metadata() for x in outputs],
        customMetadata=custom)
    metadata = _table(
        schema.ModelMetadataT,
        name='EfficientDet',
        subgraphMetadata=[graph],
        minParserVersion='1.5.0')
    tflite_file.add_metadata(model, _packed(metadata, b'M001'))
    tflite_file.write(model, path)
    with zipfile.ZipFile(path, 'a') as archive:  # behind the model
        archive.writestr('labels.txt', '\n'.join(settings.classes))


def _table(kind, **values):
    """An object of a schema with some of its values."""
    result = kind()
    vars(result).update(values)
    return result


def _packed(table, identifier: bytes) -> np.ndarray:
    """The bytes of an object of a schema."""
    import flatbuffers
    builder = flatbuffers.Builder(0)
    builder.Finish(table.Pack(builder), identifier)
    return np.frombuffer(bytes(builder.Output()), np.uint8)


def _decoding(num_classes: int, anchors: np.ndarray):
    """How MediaPipe turns raw heads into boxes."""
    from mediapipe.tasks.metadata import \
        object_detector_metadata_schema_py_generated as detector
    fixed = [
        _table(detector.FixedAnchorT, yCenter=y, xCenter=x, height=h, width=w)
        for y, x, h, w in anchors.tolist()
    ]
    fixed = _table(detector.FixedAnchorsSchemaT, anchors=fixed)
    decoding = _table(
        detector.TensorsDecodingOptionsT,
        numClasses=num_classes,
        numBoxes=len(anchors),
        numCoords=4,
        numValuesPerKeypoint=2,
        xScale=1.0,
        yScale=1.0,
        wScale=1.0,
        hScale=1.0,
        applyExponentialOnBoxSize=True,
        sigmoidScore=True)
    return _table(
        detector.ObjectDetectorOptionsT,
        ssdAnchorsOptions=_table(
            detector.SsdAnchorsOptionsT, fixedAnchorsSchema=fixed),
        tensorsDecodingOptions=decoding)


def normalized(anchors: np.ndarray, image_size: Sequence[int]) -> np.ndarray:
    """xyxy in pixels as centre and size (y, x, h, w) by the input's size."""
    sides = np.float32(image_size)
    start, end = anchors[:, 1::-1] / sides, anchors[:, 3:1:-1] / sides
    return np.hstack([(start + end) / 2, end - start]).astype(np.float32)


def main() -> None:
    """Does the work of a folder."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / 'job.json').read_text())
    settings = DetectorSettings.load(folder / 'plain.json')
    heads = Heads(load_plain(folder / 'plain.safetensors'), settings, True)
    target, floats = folder / 'model.tflite', folder / 'float.tflite'
    convert(heads, settings.image_size, floats)
    if job['precision'] == 'int8':
        images = np.load(folder / 'images.npy', allow_pickle=False)
        quantize(floats, images, target)
    elif job['precision'] == 'fp16':
        halve(floats, target)
    else:
        floats.replace(target)
    anchors = normalized(
        np.load(folder / 'anchors.npy', allow_pickle=False),
        settings.image_size)
    if job['format'] in ('frigate', 'coral'):
        (folder / 'heads.tflite').write_bytes(target.read_bytes())
        model = tflite_file.read(target)
        tflite_file.add_postprocess(model, anchors, len(settings.classes))
        tflite_file.write(model, target)
    if job['format'] != 'litert':
        add_metadata(target, settings, anchors)


if __name__ == '__main__':
    main()
