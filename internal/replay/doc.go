// Package replay plays an engine: it lends the keys and values of a capture to a daemon, decodes the
// capture's steps through a client session, and judges what comes back.
//
// The judgement is the client's own. Dense attention, true mass and errors are computed in float64 from
// the capture's values; of what the daemon says only its outputs, lists and counts, which are under
// test, enter.
package replay
