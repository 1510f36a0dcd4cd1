import threading

import numpy as np
import pytest
from engine import DENSE, GEOMETRY, LAYERS, QUERY_HEADS, Engine

import twilight_client as tw


class Armed(Engine):
    """An engine whose steps are armed."""

    def __init__(self, session: tw.Session, timeout: float = 5.0) -> None:
        super().__init__(session)
        self.table = list(range(10))
        self.length = 100
        self.write(self.table, 0, self.length)
        size = LAYERS * QUERY_HEADS * GEOMETRY.k_dim * 4
        shape = (LAYERS, 1, QUERY_HEADS, GEOMETRY.k_dim)
        self.queries = session.new_buffer(size, tw.Access.READ_ONLY).numpy(np.float32, shape)
        self.outputs = session.new_buffer(size, tw.Access.READ_WRITE).numpy(np.float32, shape)
        self.how = tw.Arming(
            [
                tw.ArmedLayer(i, tw.Tensor.of(session, self.queries[i]), tw.Tensor.of(session, self.outputs[i]))
                for i in range(LAYERS)
            ],
            wait_timeout=timeout,
            results=True,
        )

    def arm(self) -> tw.ArmedStep:
        self.length += 1
        return self.cache.arm(tw.Batch([tw.Sequence(1, self.length, self.table)]), self.how)

    def run(self, step: tw.ArmedStep, length: int) -> None:
        self.write(self.table, length - 1, length)
        for layer in range(LAYERS):
            self.queries[layer] = self.query()
            step.ready(layer)
            step.wait(layer)
            want = self.dense(layer, self.queries[layer, 0], self.table, length)
            np.testing.assert_allclose(self.outputs[layer, 0], want, rtol=1e-4, atol=1e-5)


def test_armed_steps_equal_attention(client: tw.Client) -> None:
    with client.open(GEOMETRY, DENSE) as session:
        engine = Armed(session)
        current = engine.arm()
        for _ in range(5):
            length = engine.length
            following = engine.arm()  # while this one has not begun
            engine.run(current, length)
            assert [list(r.kept) for r in current.results(10)] == [[length] * 2] * LAYERS
            current = following
        current.cancel()
        with pytest.raises(tw.Cancelled):
            current.wait(0)


def test_a_third_armed_step_is_refused(client: tw.Client) -> None:
    with client.open(GEOMETRY, DENSE) as session:
        engine = Armed(session)
        first = engine.arm()
        second = engine.arm()
        with pytest.raises(tw.FailedPrecondition, match="2 steps"):
            engine.arm()
        second.ready(0)
        with pytest.raises(tw.FailedPrecondition, match="before"):
            second.wait(0)
        engine.length -= 2
        first.cancel()
        engine.run(engine.arm(), engine.length)


def test_waits_end_by_themselves(client: tw.Client) -> None:
    with client.open(GEOMETRY, DENSE) as session:
        engine = Armed(session, timeout=0.3)
        step = engine.arm()
        with pytest.raises(tw.DeadlineExceeded):
            step.wait(0)  # nobody rang
        again = engine.arm()
        threading.Timer(0.05, again.cancel).start()
        with pytest.raises(tw.Cancelled):
            again.wait(0)
        engine.run(engine.arm(), engine.length)


def test_a_step_that_fails_as_it_begins_is_released(client: tw.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with client.open(GEOMETRY, DENSE) as session:
        engine = Armed(session)
        step = engine.arm()
        words, released = step._words, list[int]()
        begin = words.begin

        def failing(step_id: int) -> None:
            begin(step_id)
            step.cancel()

        monkeypatch.setattr(words, "begin", failing)
        monkeypatch.setattr(words, "release", released.append)
        step.begin()
        assert released
        with pytest.raises(tw.Cancelled):
            step.finish()
        engine.length -= 1
        engine.run(engine.arm(), engine.length)
