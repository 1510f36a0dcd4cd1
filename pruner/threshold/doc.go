// Package threshold is Twilight's threshold pruner: a candidate is kept if its logit comes near enough
// to that of the sequence's first token, which in many heads is a sink that takes most of the weight.
//
//	keep i if logit[i] > logit[first] - t
//
// The first valid token's logit is always computed, candidate or not. Where no candidate passes, the one
// with the largest logit is kept. t may differ by layer and by query head, and lists may be held to a least
// and a largest size: pruner.Limits, none of which Twilight has. Cost: one comparison a candidate.
package threshold
