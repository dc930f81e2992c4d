package main

// board.go: where the loop posts snapshots, and everybody else looks.

import "sync"

// board holds the newest snapshot. Posting never waits for those who look.
type board struct {
	mu   sync.Mutex
	snap *snapshot
	next chan struct{} // closed at the next post
}

func newBoard(snap *snapshot) *board { return &board{snap: snap, next: make(chan struct{})} }

func (b *board) post(snap *snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.snap = snap
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
