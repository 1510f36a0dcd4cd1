package magicpig

import (
	"encoding/binary"
	"slices"

	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

type magicpig struct {
	sinks, window int
	hashes        hashes
}

func (m magicpig) Shadow() kv.Shadow { return m.hashes }

// Select implements selector.Selector.
func (m magicpig) Select(dst []int32, row *selector.Row) []int32 {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	m.hashQueries(s, row)
	first, last := m.ends(row)
	words := m.hashes.words()
	for p := row.First; p < row.Len; {
		c := p / kv.ChunkTokens
		record := row.Records.Chunk(c)
		lost := binary.LittleEndian.Uint16(record)
		for end := min(row.Len, (c+1)*kv.ChunkTokens); p < end; p++ {
			t := p % kv.ChunkTokens
			own := record[lostBytes+t*words*wordBytes:][:words*wordBytes]
			if p < first || p >= last || lost>>t&1 == 1 || collide(own, s.words) {
				dst = append(dst, int32(p))
			}
		}
	}
	return dst
}

// ends says which tokens are always candidates: those before first and those from last on.
func (m magicpig) ends(row *selector.Row) (first, last int) {
	first, last = row.First+m.sinks, row.Len-m.window
	if row.PinFirst {
		first = max(first, (row.First/kv.ChunkTokens+1)*kv.ChunkTokens)
	}
	if row.PinCurrent {
		last = min(last, (row.Len-1)/kv.ChunkTokens*kv.ChunkTokens)
	}
	return first, last
}

// hashQueries sets s.words to the hashes of the row's queries, one query after another.
func (m magicpig) hashQueries(s *scratch, row *selector.Row) {
	s.vectors = s.vectors[:0]
	for _, query := range row.Queries {
		s.vectors = append(s.vectors, query...)
	}
	n := len(row.Queries) * m.hashes.words()
	s.codes = slices.Grow(s.codes[:0], n*perWord)[:n*perWord]
	clear(s.codes)
	m.hashes.hash(s.codes, m.hashes.words()*perWord, s.vectors, row.Dim, &s.products)
	s.words = slices.Grow(s.words[:0], n)[:n]
	for i := range s.words {
		c := s.codes[i*perWord:][:perWord]
		s.words[i] = uint64(c[0]) | uint64(c[1])<<16 | uint64(c[2])<<32 | uint64(c[3])<<48
	}
}

// collide says whether a key has two hashes of one of the queries.
func collide(key []byte, queries []uint64) bool {
	const (
		ones = 1<<48 | 1<<32 | 1<<16 | 1
		rest = ones * (1<<15 - 1)
	)
	words := len(key) / wordBytes
	for ; len(queries) > 0; queries = queries[words:] {
		// Four at a time. Hashes have 15 bits, so that adding 2^15-1 to their difference carries
		// into the 16th unless it is 0.
		var missed uint64
		for i, query := range queries[:words] {
			missed += (binary.LittleEndian.Uint64(key[i*wordBytes:]) ^ query + rest) >> 15 & ones
		}
		missed += missed >> 32
		missed += missed >> 16
		if int(missed&0xffff)+2 <= words*perWord {
			return true
		}
	}
	return false
}
