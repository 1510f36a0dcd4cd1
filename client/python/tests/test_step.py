import numpy as np
import pytest
from engine import DENSE, GEOMETRY, KV_HEADS, LAYERS, PAGE, QUERY_HEADS, SPARSE, Engine

import twilight_client as tw


def test_dense_layers_equal_attention(client: tw.Client) -> None:
    with client.open(GEOMETRY, DENSE) as session:
        engine = Engine(session)
        tables = {1: [5, 2, 9, 7], 2: [1, 8, 3, 4]}
        lengths, first = {1: 50, 2: 37}, {1: 0, 2: 3}
        for name, table in tables.items():
            engine.write(table, 0, lengths[name])
        for _ in range(3):
            for name, table in tables.items():
                engine.write(table, lengths[name], lengths[name] + 1)
                lengths[name] += 1
            step = engine.cache.step(tw.Batch([tw.Sequence(n, lengths[n], tables[n], first=first[n]) for n in tables]))
            query = engine.query(2)
            for layer in range(LAYERS):
                result = step.layer(layer, query)
                for row, name in enumerate(tables):
                    want = engine.dense(layer, query[row], tables[name], lengths[name], first[name])
                    np.testing.assert_allclose(result.output[row], want, rtol=1e-4, atol=1e-5)
                assert set(result.paths) == {tw.PATH_DENSE}
                assert list(result.kept) == [n for name in tables for n in [lengths[name] - first[name]] * KV_HEADS]


def test_lists_hold_what_was_attended(client: tw.Client) -> None:
    with client.open(GEOMETRY, SPARSE) as session:
        engine = Engine(session)
        table, length = list(range(40)), 600
        engine.write(table, 0, length)
        indexed = engine.cache.step(tw.Batch([tw.Sequence(1, length - 1, table)], index_only=True))
        assert indexed.index.tokens_indexed == LAYERS * (length - 1)
        step = engine.cache.step(tw.Batch([tw.Sequence(1, length, table)]))
        out = session.new_buffer(QUERY_HEADS * GEOMETRY.k_dim * 4, tw.Access.READ_WRITE)
        into = out.numpy(np.float32, (1, QUERY_HEADS, GEOMETRY.k_dim))
        query = engine.query()
        result = step.layer(1, query, lists=True, output=into)
        assert result.output is None
        assert set(result.paths) == {tw.PATH_SPARSE}
        keys, values = (x[1, table].reshape(-1, KV_HEADS, GEOMETRY.k_dim) for x in engine.data)
        for head, positions in enumerate(result.row_lists()):
            assert len(positions) == result.kept[head] <= result.candidates[head] < length
            assert (np.diff(positions) > 0).all()
            for h in range(2 * head, 2 * head + 2):
                logits = keys[positions, head] @ query[0, h] / np.sqrt(GEOMETRY.k_dim)
                weights = np.exp(logits - logits.max())
                want = weights @ values[positions, head] / weights.sum()
                np.testing.assert_allclose(into[0, h], want, rtol=1e-3, atol=1e-4)


def test_refusals_name_field_and_remedy(client: tw.Client) -> None:
    with client.open(GEOMETRY, SPARSE) as session:
        engine = Engine(session)
        step = engine.cache.step(tw.Batch([tw.Sequence(1, 20, [0, 1])]))
        with pytest.raises(tw.OutOfRange, match="page") as refused:
            engine.cache.step(tw.Batch([tw.Sequence(2, 20, [0, 9999])]))
        assert refused.value.field.startswith("step.table")
        with pytest.raises(tw.InvalidArgument):
            engine.cache.step(tw.Batch([tw.Sequence(0, 20, [0, 1])]))
        with pytest.raises(tw.NotFound):
            step.layer(17, engine.query())
        step.layer(0, engine.query())  # the refused step left this one current

    with pytest.raises(tw.InvalidArgument, match="selektor"):
        client.open(GEOMETRY, {"selektor": {}})


def test_memory_that_is_no_buffer_is_refused(client: tw.Client) -> None:
    with client.open(GEOMETRY, DENSE) as session:
        array = np.zeros((4, KV_HEADS, PAGE, 32), np.float32)
        with pytest.raises(tw.InvalidArgument, match="no buffer"):
            session.register_tensors([array] * LAYERS, [array] * LAYERS)


def test_buffers_outlive_their_caches_only(client: tw.Client) -> None:
    with client.open(GEOMETRY, DENSE) as session:
        engine = Engine(session)
        assert engine.cache.shadow.bytes >= 0
        with pytest.raises(tw.FailedPrecondition, match="close it first"):
            engine.kv.close()
        engine.cache.close()
        engine.kv.close()
        with pytest.raises(tw.Closed):
            engine.kv.close()
        engine.data[0] = 1  # the arrays stay mapped


def test_shared_descriptors_are_proven(client: tw.Client) -> None:
    with client.open(GEOMETRY, DENSE) as session:
        made = session.new_buffer(8192, tw.Access.READ_WRITE)
        made.numpy()[4096:4101] = list(b"hello")
        shared = session.share_fd(made._fd, 4096, tw.Access.READ_WRITE, offset=4096, probe=tw.Probe(b"hello"))
        shared.close()
        with pytest.raises(tw.DataLoss):
            session.share_fd(made._fd, 4096, tw.Access.READ_WRITE, offset=4096, probe=tw.Probe(b"other"))


def test_nobody_there(tmp_path: object) -> None:
    with tw.dial(f"unix://{tmp_path}/none") as client:
        with pytest.raises(tw.Unreachable):
            client.open(GEOMETRY)
        with pytest.raises(tw.DeadlineExceeded, match="waiting"):
            client.wait_serving(0.2)


def test_capabilities(client: tw.Client) -> None:
    answer = client.capabilities(GEOMETRY, SPARSE)
    assert [d.id for d in answer.devices] == ["host"]
    assert "quest" in answer.devices[0].selectors
    assert answer.devices[0].shadow_bytes_per_token > 0


def test_the_current_span_is_the_steps_parent() -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    assert tw.Trace.current() is None
    with trace.TracerProvider().get_tracer("test").start_as_current_span("step") as span:
        context = span.get_span_context()
        current = tw.Trace.current()
        assert current is not None
        assert current.parent == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
