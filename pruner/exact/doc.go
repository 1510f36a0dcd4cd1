// Package exact is the estimator that does not estimate: it computes the logits of the candidates from
// their keys, so that the pruner knows the true weights among them.
//
// It keeps nothing. Cost: the candidates' keys are read whole, D multiplications a token and query
// head; what the pruner then saves is the values. Twilight's own code takes the weights over all
// tokens here, not over the candidates, and then intersects.
package exact
