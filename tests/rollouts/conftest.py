import pytest

from falign.rollouts import VLLMEngine
from tests.models.tiny import VOCABULARY, save_tiny
from tests.rollouts.loopback import Loopback


@pytest.fixture
def serve(tmp_path):
    """Return a function that starts a server over a tiny model."""
    folder, started = save_tiny(tmp_path / "tiny"), []

    def start(**options):
        started.append(Loopback(folder, **options).start())
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def connect(tmp_path):
    engines = []

    def make(server, **options):
        options = {"timeout": 20.0, "wait": 0.0, **options}
        engines.append(VLLMEngine(server.url, shared_dir=tmp_path / "shared", vocabulary=VOCABULARY, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
