// Package pyramidkv is the PyramidKV budget allocator (Cai et al., arXiv 2406.02069, section 4.2) around any
// selector with a budget: attention gathers from layer to layer, so low layers get many tokens and high ones
// few.
//
//	budget(l) = max - (max - min) * l / (num_layers - 1)    for the model's layers l = 0 .. num_layers-1
//	min       = token_budget / beta,    max = 2 * token_budget - min
//
// The mean over the layers is token_budget. Where max is more than a row's n tokens, it is n and min is
// 2 * token_budget - n, as in the original's code, so that the mean stays; where token_budget is n or more,
// every layer gets all. Budgets are rounded, and at least 1. A row's own TokenBudget, and sparsity_rate, stand
// for the mean; the budget in the wrapped selector's own keys is not used.
//
// The original allocates to SnapKV's compression, once, behind an observation window that each layer keeps
// whole. Here the selector's candidates are allocated anew in each step.
//
// num_layers is the model's: a cache may hold some of its layers only. Those that are dense anyway (the first
// two, by default) count as the others do. It keeps and costs nothing but what the wrapped selector does.
package pyramidkv
