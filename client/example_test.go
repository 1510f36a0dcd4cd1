package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/replay/inprocess"
)

// startDaemon stands in for a twilightd beside the engine.
func startDaemon() (target string, stop func()) {
	d, err := inprocess.Start(context.Background(), inprocess.Options{})
	if err != nil {
		log.Fatal(err)
	}
	return d.Target(), func() {
		if err := d.Stop(context.Background()); err != nil {
			log.Print(err)
		}
	}
}

// An engine with one layer and one sequence, whose cache is [page][token][head][dim].
func Example() {
	target, stop := startDaemon()
	defer stop()
	ctx := context.Background()

	conn, err := client.Dial(target)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	geometry := client.Geometry{Layers: 1, QueryHeads: 2, KVHeads: 1, KDim: 64, Scale: 1, Query: client.F32}
	session, err := conn.Open(ctx, client.OpenOptions{
		EngineName: "example",
		Geometry:   geometry,
		Config: `{"selector": {"type": "quest", "token_budget": 64}, "weight_estimator": {"type": "min_max_quant"},
			"weight_pruner": {"type": "top_p", "threshold": 0.95}, "skip_first_two_layers": false}`,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()

	// A cache of 32 pages of 16 tokens, the keys first and the values behind them.
	const pages, pageSize, token = 32, 16, 64 * 4
	const half = pages * pageSize * token
	kv, err := session.NewBuffer(ctx, 2*half, client.ReadOnly)
	if err != nil {
		log.Fatal(err)
	}
	cache, err := session.RegisterCache(ctx, client.CacheSpec{
		DType: client.F32, PageSize: pageSize, NumPages: pages,
		K:      client.Strides{Page: pageSize * token, Head: token, Token: token},
		Layers: []client.CacheLayer{{K: client.Location{Buffer: kv}, V: client.Location{Buffer: kv, Offset: half}}},
	})
	if err != nil {
		log.Fatal(err)
	}

	// The prefill: 300 tokens, of which number 123 will be asked for.
	table := make([]int32, pages)
	for i := range table {
		table[i] = int32(pages - 1 - i)
	}
	write := func(position int, key, value float32) {
		at := int(table[position/pageSize])*pageSize*token + position%pageSize*token
		for d := range 64 {
			client.F32.Encode(kv.Bytes()[at+4*d:], []float32{key})
			client.F32.Encode(kv.Bytes()[half+at+4*d:], []float32{value})
		}
	}
	for position := range 300 {
		write(position, 0, -1)
	}
	write(123, 1, 7)
	sequence := client.Sequence{ID: 1, Len: 300, Table: table}
	indexed, err := cache.Step(ctx, client.Batch{Sequences: []client.Sequence{sequence}, IndexOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("indexed", indexed.Index.TokensIndexed)

	query := make([]float32, 2*64)
	for i := range query {
		query[i] = 1
	}
	for range 2 {
		write(sequence.Len, 0, -1)
		sequence.Len++
		step, err := cache.Step(ctx, client.Batch{Sequences: []client.Sequence{sequence}})
		if err != nil {
			log.Fatal(err)
		}
		result, err := step.Layer(ctx, client.Layer{Query: geometry.EncodeQuery(nil, query), Lists: true})
		if err != nil {
			log.Fatal(err)
		}
		output := geometry.DecodeOutput(nil, result.Output)
		fmt.Printf("of %d tokens kept %v; head 0 says %.0f\n", sequence.Len, result.Lists, output[0])
	}
	// Output:
	// indexed 300
	// of 301 tokens kept [123]; head 0 says 7
	// of 302 tokens kept [123]; head 0 says 7
}

// What a refusal tells.
func ExampleError() {
	target, stop := startDaemon()
	defer stop()
	conn, err := client.Dial(target)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	_, err = conn.Open(context.Background(), client.OpenOptions{
		Geometry: client.Geometry{Layers: 1, QueryHeads: 6, KVHeads: 4, KDim: 64, Query: client.F16},
	})
	if refused, ok := errors.AsType[*client.Error](err); ok {
		fmt.Println(errors.Is(err, client.ErrInvalid), refused.Field, "|", refused.Message)
	}
	// Output: true geometry | query_heads must be a multiple of kv_heads
}

// What the shadow of a model would take.
func ExampleClient_Capabilities() {
	target, stop := startDaemon()
	defer stop()
	conn, err := client.Dial(target)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	answer, err := conn.Capabilities(context.Background(), &client.ShadowQuery{
		Geometry: client.Geometry{Layers: 32, QueryHeads: 32, KVHeads: 8, KDim: 128, Query: client.F16},
		Config:   `{"weight_estimator": {"type": "min_max_quant", "equalize": false}, "weight_pruner": {"type": "top_p"}}`,
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, device := range answer.GetDevices() {
		fmt.Println(device.GetId(), device.GetShadowBytesPerToken(), "bytes a token")
	}
	// Output: host 16320 bytes a token
}
