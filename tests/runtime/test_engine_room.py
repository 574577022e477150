"""The engine room: who is drawn, who is refused, and that sharing a batch changes no picture."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_engines.errors import BackendError, ConfigError
from sd_runtime import Request
from sd_runtime.batch import join_requests, settings_of
from sd_runtime.engine_room import EngineRoom
from sd_runtime.input_image import InputImage
from sd_runtime.refusal import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import TinyModel
    from sd_runtime.result import Step
    from sd_runtime.ticket import Progress, Ticket

WAIT_S = 60
REQUEST = Request(
    "a cat",
    negative_prompt="",
    seed=3,
    num_inference_steps=4,
    guidance_scale=7.5,
    scheduler="euler_a",
)
LONG = replace(REQUEST, num_inference_steps=900, scheduler="ddim")


@pytest.fixture
def room(tiny_model: TinyModel) -> Iterator[EngineRoom]:
    """Two pictures a batch, three requests in the queue."""
    with EngineRoom(tiny_model.pipeline, queue_size=3) as room:
        yield room


def blocked(room: EngineRoom) -> tuple[Ticket, threading.Event]:
    """A ticket that stops the room after its first step, and the event that lets it go on."""
    reached, go_on = threading.Event(), threading.Event()

    def stop(progress: Progress) -> None:
        if progress.index == 0:
            reached.set()
            assert go_on.wait(WAIT_S)

    ticket = room.submit(LONG, on_progress=stop)
    assert reached.wait(WAIT_S)
    return ticket, go_on


def test_a_request_equals_the_pipelines_own(tiny_model: TinyModel, room: EngineRoom) -> None:
    steps: list[Progress] = []
    ticket = room.submit(REQUEST, on_progress=steps.append)
    result = ticket.result.result(WAIT_S)
    np.testing.assert_array_equal(result.pixels, tiny_model.pipeline.generate(REQUEST).pixels)
    assert result.request == replace(REQUEST, height=64, width=64)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert {step.num_steps for step in steps} == {4}


def test_without_a_seed_the_ticket_has_one(room: EngineRoom) -> None:
    ticket = room.submit(replace(REQUEST, seed=None))
    assert ticket.request.seed is not None
    assert ticket.result.result(WAIT_S).request == ticket.request


def test_what_the_bundle_cannot_draw_is_refused_at_the_border(room: EngineRoom) -> None:
    with pytest.raises(ConfigError, match="unknown scheduler"):
        room.submit(replace(REQUEST, scheduler="no_such"))
    with pytest.raises(ConfigError, match="draws 64×64"):
        room.submit(replace(REQUEST, height=512))


def test_a_full_queue_refuses_at_once_and_serves_in_turn(room: EngineRoom) -> None:
    running, go_on = blocked(room)
    order: list[int] = []
    tickets = []
    for seed in range(3):
        # Two pictures each: none can share a batch.
        ticket = room.submit(replace(REQUEST, seed=seed, num_images_per_prompt=2))
        ticket.result.add_done_callback(lambda _, seed=seed: order.append(seed))
        tickets.append(ticket)
    assert room.waiting == 3
    with pytest.raises(RefusedError, match="queue is full: 3") as refusal:
        room.submit(REQUEST)
    assert refusal.value.status == 429
    assert int(refusal.value.headers["Retry-After"]) >= 1
    tickets[1].cancel()  # who leaves makes room
    assert room.waiting == 2
    late = room.submit(replace(REQUEST, num_images_per_prompt=2))
    running.cancel()
    go_on.set()
    late.result.result(WAIT_S)
    assert sorted(order) == [0, 1, 2]
    assert [seed for seed in order if seed != 1] == [0, 2]
    with pytest.raises(RefusedError, match="cancelled"):
        tickets[1].result.result(WAIT_S)


def test_a_place_may_be_kept_before_there_is_a_request(room: EngineRoom) -> None:
    running, go_on = blocked(room)
    with room.kept_place(), room.kept_place():
        room.submit(replace(REQUEST, num_images_per_prompt=2))
        assert room.waiting == 3
        with pytest.raises(RefusedError, match="queue is full: 3"):
            room.submit(REQUEST)
        with pytest.raises(RefusedError, match="queue is full: 3"), room.kept_place():
            pass
    with pytest.raises(ConfigError), room.kept_place():
        InputImage.of("no such picture", name="image")
    assert room.waiting == 1
    room.drain()
    with pytest.raises(RefusedError, match="shutting down"), room.kept_place():
        pass
    running.cancel()
    go_on.set()


def test_one_that_waits_is_cancelled_at_once(room: EngineRoom) -> None:
    _running, go_on = blocked(room)
    waiting = room.submit(replace(REQUEST, num_images_per_prompt=2))
    room.cancel(waiting)
    with pytest.raises(RefusedError, match="cancelled"):
        waiting.result.result(0)
    go_on.set()
    assert not room.draws_in_this_thread


def test_a_cancelled_drawing_stops_within_a_step(room: EngineRoom) -> None:
    seen: list[int] = []
    ticket = room.submit(LONG, on_progress=lambda progress: seen.append(progress.index))
    while not seen:
        assert not ticket.result.done()
    ticket.cancel()
    steps = len(seen)
    with pytest.raises(RefusedError, match="cancelled"):
        ticket.result.result(WAIT_S)
    assert len(seen) <= steps + 2  # the one it was in, and one that may have ended in between


def test_one_that_shares_a_batch_is_cancelled_within_a_step(tiny_model: TinyModel) -> None:
    batches: list[int] = []
    with EngineRoom(
        tiny_model.pipeline, on_drawn=lambda joined, _: batches.append(len(joined))
    ) as room:
        running, go_on = blocked(room)
        reached, go_on_again = threading.Event(), threading.Event()

        def stop(progress: Progress) -> None:
            if progress.index == 0:
                reached.set()
                assert go_on_again.wait(WAIT_S)

        told: list[int] = []
        left = room.submit(REQUEST, on_progress=lambda progress: told.append(progress.index))
        stays = room.submit(replace(REQUEST, seed=4), on_progress=stop)
        ends: list[int] = []
        left.result.add_done_callback(
            lambda _: ends.append(-1 if stays.progress is None else stays.progress.index)
        )
        running.cancel()
        go_on.set()
        assert reached.wait(WAIT_S)
        room.cancel(left)
        go_on_again.set()
        alone = tiny_model.pipeline.generate(replace(REQUEST, seed=4))
        together = stays.result.result(WAIT_S)
        with pytest.raises(RefusedError, match="cancelled"):
            left.result.result(0)
    assert ends == [0]
    assert told == [0]
    assert batches == [1]
    assert np.abs(together.pixels.astype(int) - alone.pixels).max() <= 1


def test_one_that_is_cancelled_in_its_last_step_has_no_picture(room: EngineRoom) -> None:
    ticket = room.submit(
        replace(REQUEST, num_inference_steps=1), on_progress=lambda _: ticket.cancel()
    )
    with pytest.raises(RefusedError, match="cancelled"):
        ticket.result.result(WAIT_S)


def test_an_interrupt_stops_what_is_drawn_and_nothing_else(room: EngineRoom) -> None:
    running, go_on = blocked(room)
    waiting = room.submit(REQUEST)
    room.interrupt()
    go_on.set()
    with pytest.raises(RefusedError, match="cancelled"):
        running.result.result(WAIT_S)
    assert waiting.result.result(WAIT_S).pixels.shape == (1, 64, 64, 3)


def test_requests_that_wait_together_share_a_batch(tiny_model: TinyModel) -> None:
    batches: list[int] = []
    others = [
        replace(REQUEST, prompt="a red dog", negative_prompt="cat", seed=90),
        replace(REQUEST, num_inference_steps=3),  # other settings: a batch of its own
        replace(REQUEST, prompt="a horse", seed=5),
    ]
    with EngineRoom(
        tiny_model.pipeline, on_drawn=lambda joined, _: batches.append(len(joined))
    ) as room:
        running, go_on = blocked(room)
        tickets = [room.submit(request) for request in others]
        running.cancel()
        go_on.set()
        wait([ticket.result for ticket in tickets], WAIT_S)
    assert sorted(batches) == [1, 2]
    for ticket, request in zip(tickets, others, strict=True):
        result = ticket.result.result(0)
        alone = tiny_model.pipeline.generate(request)
        np.testing.assert_allclose(result.latents, alone.latents, atol=1e-5)
        assert np.abs(result.pixels.astype(int) - alone.pixels).max() <= 1
        assert result.request == replace(request, height=64, width=64)
        assert result.recipes == alone.recipes


def test_pipelines_take_turns_and_share_no_batch(
    tiny_model: TinyModel, guarded_model: TinyModel
) -> None:
    batches: list[int] = []
    pipelines = [tiny_model.pipeline, guarded_model.pipeline, None]
    request = replace(REQUEST, num_inference_steps=2)
    with EngineRoom(
        tiny_model.pipeline, on_drawn=lambda joined, _: batches.append(len(joined))
    ) as room:
        running, go_on = blocked(room)
        tickets = [room.submit(request, pipeline=pipeline) for pipeline in pipelines]
        with pytest.raises(ConfigError, match="draws 24×24"):
            room.submit(replace(request, height=64), pipeline=guarded_model.pipeline)
        running.cancel()
        go_on.set()
        results = [ticket.result.result(WAIT_S) for ticket in tickets]
    assert batches == [2, 1]
    for result, pipeline in zip(results, pipelines, strict=True):
        expected = (pipeline or tiny_model.pipeline).generate(request).pixels
        assert np.abs(result.pixels.astype(int) - expected).max() <= 1


def test_flags_of_a_shared_batch_go_to_their_owners(
    guarded_model: TinyModel, suspect: Request
) -> None:
    requests = [replace(suspect, seed=seed, num_images_per_prompt=1) for seed in range(4)]
    joined = join_requests(requests)
    assert settings_of(joined) == settings_of(requests[0])
    together = guarded_model.pipeline.generate(joined).nsfw_content_detected
    alone = [guarded_model.pipeline.generate(request) for request in requests]
    assert together == tuple(result.nsfw_content_detected[0] for result in alone)


def test_a_neighbour_that_fails_spoils_nobody(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny_model.pipeline.stream

    def fail_at_dogs(request: Request) -> Iterator[Step]:
        if "a dog" in request.prompts:
            raise BackendError("no dogs", "Draw cats.")
        return original(request)

    with EngineRoom(tiny_model.pipeline) as room:
        running, go_on = blocked(room)
        monkeypatch.setattr(tiny_model.pipeline, "stream", fail_at_dogs)
        tickets = [room.submit(replace(REQUEST, prompt="a dog")), room.submit(REQUEST)]
        running.cancel()
        go_on.set()
        assert tickets[1].result.result(WAIT_S).pixels.shape == (1, 64, 64, 3)
        with pytest.raises(BackendError, match="no dogs"):
            tickets[0].result.result(WAIT_S)


def test_previews_come_evenly_and_on_demand(room: EngineRoom) -> None:
    steps: list[Progress] = []
    request = replace(REQUEST, num_inference_steps=8, num_images_per_prompt=2)
    room.submit(request, previews=3, on_progress=steps.append).result.result(WAIT_S)
    shown = [step for step in steps if step.preview is not None]
    assert [step.index for step in shown] == [1, 3, 5]
    assert all(step.preview.shape == (2, 64, 64, 3) for step in shown)

    steps.clear()  # as many as C can ask for: there are no more than steps
    request = replace(REQUEST, num_inference_steps=4)
    room.submit(request, previews=2**32 - 1, on_progress=steps.append).result.result(WAIT_S)
    assert [step.preview is not None for step in steps] == [True, True, True, False]

    ticket, go_on = blocked(room)
    ticket.want_preview()
    go_on.set()
    while ticket.latest_preview is None:
        assert not ticket.result.done()
    ticket.cancel()
    assert ticket.latest_preview.shape == (1, 64, 64, 3)


def test_a_batch_shows_previews_to_those_who_asked(room: EngineRoom) -> None:
    running, go_on = blocked(room)
    seen: list[list[Progress]] = [[], []]
    request = replace(REQUEST, num_inference_steps=8)
    tickets = [
        room.submit(replace(request, seed=seed), previews=previews, on_progress=steps.append)
        for seed, previews, steps in zip((1, 2), (3, 0), seen, strict=True)
    ]
    tickets[0].want_preview()  # a poll: noted, and no step of the stream
    running.cancel()
    go_on.set()
    wait([ticket.result for ticket in tickets], WAIT_S)
    shown = [[step.index for step in steps if step.preview is not None] for steps in seen]
    assert shown == [[1, 3, 5], []]
    assert tickets[0].latest_preview is not None
    assert tickets[1].latest_preview is None


def test_a_batch_that_is_cancelled_is_not_drawn_one_by_one(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Request] = []
    original = tiny_model.pipeline.stream
    monkeypatch.setattr(
        tiny_model.pipeline, "stream", lambda request: drawn.append(request) or original(request)
    )
    with EngineRoom(tiny_model.pipeline) as room:
        running, go_on = blocked(room)
        reached = threading.Event()
        tickets = [
            room.submit(replace(LONG, seed=seed), on_progress=lambda _: reached.set())
            for seed in (1, 2)
        ]
        running.cancel()
        go_on.set()
        assert reached.wait(WAIT_S)
    assert len(drawn) == 2
    for ticket in tickets:
        with pytest.raises(RefusedError, match="cancelled"):
            ticket.result.result(0)


def test_who_is_told_of_a_drawing_cannot_end_the_room(tiny_model: TinyModel) -> None:
    def fail(tickets: object, timings: object) -> None:
        raise ValueError("no metrics")

    with EngineRoom(tiny_model.pipeline, on_drawn=fail) as room:
        for _ in range(2):
            with pytest.raises(ValueError, match="no metrics"):
                room.submit(REQUEST).result.result(WAIT_S)


def test_drained_it_finishes_what_it_accepted(tiny_model: TinyModel) -> None:
    with EngineRoom(tiny_model.pipeline) as room:
        running, go_on = blocked(room)
        waiting = room.submit(REQUEST)
        room.drain()
        assert not room.accepting
        with pytest.raises(RefusedError, match="shutting down") as refusal:
            room.submit(REQUEST)
        assert refusal.value.status == 503
        assert not room.finished
        running.cancel()
        go_on.set()
        assert waiting.result.result(WAIT_S).pixels.shape == (1, 64, 64, 3)
        for thread in threading.enumerate():
            if thread.name == "engine-room":
                thread.join(WAIT_S)
        assert room.finished


def test_closed_it_lets_go_of_everybody(tiny_model: TinyModel) -> None:
    room = EngineRoom(tiny_model.pipeline)
    tickets = [room.submit(replace(LONG, num_images_per_prompt=2)) for _ in range(2)]
    room.close()
    room.close()
    for ticket in tickets:
        with pytest.raises(RefusedError, match="cancelled"):
            ticket.result.result(0)
