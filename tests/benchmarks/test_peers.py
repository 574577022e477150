"""The peers: the protocol with real processes, the pairing, and what is said of failures."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from compvis import original_state
from sd_bench.measurement import Settings
from sd_bench.peers.checkpoint import checkpoint_folder, checkpoint_key, stage_checkpoint
from sd_bench.peers.comparison import Comparison, Row, likeness
from sd_bench.peers.contest import Turns, check_unchanged, measure_peers
from sd_bench.peers.peer import PEERS, REFERENCE, WORKERS, Peer, default_cache, find_peers, set_up
from sd_bench.peers.ratio import paired_ratio
from sd_bench.peers.worker import Worker, WorkerError
from sd_engines.bundle import open_bundle
from sd_engines.errors import ConfigError
from tiny import WORDS, make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

TALKER = """
import os, sys, threading
sys.path.insert(0, {workers!r})
from protocol import Drawing, serve
import numpy as np

class Talker:
    packages = ("numpy", "no-such-distribution")

    def prepare(self, job, folder):
        (folder / "made").write_text("once")

    def load(self, job):
        print("printed by Python", flush=True)
        os.system("echo printed by a child")
        threading.Thread(target=self.spin, daemon=True).start()
        return {{"threads": str(job.threads)}}

    def spin(self):
        while True:
            pass

    def generate(self, job, *, with_latents):
        if job.prompt == "raise":
            raise RuntimeError("cannot draw this")
        if job.prompt == "die":
            sys.stderr.write("last words\\n")
            sys.stderr.flush()
            os._exit(7)
        pixels = np.full((job.height, job.width, 3), job.seed, np.uint8)
        return Drawing(pixels, np.ones((1, 4, 1, 1), np.float32) if with_latents else None)

serve(Talker())
"""


def talker(folder: Path) -> Path:
    """A worker script that draws plain pictures, prints and spins."""
    script = folder / "talker.py"
    script.write_text(TALKER.format(workers=str(WORKERS)))
    return script


def job(folder: Path, prompt: str) -> dict[str, object]:
    return {
        **{"model": "", "bundle": "", "prepared": str(folder / "prepared"), "threads": 1},
        **{"precision": "fp32", "backend": "auto", "safety_checker": False, "sigmas": [1.0, 0.0]},
        **{"scheduler_name": "euler", "scheduler": "", "noise": "", "negative_prompt": ""},
        **{"prompt": prompt, "seed": 200, "num_inference_steps": 1, "guidance_scale": 1.0},
        **{"height": 8, "width": 16, "pictures": None},
    }


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    command = (sys.executable, talker(tmp_path))
    with Worker(command, log=tmp_path / "log", environment=os.environ) as process:
        yield process


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def test_worker_draws_whatever_its_libraries_print(worker: Worker, tmp_path: Path) -> None:
    loaded = worker.ask({"do": "load", **job(tmp_path, "a cat")})
    assert loaded["settings"] == {"threads": "1"}
    assert loaded["versions"]["numpy"] == np.__version__
    assert loaded["versions"]["no-such-distribution"] == "not installed"
    picture, latents = tmp_path / "picture.png", tmp_path / "latents.npy"
    drawn = worker.ask({"do": "generate", "picture": str(picture), "latents": str(latents)})
    assert drawn["peak_memory_bytes"] > drawn["own_memory_bytes"] > 1_000_000
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(picture)), np.full((8, 16, 3), 200, np.uint8))
    assert np.array_equal(np.load(latents), np.ones((1, 4, 1, 1)))
    log = (tmp_path / "log").read_text()
    assert "printed by Python" in log
    assert "printed by a child" in log


def test_paused_worker_computes_nothing(worker: Worker, tmp_path: Path) -> None:
    worker.ask({"do": "load", **job(tmp_path, "a cat")})  # its thread spins from now on
    worker.pause()
    while state(worker.pid) != "T":
        time.sleep(0.01)
    before = cpu_ticks(worker.pid)
    time.sleep(0.3)
    assert cpu_ticks(worker.pid) == before
    worker.resume()
    assert worker.ask({"do": "generate", "picture": None, "latents": None})["ok"]
    worker.pause()  # and ends all the same


def test_errors_come_back_and_the_worker_lives_on(worker: Worker, tmp_path: Path) -> None:
    worker.ask({"do": "load", **job(tmp_path, "raise")})
    with pytest.raises(WorkerError, match="RuntimeError: cannot draw this") as caught:
        worker.ask({"do": "generate", "picture": None, "latents": None})
    assert str(tmp_path / "log") in caught.value.hint
    assert worker.ask({"do": "load", **job(tmp_path, "a cat")})["ok"]
    assert worker.ask({"do": "generate", "picture": None, "latents": None})["ok"]


def test_a_worker_that_dies_says_how(worker: Worker, tmp_path: Path) -> None:
    worker.ask({"do": "load", **job(tmp_path, "die")})
    with pytest.raises(WorkerError, match="exit code 7: last words"):
        worker.ask({"do": "generate", "picture": None, "latents": None})
    with pytest.raises(WorkerError):
        worker.ask({"do": "load", **job(tmp_path, "a cat")})


def test_preparing_is_done_once_per_version(worker: Worker, tmp_path: Path) -> None:
    question = {"do": "prepare", **job(tmp_path, "a cat")}
    first = worker.ask(question)
    again = worker.ask(question)
    assert (first["reused"], again["reused"]) == (False, True)
    assert again["seconds"] == first["seconds"]
    note = tmp_path / "prepared" / "prepared.json"
    note.write_text(note.read_text().replace(np.__version__, "0.0"))
    assert not worker.ask(question)["reused"]


def test_ratios_are_paired() -> None:
    drift = np.array([100.0, 130, 90, 300, 110, 95, 105, 240])
    constant = paired_ratio((2 * drift).tolist(), drift.tolist())
    assert (constant.median, constant.low, constant.high) == pytest.approx((2, 2, 2))
    noise = np.array([1.0, 1.1, 1.2, 1.3, 1.5, 1.6, 1.7, 1.8])
    ratio = paired_ratio((drift * noise).tolist(), drift.tolist())
    assert ratio.median == pytest.approx(np.sqrt(1.3 * 1.5))
    # Of 8 fair coins, all but one fall alike in 16 of 256 cases: only the extremes make 95 %.
    assert (ratio.low, ratio.high) == pytest.approx((1.0, 1.8))


def test_too_few_rounds_make_no_interval() -> None:
    few = paired_ratio([3.0] * 5, [2.0] * 5)
    assert (few.median, few.low, few.high) == (pytest.approx(1.5), None, None)
    assert paired_ratio([3.0] * 6, [2.0] * 6).low == pytest.approx(1.5)
    with pytest.raises(ValueError, match="3 and 2 rounds"):
        paired_ratio([1.0] * 3, [1.0] * 2)
    with pytest.raises(ValueError, match="no pairs"):
        paired_ratio([], [])


def test_likeness_counts_values_and_measures_latents() -> None:
    black = np.zeros((4, 5, 3), np.uint8)
    close, far = black + np.uint8(1), black.copy()
    far[0, 0] = 2
    ones = np.ones((1, 4, 2, 2), np.float32)
    assert likeness((close, ones), (black, ones)) == likeness((black, ones), (close, ones))
    assert likeness((close, ones), (black, ones)).pixels_within_1 == 1.0
    assert likeness((far, None), (black, ones)).pixels_within_1 == pytest.approx(19 / 20)
    assert likeness((far, None), (black, ones)).latents_error is None
    assert likeness((black, 1.5 * ones), (black, ones)).latents_error == pytest.approx(0.5)
    assert likeness((black[:2], None), (black, None)).pixels_within_1 == 0.0


@pytest.mark.parametrize("prefix", [False, True])
def test_staged_checkpoint_is_in_the_layout_of_the_hub(tmp_path: Path, *, prefix: bool) -> None:
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    modern = make_checkpoint(tmp_path / "modern", text_model_prefix=prefix)
    hub = make_checkpoint(tmp_path / "hub", text_model_prefix=True)
    staged = tmp_path / "staged"
    stage_checkpoint(checkpoint_folder(str(modern)), staged)
    tokenizer = Tokenizer.from_file(str(modern / "tokenizer" / "tokenizer.json"))
    ids = tokenizer.encode(WORDS).ids
    vocabulary, merges = (str(staged / "tokenizer" / n) for n in ("vocab.json", "merges.txt"))
    tokenizer.model = BPE.from_file(vocabulary, merges, end_of_word_suffix="</w>")
    assert tokenizer.encode(WORDS).ids == ids
    assert len(set(ids)) > 20
    for part in ("text_encoder/model", "unet/diffusion_pytorch_model"):
        ours, theirs = (load_file(f / f"{part}.safetensors") for f in (staged, hub))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_checkpoint_key_changes_with_any_file(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(b"one")
    first = checkpoint_key(tmp_path)
    assert checkpoint_key(tmp_path) == first
    (tmp_path / "unet" / "weights").write_bytes(b"three")
    assert checkpoint_key(tmp_path) != first


def test_checkpoint_that_changes_between_turns_is_refused(
    shapes_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_bytes(b"one")
    key, bundle = checkpoint_key(tmp_path), open_bundle(shapes_bundle)
    check_unchanged(tmp_path, key, bundle)
    (tmp_path / "weights").write_bytes(b"three")
    with pytest.raises(ConfigError, match="changed while it was measured"):
        check_unchanged(tmp_path, key, bundle)


def test_single_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(original_state(make_checkpoint(tmp_path / "checkpoint")), path)
    with pytest.raises(ConfigError, match="one file"):
        checkpoint_folder(str(path))


@pytest.fixture(scope="module")
def comparison(
    smallest: Path, sizes_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, Path]:
    """Ours and diffusers on one tiny checkpoint, a peer that fails, and one that is not here."""
    folder = tmp_path_factory.mktemp("peers")
    diffusers = replace(find_peers([REFERENCE])[0], environment=None, modules=("diffusers",))
    failing = Peer(name="failing", worker=talker(folder), modules=("numpy",), prepared="failing")
    absent = replace(find_peers(["optimum-onnxruntime"])[0], environment="not-made")
    settings = Settings(
        prompt="raise",
        seed=5,
        num_inference_steps=3,
        scheduler="euler",
        backend="onnxruntime",
        threads=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONSAFEPATH", "1")  # workers find their protocol nevertheless
        found = measure_peers(
            sizes_bundle,
            settings,
            peers=[diffusers, failing, absent],
            model=str(smallest),
            turns=Turns(cold_starts=1, rounds=2, captions=2),
            cache=folder / "cache",
            folder=folder / "pictures",
        )
    return found, folder


def row(comparison: tuple[Comparison, Path], name: str) -> Row:
    return next(row for row in comparison[0].rows if row.name == name)


def test_ours_and_diffusers_draw_the_same_picture(comparison: tuple[Comparison, Path]) -> None:
    ours, theirs = row(comparison, "sd-toolkit"), row(comparison, REFERENCE)
    assert ours.likeness_to_reference is not None
    assert ours.likeness_to_reference.pixels_within_1 > 0.999
    assert ours.likeness_to_reference.latents_error == pytest.approx(0, abs=1e-4)
    assert theirs.likeness_to_ours is not None
    assert theirs.likeness_to_ours.pixels_within_1 > 0.999
    assert (comparison[1] / "pictures" / f"{REFERENCE}.png").exists()


def test_captions_are_drawn_each_from_its_seed(comparison: tuple[Comparison, Path]) -> None:
    folder = comparison[1] / "pictures"
    ours, theirs = (
        [np.asarray(Image.open(folder / f"{name}-{seed:04}.png"), dtype=int) for seed in (0, 1)]
        for name in ("sd-toolkit", REFERENCE)
    )
    assert (ours[0] != ours[1]).any()
    for found, wanted in zip(ours, theirs, strict=True):
        assert (np.abs(found - wanted) <= 1).mean() > 0.999
    for name in ("sd-toolkit", REFERENCE):  # random weights obey nobody
        assert (row(comparison, name).captions, row(comparison, name).captions_obeyed) == (2, 0)
    assert comparison[0].table().splitlines()[1].endswith("0.0%")


def test_everything_is_measured_of_those_that_draw(comparison: tuple[Comparison, Path]) -> None:
    ours, theirs = row(comparison, "sd-toolkit"), row(comparison, REFERENCE)
    for each in (ours, theirs):
        assert each.state == "measured"
        assert len(each.warm_ms) == 2
        assert len(each.cold_start_ms) == 1
        assert each.cold_start_ms[0] > each.load_ms[0] > 0
        assert each.prepare_s is not None
        assert each.peak_memory_bytes
        assert each.own_memory_bytes
        assert each.peak_memory_bytes > each.own_memory_bytes
    assert ours.ratio is not None
    assert ours.ratio.median == 1.0
    assert theirs.ratio is not None
    pairs = np.log(theirs.warm_ms) - np.log(ours.warm_ms)
    assert theirs.ratio.median == pytest.approx(np.exp(pairs.mean()))
    assert (ours.precision, ours.settings["backend"]) == ("fp32", "onnxruntime")
    assert theirs.versions["diffusers"][0].isdigit()
    assert theirs.settings["memory_format"] == "channels_last"


def test_who_is_not_measured_is_listed_with_what_to_do(comparison: tuple[Comparison, Path]) -> None:
    failing, absent = row(comparison, "failing"), row(comparison, "optimum-onnxruntime")
    assert (failing.state, failing.error) == ("failed", "RuntimeError: cannot draw this")
    assert (absent.state, absent.ratio) == ("not installed", None)
    assert absent.hint == "sd-bench peers --setup not-made"
    lines = comparison[0].table().splitlines()
    assert lines[1].startswith("sd-toolkit")
    assert "failing: failed: RuntimeError: cannot draw this" in lines
    assert any(line.startswith("optimum-onnxruntime: not installed: no env") for line in lines)
    assert "  sd-bench peers --setup not-made" in lines


def test_json_says_what_was_drawn_and_where(comparison: tuple[Comparison, Path]) -> None:
    document = json.loads(comparison[0].to_json())
    assert document["format"] == "sd-bench peers"
    assert [each["name"] for each in document["rows"]][:2] == ["sd-toolkit", REFERENCE]
    assert document["settings"]["num_inference_steps"] == 3
    assert document["threads"] == 1
    assert document["environment"]["python"]


def test_every_peer_has_its_worker_and_its_requirements() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    for peer in PEERS:
        assert peer.worker.exists()
        assert (WORKERS / f"{peer.environment}.txt").exists()


def test_where_environments_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below $XDG_CACHE_HOME where it is absolute, else ~/.cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache() == tmp_path / ".cache/sd-toolkit/peers"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    assert default_cache() == tmp_path / "kept/sd-toolkit/peers"


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    from sd_bench.cli import main

    with pytest.raises(ConfigError, match="unknown peer 'diffuser'") as caught:
        find_peers(["diffuser"])
    assert "diffusers-fp32" in caught.value.hint
    on_cpu, on_gpu = find_peers([]), find_peers([], gpu=True)
    assert {peer.device for peer in on_cpu} == {"cpu"}
    assert {peer.device for peer in on_gpu} == {"cuda"}
    assert {*on_cpu, *on_gpu} == {*PEERS}
    with pytest.raises(ConfigError, match="unknown environment"):
        set_up("optimus", tmp_path)
    assert main(["peers"]) == 2
    assert main(["peers", "--setup", "optimus"]) == 2
    assert main(["peers", str(tmp_path), "--peer", "nobody"]) == 2


def test_help_names_the_words_of_sd_run() -> None:
    from sd_bench.commands.peers import peers

    text = CliRunner().invoke(peers, ["--help"]).output
    for option in ("--num-inference-steps", "--guidance-scale", "--negative-prompt", "--scheduler"):
        assert option in text
