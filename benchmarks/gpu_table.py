"""What `make gpu` found, as tables in Markdown: of engines, of peers, and what is missing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from sd_bench.measurement import Measurement
from sd_bench.summary import Latency, achieved, latencies

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from errands import Outcome

_NOTHING: Final = "–"
_ENGINE_COLUMNS: Final = (
    *("engine", "UNet step, ms (p50 / p99)", "of the card's products", "VAE decoder, ms"),
    *("beside UNet and VAE", "picture, ms (p50 / p99)", "cold start, s", "GPU memory, GB"),
    *("captions right", "under load: drawn, wrong, failed"),
)
_PEER_COLUMNS: Final = ("peer", "precision", "picture, ms", "÷ ours", "pixels within 1/255")


def tables(outcomes: Sequence[Outcome]) -> str:
    """All of ``outcomes``, those that came to nothing last, each with what it said."""
    results = {outcome.name: outcome.result for outcome in outcomes if outcome.exit_code == 0}
    engines = [name.split(" ", 2)[2] for name in (o.name for o in outcomes) if " build " in name]
    rows = [_engine_cells(engine, results) for engine in dict.fromkeys(engines)]
    parts = [_markdown(_ENGINE_COLUMNS, rows)]
    if peers := results.get("peers"):
        parts.append(_markdown(_PEER_COLUMNS, map(_peer_cells, peers["rows"])))
    missing = [(o.name, o.state, _reason(o.said)) for o in outcomes if o.exit_code != 0]
    if missing:
        parts.append(_markdown(("not done", "", "what it said"), missing))
    return "\n".join(parts)


def _engine_cells(engine: str, results: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        engine,
        *_latency_cells(results.get(f"latency {engine}")),
        _score(results.get(f"quality {engine}")),
        _load(results.get(f"serve {engine}")),
    )


def _latency_cells(result: Any) -> tuple[str, ...]:
    """The columns of `_ENGINE_COLUMNS` that one file of ``sd-bench latency`` fills."""
    if result is None:
        return (_NOTHING,) * 7
    measurement = Measurement.from_json(json.dumps(result))
    stages = latencies(measurement)
    total, step, vae = (stages[stage] for stage in ("total", "unet_step", "vae_decoder"))
    reached = achieved(measurement).get("unet")
    share = reached.share_of_matmul if reached else None
    cold = measurement.cold_start_ms
    return (
        _spread(step),
        _NOTHING if share is None else f"{share:.0%}",
        f"{vae.median:.2f}",
        f"{1 - (stages['unet'].mean + vae.mean) / total.mean:.1%}",
        _spread(total),
        f"{Latency.of(cold).median / 1e3:.2f}" if cold else _NOTHING,
        f"{measurement.gpu_memory_bytes / 1e9:.2f}",
    )


def _spread(latency: Latency) -> str:
    return f"{latency.median:.2f} / {latency.p99:.2f}"


def _score(result: Any) -> str:
    return _NOTHING if result is None else f"{result['obeyed']:.1%} of {result['captions']}"


def _load(result: Any) -> str:
    if result is None:
        return _NOTHING
    loads = result["load"], result["overload"]
    return ", ".join(
        str(sum(load[name] for load in loads)) for name in ("drawn", "wrong", "failed")
    )


def _peer_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["state"] != "measured":
        return (row["name"], row["precision"], row["state"], _NOTHING, _reason(row["error"]))
    ratio, likeness = row["ratio"], row["likeness_to_ours"]
    return (
        row["name"],
        row["precision"],
        f"{Latency.of(row['warm_ms']).median:.1f}" if row["warm_ms"] else _NOTHING,
        f"{ratio['median']:.2f}" if ratio else _NOTHING,
        f"{likeness['pixels_within_1']:.2%}" if likeness else _NOTHING,
    )


def _reason(said: str | None) -> str:
    """The error in ``said``, the end of a log; without one its last line."""
    lines = (said or "").strip().splitlines() or [""]
    error = next((line for line in lines if line.startswith("Error: ")), lines[-1])
    return error.replace("|", "\\|")


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
