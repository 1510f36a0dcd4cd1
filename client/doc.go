// Package client is the Go SDK of Twilight: it lends an engine's KV cache to twilightd and runs the
// attention layers of decode steps there.
//
// # A small engine
//
//	conn, err := client.Dial("unix:///run/twilight/twilightd.sock")
//	session, err := conn.Open(ctx, client.OpenOptions{EngineName: "my engine", Geometry: geometry})
//
//	// Lend memory: made here, or with ShareFD what the engine already has.
//	kv, err := session.NewBuffer(ctx, size, client.ReadOnly)
//	queries, err := session.NewBuffer(ctx, querySize, client.ReadOnly)
//	outputs, err := session.NewBuffer(ctx, outputSize, client.ReadWrite)
//
//	// Say where the cache lies in it.
//	cache, err := session.RegisterCache(ctx, client.CacheSpec{
//		DType: client.F16, PageSize: 16, NumPages: pages, K: strides, Layers: layers,
//	})
//
//	// After a prefill, index it, so that the first decode step need not.
//	_, err = cache.Step(ctx, client.Batch{Sequences: sequences, IndexOnly: true})
//
//	for decoding {
//		step, err := cache.Step(ctx, client.Batch{Sequences: sequences, Ended: finished})
//		for layer := range model {
//			// Write the token's K and V into kv.Bytes() and the query into queries.Bytes(), then:
//			result, err := step.Layer(ctx, client.Layer{
//				Layer:   layer,
//				QueryAt: &client.Tensor{Location: client.Location{Buffer: queries}},
//				Output:  &client.Tensor{Location: client.Location{Buffer: outputs}},
//			})
//			// outputs.Bytes() holds the attention output; result tells what each head kept.
//		}
//	}
//
// On a GPU the engine lends what it has with ShareGPU, and everything else is the same:
//
//	kv, err := session.ShareGPU(ctx, client.GPUShare{
//		Device: uuid, Size: size, Access: client.ReadOnly,
//		Export: func(context.Context) (client.GPUExport, error) {
//			return client.CUDAIPC{Handle: handle, Offset: offset}, nil
//		},
//	})
//
// The engine hands its whole page tables to every step; the SDK remembers what the daemon has and
// sends what changed.
//
// # Armed steps
//
// Cache.Arm declares a batch and arms all its layers by one message. After that, engine and daemon meet at
// words in shared memory, a ring and a wait a layer, without messages:
//
//	armed, err := cache.Arm(ctx, client.Batch{Sequences: sequences}, client.Arming{Layers: tensors})
//	for i := range tensors {
//		armed.Layer(i).Ready()          // the query, and the tokens' K and V, are in place
//		err := armed.Layer(i).Wait(ctx) // the output is; or the step failed and is not to be used
//	}
//
// The next step can be armed as soon as its batch is known, while this one runs. Wait ends by itself when
// the daemon dies, and at the latest after Arming.WaitTimeout; the engine then attends by itself, and arms
// anew once Arm lets it. A goroutine that waits keeps its thread.
//
// # Errors
//
// A refused request is an *Error that names the field, the value and the remedy; errors.Is tells its
// Code, as in errors.Is(err, client.ErrExhausted). It changes nothing, and the session goes on.
//
// When the stream breaks, because the daemon was restarted say, calls in flight fail with ErrLeaseLost.
// The engine attends by itself meanwhile; the session opens a fresh lease, with growing pauses, and
// lends and registers everything again. State, WaitLive and OpenOptions.OnState tell when it is live.
// The engine then goes on with a Step as if nothing had happened: the SDK sends whole tables and leaves
// out claims about what the old daemon had indexed.
//
// # Concurrency and cancellation
//
// Everything is safe for concurrent use. Requests of any number of goroutines may be in flight; the
// daemon serves them in the order sent. Steps of one cache wait for each other's answers. A call whose
// context ends returns at once, unless its message waits for flow control, and disturbs no other. What
// was sent still runs: after a cancelled Layer with an Output, its buffer is the engine's again once a
// later request is answered.
//
// Nothing runs behind the engine's back but two goroutines a session, which end with Session.Close, and what
// tells the daemon that an armed step failed.
package client
