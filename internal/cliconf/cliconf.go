// Package cliconf gives every command one scheme of configuration: a flag counts before its environment
// variable (--drain-timeout: TWILIGHT_DRAIN_TIMEOUT), that before the file of --settings, that before
// the default.
package cliconf

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v3"
)

// File is the type of a --settings flag: the path of a YAML or JSON file whose keys are names of flags, as
// in {"log-level": "debug", "listen": ["unix:///run/twilight/twilightd.sock"]}.
type File = kong.ConfigFlag

// DefaultTarget is where a daemon listens, and a client looks for it, unless told otherwise: a Unix socket
// in a folder that belongs to the user alone.
func DefaultTarget() string {
	folder := os.Getenv("XDG_RUNTIME_DIR")
	if folder == "" {
		folder = fmt.Sprintf("/run/user/%d", os.Geteuid())
	}
	if info, err := os.Stat(folder); err == nil && info.IsDir() {
		folder = filepath.Join(folder, "twilight")
	} else {
		folder = filepath.Join(os.TempDir(), fmt.Sprintf("twilight-%d", os.Geteuid()))
	}
	return "unix://" + filepath.Join(folder, "twilightd.sock")
}

// Options are the options of a command's parser.
func Options() []kong.Option {
	return []kong.Option{
		kong.DefaultEnvars("TWILIGHT"),
		kong.Configuration(load),
		kong.ConfigureHelp(kong.HelpOptions{WrapUpperBound: 100}),
	}
}

// file resolves flags from a configuration file.
type file map[string]any

func load(r io.Reader) (kong.Resolver, error) {
	values := make(map[string]any)
	decoder := yaml.NewDecoder(r) // JSON is YAML
	if err := decoder.Decode(&values); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("configuration file: %w", err)
	}
	return file(values), nil
}

// Validate refuses keys that name no flag.
func (f file) Validate(app *kong.Application) error {
	known := make(map[string]bool)
	var visit func(*kong.Node)
	visit = func(n *kong.Node) {
		for _, flag := range n.Flags {
			known[flag.Name] = true
		}
		for _, child := range n.Children {
			visit(child)
		}
	}
	visit(app.Node)
	for _, key := range slices.Sorted(maps.Keys(f)) {
		if !known[key] {
			return fmt.Errorf("configuration file: there is no flag --%s to set by key %q", key, key)
		}
	}
	return nil
}

// Resolve implements kong.Resolver. kong asks resolvers also for flags that the environment has set.
func (f file) Resolve(_ *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
	for _, env := range flag.Envs {
		if _, set := os.LookupEnv(env); set {
			return nil, nil
		}
	}
	switch value := f[flag.Name].(type) {
	case nil:
		return nil, nil
	case []any:
		items := make([]string, len(value))
		for i, item := range value {
			items[i] = kong.JoinEscaped([]string{fmt.Sprint(item)}, flag.Tag.Sep)
		}
		return strings.Join(items, string(flag.Tag.Sep)), nil
	case map[string]any:
		return nil, fmt.Errorf("configuration file: key %q must be a value or a list of values", flag.Name)
	default:
		return fmt.Sprint(value), nil
	}
}
