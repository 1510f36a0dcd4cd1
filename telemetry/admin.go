package telemetry

import (
	"embed"
	"encoding/json"
	"io/fs"
	"net"
	"net/http"
	"net/http/pprof"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

//go:embed page
var pages embed.FS

// pace is how often a stream of budgets is refreshed.
const pace = time.Second

// Admin says what an admin listener serves.
type Admin struct {
	// Healthy answers /healthz: nil while the daemon serves.
	Healthy func() error
	// Local restricts the handler to what a listener on this host alone should serve: it adds
	// /debug/pprof, and refuses requests that name another host, as a web page elsewhere could make a
	// browser send them.
	Local bool
}

// Handler serves
//
//	/              the budget page
//	/budgets       a Snapshot as JSON; ?sequence=ID chooses whose budget it tells
//	/budgets/live  the same each second, as server-sent events
//	/metrics       Prometheus, with exemplars in OpenMetrics
//	/healthz       200 while the daemon serves, else 503
//	/debug/pprof/  profiles, if Admin.Local
//
// Requests of /budgets/live end with their contexts.
func (t *Telemetry) Handler(a Admin) http.Handler {
	mux := http.NewServeMux()
	page, _ := fs.Sub(pages, "page") // cannot fail: the name is valid
	mux.Handle("GET /", secured(http.FileServerFS(page)))
	mux.HandleFunc("GET /budgets", t.serveBudgets)
	mux.HandleFunc("GET /budgets/live", t.serveLive)
	mux.Handle("GET /metrics", promhttp.HandlerFor(t.registry, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if err := a.Healthy(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	if !a.Local {
		return mux
	}
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isLocal(r.Host) {
			http.Error(w, "this listener answers to localhost only", http.StatusMisdirectedRequest)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// isLocal tells whether a Host header names this host as such.
func isLocal(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// secured lets a page use what comes from its own origin, and nothing else.
func secured(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Cache-Control", "no-cache") // a new daemon may have a new page
		h.ServeHTTP(w, r)
	})
}

// chosen is the sequence that a request names, 0 for none.
func chosen(r *http.Request) uint64 {
	id, _ := strconv.ParseUint(r.URL.Query().Get("sequence"), 10, 64) // an unknown name is none
	return id
}

func (t *Telemetry) serveBudgets(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(t.Snapshot(r.Context(), chosen(r)))
}

func (t *Telemetry) serveLive(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	control := http.NewResponseController(w)
	sequence := chosen(r)
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		data, err := json.Marshal(t.Snapshot(r.Context(), sequence))
		if err != nil {
			return
		}
		_ = control.SetWriteDeadline(time.Now().Add(10 * pace)) // a reader that is gone
		if _, err := w.Write(append(append([]byte("retry: 1000\ndata: "), data...), "\n\n"...)); err != nil {
			return
		}
		if control.Flush() != nil {
			return
		}
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		}
	}
}
