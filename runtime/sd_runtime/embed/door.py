"""What the C library asks of Python: each function here answers one of ``source/door.h``.

It is imported by the library alone, which hands over cffi's ``ffi`` and ``lib``. Nothing raised
here reaches C: it becomes a status. Nothing is printed either.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import logging
import os
import sys
import threading
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from sd_engines.errors import ConfigError, SdError
from sd_runtime.embed.context import QUEUE_SIZE, Context
from sd_runtime.embed.options import options_from_json
from sd_runtime.image import format_named
from sd_runtime.refusal import RefusedError
from sd_runtime.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from sd_engines.engine import Array
    from sd_engines.spec import Precision
    from sd_runtime.result import Result
    from sd_runtime.ticket import Progress, Ticket

logger = logging.getLogger(__name__)

_REFUSALS = {
    "queue_full": (
        "SD_ERROR_BUSY",
        "Ask again later, or open the context with a larger queue_size.",
    ),
    "cancelled": ("SD_ERROR_CANCELLED", "Submit it again, if it was not you who cancelled it."),
    "shutting_down": ("SD_ERROR_CONFIG", "Open another context: this one is being closed."),
}
"""What the engine room refuses, as a code of sd_runtime.h and a hint for its callers."""

_DLPACK, _DLPACK_TAKEN = b"dltensor", b"used_dltensor"
_PYTHON = ctypes.pythonapi
_PYTHON.PyCapsule_GetPointer.restype = ctypes.c_void_p
_PYTHON.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_PYTHON.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]


def open_door(native: Any, owns_interpreter: bool) -> None:
    """Attach the functions below to those of ``native``, the module of ``ffi`` and ``lib``."""
    if owns_interpreter:
        _be_silent()
    door = Door(native.ffi, native.lib)
    answers = (door.open, door.close, door.info, door.statistics, door.submit, door.cancel)
    for answer in answers:
        native.ffi.def_extern(
            name=f"door_{answer.__name__}",
            error=native.lib.status_out_of_memory(),  # where even `_as_status` fails
            onerror=lambda *_: None,
        )(functools.partial(_as_status, native, answer))


def _be_silent() -> None:
    """Nothing goes to stdout or stderr of a program that is not ours."""
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None


def _as_status(native: Any, answer: Callable[..., None], *arguments: Any) -> Any:
    """Run ``answer``; NULL, or a status that says what it raised."""
    try:
        answer(*arguments)
    except BaseException as error:  # SystemExit too: it is C that called
        return status_from(native, error)
    return native.ffi.NULL


def status_from(native: Any, error: BaseException) -> Any:
    """A new sd_status that says what ``error`` says."""
    if isinstance(error, RefusedError):
        name, hint = _REFUSALS[error.code]
        code, message = getattr(native.lib, name), error.message
    elif isinstance(error, SdError):
        code, message, hint = error.exit_code, error.message, error.hint
    elif isinstance(error, MemoryError):
        return native.lib.status_out_of_memory()
    else:
        code, message = native.lib.SD_ERROR, f"{type(error).__name__}: {error}"
        hint = "This is a defect of the library; please report it."
    return native.lib.status_new(code, _c_text(message), _c_text(hint))


def _c_text(text: str) -> bytes:
    return text.encode("utf-8", errors="replace").replace(b"\0", b"?")


class Door:
    """The open contexts and the jobs under way, by the addresses that C knows them by."""

    def __init__(self, ffi: Any, lib: Any) -> None:
        self.ffi = ffi
        self.lib = lib
        self._contexts: dict[int, Context] = {}
        self._jobs: dict[int, tuple[Context, Ticket]] = {}
        # Held while a job is accepted, so that it cannot be cancelled before it is known.
        self._accepting = threading.RLock()

    def open(self, params: Any, context: Any) -> None:
        """Open a bundle; raises as `Pipeline.load`."""
        loras: list[str] = []
        while params.loras != self.ffi.NULL and params.loras[len(loras)] != self.ffi.NULL:
            loras.append(self._path(params.loras[len(loras)]))
        self._contexts[self._address(context)] = Context(
            self._path(params.bundle),
            backend=self._text(params.backend, "backend") or "auto",
            precision=cast("Precision | None", self._text(params.precision, "precision") or None),
            threads=params.threads or None,
            queue_size=params.queue_size or QUEUE_SIZE,
            loras=loras,
            cuda_stream=self._address(params.cuda_stream),
        )

    def close(self, context: Any) -> None:
        """Cancel a context's jobs and free its engines."""
        closing = self._opened(context)
        if closing.draws_in_this_thread:
            raise ConfigError(
                "a callback must not close its context", "Close it in another thread."
            )
        closing.close()
        del self._contexts[self._address(context)]
        gc.collect()  # a pipeline is part of a cycle; its memory is to go now, not at some time

    def info(self, context: Any, json_out: Any) -> None:
        """Say what a context is."""
        info = self._opened(context).info()
        self._give(json_out, {"abi_version": self.lib.sd_abi_version(), **info})

    def statistics(self, context: Any, json_out: Any) -> None:
        """Say what a context has done."""
        self._give(json_out, self._opened(context).statistics())

    def submit(self, context: Any, request: Any, job: Any) -> None:
        """Queue a request; raises `ConfigError` for what cannot be drawn, or as `EngineRoom`."""
        opened = self._opened(context)
        asked = self._request(request)
        format_ = self._text(request.format, "format")
        encoding = None if format_ is None else format_named(format_)
        if request.pixels != self.ffi.NULL:
            needed = opened.pixels_bytes(asked)
            if request.pixels_bytes < needed:
                raise ConfigError(
                    f"pixels has {request.pixels_bytes} bytes, and the pictures need {needed}",
                    "Give as many, or NULL for memory of the job's.",
                )
        with self._accepting:
            ticket = opened.submit(
                asked,
                previews=request.previews,
                on_progress=functools.partial(self._report, job),
                format_=encoding,
            )
            self._jobs[self._address(job)] = (opened, ticket)
        ends = functools.partial(
            self._end, opened, job, encoding, keeps_tensor=bool(request.device_pixels)
        )
        ticket.result.add_done_callback(ends)

    def cancel(self, job: Any) -> None:
        """Stop a job; one that has ended meanwhile is left as it is."""
        with self._accepting:
            found = self._jobs.get(self._address(job))
        if found is not None:
            context, ticket = found
            context.cancel(ticket)

    def _request(self, request: Any) -> Request:
        null = self.ffi.NULL
        given = {
            name: self._text(getattr(request, name), name)
            for name in ("prompt", "negative_prompt", "scheduler")
        }
        fields: dict[str, Any] = {name: text for name, text in given.items() if text is not None}
        for name in ("seed", "guidance_scale"):
            if getattr(request, name) != null:
                fields[name] = getattr(request, name)[0]
        for name in ("num_inference_steps", "num_images_per_prompt"):
            if getattr(request, name):
                fields[name] = getattr(request, name)
        options = options_from_json(self._text(request.options_json, "options_json") or "{}")
        twice = sorted(set(fields) & set(options))
        if twice:
            raise ConfigError(
                f"{twice[0]} is given twice, in the struct and in options_json",
                "Give it in one of them.",
            )
        return Request.from_mapping({**options, **fields})

    def _report(self, job: Any, progress: Progress) -> None:
        self.lib.job_report(job, progress.index + 1, progress.num_steps)
        if progress.preview is not None:
            n, height, width, _ = progress.preview.shape
            pixels = self.ffi.from_buffer("uint8_t[]", progress.preview)
            self.lib.job_preview(job, progress.first_image, n, height, width, pixels)

    def _end(
        self,
        context: Context,
        job: Any,
        encoding: str | None,
        ended: Future[Result],
        *,
        keeps_tensor: bool,
    ) -> None:
        """Hand the pictures over, or say why there are none; runs in the thread that draws."""
        del self._jobs[self._address(job)]
        try:
            result = ended.result()
            files = [result.encode(i, encoding) for i in range(len(result.pixels)) if encoding]
            packed, _kept_alive = self._packed(result, files)
            tensor = managed_tensor(result.device_pixels) if keeps_tensor else 0
        except BaseException as error:
            if not isinstance(error, SdError):
                logger.exception("a job failed for a reason that nobody foresaw")
            status = status_from(self, error)
            cancelled = self.lib.sd_status_code(status) == self.lib.SD_ERROR_CANCELLED
            context.count("cancelled" if cancelled else "failed")
            self.lib.job_fail(job, status)
        else:
            context.count("succeeded", images=len(result.pixels))
            device_pixels = self.ffi.cast("struct DLManagedTensor *", tensor)
            self.lib.job_succeed(job, packed, device_pixels)

    def _packed(self, result: Result, files: list[bytes]) -> tuple[Any, Any]:
        """An sd_result for C to copy, and what must live until then."""
        ffi, flags = self.ffi, result.nsfw_content_detected
        text = {
            "recipes": [asdict(recipe) for recipe in result.recipes],
            "timings_ms": result.timings.to_json(),
        }
        buffers = [ffi.from_buffer("uint8_t[]", data) for data in files]
        pointers = (
            ffi.from_buffer("uint8_t[]", result.pixels),
            ffi.from_buffer("float[]", result.latents),
            ffi.NULL if flags is None else ffi.new("uint8_t[]", flags),
            ffi.new("sd_file[]", [(data, len(data)) for data in buffers]) if files else ffi.NULL,
            ffi.new("char[]", _c_text(json.dumps(text))),
        )
        n, height, width, _ = result.pixels.shape
        sizes = (n, height, width, *result.latents.shape[1:])
        packed = ffi.new("sd_result *", (ffi.sizeof("sd_result"), *sizes, *pointers))
        return packed, (pointers, buffers)

    def _opened(self, context: Any) -> Context:
        try:
            return self._contexts[self._address(context)]
        except KeyError:
            raise ConfigError("the context is closed", "Open another one.") from None

    def _address(self, pointer: Any) -> int:
        return int(self.ffi.cast("uintptr_t", pointer))

    def _path(self, pointer: Any) -> str:
        return os.fsdecode(self.ffi.string(pointer))

    def _text(self, pointer: Any, name: str) -> str | None:
        if pointer == self.ffi.NULL:
            return None
        try:
            return str(self.ffi.string(pointer).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name} is not UTF-8: {error}", "Give it as UTF-8.") from error

    def _give(self, out: Any, value: dict[str, Any]) -> None:
        text = self.lib.string_new(_c_text(json.dumps(value)))
        if text == self.ffi.NULL:
            raise MemoryError
        out[0] = text


def managed_tensor(array: Array) -> int:
    """The address of a DLManagedTensor of ``array``, to be freed by its deleter."""
    capsule = array.__dlpack__()
    tensor = _PYTHON.PyCapsule_GetPointer(capsule, _DLPACK)
    _PYTHON.PyCapsule_SetName(capsule, _DLPACK_TAKEN)  # as the protocol says: it is ours now
    return int(tensor)
