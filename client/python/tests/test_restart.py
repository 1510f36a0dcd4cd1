import time
from pathlib import Path

import numpy as np
import pytest
from engine import DENSE, GEOMETRY, LAYERS, Engine
from test_armed import Armed

import twilight_client as tw


def test_a_session_outlives_its_daemon(program: Path) -> None:
    states: list[tw.State] = []
    with (
        tw.Daemon("--log-level", "error", program=program) as daemon,
        tw.dial(daemon.target) as client,
        client.open(GEOMETRY, DENSE, on_state=lambda state, _: states.append(state)) as session,
    ):
        engine = Engine(session)
        table = [3, 1, 2]
        engine.write(table, 0, 40)

        def decode(length: int, claim: int = 0, truncate: int | None = None) -> None:
            engine.write(table, length - 1, length)
            row = tw.Sequence(7, length, table, unchanged_prefix=claim, truncate_to=truncate)
            step = engine.cache.step(tw.Batch([row]))
            query = engine.query()
            for layer in range(LAYERS):
                want = engine.dense(layer, query[0], table, length)
                np.testing.assert_allclose(step.layer(layer, query).output[0], want, rtol=1e-4, atol=1e-5)

        decode(41)
        step = engine.cache.step(tw.Batch([tw.Sequence(7, 42, table)]))
        daemon.kill()
        with pytest.raises(tw.LeaseLost):
            step.layer(0, engine.query())
        with pytest.raises(tw.LeaseLost):
            engine.cache.step(tw.Batch([tw.Sequence(7, 42, table)]))
        daemon.start()
        session.wait_live(20)
        decode(42, claim=30, truncate=41)  # what the new daemon cannot know is left out
        decode(43)

        armed = Armed(session)
        running = armed.arm()
        running.ready(0)
        running.wait(0)
        daemon.kill()
        begun = time.monotonic()
        with pytest.raises(tw.Error):
            running.wait(1)  # without its daemon it ends all the same
        assert time.monotonic() - begun < 4
        daemon.start()
        session.wait_live(20)
        armed.run(armed.arm(), armed.length)
    assert states == [tw.State.LIVE, *[tw.State.LOST, tw.State.LIVE] * 2, tw.State.CLOSED]


def test_draining_is_told(program: Path) -> None:
    states: list[tw.State] = []
    with tw.Daemon("--log-level", "error", program=program) as daemon, tw.dial(daemon.target) as client:
        session = client.open(GEOMETRY, DENSE, on_state=lambda state, _: states.append(state))
        daemon.stop()
        deadline = time.monotonic() + 10
        while tw.State.LOST not in states and time.monotonic() < deadline:
            time.sleep(0.01)
        session.close()
        session.close()
        with pytest.raises(tw.Closed):
            session.new_buffer(1, tw.Access.READ_ONLY)
    assert states == [tw.State.LIVE, tw.State.DRAINING, tw.State.LOST, tw.State.CLOSED]
