package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/twilight-sidecar/twilight/benchmark"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

type configCmd struct {
	Check  configCheckCmd  `cmd:"" help:"Tell what is wrong with Twilight configs; exit 1 if anything is."`
	Schema configSchemaCmd `cmd:"" help:"Print the JSON Schema of Twilight configs."`
}

type configSchemaCmd struct{}

func (configSchemaCmd) Run(term *terminal) error {
	_, err := term.out.Write(benchmark.ConfigSchema)
	return err
}

type configCheckCmd struct {
	Files []string `arg:"" name:"file" help:"Twilight JSON configs."`
	JSON  bool     `name:"json" help:"Print the findings as JSON, and nothing else, on stdout."`
}

func (*configCheckCmd) Help() string {
	return `Names everything that twilightd would refuse, by its path in the config:

    twilight config check benchmark/configs/*.json

A file that a config names and that is not there, such as a channel file (config_path), is a warning. Paths
in a config that are not absolute start at its folder.`
}

// checked is what was found in a file.
type checked struct {
	File     string    `json:"file"`
	Errors   []finding `json:"errors"`
	Warnings []finding `json:"warnings"`
}

type finding struct {
	Path    string `json:"path"` // in the config; "" for all of it
	Message string `json:"message"`
}

func (f finding) String() string {
	if f.Path == "" {
		return f.Message
	}
	return f.Path + ": " + f.Message
}

func (c *configCheckCmd) Run(term *terminal) error {
	known, err := methods.New()
	if err != nil {
		return err
	}
	var all []checked
	bad := 0
	for _, file := range c.Files {
		found := checkConfig(known, file)
		if len(found.Errors) > 0 {
			bad++
		}
		all = append(all, found)
	}
	if c.JSON {
		if err := printJSON(term.out, all); err != nil {
			return err
		}
	} else {
		for _, found := range all {
			if len(found.Errors) == 0 {
				fmt.Fprintf(term.out, "%s: ok\n", found.File)
			}
			for _, f := range found.Errors {
				fmt.Fprintf(term.out, "%s: error: %v\n", found.File, f)
			}
			for _, f := range found.Warnings {
				fmt.Fprintf(term.out, "%s: warning: %v\n", found.File, f)
			}
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d configs are not right", bad, len(all))
	}
	return nil
}

func checkConfig(known *pipeline.Methods, file string) checked {
	found := checked{File: file, Errors: []finding{}, Warnings: []finding{}}
	config, err := os.ReadFile(file)
	if err != nil {
		found.Errors = append(found.Errors, finding{Message: err.Error()})
		return found
	}
	inlined, notInlined := methods.Inline(config, func(path string) ([]byte, error) {
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(file), path)
		}
		return os.ReadFile(path)
	})
	if notInlined == nil {
		config = inlined
	} else {
		path, message, _ := strings.Cut(notInlined.Error(), ": ")
		to := &found.Errors
		if errors.Is(notInlined, fs.ErrNotExist) {
			to = &found.Warnings
		}
		*to = append(*to, finding{path, message})
	}
	_, err = known.Parse(config)
	var faults pipeline.Faults
	if one := (*fault.Error)(nil); !errors.As(err, &faults) && errors.As(err, &one) {
		faults = pipeline.Faults{one}
	}
	for _, f := range faults {
		if notInlined == nil || spells(config, f.Field) { // else the file would have had it
			found.Errors = append(found.Errors, finding{f.Field, f.Text})
		}
	}
	return found
}

// spells tells whether a config has the key of a stage that a path begins with.
func spells(config []byte, path string) bool {
	stage, rest, _ := strings.Cut(path, ".")
	key, _, _ := strings.Cut(rest, "[")
	var stages map[string]json.RawMessage
	var keys map[string]json.RawMessage
	if json.Unmarshal(config, &stages) != nil || json.Unmarshal(stages[stage], &keys) != nil {
		return true
	}
	_, has := keys[key]
	return has
}
