package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// writeCertificate makes a certificate that signs itself, and its key.
func writeCertificate(t *testing.T, f *tlsFiles, serial int64, changed time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour), IsCA: true}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, f.cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), changed)
	write(t, f.clientCA, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), changed)
	write(t, f.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), changed)
}

func write(t *testing.T, path string, content []byte, changed time.Time) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, changed, changed); err != nil {
		t.Fatal(err)
	}
}

func TestTLSFiles(t *testing.T) {
	t.Parallel()
	dir, now := t.TempDir(), time.Now()
	f := &tlsFiles{
		cert: filepath.Join(dir, "crt"), key: filepath.Join(dir, "key"), clientCA: filepath.Join(dir, "ca"),
		logger: slog.New(slog.DiscardHandler),
	}
	if _, err := f.config(); err == nil {
		t.Error("missing files were taken")
	}
	writeCertificate(t, f, 1, now)
	config, err := f.config()
	if err != nil {
		t.Fatal(err)
	}
	want := func(serial int64) {
		t.Helper()
		served, err := config.GetConfigForClient(nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := served.Certificates[0].Leaf.SerialNumber.Int64(); got != serial {
			t.Errorf("certificate %d is served, want %d", got, serial)
		}
		if served.ClientAuth != tls.RequireAndVerifyClientCert || served.ClientCAs == nil {
			t.Error("clients need no certificate")
		}
	}
	want(1)
	writeCertificate(t, f, 2, now.Add(time.Second))
	want(2)
	write(t, f.key, []byte("half written"), now.Add(2*time.Second))
	want(2)
	writeCertificate(t, f, 3, now.Add(3*time.Second))
	want(3)
	if err := os.Remove(f.clientCA); err != nil {
		t.Fatal(err)
	}
	want(3)
}
