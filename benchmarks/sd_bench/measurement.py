"""What one run of `sd-bench latency` saw: raw samples, and all that is needed to judge them later.

The file that `Measurement.to_json` writes is the instrument's one format: baselines of the
regression gate, reports and plots are read from it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from sd_bench.typed import check_fields
from sd_engines.errors import ConfigError, SdError, plain
from sd_runtime import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sd_engines.spec import Precision

FORMAT: Final = "sd-bench latency"
FORMAT_VERSION: Final = 1
STEPS: Final = {"unet": "unet_step", "scheduler": "scheduler_step"}
"""What a single run of a stage is called, of the stages that every step of a picture runs."""
PROMPT: Final = "a large red circle on the left and a small blue star in the top right"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, in the words of `sd-run`; two measurements compare if these are equal.

    ``height`` and ``width`` in pixels choose one of a bundle's sizes; None: its own. ``precision``
    is asked of the UNet, where the bundle has several.
    """

    prompt: str = PROMPT
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    cache_interval: int = 1
    scheduler: str | None = None
    num_images: int = 1
    height: int | None = None
    width: int | None = None
    backend: str = "auto"
    precision: Precision | None = None
    threads: int | None = None

    def request(self) -> Request:
        """The request that every sample answers. Raises `ConfigError` as `Request` does."""
        return Request(
            self.prompt,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            num_images_per_prompt=self.num_images,
            height=self.height,
            width=self.width,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            guidance_start=self.guidance_start,
            guidance_stop=self.guidance_stop,
            cache_interval=self.cache_interval,
            scheduler=self.scheduler,
        )

    @property
    def words(self) -> str:
        """What was asked for, in short."""
        scheduler = self.scheduler or "the checkpoint's own scheduler"
        images = f"{self.num_images} picture{'s' * (self.num_images > 1)}"
        return (
            f"{self.num_inference_steps} steps of {scheduler}, "
            f"guidance {self.guidance_scale:g}, {images}"
        )


@dataclass(frozen=True)
class Sample:
    """One request answered. ``stages_ms`` holds each stage's sum, "total" and "png" included."""

    started_s: float
    """When it began, in seconds since the first sample began."""
    stages_ms: Mapping[str, float]
    unet_steps_ms: Sequence[float]
    scheduler_steps_ms: Sequence[float] = ()

    def __post_init__(self) -> None:
        for name in ("unet_steps_ms", "scheduler_steps_ms"):  # lists, once read from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Samples, warm and in order, with what they were taken of and where.

    ``environment`` is flat and says everything about the machine that may move a latency.
    ``profile`` holds batch_size, and the height and width that were drawn.
    ``backend`` and ``precision`` are what "auto" came to for the UNet, ``precisions`` those of
    every component. ``cold_start_ms`` holds each run's milliseconds from process start to the
    first picture, ``cold_start_stages_ms`` what they went into; ``ceilings`` what the machine
    reached in the same run ("matmul_<precision>_flops", "copy_bytes_per_s"); ``work`` what one
    call of a component computes and moves at least, and its calls a sample
    ({"unet": {"flops": …, "bytes": …, "calls": …}}). ``peak_memory_bytes`` are in RAM,
    ``gpu_memory_bytes`` on GPUs.
    """

    bundle: str
    fingerprint: str
    backend: str
    precision: str
    settings: Settings
    environment: Mapping[str, str]
    measured_at: str
    samples: tuple[Sample, ...]
    peak_memory_bytes: int
    gpu_memory_bytes: int = 0
    profile: Mapping[str, int] = field(default_factory=dict)
    precisions: Mapping[str, str] = field(default_factory=dict)
    cold_start_ms: tuple[float, ...] = ()
    cold_start_stages_ms: tuple[Mapping[str, float], ...] = ()
    ceilings: Mapping[str, float] = field(default_factory=dict)
    work: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def stage_ms(self, stage: str) -> list[float]:
        """``stage`` of every sample in ms.

        "unet_step" is every single call of the whole UNet, "scheduler_step" every update.
        """
        if stage == "unet_step":
            return [step for sample in self.samples for step in sample.unet_steps_ms]
        if stage == "scheduler_step":
            return [step for sample in self.samples for step in sample.scheduler_steps_ms]
        return [sample.stages_ms[stage] for sample in self.samples if stage in sample.stages_ms]

    def to_json(self) -> str:
        """The file's text."""
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The measurement in a file's text; `ConfigError` for anything else."""
        try:
            document: dict[str, Any] = json.loads(text)
            found = document.pop("format"), document.pop("format_version")
            if found != (FORMAT, FORMAT_VERSION):
                raise ConfigError(
                    f"format {found[0]!r} {found[1]!r}, not {FORMAT!r} {FORMAT_VERSION}",
                    "Measure again with this sd-bench: sd-bench latency BUNDLE --output FILE.",
                )
            document["settings"] = Settings(**document["settings"])
            document["samples"] = tuple(Sample(**sample) for sample in document["samples"])
            for name in ("cold_start_ms", "cold_start_stages_ms"):
                document[name] = tuple(document.get(name, ()))
            measurement = cls(**document)
            check_fields(measurement)
            _check_times(measurement.samples)
            return measurement
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, SdError):
                raise
            raise ConfigError(
                f"not a measurement of sd-bench: {error}",
                "Make one: sd-bench latency BUNDLE --output FILE.",
            ) from error


def _check_times(samples: Sequence[Sample]) -> None:
    """`ValueError` that names the first time that is negative, or a request's that is 0."""
    for index, sample in enumerate(samples):
        times = {f"stages_ms.{name}": ms for name, ms in sample.stages_ms.items()}
        for name in ("unet_steps_ms", "scheduler_steps_ms"):
            times |= {f"{name}[{step}]": ms for step, ms in enumerate(getattr(sample, name))}
        for name, ms in times.items():
            if ms < 0 or (ms == 0 and name == "stages_ms.total"):
                raise ValueError(f"samples[{index}].{name} is {ms!r}")


def read_measurement(path: Path) -> Measurement:
    """The measurement in the file at ``path``; `ConfigError` where it cannot be read."""
    try:
        return Measurement.from_json(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", error.hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {plain(error)}",
            "Make one: sd-bench latency BUNDLE --output FILE.",
        ) from error
