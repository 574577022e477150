"""The engines of a pipeline are open all, or none, and ready for the request they were told of."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sd_engines.bundle import open_bundle
from sd_engines.errors import BackendError, BundleError
from sd_runtime import engines
from sd_runtime.engines import first_batches, open_engines
from sd_runtime.pipeline import Pipeline
from sd_runtime.plan import plan
from sd_runtime.request import Request
from streams import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from conftest import TinyModel
    from sd_engines import Bundle
    from sd_engines.border import Rows
    from sd_engines.engine import Binding, Engine


@pytest.mark.parametrize("cores", [1, 4])
def test_what_opened_is_closed_where_another_fails(
    guarded_model: TinyModel, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    opened = []

    def open_and_keep(bundle: Bundle, component: str, **options: Any) -> Engine:
        if component == "vae_decoder":
            raise BackendError("no room for it", "Make some.")
        opened.append(original(bundle, component, **options))
        return opened[-1]

    original = engines.open_engine
    monkeypatch.setattr(engines, "open_engine", open_and_keep)
    monkeypatch.setattr(engines, "usable_cores", lambda: cores)
    with pytest.raises(BackendError, match="no room"):
        open_engines(
            open_bundle(guarded_model.bundle),
            ["text_encoder", "vae_decoder", "unet"],
            backend="onnxruntime",
            threads=1,
            batches={},
        )
    assert len(opened) == 2
    for engine in opened:
        with pytest.raises(BackendError, match="closed"):
            engine.bind(1)


def test_engines_open_on_the_stream_that_they_run_on(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's engines keep the one that they opened on."""
    seen = []
    original = engines.open_engine

    def noted(*arguments: Any, **options: Any) -> Engine:
        seen.append((Stream.current(), threading.get_ident()))
        return original(*arguments, **options)

    monkeypatch.setattr(engines, "open_engine", noted)
    wanted = Stream(non_blocking=True)
    opened = open_engines(
        tiny_bundle, ["unet"], backend="onnxruntime", threads=1, batches={}, stream=wanted
    )
    opened["unet"].close()
    ((stream, thread),) = seen
    assert stream is wanted
    assert thread != threading.get_ident()


def test_what_goes_on_meanwhile_may_fail(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = engines.open_engine
    monkeypatch.setattr(
        engines, "open_engine", lambda *a, **k: opened.append(original(*a, **k)) or opened[-1]
    )

    def fail() -> None:
        raise BundleError("no tokenizer", "Make it again.")

    with pytest.raises(BundleError, match="no tokenizer"):
        open_engines(
            tiny_bundle, ["unet"], backend="onnxruntime", threads=1, batches={}, meanwhile=fail
        )
    with pytest.raises(BackendError, match="closed"):
        opened[0].bind(1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_stop": 0.5},
        {"guidance_start": 0.5, "num_images_per_prompt": 3},
        {"image": np.eye(24, dtype=np.uint8) * 255, "strength": 0.5},
    ],
    ids=range(5),
)
def test_the_first_batches_are_those_that_the_first_pictures_ask_for(
    guarded_model: TinyModel, monkeypatch: pytest.MonkeyPatch, options: Mapping[str, float]
) -> None:
    manifest = open_bundle(guarded_model.bundle).manifest
    request = Request("a red circle", num_inference_steps=4, seed=1, **options)  # type: ignore[arg-type]
    planned = plan(request, manifest)
    expected = first_batches(planned, manifest)
    asked: dict[str, set[Rows]] = {}
    with Pipeline.load(guarded_model.bundle, backend="onnxruntime", request=request) as pipeline:
        for name, engine in pipeline._engines.opened.items():
            monkeypatch.setattr(engine, "bind", partial(_noted, asked, name, engine.bind))
        next(step for step in pipeline.stream(request) if step.index + 1 == planned.table.num_rows)
    assert asked == {name: batches for name, batches in expected.items() if batches}


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 1.0}, {"guidance_stop": 0.25}])
def test_the_first_batches_of_a_shallow_unet(
    cached_bundle: Path, monkeypatch: pytest.MonkeyPatch, guidance: Mapping[str, float]
) -> None:
    request = Request(  # the first row alone is guided where guidance stops at a quarter
        "a cat", num_inference_steps=4, scheduler="ddim", cache_interval=2, **guidance
    )
    asked: dict[str, set[Rows]] = {}
    with Pipeline.load(cached_bundle, backend="onnxruntime", request=request) as pipeline:
        manifest = pipeline.bundle.manifest
        expected = first_batches(plan(request, manifest), manifest)
        for name, engine in pipeline._engines.opened.items():
            monkeypatch.setattr(engine, "bind", partial(_noted, asked, name, engine.bind))
        pipeline.generate(request)
    for name in ("unet", "unet_shallow"):
        assert asked[name] == expected[name]


def test_given_batches_are_bound_before_a_request(tiny_bundle: Bundle) -> None:
    batches = {"unet": {(1, 1), (2, 1)}}
    opened = open_engines(tiny_bundle, ["unet"], backend="openvino", threads=1, batches=batches)
    with opened["unet"] as unet:
        assert unet._compiled.keys() == {(1, 1), (2, 1)}  # type: ignore[attr-defined]


def _noted(
    asked: dict[str, set[Rows]],
    name: str,
    bind: Callable[..., Binding],
    batch: int,
    *,
    pictures: int | None = None,
) -> Binding:
    asked.setdefault(name, set()).add((batch, pictures or batch))
    return bind(batch, pictures=pictures)
