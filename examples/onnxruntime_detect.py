"""Detect objects in a picture with an exported .onnx file with boxes.

    python onnxruntime_detect.py detector.onnx picture.jpg

The file is one of --to onnx --nms hard or soft. Needs onnxruntime, numpy and
Pillow. Prints class, score and box (x1, y1, x2, y2) in pixels of the picture.
"""
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def fit(image, size, resize, mean):
    """Resizes a picture to the input; returns it and the factors (x, y)."""
    height, width = size
    scale = min(height / image.height, width / image.width)
    inner = (width, height)
    if resize == 'pad':
        inner = (max(1, int(image.width * scale)),
                 max(1, int(image.height * scale)))
    canvas = np.empty((1, height, width, 3), np.uint8)
    canvas[:] = np.round(mean)
    canvas[0, :inner[1], :inner[0]] = image.resize(
        inner, Image.BILINEAR, reducing_gap=None)
    return canvas, (inner[0] / image.width, inner[1] / image.height)


def main():
    model, picture = sys.argv[1:3]
    session = onnxruntime.InferenceSession(
        model, providers=['CPUExecutionProvider'])
    settings = {
        key: json.loads(value)
        for key, value in session.get_modelmeta().custom_metadata_map.items()
    }
    image = ImageOps.exif_transpose(Image.open(picture)).convert('RGB')
    images, (x, y) = fit(image, settings['image_size'], settings['resize'],
                         settings['mean'])
    boxes, scores, labels = session.run(None, {'images': images})
    for box, score, label in zip(boxes[0], scores[0], labels[0]):
        if score >= 0.3:
            corners = (box / [x, y, x, y]).round(1).tolist()
            print(settings['classes'][label], f'{score:.4f}', *corners)


if __name__ == '__main__':
    main()
