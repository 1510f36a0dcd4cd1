package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// tlsFiles serves TLS from files, which it reads again once one has changed.
type tlsFiles struct {
	cert, key, clientCA string
	logger              *slog.Logger

	mu      sync.Mutex
	loaded  *tls.Config
	changed [3]time.Time // of the files, when they were last read
}

// config fails if the files are not good now. If they are not later, the last good ones stay in use.
func (f *tlsFiles) config() (*tls.Config, error) {
	if err := f.load(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			if err := f.load(); err != nil {
				f.logger.Error("TLS files: keeping the last good ones", "error", err)
			}
			return f.loaded, nil
		},
	}, nil
}

// load reads the files if one has changed.
func (f *tlsFiles) load() error {
	var changed [3]time.Time
	for i, name := range []string{f.cert, f.key, f.clientCA} {
		info, err := os.Stat(name)
		if err != nil {
			return err
		}
		changed[i] = info.ModTime()
	}
	if changed == f.changed {
		return nil
	}
	f.changed = changed
	pair, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return fmt.Errorf("--tls-cert, --tls-key: %w", err)
	}
	pem, err := os.ReadFile(f.clientCA)
	if err != nil {
		return err
	}
	authorities := x509.NewCertPool()
	if !authorities.AppendCertsFromPEM(pem) {
		return fmt.Errorf("--tls-client-ca: %s holds no PEM certificate", f.clientCA)
	}
	f.loaded = &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    authorities,
	}
	return nil
}
