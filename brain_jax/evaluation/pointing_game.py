"""The pointing game of Zhang et al. (2018) on generated heads: does the highest point of a map hit the lesion?

The generator knows where it drew a lesion, which no label of the real data tells. The heads are others than those that
a run of mode 'demo' learned from. Beside the hits stand those of points that know nothing of the network.
"""

import functools

import jax
import numpy as np
import tqdm
from scipy import ndimage, stats

from brain_jax import InputError, parallel, train
from brain_jax.data import phantom
from brain_jax.evaluation import figures, scores
from brain_jax.serving import explain

LESIONS = tuple(name for name in phantom.CLASS_NAMES if name != 'notumor')
TOLERANCE = 1 / 32  # of the side: about the 15 pixels that Zhang et al. allow
MAPS = {
    'class-activation map': explain.class_activation,
    'class-activation map of the plain logit': functools.partial(explain.class_activation, weigh=jax.nn.one_hot),
    **{f'Grad-CAM at {layer}': functools.partial(explain.grad_cam, layer=layer) for layer in reversed(explain.CELLS)},
    'occlusion': explain.occlusion,
}
_SHOWN = ('class-activation map', 'Grad-CAM at pool4_relu', 'occlusion')


def draw_heads(count, size, *, seed=0, split=2):
    """Draws heads with lesions that are in no folder of `phantom.make_phantom`, which draws splits 0 and 1 only.

    Args:
      count: of the heads of each class.
      size: of the images in pixels.
      seed: whole number; equal ones give equal heads.
      split: 2 or more; others give other heads.

    Returns:
      images uint8 [n, size, size], lesion masks bool [n, size, size], and str [n], their classes.
    """
    drawn = [
        (*phantom.draw_head(np.random.default_rng([seed, split, place, index]), name, size), name)
        for place, name in enumerate(LESIONS)
        for index in range(count)
    ]
    return tuple(np.array(column) for column in zip(*drawn, strict=True))


def play(predictor, count, *, seed=0):
    """Plays the pointing game, and checks that the maps depend on what the network has learned.

    Args:
      predictor: a `Predictor` of a run of mode 'demo'.
      count: heads of each class that has a lesion.
      seed: of the heads.

    Returns:
      Scores, for JSON, and the pixels of a gallery, uint8 [height, width, 3].

    Raises:
      InputError: where the run knows other classes.
    """
    missing = [name for name in LESIONS if name not in predictor.class_names]
    if missing:
        raise InputError(
            f'{predictor.workdir} does not know {", ".join(missing)}, which are drawn here: give a run of mode demo'
        )
    batch, masks, names = draw_heads(count, predictor.image_size, seed=seed)
    classes = np.array([predictor.class_names.index(name) for name in names])
    logits, _ = predictor.answer(batch)
    right = logits.argmax(axis=1) == classes
    heats = {name: _in_parts(method, name, predictor, batch, classes) for name, method in MAPS.items()}
    points = {name: highest_points(heat) for name, heat in heats.items()}
    points |= blind_points(batch, names, *draw_heads(count, predictor.image_size, seed=seed, split=3)[1:])
    found = {
        'image_size': predictor.image_size,
        'images_per_class': count,
        'seed': seed,
        'checkpoint_sha256': predictor.checkpoint_sha256,
        'right': scores_of(right),
        'tolerance_pixels': TOLERANCE * predictor.image_size,
        'hits': {name: score_points(masks, point, names, right) for name, point in points.items()},
        'random_point': {'image': float(masks.mean()), 'head': float(np.mean(head_shares(batch, masks)))},
        'sanity': check_sanity(predictor, batch, classes, logits, heats['class-activation map']),
    }
    return found, _draw_gallery(predictor, batch, masks, names, logits, heats)


def highest_points(heat):
    """Returns the row and column of the largest value of each map [n, height, width]: int [n, 2]."""
    return np.stack(np.unravel_index(heat.reshape(len(heat), -1).argmax(axis=1), heat.shape[1:]), axis=1)


def blind_points(batch, names, other_masks, other_names):
    """Returns points that know nothing of the network, {name: int [n, 2]}.

    Args:
      batch: uint8 [n, size, size].
      names: str [n], the classes of the images.
      other_masks: bool [m, size, size] of other heads, which tell where lesions of a class mostly lie.
      other_names: str [m], their classes.
    """
    size = batch.shape[1]
    usual = {name: other_masks[other_names == name].mean(axis=0) for name in np.unique(names)}
    return {
        'brightest place': highest_points(ndimage.gaussian_filter(batch.astype(float), (0, size / 64, size / 64))),
        'centre of the image': np.full((len(batch), 2), size // 2),
        'usual place of the class': highest_points(np.stack([usual[name] for name in names])),
    }


def score_points(masks, points, names, right):
    """Scores points: the share that hits the lesion, of all images, of each class, and of those answered right."""
    rows = np.arange(len(masks))
    distances = np.stack([ndimage.distance_transform_edt(~mask) for mask in masks])[rows, points[:, 0], points[:, 1]]
    hits = distances == 0
    return {
        'all': scores_of(hits),
        'right': scores_of(hits[right]),
        'near': scores_of(distances <= TOLERANCE * masks.shape[1]),
        'classes': {name: scores_of(hits[names == name]) for name in LESIONS},
    }


def scores_of(hits):
    """Returns number, share and 95 % interval of what is true, for JSON."""
    share = float(np.mean(hits)) if len(hits) else None
    return {'n': len(hits), 'share': share, 'interval': scores.wilson_interval(np.sum(hits), len(hits))}


def head_shares(batch, masks):
    """Returns which part of each head, its outline filled, is lesion: float [n]."""
    heads = np.stack([ndimage.binary_fill_holes(image > 60) for image in batch])
    return (masks & heads).sum(axis=(1, 2)) / heads.sum(axis=(1, 2))


def check_sanity(predictor, batch, classes, logits, heat):
    """Checks class-activation maps: do they add up, and does forgetting destroy them (Adebayo et al., 2018)?

    Returns:
      For JSON: the largest distance of a map's mean from what it explains, and mean Spearman correlations of a map's
      pixels with those of the next image of the class, and of the same network with another head, or all random.
    """
    explained = np.sum(np.asarray(explain.contrast(classes, logits.shape[1])) * logits, axis=1)
    config = predictor.config.copy_and_resolve_references()
    with config.unlocked():
        config.seed += 1
    random = parallel.replicate(dict(train.init_variables(config, predictor.model)), parallel.make_mesh())
    head = {'predictions': random['params']['predictions']}
    with_other_head = predictor.variables | {'params': predictor.variables['params'] | head}

    def correlation(variables):
        other = explain.class_activation(predictor._replace(variables=variables), batch, classes)
        return _rank_correlation(heat, other)

    return {
        'largest_gap': float(np.max(np.abs(heat.mean(axis=(1, 2), dtype=np.float64) - explained))),
        'correlation_with_next_image': _rank_correlation(heat[:-1], heat[1:], classes[:-1] == classes[1:]),
        'correlation_with_random_head': correlation(with_other_head),
        'correlation_with_random_network': correlation(random),
    }


def _rank_correlation(heat, other, rows=slice(None)):
    pairs = zip(heat[rows], other[rows], strict=True)
    return float(np.mean([stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in pairs]))


def _in_parts(method, name, predictor, batch, classes, size=16):
    """Applies a method to some images at a time, under a progress bar."""
    starts = tqdm.tqdm(range(0, len(batch), size), name, unit=' batches', disable=None)
    parts = [method(predictor, batch[start : start + size], classes[start : start + size]) for start in starts]
    return np.concatenate(parts)


def format_markdown(found):
    """Returns what `play` found as a table."""
    lines = [
        f'| highest point of | all | {" | ".join(LESIONS)} | of those answered right | within '
        f'{found["tolerance_pixels"]:g} pixels |',
        '|---|---|' + '---|' * (len(LESIONS) + 2),
    ]
    for name, row in found['hits'].items():
        cells = [row['all'], *row['classes'].values(), row['right'], row['near']]
        lines.append(f'| {name} | {" | ".join(map(_show, cells))} |')
    for where, share in found['random_point'].items():
        lines.append(f'| (a random point of the {where}) | {100 * share:.1f} % |' + ' |' * (len(LESIONS) + 2))
    return '\n'.join(lines) + '\n'


def _show(score):
    if score['share'] is None:
        return 'none'
    low, high = (100 * value for value in score['interval'])
    return f'{100 * score["share"]:.1f} % ({low:.1f}\u2013{high:.1f})'


def _draw_gallery(predictor, batch, masks, names, logits, heats):
    """Draws the first two heads of each class with some of their maps."""
    rows = []
    for i in [i for name in LESIONS for i in np.flatnonzero(names == name)[:2]]:
        maps = {name: (explain.colour(heats[name][i]), highest_points(heats[name][i : i + 1])[0]) for name in _SHOWN}
        said = predictor.class_names[int(logits[i].argmax())]
        rows.append({'image': batch[i], 'mask': masks[i], 'text': f'{names[i]}\ntaken for {said}', 'maps': maps})
    provenance = f'synthetic heads; checkpoint {predictor.checkpoint_sha256[:12]}'
    return figures.draw_explanations(rows, 'What speaks for the true class; + its highest point', provenance)
