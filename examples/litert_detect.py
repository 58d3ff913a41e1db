"""python litert_detect.py detector.tflite picture.jpg; reads detector.json."""
import json
import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image, ImageOps


def anchors_of(size, number, octave_base_scale, scales_per_octave,
               aspect_pairs):
    octaves = 2**(np.arange(scales_per_octave) / scales_per_octave)
    shapes = octaves[:, None, None] * np.array(aspect_pairs)[:, ::-1]
    shapes = shapes.reshape(-1, 2) * octave_base_scale
    anchors, level = np.empty((0, 4)), -(-np.array(size) // 4)
    while len(anchors) < number:
        level = -(-level // 2)
        stride = size / level
        cells = np.moveaxis(np.mgrid[:level[0], :level[1]] + 0.5, 0, -1)
        centres = np.repeat((cells * stride).reshape(-1, 2), len(shapes), 0)
        sides = np.tile(shapes * stride, (level.prod(), 1))
        anchors = np.vstack([anchors, np.hstack([centres, sides])])
    return anchors


interpreter = Interpreter(sys.argv[1], num_threads=2)
interpreter.allocate_tensors()
settings = json.loads(Path(sys.argv[1]).with_suffix('.json').read_bytes())
image = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert('RGB')
height, width = inner = settings['image_size']
if settings['resize'] == 'pad':
    scale = min(height / image.height, width / image.width)
    inner = [max(1, int(x * scale)) for x in (image.height, image.width)]
given = interpreter.get_input_details()[0]
outputs = interpreter.get_output_details()
canvas = np.full((1, height, width, 3), settings['mean'])
canvas = canvas.round().astype(given['dtype'])
canvas[0, :inner[0], :inner[1]] = image.resize(inner[::-1], 2)
interpreter.set_tensor(given['index'], canvas)
interpreter.invoke()
deltas, logits = (interpreter.get_tensor(x['index'])[0] for x in outputs)
anchors = anchors_of((height, width), len(deltas), **settings['anchors'])
scores, labels = 1 / (1 + np.exp(-logits.max(1))), logits.argmax(1)
centre = deltas[:, :2] * anchors[:, 2:] + anchors[:, :2]
half = np.exp(deltas[:, 2:]) * anchors[:, 2:] / 2
boxes = np.hstack([centre - half, centre + half])  # y1, x1, y2, x2
boxes /= np.tile([inner[0] / image.height, inner[1] / image.width], 2)
for label in np.unique(labels):  # hard suppression of each class
    order = np.argsort(-scores)
    rest = order[(labels == label)[order] & (scores[order] >= 0.3)]
    while len(rest):
        y1, x1, y2, x2 = boxes[rest[0]]
        print(settings['classes'][label], f'{scores[rest[0]]:.4f}',
              *np.round([x1, y1, x2, y2], 1).tolist())
        low = np.maximum(boxes[rest, :2], boxes[rest[0], :2])
        high = np.minimum(boxes[rest, 2:], boxes[rest[0], 2:])
        inter = (high - low).clip(0).prod(1)
        areas = (boxes[rest, 2:] - boxes[rest, :2]).prod(1)
        rest = rest[inter / (areas + areas[0] - inter) <= 0.5]
