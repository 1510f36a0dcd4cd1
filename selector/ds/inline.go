package ds

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"

	"github.com/twilight-sidecar/twilight/selector"
)

// Inline replaces config_path in a Twilight config by the lists of the channel file that it names, read
// by read: what a client does before it sends the config. A config that names no channel file is returned
// as it is.
//
// The file is that of the Double Sparsity project: a JSON object from names like
// "model.layers.3.self_attn.q_proj", ending in q_proj, k_proj or qk_proj, to a list for each head with all
// its channels, the heaviest first. There q and qk have a list for each query head; those that share a KV
// head, as the number of lists of k tells, become one, ordered by the sum of a channel's ranks, the lower
// channel first among equals. Of each list only the first r channels are sent.
func Inline(config []byte, read func(path string) ([]byte, error)) ([]byte, error) {
	return selector.Inline(config, "ds", "config_path", "channels", read,
		func(file []byte, keys map[string]json.RawMessage) (any, error) {
			c := Default()
			for key, value := range map[string]any{"r": &c.R, "selected_channel": &c.SelectedChannel} {
				if raw, has := keys[key]; has && json.Unmarshal(raw, value) != nil {
					return nil, fmt.Errorf("selector.%s is %s, expected a value of another type", key, raw)
				}
			}
			if c.R < 1 {
				return nil, fmt.Errorf("selector.r is %d, expected a number of channels", c.R)
			}
			return c.channels(file)
		})
}

var listName = regexp.MustCompile(`(?:^|\.)layers\.([0-9]+)\.self_attn\.(q|k|qk)_proj$`)

// channels makes the key channels of a channel file.
func (c *Config) channels(file []byte) (map[string][][]int, error) {
	var entries map[string]json.RawMessage
	if err := json.Unmarshal(file, &entries); err != nil {
		return nil, fmt.Errorf("it is no channel file: %w", err)
	}
	all := make(map[string]map[string][][]int) // by kind, layer
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		match := listName.FindStringSubmatch(name)
		if match == nil {
			continue
		}
		var lists [][]int
		if err := json.Unmarshal(entries[name], &lists); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if len(lists) == 0 {
			return nil, fmt.Errorf("%s: no lists, expected one for each head", name)
		}
		for _, list := range lists {
			if err := checkOrder(list, len(lists[0])); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
		layer, kind := match[1], match[2]
		if all[kind] == nil {
			all[kind] = make(map[string][][]int)
		}
		if _, has := all[kind][layer]; has {
			return nil, fmt.Errorf("%s: layer %s has lists of %s_proj by another name too", name, layer, kind)
		}
		all[kind][layer] = lists
	}
	chosen := all[c.SelectedChannel]
	if len(chosen) == 0 {
		return nil, fmt.Errorf("it has no lists of %s_proj, which selected_channel asks for; it has those of %v",
			c.SelectedChannel, slices.Sorted(maps.Keys(all)))
	}
	for layer, lists := range chosen {
		if kvHeads := len(all["k"][layer]); kvHeads > 0 && len(lists)%kvHeads == 0 {
			lists = merge(lists, len(lists)/kvHeads)
		}
		for h, list := range lists {
			lists[h] = list[:min(c.R, len(list))]
		}
		chosen[layer] = lists
	}
	return chosen, nil
}

// checkOrder makes sure that a list has each of n channels once.
func checkOrder(list []int, n int) error {
	if len(list) != n {
		return fmt.Errorf("a list has %d channels, the first one %d: expected all channels in each", len(list), n)
	}
	seen := make([]bool, n)
	for _, channel := range list {
		if channel < 0 || channel >= n || seen[channel] {
			return fmt.Errorf("a list has channel %d twice or out of range, expected 0..%d in some order", channel, n-1)
		}
		seen[channel] = true
	}
	return nil
}

// merge makes one list of each group of them.
func merge(lists [][]int, group int) [][]int {
	var merged [][]int
	for some := range slices.Chunk(lists, group) {
		merged = append(merged, mergeGroup(some))
	}
	return merged
}

func mergeGroup(lists [][]int) []int {
	ranks := make(map[int]int)
	for _, list := range lists {
		for rank, channel := range list {
			ranks[channel] += rank
		}
	}
	return slices.SortedFunc(maps.Keys(ranks), func(a, b int) int {
		if ranks[a] != ranks[b] {
			return ranks[a] - ranks[b]
		}
		return a - b
	})
}
