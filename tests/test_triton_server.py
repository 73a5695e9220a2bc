"""A real Triton Inference Server, version 2.51, serves what we export, as the native backend computes it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from scorers import events, model
from triton_server import Server, serve, why_not

from ebm.bundle import Bundle
from ebm.events import load_events
from export.score_graph import Options
from export.triton_repository import export
from kernels import BACKENDS, load_scorer

reason = why_not() or BACKENDS["native"].why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")
if reason is None:
    import tritonclient.grpc
    import tritonclient.http
    from tritonclient.utils import InferenceServerException

DEMO = Path(__file__).parents[1] / "models" / "demo"
BATCH_MAX = 4096
protocols = pytest.mark.parametrize("protocol", ["http", "grpc"])


class Client:
    """Energy, score and flag from the server, and the version that gave them."""

    def __init__(self, server: Server, protocol: str):
        self.library = getattr(tritonclient, protocol)
        self.server = self.library.InferenceServerClient(getattr(server, protocol))
        self.bounded = {"client_timeout": 60} if protocol == "grpc" else {}  # over HTTP that is the default

    def request(self, events: np.ndarray, dtype: str = "FP32"):
        tensor = self.library.InferInput("events", events.shape, dtype)
        tensor.set_data_from_numpy(events)
        return [tensor]

    def result(self, name: str, events: np.ndarray, outputs: tuple[str, ...] = ("energy", "score")):
        wanted = [self.library.InferRequestedOutput(output) for output in outputs]
        reply = self.server.infer(name, self.request(events), outputs=wanted, **self.bounded)
        return [reply.as_numpy(output) for output in outputs], reply

    def score(self, name: str, events: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        (energy, score), reply = self.result(name, events)
        about = reply.get_response()
        version = about["model_version"] if isinstance(about, dict) else about.model_version
        return int(version), energy[:, 0], score


@contextmanager
def client(server: Server, protocol: str = "grpc") -> Iterator[Client]:
    made = Client(server, protocol)
    try:
        yield made
    finally:
        made.server.close()


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """`demo` with all outputs, `hard` with missing values and every transform, and `slow`."""
    out = tmp_path_factory.mktemp("out")
    demo = Bundle.load(DEMO)
    every = ("energy", "score", "flag", "energies")
    export(demo, out, Options.of(demo, outputs=every, batch_max=BATCH_MAX), name="demo")
    hard = model(30, 64, 1)
    export(hard, out, Options.of(hard, level=2, batch_max=BATCH_MAX), name="hard")
    slow = Bundle.random(64, 512, 8)
    export(slow, out, Options.of(slow, outputs=("energy", "score", "energies"), batch_max=1024), name="slow")
    return out / "triton"


@pytest.fixture(scope="module")
def server(repository) -> Iterator[Server]:
    with serve(repository) as running:
        yield running


def native(bundle: Bundle, **options):
    return load_scorer(bundle, "native", deterministic=True, **options)


def toy(n: int) -> np.ndarray:
    x = load_events("toy:1000").x
    return np.ascontiguousarray(np.resize(x, (n, x.shape[1])))


@protocols
def test_bit_for_bit_the_native_backend(server, protocol):
    demo, hard = native(Bundle.load(DEMO)), native(model(30, 64, 1))
    with client(server, protocol) as c:
        for n in (1, 2, 3, 7, 64, 257, BATCH_MAX):
            x = toy(n)
            (energy, score, flag, energies), reply = c.result("demo", x, ("energy", "score", "flag", "energies"))
            expected = demo.energy_and_score(x)
            np.testing.assert_array_equal(energy, expected[0][:, None])
            np.testing.assert_array_equal(score, expected[1])
            np.testing.assert_array_equal(flag, demo.flag(x)[:, None])
            np.testing.assert_array_equal(energies, demo.energies(x))
            y = events(n, 30)
            _, energy, score = c.score("hard", y)
            np.testing.assert_array_equal(energy, hard.energy_and_score(y, 2)[0])
            np.testing.assert_array_equal(score, hard.energy_and_score(y, 2)[1])
        assert flag.dtype == bool
        (only,), reply = c.result("demo", toy(5), ("flag",))
        np.testing.assert_array_equal(only[:, 0], demo.flag(toy(5)))
        assert reply.as_numpy("score") is None


@protocols
def test_bad_input_is_refused_with_a_reason(server, protocol):
    x, bad = toy(9), toy(9)
    bad[7, 40] = np.nan
    infinite = toy(9)
    infinite[2, 0] = -np.inf
    with client(server, protocol) as c:
        for wrong, message in (
            (x[:, :5], r"unexpected shape for input 'events' for model 'demo'. Expected \[-1,64\], got \[9,5\]"),
            (x[0], r"Expected \[-1,64\], got \[64\]"),
            (x[None], r"Expected \[-1,64\], got \[1,9,64\]"),
            (toy(BATCH_MAX + 1), "inference request batch-size must be <= 4096 for 'demo'"),
            (x[:0], "for input 'events' for model 'demo'. Expected 256, got 0"),
            (bad, r"event 7: feature 40 \(MET\) is nan, expected a number: this feature has no imputation"),
            (infinite, r"event 2: feature 0 \(\w+\) is -inf, expected a finite number"),
        ):
            with pytest.raises(InferenceServerException, match=message):
                c.score("demo", np.ascontiguousarray(wrong))
        with pytest.raises(InferenceServerException, match="FP64"):
            c.server.infer("demo", c.request(x.astype(float), "FP64"))
        with pytest.raises(InferenceServerException, match="unexpected inference output 'energies' for model 'hard'"):
            c.result("hard", events(3, 30), ("energies",))
        with pytest.raises(InferenceServerException, match="unknown model: 'nothing'"):
            c.score("nothing", x)
        assert c.score("demo", x)[0] == 1


def flood(c: Client, name: str, batches: list[np.ndarray], **options) -> list:
    """The replies, or errors, of requests that are all under way at once."""
    replies, done = [None] * len(batches), threading.Semaphore(0)

    def received(i: int, result, error) -> None:
        replies[i] = error or result
        done.release()

    for i, x in enumerate(batches):
        c.server.async_infer(name, c.request(x), lambda result, error, i=i: received(i, result, error), **options)
    for _ in batches:
        assert done.acquire(timeout=60)
    return replies


def test_requests_share_a_batch(server):
    """Many requests at once: fewer executions, the same bits, and a bad event spoils no other request."""
    scorer, rng = native(model(30, 64, 1)), np.random.default_rng(0)
    sizes = [BATCH_MAX] * 8 + list(rng.integers(1, 40, 400))  # while it scores the large ones, the others queue up
    batches = [events(int(n), 30, seed=i) for i, n in enumerate(sizes)]
    for i in (50, 51, 407):
        batches[i][-1, 0] = np.inf
    with client(server) as c:
        def counts() -> tuple[int, int]:
            s = c.server.get_inference_statistics("hard").model_stats[0]
            return s.inference_stats.success.count + s.inference_stats.fail.count, s.execution_count

        before = counts()
        replies = flood(c, "hard", batches)
        requests, executions = np.subtract(counts(), before)
    assert requests == 408
    assert executions < requests
    for i, (x, reply) in enumerate(zip(batches, replies)):
        if i in (50, 51, 407):
            assert re.search(rf"event {len(x) - 1}: feature 0 \(x0\) is inf, expected a finite number", str(reply))
            continue
        energy, score = scorer.energy_and_score(x, 2)
        np.testing.assert_array_equal(reply.as_numpy("energy")[:, 0], energy)
        np.testing.assert_array_equal(reply.as_numpy("score"), score)


def test_queue_policy(server):
    """Behind 1024 others, or longer than its own timeout, a request does not wait: it is refused, and says so."""
    x = np.ones((1024, 64), np.float32)
    with client(server) as c:
        replies = flood(c, "slow", [x] * 8, timeout=20_000)
        late = [r for r in replies if isinstance(r, InferenceServerException)]
        assert 0 < len(late) < 8
        assert all("Request timeout expired" in str(r) for r in late)
        replies = flood(c, "slow", [x] * 8 + [x[:1]] * 1500)
        refused = [r for r in replies if isinstance(r, InferenceServerException)]
        assert 0 < len(refused) < 500
        assert all("Exceeds maximum queue size" in str(r) for r in refused)
        assert all(r in refused or r.as_numpy("energy").shape == (1, 1) for r in replies[8:])


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("mode", [("explicit", "--load-model", "swap"), ("poll", "--repository-poll-secs", "1")],
                         ids=lambda mode: mode[0])
def test_hot_swap_under_load(tmp_path, mode):
    """Four clients never stop while version 2 takes over: no request fails, every reply is one version's, entire."""
    bundles = {version: Bundle.random(30, 64, 1, seed=version) for version in (1, 2)}
    export(bundles[1], tmp_path, Options.of(bundles[1]), name="swap")
    (tmp_path / "triton" / "swap" / ".2.crashed").mkdir()  # as a killed export leaves it
    batches = [np.random.default_rng(i).normal(size=(1 + 16 * i, 30)).astype(np.float32) for i in range(4)]
    expected = {v: [native(b).energy_and_score(x) for x in batches] for v, b in bundles.items()}
    replies: list[list[tuple]] = [[] for _ in batches]
    stop = threading.Event()

    def work(i: int) -> None:
        with client(server) as c:
            while not stop.is_set():
                try:
                    replies[i].append(c.score("swap", batches[i]))
                except InferenceServerException as error:
                    replies[i].append((str(error),))

    with serve(tmp_path / "triton", "--model-control-mode", *mode) as server, client(server) as control:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        try:
            wait_until(lambda: all(len(r) > 20 for r in replies))
            export(bundles[2], tmp_path, Options.of(bundles[2]), name="swap")
            if mode[0] == "explicit":
                control.server.load_model("swap")
            wait_until(lambda: all(r[-20][0] == 2 for r in replies))
        finally:
            stop.set()
            for t in threads:
                t.join(60)
        wait_until(lambda: not control.server.is_model_ready("swap", "1"))
    for i, answers in enumerate(replies):
        versions = [reply[0] for reply in answers]
        assert set(versions) == {1, 2}, set(versions)
        assert versions == sorted(versions)
        for version, energy, score in answers:
            np.testing.assert_array_equal(energy, expected[version][i][0])
            np.testing.assert_array_equal(score, expected[version][i][1])


def test_a_damaged_version_does_not_take_over(tmp_path):
    """Its digests are checked before it serves; the older version goes on."""
    bundle = Bundle.random(5, 64, 1)
    for _ in range(2):
        export(bundle, tmp_path, Options.of(bundle), name="model")
    folder = tmp_path / "triton" / "model"
    (folder / "2").rename(tmp_path / "2")
    x = np.ones((3, 5), np.float32)
    with serve(tmp_path / "triton", "--model-control-mode", "explicit", "--load-model", "model") as server, \
            client(server) as c:
        energy = c.score("model", x)[1]
        description = tmp_path / "2" / "source" / "model.json"
        description.write_text(description.read_text().replace('"default_level": 5', '"default_level": 4'))
        (tmp_path / "2").rename(folder / "2")
        with pytest.raises(InferenceServerException, match=r"2/source/model.json: damaged, or from another export"):
            c.server.load_model("model")
        version, again, _ = c.score("model", x)
        assert version == 1
        np.testing.assert_array_equal(again, energy)
