"""Runs exported files in the runtime that each is for.

A runtime may live in another environment than MMDetection. So
``python runtimes.py KIND FILE`` reads images from the standard input and
writes outputs to the standard output, as .npz.
"""
import io
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import BinaryIO, Callable, List, Sequence

import numpy as np

from mmdet_efficientdet.deploy.network import load_plain
from mmdet_efficientdet.deploy.settings import DetectorSettings

Run = Callable[[np.ndarray], List[np.ndarray]]


def open_torch(path: str) -> Run:
    """A plain network; its settings are in the .json beside it."""
    import torch
    from heads import Heads  # of this folder, as for a script
    torch.set_num_threads(1)
    settings = DetectorSettings.load(Path(path).with_suffix('.json'))
    heads = Heads(load_plain(path), settings)
    return lambda image: [x.numpy() for x in heads(torch.from_numpy(image))]


def open_onnx(path: str) -> Run:
    """ONNX Runtime on the CPU."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        path, options, providers=['CPUExecutionProvider'])
    return lambda image: session.run(None, {'images': image})


def open_openvino(path: str) -> Run:
    """OpenVINO on the CPU, whose default precision may be bfloat16."""
    import openvino
    compiled = openvino.Core().compile_model(
        path, 'CPU',
        dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=1))
    return lambda image: [*compiled(image).values()]


def open_litert(path: str) -> Run:
    """LiteRT; boxes are returned in this package's order."""
    from ai_edge_litert.interpreter import Interpreter
    from heads import YXHW
    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    given, = interpreter.get_input_details()
    outputs = interpreter.get_output_details()

    def run(image: np.ndarray) -> List[np.ndarray]:
        interpreter.set_tensor(given['index'], image.astype(given['dtype']))
        interpreter.invoke()
        found = [interpreter.get_tensor(x['index']) for x in outputs]
        if len(found) == 2:
            return [found[0][..., YXHW], found[1]]
        boxes, labels, scores, count = (x[0] for x in found)
        height, width = image.shape[1:3]
        boxes = boxes[:, YXHW] * np.float32([width, height, width, height])
        return [x[:int(count)][None] for x in (boxes, scores, labels)]

    return run


def open_mediapipe(path: str) -> Run:
    """MediaPipe's ``ObjectDetector``; its boxes are whole pixels."""
    import mediapipe
    from mediapipe.tasks.python import BaseOptions
    from mediapipe.tasks.python.vision import (ObjectDetector,
                                               ObjectDetectorOptions)
    with zipfile.ZipFile(path) as archive:  # MediaPipe gives names only
        names = archive.read('labels.txt').decode().split('\n')
    detector = ObjectDetector.create_from_options(
        ObjectDetectorOptions(
            BaseOptions(model_asset_path=path),
            max_results=100,
            score_threshold=0.01))

    def run(image: np.ndarray) -> List[np.ndarray]:
        found = detector.detect(
            mediapipe.Image(
                image_format=mediapipe.ImageFormat.SRGB,
                data=np.ascontiguousarray(image[0]))).detections
        boxes = [(x.bounding_box.origin_x, x.bounding_box.origin_y,
                  x.bounding_box.origin_x + x.bounding_box.width,
                  x.bounding_box.origin_y + x.bounding_box.height)
                 for x in found]
        best = [x.categories[0] for x in found]
        return [
            np.array(boxes, np.float32).reshape(1, -1, 4),
            np.array([[x.score for x in best]], np.float32),
            np.array([[names.index(x.category_name) for x in best]], np.int64)
        ]

    return run


OPENERS = dict(
    torch=open_torch,
    onnx=open_onnx,
    openvino=open_openvino,
    litert=open_litert,
    ObjectDetector=open_mediapipe)


class RuntimeProcess:
    """A process that runs a file, perhaps of another environment.

    Args:
        python (str): Interpreter of the environment.
        kind (str): A key of ``OPENERS``.
        path (str): The file.
        environment (dict): Variables of the process.
        log (str): File for what the runtime prints.
    """

    def __init__(self, python: str, kind: str, path: str, environment: dict,
                 log: str) -> None:
        self.log = log
        with open(log, 'wb') as errors:
            self.process = subprocess.Popen([python, __file__, kind, path],
                                            env=environment,
                                            stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE,
                                            stderr=errors)

    def __call__(self, image: np.ndarray) -> Sequence:
        """Runs one image ``(1, H, W, 3)``; returns seconds and outputs.

        Raises:
            ValueError: If the runtime has failed, with its last words.
        """
        try:
            _send(self.process.stdin, [image])
            seconds, *outputs = _receive(self.process.stdout)
            return float(seconds), outputs
        except (EOFError, OSError) as error:
            self.close()
            words = Path(self.log).read_text(errors='replace').strip()
            raise ValueError('the runtime has failed: '
                             f'{words[-600:] or error}') from error

    def close(self) -> None:
        """Ends the process."""
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except OSError:
                pass
        self.process.wait()


def main() -> None:
    """Serves images until the standard input ends."""
    kind, path = sys.argv[1:]
    # Runtimes print; the replies must stay alone.
    replies = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)
    run = OPENERS[kind](path)
    while True:
        try:
            image, = _receive(sys.stdin.buffer)
        except EOFError:
            return
        start = time.perf_counter()
        outputs = run(image)
        seconds = time.perf_counter() - start
        _send(replies, [np.float64(seconds), *outputs])


def _send(stream: BinaryIO, arrays: Sequence[np.ndarray]) -> None:
    """Writes arrays as one .npz with its length before it."""
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    data = buffer.getvalue()
    stream.write(len(data).to_bytes(8, 'little') + data)
    stream.flush()


def _receive(stream: BinaryIO) -> List[np.ndarray]:
    """Reads what :func:`_send` has written."""
    data = stream.read(8)
    data = stream.read(int.from_bytes(data, 'little'))
    if not data:
        raise EOFError('the other process has ended')
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return [arrays[f'arr_{i}'] for i in range(len(arrays.files))]


if __name__ == '__main__':
    main()
