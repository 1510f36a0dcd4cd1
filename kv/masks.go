package kv

// masks remembers, for every (layer, chunk), which tokens the shadow covers.
type masks struct {
	epochs []uint16 // by layer
	marks  []mark   // [chunk][layer]: a step changes few chunks, but in all layers
	any    []uint16 // by chunk: covers have of every layer, so that most clears end here
}

// mark is the state of a (layer, chunk): the tokens whose keys are indexed, and those that chunk-wide
// data covers. It says nothing if its epoch is not the layer's.
type mark struct{ have, covered, epoch uint16 }

func newMasks(layers, chunks int) masks {
	return masks{make([]uint16, layers), make([]mark, layers*chunks), make([]uint16, chunks)}
}

func (m *masks) at(layer int, chunk int32) *mark {
	k := &m.marks[int(chunk)*len(m.epochs)+layer]
	if epoch := m.epochs[layer]; k.epoch != epoch {
		*k = mark{epoch: epoch}
	}
	return k
}

// add marks want as indexed and covered. It returns all tokens that are, and those that were not
// indexed before; nothing, if nothing changed.
func (m *masks) add(layer int, chunk int32, want uint16) (valid, fresh uint16) {
	k := m.at(layer, chunk)
	fresh = want &^ k.have
	if fresh == 0 && k.covered == k.have {
		return 0, 0
	}
	k.have |= want
	k.covered = k.have
	m.any[chunk] |= want
	return k.have, fresh
}

// clear makes tokens count as not indexed in all layers. It reports whether some may have been.
func (m *masks) clear(chunk int32, tokens uint16) bool {
	if m.any[chunk]&tokens == 0 {
		return false
	}
	m.any[chunk] &^= tokens
	layers := m.marks[int(chunk)*len(m.epochs):][:len(m.epochs)]
	for i := range layers {
		layers[i].have &^= tokens
	}
	return true
}

// invalidate clears every chunk of a layer.
func (m *masks) invalidate(layer int) {
	m.epochs[layer]++
	if m.epochs[layer] != 0 {
		return
	}
	// The epochs came round: marks of ages ago would count again.
	for i := layer; i < len(m.marks); i += len(m.epochs) {
		m.marks[i] = mark{}
	}
}

// span returns the mask of a chunk's tokens in [from, to), clipped.
func span(from, to int) uint16 {
	from, to = max(from, 0), min(to, ChunkTokens)
	if from >= to {
		return 0
	}
	return uint16(1<<to - 1<<from)
}
