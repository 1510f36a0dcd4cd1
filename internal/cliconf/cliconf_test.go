package cliconf

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"
)

type cli struct {
	Settings File
	Listen   []string
	Timeout  time.Duration `default:"1s"`
	Workers  int
	Quiet    bool
	Serve    struct {
		OnlyHere string
	} `cmd:"" default:"1"`
}

func parse(t *testing.T, args ...string) (*cli, error) {
	t.Helper()
	var c cli
	parser, err := kong.New(&c, Options()...)
	if err != nil {
		t.Fatal(err)
	}
	_, err = parser.Parse(args)
	return &c, err
}

func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPrecedence(t *testing.T) {
	path := write(t, "c.yaml", "timeout: 2s\n")
	want := func(timeout time.Duration, args ...string) {
		t.Helper()
		c, err := parse(t, args...)
		if err != nil {
			t.Fatal(err)
		}
		if c.Timeout != timeout {
			t.Errorf("%v: timeout %v, want %v", args, c.Timeout, timeout)
		}
	}
	want(time.Second)
	want(2*time.Second, "--settings", path)
	t.Setenv("TWILIGHT_TIMEOUT", "3s")
	want(3*time.Second, "--settings", path)
	want(4*time.Second, "--settings", path, "--timeout", "4s")
}

func TestFileFromEnvironment(t *testing.T) {
	t.Setenv("TWILIGHT_SETTINGS", write(t, "c.yaml", "workers: 3"))
	c, err := parse(t)
	if err != nil || c.Workers != 3 {
		t.Errorf("workers %d, error %v; want 3", c.Workers, err)
	}
}

func TestDefaultTarget(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	if got, want := DefaultTarget(), "unix://"+dir+"/twilight/twilightd.sock"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	t.Setenv("XDG_RUNTIME_DIR", filepath.Join(dir, "none"))
	t.Setenv("TMPDIR", dir)
	if got, want := DefaultTarget(), fmt.Sprintf("unix://%s/twilight-%d/twilightd.sock", dir, os.Geteuid()); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestForms(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		"json": `{"listen": ["unix:///a,b", "tcp://:1"], "workers": 3, "quiet": true, "only-here": "x"}`,
		"yaml": "listen:\n  - unix:///a,b\n  - tcp://:1\nworkers: 3\nquiet: true\nonly-here: x\n",
	} {
		c, err := parse(t, "--settings", write(t, name, content))
		if err != nil {
			t.Fatal(name, err)
		}
		if !slices.Equal(c.Listen, []string{"unix:///a,b", "tcp://:1"}) || c.Workers != 3 || !c.Quiet || c.Serve.OnlyHere != "x" {
			t.Errorf("%s: %+v", name, c)
		}
	}
	if _, err := parse(t, "--settings", write(t, "empty", "")); err != nil {
		t.Error("an empty file:", err)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	for content, want := range map[string]string{
		"wrokers: 3":         `"wrokers"`,
		"workers: {a: 1}":    `"workers"`,
		"workers: [":         "configuration file",
		"- workers":          "configuration file",
		"workers: many":      "many",
		"timeout: 3 parsecs": "parsecs",
	} {
		_, err := parse(t, "--settings", write(t, "c", content))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v does not say %q", content, err, want)
		}
	}
	if _, err := parse(t, "--settings", filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a missing file was taken")
	}
}

// FuzzFile reads arbitrary files.
func FuzzFile(f *testing.F) {
	f.Add([]byte("workers: 3\nlisten: [a, 1, null, {}]"))
	f.Add([]byte(`{"timeout": "1s"}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		parser, err := kong.New(&cli{}, append(Options(), kong.Exit(func(int) {}))...)
		if err != nil {
			t.Fatal(err)
		}
		resolver, err := load(bytes.NewReader(content))
		if err != nil {
			return
		}
		if resolver.Validate(parser.Model) != nil {
			return
		}
		for _, flag := range parser.Model.Flags {
			_, _ = resolver.Resolve(nil, nil, flag)
		}
	})
}
