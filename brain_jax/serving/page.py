"""The page: a file is dropped on it; it tells what the network says to that, and how far to trust it."""

import asyncio
import atexit
import base64
import collections
import html
import json
import os
import pathlib
import shutil
import tempfile

# Read by Gradio on import: it would ask for its latest version and tell of every start, and keep files in a folder of
# all users. The one it gets should stay empty, and is removed when the process ends.
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
os.environ['GRADIO_TEMP_DIR'] = tempfile.mkdtemp(prefix='brain_jax_page_')

import fastapi
import gradio as gr
import numpy as np
from starlette.middleware.cors import CORSMiddleware

from brain_jax import InputError
from brain_jax.data import images, scans
from brain_jax.evaluation import wording
from brain_jax.serving import answers, api, explain, gate, service, uploads

atexit.register(shutil.rmtree, os.environ['GRADIO_TEMP_DIR'], ignore_errors=True)

MAX_SLICES = 64  # of a scan, evenly spread over what holds the head
_SHOWN = 512  # pixels, the longer side of the picture that is shown of the file
_OPACITY = 70  # per cent
_FILES = pathlib.Path(__file__).parent / 'static'
_KINDS = 'JPEG, PNG, BMP, TIFF, WebP, DICOM or NIfTI'


def add_page(app, served):
    """Adds the page to an application, at its root.

    Args:
      app: a FastAPI application.
      served: a `service.Service`.

    Returns:
      The Gradio application.
    """
    held = uploads.Uploads()
    served.monitor.held_files.set_function(lambda: len(held))
    add_upload(app, held)
    # Without one of ours Gradio has its own, which lets pages of any site read the answers where a server has a name.
    app.add_middleware(CORSMiddleware, allow_origins=[])
    gr.mount_gradio_app(
        app, create_blocks(served, held), '/', css=(_FILES / 'page.css').read_text(), theme=_theme(), footer_links=[],
        run_history=False, show_error=False, ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
    )  # fmt: skip
    return app.routes[-1].app


def add_upload(app, held):
    """Adds the endpoint that the page sends files to. Gradio's own writes them to disk, under the names they had."""

    @app.post(gate.UPLOAD, include_in_schema=False, form_limits={'max_files': 1, 'max_fields': 1})
    async def upload(file: fastapi.UploadFile):
        data = await file.read()
        asyncio.get_running_loop().call_later(uploads.HELD_SECONDS + 1, held.expire)
        return {'name': held.add(data, pathlib.PurePath(file.filename or '').suffix)}


def _theme():
    system = ['system-ui', 'sans-serif'], ['ui-monospace', 'monospace']  # plain names: nothing is loaded
    base = gr.themes.Base(primary_hue='teal', neutral_hue='slate', font=system[0], font_mono=system[1])
    # Gradio's own greys are too pale to be read by everyone.
    return base.set(
        body_text_color_subdued='*neutral_600', body_text_color_subdued_dark='*neutral_300',
        block_label_text_color='*neutral_700', block_info_text_color='*neutral_600',
    )  # fmt: skip


def create_blocks(served, held):
    """Returns the page as `gr.Blocks`.

    Args:
      served: a `service.Service`.
      held: `uploads.Uploads`.
    """
    with gr.Blocks(title='brain_jax', analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(_header(served.predictor), elem_id='header')
        with gr.Row(elem_id='columns'):
            with gr.Column(scale=3, min_width=320, elem_id='file'):
                chosen = gr.HTML(
                    html_template=(_FILES / 'drop.html').read_text().replace('KINDS', _KINDS),
                    js_on_load=(_FILES / 'drop.js').read_text().replace('MAX_BYTES', str(service.MAX_BYTES)),
                    elem_id='drop',
                )
                plane = gr.Radio(list(scans.PLANES), value='axial', label='Plane', visible=False, elem_id='plane')
                slice_ = gr.Slider(1, 2, 1, step=1, label='Slice', visible=False, elem_id='slice')
                whole = gr.Button('Answer of the whole scan', visible=False, elem_id='whole')
                gr.HTML(_scores(served), elem_id='scores')
            with gr.Column(scale=5, min_width=320, elem_id='answer'):
                with gr.Row(elem_id='answers'):
                    answer = gr.HTML(_nothing_yet(), elem_id='words')
                    scan = gr.HTML(visible=False, elem_id='scan')
                pictures = gr.HTML(elem_id='pictures')
                opacity = gr.Slider(
                    0, 100, _OPACITY, step=5, label='Opacity of the explanation (%)', visible=False, elem_id='opacity'
                )
        with gr.Accordion('Model card of this run', open=False, elem_id='card'):
            gr.Markdown(_card(served), sanitize_html=True)
        _connect(blocks, served, held, (chosen, plane, slice_, whole, answer, scan, pictures, opacity))
    # Where more wait than can be answered, Gradio tells so; events of one page wait for one another.
    return blocks.queue(max_size=gate.MAX_UPLOADS, default_concurrency_limit=service.MAX_FILES, api_open=False)


def _connect(blocks, served, held, components):
    """Tells Gradio what happens when."""
    chosen, plane, slice_, whole, answer, scan, pictures, opacity = components
    owned = {}  # the file that each open page holds, by Gradio's name of the page

    async def show_file(name, request: gr.Request):
        held.drop(owned.pop(request.session_hash, None))
        if name:
            owned[request.session_hash] = name
        return *await show(served, held, name, 'axial', None), gr.update(visible=False)

    async def show_slice(name, plane, number):
        return await show(served, held, name, plane, number)

    async def show_plane(name, plane):
        return *await show(served, held, name, plane, None), gr.update(visible=False)

    async def show_whole(name):
        async for shown in show_scan(served, held, name):
            yield gr.update(value=shown, visible=True)

    def forget(request: gr.Request):
        held.drop(owned.pop(request.session_hash, None))

    outputs = [answer, pictures, opacity, plane, slice_, whole]
    options = {'show_progress': 'hidden', 'api_visibility': 'private'}
    asked = whole.click(show_whole, [chosen], scan, **options)
    chosen.submit(show_file, [chosen], [*outputs, scan], cancels=[asked], **options)
    plane.input(show_plane, [chosen, plane], [*outputs, scan], cancels=[asked], **options)
    slice_.input(show_slice, [chosen, plane, slice_], outputs, trigger_mode='always_last', **options)
    set_opacity = "value => document.body.style.setProperty('--opacity', value / 100)"
    opacity.change(None, [opacity], js=set_opacity, api_visibility='private')
    blocks.unload(forget)


async def show(served, held, name, plane, number):
    """Answers to a file, or to a slice of it.

    Args:
      served: a `service.Service`.
      held: `uploads.Uploads`.
      name: of the file there; empty for none.
      plane: of a volume.
      number: of the slice, from 1; None for the one in the middle.

    Returns:
      What the components of `_connect` are set to: the answer in words, the pictures, and whether the opacity, the
      planes, the slices and the answer of all slices can be chosen.
    """
    hidden = gr.update(visible=False)
    if not name:
        return _nothing_yet(), '', hidden, hidden, hidden, hidden
    try:
        upload = held.get(name)
        if upload.plane != plane:
            slices = await asyncio.wrap_future(
                served.decode(lambda: upload.data, upload.suffix, plane=plane, slices=MAX_SLICES)
            )
            upload.plane, upload.slices = plane, slices
        count = len(upload.slices)
        number = min(max(int(number or count // 2 + 1), 1), count)
        label, picture = upload.slices[number - 1]
        (found,) = await served.answer([picture], explain=True)
    except (InputError, service.Busy) as error:
        return _problem(error), '', hidden, hidden, hidden, hidden
    is_volume = label.startswith(scans.PLANES)
    if count == 1 and not is_volume:
        held.drop(name)  # there is nothing to come back for
    return (
        _words(served.predictor, found.prediction, label),
        _pictures(served.predictor, picture, found),
        gr.update(visible=True),
        gr.update(visible=is_volume, value=plane),
        gr.update(visible=count > 1, value=number, maximum=max(count, 2), label=f'Slice: {label}'),
        gr.update(visible=count > 1),
    )


async def show_scan(served, held, name):
    """Answers to all slices of a scan that can be chosen, together.

    Args:
      served: a `service.Service`.
      held: `uploads.Uploads`.
      name: of the file there, which `show` has decoded.

    Yields:
      What to show: that it takes a while, then the answer in words.
    """
    try:
        pictures = [picture for _, picture in held.get(name).slices]
        yield f'<h2>Answer</h2><p class="quiet" role="status">Asking about {len(pictures)} slices ...</p>'
        found = await served.answer(pictures)
    except (InputError, service.Busy) as error:
        yield _problem(error)
    else:
        yield _whole(served.predictor, [answer.prediction for answer in found])


# What the page says. Names of classes come from folders, and errors may quote a file: all of it is escaped.


def _header(predictor):
    model = html.escape(f'{predictor.config.model}, {predictor.image_size} px, run {predictor.workdir.name}')
    return f'<h1>brain_jax</h1><p class="run">{model}</p><p class="notice" role="note">{api.NOTICE}</p>'


def _nothing_yet():
    return '<h2>Answer</h2><p class="quiet">Choose an image, and the answer stands here.</p>'


def _problem(error):
    reason = html.escape(str(error))
    return (
        '<h2>Answer</h2><div class="verdict problem" role="alert"><strong>There is no answer.</strong> '
        f'{reason[:1].upper()}{reason[1:]}.</div>'
    )


def _words(predictor, prediction, label):
    """Returns an answer in words, and its probabilities as bars."""
    best = html.escape(prediction.predicted)
    percent = _percent(prediction.probabilities.max())
    if prediction.reason == 'out_of_distribution':
        kind, verdict = 'warning', (
            f'<strong>Warning: this is not like the images that the network learned from</strong> '
            f'({prediction.out_of_distribution:.1f} times as far from them as an image may be), so it abstains. '
            f'What it would say, {best} with {percent}, means nothing here.'
        )  # fmt: skip
    elif prediction.abstain:
        threshold = predictor.threshold
        needed = f'it answers from {_percent(threshold)}' if threshold <= 1 else 'none of its answers is sure enough'
        kind, verdict = 'warning', (
            f'<strong>It abstains: too uncertain.</strong> The most probable class is {best} with {percent}; {needed}.'
        )  # fmt: skip
    else:
        kind, verdict = 'sure', f'<strong>{best}</strong>, with a probability of {percent}.'
        if prediction.out_of_distribution is None:
            verdict += ' Nothing tells whether this is like the images that the network learned from.'
    where = f' <span class="quiet">{html.escape(label)}</span>' if label else ''
    rows = zip(predictor.class_names, prediction.probabilities, strict=True)
    bars = ''.join(
        f'<tr><th scope="row">{html.escape(name)}</th><td class="bar" aria-hidden="true"><span style="width: '
        f'{100 * p:.1f}%"></span></td><td class="number">{_percent(p)}</td></tr>'
        for name, p in rows
    )
    return (
        f'<h2>Answer{where}</h2><div class="verdict {kind}" role="status">{verdict}</div>'
        f'<table class="bars"><caption>Calibrated probabilities</caption><tbody>{bars}</tbody></table>'
    )


def _whole(predictor, predictions):
    """Returns what the slices of a scan say together, as `_words` does, and what each says by itself."""
    counts = collections.Counter(prediction.predicted for prediction in predictions)
    votes = ', '.join(f'{count} for {html.escape(name)}' for name, count in counts.most_common())
    unsure = sum(prediction.abstain for prediction in predictions)
    abstains = f'; it would abstain from {unsure} of them' if unsure else ''
    return (
        _words(predictor, answers.combine(predictor, predictions), f'{len(predictions)} slices together')
        + f'<p class="quiet">Each slice by itself: {votes}{abstains}.</p>'
    )


def _percent(share):
    return f'{100 * share:.1f}&nbsp;%'


def _pictures(predictor, picture, found):
    """Returns the file's picture, and what the network sees with what explains the answer over it."""
    height, width = picture.shape
    scale = min(1, _SHOWN / max(height, width))
    small = images.resize(picture, max(round(height * scale), 1), max(round(width * scale), 1))
    (seen,) = predictor.preprocess([picture])
    best = html.escape(found.prediction.predicted)
    return (
        f'<div class="pictures"><figure><img src="{_address(small)}" alt="The image of the file">'
        f'<figcaption>The image, {width} by {height} pixels</figcaption></figure>'
        f'<figure><div class="stack"><img src="{_address(seen)}" alt="What the network sees: the image in grey, padded '
        f'to a square"><img class="heat" src="{_address(explain.colour(found.heat))}" alt="Where in it the answer '
        f'comes from"></div><figcaption>What the network sees, {seen.shape[0]} by {seen.shape[0]} pixels, and over it '
        f'what speaks for {best}</figcaption>{_scale(found.heat)}</figure></div>'
    )


def _scale(heat):
    """Returns the colours that explain an answer, and what their ends mean."""
    shades, (low, _) = explain.scale_of(heat)
    colours = (255 * shades(np.linspace(0, 1, 17))[:, :3]).round().astype(int)
    gradient = ', '.join(f'rgb({red} {green} {blue})' for red, green, blue in colours.tolist())
    bar = f'<span class="scale-colours" style="background: linear-gradient(90deg, {gradient})"></span>'
    return f'<div class="scale"><span>{"against it" if low < 0 else "nothing"}</span>{bar}<span>for it</span></div>'


def _address(pixels):
    """Returns pixels, uint8 [height, width] or [height, width, 4], as an address that holds them."""
    return f'data:image/png;base64,{base64.b64encode(images.encode_png(np.ascontiguousarray(pixels))).decode()}'


def _scores(served):
    """Returns the scores of the run's test images as a table."""
    workdir = served.predictor.workdir
    path = workdir / 'evaluation_test' / 'metrics.json'
    title = '<h2>How good this run is</h2>'
    if not path.exists():
        return f'{title}<p class="quiet">Its scores are not in its folder.</p>'
    metrics = json.loads(path.read_text())
    rows = [_score_row(metrics[part], wording.PARTS[part]) for part in wording.parts_of(metrics) if metrics[part]['n']]
    head = '<tr><th scope="col">Test images</th><th scope="col">Accuracy</th><th scope="col">Macro F1</th></tr>'
    hashes = html.escape(wording.describe_provenance(metrics))
    return (
        f'{title}<table class="scores"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
        f'<p class="quiet">In brackets 95&nbsp;% intervals by group. Of {hashes}.</p>'
    )


def _score_row(values, part):
    cells = []
    for name in ('accuracy', 'macro_f1'):
        text, note = wording.show(values, name)
        cells.append(f'<td>{html.escape(text)}{f" <small>({html.escape(note)})</small>" if note else ""}</td>')
    return f'<tr><th scope="row">{html.escape(part)} <small>({values["n"]:,})</small></th>{"".join(cells)}</tr>'


def _card(served):
    path = served.predictor.workdir / 'MODEL_CARD.md'
    return path.read_text(encoding='utf-8') if path.exists() else 'There is none in the folder of the run.'
