// Package gputest is what every gpu.Device must pass. It plays an engine that owns a KV cache, lends it
// to the device, and holds what comes back against attention computed plainly in float64.
package gputest

import (
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
)

// Memory allocates engine memory that a device can import.
type Memory interface {
	// Alloc returns size zero bytes that live until the test ends.
	Alloc(t testing.TB, size int) Buffer
}

// Buffer is engine memory.
type Buffer interface {
	// Region lends the buffer's first size bytes. Each call makes a descriptor of its own.
	Region(t testing.TB, size int, writable bool) *gpu.Region
	Write(offset int, data []byte)
	Read(offset int, data []byte)
}

// Ringer is a Buffer in which words can be rung and waited for. That of a device that arms steps must be
// one.
type Ringer interface {
	// Store writes a word and wakes nobody.
	Store(offset int, v uint32)
	// Ring writes a word behind all that was written before, and wakes who waits for it.
	Ring(offset int, v uint32)
	// Load reads a word.
	Load(offset int) uint32
	// Await waits until a word is v, and tells whether it is before timeout passed.
	Await(offset int, v uint32, timeout time.Duration) bool
}

// Option changes how strict the suite is.
type Option func(*suite)

// Slack allows that a share of the tokens of a list, and two more, are others than the reference's, as
// those at the edge of a set may be on a device that sums in another order. Estimates may then be off
// by as much. Without it there is none.
func Slack(share float64) Option { return func(s *suite) { s.slack = share } }

// Extrapolation allows that mass and coverage of rows whose other tokens' weight is extrapolated differ by
// this from the reference's: a fitted line amplifies what a device rounds differently, most where softcap
// draws its points together.
func Extrapolation(tolerance float64) Option {
	return func(s *suite) { s.extrapolation = tolerance }
}

// HistorySteps is how many armed steps a random history has, 400 without it.
func HistorySteps(n int) Option { return func(s *suite) { s.historySteps = n } }

// Run runs the suite. newDevice makes a device that it closes when the test ends. What the device does
// not declare in its Info is skipped, and nothing else.
func Run(t *testing.T, newDevice func(t testing.TB) gpu.Device, mem Memory, options ...Option) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, s *suite)
	}{
		{"SelfTest", testSelfTest},
		{"DTypes", testDTypes},
		{"HeadSizes", testHeadSizes},
		{"Groups", testGroups},
		{"Methods", testMethods},
		{"Logits", testLogits},
		{"Scales", testScales},
		{"Layouts", testLayouts},
		{"Placement", testPlacement},
		{"Tensors", testTensors},
		{"Append", testAppend},
		{"IndexOnly", testIndexOnly},
		{"PageReuse", testPageReuse},
		{"PageClaim", testPageClaim},
		{"SequenceClaim", testSequenceClaim},
		{"SharedPrefix", testSharedPrefix},
		{"Truncation", testTruncation},
		{"Slots", testSlots},
		{"History", testHistory},
		{"LeftPadding", testLeftPadding},
		{"VoidRows", testVoidRows},
		{"ValuePages", testValuePages},
		{"NullPage", testNullPage},
		{"Overrides", testOverrides},
		{"Lists", testLists},
		{"Carry", testCarry},
		{"States", testStates},
		{"Observations", testObservations},
		{"RewrittenSlots", testRewrittenSlots},
		{"Refusals", testRefusals},
		{"Cancellation", testCancellation},
		{"Lifetimes", testLifetimes},
		{"ShadowBytes", testShadowBytes},
		{"Leaks", testLeaks},
		{"Neighbours", testNeighbours},
		{"Armed", testArmed},
		{"ArmedHistory", testArmedHistory},
		{"ArmedFailures", testArmedFailures},
		{"ArmedRefusals", testArmedRefusals},
		{"ArmedLifetimes", testArmedLifetimes},
		{"ArmedNeighbours", testArmedNeighbours},
		{"DeviceBatches", testDeviceBatches},
	} {
		t.Run(test.name, func(t *testing.T) {
			device := newDevice(t)
			s := &suite{device: device, info: device.Info(), memory: mem, historySteps: 400}
			for _, o := range options {
				o(s)
			}
			test.run(t, s)
		})
	}
}

// suite is what a test runs on.
type suite struct {
	device        gpu.Device
	info          gpu.Info
	memory        Memory
	slack         float64
	extrapolation float64
	historySteps  int
}
