package fdsock

import (
	"bytes"
	"errors"
	"fmt"
)

const (
	// LeaseTokenLen is the size of a lease's token, in bytes.
	LeaseTokenLen = 32
	// TokenLen is the size of a descriptor's token, in bytes.
	TokenLen = 16
	// MaxDescriptors is the most that one packet carries.
	MaxDescriptors = 64

	magic     = "TWFD"
	version   = 1
	headerLen = len(magic) + 2 + LeaseTokenLen
	maxPacket = headerLen + MaxDescriptors*TokenLen

	// Answers: a byte, and behind refused a sentence.
	accepted    = 0
	refused     = 1
	maxSentence = 255
)

// LeaseToken is the bearer token of a lease.
type LeaseToken [LeaseTokenLen]byte

// Token names one descriptor, once.
type Token [TokenLen]byte

// packet says whose descriptors come with it, and under which tokens.
type packet struct {
	lease  LeaseToken
	tokens []Token
}

func (p *packet) encode() []byte {
	b := make([]byte, 0, headerLen+len(p.tokens)*TokenLen)
	b = append(b, magic...)
	b = append(b, version, byte(len(p.tokens)))
	b = append(b, p.lease[:]...)
	for i := range p.tokens {
		b = append(b, p.tokens[i][:]...)
	}
	return b
}

func parsePacket(b []byte) (*packet, error) {
	switch {
	case len(b) < headerLen:
		return nil, fmt.Errorf("the packet has %d bytes, fewer than the %d of its header", len(b), headerLen)
	case !bytes.HasPrefix(b, []byte(magic)):
		return nil, fmt.Errorf("the packet does not start with %q", magic)
	case b[len(magic)] != version:
		return nil, fmt.Errorf("version %d is not served, only %d", b[len(magic)], version)
	}
	n := int(b[len(magic)+1])
	if n < 1 || n > MaxDescriptors {
		return nil, fmt.Errorf("the count is %d, not 1 to %d", n, MaxDescriptors)
	}
	if want := headerLen + n*TokenLen; len(b) != want {
		return nil, fmt.Errorf("a packet of %d tokens has %d bytes, not %d", n, want, len(b))
	}
	p := &packet{lease: LeaseToken(b[headerLen-LeaseTokenLen:]), tokens: make([]Token, n)}
	for i := range p.tokens {
		p.tokens[i] = Token(b[headerLen+i*TokenLen:])
	}
	return p, nil
}

// encodeAnswer takes nil for accepted.
func encodeAnswer(err error) []byte {
	if err == nil {
		return []byte{accepted}
	}
	sentence := err.Error()
	return append([]byte{refused}, sentence[:min(len(sentence), maxSentence)]...)
}

func parseAnswer(b []byte) error {
	switch {
	case len(b) == 1 && b[0] == accepted:
		return nil
	case len(b) > 1 && b[0] == refused:
		return errors.New(string(b[1:]))
	}
	return errors.New("the answer is neither a 0 nor a 1 and a sentence")
}
