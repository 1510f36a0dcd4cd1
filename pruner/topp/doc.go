// Package topp is Twilight's top-p pruner (arXiv 2502.02770, section 4.1): it keeps the smallest set of
// candidates whose softmax weights sum to at least p, so that each row gets the budget it needs. The
// attention output is then off by at most (1-p)*||V|| (equation 2).
//
// Weights are normalised over the candidates or, given an estimate of the weight outside, over all
// tokens. They are taken in descending order from the true maximum, equal ones by ascending position;
// the paper's Algorithm 1 says the same, while its kernel starts from token 0's weight. p = 1 keeps
// every candidate.
//
// p may differ by layer and by query head, and lists may be held to a least and a largest size:
// pruner.Limits, none of which Twilight has.
//
// The set is found without sorting or bisection. Weights below (1-p) of the mean are set aside, since all of
// them together are less than what may be left out. A histogram of the others by the leading bits of their
// floating-point form (32 bins an octave over 32 octaves) tells the bin in which the sum reaches p; only
// that bin is sorted. Cost: two quick passes over the candidates, three over those not set aside.
package topp
