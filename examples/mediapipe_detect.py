"""Detect objects in a picture with an exported file for MediaPipe.

    python mediapipe_detect.py detector.tflite picture.jpg

Needs mediapipe, numpy and Pillow. The class names are in the file. Prints
class, score and box (x1, y1, x2, y2) in pixels of the picture.
"""
import sys

import mediapipe
import numpy as np
from mediapipe.tasks.python import BaseOptions
from mediapipe.tasks.python.vision import ObjectDetector, ObjectDetectorOptions
from PIL import Image, ImageOps


def main():
    options = ObjectDetectorOptions(
        BaseOptions(model_asset_path=sys.argv[1]),
        max_results=100,
        score_threshold=0.3)
    picture = ImageOps.exif_transpose(Image.open(sys.argv[2]))
    image = mediapipe.Image(
        image_format=mediapipe.ImageFormat.SRGB,
        data=np.array(picture.convert('RGB')))
    with ObjectDetector.create_from_options(options) as detector:
        for found in detector.detect(image).detections:
            best, box = found.categories[0], found.bounding_box
            print(best.category_name, f'{best.score:.4f}', box.origin_x,
                  box.origin_y, box.origin_x + box.width,
                  box.origin_y + box.height)


if __name__ == '__main__':
    main()
