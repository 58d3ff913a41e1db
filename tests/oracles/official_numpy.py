"""The formulas of google/automl ``efficientdet`` in NumPy float64.

Nothing of the package is used here, and all is slow on purpose. Boxes are
(y1, x1, y2, x2) and box codes (ty, tx, th, tw), as in the official code; YX
turns them into the package's order and back.
"""
import numpy as np

YX = [1, 0, 3, 2]
PAIRS = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))  # (width, height)


def feature_sizes(image_size, max_level=7):
    """Sizes of levels 3 to max_level: halved and rounded up, one by one."""
    sizes = [tuple(image_size)]
    for _ in range(max_level):
        sizes.append(tuple(-(-n // 2) for n in sizes[-1]))
    return sizes[3:]


def anchors(image_size, scale=4.0, pairs=PAIRS, octaves=3, max_level=7):
    """All anchors (A, 4): level, row, column, octave, aspect.

    They are computed in float64 and rounded to float32, as they are used.
    """
    boxes = []
    for height, width in feature_sizes(image_size, max_level):
        stride_y, stride_x = image_size[0] / height, image_size[1] / width
        half = []
        for octave in range(octaves):
            for aspect_x, aspect_y in pairs:
                base = scale * 2**(octave / octaves)
                half.append((base * stride_y * aspect_y / 2,
                             base * stride_x * aspect_x / 2))
        for y in np.arange(stride_y / 2, image_size[0], stride_y):
            for x in np.arange(stride_x / 2, image_size[1], stride_x):
                boxes.append(
                    np.hstack([(y, x) - np.array(half),
                               (y, x) + np.array(half)]))
    return np.concatenate(boxes).astype(np.float32).astype(np.float64)


def encode(boxes, priors):
    """Codes (ty, tx, th, tw) of boxes relative to anchors."""
    sides, prior_sides = (
        np.maximum(b[..., 2:] - b[..., :2], 1e-8) for b in (boxes, priors))
    centers, prior_centers = ((b[..., 2:] + b[..., :2]) / 2
                              for b in (boxes, priors))
    return np.concatenate([(centers - prior_centers) / prior_sides,
                           np.log(sides / prior_sides)], -1)


def decode(codes, priors):
    """Boxes of codes: neither the exponent nor the image limits them."""
    prior_sides = priors[..., 2:] - priors[..., :2]
    centers = codes[..., :2] * prior_sides + (priors[..., 2:] +
                                              priors[..., :2]) / 2
    sides = np.exp(codes[..., 2:]) * prior_sides
    return np.concatenate([centers - sides / 2, centers + sides / 2], -1)


def pairwise_iou(boxes, priors):
    """IoU (G, A), without counting the last pixel."""
    start = np.maximum(boxes[:, None, :2], priors[:, :2])
    end = np.minimum(boxes[:, None, 2:], priors[:, 2:])
    inter = np.maximum(end - start, 0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, priors)]
    return inter / (areas[0][:, None] + areas[1] - inter)


def match(boxes, priors):
    """Index of the box that each anchor has to predict, or -1."""
    if len(boxes) == 0:
        return np.full(len(priors), -1)
    iou = pairwise_iou(boxes, priors)
    # argmax takes the first of equal ones, be they boxes or anchors.
    matches = np.where(iou.max(0) >= 0.5, iou.argmax(0), -1)
    forced = set()
    for g, a in enumerate(iou.argmax(1)):
        if a not in forced:
            matches[a] = g
            forced.add(a)
    return matches


def targets(boxes, labels, priors, num_classes):
    """One-hot classes (A, K) and box codes (A, 4); zero for background."""
    matches = match(boxes, priors)
    classes = np.zeros((len(priors), num_classes))
    codes = np.zeros((len(priors), 4))
    for a in np.flatnonzero(matches >= 0):
        classes[a, labels[matches[a]]] = 1
        codes[a] = encode(boxes[matches[a]], priors[a])
    return classes, codes, int((matches >= 0).sum())


def mixed_batch(image_size, num_classes):
    """Boxes and labels of images with all that is special.

    With anchors of integer corners: ties between boxes and between anchors,
    an IoU of exactly 0.5, a box that is an anchor, boxes that claim the same
    anchor, a small one and one beyond all anchors; a single box; no box; and
    many boxes.
    """
    special = [
        (16, 16, 48, 48),  # amid four cells of the first level
        (12, 20, 44, 52),  # IoU 0.6 with the one above
        (12, 20, 44, 52),  # the same again
        (4, 4, 36, 20),  # half an anchor
        (40, 40, 72, 72),  # an anchor
        (30, 30, 33, 33),  # two small boxes in one cell
        (29, 31, 32, 33),
        (5000, 5000, 5010, 5020),  # where no anchor is
    ]
    rng = np.random.default_rng(0)
    corner = rng.uniform(-9, min(image_size) - 9, (25, 2))
    many = np.hstack([corner, corner + rng.uniform(1, 90, (25, 2))])
    many = many.astype(np.float32).astype(np.float64)
    boxes = [
        np.array(special, dtype=float), many[:1],
        np.zeros((0, 4)), many,
        many.round()
    ]
    return [(b, rng.integers(num_classes, size=len(b))) for b in boxes]


def focal(logits, y, alpha=0.25, gamma=1.5):
    """Focal loss of each logit, and its derivative."""
    # log(p_t) of p_t = p for y = 1 and 1 - p for y = 0, without overflow.
    signed = np.where(y == 1, logits, -logits)
    log_p = -np.logaddexp(0, -signed)
    p = np.exp(log_p)
    alpha_t = np.where(y == 1, alpha, 1 - alpha)
    loss = alpha_t * (1 - p)**gamma * -log_p
    slope = alpha_t * (1 - p)**gamma * (gamma * p * log_p - (1 - p))
    return loss, np.where(y == 1, slope, -slope)


def huber(errors, delta=0.1):
    """Huber loss of each error, and its derivative."""
    size = np.abs(errors)
    loss = np.where(size <= delta, 0.5 * errors**2,
                    delta * size - 0.5 * delta**2)
    return loss, np.clip(errors, -delta, delta)


def losses(logits, codes, batch, priors):
    """Both losses of a batch, and their gradients.

    Args:
        logits, codes (np.ndarray): Outputs (N, A, K) and (N, A, 4).
        batch (list[tuple]): Boxes (G, 4) and labels (G, ), from 0, of each
            image, without its crowds.
        priors (np.ndarray): Anchors (A, 4).

    Returns:
        tuple: Class loss, 50 times the box loss, the gradient of the first
        for the logits and that of the second for the codes.
    """
    images = [targets(*image, priors, logits.shape[-1]) for image in batch]
    normalizer = sum(image[2] for image in images) + 1
    wanted = np.stack([image[1] for image in images])
    loss, grad = focal(logits, np.stack([image[0] for image in images]))
    box_loss, box_grad = huber(codes - wanted)
    mask = wanted != 0
    return (loss.sum() / normalizer,
            50 * (box_loss * mask).sum() / (4 * normalizer), grad / normalizer,
            50 * box_grad * mask / (4 * normalizer))


def scaled_size(shape, target):
    """Scale and (height, width) of an image that fits into the target."""
    height, width = np.float32(shape)
    scale = min(np.float32(target[0]) / height, np.float32(target[1]) / width)
    return scale, (int(height * scale), int(width * scale))


def resize(image, size, half_pixel_centers):
    """Bilinear resizing of (H, W, C) as TensorFlow does, without antialias."""
    result = np.zeros((*size, image.shape[2]))
    places = []
    for old, new in zip(image.shape, size):
        axis = []
        for i in range(new):
            place = i * old / new
            if half_pixel_centers:
                place = (i + 0.5) * old / new - 0.5
            low = int(np.floor(place))
            axis.append((max(low, 0), min(low + 1, old - 1), place - low))
        places.append(axis)
    for y, (top, bottom, down) in enumerate(places[0]):
        for x, (left, right, along) in enumerate(places[1]):
            rows = [
                image[row, left] * (1 - along) + image[row, right] * along
                for row in (top, bottom)
            ]
            result[y, x] = rows[0] * (1 - down) + rows[1] * down
    return result


def preprocess(image, side, mean, std, half_pixel_centers=True):
    """Network input (side, side, 3) of an RGB image, zero beyond it."""
    result = np.zeros((side, side, 3))
    _, (height, width) = scaled_size(image.shape[:2], (side, side))
    result[:height, :width] = resize((image - np.array(mean)) / std,
                                     (height, width), half_pixel_centers)
    return result


def soft_nms(rows, sigma=0.5, min_score=0.001):
    """Gaussian suppression of one class; rows are (box, score)."""
    rows, kept = np.array(rows), []
    while len(rows):
        best = np.argmax(rows[:, 4])
        rows[[0, best]] = rows[[best, 0]]
        kept.append(rows[0].copy())
        weight = np.exp(-iou_of_pixels(rows[0], rows[1:])**2 / sigma)
        rows = rows[1:]
        rows[:, 4] *= weight
        rows = rows[rows[:, 4] >= min_score]
    return np.array(kept)


def hard_nms(rows, offset, iou_threshold=0.5):
    """Hard suppression of one class; rows are (box, score).

    The NumPy code counts the last pixel (offset=1), TensorFlow's operator
    does not (offset=0).
    """
    rows, kept = rows[np.argsort(-rows[:, 4], kind='stable')], []
    while len(rows):
        kept.append(rows[0])
        overlap = iou_of_pixels(rows[0], rows[1:], offset)
        rows = rows[1:][overlap <= iou_threshold]
    return np.array(kept)


def iou_of_pixels(row, others, offset=1):
    """IoU of a box and others, whose last pixel counts with offset 1."""
    start = np.maximum(row[:2], others[:, :2])
    end = np.minimum(row[2:4], others[:, 2:4])
    inter = np.maximum(end - start + offset, 0).prod(-1)
    areas = [(b[..., 2:4] - b[..., :2] + offset).prod(-1)
             for b in (row, others)]
    return inter / (areas[0] + areas[1] - inter)


def per_class(boxes, scores, labels, nms=soft_nms, num=100):
    """Suppresses class by class; rows (box, score, label) of the best."""
    rows = []
    for label in np.unique(labels):
        of_class = labels == label
        kept = nms(np.column_stack([boxes, scores])[of_class])
        rows.append(np.column_stack([kept, np.full(len(kept), label)]))
    rows = np.concatenate(rows)
    return rows[np.argsort(-rows[:, 4], kind='stable')[:num]]


def detections(logits, codes, priors, scale=1.0, num_inputs=5000, **kwargs):
    """Rows (box, score, label) in the original image, best first.

    Args:
        logits, codes (np.ndarray): Outputs (A, K) and (A, 4) of an image.
        priors (np.ndarray): Anchors (A, 4).
        scale (float): By which the image was multiplied.
        num_inputs (int): Pairs of anchor and class that are suppressed.
        kwargs: See per_class.
    """
    flat = logits.ravel()
    top = np.argsort(-flat, kind='stable')[:num_inputs]  # as tf.math.top_k
    index, labels = np.divmod(top, logits.shape[1])
    boxes = decode(codes[index], priors[index])
    # Suppression is in float32, where next to no overlap leaves a score as it
    # is, and equal ones equal.
    rows = per_class(
        np.float32(boxes), np.float32(1 / (1 + np.exp(-flat[top]))), labels,
        **kwargs)
    rows[:, :4] /= scale
    return rows
