package main

// board.go: where the loop posts snapshots, and everybody else looks.

import (
	"encoding/json"
	"sync"
	"time"
)

// board holds the newest snapshot. Posting never waits for those who look.
type board struct {
	mu   sync.Mutex
	snap *snapshot
	next chan struct{} // closed at the next post
	body []byte        // of snap as JSON, once somebody asked for it
}

func newBoard(snap *snapshot) *board { return &board{snap: snap, next: make(chan struct{})} }

func (b *board) post(snap *snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.snap, b.body = snap, nil
	close(b.next)
	b.next = make(chan struct{})
}

// look returns the newest snapshot and a channel that is closed when there is a
// newer one.
func (b *board) look() (*snapshot, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.snap, b.next
}

// lookJSON is look for those who send the snapshot on. It is encoded once.
func (b *board) lookJSON(now time.Time) (json.RawMessage, <-chan struct{}) {
	b.mu.Lock()
	snap, body, next := b.snap, b.body, b.next
	b.mu.Unlock()
	if body == nil {
		body = mustJSON(snap) // outside of the lock, for it can take milliseconds
		b.mu.Lock()
		if b.snap == snap {
			b.body = body
		}
		b.mu.Unlock()
	}
	return redate(body, now), next
}
