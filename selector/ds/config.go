package ds

import (
	"fmt"
	"math"
	"strconv"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/lowbit"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// TokenBudget is how many tokens of a row become candidates.
	TokenBudget int `json:"token_budget"`
	// SparsityRate, if not -1, replaces TokenBudget by this share of the row's valid tokens, rounded up.
	SparsityRate float64 `json:"sparsity_rate"`
	// QuantBit is the width of a label's code: 2, 4 or 8; 32 for channels as they are.
	QuantBit int `json:"quant_bit"`
	// R is how many channels a label has.
	R int `json:"r"`
	// SelectedChannel says which of a channel file's lists are meant: those ranked by the size of the
	// queries ("q"), of the keys ("k"), or of their products ("qk").
	SelectedChannel string `json:"selected_channel"`
	// ConfigPath names a channel file on the client, which is to put its lists under Channels: see
	// Inline.
	ConfigPath string `json:"config_path"`
	// Channels is, for each layer of the model, by its index, a list for each KV head: channels, the
	// heaviest first, of which the first R count.
	Channels map[string][][]int `json:"channels"`
}

// Default is what Twilight's config_ds_twi.json ships: 8192 tokens by 64 channels in 2 bits. Channels have
// no default.
func Default() *Config {
	return &Config{
		TokenBudget: 8192, SparsityRate: -1, QuantBit: 2, R: 64, SelectedChannel: "q",
		Channels: map[string][][]int{},
	}
}

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "ds", Default: func() selector.Config { return Default() }}
}

// Unquantised is the QuantBit of channels as they are.
const Unquantised = 32

const maxChannels = math.MaxUint16 // of a key

// Validate implements selector.Config.
func (c *Config) Validate() error {
	if err := selector.CheckBudget(c.TokenBudget, c.SparsityRate); err != nil {
		return err
	}
	if c.QuantBit != Unquantised && lowbit.CheckBits(c.QuantBit) != nil {
		return fault.Newf(fault.Invalid, "quant_bit",
			"quant_bit is %d, expected 2, 4, 8, or 32 for channels as they are", c.QuantBit)
	}
	if c.R < 1 || c.R > maxChannels {
		return fault.Newf(fault.Invalid, "r", "r is %d, expected 1..%d channels", c.R, maxChannels)
	}
	switch c.SelectedChannel {
	case "q", "k", "qk":
	default:
		return fault.Newf(fault.Invalid, "selected_channel",
			`selected_channel is %q, expected "q", "k" or "qk"`, c.SelectedChannel)
	}
	return c.checkChannels()
}

func (c *Config) checkChannels() error {
	switch {
	case len(c.Channels) > 0:
	case c.ConfigPath != "":
		return fault.Newf(fault.Invalid, "channels",
			"channels is missing, and config_path names a file, which only a client opens: have it send the file's lists")
	default:
		return fault.Newf(fault.Invalid, "channels",
			"channels is missing: give a list of at least r channels for each layer and KV head, as calibration finds them")
	}
	for layer, heads := range c.Channels {
		field := fmt.Sprintf("channels[%q]", layer)
		if _, err := layerIndex(layer); err != nil {
			return fault.Newf(fault.Invalid, field, "layer %q is no index of a layer, expected a number from 0", layer)
		}
		if len(heads) == 0 {
			return fault.Newf(fault.Invalid, field, "layer %s has no lists, expected one for each KV head", layer)
		}
		for h, list := range heads {
			if err := c.checkList(list, fmt.Sprintf("%s[%d]", field, h)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Config) checkList(list []int, field string) error {
	if len(list) < c.R {
		return fault.Newf(fault.Invalid, field, "the list has %d channels, expected at least r, %d", len(list), c.R)
	}
	seen := make(map[int]bool, c.R)
	for i, channel := range list[:c.R] {
		if channel < 0 || channel >= maxChannels {
			return fault.Newf(fault.Invalid, fmt.Sprintf("%s[%d]", field, i),
				"channel is %d, expected 0..%d", channel, maxChannels-1)
		}
		if seen[channel] {
			return fault.Newf(fault.Invalid, fmt.Sprintf("%s[%d]", field, i), "channel %d comes twice", channel)
		}
		seen[channel] = true
	}
	return nil
}

// layerIndex reads the index of a layer in its only spelling.
func layerIndex(s string) (int, error) {
	index, err := strconv.ParseUint(s, 10, 31)
	if err == nil && strconv.FormatUint(index, 10) != s {
		err = strconv.ErrSyntax
	}
	return int(index), err
}

// New implements selector.Config.
func (c *Config) New() selector.Selector {
	byLayer := make(map[int][][]uint16, len(c.Channels))
	for layer, heads := range c.Channels {
		index, _ := layerIndex(layer) // was valid
		lists := make([][]uint16, len(heads))
		for h, list := range heads {
			for _, channel := range list[:c.R] {
				lists[h] = append(lists[h], uint16(channel))
			}
		}
		byLayer[index] = lists
	}
	return ds{c.TokenBudget, c.SparsityRate, labels{c.R, lowbit.Format{Bits: c.QuantBit}, byLayer}}
}
