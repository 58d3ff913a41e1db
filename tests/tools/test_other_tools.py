"""Tools of others that take a config, a detector or its boxes."""
import re

import numpy as np
import pytest
import supervision
from helpers.tiny_data import CONFIGS, LITE0, run_tool, trained_run
from mmdet.apis import DetInferencer
from PIL import Image
from sahi import AutoDetectionModel
from sahi.predict import get_sliced_prediction

from mmdet_efficientdet import load_detector

PHOTO = CONFIGS.parents[1] / 'resources' / 'forest.jpg'
SIDE = 250  # of a slice
SHIPPED = {
    'ResizeCrop': (LITE0, None),
    'Resize': (CONFIGS / 'efficientdet_lite0_1xb8_trees.py', 'release://trees')
}


def above_zero(inferencer, picture, threshold):
    """Boxes and scores of MMDetection; SAHI leaves out boxes without area."""
    found, = inferencer(picture)['predictions']
    boxes, scores = np.array(found['bboxes']), np.array(found['scores'])
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1) & (scores >= threshold)
    return boxes[keep], scores[keep]


@pytest.mark.slow
@pytest.mark.parametrize('name', SHIPPED)
def test_sahi(name):
    """Its slices have the boxes of MMDetection, moved to their places."""
    config, weights = SHIPPED[name]
    inferencer = DetInferencer(
        str(config), weights, device='cpu', show_progress=False)
    threshold = 0.3 if weights else 0.0
    found = get_sliced_prediction(
        str(PHOTO),
        AutoDetectionModel.from_pretrained(
            'mmdet', model=inferencer, confidence_threshold=threshold),
        slice_height=SIDE,
        slice_width=SIDE,
        overlap_height_ratio=0,
        overlap_width_ratio=0,
        perform_standard_pred=False,
        postprocess_type='NMS',
        postprocess_match_metric='IOU',
        postprocess_match_threshold=1.0,  # joins no boxes
        verbose=0).object_prediction_list
    picture = np.asarray(Image.open(PHOTO))[..., ::-1]
    height, width = picture.shape[:2]
    rows = []
    for y in (0, height - SIDE):
        for x in (0, width - SIDE):
            boxes, scores = above_zero(inferencer, picture[y:y + SIDE,
                                                           x:x + SIDE].copy(),
                                       threshold)
            rows.append(np.c_[boxes + [x, y, x, y], scores])
    expected = np.concatenate(rows)
    found = np.array([[*x.bbox.to_xyxy(), x.score.value] for x in found])
    assert len(found) == len(expected) > 25
    for rows in (found, expected):
        rows[:] = rows[np.lexsort(rows.T)]
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.slow
def test_supervision():
    """It takes the result of MMDetection, and the arrays of load_detector."""
    config, weights = SHIPPED['Resize']
    inferencer = DetInferencer(str(config), weights, device='cpu')
    sample, = inferencer(str(PHOTO), return_datasamples=True)['predictions']
    hosts = supervision.Detections.from_mmdetection(sample)
    expected = sample.pred_instances
    np.testing.assert_array_equal(hosts.xyxy, expected.bboxes)
    np.testing.assert_array_equal(hosts.confidence, expected.scores)
    np.testing.assert_array_equal(hosts.class_id, expected.labels)
    found = load_detector('trees', 'cpu')(PHOTO)
    ours = supervision.Detections(
        xyxy=found.boxes, confidence=found.scores, class_id=found.labels)
    assert len(ours) == len(found.names) > 25
    assert len(ours[ours.confidence > 0.5]) == (found.scores > 0.5).sum()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A short training, and what test.py finds with it."""
    run = trained_run(tmp_path_factory.getbasetemp())
    run.folder = tmp_path_factory.mktemp('analysis')
    done = run_tool(
        'test.py',
        run.config,
        run.work_dir / 'epoch_2.pth',
        '--out',
        'dump.pkl',
        cwd=run.folder)
    assert done.code == 0, done.output
    return run


# Arguments of the host's scripts, and what they print or the files they write
SCRIPTS = dict(
    analyze_logs=(['cal_train_time', '{scalars}'],
                  r'average iter time: \d+\.\d+ s/iter', []),
    analyze_results=(['{config}', 'dump.pkl', 'drawn', '--topk', '1'], '',
                     ['drawn/good/*.jpg', 'drawn/bad/*.jpg']),
    confusion_matrix=(['{config}', 'dump.pkl', '.'], '',
                      ['confusion_matrix.png']))  # yapf: disable


@pytest.mark.slow
@pytest.mark.parametrize('name', SCRIPTS)
def test_analysis_tools(name, run):
    """The host's scripts read a log and what test.py has written."""
    arguments, printed, written = SCRIPTS[name]
    scalars, = run.work_dir.glob('*/vis_data/scalars.json')
    arguments = [
        x.format(scalars=scalars, config=run.config) for x in arguments
    ]
    done = run_tool(f'analysis_tools/{name}.py', *arguments, cwd=run.folder)
    assert done.code == 0 and re.search(printed, done.output), done.output
    for pattern in written:
        path, = run.folder.glob(pattern)
        assert np.asarray(Image.open(path).convert('L')).std() > 5
