"""Writes OpenVINO's files: python openvino_file.py JOB.

The folder JOB holds model.onnx, job.json and, for int8, images.npy. It gets
model.xml and model.bin. OpenVINO and NNCF live in another environment than
MMDetection.
"""
import json
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    """Does the work of a folder."""
    import openvino
    folder = Path(sys.argv[1])
    precision = json.loads((folder / 'job.json').read_text())['precision']
    model = openvino.convert_model(folder / 'model.onnx')
    if precision == 'int8':
        import nncf
        images = np.load(folder / 'images.npy', allow_pickle=False)
        model = nncf.quantize(
            model,
            nncf.Dataset([x[None] for x in images]),
            subset_size=len(images))
    openvino.save_model(
        model, folder / 'model.xml', compress_to_fp16=precision == 'fp16')


if __name__ == '__main__':
    main()
