"""The JSON endpoints: answers to files, whether the server is ready, what it counted."""

import asyncio
import pathlib
from typing import Annotated, Literal

import fastapi
import pydantic
from fastapi import exceptions, responses, security

from brain_jax import InputError, __version__
from brain_jax.data import scans
from brain_jax.serving import answers, gate, service

NOTICE = 'This is not a medical device. It must not be used to diagnose, to treat, or to sort patients.'
_SLICES = r'^(all|middle|[1-9][0-9]{0,3})$'
_BEARER = security.HTTPBearer(auto_error=False, description='Where the server was started with a token.')


class Answer(pydantic.BaseModel):
    """What the network says."""

    predicted: str = pydantic.Field(description='The most probable class, also where the network abstains.')
    probabilities: dict[str, float] = pydantic.Field(description='By class, calibrated; they add up to 1.')
    abstain: bool = pydantic.Field(description='Whether the answer should not be relied on.')
    reason: Literal['', 'uncertain', 'out_of_distribution'] = pydantic.Field(description='Why it abstains.')
    out_of_distribution: float | None = pydantic.Field(
        description='Distance to the training images; above 1 the image is not like them. None where the run kept no '
        'images to tell how far is too far.'
    )


class ImageAnswer(Answer):
    """The answer to a picture, or to a slice of a scan."""

    slice: str = pydantic.Field(description='Which of a scan: its plane and number, or its frame. Empty for a picture.')


class FileAnswer(pydantic.BaseModel):
    """The answers to a file, or why there are none."""

    file: int = pydantic.Field(description='Its place in the request, from 0.')
    images: list[ImageAnswer] = pydantic.Field(description='One for a picture, one for each slice of a scan.')
    combined: Answer | None = pydantic.Field(
        description='What the slices of a scan say together, as scripts/predict.py has it. None for a picture.'
    )
    error: str | None = pydantic.Field(description='Why the file cannot be used.')


class Answers(pydantic.BaseModel):
    """The answers to a request; names of files and what scans tell of patients are in no answer."""

    answers: list[FileAnswer]
    hashes: dict[str, str | None] = pydantic.Field(description="SHA-256 of the run's checkpoint, configuration, ...")
    notice: str


class Problem(pydantic.BaseModel):
    """Why there is no answer."""

    detail: str


class Health(pydantic.BaseModel):
    """Whether the server answers."""

    status: Literal['ready', 'compiling']
    model: str
    classes: list[str]


def create_app(served, lifespan=None):
    """Returns the FastAPI application of the JSON endpoints.

    Args:
      served: a `service.Service`.
      lifespan: see FastAPI.
    """
    app = fastapi.FastAPI(
        title='brain_jax', version=__version__, description=NOTICE, lifespan=lifespan,
        docs_url=None, redoc_url=None,  # these pages load scripts from elsewhere
    )  # fmt: skip
    app.add_exception_handler(exceptions.RequestValidationError, _tell_what_is_wrong)
    add_predict(app, served)

    @app.get(gate.HEALTH, responses={503: {'model': Health, 'description': 'Still compiling.'}})
    def health(response: fastapi.Response) -> Health:
        """Tells whether the server is ready to answer."""
        ready = served.batcher.ready.is_set()
        response.status_code = 200 if ready else 503
        return Health(
            status='ready' if ready else 'compiling',
            model=served.predictor.config.model,
            classes=list(served.predictor.class_names),
        )

    @app.get(gate.METRICS, response_class=responses.PlainTextResponse, dependencies=[fastapi.Depends(_BEARER)])
    def metrics():
        """Returns what was counted since the start, for Prometheus."""
        content, content_type = served.monitor.render()
        return fastapi.Response(content, media_type=content_type)

    return app


def add_predict(app, served):
    """Adds the endpoint that answers to files; its docstring and annotations are its OpenAPI description."""

    @app.post(
        gate.API,
        dependencies=[fastapi.Depends(_BEARER)],
        responses={
            status: {'model': Problem, 'description': service.ERROR_KINDS[status].replace('_', ' ')}
            for status in (400, 401, 403, 408, 413, 415, 422, 503)
        },
        form_limits={'max_files': service.MAX_FILES, 'max_fields': 8, 'max_part_size': 2**10},
    )
    async def predict(
        files: Annotated[list[fastapi.UploadFile], fastapi.File(description='Pictures, DICOM or NIfTI.')],
        plane: Annotated[Literal[scans.PLANES], fastapi.Form(description='Of a NIfTI volume.')] = 'axial',
        slices: Annotated[
            str, fastapi.Form(pattern=_SLICES, description="'all', 'middle', or how many, of a volume or its frames.")
        ] = 'middle',
    ) -> Answers:
        """Answers to one or more files. A file that cannot be used has its error; status 422 if none can be used."""
        slices = int(slices) if slices.isdecimal() else slices
        decoded = await asyncio.gather(*(_decode(served, file, plane, slices) for file in files))
        pictures = [picture for found, _ in decoded for _, picture in found]
        if not pictures:
            raise fastapi.HTTPException(422, '; '.join(f'file {i}: {error}' for i, (_, error) in enumerate(decoded)))
        if len(pictures) > service.MAX_IMAGES:
            raise fastapi.HTTPException(413, f'{len(pictures)} slices; ask for at most {service.MAX_IMAGES} at a time')
        try:
            found = await served.answer(pictures)
        except service.Busy as error:
            raise gate.busy(str(error)) from None
        described = _describe_files(served.predictor, decoded, found)
        return Answers(answers=described, hashes=served.hashes, notice=NOTICE)


async def _decode(served, file, plane, slices):
    """Returns the slices of an upload, and None; or no slices, and why."""
    suffix = pathlib.PurePath(file.filename or '').suffix
    try:
        decoding = served.decode(file.file.read, suffix, plane=plane, slices=slices)
        return await asyncio.wrap_future(decoding), None
    except InputError as error:
        return [], str(error)


def _describe_files(predictor, decoded, found):
    """Returns a `FileAnswer` for each file that `_decode` saw; of all their slices there is a `batching.Answer`."""
    described, found = [], iter(found)
    for number, (slices, error) in enumerate(decoded):
        names = [name for name, _ in slices]
        predictions = [next(found).prediction for _ in names]
        combined = answers.combine(predictor, predictions) if any(names) else None
        described.append(
            FileAnswer(
                file=number,
                images=[
                    ImageAnswer(slice=name, **_fields(predictor, prediction))
                    for name, prediction in zip(names, predictions, strict=True)
                ],
                combined=Answer(**_fields(predictor, combined)) if combined else None,
                error=error,
            )
        )
    return described


def _fields(predictor, prediction):
    """Returns the fields of the `Answer` for a `Prediction`."""
    probabilities = dict(zip(predictor.class_names, prediction.probabilities.tolist(), strict=True))
    return prediction._asdict() | {'probabilities': probabilities}


async def _tell_what_is_wrong(request, error):
    """Returns one line for a form that is not as described; FastAPI's own answer would repeat what was sent."""
    lines = [f'{".".join(map(str, found["loc"][1:]))}: {found["msg"]}' for found in error.errors()]
    return responses.JSONResponse({'detail': '; '.join(lines)}, 422)
