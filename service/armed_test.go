package service

import (
	"bytes"
	"context"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/twilight-sidecar/twilight/internal/armed"
	"github.com/twilight-sidecar/twilight/internal/fault"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// armedLease is a lease with cache 1 in region 1, and words and tensors in region 2.
type armedLease struct {
	*engine
	memory *shared // of region 2
}

// Where things lie in region 2. A step has one layer.
const (
	statusWord, readyWord, doneWord, stepWord = 0, 4, 8, 12

	armedQuery, armedOutput = 4096, 8192
)

func (d *daemon) armedLease() *armedLease {
	d.t.Helper()
	e := &armedLease{engine: d.openWith(everything), memory: share(d.t)}
	e.must(registerRegion(1, 1, e.lendFD(share(d.t).fd)))
	e.must(registerRegion(2, 1, e.lendFD(e.memory.fd)))
	e.must(registerCache(1))
	copy(e.memory.bytes[armedQuery:], encode(randomQuery()))
	return e
}

func (e *armedLease) word(at int) *armed.Word { return armed.At(e.memory.bytes[at:]) }

func armedAt(offset uint64) *twilightv1.Location {
	return &twilightv1.Location{RegionId: 2, Generation: 1, Offset: offset}
}

// armedStep arms step id of cache 1.
func armedStep(id uint64) *twilightv1.LeaseRequest {
	req := step(id)
	req.GetStep().Armed = &twilightv1.Armed{
		Step: armedAt(stepWord), Status: armedAt(statusWord), LayerResults: true,
		Layers: []*twilightv1.ArmedLayer{{
			Ready: armedAt(readyWord), Done: armedAt(doneWord),
			Query: &twilightv1.Tensor{At: armedAt(armedQuery)}, Output: &twilightv1.Tensor{At: armedAt(armedOutput)},
		}},
	}
	return req
}

func (e *armedLease) arm(req *twilightv1.LeaseRequest) {
	e.t.Helper()
	if res := e.must(req).GetStepResult(); !res.GetArmed() {
		e.t.Fatalf("not armed: %v", res)
	}
}

func (e *armedLease) begin(id uint32) {
	for _, at := range []int{statusWord, readyWord, doneWord} {
		e.word(at).Store(0)
	}
	e.word(stepWord).Ring(id)
}

// done waits for the end of an armed step.
func (e *armedLease) done(id uint64) *twilightv1.ArmedStepDone {
	e.t.Helper()
	m := e.receive(0).GetArmedStepDone()
	if m.GetStepId() != id || m.GetCacheId() != 1 {
		e.t.Fatalf("got %v, want the end of step %d", m, id)
	}
	return m
}

// replay runs an armed step and returns its result and output.
func (e *armedLease) replay(id uint64) (*twilightv1.ArmedStepDone, []byte) {
	e.t.Helper()
	e.begin(uint32(id))
	e.word(readyWord).Ring(1)
	if !e.word(doneWord).Await(1, deadline, func() bool { return false }) || e.word(statusWord).Load() != 0 {
		e.t.Fatalf("not done, status %d", e.word(statusWord).Load())
	}
	out := bytes.Clone(e.memory.bytes[armedOutput:][:heads*dim*4])
	return e.done(id), out
}

func (e *armedLease) refusedAs(req *twilightv1.LeaseRequest, code twilightv1.ErrorCode, field string) {
	e.t.Helper()
	if got := e.ask(req).GetError(); got.GetCode() != code || got.GetField() != field {
		e.t.Errorf("got %v, want %v at %s", got, code, field)
	}
}

func TestArmedStep(t *testing.T) {
	t.Parallel()
	e := startHost(t, Config{}).armedLease()
	e.arm(armedStep(1))
	first, out := e.replay(1)
	if first.GetError() != nil || len(first.GetLayers()) != 1 || first.GetLayers()[0].GetKept()[0] == 0 {
		t.Errorf("step 1: %v", first)
	}

	// By message: the same output and result.
	e.must(step(2))
	ask := layer(2)
	ask.GetLayer().Query = &twilightv1.Layer_QueryInline{QueryInline: encode(randomQuery())}
	want := e.must(ask).GetLayerResult()
	if !bytes.Equal(out, want.GetOutput()) {
		t.Error("the armed step's output differs from the message's")
	}
	want.Output, want.Index, want.Timing = nil, nil, nil
	got := first.GetLayers()[0]
	got.Index, got.Timing = nil, nil
	if !proto.Equal(got, want) {
		t.Errorf("results:\n%v\nby message:\n%v", got, want)
	}

	// As before, without results; the next is armed before it runs.
	for id := uint64(3); id < 6; id++ {
		req := step(id)
		req.GetStep().Armed = &twilightv1.Armed{AsBefore: true}
		e.arm(req)
		if id == 3 {
			continue
		}
		if m, again := e.replay(id - 1); m.GetError() != nil || len(m.GetLayers()) != 0 || !bytes.Equal(again, out) {
			t.Errorf("step %d as before: %v", id-1, m)
		}
	}
	// The answer and the end come in either order.
	e.send(request(&twilightv1.CancelStep{CacheId: 1, StepId: 5}))
	answered := false
	var end *twilightv1.ArmedStepDone
	for range 2 {
		resp, err := e.stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if m := resp.GetArmedStepDone(); m != nil {
			end = m
		} else {
			answered = resp.GetRequestId() == e.lastID && resp.GetStepCancelled() != nil
		}
	}
	if !answered || end.GetStepId() != 5 || end.GetError().GetCode() != twilightv1.ErrorCode_ERROR_CODE_CANCELLED ||
		end.GetError().GetField() != "step" {
		t.Errorf("cancelled: answered %v, end %v", answered, end)
	}
	e.must(request(&twilightv1.CancelStep{CacheId: 1, StepId: 5})) // which is over
}

// A batch that lies in lent memory when the step begins is that of the message.
func TestArmedDeviceBatch(t *testing.T) {
	t.Parallel()
	e := startHost(t, Config{}).armedLease()
	e.arm(armedStep(1))
	_, want := e.replay(1)
	const lengths, table, slots, firstValid = 16384, 16400, 16416, 16800
	device := &twilightv1.DeviceBatch{
		Batch: 1, Lengths: armedAt(lengths), Table: armedAt(table), TableStride: 2,
		Slots: armedAt(slots), NumSlots: 20, FirstValid: armedAt(firstValid), MaxLength: 32,
	}
	req := armedStep(2)
	req.GetStep().Sequences, req.GetStep().Lengths, req.GetStep().Table, req.GetStep().Device = nil, nil, nil, device
	e.arm(req)
	// Known only now: one row of 20 tokens on pages 0 and 1, all of them new.
	e.memory.bytes[lengths], e.memory.bytes[table+4] = 20, 1
	for i := range 20 {
		e.memory.bytes[slots+8*i] = byte(i)
	}
	if m, got := e.replay(2); m.GetError() != nil || !bytes.Equal(got, want) {
		t.Errorf("a batch in lent memory: %v, or another output", m)
	}

	e.memory.bytes[slots+7] = 0x40 // a slot far beyond the cache
	again := armedStep(3)
	again.GetStep().Sequences, again.GetStep().Lengths, again.GetStep().Table, again.GetStep().Device = nil, nil, nil, device
	e.arm(again)
	e.begin(3)
	if m := e.done(3); m.GetError().GetField() != "step.device.slots.slots[0]" {
		t.Errorf("a slot beyond the cache: %v", m)
	}
	plain := step(4)
	plain.GetStep().Device = device
	e.refusedAs(plain, twilightv1.ErrorCode_ERROR_CODE_UNSUPPORTED, "step.device")
	elsewhere := armedStep(4)
	elsewhere.GetStep().Device = proto.CloneOf(device)
	elsewhere.GetStep().Device.Table.RegionId = 9
	e.refusedAs(elsewhere, twilightv1.ErrorCode_ERROR_CODE_NOT_FOUND, "step.device.table.region_id")
}

func TestArmedRefusals(t *testing.T) {
	t.Parallel()
	e := startHost(t, Config{}).armedLease()
	asBefore := step(1)
	asBefore.GetStep().Armed = &twilightv1.Armed{AsBefore: true}
	e.refusedAs(asBefore, twilightv1.ErrorCode_ERROR_CODE_FAILED_PRECONDITION, "step.armed.as_before")

	for _, tc := range []struct {
		code  twilightv1.ErrorCode
		field string
		edit  func(s *twilightv1.Step)
	}{
		{twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT, "step.armed", func(s *twilightv1.Step) { s.Armed.AsBefore = true }},
		{twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT, "step.armed", func(s *twilightv1.Step) { s.Armed.Layers = nil }},
		{twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT, "step.armed", func(s *twilightv1.Step) { s.Armed.Status = nil }},
		{twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT, "step.armed.wait_timeout_ms", func(s *twilightv1.Step) { s.Armed.WaitTimeoutMs = 60001 }},
		{twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT, "step.armed.layers[0].done", func(s *twilightv1.Step) { s.Armed.Layers[0].Done = nil }},
		{twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT, "step.index_only", func(s *twilightv1.Step) { s.IndexOnly = true }},
		{twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT, "step.step_id", func(s *twilightv1.Step) { s.StepId = 1 << 32 }},
		{twilightv1.ErrorCode_ERROR_CODE_NOT_FOUND, "step.armed.step.region_id", func(s *twilightv1.Step) { s.Armed.Step.RegionId = 9 }},
		{twilightv1.ErrorCode_ERROR_CODE_STALE_GENERATION, "step.armed.layers[0].query.at.generation", func(s *twilightv1.Step) {
			s.Armed.Layers[0].Query.At.Generation = 0
		}},
		{twilightv1.ErrorCode_ERROR_CODE_OUT_OF_RANGE, "step.armed.layers[0].ready.offset", func(s *twilightv1.Step) {
			s.Armed.Layers[0].Ready.Offset = testRegionBytes
		}},
		{twilightv1.ErrorCode_ERROR_CODE_PERMISSION_DENIED, "step.armed.layers[0].output.at", func(s *twilightv1.Step) {
			s.Armed.Layers[0].Output.At = &twilightv1.Location{RegionId: 1, Generation: 1}
		}},
		{twilightv1.ErrorCode_ERROR_CODE_NOT_FOUND, "step.armed.layers[0].layer", func(s *twilightv1.Step) { s.Armed.Layers[0].Layer = 7 }},
		{twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT, "step.armed.layers[0].lists.lists", func(s *twilightv1.Step) {
			s.Armed.Layers[0].Lists = &twilightv1.ListBuffer{Capacity: 1, Counts: armedAt(0)}
		}},
	} {
		req := armedStep(1)
		tc.edit(req.GetStep())
		e.refusedAs(req, tc.code, tc.field)
	}

	// What does not go together with an armed step; all else on the lease goes on.
	e.arm(armedStep(1))
	e.refusedAs(step(2), twilightv1.ErrorCode_ERROR_CODE_FAILED_PRECONDITION, "step.step_id")
	e.refusedAs(layer(1), twilightv1.ErrorCode_ERROR_CODE_FAILED_PRECONDITION, "layer.step_id")
	e.refusedAs(request(&twilightv1.ReleaseRegion{RegionId: 2}),
		twilightv1.ErrorCode_ERROR_CODE_FAILED_PRECONDITION, "release_region.region_id")
	e.refusedAs(registerRegion(2, 2, e.lendFD(e.memory.fd)),
		twilightv1.ErrorCode_ERROR_CODE_FAILED_PRECONDITION, "register_region.region_id")
	e.must(registerCache(2))
	other := step(1)
	other.GetStep().CacheId = 2
	e.must(other)
	asked := layer(1)
	asked.GetLayer().CacheId = 2
	e.must(asked)
	if m, _ := e.replay(1); m.GetError() != nil {
		t.Errorf("step 1: %v", m)
	}

	// Once it is over, the region can be replaced; as before is then nothing.
	e.must(registerRegion(2, 2, e.lendFD(e.memory.fd)))
	asBefore.GetStep().StepId = 3
	e.refusedAs(asBefore, twilightv1.ErrorCode_ERROR_CODE_FAILED_PRECONDITION, "step.armed.as_before")
}

// Releasing a cache, or replacing the region that it lies in, ends its armed steps first.
func TestArmedRelease(t *testing.T) {
	t.Parallel()
	d := startHost(t, Config{})
	for _, release := range []func(e *armedLease) *twilightv1.LeaseRequest{
		func(*armedLease) *twilightv1.LeaseRequest { return request(&twilightv1.ReleaseCache{CacheId: 1}) },
		func(e *armedLease) *twilightv1.LeaseRequest { return registerRegion(1, 2, e.lendFD(e.memory.fd)) },
	} {
		e := d.armedLease()
		e.arm(armedStep(1))
		e.begin(1)
		e.send(release(e))
		if m := e.done(1); m.GetError().GetCode() != twilightv1.ErrorCode_ERROR_CODE_UNAVAILABLE {
			t.Errorf("the step ended by %v", m)
		}
		if res := e.receive(e.lastID); res.GetError() != nil {
			t.Errorf("released: %v", res)
		}
	}
}

// A draining daemon finishes what is armed, and arms nothing more; what is not done by then fails.
func TestArmedDrain(t *testing.T) {
	t.Parallel()
	d := startHost(t, Config{DrainGrace: time.Second})
	e := d.armedLease()
	e.arm(armedStep(1))
	e.arm(armedStep(2))
	e.begin(1)
	drained := make(chan error, 1)
	go func() { drained <- d.Drain(context.Background()) }()
	if m := e.receive(0); m.GetDraining() == nil {
		t.Fatalf("got %v, want draining", m)
	}
	e.refusedAs(armedStep(3), twilightv1.ErrorCode_ERROR_CODE_UNAVAILABLE, "step")
	if m, _ := e.replay(1); m.GetError() != nil {
		t.Errorf("step 1: %v", m)
	}
	e.begin(2)
	if m := e.done(2); m.GetError().GetCode() != twilightv1.ErrorCode_ERROR_CODE_UNAVAILABLE {
		t.Errorf("step 2: %v", m)
	}
	if status := e.word(statusWord).Load(); status != uint32(twilightv1.ErrorCode_ERROR_CODE_UNAVAILABLE) || e.word(doneWord).Load() != 1 {
		t.Errorf("status %d, done %d", status, e.word(doneWord).Load())
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
}

// The status word of a step that failed, and its error, tell the same code.
func TestStatusCodes(t *testing.T) {
	t.Parallel()
	for kind := range errorCodes {
		if got := fault.Kind(kind).Code(); got != uint32(errorCodes[kind].code) {
			t.Errorf("%v is %d in words, %v in messages", fault.Kind(kind), got, errorCodes[kind].code)
		}
	}
}
