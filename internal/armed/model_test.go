package armed

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// The model of proto/twilight/v1/ARMED.md: an engine's host, its stream, the thread that releases its
// waits, a daemon, and the messages between them, each advancing by one access to a word at a time. All
// interleavings are explored.

const (
	maxLayers = 3
	unarmed   = 15 // a replay for which no step was armed
)

// state is everything that can differ between two moments. Steps are numbered from 1.
type state struct {
	// The words; bit l of ready and done is layer l's.
	step, status, ready, done uint8
	// By layer: the step whose query is in place, and the one that the output is right for, 0 for none.
	query, output [maxLayers]uint8

	// The engine's host: the last step that it armed, the last that is behind it, how many it used, those
	// that no ArmedStepDone came for, and whether it must not use what is armed.
	armed, past, used, open uint8
	broken, engineDead      bool
	// The engine's stream: what it replays, and how far it is.
	replay, at uint8
	// The thread that releases the engine's waits: of which step, how far it is, the last it is done with.
	release, releaseAt, released uint8

	// The daemon: steps armed, the first one's progress, and what it was told.
	queue                     [2]uint8
	phase, layer              uint8
	cancel                    uint8 // steps up to this one are cancelled
	failing, daemonDead, hung bool

	// Messages of the daemon that have not arrived: steps that are done, and those that failed.
	acks, failures uint8

	// What may still go wrong.
	faults faults
}

// faults are budgets: how often each thing may happen in a run.
type faults struct {
	unarmed, repeats, cancels, errors, daemonDeaths, engineDeaths, hangs uint8
}

// The daemon's phases.
const (
	waitStep uint8 = iota
	waitReady
	consumeReady
	compute
	ring
	failStatus
	failPoison
	failRing
	drainStep
	drainReady
	finished
)

// rules are the protocol's; each can be broken to see that the model finds out.
type rules struct {
	engineConsumes, daemonConsumes bool // optional: a waiter writes 0 once its wait is over
	drains                         bool // optional: the daemon rings what it waits for in a step not begun

	watchdogs bool // of both sides
	silent    bool // the engine arms and never replays

	ringsStepFirst, keepsReady, keepsDone bool // begin in the wrong order or not whole
	unarmedWaits                          bool // a replay that nobody armed does not release itself
	ignoresStep                           bool // the daemon begins at the first ring
	statusLast                            bool // the daemon releases, then says that it failed
	writesUnbegun                         bool // the daemon releases a step that has not begun
	earlyAnswer                           bool // ArmedStepDone before the last word is written
	armsOverOpen                          bool // the engine goes on before all is answered
	ignoresStatus                         bool // the engine uses what failed
	releasesOnce                          bool // the engine does not look whether its release was undone
	ignoresMessages                       bool // the engine does not release itself when told of a failure
	releaseForgets                        bool // the engine releases itself and uses the step
}

type model struct {
	layers, steps uint8
	faults        faults
	rules         rules
}

// successor is a state that follows in one access, by what.
type successor struct {
	state
	what  string
	fault bool // may happen, need not
	wrong string
}

// begin's accesses come first in a replay, then ring, wait and consume of each layer, then the end.
func (m *model) beginLength() uint8 { return 2 + 2*m.layers }

func (m *model) next(s *state, emit func(successor)) {
	to := func(what string, change func(t *state)) {
		t := successor{state: *s, what: what}
		change(&t.state)
		emit(t)
	}
	fault := func(what string, budget func(*state) *uint8, change func(t *state)) {
		t := successor{state: *s, what: what, fault: true}
		b := budget(&t.state)
		if *b == 0 {
			return
		}
		*b--
		change(&t.state)
		emit(t)
	}
	if !s.engineDead {
		m.host(s, to, fault)
		m.stream(s, emit, to, fault)
		m.releaser(s, to)
		fault("engine dies", func(t *state) *uint8 { return &t.faults.engineDeaths }, func(t *state) {
			// What only a living engine has counts no more.
			t.engineDead, t.broken, t.open, t.acks, t.failures = true, true, 0, 0, 0
			t.replay, t.at, t.release, t.releaseAt = 0, 0, 0, 0
		})
	} else if s.cancel < m.steps && !s.daemonDead {
		to("daemon: the stream ended", func(t *state) { t.cancel = m.steps })
	}
	if !s.daemonDead && !s.hung {
		m.daemon(s, to, fault)
		fault("daemon hangs", func(t *state) *uint8 { return &t.faults.hangs }, func(t *state) { t.hung = true })
		fault("daemon dies", func(t *state) *uint8 { return &t.faults.daemonDeaths }, func(t *state) {
			t.daemonDead, t.queue, t.phase, t.layer, t.failing = true, [2]uint8{}, 0, 0, false
		})
	}
}

type (
	transition func(what string, change func(*state))
	mishap     func(what string, budget func(*state) *uint8, change func(*state))
)

// breaks is what the engine's host does when a step must not be used: what is armed is cancelled, and
// the releaser acts.
func (s *state) breaks() {
	s.broken = true
	if s.open != 0 {
		s.cancel = s.armed
	}
}

func (m *model) host(s *state, to transition, fault mishap) {
	queued := s.queue[1] != 0
	if s.armed < m.steps && !s.broken && !s.daemonDead && !s.hung && !queued && s.armed-s.past < 2 {
		to("host: arm", func(t *state) {
			t.armed++
			t.open |= 1 << t.armed
			if t.queue[0] == 0 {
				t.queue[0] = t.armed
			} else {
				t.queue[1] = t.armed
			}
		})
	}
	for id := uint8(1); id <= m.steps; id++ {
		if s.acks&(1<<id) != 0 {
			to("host: told of success", func(t *state) { t.acks &^= 1 << id; t.open &^= 1 << id })
		}
		if s.failures&(1<<id) != 0 {
			to("host: told of failure", func(t *state) {
				t.failures &^= 1 << id
				t.open &^= 1 << id
				if m.rules.ignoresMessages {
					t.past = max(t.past, id)
				} else {
					t.breaks()
				}
			})
		}
	}
	if s.daemonDead {
		to("host: the stream broke; a new lease", func(t *state) {
			t.daemonDead, t.broken, t.open, t.acks, t.failures, t.cancel = false, true, 0, 0, 0, 0
		})
	}
	if s.broken && s.replay == 0 && s.release == 0 && (s.open == 0 || m.rules.armsOverOpen) && !s.daemonDead {
		to("host: start anew", func(t *state) { t.broken, t.past, t.open = false, t.armed, 0 })
	}
	if s.open != 0 {
		fault("host: cancel", func(t *state) *uint8 { return &t.faults.cancels }, func(t *state) { t.breaks() })
	}
	if s.replay == 0 {
		// Also when broken: it may have been launched before.
		if s.past < s.armed && !m.rules.silent {
			to("host: replay", func(t *state) { t.replay = t.past + 1 })
		}
		fault("host: replay that nobody armed", func(t *state) *uint8 { return &t.faults.unarmed },
			func(t *state) { t.replay = unarmed })
	}
}

func (m *model) stream(s *state, emit func(successor), to transition, fault mishap) {
	if s.replay == 0 {
		return
	}
	if s.at < m.beginLength() {
		to("stream: begin", m.begin)
		return
	}
	const accesses = 3
	l, access := (s.at-m.beginLength())/accesses, (s.at-m.beginLength())%accesses
	if l == m.layers {
		m.end(s, emit)
		return
	}
	bit := uint8(1) << l
	if access > 0 || l > 0 {
		for again := range l + min(access, 1) {
			fault("stream: ring once more", func(t *state) *uint8 { return &t.faults.repeats },
				func(t *state) { t.ready |= 1 << again })
		}
	}
	switch access {
	case 0:
		to("stream: ring ready", func(t *state) { t.query[l] = s.replay; t.ready |= bit; t.at++ })
	case 1:
		if s.done&bit != 0 {
			t := successor{state: *s, what: "stream: wait for done is over"}
			t.at++
			if s.replay != unarmed && s.output[l] != s.replay && s.status == 0 && !s.broken {
				t.wrong = fmt.Sprintf("stale release: layer %d of step %d goes on without its output", l, s.replay)
			}
			if !m.rules.engineConsumes {
				t.at++
			}
			emit(t)
		} else if m.rules.watchdogs && !s.broken {
			to("engine's watchdog", (*state).breaks)
		}
	case 2:
		to("stream: consume done", func(t *state) { t.done &^= bit; t.at++ })
	}
}

// begin makes the next of begin's accesses.
func (m *model) begin(t *state) {
	n, layers := t.at, m.layers
	t.at++
	if t.replay == unarmed {
		switch {
		case m.rules.unarmedWaits:
		case n == 0:
			t.status = 1
		case n <= layers:
			t.done |= 1 << (n - 1)
		case n == layers+1:
			t.step = 0
		}
		return
	}
	if m.rules.ringsStepFirst {
		if n == 0 {
			t.step = t.replay
			return
		}
		n--
	}
	switch {
	case n == 0:
		t.status = 0
	case n <= layers:
		if !m.rules.keepsReady {
			t.ready &^= 1 << (n - 1)
		}
	case n <= 2*layers:
		if !m.rules.keepsDone {
			t.done &^= 1 << (n - 1 - layers)
		}
	default:
		t.step = t.replay
	}
}

// end is the replay's end: the host looks at the status and uses the step or not.
func (m *model) end(s *state, emit func(successor)) {
	t := successor{state: *s, what: "stream: end of the replay"}
	t.replay, t.at = 0, 0
	if s.replay != unarmed {
		t.past = s.replay
		broken := s.broken
		if m.rules.releaseForgets && s.released == s.replay {
			broken = false
		}
		switch {
		case broken || s.status != 0 && !m.rules.ignoresStatus:
			t.breaks()
		default:
			t.used++
			for _, o := range s.output[:m.layers] {
				if o != s.replay {
					t.wrong = fmt.Sprintf("step %d is used after a failure", s.replay)
				}
			}
		}
	}
	emit(t)
}

// releaser lets the engine's own stream go on. It goes round and round: begin may undo what it did.
func (m *model) releaser(s *state, to transition) {
	switch {
	case s.release == 0:
		if s.broken && s.replay != 0 && s.replay != unarmed && (!m.rules.releasesOnce || s.released != s.replay) {
			to("releaser: status", func(t *state) {
				t.release, t.releaseAt = t.replay, 0
				if !m.rules.releaseForgets {
					t.status = 1
				}
			})
		}
	case s.releaseAt < m.layers:
		to("releaser: done", func(t *state) { t.done |= 1 << t.releaseAt; t.releaseAt++ })
	default:
		to("releaser: finished", func(t *state) { t.released, t.release = t.release, 0 })
	}
}

func (m *model) daemon(s *state, to transition, fault mishap) {
	head := s.queue[0]
	if head == 0 {
		return
	}
	bit := uint8(1) << s.layer
	fails := func(t *state) {
		t.failing = true
		switch {
		case t.phase != waitStep || m.rules.writesUnbegun:
			if t.phase = failStatus; m.rules.statusLast {
				t.phase = failPoison
			}
		case m.rules.drains:
			t.phase = drainStep
		default:
			t.phase = finished
		}
	}
	if s.phase < failStatus {
		if s.cancel >= head {
			to("daemon: cancelled", fails)
		}
		if s.failing { // with the step before it
			to("daemon: fails the step behind", fails)
			return
		}
		fault("daemon: error", func(t *state) *uint8 { return &t.faults.errors }, fails)
	}
	waits := func() {
		if m.rules.watchdogs {
			to("daemon's watchdog", fails)
		}
	}
	switch s.phase {
	case waitStep:
		if s.step == head || m.rules.ignoresStep {
			to("daemon: step has begun", func(t *state) { t.phase = waitReady })
		} else {
			waits()
		}
	case waitReady:
		if s.ready&bit != 0 {
			to("daemon: wait for ready is over", func(t *state) {
				if t.phase = compute; m.rules.daemonConsumes {
					t.phase = consumeReady
				}
			})
		} else {
			waits()
		}
	case consumeReady:
		to("daemon: consume ready", func(t *state) { t.ready &^= bit; t.phase = compute })
	case compute:
		to("daemon: layer", func(t *state) {
			t.output[t.layer] = 0
			if t.query[t.layer] == head {
				t.output[t.layer] = head
			}
			t.phase = ring
		})
	case ring:
		if m.rules.earlyAnswer && s.layer == m.layers-1 && s.acks&(1<<head) == 0 && s.open&(1<<head) != 0 {
			to("daemon: answers early", func(t *state) { t.acks |= 1 << head })
			return
		}
		to("daemon: ring done", func(t *state) {
			t.done |= bit
			t.layer++
			if t.phase = waitReady; t.layer == m.layers {
				t.phase = finished
			}
		})
	case failStatus:
		to("daemon: status", func(t *state) {
			t.status = 1
			if t.phase = failPoison; m.rules.statusLast {
				t.phase = finished
			}
		})
	case failPoison:
		to("daemon: poison", func(t *state) {
			for l := t.layer; l < m.layers; l++ {
				t.output[l] = 0
			}
			t.phase = failRing
		})
	case failRing:
		to("daemon: release", func(t *state) {
			t.done |= bit
			t.layer++
			if t.layer == m.layers {
				if t.phase = finished; m.rules.statusLast {
					t.phase = failStatus
				}
			}
		})
	case drainStep:
		to("daemon: ring its own wait for step", func(t *state) { t.step = head; t.phase = drainReady })
	case drainReady:
		to("daemon: ring its own wait for ready", func(t *state) {
			t.ready |= bit
			t.layer++
			if t.layer == m.layers {
				t.phase = finished
			}
		})
	case finished:
		to("daemon: answers", func(t *state) {
			if !t.engineDead && t.open&(1<<head) != 0 {
				if t.failing {
					t.failures |= 1 << head
				} else {
					t.acks |= 1 << head
				}
			}
			t.queue = [2]uint8{t.queue[1]}
			t.phase, t.layer = waitStep, 0
			t.failing = t.failing && t.queue[0] != 0
		})
	}
}

// final tells whether nothing waits and nothing is left to do.
func (m *model) final(s *state) bool {
	idle := s.queue[0] == 0 || s.daemonDead || s.hung
	if s.engineDead {
		return idle
	}
	if s.replay != 0 || s.release != 0 || !idle {
		return false
	}
	// With a daemon that hangs, the engine goes on without it.
	return s.hung || m.rules.silent && s.open == 0 || s.past == m.steps && s.open == 0 && !s.daemonDead
}

// explored is what a search found.
type explored struct {
	states int
	wrong  string   // "" if nothing is
	trace  []string // to it
	finals int
	used   uint8 // the fewest steps that a final state used
}

// explore visits every state that can be reached, breadth first. A run is wrong where a step goes on
// or is used without its outputs, or where, if nothing more goes wrong, it cannot end.
func (m *model) explore() explored {
	type edge struct{ from, to int32 }
	start := state{faults: m.faults}
	index := map[state]int32{start: 0}
	states, parents, whats := []state{start}, []int32{-1}, []string{""}
	var edges []edge // that need no fault
	trace := func(i int32) (steps []string) {
		for ; i > 0; i = parents[i] {
			steps = append(steps, whats[i])
		}
		slices.Reverse(steps)
		return steps
	}
	var e explored
	for i := int32(0); int(i) < len(states) && e.wrong == ""; i++ {
		s := states[i]
		m.next(&s, func(t successor) {
			j, seen := index[t.state]
			if !seen {
				j = int32(len(states))
				index[t.state] = j
				states, parents, whats = append(states, t.state), append(parents, i), append(whats, t.what)
			}
			if !t.fault {
				edges = append(edges, edge{i, j})
			}
			if t.wrong != "" && e.wrong == "" {
				e.wrong, e.trace = t.wrong, append(trace(i), t.what)
			}
		})
	}
	e.states = len(states)
	if e.wrong != "" {
		return e
	}

	// Backwards from the ends.
	before := make([][]int32, len(states))
	for _, x := range edges {
		before[x.to] = append(before[x.to], x.from)
	}
	ends := make([]bool, len(states))
	var queue []int32
	e.used = m.steps
	for i := range states {
		if m.final(&states[i]) {
			ends[i] = true
			queue = append(queue, int32(i))
			e.finals++
			e.used = min(e.used, states[i].used)
		}
	}
	for len(queue) > 0 {
		i := queue[0]
		queue = queue[1:]
		for _, j := range before[i] {
			if !ends[j] {
				ends[j] = true
				queue = append(queue, j)
			}
		}
	}
	if i := slices.Index(ends, false); i >= 0 {
		e.wrong, e.trace = "a wait that never ends", trace(int32(i))
	}
	return e
}

// everything is one of each mishap.
var everything = faults{unarmed: 1, repeats: 1, cancels: 1, errors: 1, daemonDeaths: 1, engineDeaths: 1}

var full = flag.Bool("full", false, "explore the large models too: minutes, and some GiB of memory")

func TestModel(t *testing.T) {
	t.Parallel()
	watched := rules{watchdogs: true}
	for _, tc := range []struct {
		name string
		model
		used  uint8 // the fewest steps that must be used
		large bool
	}{
		{"undisturbed", model{layers: 3, steps: 5}, 5, false},
		{"replays nobody armed, rings repeated", model{layers: 3, steps: 3, faults: faults{unarmed: 2, repeats: 2}}, 3, false},
		{"cancellation", model{layers: 2, steps: 2, faults: faults{unarmed: 1, cancels: 1}}, 0, false},
		{"errors", model{layers: 2, steps: 2, faults: faults{unarmed: 1, errors: 1}}, 0, false},
		{"deaths", model{layers: 2, steps: 2, faults: faults{daemonDeaths: 1, engineDeaths: 1}}, 0, false},
		{"watchdogs", model{layers: 2, steps: 2, rules: watched}, 0, false},
		{"a daemon that hangs", model{layers: 1, steps: 3, faults: faults{hangs: 1}, rules: watched}, 0, false},
		{
			"a silent engine",
			model{layers: 2, steps: 3, faults: faults{engineDeaths: 1}, rules: rules{watchdogs: true, silent: true}},
			0, false,
		},
		{"three steps", model{layers: 2, steps: 3, faults: faults{unarmed: 1, cancels: 1, errors: 1}}, 0, true},
		{"three layers", model{layers: 3, steps: 2, faults: faults{cancels: 1, errors: 1, daemonDeaths: 1}}, 0, true},
		{"everything", model{layers: 2, steps: 2, faults: everything}, 0, true},
		{"watchdogs, three layers", model{layers: 3, steps: 2, rules: watched}, 0, true},
		{"watchdogs and more", model{layers: 2, steps: 2, faults: everything, rules: watched}, 0, true},
		{"watchdogs, three steps", model{layers: 2, steps: 3, faults: faults{unarmed: 1}, rules: watched}, 0, true},
	} {
		if tc.large && !*full {
			continue
		}
		// What is optional makes no difference, each by itself or all together.
		for name, option := range map[string]func(*rules){
			"plain":          func(*rules) {},
			"engine consume": func(r *rules) { r.engineConsumes = true },
			"daemon consume": func(r *rules) { r.daemonConsumes = true },
			"drain":          func(r *rules) { r.drains = true },
			"all":            func(r *rules) { r.engineConsumes, r.daemonConsumes, r.drains = true, true, true },
		} {
			m := tc.model
			option(&m.rules)
			if (tc.large || m.faults.cancels+m.faults.errors+m.faults.daemonDeaths > 0) && name != "all" {
				continue // all together will do where there is much to explore
			}
			t.Run(tc.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				e := m.explore()
				if e.wrong != "" {
					t.Fatalf("%s:\n%s", e.wrong, strings.Join(e.trace, "\n"))
				}
				if e.finals == 0 || e.used < tc.used {
					t.Errorf("%d ends, of which one used %d steps, want %d", e.finals, e.used, tc.used)
				}
				t.Logf("%d states, %d ends", e.states, e.finals)
			})
		}
	}
}

// A model that cannot find a broken rule proves nothing.
func TestModelFindsBrokenRules(t *testing.T) {
	t.Parallel()
	watched := rules{watchdogs: true}
	for name, tc := range map[string]struct {
		faults faults
		rules  rules
		change func(*rules)
		want   string
	}{
		"step is rung before the words are zero": {faults{}, rules{}, func(r *rules) { r.ringsStepFirst = true }, ""},
		"ready is not zeroed":                    {faults{}, rules{}, func(r *rules) { r.keepsReady = true }, "stale"},
		"ready is consumed but not zeroed":       {faults{errors: 1}, rules{daemonConsumes: true}, func(r *rules) { r.keepsReady = true }, "stale"},
		"done is not zeroed":                     {faults{}, rules{}, func(r *rules) { r.keepsDone = true }, "stale"},
		"done is consumed but not zeroed":        {faults{cancels: 1}, rules{engineConsumes: true}, func(r *rules) { r.keepsDone = true }, "stale"},
		"a replay nobody armed waits":            {faults{unarmed: 1}, rules{}, func(r *rules) { r.unarmedWaits = true }, "never ends"},
		"the step word is ignored":               {faults{unarmed: 1}, rules{}, func(r *rules) { r.ignoresStep = true }, ""},
		"released before the status":             {faults{errors: 1}, rules{}, func(r *rules) { r.statusLast = true }, "stale"},
		"released before the step began":         {faults{errors: 1}, rules{}, func(r *rules) { r.writesUnbegun = true }, "stale"},
		"answered before the last word":          {faults{}, watched, func(r *rules) { r.earlyAnswer = true }, "stale"},
		"armed before all is answered":           {faults{}, watched, func(r *rules) { r.armsOverOpen = true }, "stale"},
		"status is not checked":                  {faults{errors: 1}, rules{}, func(r *rules) { r.ignoresStatus = true }, "used"},
		"no release when told of a failure":      {faults{errors: 1}, rules{}, func(r *rules) { r.ignoresMessages = true }, "never ends"},
		"released once":                          {faults{cancels: 1}, rules{}, func(r *rules) { r.releasesOnce = true }, "never ends"},
		"the release is forgotten":               {faults{cancels: 1}, rules{}, func(r *rules) { r.releaseForgets = true }, "used"},
		"a daemon that hangs, no watchdog":       {faults{hangs: 1}, rules{}, func(*rules) {}, "never ends"},
		"a silent engine, no watchdog":           {faults{}, rules{silent: true}, func(*rules) {}, "never ends"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := model{layers: 2, steps: 3, faults: tc.faults, rules: tc.rules}
			tc.change(&m.rules)
			e := m.explore()
			if e.wrong == "" || !strings.Contains(e.wrong, tc.want) {
				t.Fatalf("found %q among %d states, want %q", e.wrong, e.states, tc.want)
			}
			t.Logf("%s, after %d accesses, among %d states", e.wrong, len(e.trace), e.states)
		})
	}
}
