package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/twilight-sidecar/twilight/telemetry"
)

type budgetsCmd struct {
	Admin    string `required:"" placeholder:"URL" help:"The admin listener of a twilightd, as its --admin has it: unix:///PATH, tcp://HOST:PORT or http://HOST:PORT."`
	Once     bool   `help:"Print what is kept now, and end."`
	JSON     bool   `name:"json" help:"Print JSON, a line each second."`
	Measure  string `enum:"kept,candidates,mass,true_mass,error" default:"kept" help:"What to show: kept, candidates, mass, true_mass or error (kept)."`
	Sequence uint64 `placeholder:"ID" help:"The sequence whose budget to show (the last seen)."`
}

func (*budgetsCmd) Help() string {
	return `What the page of the admin listener shows, in a terminal:

    twilightd --admin tcp://127.0.0.1:9464 &
    twilight budgets --admin tcp://127.0.0.1:9464

Follows the daemon, through restarts, until interrupted. Where stdout is no terminal, pictures follow each
other.`
}

func (c *budgetsCmd) Run(ctx context.Context, term *terminal) error {
	admin, err := newAdmin(c.Admin)
	if err != nil {
		return err
	}
	defer admin.client.CloseIdleConnections()
	if c.Once {
		s, err := admin.snapshot(ctx, c.Sequence)
		if err != nil {
			return err
		}
		return c.show(term.out, s, false)
	}
	live := isTerminal(term.out) && !c.JSON
	failed := false
	for {
		err := admin.follow(ctx, c.Sequence, func(s *telemetry.Snapshot) error {
			failed = false
			return c.show(term.out, s, live)
		})
		if ctx.Err() != nil {
			return nil // interrupted: that is how it ends
		}
		if !failed {
			fmt.Fprintf(term.err, "twilight: %v; trying again\n", err)
			failed = true
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil
		}
	}
}

// show prints a snapshot; in a live terminal, in place of the last.
func (c *budgetsCmd) show(w io.Writer, s *telemetry.Snapshot, live bool) error {
	if c.JSON {
		return json.NewEncoder(w).Encode(s)
	}
	var b bytes.Buffer
	if live {
		b.WriteString("\x1b[H\x1b[J") // home, and clear to the end
	}
	c.print(&b, s, coloursOf(w), columnsOf(w))
	_, err := w.Write(b.Bytes())
	return err
}

func (c *budgetsCmd) print(w io.Writer, s *telemetry.Snapshot, depth colours, columns int) {
	state := "serving"
	if s.Draining {
		state = "draining"
	}
	fmt.Fprintf(w, "twilightd %s, up %v, %s\n", s.Version, (time.Duration(s.Uptime) * time.Second), state)
	if len(s.Leases) == 0 {
		fmt.Fprintln(w, "\nNo lease is open.")
	}
	for i := range s.Leases {
		c.printLease(w, &s.Leases[i], depth, columns)
	}
}

func (c *budgetsCmd) printLease(w io.Writer, l *telemetry.LeaseSnapshot, depth colours, columns int) {
	fmt.Fprintf(w, "\nlease %d  %s on %s: %s; %s lent, %s of shadow\n", l.ID, l.Engine, l.Device,
		strings.Join([]string{l.Selector, l.Estimator, l.Pruner}, arrow), bytesText(l.LentBytes), bytesText(l.ShadowBytes))
	if l.ValidTokens == 0 {
		fmt.Fprintln(w, "no step is over yet")
		return
	}
	fmt.Fprintf(w, "%d steps, %.1f%% of the tokens kept", l.Steps, 100*float64(l.KeptTokens)/float64(l.ValidTokens))
	if l.ReadBytes > 0 {
		fmt.Fprintf(w, ", %.1f times fewer bytes read than by dense attention", float64(l.DenseBytes)/float64(l.ReadBytes))
	}
	fmt.Fprintln(w)
	if l.TraceID != "" {
		fmt.Fprintf(w, "last sampled step: trace %s\n", l.TraceID)
	}

	floor := 0.0
	m := grid{layers: l.Layers, format: share, unit: "of the attention, as estimated"}
	switch c.Measure {
	case "kept":
		m.cells, m.format, m.unit, floor = l.Kept, tokens, "tokens kept (logarithmic)", 1
	case "candidates":
		m.cells, m.format, m.unit, floor = l.Candidates, tokens, "candidates (logarithmic)", 1
	case "mass":
		m.cells = l.Mass
	case "true_mass":
		m.cells, m.unit = l.TrueMass, "of the attention, where audited"
	case "error":
		m.cells, m.format, m.unit, floor = l.Error, relErr, "error of the output, where audited (logarithmic)", 1e-4
	}
	m.scale = scaleOf(floor, m.cells...)
	fmt.Fprintln(w)
	m.print(w, depth, columns)
	if len(l.Budget) > 0 {
		last := l.Budget[len(l.Budget)-1]
		fmt.Fprintf(w, "\nsequence %s, step %d: %s kept of %s candidates of %d\n", l.Sequence, last.Step,
			tokens(float64(last.Kept)), tokens(float64(last.Candidates)), last.Length)
		kept := make([]float64, 0, len(l.Budget))
		for _, p := range l.Budget[max(0, len(l.Budget)-columns+6):] {
			kept = append(kept, float64(p.Kept))
		}
		fmt.Fprintf(w, "kept  %s\n", sparkline(kept))
	}
}

// admin is an admin listener.
type admin struct {
	base   string
	client *http.Client
}

func newAdmin(target string) (*admin, error) {
	u, err := url.Parse(target)
	if err != nil {
		return nil, fmt.Errorf("--admin: %w", err)
	}
	switch {
	case u.Scheme == "unix" && u.Path != "":
		dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", u.Path)
		}
		return &admin{"http://localhost", &http.Client{Transport: &http.Transport{DialContext: dial}}}, nil
	case (u.Scheme == "tcp" || u.Scheme == "http") && u.Host != "":
		return &admin{"http://" + u.Host, &http.Client{Transport: &http.Transport{}}}, nil
	}
	return nil, fmt.Errorf("--admin: %q is neither unix:///PATH nor tcp://HOST:PORT", target)
}

func (a *admin) get(ctx context.Context, path string, sequence uint64) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("%s%s?sequence=%d", a.base, path, sequence), nil)
	if err != nil {
		return nil, err
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("%s%s answers %s: is it the admin listener of a twilightd?", a.base, path, resp.Status)
	}
	return resp.Body, nil
}

func (a *admin) snapshot(ctx context.Context, sequence uint64) (*telemetry.Snapshot, error) {
	body, err := a.get(ctx, "/budgets", sequence)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var s telemetry.Snapshot
	return &s, json.NewDecoder(body).Decode(&s)
}

// follow calls show for each snapshot of a stream, until that ends.
func (a *admin) follow(ctx context.Context, sequence uint64, show func(*telemetry.Snapshot) error) error {
	body, err := a.get(ctx, "/budgets/live", sequence)
	if err != nil {
		return err
	}
	defer body.Close()
	lines := bufio.NewReader(body)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return errors.Join(errors.New("the stream of budgets ended"), err)
		}
		data, ok := bytes.CutPrefix(line, []byte("data: "))
		if !ok {
			continue
		}
		var s telemetry.Snapshot
		if err := json.Unmarshal(data, &s); err != nil {
			return err
		}
		if err := show(&s); err != nil {
			return err
		}
	}
}
